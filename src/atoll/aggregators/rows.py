"""Clients' rows as rules see them: read in blocks of columns, so that a rule makes no second matrix of them.

Rules go by coordinates (`by_columns`) or by the geometry of the rows, which one matrix of inner products [n, n] tells
(`Geometry`). Rows are numbered by their content, not by who came first: a rule's result has the same bits for any order
of the clients, and ties go to the row that is smaller in the first coordinate in which they differ.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cmp_to_key

import torch
from torch import Tensor

PIECE = 2**12
"""Columns that are multiplied at a time; fixed, because the bits of a sum depend on it."""

BLOCK = 4
"""Pieces that are held at a time, which decides about memory alone."""

FAR = 1e100
"""Differences, and values that are mixed, are cut to this, so that their squares are finite."""

NETWORK = 256
"""Rows up to which a sorting network is faster than sorting."""


class Rows:
    """Rows [n, L], or weighted sums of them.

    Args:
        matrix: clients' rows [N, L].
        mix: weights [n, N] of clients' rows in the order of their content, when the rows are sums of them.
        order: the order of the clients' rows by content, where it is known.
        clients: their names, in the order of `matrix`; default their places.
        root: the row [L] of the server's own data, where there is one; it is none of the rows.
    """

    def __init__(
        self,
        matrix: Tensor,
        mix: Tensor | None = None,
        order: Tensor | None = None,
        clients: Sequence[str] = (),
        root: Tensor | None = None,
    ) -> None:
        self.matrix = matrix
        self.mix = mix
        self.order = _ordered(matrix) if order is None else order
        self.clients = tuple(clients) or tuple(str(i) for i in range(len(matrix)))
        self.root = root
        self.length = matrix.shape[1]
        self.dtype = matrix.dtype

    def __len__(self) -> int:
        return len(self.matrix) if self.mix is None else len(self.mix)

    def mixed(self, weights: Tensor) -> "Rows":
        """Weighted sums of these rows: weights [m, n] float64."""
        mix = weights if self.mix is None else weights @ self.mix
        return Rows(self.matrix, mix, self.order, self.clients, self.root)

    def by_client(self, share: Tensor | None) -> Tensor | None:
        """Weights of these rows [n] as weights of the clients [N], in the order of `matrix`."""
        if share is None:
            return None
        given = share if self.mix is None else share @ self.mix
        out = torch.empty_like(given)
        out[self.order] = given
        return out

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Where each block of columns begins, and the block [n, b]: in the rows' dtype, or float64 when mixed."""
        width = PIECE * BLOCK
        for a in range(0, self.length, width):
            block = self.matrix[:, a : a + width].index_select(0, self.order)
            if self.mix is not None:
                wide = block.double().clamp(-FAR, FAR)
                block = torch.cat([self.mix @ piece for piece in wide.split(PIECE, dim=1)], dim=1)
            yield a, block

    def row(self, index: int) -> Tensor:
        """One row [L], in float64."""
        share = torch.zeros(len(self), dtype=torch.float64, device=self.matrix.device)
        share[index] = 1.0
        return self.sum(share)

    def sum(self, weights: Tensor) -> Tensor:
        """The sum of rows by weights [n] float64: [L] in float64. Rows of weight 0 are left out."""
        out = torch.zeros(self.length, dtype=torch.float64, device=self.matrix.device)
        for a, block in self.blocks():
            part = out[a : a + block.shape[1]]
            for row, weight in zip(block, weights.tolist(), strict=True):
                if weight:
                    part.add_(row.double(), alpha=weight)
        return out

    def mean(self, chosen: Tensor) -> Tensor:
        """The mean of some rows: chosen [n] bool -> [L] in the rows' dtype."""
        return (self.sum(chosen.double()) / int(chosen.sum())).to(self.dtype)


def finite_rows(rows: Tensor) -> Tensor:
    """Which of rows [n, L] are finite in all numbers, [n], without a second matrix."""
    # A NaN or an infinity makes the sum one; of rows whose sum is one, some may only be too large to be added up.
    finite = torch.isfinite(rows.sum(dim=1))
    if bool(finite.all()):
        return finite
    finite = torch.isfinite(rows.sum(dim=1, dtype=torch.float64))
    for i in (~finite).nonzero()[:, 0].tolist():
        finite[i] = torch.isfinite(rows[i]).all()
    return finite


