"""The server's state machine: every event in every phase, and what a round may count."""

import random
from dataclasses import dataclass
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll import sampling
from atoll.errors import InvalidArgument, RunError
from atoll.net import coordinator as core
from atoll.net.admission import Finding
from atoll.net.control import Decline, Deliver, Ended, Received, Refused, Wait
from atoll.net.coordinator import Entry, Phase, Plan, State, handle, replay

BASE, MODEL = "b" * 64, "c" * 64
NAMES = ("a", "b", "c")
PLAN = Plan("r", 2, least=3, quorum=2, deadline=10.0, attempts=2)


def update(name: str, state: State, content: str = "1", **changes: Any) -> core.Submitted:
    claim = Deliver("r", name, state.round, state.attempt, state.base or BASE, content * 64, 9, (1, 0, 0), 9)
    return core.Submitted(name, msgspec.structs.replace(claim, **changes), Finding("", "", 1.0, 1.0))


@dataclass
class Run:
    """A machine with its journal; time is told by hand."""

    plan: Plan = PLAN
    state: State = State()  # noqa: RUF009 - it is frozen
    now: float = 0.0

    def __post_init__(self) -> None:
        self.entries: list[Entry] = []

    def __call__(self, event: core.Event) -> core.Effects:
        before = self.state
        self.state, effects = handle(self.plan, before, event, self.now)
        records = [e for e in effects if isinstance(e, core.Record)]
        assert len(records) <= 1
        if records:
            assert self.state.number == before.number + 1
            # Nothing but storing an update comes before the record.
            assert all(isinstance(e, core.Store) for e in effects[: effects.index(records[0])])
            # The journal holds bytes: what comes out of them must be the same.
            coded = msgspec.json.decode(msgspec.json.encode(records[0].entry), type=Entry)
            assert coded == records[0].entry
            self.entries.append(coded)
        else:
            assert self.state == before, "what is not recorded changes nothing"
        assert replay(self.plan, self.entries) == self.state
        return effects

    def begun(self, *names: str) -> "Run":
        self(core.Started(MODEL))
        for name in names or NAMES:
            self(core.Joined(name))
        return self

    def opened(self, *names: str) -> "Run":
        if not self.state.model:
            self.begun(*names)
        self(core.Opened(self.state.round, self.state.attempt, BASE))
        return self


def answer(effects: core.Effects) -> Any:
    """The one answer among effects."""
    (found,) = [e.answer for e in effects if isinstance(e, core.Reply)]
    return found


def at(phase: Phase) -> Run:
    """A run in a phase."""
    run = Run()
    if phase is Phase.GATHERING:
        return run.begun("a")
    run.begun()
    if phase is Phase.OPENING:
        return run
    run.opened()
    if phase is Phase.COLLECTING:
        return run
    if phase is Phase.PAUSED:
        run(core.Pause("a rest"))
        return run
    if phase is Phase.STOPPED:
        run(core.Stop("enough"))
        return run
    for _ in range(1 if phase is Phase.REDUCING else 2):
        for name in NAMES:
            run(update(name, run.state))
        if phase is Phase.FINISHED:
            run(core.Reduced(run.state.round, 1, MODEL))
            if run.state.phase is Phase.OPENING:
                run.opened()
    return run


EVENTS: dict[type, Any] = {
    core.Started: lambda s: core.Started(MODEL),
    core.Restarted: lambda s: core.Restarted(),
    core.Joined: lambda s: core.Joined("d"),
    core.Left: lambda s: core.Left("a"),
    core.SitePaused: lambda s: core.SitePaused("a"),
    core.Revoked: lambda s: core.Revoked("a"),
    core.Opened: lambda s: core.Opened(s.round, s.attempt, BASE),
    core.Asked: lambda s: core.Asked("a"),
    core.Submitted: lambda s: update("a", s),
    core.Declined: lambda s: core.Declined("a", Decline("r", "a", s.round, s.attempt, "no")),
    core.Reduced: lambda s: core.Reduced(s.round, s.attempt, MODEL),
    core.Failed: lambda s: core.Failed(s.round, s.attempt, "it broke"),
    core.Ticked: lambda s: core.Ticked(),
    core.Pause: lambda s: core.Pause("a rest"),
    core.Resume: lambda s: core.Resume(),
    core.Discard: lambda s: core.Discard("again, please"),
    core.Stop: lambda s: core.Stop("enough"),
}

