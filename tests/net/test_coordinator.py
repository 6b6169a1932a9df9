"""The server's state machine: every event in every phase, and what a round may count."""

import random
from dataclasses import dataclass
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll import sampling
from atoll.errors import InvalidArgument, RunError
from atoll.net import coordinator as core
from atoll.net.admission import Finding
from atoll.net.control import STEPS, Abstain, Decline, Deliver, Ended, Received, Refused, Say, Step, Wait
from atoll.net.coordinator import Entry, Phase, Plan, State, handle, replay

BASE, MODEL = "b" * 64, "c" * 64
NAMES = ("a", "b", "c")
PLAN = Plan("r", 2, least=3, quorum=2, deadline=10.0, attempts=2)
SUMS = Plan("r", 2, least=4, quorum=3, deadline=10.0, attempts=2, keep=False, sums=3, step=5.0)
FOUR = ("a", "b", "c", "d")


def update(name: str, state: State, content: str = "1", **changes: Any) -> core.Submitted:
    claim = Deliver("r", name, state.round, state.attempt, state.base or BASE, content * 64, 9, (1, 0, 0), 9)
    return core.Submitted(name, msgspec.structs.replace(claim, **changes), Finding("", "", 1.0, 1.0))


def said(name: str, state: State, content: bytes = b"1", **changes: Any) -> core.Spoke:
    step = state.sum.step if state.sum else "join"
    claim = Say("r", name, state.round, state.attempt, state.turn, step, content, "1" * 64, 0)
    return core.Spoke(name, msgspec.structs.replace(claim, **changes), Finding())


def abstained(name: str, state: State) -> core.Abstained:
    return core.Abstained(name, Abstain("r", name, state.round, state.attempt, state.turn, "it was started again."))


def advanced(state: State, *due: str) -> core.Advanced:
    step = STEPS[(STEPS.index(state.sum.step) + 1) % 6] if state.sum else "reveal"
    return core.Advanced(state.round, state.turn, step, due or FOUR)


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


def summing(step: Step = "join", plan: Plan = SUMS) -> Run:
    """A run whose four sites are trained, and asked for this step."""
    run = Run(plan).opened(*FOUR)
    for name in FOUR:
        run(update(name, run.state))
    while run.state.sum is not None and run.state.sum.step != step:
        for name in FOUR:
            run(said(name, run.state))
        run(advanced(run.state))
    return run


def at(phase: Phase) -> Run:
    """A run in a phase."""
    run = Run()
    if phase is Phase.GATHERING:
        return run.begun("a")
    if phase is Phase.SUMMING:
        return summing()
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
    core.Spoke: lambda s: said("a", s),
    core.Abstained: lambda s: abstained("a", s),
    core.Advanced: lambda s: advanced(s),
    core.Summed: lambda s: core.Summed(s.round, s.turn, FOUR, "e" * 64),
    core.Voided: lambda s: core.Voided(s.round, s.turn, "too few", {}),
    core.Reduced: lambda s: core.Reduced(s.round, s.attempt, MODEL),
    core.Evaluated: lambda s: core.Evaluated(s.round),
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
    *((p, W.Evaluated) for p in Phase),  # of a run that evaluates, see below
    *((p, e) for e in (W.Advanced, W.Summed, W.Voided) for p in Phase),  # the machine speaks when it is asked
    *((p, W.Failed) for p in Phase if p not in (P.OPENING, P.COLLECTING, P.SUMMING, P.REDUCING)),
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
    if event in (core.Asked, core.Submitted, core.Declined, core.Spoke, core.Abstained):
        told = [e for e in effects if isinstance(e, core.Reply | core.Offer | core.Tell)]
        assert len(told) == 1, "a site is always answered"


