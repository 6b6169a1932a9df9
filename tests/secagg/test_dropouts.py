"""Whoever drops out, whenever: the exact sum of the survivors, or a clean end."""

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import NAMES, PHASES, World

from atoll.secagg import Policy, Void
from atoll.secagg.graph import threshold_of

ENDS = (*PHASES, "stays")
CURIOUS = Policy(server="curious")


def expected(count: int, leaving: Mapping[str, str], over: tuple[int, int]) -> tuple[str, ...] | None:
    """Who is in the sum where everybody is a neighbour of everybody; None: too few in some phase."""
    ends = [ENDS.index(leaving.get(n, "stays")) for n in NAMES[:count]]
    alive = [sum(end > phase for end in ends) for phase in range(len(PHASES))]
    threshold = threshold_of(alive[0], over)
    if alive[0] < 3 or any(a < max(threshold, 3) for a in alive[1:4]) or any(a < threshold for a in alive[4:]):
        return None
    return tuple(n for n, end in zip(NAMES, ends, strict=False) if end > PHASES.index("mask"))


def check(count: int, leaving: Mapping[str, str], over: tuple[int, int] = (2, 3), length: int = 2) -> None:
    world = World(count, over=over, length=length, policy=None if over == (2, 3) else CURIOUS)
    due = expected(count, leaving, over)
    if due is None:
        with pytest.raises(Void) as caught:
            world.run(leaving)
        assert caught.value.reason == "few" and not caught.value.culprits
        assert world.server.phase.name == "VOID"
        nothing_known(world)
        return
    found = world.run(leaving)
    assert found.survivors == due and not found.culprits
    assert np.array_equal(found.total, world.total(due))


def nothing_known(world: World) -> None:
    """Of a void attempt the server holds fewer shares of every secret than give it."""
    counts: dict[tuple[int, str], int] = {}
    for (name, phase), message in world.sent.items():
        for held in message.held if phase == "unmask" else ():
            kind = "seed" if world.names[held.place] in {n for n, p in world.sent if p == "mask"} else "key"
            counts[held.place, kind] = counts.get((held.place, kind), 0) + 1
        assert name in world.names
    present = sum(p == "join" for _, p in world.sent)
    assert all(c < threshold_of(present, world.asked.threshold) for c in counts.values())


@pytest.mark.parametrize("over", [(2, 3), (1, 2)])
def test_three_clients_every_pattern(over: tuple[int, int]) -> None:
    for ends in itertools.product(ENDS, repeat=3):
        check(3, dict(zip(NAMES, ends, strict=False)), over)


@pytest.mark.parametrize(("count", "over"), [(4, (2, 3)), (4, (1, 2)), (5, (2, 3)), (5, (1, 2))])
def test_more_clients_every_pattern_but_for_order(count: int, over: tuple[int, int]) -> None:
    """Every number of clients in every phase; who they are changes from pattern to pattern."""
    for i, ends in enumerate(itertools.combinations_with_replacement(ENDS, count)):
        order = list(ends)
        np.random.default_rng(i).shuffle(order)
        check(count, dict(zip(NAMES, order, strict=False)), over)


@pytest.mark.slow
def test_four_clients_every_pattern() -> None:
    for ends in itertools.product(ENDS, repeat=4):
        check(4, dict(zip(NAMES, ends, strict=False)))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_larger_cohorts(data: st.DataObject) -> None:
    count = data.draw(st.integers(6, 14))
    over = data.draw(st.sampled_from([(2, 3), (1, 2), (3, 4)]))
    few = data.draw(st.integers(0, count // 2))
    leaving = {NAMES[data.draw(st.integers(0, count - 1))]: data.draw(st.sampled_from(PHASES)) for _ in range(few)}
    check(count, leaving, over, length=data.draw(st.integers(1, 300)))


@pytest.mark.parametrize(("survivors", "fine"), [(7, True), (6, False)])
@pytest.mark.parametrize("phase", PHASES[1:])
def test_exactly_the_threshold_and_one_below(survivors: int, fine: bool, phase: str) -> None:
    """Ten clients: seven must stay, in whichever phase the others leave."""
    leaving = dict.fromkeys(NAMES[survivors:10], phase)
    assert (expected(10, leaving, (2, 3)) is not None) == fine
    check(10, leaving)


LOOSE = Policy(risk=1.0, colluding=0.0)


@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_a_sparse_graph(data: st.DataObject) -> None:
    """Above 64 clients neighbours are drawn; a few drop out in every phase."""
    world = World(70, degree=20, length=3, policy=LOOSE)
    gone = data.draw(st.lists(st.sampled_from(NAMES[:70]), min_size=6, max_size=6, unique=True))
    leaving = dict(zip(gone, PHASES, strict=True))
    found = world.run(leaving)
    assert found.survivors == tuple(n for n in world.names if n not in gone[:4])
    assert np.array_equal(found.total, world.total(found.survivors))
    # Really sparse: everyone draws twenty, so that of the 2,415 pairs at most 1,400 share a mask, whatever is drawn.
    known = [len(world.told[n, "share"].known) for n in found.survivors]
    assert min(known) >= 20
    assert sum(known) <= 2 * 70 * 20


def test_a_neighbourhood_that_is_gone_makes_the_attempt_void() -> None:
    world = World(70, degree=20, length=3, policy=LOOSE).until("mask")
    keepers = world.sent[NAMES[0], "share"].sealed
    gone = {NAMES[s.place] for s in keepers[:10]}
    with pytest.raises(Void, match=r"in the group of c000"):
        world.step(gone)


@pytest.mark.parametrize("bits", [16, 32, 33, 48])
def test_every_ring(bits: int) -> None:
    world = World(4, bits=bits, length=50)
    found = world.run({NAMES[1]: "mask"})
    assert found.total.dtype.itemsize == (4 if bits <= 32 else 8)
    assert np.array_equal(found.total, world.total(found.survivors))
