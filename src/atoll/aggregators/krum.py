"""Krum and Multi-Krum. Blanchard, El Mhamdi, Guerraoui & Stainer 2017, "Machine learning with adversaries: Byzantine
tolerant gradient descent".

    score(i) = sum of |x_i - x_j|^2 over the n - f - 2 rows j nearest to x_i, itself not among them

Krum is the row of least score, Multi-Krum the mean of the m rows of least scores.
"""

from typing import Any

import torch
from torch import Tensor

from atoll.aggregators.base import Aggregator, Ruling, malicious
from atoll.aggregators.rows import Geometry, Rows
from atoll.errors import invalid
from atoll.spec import record


def krum(*, byzantine: int | float) -> Aggregator:
    """The row nearest to its n - byzantine - 2 neighbours, unweighted.

    Bears `byzantine` malicious clients: the row it takes has an honest one within the honest rows' own distances. Needs
    2 byzantine + 3 clients. Of equal scores the row that is smaller in the first differing coordinate wins.

    Args:
        byzantine: a number of clients, or a fraction of the cohort in [0, 0.5), rounded up.
    """
    expected = malicious("byzantine", byzantine)

    def rule(rows: Rows, weights: Tensor, state: Any) -> Ruling:
        return selected(rows, nearest(Geometry(rows).squared, expected(len(rows)), 1))

    return Aggregator(
        record("krum", byzantine=byzantine),
        rule,
        "uniform",
        least=lambda count: 2 * expected(count) + 3,
        bears=expected,
        needs=f" (2 byzantine + 3, byzantine={byzantine})",
        spared=lambda count, found: krum(byzantine=max(expected(count) - found, 0)),
    )


def multi_krum(*, byzantine: int | float, keep: int | None = None) -> Aggregator:
    """The mean of the `keep` rows of least Krum scores, unweighted.

    Bears `byzantine` malicious clients, as Krum does: at least n - byzantine rows have scores that the honest rows'
    distances bound, and no more are kept. Needs 2 byzantine + 3 clients.

    Args:
        byzantine: a number of clients, or a fraction of the cohort in [0, 0.5), rounded up.
        keep: rows to average, 1 to n - byzantine; default n - byzantine.
    """
    expected = malicious("byzantine", byzantine)
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise invalid("keep", keep, "a number of rows of at least 1, or None for all but the byzantine ones")

    def rule(rows: Rows, weights: Tensor, state: Any) -> Ruling:
        f = expected(len(rows))
        return selected(rows, nearest(Geometry(rows).squared, f, len(rows) - f if keep is None else keep))

    return Aggregator(
        record("multi_krum", byzantine=byzantine, keep=keep),
        rule,
        "uniform",
        least=lambda count: max(2 * expected(count) + 3, expected(count) + (keep or 0)),
        bears=expected,
        needs=f" (2 byzantine + 3 and byzantine + keep, byzantine={byzantine}, keep={keep})",
        spared=lambda count, found: multi_krum(byzantine=max(expected(count) - found, 0), keep=keep),
    )


def nearest(squared: Tensor, byzantine: int, keep: int) -> Tensor:
    """Which rows have the `keep` least scores: squared distances [n, n] -> bool [n]."""
    order = scores(squared, byzantine).sort(stable=True).indices
    chosen = torch.zeros(len(squared), dtype=torch.bool, device=squared.device)
    chosen[order[:keep]] = True
    return chosen


def scores(squared: Tensor, byzantine: int) -> Tensor:
    """Krum's scores [n] of squared distances [n, n] with noughts on the diagonal; one neighbour at least."""
    neighbours = max(1, len(squared) - byzantine - 2)
    others = squared.clone().fill_diagonal_(torch.inf)
    return others.sort(dim=1).values[:, :neighbours].sum(dim=1)


def selected(rows: Rows, chosen: Tensor) -> Ruling:
    """The mean of chosen rows: bool [n]."""
    return Ruling(rows.mean(chosen), chosen.double() / int(chosen.sum()))