@given(st.integers(0, 2**32))
def test_any_sequence_of_events(seed: int) -> None:
    """The state is always that of its journal (checked by `Run`), and an accepted update stays until its round ends."""
    rng = random.Random(seed)
    evaluate = rng.choice([0, 1, 2])
    run = Run(Plan("r", 3, least=2, cohort=2, over=1.5, quorum=2, deadline=5.0, attempts=2, evaluate=evaluate))
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
        heard = isinstance(event, core.Evaluated | core.Failed) and before.kind == "evaluate"
        assert not lost or run.state.round > before.round or given_up or heard
        assert not run.state.accepted.keys() & run.state.excluded.keys()
        assert run.state.accepted.keys() <= set(run.state.cohort)
        if run.state.phase is Phase.REDUCING:
            assert len(run.state.accepted) >= (1 if run.state.kind == "evaluate" else 2)
        assert (run.state.attempt == 0) or run.state.kind == "train"
        assert run.state.evaluated <= run.state.round


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


# --- evaluations ------------------------------------------------------------------------------------------------------

EVALUATED = msgspec.structs.replace(PLAN, evaluate=1)


def examined(plan: Plan = EVALUATED) -> Run:
    """A run whose first round is done, and whose sites are asked what its model is worth."""
    run = Run(plan).opened()
    for name in NAMES:
        run(update(name, run.state))
    *_, opened = run(core.Reduced(0, 1, MODEL))
    assert opened == core.Open(1, 0, NAMES, 3, "")
    run.opened()
    assert run.state.kind == "evaluate" and run.state.deadline == plan.patience
    return run


def test_after_a_round_everybody_is_asked_what_its_model_is_worth() -> None:
    run = examined()
    assert isinstance(run(core.Asked("a"))[0], core.Offer)
    run(update("c", run.state))
    assert answer(run(update("c", run.state))) == Received("r", 1, 0, (0, 1)), "it is heard once"
    run(update("a", run.state))
    *_, reduce = run(update("b", run.state))
    assert isinstance(reduce, core.Reduce) and (reduce.round, reduce.attempt) == (1, 0)
    assert [u.claim.site for u in reduce.updates] == ["a", "b", "c"]
    assert run(core.Reduced(1, 0, MODEL)) == (core.Misplaced("Reduced", Phase.REDUCING),)
    *_, opened = run(core.Evaluated(1))
    assert opened == core.Open(1, 1, NAMES, 3, ""), "the very cohort and attempt of a run without evaluations"
    assert run.state.kind == "train" and run.state.sites["a"].counted == (0, 1), "an answer is no update"
    assert answer(run(update("a", run.state, attempt=0))).cause == "stale"
    assert run(core.Evaluated(1)) == (core.Misplaced("Evaluated", Phase.OPENING),)


def test_the_same_bytes_are_no_alarm_in_an_evaluation() -> None:
    run = examined()
    run(update("a", run.state))
    assert not [e for e in run(update("b", run.state)) if isinstance(e, core.Alarm)]


def test_an_evaluation_waits_no_longer_than_it_may_and_needs_nobody() -> None:
    for said in ("", "a"):
        run = examined()
        for name in said:
            run(update(name, run.state))
        run.now = EVALUATED.patience
        effects = run(core.Ticked())
        if said:
            assert run.state.phase is Phase.REDUCING
            effects = run(core.Evaluated(1))
        assert effects[-1] == core.Open(1, 1, NAMES, 3, "") and run.state.evaluated == 1
        assert answer(run(update("b", run.state, attempt=0))).cause == "stale"
    assert Plan("r", 1, evaluate=1).patience == 600.0


def test_an_evaluation_that_fails_does_not_hold_the_run() -> None:
    run = examined()
    assert run(core.Failed(1, 0, "its metrics broke"))[-1] == core.Open(1, 1, NAMES, 3, "")
    run = examined()
    run(core.Pause("a rest"))
    run(core.Discard("enough of it"))
    assert run(core.Resume())[-1] == core.Open(1, 1, NAMES, 3, "")
    run = examined()
    run(core.Pause("a rest"))
    assert run(core.Resume())[-1] == core.Open(1, 0, NAMES, 3, BASE), "a rest is no end of it"
    run = examined(msgspec.structs.replace(EVALUATED, rounds=1))
    run(core.Pause("a rest"))
    run(core.Discard("enough of it"))
    run(core.Resume())
    assert run.state.phase is Phase.FINISHED


