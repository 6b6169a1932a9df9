"""Error feedback: what compression lost in one round is added to the next.

    v = x + e;  send C(v);  e <- v - decoded C(v)

Seide, Fu, Droppo, Li & Yu 2014, "1-bit stochastic gradient descent"; Karimireddy, Rebjock, Stich & Jaggi 2019, "Error
feedback fixes SignSGD and other gradient compression schemes". The error e [L] is the client's own memory: it never
leaves, and moves on only when the update was accepted: a client that a rule refuses still owes what it owed before. It
is for clients that take part often: one that is seen once in a thousand rounds adds an error that is long out of date.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atoll.errors import CompositionError, invalid
from atoll.spec import Spec, record
from atoll.transforms.base import Codes, Form, Keys, Transform
from atoll.transforms.chain import Chain, compose
from atoll.transforms.channel import plain
from atoll.vectors import Layout


def error_feedback(*stages: Transform) -> Transform:
    """Compress with these stages, and remember what they lost: `error_feedback(top_k(0.01), quantize(4))`.

    Args:
        stages: in client order; all that loses something must be among them.

    Raises:
        CompositionError: stages that do not fit, or one whose error may be longer than the row.
    """
    inner = compressor("error_feedback", stages)

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: Any, keys: Keys) -> tuple[Codes, dict[str, Tensor]]:
        wanted = rows + memory["error"]
        wire, _ = inner.encode(wanted, {}, shared, keys)
        got = inner.decode_each(wire, shared, rows.shape[1], keys, rows.dtype)
        return ({"rows": wire} if isinstance(wire, Tensor) else wire), {"error": wanted - got}

    return stage_around(
        inner,
        record("error_feedback", stages=list(stages)),
        encode,
        "error",
        init=lambda length: inner.init(length, length),
        share=inner.share,
        update=inner.update,
        decode_sum=inner.undo_sum if inner.facts.sums else None,
        sums=inner.facts.sums,
        bind=bound_by(error_feedback, stages),
    )


def compressor(around: str, stages: tuple[Transform, ...]) -> Chain:
    """The chain of the stages inside `error_feedback` or `ef21`, checked: whatever they lose, both ends know."""
    if not stages:
        raise invalid("stages", stages, "at least one transform", f"Write for instance {around}(top_k(0.01)).")
    for stage in stages:
        if isinstance(stage, Transform) and stage.remembers:
            raise CompositionError(
                f"{stage.name} cannot stand inside {around}: {around} already remembers for the stages inside it. Put "
                "all stages into one."
            )
        if isinstance(stage, Transform) and stage.coder is not None:
            raise CompositionError(
                f"{stage.name} cannot stand inside {around}: it loses nothing that would have to be remembered. Put "
                f"{stage.name} behind {around}."
            )
        if isinstance(stage, Transform) and not stage.contracts:
            raise CompositionError(
                f"{stage.name} cannot stand inside {around}: what it loses may be as long as the row or longer, so the "
                f"error would grow from round to round. Use {stage.name} without {around}, and inside it a stage such "
                "as top_k, sign, or quantize with 4 bits or more."
            )
        if isinstance(stage, Transform) and stage.judge is not None:
            raise CompositionError(
                f"{stage.name} cannot stand inside {around}: it judges what clients send, and compresses nothing. Put "
                f"{stage.name} before {around}."
            )
    return compose(stages, plain())


def bound_by(around: Callable[..., Transform], stages: tuple[Transform, ...]) -> Callable[[Layout], Transform] | None:
    """How a stage around others takes a layout in, where one of them needs it."""
    if all(stage.bind is None for stage in stages):
        return None
    return lambda layout: around(*(stage if stage.bind is None else stage.bind(layout) for stage in stages))


def stage_around(inner: Chain, spec: Spec, encode: Any, field: str, **more: Any) -> Transform:
    """The stage that compresses by a chain and keeps one row of memory under a name."""
    last, drawn = inner.stages[-1].gives, {stage.randomness for stage in inner.stages}

    def decode(codes: Codes, shared: Any, length: int, keys: Keys) -> Tensor:
        kind = codes["rows"].dtype if "rows" in codes else torch.float64
        return inner.decode_each(codes, shared, length, keys, kind)

    def codes(length: int, split: int) -> Form:
        return {n: part for n, part in inner.form(length, split, torch.float64).items() if n != "rows"}

    facts: dict[str, Any] = {"sums": False} | more
    return Transform(
        spec,
        encode,
        decode_each=decode,
        memory=lambda length: {field: torch.zeros(length)},
        size=lambda length, split: inner.sizes(length, split)[-1],
        codes=codes,
        gives=last,
        unbiased=False,
        feedback=True,
        bound=lambda before: None,
        fixed_size=inner.facts.fixed_size,
        randomness="shared" if "shared" in drawn else "private" if "private" in drawn else "none",
        **facts,
    )
