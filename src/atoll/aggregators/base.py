"""The aggregator record: how clients' rows become one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from atoll.aggregators.rows import Rows, finite_rows
from atoll.errors import CompositionError, NonFiniteError, invalid
from atoll.spec import Spec
from atoll.vectors import Weights

CAP = 1e7
"""Largest weight a client may claim unless told otherwise: no client goes through ten million examples in a round, and
of what is far above that a server must not even add up one. It keeps out what is absurd. Within it a liar still counts
for as much as it says: where clients may lie, weigh them alike (`mean(weights="uniform")`, and every robust rule)."""

MOST = 100_000
"""Clients up to which a cohort that is large enough is looked for."""


class Ruling(NamedTuple):
    """What a rule made of a round's rows."""

    row: Tensor  # [L]
    share: Tensor | None = None  # [n] weight of each row in it, 0: refused; None when coordinates are judged one by one
    state: Any = None  # what the rule keeps for the next round
    rows: Tensor | None = None  # [n, L] what was judged, where an attack stands before the rule
    weights: Tensor | None = None  # [n] what was claimed there


def _any_cohort(count: int) -> int:
    return 1


def _none(count: int) -> int:
    return 0


def _stateless(row: Tensor) -> Any:
    return None


@dataclass(frozen=True, slots=True)
class Aggregator:
    """A rule for combining rows; callable on a plain matrix.

    Attributes:
        spec: name and arguments.
        rule: (rows, weights [n], state) -> Ruling, or None for the weighted mean, which is streamed.
        weights: "examples", "uniform" or a callable: a client's weight in the average.
        denominator: what a weighted sum is divided by: the "realised" total weight, or the "expected" one.
        least: (clients n) -> the fewest clients it can combine with the arguments it has for n.
        bears: (clients n) -> how many of them may send anything at all while the result stays as near to the others'
            rows as the rule's text says.
        needs: why it needs that many, for the error.
        spared: (clients n, malicious ones of them already found) -> the rule that still bears the others; None: this.
        init: (nought row [L]) -> what the server keeps between rounds; it is checkpointed.
        behind: the aggregator that an attack stands in front of.
        rooted: whether it judges by the row of the server's own data.
        cap: largest weight a client may claim.
        clip: weights above this count as this, and all are divided by it: the largest is 1; None: as they are.
    """

    spec: Spec
    rule: Callable[[Rows, Tensor, Any], Ruling] | None
    weights: Literal["examples", "uniform"] | Weights = "examples"
    denominator: Literal["realised", "expected"] = "realised"
    least: Callable[[int], int] = _any_cohort
    bears: Callable[[int], int] = _none
    needs: str = ""
    spared: "Callable[[int, int], Aggregator] | None" = None
    init: Callable[[Tensor], Any] = _stateless
    behind: "Aggregator | None" = None
    rooted: bool = False
    cap: float = math.inf
    clip: float | None = None

    @property
    def averages(self) -> bool:
        """Whether it gives the weighted mean of the rows it is shown, be it under an attack."""
        return self.rule is None or (self.behind is not None and self.behind.averages)

    @property
    def name(self) -> str:
        """The rule's name."""
        return str(self.spec["name"])

    def weigh(self, examples: Tensor, clients: Sequence[str]) -> Tensor:
        """Weights [C, 1] float64 of clients with these numbers of examples [C, 1]."""
        weights = self._weigh(examples, clients)
        return weights if self.clip is None else weights.clamp(max=self.clip) / self.clip

    def _weigh(self, examples: Tensor, clients: Sequence[str]) -> Tensor:
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

    def fine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Which of rows [n, L] may count at all, [n]: finite ones that claim a weight [n] from 0 to the cap."""
        return finite_rows(rows) & (weights >= 0) & (weights <= self.cap) & (weights < math.inf)

    def check(self, count: int, round: int) -> None:
        """Refuse a cohort of `count` clients that is too small.

        Raises:
            CompositionError: it is; the text says how many are needed and why.
        """
        if 0 < count < self.least(count):
            raise CompositionError(
                f"the aggregator {self.name} needs {self._enough(count)} clients{self.needs}, but the cohort of round "
                f"{round + 1} has {count}: enlarge the cohort"
                f"{', or lower that number or fraction' if self.needs else ''}."
            )

    def _enough(self, count: int) -> str:
        """How many clients above `count` are enough, in words: what is needed may grow with them."""
        found = next((n for n in range(count, MOST) if self.least(n) <= n), None)
        return f"more than {MOST:,}" if found is None else f"at least {found}"

    def combine(
        self,
        rows: Tensor,
        weights: Tensor | None = None,
        state: Any = None,
        clients: Sequence[str] = (),
        root: Tensor | None = None,
    ) -> Ruling:
        """Combine rows [n, L]; weights [n] default to ones, and are ones for an aggregator with weights="uniform".

        Rows that are not finite, or claim a weight that is none or above the cap, are left out with a share of 0: they
        are malicious ones already found. Where the rest is too small for a rule, it need bear only as many fewer as
        were found; where that is not enough, some of them count as noughts, so that nobody can stop a round.

        Args:
            rows: one for each client.
            weights: of the rows, at least 0.
            state: from `init` or an earlier ruling; None: that of a first round.
            clients: names, one for each row; default their places.
            root: row [L] of the server's own data, which a rule may judge by (`fltrust(root="server")`).

        Returns:
            The row, each client's share in it where the rule gives shares, and the state for the next round.

        Raises:
            InvalidArgument: too few rows; weights of another number, or that are all 0; no root where one is needed.
            NonFiniteError: the mean of rows of which none may count.
        """
        if rows.ndim != 2 or len(rows) < max(self.least(len(rows)), 1):
            few = "at least 1" if rows.ndim != 2 else self._enough(max(len(rows), 1))
            raise invalid("rows", tuple(rows.shape), f"a matrix of {few} rows{self.needs}")
        given = rows.new_ones(len(rows), dtype=torch.float64) if weights is None else weights.double()
        if given.shape != (len(rows),):
            raise invalid("weights", tuple(given.shape), f"one number for each of the {len(rows)} rows")
        if self.rooted and root is None:
            raise invalid(
                "root",
                root,
                f"the row of the server's own data, which {self.name} judges by",
                "Give server_data= to a run, rule.combine(rows, root=vector) a matrix.",
            )
        if self.weights == "uniform":  # whatever a client claims
            given = torch.ones_like(given)
        fine = self.fine(rows, given)
        if self.rule is not None:
            if not bool(fine.all()):
                return self._without(rows, ~fine, given, state, clients, root)
            seen = Rows(rows, clients=clients, root=root)
            state = self.init(rows.new_zeros(rows.shape[1])) if state is None else state
            ruling = self.rule(seen, given[seen.order], state)
            return ruling._replace(share=seen.by_client(ruling.share))
        if not bool(fine.any()):
            raise NonFiniteError(
                f"no row is finite and claims a weight from 0 to {self.cap:g}: there is nothing to average."
            )
        given = torch.where(fine, given, 0.0)
        if not float(given.sum()) > 0:
            raise invalid("weights", given.tolist(), "numbers of at least 0 that are not all 0")
        total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        for row, weight in zip(rows, given.tolist(), strict=True):
            if weight:
                total.add_(row, alpha=weight)
        return Ruling((total / given.sum()).to(rows.dtype), given / given.sum())

    def _without(
        self,
        rows: Tensor,
        broken: Tensor,
        weights: Tensor,
        state: Any,
        clients: Sequence[str],
        root: Tensor | None,
    ) -> Ruling:
        """The ruling on rows of which some are broken [n] bool."""
        count, found = len(rows), int(broken.sum())
        kept, rule = ~broken, self
        for lowered in range(found + 1):
            # No lower than need be: a row may also be broken by accident.
            rule = spared(self, count, lowered) if lowered else self
            if count - found >= max(rule.least(count - found), 1):
                break
        else:
            noughts = next(
                k for k in range(1, found + 1) if k == found or count - found + k >= rule.least(count - found + k)
            )
            kept[broken.nonzero()[:noughts, 0]] = True
        clients = clients or [str(i) for i in range(count)]
        names = [c for c, good in zip(clients, kept.tolist(), strict=True) if good]
        ruling = rule.combine(torch.where(broken[:, None], 0.0, rows)[kept], weights[kept], state, names, root)
        share = None if ruling.share is None else weights.new_zeros(count).masked_scatter(kept, ruling.share)
        judged = None if ruling.rows is None else torch.full_like(rows, torch.nan)
        if judged is not None and ruling.rows is not None:
            judged[kept] = ruling.rows
        claimed = None if ruling.weights is None else weights.new_zeros(count).masked_scatter(kept, ruling.weights)
        return ruling._replace(share=share, rows=judged, weights=claimed)

    def __call__(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Combine rows [n, L] into [L]; weights [n] default to ones."""
        return self.combine(rows, weights).row