def test_the_last_model_is_evaluated_before_the_run_ends_if_anybody_is_there() -> None:
    for there in (True, False):
        run = Run(msgspec.structs.replace(EVALUATED, rounds=3, evaluate=2))
        run.opened()
        for number in range(3):
            for name in NAMES:
                run(update(name, run.state))
            if number == 2 and not there:
                for name in NAMES:
                    run(core.Left(name))
            run(core.Reduced(number, 1, MODEL))
            asked = run.state.kind == "evaluate"
            assert asked == (number > 0 and (number < 2 or there)), "after round 2, and after the last"
            if run.state.phase is Phase.OPENING:
                run.opened()
            if asked:
                for name in NAMES:
                    run(update(name, run.state))
                run(core.Evaluated(number + 1))
                if run.state.phase is Phase.OPENING:
                    run.opened()
        assert run.state.phase is Phase.FINISHED and run.state.reason == "all 3 rounds are done."
        assert isinstance(answer(run(core.Asked("a"))), Ended)


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
        {"quorum": 0}, {"quorum": 3, "cohort": 2}, {"deadline": 0.0}, {"deadline": float("nan")}, {"evaluate": -1},
        {"evaluate": 1, "sums": 3, "keep": False},
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


# --- secure sums ------------------------------------------------------------------------------------------------------


def everybody(run: Run) -> core.Effects:
    """All that are awaited answer; the effects of the last."""
    effects: core.Effects = ()
    assert run.state.sum is not None
    for name in run.state.sum.awaited:
        effects = run(said(name, run.state))
    return effects


def test_a_sum_in_six_steps() -> None:
    run = summing()
    assert run.state.phase is Phase.SUMMING and run.state.turn == 1
    assert isinstance(run(core.Asked("a"))[0], core.Tell)
    for step in STEPS:
        assert run.state.sum is not None and run.state.sum.step == step
        *_, close = everybody(run)
        assert close == core.Close(0, 1, 1, step)
        assert isinstance(answer(run(core.Asked("a"))), Wait), "the machine has the word"
        if step != "unmask":
            run(advanced(run.state))
    *_, reduce = run(core.Summed(0, 1, ("a", "b", "c"), "e" * 64))
    assert isinstance(reduce, core.Reduce) and (reduce.turn, reduce.total) == (1, "e" * 64)
    assert [u.claim.site for u in reduce.updates] == ["a", "b", "c"], "who is not in the sum is not counted"
    run(core.Reduced(0, 1, "d" * 64))
    assert run.state.sites["a"].counted == (0, 1) and run.state.sites["d"].counted is None
    assert (run.state.turn, run.state.sum, run.state.total) == (0, None, "")


def test_nothing_of_an_update_is_kept() -> None:
    run = Run(SUMS).opened(*FOUR)
    effects = run(update("a", run.state))
    assert [type(e) for e in effects] == [core.Record, core.Reply]
    run(update("b", run.state))
    assert not any(isinstance(e, core.Alarm) for e in run(update("c", run.state))), "all say the same"


def test_a_masked_vector_is_on_disk_before_it_is_recorded() -> None:
    run = summing("mask")
    event = said("a", run.state, b"", size=9)
    effects = run(event)
    assert [type(e) for e in effects[:3]] == [core.Store, core.Record, core.Reply]
    assert run(event) == (core.Reply("a", Wait("r", 0, None)),), "the same again is acknowledged again"


def test_another_answer_to_a_step_is_an_alarm_and_not_heard() -> None:
    run = summing("unmask")
    run(said("a", run.state, b"one kind"))
    effects = run(said("a", run.state, b"the other kind"))
    assert isinstance(effects[0], core.Alarm) and answer(effects).cause == "turn"
    assert run.state.sum is not None and [s.content for s in run.state.sum.said if s.step == "unmask"] == [b"one kind"]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"turn": 0}, "turn"), ({"turn": 2}, "turn"), ({"step": "mask"}, "turn"), ({"step": "join"}, "turn"),
        ({"round": 1}, "turn"), ({"attempt": 2}, "turn"), ({"site": "b"}, "identity"), ({"run": "s"}, "run"),
    ],
    ids=str,
)  # fmt: skip
def test_answers_that_do_not_belong_here(changes: dict[str, Any], cause: str) -> None:
    run = summing("share")
    before = run.state
    effects = run(said("a", run.state, **changes))
    assert answer(effects).cause == cause and run.state == before


