"""What the process of a run tells the server of the run's sites: of all of them once, then of those that are other.

A run of N sites hears each of them several times a round. If every answer told of all sites, a round would cost N**2;
what is told here costs as much as there is new.
"""

from collections.abc import Collection, Mapping

from atoll.net import buffering
from atoll.net.children import Place
from atoll.net.coordinator import State


def place(state: State, name: str, cohort: frozenset[str], awaited: frozenset[str]) -> Place:
    """A site as the server has to know it.

    Args:
        state: of the coordinator.
        name: of the site.
        cohort: of the state.
        awaited: sites that may still answer in the step at work.
    """
    site, out = state.sites[name], state.sum.out if state.sum is not None else {}
    if isinstance(state, buffering.State) and (task := state.task(name)) is not None:
        return Place(site.status, site.counted, "asked", task=task)
    if name in out:
        return Place(site.status, site.counted, "out of the sum", out[name])
    if name in awaited:
        return Place(site.status, site.counted, "asked")
    if name in state.accepted:
        return Place(site.status, site.counted, "delivered")
    if name in state.excluded:
        return Place(site.status, site.counted, "excluded", state.excluded[name])
    return Place(site.status, site.counted, "asked" if name in cohort else "")


ROOM, PLACE = 2**23, 150
"""Bytes of sites that are told of at a time, and of one beside its name and why it is out."""


class Teller:
    """Knows what was told."""

    def __init__(self) -> None:
        self._owed: dict[str, None] = {}
        self._before: State | None = None
        self._told: dict[str, Place] = {}
        self._cohort = frozenset[str]()

    @property
    def more(self) -> bool:
        """Whether there was no room for some, which are told of next."""
        return bool(self._owed)

    def tell(self, state: State) -> dict[str, Place]:
        """Sites that are other than they were told to be, the first time all of them, as far as a message has room."""
        before, self._before = self._before, state
        if before is None or state.cohort is not before.cohort:
            self._cohort = frozenset(state.cohort)
        self._owed |= dict.fromkeys(_changed(before, state))
        new, left = dict[str, Place](), ROOM
        awaited = frozenset(state.sum.awaited) if self._owed and state.sum is not None else frozenset[str]()
        while self._owed and left > 0:
            name = next(iter(self._owed))
            del self._owed[name]
            now = place(state, name, self._cohort, awaited)
            if self._told.get(name) != now:
                new[name] = now
                left -= PLACE + len(name) + 6 * len(now.why)  # at most six bytes of JSON each
        self._told |= new
        return new


def _changed(before: State | None, after: State) -> Collection[str]:
    """Sites that may be other, found by what the coordinator did not carry over as it was."""
    if before is after:
        return ()
    if isinstance(before, buffering.State) and isinstance(after, buffering.State):
        if (before.poll is None) != (after.poll is None) or _polled(before) != _polled(after):
            return after.sites
        asked = {*_other(before.at_work, after.at_work), *(set(before.cohort) ^ set(after.cohort))}
    elif before is None or before.cohort is not after.cohort or _asked(before) != _asked(after):
        return after.sites
    else:
        asked = set[str]()
    names = asked | {
        *_other(before.sites, after.sites), *_other(before.accepted, after.accepted),
        *_other(before.excluded, after.excluded),
    }  # fmt: skip
    if before.sum is not None and after.sum is not None:
        names.update(_other(before.sum.out, after.sum.out), (s.site for s in after.sum.said[len(before.sum.said) :]))
    return names & after.sites.keys()


def _asked(state: State) -> object:
    turn = state.sum
    return None if turn is None else (state.round, state.turn, turn.step, turn.due, turn.closing)


def _polled(state: buffering.State) -> object:
    return None if state.poll is None else (state.poll.round, state.poll.base, state.poll.adding)


def _other(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Keys with another value, or on one side alone; values that are equal are mostly the same object."""
    if before is after:
        return []
    found = [name for name, value in after.items() if before.get(name) is not value]
    return found if len(after) - len(found) == len(before) else [*found, *(before.keys() - after.keys())]
