"""What a run's process tells the server, and whom that wakes: nobody too few, and nobody for nothing."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coordinator import EVENTS, FOUR, SUMS, advanced, said, summing, update

from atoll.deployment import telling
from atoll.deployment.telling import Teller
from atoll.errors import RunError
from atoll.net import children, control, hub
from atoll.net import coordinator as core
from atoll.net.calls import Charter
from atoll.net.children import Place, Summary, Told, merged
from atoll.net.control import Ask, Ended, Wait
from atoll.net.coordinator import Phase, Plan, State
from atoll.net.hub import Run
from atoll.net.news import Bells, News

PLAIN = Plan("r", 3, least=2, cohort=2, over=1.5, quorum=2, deadline=5.0, attempts=2)


def states(plan: Plan, seed: int, start: State, steps: int = 80) -> Iterator[State]:
    """A run's states under events by chance, most of which have a place."""
    rng, state, now = random.Random(seed), start, start.now
    yield state
    for _ in range(steps):
        event = EVENTS[rng.choice(list(EVENTS))](state)
        turn = state.sum
        if state.phase is Phase.SUMMING and turn is not None and rng.random() < 0.7:
            event = said(rng.choice(turn.awaited), state) if turn.awaited else advanced(state)
            if turn.closing and turn.step == "unmask":
                event = EVENTS[core.Summed](state)
        elif state.phase is Phase.COLLECTING and rng.random() < 0.5:
            event = update("a", state)
        if isinstance(event, core.Stop | core.Revoked | core.Pause) and rng.random() < 0.8:
            continue
        if hasattr(event, "site") and not isinstance(event, core.Spoke):
            event = msgspec.structs.replace(event, site=rng.choice(FOUR))
            if hasattr(event, "claim"):
                event = msgspec.structs.replace(event, claim=msgspec.structs.replace(event.claim, site=event.site))
        now += rng.choice([0, 0, 0, 1, 3])
        state, _ = core.handle(plan, state, event, now)
        yield state


def seen(state: State, name: str) -> Place:
    """A site by the whole state, as the coordinator's attributes are described."""
    site, turn = state.sites[name], state.sum
    doing, why = "asked" if name in state.cohort else "", ""
    if name in state.excluded:
        doing, why = "excluded", state.excluded[name]
    if name in state.accepted:
        doing, why = "delivered", ""
    if turn is not None and name in turn.awaited:
        doing, why = "asked", ""
    if turn is not None and name in turn.out:
        doing, why = "out of the sum", turn.out[name]
    return Place(site.status, site.counted, doing, why)  # type: ignore[arg-type]


def told(state: State, teller: Teller, *, whole: bool = False) -> Told:
    step = state.sum.step if state.sum is not None else ""
    summary = Summary(
        phase=state.phase.value, round=state.round, attempt=state.attempt, number=state.number, turn=state.turn,
        step=step, sites=teller.tell(state), largest=1,
    )  # fmt: skip
    sent = msgspec.json.encode(Told(summary, whole))
    return msgspec.json.decode(sent, type=Told)


PLANS = st.sampled_from([(PLAIN, State()), (SUMS, summing().state)])


@settings(max_examples=40, deadline=None)
@given(PLANS, st.integers(0, 2**32))
def test_what_is_told_in_parts_is_the_whole(given: tuple[Plan, State], seed: int) -> None:
    """Also after the process was started again in between, which begins with all of it."""
    plan, start = given
    teller, known, again = Teller(), None, random.Random(seed)
    for state in states(plan, seed, start):
        whole = known is None or again.random() < 0.1
        teller = Teller() if whole else teller
        before = {} if known is None else dict(known.sites)
        known, others = merged(known, told(state, teller, whole=whole))
        assert known.sites == {name: seen(state, name) for name in state.sites}
        assert others == {name for name, place in known.sites.items() if before.get(name) != place}


def test_a_round_of_n_sites_tells_of_each_of_them_a_few_times() -> None:
    names = [f"s{i}" for i in range(50)]
    plan, state, teller, count = Plan("r", 2, least=50), State(), Teller(), 0

    def happen(event: core.Event) -> None:
        nonlocal state, count
        state, _ = core.handle(plan, state, event, 0.0)
        count += len(teller.tell(state))

    happen(core.Started("c" * 64))
    for name in names:
        happen(core.Joined(name))
    assert count == 50 + 49, "each as it came, and again, but for the last, as one who is asked"
    happen(core.Opened(0, 1, "b" * 64))
    for name in names:
        happen(update(name, state, f"{names.index(name):064d}"[-1]))
    assert count == 99 + 50 and state.phase is Phase.REDUCING
    happen(core.Reduced(0, 1, "c" * 64))
    assert count == 149 + 50, "counted, and asked again"