def test_who_left_a_step_out_or_is_shut_out_is_not_heard() -> None:
    run = summing()
    run(abstained("a", run.state))
    assert answer(run(said("a", run.state))).cause == "turn"
    everybody(run)
    run(advanced(run.state, "b", "c", "d"))
    assert answer(run(said("a", run.state))).cause == "turn"
    assert isinstance(answer(run(core.Asked("a"))), Wait)
    bad = msgspec.structs.replace(said("b", run.state), finding=Finding("content", "another session."))
    assert answer(run(bad)).detail == "another session."
    assert run.state.turn == 2, "with two left of the three that must be, the turn is void"


def test_a_step_is_closed_when_nobody_is_awaited_or_time_is_over() -> None:
    run = summing()
    for name in "abc":
        run(said(name, run.state))
    run.now = 4.9
    assert run(core.Ticked()) == ()
    run.now = 5.0
    assert run(core.Ticked())[-1] == core.Close(0, 1, 1, "join")
    assert answer(run(said("d", run.state))).cause == "turn", "closed is closed"
    run(advanced(run.state, "a", "b", "c"))
    assert run.state.deadline == 10.0
    run(said("a", run.state))
    run(said("b", run.state))
    assert run(core.Left("c"))[-1] != core.Close(0, 1, 1, "reveal"), "two are too few"
    assert run.state.turn == 2


@pytest.mark.parametrize("step", STEPS)
def test_who_must_be_there_in_a_step(step: Step) -> None:
    """Without a quorum all of them, until vectors are sent; from then on whoever the machine can do without."""
    run = summing(step, msgspec.structs.replace(SUMS, quorum=None))
    run(core.Left("d"))
    effects = everybody(run) if run.state.sum is not None else ()
    if step in ("join", "reveal", "share"):
        assert run.state.phase is Phase.GATHERING, "of four that were wanted three are there"
    else:
        assert effects[-1] == core.Close(0, 1, 1, step)


def test_a_void_turn_begins_anew_with_another_number_and_no_training() -> None:
    run = summing("confirm")
    everybody(run)
    run(core.Voided(0, 1, "too few", {}))
    assert run.state.phase is Phase.SUMMING and run.state.turn == 2 and run.state.tries == 2
    assert run.state.sum == core.Sum(dict.fromkeys(FOUR, ""), "join", FOUR), "nothing of the turn before is left"
    assert answer(run(said("a", run.state, turn=1, step="confirm"))).cause == "turn"
    everybody(run)
    run(core.Voided(0, 2, "too few", {}))
    assert run.state.phase is Phase.PAUSED and run.state.reason == "round 1 had no sum in 2 attempts: too few."
    assert set(run.state.accepted) == set(FOUR)
    (_, reopened) = run(core.Resume())
    assert isinstance(reopened, core.Open) and reopened.base == BASE
    assert run.state.phase is Phase.SUMMING and run.state.turn == 3 and run.state.tries == 1


def test_who_dealt_wrongly_is_not_asked_again() -> None:
    run = summing("unmask")
    everybody(run)
    run(core.Voided(0, 1, "d lied", {"d": "its shares give nothing"}))
    assert run.state.sum is not None and set(run.state.sum.keys) == {"a", "b", "c"}
    assert run.state.excluded == {"d": "its shares give nothing"}


def test_a_restart_goes_on_in_the_step_and_asks_the_machine_again() -> None:
    run = summing("mask")
    run(said("a", run.state))
    run.now = 500.0
    assert run(core.Restarted())[1:] == (core.Open(0, 1, FOUR, 4, BASE),)
    assert run.state.deadline == 505.0 and run.state.sum is not None and len(run.state.sum.awaited) == 3
    everybody(run)
    assert run(core.Restarted())[1:] == (core.Open(0, 1, FOUR, 4, BASE), core.Close(0, 1, 1, "mask"))


