"""Secure sums over sites under random faults: the sum of who is counted, one story for all, nothing in the clear."""

from base64 import b64encode
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from tally import tallied
from test_world import expected, remembered
from torch import Tensor
from world import SERVER, Fault, World, drawn, shrunk

from atoll.net import control, coordinator, frames
from atoll.net.control import STEPS, Say, Turn
from atoll.net.coordinator import Plan
from atoll.net.masker import Masker
from atoll.rounds import Process, State

SITES, ROUNDS = 4, 2
NAMES = [f"s{i}" for i in range(SITES)]
STRICT = Plan("r", ROUNDS, least=SITES, keep=False, sums=3, step=20.0)
LOOSE = Plan("r", ROUNDS, least=3, quorum=3, deadline=8.0, step=6.0, attempts=2, keep=False, sums=3)


class Watched(World):
    """A world that notes every vector that is trained, and looks for it wherever it must not be."""

    def __init__(self, plan: Plan, seed: int, faults: Sequence[Fault], **more: Any) -> None:
        process, training, self.data = tallied(plan.rounds, SITES, sealed=True)
        self.vectors: set[bytes] = set()
        self.leaks: list[str] = []
        super().__init__(
            process, plan, {s: self.noting(t) for s, t in training.items()}, seed=seed, faults=faults, **more
        )
        disk = self.machines[SERVER].disk
        for name in ("write", "append"):
            setattr(disk, name, self.seen(getattr(disk, name)))

    def noting(self, training: Any) -> Any:
        def train(work: Any, content: bytes, memory: bytes) -> Any:
            done = training(work, content, memory)
            ring = frames.decode(done.frame, frames.declared(done.frame))["wire/ring"]
            self.vectors.add(ring.numpy().tobytes())
            return done

        return train

    def seen(self, write: Any) -> Any:
        def look(path: str, content: bytes) -> None:
            if any(v in content for v in self.vectors):
                self.leaks.append(path)
            write(path, content)

        return look

    def reach_server(self, site: str, message: bytes, frame: bytes) -> None:
        if any(v in message or v in frame for v in self.vectors):
            self.leaks.append(f"a message of {site}")
        super().reach_server(site, message, frame)


def contradictions(made: Watched) -> str:
    """What a machine would never say, whatever happened to it; "" when there is nothing."""
    said, told, survivors = defaultdict[Any, set[str]](set), defaultdict[Any, set[bytes]](set), {}
    masked = defaultdict[Any, set[int]](set)
    for site, message, _ in made.sent:
        if isinstance(message, Say):
            said[site, message.round, message.turn, message.step].add(message.sha256)
            if message.step == "mask":
                masked[site, message.round].add(message.turn)
    for site, answer in made.told_sites:
        if isinstance(answer, Turn):
            told[site, answer.round, answer.turn, answer.step].add(answer.content)
            if answer.step == "confirm":
                survivors.setdefault((answer.round, answer.turn), set()).add(answer.content)
    for found, what in ((said, "answers"), (told, "is told")):
        for key, contents in found.items():
            if len(contents) > 1:
                return f"{key} {what} in two ways"
    if any(len(contents) > 1 for contents in survivors.values()):
        return "sites of one turn are told of different survivors: both kinds of shares could be asked for"
    if not made.second and any(len(turns) > 1 for turns in masked.values()):
        return "a vector left twice"
    journal = made.machines[SERVER].disk.records_now["journal"]
    if any(v in record or b64encode(v).rstrip(b"=")[:-1] in record for v in made.vectors for record in journal):
        return "a vector in the clear: the journal"
    return f"a vector in the clear: {made.leaks[0]}" if made.leaks else ""


def fault_of(
    plan: Plan, seed: int, faults: Sequence[Fault], *, live: bool = True, until: float = 600.0, **more: Any
) -> str:
    """What is wrong after a run under these faults; "" when nothing is."""
    made = Watched(plan, seed, faults, **more)
    try:
        made.run(until)
    except AssertionError as error:
        return f"assertion: {error}"
    if wrong := contradictions(made):
        return wrong
    if not made.done:
        return f"not done by {made.now:.0f}: {made.server and made.server.state}" if live else ""
    assert made.server is not None
    if coordinator.replay(plan, made.entries()) != made.server.state:
        return "the journal does not make the state"
    counted = made.counted()
    if any(len(who) < plan.sums for who in counted):
        return f"a sum of fewer than {plan.sums}: {counted}"
    vector = made.server.process.vector(made.server.model)
    tallies, visits = expected(counted)
    if not torch.allclose(vector[: plan.rounds], torch.tensor(tallies).double(), atol=1e-3):
        return f"sums {vector[: plan.rounds].tolist()}, but {tallies} were accepted"
    if not torch.allclose(vector[plan.rounds : 2 * plan.rounds], torch.tensor(visits).double(), atol=1e-3):
        return f"remembered {vector[plan.rounds : 2 * plan.rounds].tolist()}, not {visits}"
    for site in made.training:
        if remembered(made, site) != sum(site in c for c in counted):
            return f"{site} remembers {remembered(made, site)} rounds, counted in {counted}"
    if all(len(who) == SITES for who in counted) and not torch.equal(vector, quiet(plan.rounds)):
        return "other bits than without faults"
    return ""