def test_what_is_told_at_a_time_has_room_in_a_message_and_all_of_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose message is too long is ended, and its successor would be too."""
    names, known = [f"s{i}" for i in range(3000)], None
    why = dict.fromkeys(names, "\x7f\u2028 why" * 100)
    state = State(number=9, cohort=tuple(names), sites={n: core.Site() for n in names}, excluded=why)
    monkeypatch.setattr(telling, "ROOM", 2**20)
    teller, parts = Teller(), 0
    while not parts or teller.more:
        given = told(state, teller, whole=not parts)
        known, _ = merged(known, given)
        parts += 1
        assert len(msgspec.json.encode(given)) < 2**20 + 8000
    assert known is not None and known.sites == {name: seen(state, name) for name in names}
    assert parts > 2 and not teller.tell(state)


def test_who_is_gone_from_a_whole_is_gone() -> None:
    first = Told(Summary(sites={"a": Place("active"), "b": Place("active")}))
    known, _ = merged(None, first)
    known, others = merged(known, Told(Summary(sites={"a": Place("active")})))
    assert known.sites == {"a": Place("active")} and others == {"b"}


def test_a_question_is_told_when_its_stage_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    known, _ = merged(None, Told(Summary(stage="survey", question="")))
    known, _ = merged(known, Told(Summary(stage="spread", question="means"), False))
    known, _ = merged(known, Told(Summary(stage="spread"), False))
    assert (known.stage, known.question) == ("spread", "means")
    monkeypatch.setattr(children, "SITES", 2)
    known, _ = merged(known, Told(Summary(sites={"a": Place("active"), "b": Place("active")}), False))
    merged(known, Told(Summary(sites={"b": Place("left")}), False))
    with pytest.raises(RunError, match="more than 2 sites"):
        merged(known, Told(Summary(sites={"c": Place("active")}), False))
    assert "c" not in known.sites


# --- who is woken -----------------------------------------------------------------------------------------------------


class Rung(Bells):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] | None = set()

    def ring(self, names: Any = None) -> None:
        self.names = None if names is None or self.names is None else self.names | set(names)
        super().ring(names)


def hosted(folder: Path = Path("r")) -> Run:
    return Run(folder, Charter("r", "0" * 64, {}), News(), lambda name: None, None)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(PLANS, st.integers(0, 2**32))
def test_a_question_that_is_held_back_is_woken_when_its_answer_is_another(given: tuple[Plan, State], seed: int) -> None:
    """For all that can happen: while nobody wakes a site, the coordinator would answer as it did."""
    plan, start = given
    run, teller = hosted(), Teller()
    run._bells = bells = Rung()
    answers: dict[tuple[str, Any], Any] = {}
    keys: dict[tuple[str, Any], Any] = {}
    for state in states(plan, seed, start):
        bells.names = set()
        run._learn(told(state, teller, whole=not answers))
        for site in FOUR:
            for at in (None, (state.round, state.attempt), (0, 1), (1, 1)):
                _, effects = core.handle(plan, state, core.Asked(site, at), state.now)
                told_, key, case = effects[0], run._at(site, Ask("r", site, at)), (site, at)
                held = isinstance(before := answers.get(case), core.Reply) and isinstance(before.answer, Wait)
                if held and told_ != before:
                    assert key != keys[case], (state.phase, before, told_)
                if case in keys and key != keys[case]:
                    assert bells.names is None or site in bells.names
                answers[case], keys[case] = told_, key


def test_others_updates_wake_nobody() -> None:
    run, teller = hosted(), Teller()
    plan, state = Plan("r", 2, least=4), State()
    events = [core.Started("c" * 64), *map(core.Joined, FOUR), core.Opened(0, 1, "b" * 64)]
    for event in events:
        state, _ = core.handle(plan, state, event, 0.0)
    run._learn(told(state, teller, whole=True))
    run._bells = bells = Rung()
    for name, content in zip("abc", "123", strict=True):
        bells.names = set()
        state, _ = core.handle(plan, state, update(name, state, content), 0.0)
        keys = {site: run._at(site, Ask("r", site, (0, 1))) for site in FOUR}
        run._learn(told(state, teller))
        assert bells.names == {name}
        assert {site: run._at(site, Ask("r", site, (0, 1))) for site in FOUR} == keys, "it is not asked anew either"
    state, _ = core.handle(plan, state, update("d", state, "4"), 0.0)
    assert state.phase is Phase.REDUCING
    run._learn(told(state, teller))
    assert {site: run._at(site, Ask("r", site, (0, 1))) for site in FOUR} == keys
    state, _ = core.handle(plan, state, core.Reduced(0, 1, "c" * 64), 0.0)
    run._learn(told(state, teller))
    assert bells.names is None and run._at("a", Ask("r", "a", (0, 1))) != keys["a"], "it was counted"


def test_a_question_is_woken_when_the_round_opens_the_run_rests_or_ends_or_the_site_is_shut_out() -> None:
    waits = Summary(phase="gathering", largest=1, sites={"a": Place("active"), "b": Place("active")})
    news = {
        "opens": {"phase": "collecting", "attempt": 1, "sites": {"a": Place("active", None, "asked")}},
        "next": {"round": 1, "sites": {"a": Place("active", (0, 1))}},
        "rests": {"phase": "paused", "sites": {}},
        "revoked": {"sites": {"a": Place("revoked")}},
        "out": {"phase": "summing", "turn": 1, "step": "join", "sites": {"a": Place("active", None, "asked")}},
    }

    async def one(change: dict[str, Any]) -> None:
        run, asked = hosted(), list[int]()
        answers = [Wait("r", 0, None), Wait("r", 1, None)]

        async def received(site: str, request: Any) -> control.Answer:
            asked.append(1)
            return answers[len(asked) - 1]

        run._received = received  # type: ignore[method-assign]
        run._learn(Told(waits))
        held = asyncio.ensure_future(run.receive("a", Ask("r", "a")))
        await asyncio.sleep(0)
        run._learn(Told(msgspec.structs.replace(waits, number=2, sites={"b": Place("left")}), False))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not held.done() and len(asked) == 1
        run._learn(Told(msgspec.structs.replace(waits, **change), False))
        assert await asyncio.wait_for(held, 60.0) == answers[1]

    async def over() -> None:
        run = hosted()

        async def received(site: str, request: Any) -> control.Answer:
            return Wait("r", 0, None)

        run._received = received  # type: ignore[method-assign]
        run._learn(Told(waits))
        held = asyncio.ensure_future(run.receive("a", Ask("r", "a")))
        await asyncio.sleep(0)
        run._learn(Told(msgspec.structs.replace(waits, phase="finished", reason="done", sites={}), False))
        run.over = True
        run._bells.ring()
        assert await asyncio.wait_for(held, 60.0) == Ended("r", 0, "done", None)

    for change in news.values():
        asyncio.run(one(change))
    asyncio.run(over())


def test_news_that_comes_while_a_question_is_put_is_not_lost() -> None:
    """What changed between the answer and the wait is noticed before anybody waits."""

    async def both() -> None:
        run, asked = hosted(), list[int]()
        waits = Summary(phase="gathering", largest=1, sites={"a": Place("active")})

        async def received(site: str, request: Any) -> control.Answer:
            asked.append(1)
            if len(asked) == 1:
                run._learn(Told(msgspec.structs.replace(waits, round=1, sites={}), False))
                return Wait("r", 0, None)
            return Wait("r", 1, None)

        run._received = received  # type: ignore[method-assign]
        run._learn(Told(waits))
        assert await asyncio.wait_for(run.receive("a", Ask("r", "a")), 60.0) == Wait("r", 1, None)

    asyncio.run(both())


def test_watchers_hear_of_everything_once_and_of_nothing_when_there_is_none() -> None:
    run, teller = hosted(), Teller()
    state, _ = core.handle(PLAIN, State(), core.Started("c" * 64), 0.0)
    run._learn(told(state, teller, whole=True))
    version = run.news.version
    run._learn(told(state, teller))
    assert run.news.version == version
    state, _ = core.handle(PLAIN, state, core.Joined("a"), 0.0)
    run._learn(told(state, teller))
    assert run.news.version == version + 1 and [s.name for s in run.view({}).sites] == ["a"]
    run._learn(Told(msgspec.structs.replace(run.summary or Summary(), notices=["a full disk"], sites={}), False))
    assert run.view({}).notices == ["a full disk"] and run.news.version == version + 2


def test_a_watcher_of_many_sites_is_told_at_once_what_happens_in_a_glance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = list[float]()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def watch() -> Any:
        made = hub.Hub(tmp_path, "f" * 64, "localhost:1")
        made.runs["r"] = run = hosted()
        run._learn(Told(Summary(phase="collecting", sites={f"s{i}": Place("active") for i in range(1000)})))
        held = asyncio.ensure_future(made.call(None, hub.calls.Watch("r", run.news.version)))  # type: ignore[arg-type]
        await real(0.01)
        run._learn(Told(Summary(phase="collecting", number=1, sites={}), False))
        return await held

    real = asyncio.sleep
    monkeypatch.setattr(hub.asyncio, "sleep", sleep)
    assert len(asyncio.run(watch()).sites) == 1000 and slept == [0.5]
    monkeypatch.setattr(hub, "GLANCE", 1.0)
    asyncio.run(watch())
    assert slept[1:] == [10.0], "it has not given up before"


# --- bells ------------------------------------------------------------------------------------------------------------


def test_a_bell_wakes_whoever_waits_for_it_and_nobody_else() -> None:
    async def ring() -> None:
        bells, woken = Bells(), list[str]()

        async def wait(name: str, seconds: float = 60.0) -> None:
            await bells.wait(name, seconds)
            woken.append(name)

        tasks = [asyncio.ensure_future(wait(name)) for name in ("a", "a", "b", "c")]
        await asyncio.sleep(0)
        bells.ring(["a", "nobody"])
        bells.ring(["a"])
        await asyncio.gather(*tasks[:2])
        assert woken == ["a", "a"] and set(bells._waiting) == {"b", "c"}
        tasks[3].cancel()
        await asyncio.gather(tasks[3], return_exceptions=True)
        bells.ring()
        await tasks[2]
        assert woken == ["a", "a", "b"] and not bells._waiting, "nothing is kept of who waits no more"
        await wait("d", 0.0)
        assert woken[-1] == "d" and not bells._waiting

    asyncio.run(ring())
