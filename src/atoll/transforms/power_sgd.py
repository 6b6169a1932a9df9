"""PowerSGD: a matrix of low rank for every matrix of the model.

    Y = M Q;  W = M^T U;  decoded as Y Q^T + U W^T - U (U^T Y) Q^T = M - (I - U U^T) M (I - Q Q^T)
    then, of the round's mean M:  U <- orth(M Q);  Q <- orth(M^T U)

M [n, m] is a client's matrix, U [n, r] and Q [m, r] are orthonormal bases that the server tells everybody. Vogels,
Karimireddy & Jaggi 2019, "PowerSGD: practical low-rank gradient compression for distributed optimization": one step of
the power method in every round, begun where the last one ended (warm start). There Y is averaged before W is worked
out, which takes two exchanges; a round of federated learning has one, so both factors are taken against the bases of
the round before. What is sent is linear in M, hence it sums; what is decoded is a projection, never longer than M; and
matrices of rank r that stay the same in all rounds are exact from the second round on. Biased: use it inside
`error_feedback`, as Vogels et al. do. Weights of more dimensions are matrices of their first one and all others.

Floats up and down: r (n + m) for a matrix; all else of a row, and matrices that would not become smaller, as they are.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from atoll.errors import CompositionError, invalid
from atoll.random import generator
from atoll.spec import record
from atoll.transforms.base import Codes, Keys, Transform
from atoll.vectors import Layout


class Bases(NamedTuple):
    """The bases of every compressed matrix: U [n, r] and Q [m, r], one after the other, float32."""

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]


class _Matrix(NamedTuple):
    """A matrix of the layout: where it lies in a row, and its rows, columns and rank."""

    begin: int
    end: int
    rows: int
    columns: int
    rank: int


def power_sgd(rank: int) -> Transform:
    """Send the model's matrices as factors of this rank.

    Averaged parameters are compressed; buffers and the summed part are sent as they are.

    Args:
        rank: r, at least 1; of a matrix at most its smaller side.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise invalid("rank", rank, "an integer of at least 1")
    return _stage(rank, None)


def _stage(rank: int, layout: Layout | None) -> Transform:
    found = None if layout is None else _matrices(layout, rank)
    width = 0 if layout is None else layout.size

    def matrices(length: int) -> list[_Matrix]:
        if found is None or length < width:
            raise CompositionError(
                "power_sgd needs to know the model's matrices: a process tells it (atoll.process, atoll.simulate); by "
                "hand, chain.bind(model.layout)."
            )
        return found

    def init(length: int) -> Bases:
        made = matrices(length)
        draws = [generator(0, "power_sgd", m.begin) for m in made]
        shapes = [((m.rows, m.rank), (m.columns, m.rank)) for m in made]
        pairs = [[_orthonormal(torch.randn(s, generator=g)) for s in own] for own, g in zip(shapes, draws, strict=True)]
        return Bases(tuple(u for u, _ in pairs), tuple(q for _, q in pairs))

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: Bases, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        out = list[Tensor]()
        # One client at a time: the bits of a product may depend on how many rows it has.
        for row in rows:
            parts, at = list[Tensor](), 0
            for m, left, right in zip(matrices(rows.shape[1]), *shared, strict=True):
                matrix = row[m.begin : m.end].view(m.rows, m.columns)
                parts += [row[at : m.begin], (matrix @ right.to(row)).view(-1), (matrix.T @ left.to(row)).view(-1)]
                at = m.end
            out.append(torch.cat((*parts, row[at:])))
        return torch.stack(out), memory

    def decode(sent: Tensor, shared: Bases, length: int) -> Tensor:
        """The row [length] of what was sent for it, or of a sum."""
        parts, at, begin = list[Tensor](), 0, 0
        for m, left, right in zip(matrices(length), *shared, strict=True):
            u, q = left.to(sent), right.to(sent)
            parts.append(sent[begin : begin + m.begin - at])
            begin += m.begin - at
            y = sent[begin : begin + m.rows * m.rank].view(m.rows, m.rank)
            begin += m.rows * m.rank
            w = sent[begin : begin + m.columns * m.rank].view(m.columns, m.rank)
            begin += m.columns * m.rank
            parts.append(((y - u @ (u.T @ y)) @ q.T + u @ w.T).view(-1))
            at = m.end
        return torch.cat((*parts, sent[begin:]))

    def decode_each(codes: Codes, shared: Bases, length: int, keys: Keys) -> Tensor:
        return torch.stack([decode(row, shared, length) for row in codes["rows"]])

    def update(bases: Bases, aggregate: Any) -> Bases:
        lefts, rights = list[Tensor](), list[Tensor]()
        for m, left, right in zip(matrices(width), *bases, strict=True):
            matrix = aggregate.mean[m.begin : m.end].view(m.rows, m.columns).to(torch.float32)
            seen = bool(torch.isfinite(matrix).all()) and bool(matrix.any())
            lefts.append(_orthonormal(matrix @ right) if seen else left)
            rights.append(_orthonormal(matrix.T @ lefts[-1]) if seen else right)
        return Bases(tuple(lefts), tuple(rights))

    def size(length: int, split: int) -> tuple[int, int]:
        spared = sum(m.end - m.begin - m.rank * (m.rows + m.columns) for m in matrices(length))
        return length - spared, split - spared

    return Transform(
        record("power_sgd", rank=rank),
        encode,
        decode_each=decode_each,
        decode_sum=lambda total, shared, length, keys: decode(total, shared, length),
        init=init,
        update=update,
        size=size,
        unbiased=False,
        aligned=False,
        bound=lambda before: before if before is None else before * (1 + 1e-5),
        bind=lambda layout: _stage(rank, layout),
    )


def _matrices(layout: Layout, rank: int) -> list[_Matrix]:
    found = list[_Matrix]()
    for _, shape, begin, end in layout:
        if len(shape) < 2 or begin == end:
            continue
        rows, columns = shape[0], (end - begin) // shape[0]
        least = min(rank, rows, columns)
        if least * (rows + columns) < rows * columns:
            found.append(_Matrix(begin, end, rows, columns, least))
    return found


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis [n, r] of what the columns [n, r] span, and of more where they are dependent."""
    longest = columns.abs().max()
    return torch.linalg.qr(columns / torch.where(longest > 0, longest, 1.0)).Q.contiguous()
