"""IFCA: several global models, of which every client trains the one that fits it best.

Ghosh, Chung, Yin & Ramchandran 2020, "An efficient framework for clustered federated learning", algorithm 1 with model
averaging (option II).

    j_i = argmin over j of f_i(x_j)                        on the client's training examples
    y_i <- x_{j_i}, then local steps
    x_j <- x_j + mean over clients with j_i = j of (y_i - x_j)

Symbols: x_j the model of cluster j of K, y_i client model, j_i its choice, made anew in every round. The mean in a
cluster is unweighted, as in the paper. A client sends a change for every cluster, nought but for its own, and its
choice as K numbers: under a channel that only adds, the server learns neither. A cluster nobody chose stays. A client
uses the model that fits it best: clients never seen have one too. Models that average floating buffers
are refused.
The global model, for methods that want one, is that of the cluster most clients chose last.
Cost in floats: (K + 1) D + K up, K D down, none kept; K forwards over a client's examples.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from atoll import random
from atoll.algorithms.base import Algorithm, Memory
from atoll.algorithms.checks import check_count, check_number, check_plan
from atoll.cohort import Cohort
from atoll.errors import InvalidArgument, invalid
from atoll.local import Plan
from atoll.model import Model
from atoll.spec import record
from atoll.vectors import Aggregate, Personal, Update


class State(NamedTuple):
    """Server memory."""

    models: Tensor  # [K, D] x_j
    counts: Tensor  # [K] clients that chose each in the last round


class Message(NamedTuple):
    """What clients receive."""

    vector: Tensor  # [D] model of the first cluster
    others: Tensor  # [K - 1, D] models of the others


def ifca(
    plan: Plan, *, clusters: int, spread: float = 0.1, starts: Sequence[Tensor] | None = None, seed: int = 0
) -> Algorithm:
    """Clustered federated averaging.

    Args:
        plan: local training.
        clusters: number of models K, at least 2.
        spread: standard deviation of the noise by which the other models differ from the first at the start. Models
            that start alike stay alike; where the start decides, try several seeds, or give `starts`.
        starts: start vectors [D] of all clusters instead, for instance of models trained alone.
        seed: of the noise.

    Raises:
        InvalidArgument: when an experiment is built, if the model averages floating buffers: every cluster would need
            statistics of its own.
    """
    check_plan(plan)
    clusters = check_count("clusters", clusters, 2)
    spread = check_number("spread", spread, strict=True)
    if starts is not None:
        _check_starts(starts, clusters)

    def init(vector: Tensor) -> State:
        if starts is None:
            draw = random.generator(seed, "ifca")
            noise = torch.randn(clusters - 1, len(vector), generator=draw, dtype=torch.float64)
            models = torch.cat((vector[None], vector + spread * noise.to(vector)))
        else:
            if starts[0].shape != vector.shape:
                raise invalid("starts", tuple(starts[0].shape), f"vectors of the model's {len(vector)} parameters")
            models = torch.stack([start.to(vector) for start in starts])
        return State(models, vector.new_zeros(clusters))

    def chosen(message: Message, cohort: Cohort) -> tuple[Tensor, Tensor]:
        """The models [C, D] that fit clients best, and their numbers [C]."""
        models = torch.cat((message.vector[None], message.others))
        losses = torch.cat([cohort.loss(cohort.rows(model)) for model in models], dim=1)
        best = losses.argmin(dim=1)
        return models[best], best

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start, best = chosen(message, cohort)
        trained = cohort.sgd(start, plan)
        own = functional.one_hot(best, clusters).to(start)
        changes = own[:, :, None] * trained.minus(start)[:, None, :]
        sums = torch.cat((changes.flatten(1), own), dim=1)
        update = cohort.update(trained, start, sums=sums, weight=torch.ones_like(cohort.weights))
        return update.replace(mean=torch.zeros_like(start)), memory

    def step(state: State, aggregate: Aggregate) -> State:
        changes, counts = aggregate.sums[:-clusters].view(clusters, -1), aggregate.sums[-clusters:]
        return State(state.models + changes / counts[:, None].clamp(min=1.0), counts)

    def personal(message: Message, memory: Memory, cohort: Cohort) -> Personal:
        return Personal(chosen(message, cohort)[0])

    return Algorithm(
        record(
            "ifca", plan=plan, clusters=clusters, spread=spread, seed=seed,
            starts=None if starts is None else list(starts),
        ),
        init=init,
        broadcast=lambda state: Message(state.models[0], state.models[1:]),
        local=local,
        step=step,
        model=lambda state: state.models[int(state.counts.argmax())],
        personal=personal,
        private=_without_buffers,
        buffers="local",
        sums=lambda size: clusters * (size + 1),
        scalars=True,
        additive=True,
        plans=(plan,),
    )  # fmt: skip


def _check_starts(starts: Sequence[Tensor], clusters: int) -> None:
    given: Any = starts
    if not isinstance(given, list | tuple | Tensor) or len(starts) != clusters:
        told = f"{len(starts)} vectors" if isinstance(given, list | tuple | Tensor) else given
        raise invalid("starts", told, f"a list with one vector for each of {clusters} clusters")
    for start in starts:
        if not isinstance(start, Tensor) or start.ndim != 1 or not start.is_floating_point():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise invalid("starts", start, "made of vectors [D] of floating-point numbers", "Take result.vector.")
        if start.shape != starts[0].shape:
            raise invalid("starts", [tuple(s.shape) for s in starts], "vectors of one length")
        if not bool(torch.isfinite(start).all()):
            raise invalid("starts", "a vector with NaN or infinite values", "finite")


def _without_buffers(model: Model) -> frozenset[str]:
    """Nothing is private; models whose statistics would have to be averaged are refused."""
    if model.buffer_rule == "mean" and model.buffer_layout.size:
        raise InvalidArgument(
            "ifca cannot average floating buffers, as every cluster would need its own: use layers without running "
            'statistics (GroupNorm, LayerNorm), or atoll.Model(..., buffers="frozen"). With buffers="local" each '
            "client keeps its own, and those never seen use the start values."
        )
    return frozenset()