# Events that have no place in a phase: refused by name, without a trace in the journal.
P, W = Phase, core
MISPLACED = {
    *((p, W.Started) for p in Phase),
    *((p, W.Opened) for p in Phase if p is not P.OPENING),
    *((p, W.Reduced) for p in Phase if p is not P.REDUCING),
    *((p, W.Failed) for p in Phase if p not in (P.OPENING, P.COLLECTING, P.REDUCING)),
    *((p, e) for e in (W.Resume, W.Discard) for p in Phase if p is not P.PAUSED),
    *((p, W.Pause) for p in (P.PAUSED, P.FINISHED, P.STOPPED)),
    *((p, W.Stop) for p in (P.FINISHED, P.STOPPED)),
}


def test_the_table_is_whole() -> None:
    assert set(core.TABLE) == {(p, e) for p in Phase for e in get_args(core.Event)}
    assert set(EVENTS) == set(get_args(core.Event))


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("event", EVENTS, ids=lambda e: e.__name__)
def test_every_event_in_every_phase(phase: Phase, event: type) -> None:
    run = at(phase)
    assert run.state.phase is phase
    effects = run(EVENTS[event](run.state))
    refused = [e for e in effects if isinstance(e, core.Misplaced)]
    assert bool(refused) == ((phase, event) in MISPLACED)
    if refused:
        assert refused == [core.Misplaced(event.__name__, phase)] == list(effects)
    if event in (core.Asked, core.Submitted, core.Declined):
        assert sum(isinstance(e, core.Reply | core.Offer) for e in effects) == 1, "a site is always answered"


@given(st.integers(0, 2**32))
def test_any_sequence_of_events(seed: int) -> None:
    """The state is always that of its journal (checked by `Run`), and an accepted update stays until its round ends."""
    rng = random.Random(seed)
    run = Run(Plan("r", 3, least=2, cohort=2, over=1.5, quorum=2, deadline=5.0, attempts=2))
    for _ in range(60):
        event = EVENTS[rng.choice(list(EVENTS))](run.state)
        if hasattr(event, "site"):
            event = msgspec.structs.replace(event, site=rng.choice("abcd"))
        if hasattr(event, "claim"):
            stamp = {
                "round": max(0, run.state.round - rng.choice([0, 0, 0, 1])),
                "site": rng.choice([event.site] * 9 + ["z"]),
            }
            event = msgspec.structs.replace(event, claim=msgspec.structs.replace(event.claim, **stamp))
        if rng.random() < 0.9 and isinstance(event, core.Stop | core.Revoked | core.Pause):
            continue
        before, run.now = run.state, run.now + rng.choice([0, 0, 1, 4, -3])
        run(event)
        lost = before.accepted.keys() - run.state.accepted.keys()
        given_up = isinstance(event, core.Revoked | core.Discard | core.Stop)
        assert not lost or run.state.round > before.round or given_up
        assert not run.state.accepted.keys() & run.state.excluded.keys()
        assert run.state.accepted.keys() <= set(run.state.cohort)
        if run.state.phase is Phase.REDUCING:
            assert len(run.state.accepted) >= 2


# --- updates ----------------------------------------------------------------------------------------------------------


def test_a_round() -> None:
    run = Run().opened()
    assert isinstance(run(core.Asked("a"))[0], core.Offer)
    for name in "ca":
        effects = run(update(name, run.state))
        assert [type(e) for e in effects[:3]] == [core.Store, core.Record, core.Reply]
        assert answer(effects) == Received("r", 0, 1, None)
    assert isinstance(answer(run(core.Asked("a"))), Wait)
    *_, reduce = run(update("b", run.state))
    assert isinstance(reduce, core.Reduce)
    assert [u.claim.site for u in reduce.updates] == ["a", "b", "c"], "the cohort's order, not that of arrival"
    effects = run(core.Reduced(0, 1, "d" * 64))
    assert effects[1:] == (core.Forget(1), core.Open(1, 1, NAMES, 3, ""))
    assert run.state.sites["a"].counted == (0, 1) and run.state.model == "d" * 64
    assert answer(run(core.Asked("a"))) == Wait("r", 1, (0, 1))


