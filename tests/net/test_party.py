"""The site's state machine: one report for a task, and a memory that follows what counted."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import InvalidArgument
from atoll.net import party
from atoll.net.control import Ask, Decline, Deliver, Ended, Received, Refused, Stamp, Wait, Work
from atoll.net.party import Broke, Due, Heard, Kept, Pace, Phase, Record, Send, Settled, State, Train, Trained

PACE = Pace(1.0, 60.0)
H = "a" * 64
NEW = State("a", "r")


def work(round: int, attempt: int = 1, counted: Stamp | None = None) -> Work:
    return Work("r", round, attempt, H, 1, "train", 0, ("a",), 1, {}, counted)


def claim(round: int, attempt: int = 1) -> Deliver:
    return Deliver("r", "a", round, attempt, H, H, 1, (1, 0, 0), 1)


def after(*events: Any, state: State = NEW) -> tuple[State, tuple[party.Effect, ...]]:
    """The state after some events, and the effects of the last."""
    effects: tuple[party.Effect, ...] = ()
    for event in events:
        is_event = isinstance(event, party.Due | party.Heard | party.Trained | party.Broke)
        state, effects = party.handle(state, event if is_event else Heard(event), PACE)
    return state, effects


SENDING, _ = after(work(0), Trained(claim(0)))
PENDING, _ = after(Received("r", 0, 1, None), state=SENDING)


def test_a_task_is_taken_once_and_its_report_recorded_before_it_is_sent() -> None:
    state, effects = after(work(0))
    assert effects == (Train(work(0)),) and state.phase is Phase.TRAINING
    state, effects = after(work(0), state=state)
    assert effects == ()
    state, effects = after(Trained(claim(0)), state=state)
    assert effects == (Record(Kept(claim(0))), Send(claim(0))) and state.phase is Phase.SENDING


def test_a_report_is_sent_until_it_is_acknowledged_and_then_asked_about() -> None:
    assert after(Due(), state=SENDING)[1][1] == Send(claim(0))
    assert after(Refused("r", 0, 1, "busy", "", 0, None), state=SENDING)[0].phase is Phase.SENDING
    assert after(Refused("r", 0, 1, "transport", "", 0, None), state=SENDING)[0].phase is Phase.SENDING
    assert after(Due(), state=PENDING)[1][1] == Send(Ask("r", "a"))


@pytest.mark.parametrize("state", [SENDING, PENDING], ids=["sending", "pending"])
@pytest.mark.parametrize("answer", [
    Wait("r", 1, (0, 1)), work(1, 1, (0, 1)), Ended("r", 1, "", (0, 1)), Received("r", 0, 1, (0, 1)),
    Refused("r", 0, 1, "stale", "", 1, (0, 1)),
], ids=lambda a: type(a).__name__)  # fmt: skip
def test_memory_is_committed_when_the_update_counted(state: State, answer: Any) -> None:
    state, effects = after(answer, state=state)
    assert effects[0] == Record(Settled((0, 1), True)) and state.memory == (0, 1)


@pytest.mark.parametrize("state", [SENDING, PENDING], ids=["sending", "pending"])
@pytest.mark.parametrize("answer", [
    Wait("r", 1, None), work(0, 2), work(1), Ended("r", 1, "", None), Received("r", 0, 0, None),
    Refused("r", 0, 1, "stale", "", 0, None), Refused("r", 0, 1, "content", "", 0, None),
    Refused("r", 0, 0, "busy", "", 2, None),
], ids=str)  # fmt: skip
def test_memory_is_dropped_when_the_round_went_on_without_it(state: State, answer: Any) -> None:
    if isinstance(answer, Received):
        answer = Received("r", 1, 1, None)
    state, effects = after(answer, state=state)
    assert effects[0] == Record(Settled((0, 1), False)) and state.memory is None


@pytest.mark.parametrize("answer", [
    Wait("r", 0, None), work(0), work(0, 0), Refused("r", 0, 0, "stale", "", 0, None),
    Refused("r", 0, 1, "busy", "", 0, None), Refused("r", 0, 0, "revoked", "", 0, None), Wait("s", 9, (0, 1)),
], ids=str)  # fmt: skip
def test_nothing_is_decided_by_what_tells_nothing(answer: Any) -> None:
    for state in (SENDING, PENDING):
        assert after(answer, state=state)[0].claim == claim(0)


def test_old_tasks_are_not_taken_again() -> None:
    state, _ = after(Wait("r", 3, (0, 1)), state=PENDING)
    assert not any(isinstance(e, Train) for e in after(work(0), state=state)[1])
    assert after(work(3), state=state)[1] == (Train(work(3)),)


def test_a_round_that_is_over_ends_the_work_on_it() -> None:
    state, _ = after(work(0))
    idle, effects = after(Wait("r", 1, None), state=state)
    assert idle.phase is Phase.IDLE and effects == ()
    newer, effects = after(work(1), state=state)
    assert newer.stamp == (1, 1) and effects == (Train(work(1)),)
    late, effects = after(Trained(claim(0)), state=newer)
    assert late == newer and not any(isinstance(e, Record | Send) for e in effects)


def test_a_failure_is_told_and_not_tried_again() -> None:
    state, effects = after(work(0), Broke((0, 1), "no room"))
    assert effects[:2] == (Record(Settled((0, 1), False)), Send(Decline("r", "a", 0, 1, "no room")))
    assert after(work(0, 2), state=state)[1] == (Train(work(0, 2)),)


def test_a_failure_is_told_until_the_server_has_heard_it() -> None:
    failed, _ = after(work(0), Broke((0, 1), "no room"))
    restarted = party.replay("a", "r", [Settled((0, 1), False)])
    for state in (failed, restarted):
        for _ in range(2):
            state, effects = after(work(0), state=state)
            (said,) = effects
            assert isinstance(said, Send) and isinstance(said.message, Decline)
            assert (said.message.round, said.message.attempt) == (0, 1) and state.phase is Phase.IDLE


def test_after_the_end_nothing_is_said() -> None:
    state, _ = after(Ended("r", 2, "done", None))
    assert state.phase is Phase.ENDED and after(Due(), state=state)[1] == ()


def test_a_journal_makes_the_state_again() -> None:
    assert party.replay("a", "r", [Kept(claim(0))]).claim == claim(0)
    state = party.replay("a", "r", [Kept(claim(0)), Settled((0, 1), True), Kept(claim(1)), Settled((1, 1), False)])
    assert (state.memory, state.settled, state.phase) == ((0, 1), (1, 1), Phase.IDLE)


def test_waiting_doubles_up_to_a_bound_and_is_never_the_same_for_two() -> None:
    state, waits = NEW, list[float]()
    for turn in range(12):
        state, (sleep, _) = after(Due(), state=state)
        full = min(60.0, 2.0**turn)
        assert isinstance(sleep, party.Sleep) and full / 2 <= sleep.seconds <= full
        waits.append(sleep.seconds)
    heard, _ = after(Wait("r", 0, None), state=state)
    assert party.delay(heard, PACE) <= 1.0
    busy, _ = after(Refused("r", 0, 0, "busy", "", 0, None), state=state)
    assert party.delay(busy, PACE) > 1.0, "a busy server is not pressed"
    others = {party.delay(State(f"s{i}", "r", unheard=3), PACE) for i in range(50)}
    assert len(others) == 50
    assert party.delay(state, PACE) == party.delay(state, PACE)
    with pytest.raises(InvalidArgument, match="every"):
        Pace(2.0, 1.0)


@given(st.integers(0, 2**32))
def test_whatever_is_heard(seed: int) -> None:
    """Any answers in any order: a journal makes the state, one report for a task, memory only of what counted."""
    rng = random.Random(seed)
    state, entries, kept, counted = NEW, list[party.Entry](), set[Stamp](), set[Stamp]()
    for _ in range(60):
        round, attempt = rng.randint(0, 3), rng.randint(1, 2)
        told = rng.choice([None, *counted])
        stamp = state.stamp or (round, attempt)
        answers: list[Any] = [
            Due(), work(round, attempt, told), Wait("r", round, told), Received("r", *stamp, told),
            Refused("r", *stamp, rng.choice(["stale", "busy", "content"]), "", round, told),
            Trained(claim(*stamp)), Broke(stamp, "no"),
        ]  # fmt: skip
        event = rng.choice(answers)
        if state.phase is Phase.PENDING and rng.random() < 0.3:
            counted.add(stamp)
        before = state
        state, effects = after(event, state=state)
        for effect in effects:
            if isinstance(effect, Record):
                entries.append(effect.entry)
                if isinstance(effect.entry, Kept):
                    assert stamp not in kept, "one report for a task"
                    kept.add(stamp)
                elif effect.entry.counted:
                    assert effect.entry.stamp in counted
            if isinstance(effect, Send) and isinstance(effect.message, Deliver):
                assert (effect.message.round, effect.message.attempt) in kept
        assert state.memory is None or state.memory in counted
        assert state.settled is None or before.settled is None or state.settled >= before.settled
        again = party.replay("a", "r", entries)
        assert again.memory == state.memory and again.claim == state.claim


def test_a_server_that_lost_what_it_acknowledged_is_sent_it_again() -> None:
    """As one restored from a backup: it offers the very task again."""
    state, _ = after(work(0), state=PENDING)
    assert state.phase is Phase.SENDING
    assert after(Due(), state=state)[1][1] == Send(claim(0))