@lru_cache
def quiet(rounds: int) -> Tensor:
    """The model when all are counted in every round."""
    made = Watched(Plan("r", rounds, least=SITES, keep=False, sums=3), 0, ()).run()
    assert made.done and made.server is not None
    return made.server.process.vector(made.server.model)


def judge(plan: Plan, seeds: range, **more: Any) -> None:
    """Run every seed's schedule; of the first that breaks, print the fewest faults that do."""
    for seed in seeds:
        faults = drawn(seed, NAMES, messages=300, people=plan.deadline is not None)
        if wrong := fault_of(plan, seed, faults, **more):
            least = shrunk(faults, lambda tried, seed=seed: fault_of(plan, seed, tried, **more) != "")
            lines: list[str] = []
            fault_of(plan, seed, least, chatter=lines.append, **more)
            pytest.fail(f"seed {seed}: {wrong}\nfaults = {least}\n" + "\n".join(lines[-80:]))


@pytest.mark.parametrize("start", range(0, 10, 5))
def test_a_sum_is_that_of_whoever_is_counted(start: int) -> None:
    judge(STRICT, range(start, start + 5))


@pytest.mark.parametrize("start", range(0, 8, 4))
def test_deadlines_quorums_and_sites_that_come_and_go(start: int) -> None:
    judge(LOOSE, range(start, start + 4))


def test_sites_that_give_no_second_sum() -> None:
    """A run may come to rest for good, but no vector leaves twice."""
    judge(LOOSE, range(100, 105), second=False, live=False, until=80.0)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 1400, 50))
def test_a_sum_is_that_of_whoever_is_counted_at_length(start: int) -> None:
    judge(STRICT, range(start, start + 50))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 1400, 50))
def test_deadlines_at_length(start: int) -> None:
    judge(LOOSE, range(start, start + 50))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(2000, 2200, 50))
def test_sites_that_give_no_second_sum_at_length(start: int) -> None:
    judge(LOOSE, range(start, start + 50), second=False, live=False, until=120.0)


SHORT = Plan("r", 1, least=SITES, keep=False, sums=3, step=20.0)


def crashes(who: str, every: int) -> None:
    total = Watched(SHORT, 0, ()).run().machines[who].disk.operations
    assert total > 20
    for n in range(1 + total % every, total + 1, every):  # power that fails after an operation fails before the next
        assert not fault_of(SHORT, 0, [("crash", who, n, "after")]), n


@pytest.mark.parametrize("who", [SERVER, "s1"])
def test_some_operations_of_a_disk_may_be_the_last(who: str) -> None:
    crashes(who, 13)


@pytest.mark.slow
@pytest.mark.parametrize("who", [SERVER, "s1"])
def test_every_operation_of_a_disk_may_be_the_last(who: str) -> None:
    crashes(who, 1)


def test_a_disk_that_is_full_for_a_while_costs_no_turn() -> None:
    """Neither where an answer cannot be recorded, nor where a step cannot be closed."""
    calm = Watched(SHORT, 0, ()).run()
    said = [e.now for e in calm.entries() if isinstance(e.event, coordinator.Spoke)]
    closed = [e.now for e in calm.entries() if isinstance(e.event, coordinator.Advanced | coordinator.Summed)]
    for time in (*said[::8], *closed):
        made = Watched(SHORT, 0, [("full", SERVER, time - 0.05, 2.0)]).run()
        assert made.done and any("disk refuses" in text for text in made.notices)
        assert {m.turn for _, m, _ in made.sent if isinstance(m, Say)} == {1} and len(made.counted()[0]) == SITES


@pytest.mark.parametrize("how", ["damaged on", "gone from the"])
def test_a_sum_that_changed_on_disk_pauses_the_run(how: str) -> None:
    made = Watched(SHORT, 0, ())
    while made.server is None or made.server.state.phase is not coordinator.Phase.REDUCING:
        made.run(made.now + 0.01)
    disk = made.machines[SERVER].disk
    if how == "damaged on":
        disk.names_now["spool/00000000/sum.1"].now[0] ^= 1
    else:
        del disk.names_now["spool/00000000/sum.1"]
    made.server.work(made.now)
    assert made.server.state.phase is coordinator.Phase.PAUSED
    assert made.server.state.reason == f"the sum of round 1 is {how} disk."