def test_the_last_round_ends_the_run() -> None:
    run = at(Phase.FINISHED)
    assert answer(run(core.Asked("a"))) == Ended("r", 2, "all 2 rounds are done.", (1, 1))


def test_a_repeated_update_has_the_same_answer_and_counts_once() -> None:
    run = Run().opened()
    run(update("a", run.state))
    again = run(update("a", run.state))
    assert again == (core.Reply("a", Received("r", 0, 1, None)),)
    for name in "bc":
        run(update(name, run.state))
    first = update("a", State(round=0, attempt=1))
    assert isinstance(answer(run(first)), Received), "while the round is reduced"
    run(core.Reduced(0, 1, MODEL))
    assert answer(run(first)) == Received("r", 0, 1, (0, 1)), "and after it"


@pytest.mark.parametrize("after", [False, True])
def test_another_update_under_the_same_attempt_is_an_alarm(after: bool) -> None:
    run = Run().opened()
    old = run.state
    for name in "abc" if after else "a":
        run(update(name, run.state))
    if after:
        run(core.Reduced(0, 1, MODEL))
    effects = run(update("a", old, "2"))
    assert answer(effects).cause == "conflict"
    assert isinstance(effects[0], core.Alarm)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"round": 1}, "stale"), ({"attempt": 0}, "stale"), ({"attempt": 2}, "stale"), ({"base": "0" * 64}, "base"),
        ({"run": "s"}, "run"), ({"site": "b"}, "identity"),
    ],
)  # fmt: skip
def test_updates_that_do_not_belong_here(changes: dict[str, Any], cause: str) -> None:
    run = Run().opened()
    refused = answer(run(update("a", run.state, **changes)))
    assert isinstance(refused, Refused) and refused.cause == cause and refused.now == 0
    assert not run.state.accepted


def test_strangers_and_the_revoked() -> None:
    run = Run().opened()
    assert answer(run(update("z", run.state))).cause == "unknown site"
    assert answer(run(core.Asked("z"))).cause == "unknown site"
    run(update("a", run.state))
    run(core.Revoked("a"))
    assert "a" not in run.state.accepted
    assert answer(run(update("a", run.state))).cause == "revoked"
    assert answer(run(core.Asked("a"))).cause == "revoked"
    assert isinstance(run(core.Joined("a"))[0], core.Alarm)
    run(core.Joined("d"))
    assert answer(run(update("d", run.state))).cause == "not in cohort"


def test_bad_content_shuts_out_for_the_attempt_and_damage_on_the_way_does_not() -> None:
    run = Run().opened()
    damaged = msgspec.structs.replace(update("a", run.state), finding=Finding("transport", "hash"))
    assert answer(run(damaged)).cause == "transport"
    bad = msgspec.structs.replace(update("a", run.state), finding=Finding("content", "it is not finite."))
    assert answer(run(bad)) == Refused("r", 0, 1, "content", "it is not finite.", 0, None)
    assert answer(run(update("a", run.state))).cause == "excluded"
    run(update("b", run.state))
    run(update("c", run.state))
    assert run.state.phase is Phase.REDUCING, "nobody is left to wait for, and the quorum is there"


def test_a_site_that_went_stays_out_of_the_attempt() -> None:
    run = Run().opened()
    run(core.Left("a"))
    run(core.Joined("a"))
    assert answer(run(update("a", run.state))).cause == "excluded"
    assert isinstance(answer(run(core.Asked("a"))), Wait)


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_quorum_closes_the_round_at_the_deadline() -> None:
    run = Run().opened()
    run(update("a", run.state))
    run(update("c", run.state))
    run.now = 9.9
    assert run(core.Ticked()) == ()
    run.now = 10.0
    *_, reduce = run(core.Ticked())
    assert isinstance(reduce, core.Reduce) and len(reduce.updates) == 2
    assert answer(run(update("b", run.state))).cause == "stale", "a straggler is told so"


