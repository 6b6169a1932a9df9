"""The asynchronous system under random faults: every acknowledged update counts once, with the staleness that it has,
and the model has the bits that the in-process machine gives for the same order.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from buffered_tally import tallied
from torch import Tensor
from world import SERVER, Fault, World, drawn, first_wrong, shrunk

from atoll import schedule
from atoll.asynchronous import Work, stepped
from atoll.net import buffered, buffering, coordinator, frames, party
from atoll.net.buffered import BufferedService
from atoll.net.buffering import Plan
from atoll.schedule import Buffered

SITES, STEPS, SIZE = 4, 6, 2


def halved(tau: int) -> float:
    return 2.0**-tau


BUFFERED = schedule.buffered(SIZE, 3, halved)
LIMITED = schedule.buffered(SIZE, 3, halved, limit=1)
PLAIN = Plan("r", STEPS, least=SITES, attempts=5, size=SIZE, concurrency=3)
TIMED = Plan("r", STEPS, least=2, attempts=2, deadline=8.0, size=SIZE, concurrency=3, limit=1, evaluate=2)
EVALUATED = Plan("r", STEPS, least=SITES, attempts=5, size=SIZE, concurrency=3, evaluate=2)


class Watched(BufferedService):
    """Looks, whenever something has happened, at how many models lie on its disk."""

    def happen(self, event: coordinator.Event, now: float, content: Any = None) -> Any:
        told = super().happen(event, now, content)
        evaluated = self.plan.evaluate > 0
        frames_there = [n for n in self.files.names("task") if "." not in n]
        assert len(frames_there) <= self.plan.concurrency + 1 + evaluated, "frames"
        models = [n for n in self.files.names("models") if n.isdecimal()]
        assert len(models) <= self.plan.concurrency + 2 + evaluated, "models"
        assert len(self.state.at_work) <= self.plan.concurrency
        return told


def how(plan: Plan) -> Buffered:
    return LIMITED if plan.limit is not None else BUFFERED


def world(plan: Plan, seed: int, faults: Sequence[Fault], **more: Any) -> World:
    process, training, _ = tallied(plan.rounds, SITES)
    service: Callable[..., Any] = more.pop("service", None) or partial(Watched, schedule=how(plan))
    return World(process, plan, training, seed=seed, faults=faults, service=service, **more)


Step = list[tuple[str, int, int]]
"""Site, version and number of the task of every update of a step."""


def history(made: World) -> tuple[list[Step], set[tuple[str, int, int]], buffering.State]:
    """What every step has in it, by the journal; the updates that were accepted and given up; and the last state."""
    steps, dropped, state = list[Step](), set[tuple[str, int, int]](), buffering.State()
    for entry in made.entries():
        before = state
        state, _ = buffering.handle(made.plan, state, entry.event, entry.now)  # type: ignore[arg-type]
        held = {(s, a.claim.round, a.claim.attempt) for s, a in before.accepted.items()}
        if state.round > before.round:
            steps.append(
                [(s, a.claim.round, a.claim.attempt) for s, a in list(before.accepted.items())[: before.taken]]
            )
        else:
            dropped |= held - {(s, a.claim.round, a.claim.attempt) for s, a in state.accepted.items()}
    return steps, dropped, state


def replayed(plan: Plan, steps: list[Step]) -> Tensor:
    """The model that the in-process machine makes of the same updates."""
    process, _, data = tallied(plan.rounds, SITES)
    process.engine.prepare(process, data)
    state, tasks = process.init(plan.seed), dict[int, Any]()
    for taken in steps:
        tasks[state.round] = process.open(state, (), SITES)
        work = [Work(0.0, int(site[1:]), site, version) for site, version, _ in taken]
        state, _ = stepped(process, data, how(plan), state, tasks, work)
    return process.vector(state)


def remembered(made: World, site: str) -> float:
    memory = made.agents[site].memory
    spec = frames.TensorSpec("memory", torch.float64, (1, 1))
    return float(frames.decode(memory, (spec,))["memory"]) if memory else 0.0


def fault_of(plan: Plan, seed: int, faults: Sequence[Fault], **more: Any) -> str:
    """What is wrong after a run under these faults; "" when nothing is."""
    made = world(plan, seed, faults, **more)
    try:
        made.run()
    except AssertionError as error:
        return f"assertion: {error}"
    if not made.done:
        return f"not done by {made.now:.0f}: {made.server and made.server.state}"
    assert made.server is not None
    steps, dropped, state = history(made)
    if state != made.server.state:
        return "the journal does not make the state"
    vector, visits, seen = made.server.process.vector(made.server.model), dict[str, int](), set[tuple[str, int, int]]()
    if len(steps) != plan.rounds:
        return f"{len(steps)} steps"
    for number, taken in enumerate(steps):
        if len(taken) != plan.size or seen & set(taken) or len({s for s, _, _ in taken}) != len(taken):
            return f"step {number} is of {taken}"
        seen |= set(taken)
        stale = {site: number - version for site, version, _ in taken}
        if plan.limit is not None and max(stale.values()) > plan.limit:
            return f"step {number} has updates {stale} steps old"
        expected = sum(halved(tau) * 4096.0 ** int(s[1:]) for s, tau in stale.items()) / plan.size
        if vector[number] != expected:
            return f"step {number} added {float(vector[number])}, not {expected}"
        recalled = sum(halved(tau) * visits.get(s, 0) * 4096.0 ** int(s[1:]) for s, tau in stale.items()) / plan.size
        if vector[plan.rounds + number] != recalled:
            return f"step {number} remembered {float(vector[plan.rounds + number])}, not {recalled}"
        visits |= {s: visits.get(s, 0) + 1 for s in stale}
    if lost := {a for a in made.acknowledged if a[2]} - seen - dropped:
        return f"acknowledged and lost: {lost}"
    for site in made.training:
        if remembered(made, site) != visits.get(site, 0):
            return f"{site} remembers {remembered(made, site)} of {visits.get(site, 0)} updates"
    if not torch.equal(vector, replayed(plan, steps)):
        return "other bits than the in-process machine's"
    if plan.evaluate and plan.rounds not in made.said and plan.deadline is None:
        return f"the last model was not evaluated, but those of {sorted(made.said)}"
    return ""


def judge(plan: Plan, seeds: range) -> None:
    """Run every seed's schedule; of the first that breaks, print the fewest faults that do."""
    for seed in seeds:
        faults = drawn(seed, [f"s{i}" for i in range(SITES)], people=plan.deadline is not None)
        if wrong := fault_of(plan, seed, faults):
            least = shrunk(faults, lambda tried, seed=seed: fault_of(plan, seed, tried) != "")
            lines: list[str] = []
            fault_of(plan, seed, least, chatter=lines.append)
            pytest.fail(f"seed {seed}: {wrong}\nfaults = {least}\n" + "\n".join(lines[-80:]))


