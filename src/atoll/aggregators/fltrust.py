"""FLTrust. Cao, Fang, Liu & Gong 2021, "FLTrust: Byzantine-robust federated learning via trust bootstrapping",
algorithm 2.

With g_0 the update of a root the server trusts and g_i a client's:

    TS_i = max(0, cos(g_i, g_0))                                 equation 2
    g = sum_i TS_i (|g_0| / |g_i|) g_i / sum_i TS_i              equations 3 and 4
"""

from typing import Any, Literal

import torch
from torch import Tensor

from atoll.aggregators.base import Aggregator, Ruling
from atoll.aggregators.rows import PIECE, Rows
from atoll.errors import NonFiniteError, invalid
from atoll.spec import record

SMALLEST = 1e-300
"""Rows without a larger number count as nought: what they would have to be multiplied by is no number."""


def fltrust(*, root: Tensor | Literal["server"]) -> Aggregator:
    """Rows weighed by how far they point where the root does, each as long as the root; unweighted by examples.

    Bears any number of malicious clients in this sense: the result is no longer than the root's update and never
    points against it, whatever clients send. How good it is follows from the root: the server's examples must be like
    the clients' (the paper takes a hundred). Where no row points with the root, the result is nought. The rows are read
    three times; shares are those of the trust, 0 for rows that point away.

    Args:
        root: the trusted update [L], or "server": that of the examples the server holds (`server_data=` of
            `atoll.simulate`, `atoll.Experiment` and `atoll.process`), trained like a client's and never counted itself.
            On a plain matrix give it as `rule.combine(rows, root=vector)`.
    """
    if isinstance(root, Tensor):
        if root.ndim != 1 or not bool(torch.isfinite(root).all()):
            raise invalid("root", f"a tensor of shape {tuple(root.shape)}", 'a finite vector [L], or "server"')
    elif root != "server":
        raise invalid("root", root, 'a vector [L], or "server" for the update of the data the server holds')
    given = root.detach().double().clone() if isinstance(root, Tensor) else None

    def rule(rows: Rows, weights: Tensor, state: Any) -> Ruling:
        trusted = rows.root if given is None else given.to(rows.matrix.device)
        assert trusted is not None
        if trusted.shape != (rows.length,):
            raise invalid("root", tuple(trusted.shape), f"a vector of the rows' length {rows.length}")
        if not bool(torch.isfinite(trusted).all()):
            raise NonFiniteError(
                "the update of the server's own data is not finite, and nothing can be judged by it: halve lr, or "
                "standardise the features of server_data."
            )
        trusted = trusted.double()
        length = float(trusted.norm())
        cosines, lengths = _compared(rows, trusted / (length or 1.0))
        trust = cosines.clamp(0, 1)
        if not float(trust.sum()):
            return Ruling(torch.zeros(rows.length, dtype=rows.dtype, device=rows.matrix.device), trust)
        share = trust / trust.sum()
        return Ruling(rows.sum(torch.where(share > 0, share * (length / lengths), 0.0)).to(rows.dtype), share)

    return Aggregator(
        record("fltrust", root=root),
        rule,
        "uniform",
        bears=lambda count: count,
        rooted=given is None,
    )


def _compared(rows: Rows, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of the rows with a unit vector [n], nought for rows of length nought, and the rows' lengths [n]."""
    largest = torch.zeros(len(rows), dtype=torch.float64, device=rows.matrix.device)
    for _, block in rows.blocks():
        torch.maximum(largest, block.abs().amax(dim=1).double(), out=largest)
    # Relative to its largest number a row has a square that neither overflows nor vanishes, however it is scaled.
    scale = torch.where(largest > SMALLEST, largest, torch.inf)[:, None]
    along, squares = torch.zeros_like(largest), torch.zeros_like(largest)
    for a, block in rows.blocks():
        for b in range(0, block.shape[1], PIECE):
            piece = block[:, b : b + PIECE].double() / scale
            along += piece @ unit[a + b : a + b + piece.shape[1]]
            squares += piece.square().sum(dim=1)
    apart = squares.sqrt()
    return torch.where(apart > 0, along / apart.clamp(min=SMALLEST), 0.0), apart * largest