def test_attempts_keep_what_is_accepted_and_end_in_a_pause() -> None:
    run = Run().opened()
    run(update("a", run.state))
    run.now = 10.0
    *_, opened = run(core.Ticked())
    assert opened == core.Open(0, 2, NAMES, 3, "")
    run.opened()
    assert isinstance(answer(run(core.Asked("a"))), Wait), "its update counts already"
    run.now = 20.0
    run(core.Ticked())
    assert run.state.phase is Phase.PAUSED and "1 of 2 updates in each of 2 attempts" in run.state.reason
    assert set(run.state.accepted) == {"a"}
    run(core.Resume())
    run.opened()
    run(update("b", run.state))
    run(update("c", run.state))
    assert run.state.phase is Phase.REDUCING and set(run.state.accepted) == {"a", "b", "c"}
    run(core.Reduced(0, 3, MODEL))
    assert run.state.sites["a"].counted == (0, 1) and run.state.sites["b"].counted == (0, 3)


def test_updates_that_depend_on_the_cohort_are_void_in_another_attempt() -> None:
    run = Run(msgspec.structs.replace(PLAN, keep=False)).opened()
    run(update("a", run.state))
    run.now = 10.0
    run(core.Ticked())
    assert not run.state.accepted and run.state.attempt == 2
    run.opened()
    assert isinstance(run(core.Asked("a"))[0], core.Offer)
    assert answer(run(update("a", run.state, attempt=1))).cause == "stale"


def test_a_task_is_not_given_again_to_who_is_working_on_it() -> None:
    run = Run().opened()
    assert isinstance(answer(run(core.Asked("a", (0, 1)))), Wait)
    assert isinstance(run(core.Asked("a", (0, 0)))[0], core.Offer)


def test_the_same_bytes_from_two_sites_are_an_alarm() -> None:
    run = Run().opened()
    run(update("a", run.state))
    effects = run(update("b", run.state))
    assert isinstance(answer(effects), Received)
    assert [e.text for e in effects if isinstance(e, core.Alarm)] == ["sent the very bytes of a"]


@pytest.mark.parametrize("name", ["", "../a", "a\nb", "\u0430", "x" * 201])
def test_names_that_could_not_travel(name: str) -> None:
    run = Run().begun()
    assert isinstance(run(core.Joined(name))[0], core.Alarm) and name not in run.state.sites
    with pytest.raises(InvalidArgument, match="run="):
        Plan(name, 1)


def test_a_clock_that_goes_back_stands_still() -> None:
    run = Run(now=100.0).opened()
    assert run.state.deadline == 110.0
    run.now = 3.0
    run(update("a", run.state))
    assert run.state.now == 100.0 and run(core.Ticked()) == ()


def test_a_restart_gives_the_whole_time_again() -> None:
    run = Run().opened()
    run(update("a", run.state))
    run.now = 500.0
    effects = run(core.Restarted())
    assert effects[1:] == (core.Open(0, 1, NAMES, 3, BASE),)
    assert run.state.deadline == 510.0 and set(run.state.accepted) == {"a"}


@pytest.mark.parametrize("phase", [Phase.OPENING, Phase.COLLECTING, Phase.REDUCING])
def test_a_pause_goes_on_where_it_was(phase: Phase) -> None:
    run = at(phase)
    before = run.state
    lost = run(core.Restarted())[1:]
    run(core.Pause("a rest"))
    if phase is Phase.COLLECTING:
        assert answer(run(update("a", run.state))).cause == "busy", "it may be sent again later"
    assert run(core.Resume())[1:] == lost
    assert run.state.phase is phase and run.state.accepted == before.accepted


def test_what_cannot_be_made_pauses_with_its_reason() -> None:
    run = at(Phase.REDUCING)
    run(core.Failed(0, 1, "the step raised"))
    assert run.state.phase is Phase.PAUSED and run.state.reason == "the step raised"
    *_, reduce = run(core.Resume())
    assert isinstance(reduce, core.Reduce) and len(reduce.updates) == 3


