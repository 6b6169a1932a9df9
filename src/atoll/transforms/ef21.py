"""EF21: clients send what is new about their updates, compressed; the server adds it to what it knows.

    client:  c_i = C(x_i - g_i);  g_i <- g_i + decoded c_i
    server:  g <- g + (cohort / population) mean_i c_i;  g is the update

Richtarik, Sokolov & Fatkhullin 2021, "EF21: a new, simpler, theoretically better, and practically faster error
feedback"; partial participation as in Fatkhullin et al. 2021, "EF21 with bells & whistles". g is the mean of all
clients' g_i, also of those that stay away, which begin at nought. g_i [L] is the client's own memory, g [L] is the
server's.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from atoll.spec import record
from atoll.transforms.base import Codes, Keys, Transform
from atoll.transforms.error_feedback import bound_by, compressor, stage_around


class Known(NamedTuple):
    """What the server of EF21 keeps: the mean of what clients are known by, [L] float64, and the stages' own."""

    mean: Tensor
    stages: tuple[Any, ...]


def ef21(*stages: Transform) -> Transform:
    """Compress the change of every client's update since it was last sent: `ef21(top_k(0.01))`.

    Needs the unweighted mean over the clients that took part and an algorithm without summed parts, because g stands
    for the whole population: a rule that leaves clients out would leave g behind what they know. Before such a rule
    use `error_feedback`.

    Args:
        stages: in client order; all that loses something must be among them.

    Raises:
        CompositionError: stages that do not fit, or one whose error may be longer than the row.
    """
    inner = compressor("ef21", stages)

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: Any, keys: Keys) -> tuple[Codes, dict[str, Tensor]]:
        wire, _ = inner.encode(rows - memory["known"], {}, shared, keys)
        known = memory["known"] + inner.decode_each(wire, shared, rows.shape[1], keys, rows.dtype)
        return ({"rows": wire} if isinstance(wire, Tensor) else wire), {"known": known}

    def settle(known: Known, row: Tensor, share: float) -> tuple[Tensor, Known]:
        now = known.mean + share * row.double()
        return now.to(row.dtype), known._replace(mean=now)

    return stage_around(
        inner,
        record("ef21", stages=list(stages)),
        encode,
        "known",
        init=lambda length: Known(torch.zeros(length, dtype=torch.float64), inner.init(length, length)),
        share=lambda known: inner.share(known.stages),
        update=lambda known, aggregate: known._replace(stages=inner.update(known.stages, aggregate)),
        bind=bound_by(ef21, stages),
        settle=settle,
    )
