"""Error feedback: what compression lost in one round is added to the next.

    v = x + e;  send C(v);  e <- v - decoded C(v)

Seide, Fu, Droppo, Li & Yu 2014, "1-bit stochastic gradient descent"; Karimireddy, Rebjock, Stich & Jaggi 2019, "Error
feedback fixes SignSGD and other gradient compression schemes". The error e [L] is the client's own memory: it never
leaves, and moves on only when the update was accepted. It is for clients that take part often: one that is seen once in
a thousand rounds adds an error that is long out of date.
"""

import torch
from torch import Tensor

from atoll.errors import CompositionError, invalid
from atoll.spec import record
from atoll.transforms.base import Codes, Keys, Transform
from atoll.transforms.chain import compose
from atoll.transforms.channel import plain


def error_feedback(*stages: Transform) -> Transform:
    """Compress with these stages, and remember what they lost: `error_feedback(top_k(0.01), quantize(4))`.

    Args:
        stages: in client order; all that loses something must be among them.

    Raises:
        CompositionError: stages that do not fit, or one whose error may be longer than the row.
    """
    if not stages:
        raise invalid("stages", stages, "at least one transform", "Write for instance error_feedback(top_k(0.01)).")
    inner = compose(stages, plain())
    for stage in stages:
        if not stage.contracts:
            raise CompositionError(
                f"{stage.name} cannot stand inside error_feedback: it scales what it sends to be unbiased, so the "
                f"error would grow from round to round. Use {stage.name} without error_feedback, or top_k inside it."
            )
        if stage.remembers and stage.name == "error_feedback":
            raise CompositionError(
                "error_feedback cannot stand inside error_feedback: the inner one already remembers what is lost. Put "
                "all stages into one."
            )

    def encode(
        rows: Tensor, memory: dict[str, Tensor], shared: tuple[None, ...], keys: Keys
    ) -> tuple[Codes, dict[str, Tensor]]:
        wanted = rows + memory["error"]
        wire, kept = inner.encode(wanted, memory, shared, keys)
        got = inner.decode_each(wire, shared, rows.shape[1], keys, rows.dtype)
        return ({"rows": wire} if isinstance(wire, Tensor) else wire), {**kept, "error": wanted - got}

    def decode(codes: Codes, shared: tuple[None, ...], length: int, keys: Keys) -> Tensor:
        return inner.decode_each(codes, shared, length, keys, torch.float64)

    def parts(length: int, split: int, item: int) -> int:
        rows = 0 if stages[-1].gives == "codes" else inner.sizes(length, split)[-1][0] * item
        return inner.bytes(length, split, item) - rows

    return Transform(
        record("error_feedback", stages=list(stages)),
        encode,
        decode_each=decode,
        init=lambda length: inner.init(length, length),
        share=inner.share,
        update=inner.update,
        memory=lambda length: {**inner.memory(length, length), "error": torch.zeros(length)},
        size=lambda length, split: inner.sizes(length, split)[-1],
        bytes=parts,
        gives=stages[-1].gives,
        sums=False,
        unbiased=False,
        bound=lambda before: None,
        fixed_size=inner.facts.fixed_size,
        randomness="shared" if inner.facts.shared else "private",
    )