def composed(then: Aggregator, rows: Rows, weights: Tensor, state: Any) -> Ruling:
    """What another rule makes of rows that stand for a rule's own."""
    if then.rule is not None:
        return then.rule(rows, weights, state)
    share = weights / weights.sum()
    return Ruling(rows.sum(share).to(rows.dtype), share)


def check_then(then: object) -> None:
    """Refuse anything but an aggregator as the rule behind a pre-aggregation."""
    if not isinstance(then, Aggregator):
        raise invalid("then", then, "a rule such as atoll.aggregators.trimmed_mean(drop=2)")
    if then.behind is not None:
        # Behind a mixture there are no clients' updates left that an attacker could write.
        raise invalid(
            "then",
            then.name,
            "a rule that is not under attack: malicious clients stand before everything the server does",
            "Attack the whole: attacks.apply(nnm(byzantine=2, then=rule), attack, fraction=0.2).",
        )
    if then.rule is None and (then.weights != "uniform" or then.denominator != "realised"):
        raise invalid(
            "then",
            f"mean(weights={then.weights!r}, denominator={then.denominator!r})",
            "a rule without weights, because anybody may claim any weight, that divides by what it is shown",
            'Use then=aggregators.mean(weights="uniform").',
        )


def spared(rule: Aggregator, count: int, found: int) -> Aggregator:
    """The rule that still bears the others when some of `count` clients were found to be malicious."""
    return rule if rule.spared is None else rule.spared(count, found)


def check_weights(weights: object) -> None:
    """Refuse anything but a known rule for weights."""
    if weights not in ("examples", "uniform") and not callable(weights):
        raise invalid(
            "weights", weights, '"examples", "uniform" or callable(examples [C, 1], clients) -> weights [C, 1]'
        )


def malicious(argument: str, value: int | float, below: float = 0.5) -> Callable[[int], int]:
    """(clients n) -> how many malicious ones to expect, from a number or a fraction of the cohort, rounded up."""
    fraction = isinstance(value, float)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (0 <= value < below if fraction else value >= 0)
    ):
        raise invalid(
            argument, value, f"a number of clients of at least 0, or a fraction of the cohort in [0, {below})"
        )
    # What a product is above a whole number by rounding alone must not make one client more.
    return (lambda count: math.ceil(value * count - 1e-9)) if fraction else (lambda count: int(value))