# --- who drops out where ----------------------------------------------------------------------------------------------


def simulated(made: Watched) -> Tensor:
    """The model that a simulation gives in which the same clients drop out."""
    process: Process = made.process
    state: State = process.init(made.plan.seed)
    process.engine.prepare(process, made.data)
    for survivors in made.counted():
        task = process.open(state, NAMES, SITES)
        collector = process.collector(state, task)
        for cohort, kept in process.engine.tiles(process, task, made.data, state.memory):
            report = process.work(task, cohort, kept)
            if report.clients[0] in survivors:
                collector.add(process.combine(task, report))
                state.memory.stage(report.clients, report.memory)
        closed = process.close(state, task, collector.finish())
        state.memory.commit()
        state = replace(closed, memory_version=state.memory.version)
    return process.vector(state)


PATIENT = Plan("r", ROUNDS, least=SITES, quorum=3, deadline=30.0, step=5.0, keep=False, sums=3)


@pytest.mark.parametrize("step", STEPS)
def test_a_site_that_says_nothing_in_a_step(step: str) -> None:
    """Before its vector is there the sum is without it, after that with it: the very bits of that simulation."""
    made = Watched(PATIENT, 0, [("silent", "s3", step)]).run()
    assert made.done and made.server is not None and not contradictions(made)
    with_it = step in ("confirm", "unmask")
    assert [sorted(who) for who in made.counted()] == [NAMES if with_it else NAMES[:3]] * ROUNDS
    assert torch.equal(made.server.process.vector(made.server.model), simulated(made))
    assert remembered(made, "s3") == (ROUNDS if with_it else 0), "a site learns whether it was counted"


@pytest.mark.parametrize("step", ["share", "mask", "unmask"])
def test_two_of_four_are_too_many(step: str) -> None:
    made = Watched(PATIENT, 0, [("silent", "s2", step), ("silent", "s3", step)], second=False).run(100.0)
    assert made.server is not None and not contradictions(made)
    assert made.server.state.round == 0 and not made.counted()
    events = [e.event for e in made.entries()]
    assert not any(isinstance(e, coordinator.Summed) for e in events)
    reasons = [e.detail for _, e in made.told_sites if isinstance(e, control.Refused)]
    assert not any("Traceback" in r for r in reasons)


# --- the oracle sees what it is there for -----------------------------------------------------------------------------


def test_a_site_that_takes_a_turn_up_again_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [("silent", "s1", "join"), ("kill", "s1", 6.0)]
    made = Watched(SHORT, 0, faults).run(30.0)
    assert not contradictions(made)
    assert any(isinstance(m, control.Abstain) and "taken up twice" in m.reason for _, m, _ in made.sent)
    monkeypatch.setattr(Masker, "_marked", lambda self, client: None)
    assert "answers in two ways" in contradictions(Watched(SHORT, 0, faults).run(30.0))


def test_a_server_that_forgets_what_was_said_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = coordinator._turned

    def anew(plan: Plan, state: coordinator.State, now: float) -> Any:
        return turned(plan, coordinator.replace(state, turn=0), now)

    monkeypatch.setattr(coordinator, "_turned", anew)  # a void turn is taken up again under its number
    made = Watched(STRICT, 0, [("kill", "s1", 6.0), ("kill", "s2", 9.0)]).run(60.0)
    assert not made.done, "its sites do not: nothing is taken up twice"
    assert not any(isinstance(m, Say) and m.step == "mask" and m.turn > 1 for _, m, _ in made.sent)


def test_a_site_says_that_it_is_trained_and_not_a_number_more() -> None:
    made = Watched(SHORT, 0, ()).run()
    words = [m for _, m, _ in made.sent if isinstance(m, control.Deliver)]
    assert made.done and {(w.size, w.sha256, w.parts, w.bytes) for w in words} == {
        (0, control.content_hash(b""), (0, 0, 0), 0)
    }
    assert made.server is not None
    for said in ({"bytes": 1}, {"parts": (1, 0, 0)}, {"size": 1}, {"sha256": "1" * 64}):
        assert made.server._trained(coordinator.replace(words[0], **said)).fault == "content"


def test_a_report_in_the_clear_is_seen_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "masker", lambda self, site: None)
    made = Watched(SHORT, 0, ()).run(30.0)
    assert "in the clear" in contradictions(made)
    told = [a.detail for _, a in made.told_sites if isinstance(a, control.Refused)]
    assert "it is more than a site's word that it is trained." in told
    assert not any(isinstance(a, control.Received) for _, a in made.told_sites)
    assert not any(n.startswith("spool") for n in made.machines[SERVER].disk.names_now), "nothing of it is kept"