def test_a_pause_in_a_sum_goes_on_where_it_was() -> None:
    run = summing("mask")
    run(said("a", run.state))
    run(core.Pause("a rest"))
    assert answer(run(said("b", run.state))).cause == "busy"
    assert isinstance(answer(run(core.Asked("b"))), Wait)
    run(abstained("d", run.state))
    run(core.Resume())
    assert run.state.sum is not None and run.state.sum.awaited == ["b", "c"] and run.state.turn == 1


def test_the_machine_is_heard_when_it_was_asked_and_of_this_turn_alone() -> None:
    run = summing("unmask")
    sums = core.Summed(0, 1, FOUR, "e" * 64)
    assert run(sums) == (core.Misplaced("Summed", Phase.SUMMING),)
    everybody(run)
    assert run(msgspec.structs.replace(sums, turn=2)) == (core.Misplaced("Summed", Phase.SUMMING),)
    assert isinstance(run(advanced(run.state))[0], core.Misplaced), "no step comes after the last, nor one again"
    run(sums)
    assert run.state.phase is Phase.REDUCING


def test_a_site_with_a_new_key_is_out_of_the_turn_and_in_the_next() -> None:
    run = summing("join")
    run(core.Joined("a", "k" * 43))
    assert run.state.sum is not None and run.state.sum.out == {"a": "the site has another key."}
    everybody(run)
    run(core.Voided(0, 1, "too few", {}))
    assert run.state.sum is not None and run.state.sum.keys["a"] == "k" * 43


def test_a_site_that_is_shut_out_answers_no_more_and_its_vector_stays() -> None:
    run = summing("confirm")
    run(core.Revoked("a"))
    assert answer(run(said("a", run.state))).cause == "revoked"
    everybody(run)
    run(advanced(run.state))
    assert run.state.sum is not None and run.state.sum.awaited == ["b", "c", "d"]


@settings(max_examples=15)
@given(st.integers(0, 2**32))
def test_any_sequence_of_events_in_sums(seed: int) -> None:
    """The state is always that of its journal; a turn's number never comes back; what a site said stays said."""
    rng = random.Random(seed)
    run, sums = summing(), 0
    for _ in range(60):
        before, state, turn = run.state, run.state, run.state.sum
        kinds = [k for k in EVENTS if k not in (core.Stop, core.Revoked)]
        event = EVENTS[rng.choice(kinds)](state)
        if state.phase is Phase.SUMMING and turn is not None and rng.random() < 0.8:
            names = turn.awaited or list(FOUR)
            event = said(rng.choice(names), state) if turn.awaited else advanced(state)
            if turn.closing and turn.step == "unmask":
                event = rng.choice([core.Voided(state.round, state.turn, "", {}), EVENTS[core.Summed](state)])
        elif hasattr(event, "claim") and not isinstance(event, core.Spoke | core.Abstained):
            event = update(rng.choice(FOUR), state)
        run.now += rng.choice([0, 0, 0, 1, 4])
        run(event)
        after = run.state
        assert (after.round, after.attempt, after.turn) >= (before.round, before.attempt, before.turn)
        same = (after.round, after.turn) == (before.round, before.turn)
        if same and after.sum is not None and before.sum is not None:
            assert after.sum.said[: len(before.sum.said)] == before.sum.said and after.sum.keys == before.sum.keys
            assert STEPS.index(after.sum.step) >= STEPS.index(before.sum.step)
        if after.phase is Phase.REDUCING:
            sums += before.phase is Phase.SUMMING
            assert after.total and after.sum is None


@pytest.mark.parametrize(
    "options",
    [{"sums": 2, "keep": False}, {"sums": 3}, {"quorum": 2, "sums": 3, "keep": False},
     {"cohort": 2, "sums": 3, "keep": False}, {"step": 0.0}],
    ids=str,
)  # fmt: skip
def test_impossible_plans_of_sums(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        Plan(**{"run": "r", "rounds": 1} | options)