PLANS = {"plain": PLAIN, "timed": TIMED, "evaluated": EVALUATED}


@pytest.mark.parametrize("name", PLANS)
def test_every_acknowledged_update_counts_once(name: str) -> None:
    judge(PLANS[name], range(2))


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("start", range(1000, 1300, 50))
def test_every_acknowledged_update_counts_once_at_length(name: str, start: int) -> None:
    judge(PLANS[name], range(start, start + 50))


@pytest.mark.slow
@pytest.mark.parametrize("who", [SERVER, "s1"])
def test_every_operation_of_a_disk_may_be_the_last_of_an_asynchronous_run(who: str) -> None:
    total = world(EVALUATED, 0, ()).run().machines[who].disk.operations
    for n in range(1, total + 1):
        assert not fault_of(EVALUATED, 0, [("crash", who, n, "after")]), n


def test_where_everybody_is_waited_for_the_numbers_are_those_of_synchronous_rounds() -> None:
    process, training, data = tallied(STEPS, SITES)
    everybody = schedule.buffered(SITES, SITES, halved)
    plan = Plan("r", STEPS, least=SITES, evaluate=2, size=SITES, concurrency=SITES)
    made = World(process, plan, training, service=partial(Watched, schedule=everybody)).run()
    rounds = World(process, coordinator.Plan("r", STEPS, least=SITES, evaluate=2), training).run()
    assert made.done and rounds.done and made.server is not None and rounds.server is not None
    assert torch.equal(process.vector(made.server.model), process.vector(rounds.server.model))
    assert sorted(made.said) == sorted(rounds.said) == [2, 4, 6]
    for round, said in rounds.said.items():
        assert made.said[round].splits["test"].clients == said.splits["test"].clients
        assert torch.equal(torch.as_tensor(made.said[round].splits["test"].values),
                           torch.as_tensor(said.splits["test"].values))  # fmt: skip
    state = process.init()
    for _ in range(STEPS):
        state, _ = process.next(state, data)
    assert torch.equal(process.vector(made.server.model), process.vector(state))


@pytest.mark.slow
def test_a_straggler_never_holds_a_step_up() -> None:
    process, training, _ = tallied(STEPS, SITES)
    made = World(process, PLAIN, training, service=partial(Watched, schedule=BUFFERED))
    made.machines["s0"].up = True  # as if it were on: so it is never switched on, and nothing is heard of it
    made.run(200.0)
    assert made.server is not None and made.server.state.phase is coordinator.Phase.FINISHED
    steps, _, _ = history(made)
    assert len(steps) == STEPS and {s for step in steps for s, _, _ in step} == {"s1", "s2", "s3"}


# --- the oracle sees what it is there for -----------------------------------------------------------------------------


def caught(plan: Plan, seeds: int = 6) -> str:
    return first_wrong(fault_of, plan, SITES, range(seeds))


@pytest.mark.slow
def test_forgetting_that_updates_are_stale_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh(*given: Any, scales: Any, **more: Any) -> Any:
        return reduce(*given, **more)

    reduce = buffered.reduce
    monkeypatch.setattr(buffered, "reduce", fresh)
    assert "added" in caught(PLAIN)


@pytest.mark.slow
def test_dropping_what_came_in_while_a_step_was_made_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = buffering._reduced

    def forgetful(plan: Plan, state: buffering.State, event: Any, now: float) -> Any:
        kept = dict(list(state.accepted.items())[: state.taken])
        return made(plan, buffering.replace(state, accepted=kept), event, now)

    monkeypatch.setitem(buffering.TABLE, coordinator.Reduced, forgetful)
    assert caught(PLAIN)


@pytest.mark.slow
def test_remembering_before_a_step_counts_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = party._with

    def eager(state: party.State, entry: party.Entry) -> party.State:
        after = fold(state, entry)
        return party.replace(after, memory=after.stamp) if isinstance(entry, party.Kept) else after

    monkeypatch.setattr(party, "_with", eager)
    assert "remember" in caught(TIMED, 20)


def test_a_model_that_is_deleted_while_a_site_works_on_it_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = buffering._looked
    monkeypatch.setattr(
        buffering, "_looked",
        lambda state: buffering.replace(
            made := looked(state), models={v: m for v, m in made.models.items() if v == made.round}
        ),
    )  # fmt: skip
    assert caught(PLAIN)