def by_columns(rows: Rows, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """A rule on sorted values of every coordinate: (sorted block [n, b]) -> [b]; the result is [L]."""
    out = torch.empty(rows.length, dtype=rows.dtype, device=rows.matrix.device)
    for a, block in rows.blocks():
        out[a : a + block.shape[1]] = rule(sort_columns(block)).to(rows.dtype)
    return out


def middle(ordered: Tensor) -> Tensor:
    """The median of sorted columns [n, b]: the midpoint of the middle two for an even n."""
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    # Halving first keeps the sum of two huge values finite.
    return torch.where(low == high, low, low / 2 + high / 2)


def average(rows: Tensor) -> Tensor:
    """The mean over rows [k, b], in float64 and one row after the other."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for row in rows:
        total += row
    return total / len(rows)


def sort_columns(block: Tensor) -> Tensor:
    """Sort every column of [n, b], ascending.

    Few rows go through a sorting network, whose comparisons are minima and maxima of whole rows. Source: Knuth, "The
    art of computer programming", volume 3, algorithm 5.2.2M (Batcher's merge exchange).
    """
    count = len(block)
    if count > NETWORK:
        return block.sort(dim=0).values
    rows = list(block.unbind(0))
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            for i in range(count - d):
                if i & p == r:
                    rows[i], rows[i + d] = torch.minimum(rows[i], rows[i + d]), torch.maximum(rows[i], rows[i + d])
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2
    return torch.stack(rows)


class Geometry:
    """Distances between rows, from inner products relative to a row that stands among the others.

    The reference is the row with the least median distance: rows of a majority are near it. So no digits are lost to a
    common offset, and huge rows leave the distances between the others exact.

    Args:
        rows: what to look at.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        rough = _distances(self._products(None))
        self.reference = int(rough.sort(dim=1).values[:, len(rows) // 2].argmin())
        self.centre = rows.row(self.reference)
        self.products = self._products(self.centre)  # [n, n] float64

    @property
    def squared(self) -> Tensor:
        """Squared distances [n, n] float64, nought on the diagonal."""
        return _distances(self.products)

    def sum(self, weights: Tensor) -> Tensor:
        """The sum of rows by weights [n] that add up to 1: [L] in float64."""
        out = self.centre.clone()
        for a, block in self.rows.blocks():
            part, centre = out[a : a + block.shape[1]], self.centre[a : a + block.shape[1]]
            for row, weight in zip(block, weights.tolist(), strict=True):
                part.add_((row.double() - centre).clamp_(-FAR, FAR), alpha=weight)
        return out

    def _products(self, centre: Tensor | None) -> Tensor:
        count, device = len(self.rows), self.rows.matrix.device
        total = torch.zeros(count, count, dtype=torch.float64, device=device)
        for a, block in self.rows.blocks():
            for b in range(0, block.shape[1], PIECE):
                # A block is nobody else's: it may be written over. In single precision nothing is that far.
                piece = block[:, b : b + PIECE].double()
                if centre is not None:
                    piece.sub_(centre[a + b : a + b + PIECE])
                if block.dtype == torch.float64:
                    piece.clamp_(-FAR, FAR)
                total.addmm_(piece, piece.T)
        return total


def _distances(products: Tensor) -> Tensor:
    own = products.diagonal()
    found = (own[:, None] + own[None, :] - (products + products.T)).clamp(min=0)
    return found.fill_diagonal_(0)


def distances_from(rows: Rows, centre: Tensor) -> Tensor:
    """Distance of each row from a point [L] float64: [n] float64."""
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.matrix.device)
    for a, block in rows.blocks():
        for b in range(0, block.shape[1], PIECE):
            piece = block[:, b : b + PIECE].double()
            total += (piece - centre[a + b : a + b + piece.shape[1]]).clamp_(-FAR, FAR).square().sum(dim=1)
    return total.sqrt()


def _ordered(matrix: Tensor) -> Tensor:
    def compare(i: int, j: int) -> int:
        # In pieces that grow: rows mostly differ early, but numbers that no client trains may come first.
        begin, width = 0, 16
        while begin < matrix.shape[1]:
            left, right = matrix[i, begin : begin + width], matrix[j, begin : begin + width]
            unequal = left != right
            if bool(unequal.any()):
                first = int(unequal.to(torch.uint8).argmax())
                return -1 if float(left[first]) < float(right[first]) else 1
            begin, width = begin + width, 4 * width
        return 0

    places = sorted(range(len(matrix)), key=cmp_to_key(compare))
    return torch.tensor(places, dtype=torch.int64, device=matrix.device)
