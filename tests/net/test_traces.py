"""Traces of rounds: all of a round's time, told by its journal, the same whoever makes them."""

import random
from collections import Counter
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from test_coordinator import FOUR, MODEL, NAMES, SUMS, Run, advanced, said, update
from test_telling import PLAIN

from atoll.cli.tracing import trace
from atoll.errors import RunError
from atoll.net import coordinator as core
from atoll.net import traces
from atoll.net.admission import Finding
from atoll.net.coordinator import Entry, Phase, Plan, State
from atoll.net.server import establish
from atoll.net.storage import state_of
from atoll.net.traces import Span, Tracing, chrome, traced


def records(run: Run) -> list[bytes]:
    return [msgspec.json.encode(entry) for entry in run.entries]


def at(run: Run, now: float, event: core.Event) -> None:
    run.now = now
    run(event)


def one_round() -> Run:
    """Site c declines, site b is refused; the next attempt counts a and b."""
    run = Run(Plan("r", 1, least=3, quorum=3, deadline=10.0, attempts=2))
    at(run, 100.0, core.Started(MODEL))
    for name in NAMES:
        at(run, 101.0, core.Joined(name))
    at(run, 102.0, core.Opened(0, 1, "b" * 64))
    at(run, 103.0, update("a", run.state, size=70))
    bad = msgspec.structs.replace(update("b", run.state), finding=Finding("content", "secret words of a party"))
    at(run, 104.0, bad)
    at(run, 112.5, core.Ticked())
    at(run, 113.0, core.Opened(0, 2, "b" * 64))
    at(run, 114.0, update("b", run.state, "2"))
    at(run, 116.0, update("c", run.state, "3"))
    at(run, 118.0, core.Reduced(0, 2, MODEL))
    assert run.state.phase is Phase.FINISHED
    return run


def test_a_round_is_told_with_its_attempts_its_phases_and_every_sites_part() -> None:
    spans = list(traced("r", one_round().plan, records(one_round())))
    by_id = {s.id: s for s in spans}
    assert len(by_id) == len(spans) and len({s.trace for s in spans}) == 1

    def path(span: Span) -> str:
        above = "" if span.parent is None else f"{path(by_id[span.parent])} / "
        return above + span.name

    found = {path(s): (s.begin, s.end, s.attributes.get("atoll.outcome"), s.failed) for s in spans}
    first, second = "round 1 / attempt 1", "round 1 / attempt 2"
    assert found == {
        "round 1": (100.0, 118.0, "done", False),
        "round 1 / gathering": (100.0, 101.0, None, False),
        first: (101.0, 112.5, "too few in time", True),
        f"{first} / opening": (101.0, 102.0, None, False),
        f"{first} / collecting": (102.0, 112.5, None, False),
        f"{first} / collecting / a": (102.0, 103.0, "accepted", False),
        f"{first} / collecting / b": (102.0, 104.0, "refused: content", True),
        f"{first} / collecting / c": (102.0, 112.5, "no answer in time", True),
        second: (112.5, 118.0, "combined", False),
        f"{second} / opening": (112.5, 113.0, None, False),
        f"{second} / collecting": (113.0, 116.0, None, False),
        f"{second} / collecting / b": (113.0, 114.0, "accepted", False),
        f"{second} / collecting / c": (113.0, 116.0, "accepted", False),
        f"{second} / reducing": (116.0, 118.0, None, False),
    }
    assert next(s for s in spans if s.name == "a").attributes["atoll.bytes"] == 70
    assert next(s for s in spans if s.parent is None).attributes["atoll.updates"] == 3
    assert b"secret" not in chrome(spans)


@pytest.mark.parametrize("plan", [PLAIN, SUMS, msgspec.structs.replace(PLAIN, evaluate=1, rounds=4)])
@pytest.mark.parametrize("seed", range(15))
def test_whatever_happens_every_round_has_one_trace_and_every_span_its_place(plan: Plan, seed: int) -> None:
    run = Run(plan)
    run(core.Started(MODEL))
    for name in FOUR:
        run(core.Joined(name))
    journal = _by_chance(run, seed)
    tracing, spans = Tracing("r", plan), list[Span]()
    for entry in journal:
        spans += tracing.take(entry)
    ids = {(s.trace, s.id) for s in spans}
    assert len(ids) == len(spans), "no span is there twice"
    roots = [s for s in spans if s.parent is None]
    assert [s.attributes["atoll.round"] for s in roots] == sorted({s.attributes["atoll.round"] for s in roots})
    ended = sum(isinstance(e.event, core.Reduced) for e in journal)
    assert ended - 1 <= len(roots) <= ended + 1
    by_id = {s.id: s for s in spans}
    for span in spans:
        assert span.begin <= span.end and len(span.id) == 8 and len(span.trace) == 16
        above = by_id.get(span.parent or b"")
        assert span.parent is None or above is not None
        if above is not None and above.parent is not None:
            assert above.begin <= span.begin and span.end <= above.end
    again = Tracing("r", plan)
    assert [s for e in journal for s in again.take(e)] == spans, "and whoever makes them again makes the same"