def test_a_task_that_cannot_be_made_again_pauses_and_is_made_at_the_resume() -> None:
    run = at(Phase.COLLECTING)
    run(core.Restarted())
    run(core.Failed(0, 1, "no memory"))
    assert run.state.phase is Phase.PAUSED and run.state.reason == "no memory"
    *_, again = run(core.Resume())
    assert isinstance(again, core.Open) and again.base == BASE and run.state.phase is Phase.COLLECTING


# --- cohorts ----------------------------------------------------------------------------------------------------------


def test_cohorts_are_those_of_a_simulation() -> None:
    names = tuple(f"s{i}" for i in range(9))
    run = Run(Plan("r", 5, seed=3, cohort=4, least=9)).begun(*names)
    for round in range(5):
        assert run.state.cohort == sampling.fixed(4).cohort(3, round, names)
        run.opened()
        for name in run.state.cohort:
            run(update(name, run.state))
        run(core.Reduced(round, 1, MODEL))


def test_more_are_asked_than_wanted_and_the_first_count() -> None:
    names = tuple(f"s{i}" for i in range(9))
    run = Run(Plan("r", 5, cohort=4, over=1.3, least=9)).opened(*names)
    assert len(run.state.cohort) == 6 and run.state.wanted == 4
    for name in run.state.cohort[2:]:
        effects = run(update(name, run.state))
    assert isinstance(effects[-1], core.Reduce)
    assert answer(run(update(run.state.cohort[0], run.state))).cause == "stale"


def test_another_attempt_asks_others_first() -> None:
    names = tuple(f"s{i}" for i in range(6))
    run = Run(Plan("r", 5, cohort=3, deadline=1.0, least=6)).opened(*names)
    first = run.state.cohort
    run(update(first[0], run.state))
    run.now = 2.0
    run(core.Ticked())
    second = run.state.cohort
    assert first[0] in second and len(second) == 3 and not set(first[1:]) & set(second)


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 0}, {"least": 0}, {"attempts": 0}, {"cohort": 0}, {"over": 0.5}, {"over": float("inf")},
        {"quorum": 0}, {"quorum": 3, "cohort": 2}, {"deadline": 0.0}, {"deadline": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_plans(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        Plan(**{"run": "r", "rounds": 1} | options)


def test_a_journal_of_something_else_is_refused() -> None:
    run = Run().opened()
    with pytest.raises(RunError, match="entry 2"):
        replay(PLAN, [run.entries[0], run.entries[2]])
    with pytest.raises(RunError, match="no place"):
        replay(PLAN, [Entry(0, 0.0, core.Reduced(0, 0, MODEL))])


# --- giving up an attempt ---------------------------------------------------------------------------------------------


def test_updates_that_cannot_be_combined_are_given_up_and_the_round_is_tried_again() -> None:
    run = at(Phase.REDUCING)
    run(core.Failed(0, 1, "the step raised"))
    run(core.Revoked("a"))
    assert set(run.state.accepted) == {"a", "b", "c"}, "the set of a round is fixed"
    run(core.Discard("a sent rubbish"))
    assert run.state.phase is Phase.PAUSED and not run.state.accepted and run.state.reason == "a sent rubbish"
    assert answer(run(update("b", run.state, attempt=1))).cause == "stale", "it is void, and its site told so"
    run(core.Joined("d"))
    *_, opened = run(core.Resume())
    assert opened == core.Open(0, 2, ("b", "c", "d"), 3, ""), "the same round, without the site that was shut out"
    assert run.state.tries == 1
    before = run.state
    assert run(core.Reduced(0, 1, MODEL)) == (core.Misplaced("Reduced", Phase.OPENING),), "what was at work comes late"
    assert run.state == before


@pytest.mark.parametrize("phase", [Phase.OPENING, Phase.COLLECTING, Phase.REDUCING])
def test_an_attempt_is_given_up_wherever_it_was(phase: Phase) -> None:
    run = at(phase)
    run(core.Pause("a rest"))
    run(core.Discard("again, please"))
    *_, opened = run(core.Resume())
    assert opened == core.Open(0, 2, NAMES, 3, "") and run.state.phase is Phase.OPENING


def test_a_stopped_run_forgets_its_updates() -> None:
    run = at(Phase.REDUCING)
    assert run(core.Stop("enough"))[-1] == core.Forget(1)
    assert not run.state.accepted
