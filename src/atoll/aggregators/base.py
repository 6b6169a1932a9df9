"""The aggregator record: how clients' rows become one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from atoll.errors import invalid
from atoll.spec import Spec
from atoll.vectors import Weights


@dataclass(frozen=True, slots=True)
class Aggregator:
    """A rule for combining rows; callable on a plain matrix.

    Attributes:
        spec: name and arguments.
        rule: (rows [n, L], weights [n]) -> [L], or None for the weighted mean, which is streamed.
        weights: "examples", "uniform" or a callable: a client's weight in the average.
        denominator: what a weighted sum is divided by: the "realised" total weight, or the "expected" one.
        least: smallest cohort the rule can combine.
    """

    spec: Spec
    rule: Callable[[Tensor, Tensor], Tensor] | None
    weights: Literal["examples", "uniform"] | Weights = "examples"
    denominator: Literal["realised", "expected"] = "realised"
    least: int = 1

    @property
    def name(self) -> str:
        """The rule's name."""
        return str(self.spec["name"])

    def weigh(self, examples: Tensor, clients: Sequence[str]) -> Tensor:
        """Weights [C, 1] float64 of clients with these numbers of examples [C, 1]."""
        if self.weights == "examples":
            return examples.double()
        if self.weights == "uniform":
            return torch.ones_like(examples, dtype=torch.float64)
        # One client at a time, as at a site: a rule that looked at the others would depend on who shares a tile.
        each = [self.weights(examples[i : i + 1], clients[i : i + 1]).double() for i in range(len(clients))]
        weights = torch.cat(each) if each else examples.double()
        if weights.shape != examples.shape or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
            raise invalid(
                "weights",
                weights.tolist(),
                f"a callable that returns finite weights of at least 0, of shape {tuple(examples.shape)}",
            )
        return weights

    def __call__(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Combine rows [n, L] into [L]; weights [n] default to ones."""
        if rows.ndim != 2 or len(rows) < self.least:
            raise invalid("rows", tuple(rows.shape), f"a matrix of at least {self.least} rows")
        given = rows.new_ones(len(rows), dtype=torch.float64) if weights is None else weights.double()
        if given.shape != (len(rows),):
            raise invalid("weights", tuple(given.shape), f"one number for each of the {len(rows)} rows")
        if self.rule is not None:
            return self.rule(rows, given)
        if not float(given.sum()) > 0:
            raise invalid("weights", given.tolist(), "numbers of at least 0 that are not all 0")
        return ((given[:, None] * rows.double()).sum(0) / given.sum()).to(rows.dtype)


def check_weights(weights: object) -> None:
    """Refuse anything but a known rule for weights."""
    if weights not in ("examples", "uniform") and not callable(weights):
        raise invalid(
            "weights", weights, '"examples", "uniform" or callable(examples [C, 1], clients) -> weights [C, 1]'
        )