def _by_chance(run: Run, seed: int) -> list[Entry]:
    entries, state = list(run.entries), run.state
    rng, now = random.Random(seed), 0.0
    while len(entries) < 120 and state.phase not in (Phase.FINISHED, Phase.STOPPED):
        event = _next(rng, state)
        now += rng.choice([0.0, 1.0, 3.0])
        state, effects = core.handle(run.plan, state, event, now)
        entries += [e.entry for e in effects if isinstance(e, core.Record)]
    return entries


def _next(rng: random.Random, state: State) -> core.Event:
    """Mostly what comes next; now and then what does not."""
    name, at = rng.choice(FOUR), (state.round, state.attempt)
    odd: list[core.Event] = [
        core.Left(name), core.Joined(name), core.Pause("why"), core.Restarted(), core.Discard("why"),
        core.Failed(*at, "why"), core.Ticked(),
    ]  # fmt: skip
    if rng.random() < 0.15:
        return rng.choice(odd)
    turn = state.sum
    match state.phase:
        case Phase.GATHERING:
            return core.Joined(name)
        case Phase.OPENING:
            return core.Opened(*at, "b" * 64)
        case Phase.COLLECTING:
            return update(name, state, rng.choice("123"))
        case Phase.REDUCING:
            return core.Evaluated(state.round) if state.kind == "evaluate" else core.Reduced(*at, MODEL)
        case Phase.SUMMING if turn is not None and turn.closing:
            if turn.step == "unmask":
                return core.Summed(state.round, state.turn, FOUR, "d" * 64)
            return rng.choice([advanced(state), advanced(state), core.Voided(state.round, state.turn, "why", {})])
        case Phase.SUMMING:
            return said(name, state)
        case _:
            return core.Resume()


def test_a_round_of_many_sites_has_no_more_spans_than_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MOST", 2)
    run = one_round()
    spans = list(traced("r", run.plan, records(run)))
    assert Counter("atoll.site" in s.attributes for s in spans) == {True: 2, False: 9}
    assert spans[-1].parent is None and spans[-1].attributes["atoll.spans.left_out"] == 3
    assert {s.parent for s in spans} <= {s.id for s in spans} | {None}, "what a span is a part of is never left out"


def test_a_round_that_the_budget_ended_without_a_model_is_not_done() -> None:
    run = Run(Plan("r", 2))
    run(core.Started(MODEL, "", core.Guarantee(1.0, 1, 3, 1e-5, "pld", 1.0, 1, True)))
    run(core.Joined("a"))
    run(core.Opened(0, 1, "b" * 64))
    run(update("a", run.state))
    run(core.Failed(0, 1, "why", 1.0))
    run(core.Resume())
    assert run.state.phase is Phase.FINISHED and run.state.round == 0
    root = list(traced("r", run.plan, records(run)))[-1]
    assert (root.name, root.attributes["atoll.outcome"], root.failed) == ("round 1", "budget spent", True)


def test_a_trace_is_a_file_that_tracing_pages_show() -> None:
    run = one_round()
    told = msgspec.json.decode(chrome(list(traced("r", run.plan, records(run)))))
    events = [e for e in told["traceEvents"] if e["ph"] == "X"]
    names = {e["tid"]: e["args"]["name"] for e in told["traceEvents"] if e["ph"] == "M"}
    assert Counter(names[e["tid"]] for e in events) == {"rounds": 9, "a": 1, "b": 2, "c": 2}
    assert {(e["ts"], e["dur"]) for e in events if e["name"] == "round 1"} == {(100e6, 18e6)}


def test_sites_answers_in_the_steps_of_a_secure_sum_are_told() -> None:
    run = Run(SUMS).opened(*FOUR)
    for name in FOUR:
        run(update(name, run.state))
    while run.state.sum is not None and run.state.phase is Phase.SUMMING:
        for name in FOUR:
            run(said(name, run.state))
        last = run.state.sum.step == "unmask"
        run(core.Summed(0, 1, FOUR, "d" * 64) if last else advanced(run.state))
    run(core.Reduced(0, 1, MODEL))
    spans = list(traced("r", SUMS, records(run)))
    names = {s.id: s.name for s in spans}
    answers = Counter(names[s.parent] for s in spans if s.parent and s.attributes.get("atoll.outcome") == "answered")
    assert answers == {f"summing 1 {step}": 4 for step in ("join", "reveal", "share", "mask", "confirm", "unmask")}


def test_a_run_is_traced_from_the_servers_state_while_it_is_served(tmp_path: Path) -> None:
    run = one_round()
    establish(tmp_path / "server", "localhost:1")
    with closing(state_of(tmp_path / "server")) as state:
        state.put("plan", "r", msgspec.json.encode(run.plan))
        with closing(state.journal("runs/r/journal")) as journal:
            for record in records(run):
                journal.append(record)
            trace("r", tmp_path / "t.json", state=tmp_path / "server", database=None)
    assert (tmp_path / "t.json").read_bytes() == chrome(list(traced("r", run.plan, records(run))))
    with pytest.raises(RunError, match="no plan of a run 'q' here"):
        trace("q", tmp_path / "t.json", state=tmp_path / "server", database=None)
    with pytest.raises(RunError, match="is no folder of a server"):
        trace("r", tmp_path / "t.json", state=tmp_path, database=None)
