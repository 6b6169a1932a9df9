"""Keepers: drawn by the client itself, uniformly, and by nobody else's nonce; the risk of too many that collude."""

import os

import numpy as np
import pytest
from scipy.stats import hypergeom

from atoll.secagg import graph
from atoll.secagg.graph import COMPLETE, bears, drew, group_size, keepers, risk, threshold_of


def test_everybody_up_to_the_limit() -> None:
    present = [0, 2, 3, 7]
    assert keepers(bytes(32), bytes(32), 3, present, 64) == (0, 2, 7)
    everyone = list(range(COMPLETE))
    assert keepers(bytes(32), bytes(32), 5, everyone, 2) == tuple(p for p in everyone if p != 5)


@pytest.mark.parametrize("degree", [2, 16, 64, 99, 200])
def test_above_it_so_many_distinct_others(degree: int) -> None:
    present = [3 * i for i in range(100)]
    for own in (0, 150, 297):
        found = keepers(os.urandom(32), bytes(32), own, present, degree)
        assert len(found) == len(set(found)) == min(degree, 99)
        assert own not in found and set(found) <= set(present) and list(found) == sorted(found)


def test_a_function_of_the_nonce_the_root_and_the_place() -> None:
    present = list(range(200))
    drawn = [
        keepers(nonce, root, own, present, 20)
        for nonce in (bytes(32), b"\1" * 32)
        for root in (bytes(32), b"\1" * 32)
        for own in (0, 1)
    ]
    assert len(set(drawn)) == len(drawn)
    assert keepers(bytes(32), bytes(32), 0, present, 20) == drawn[0]


@pytest.mark.parametrize("clients", [5, 150])
def test_who_was_drawn_is_who_keeps(clients: int) -> None:
    present = list(range(0, 3 * clients, 3))
    for own in (present[0], present[clients // 2], present[-1]):
        nonce = os.urandom(32)
        found = keepers(nonce, bytes(32), own, present, 20)
        asked = range(-1, 3 * clients + 1)
        assert tuple(p for p in asked if drew(nonce, bytes(32), own, present, 20, p)) == found


def test_everybody_is_as_likely_to_be_drawn() -> None:
    present, counts = list(range(101)), np.zeros(101)
    for i in range(4000):
        counts[list(keepers(i.to_bytes(32, "little"), bytes(32), 50, present, 10))] += 1
    assert counts[50] == 0
    drawn = np.delete(counts, 50)
    # Without replacement the variance is smaller by a tenth: the bound holds all the more.
    assert ((drawn - 400) ** 2 / 400).sum() < 160  # 99 degrees of freedom: beyond it once in 10^4


@pytest.mark.parametrize(("clients", "degree"), [(100, 16), (1000, 64), (1000, 32), (5000, 80)])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_risk_is_the_hypergeometric_tail(clients: int, degree: int, share: float) -> None:
    colluding, over = int(share * clients), (2, 3)
    tail = hypergeom.sf(bears(clients, degree, over), clients - 1, colluding, degree)
    assert risk(clients, degree, over, colluding) == pytest.approx(min(1.0, clients * tail), rel=1e-6, abs=1e-300)


@pytest.mark.parametrize(
    ("clients", "group", "threshold", "bearable"), [(3, 3, 3, 1), (4, 4, 3, 1), (5, 5, 4, 2), (64, 64, 43, 21)]
)
def test_small_cohorts_by_hand(clients: int, group: int, threshold: int, bearable: int) -> None:
    assert group_size(clients, 64) == group
    assert threshold_of(group, (2, 3)) == threshold
    assert bears(clients, 64, (2, 3)) == bearable
    assert risk(clients, 64, (2, 3), bearable) == 0.0
    assert risk(clients, 64, (2, 3), bearable + 1) == 1.0


def test_thresholds_are_above_their_share() -> None:
    for group in range(3, 200):
        assert 3 * threshold_of(group, (2, 3)) > 2 * group >= 3 * (threshold_of(group, (2, 3)) - 1)
        assert 2 * threshold_of(group, (1, 2)) > group


def test_the_default_is_safe_for_a_thousand() -> None:
    assert graph.risk(1000, 64, (2, 3), 50) < 2**-38
    assert graph.risk(5000, 64, (2, 3), 250) < 2**-30
