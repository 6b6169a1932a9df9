"""The whole system under random faults: nothing is lost, nothing counts twice, the bits are those of a quiet run."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from tally import tallied
from torch import Tensor
from world import SERVER, Disk, Fault, Journal, World, drawn, first_wrong, shrunk

from atoll.net import coordinator, frames, party, service
from atoll.net.coordinator import Plan
from atoll.net.service import Service

SITES, ROUNDS = 4, 3
STRICT = Plan("r", ROUNDS, least=SITES)
EVALUATED = Plan("r", ROUNDS, least=SITES, evaluate=1)
COMING = Plan("r", ROUNDS, least=2, cohort=3, over=1.3, quorum=2, deadline=8.0, attempts=2, evaluate=2)
LOOSE = Plan("r", ROUNDS, least=2, cohort=3, over=1.3, quorum=2, deadline=8.0, attempts=2)


def world(plan: Plan, seed: int, faults: Sequence[Fault], **more: Any) -> World:
    process, training, _ = tallied(plan.rounds, SITES)
    return World(process, plan, training, seed=seed, faults=faults, **more)


def remembered(world: World, site: str) -> float:
    """How many of its updates a site believes were counted."""
    memory = world.agents[site].memory
    if not memory:
        return 0.0
    return float(frames.decode(memory, (frames.TensorSpec("memory", torch.float64, (1, 1)),))["memory"])


def expected(counted: list[dict[str, int]]) -> tuple[list[float], list[float]]:
    """The sums that a model must hold when these sites were counted in these rounds."""
    tallies, visits, seen = list[float](), list[float](), dict[str, int]()
    for who in counted:
        tallies.append(sum(2.0 ** int(s[1:]) for s in who))
        visits.append(sum(seen.get(s, 0) * 16.0 ** int(s[1:]) for s in who))
        seen |= {s: seen.get(s, 0) + 1 for s in who}
    return tallies, visits


def fault_of(plan: Plan, seed: int, faults: Sequence[Fault], **more: Any) -> str:
    """What is wrong after a run under these faults; "" when nothing is."""
    made = world(plan, seed, faults, **more)
    try:
        made.run()
    except AssertionError as error:
        return f"assertion: {error}"
    if not made.done:
        return f"not done by {made.now:.0f}: {made.server and made.server.state.phase}"
    assert made.server is not None
    if coordinator.replay(plan, made.entries()) != made.server.state:
        return "the journal does not make the state"
    counted = made.counted()
    vector = made.server.process.vector(made.server.model)
    tallies, visits = expected(counted)
    if vector[: plan.rounds].tolist() != tallies:
        return f"sums {vector[: plan.rounds].tolist()}, but {tallies} were accepted"
    if vector[plan.rounds : 2 * plan.rounds].tolist() != visits:
        return f"remembered {vector[plan.rounds : 2 * plan.rounds].tolist()}, not {visits}"
    if wrong := evaluated_wrong(made):
        return wrong
    for site, round, attempt in made.acknowledged - made.given_up():
        if attempt and counted[round].get(site) != attempt:
            return f"{site} was told that attempt {attempt} of round {round} is safe, but {counted[round]} counted"
    for site in made.training:
        if remembered(made, site) != sum(site in c for c in counted):
            return f"{site} remembers {remembered(made, site)} rounds"
    if plan.deadline is None and not torch.equal(vector, quiet(plan)):
        return "other bits than without faults"
    return ""


def evaluated_wrong(made: World) -> str:
    """What is wrong with a run's evaluations; "" when nothing is."""
    plan, heard = made.plan, made.evaluated()
    due = [r for r in range(1, plan.rounds + 1) if plan.evaluate and (r % plan.evaluate == 0 or r == plan.rounds)]
    if sorted(heard) != due:
        return f"evaluated before rounds {sorted(heard)}, not {due}"
    assert made.server is not None
    for round, who in heard.items():
        found = made.said[round].splits["test"] if who else None
        if found is not None and (list(found.clients), found.examples.tolist()) != (who, [int(s[1:]) + 1 for s in who]):
            return f"after round {round} {who} were heard, but {found.clients} counted"
        if plan.deadline is None and who != sorted(made.training):
            return f"after round {round} only {who} were heard"
    last = heard.get(plan.rounds)
    if last:
        value = float(made.server.process.vector(made.server.model).sum())
        losses = made.said[plan.rounds].splits["test"].values[:, 0].tolist()
        if any(abs(loss - value * value) > 1e-12 * value * value for loss in losses):
            return f"the last model's losses are {losses}, not {value * value}"
    return ""


@lru_cache
def quiet(plan: Plan) -> Tensor:
    made = world(plan, 0, ()).run()
    assert made.done and made.server is not None
    return made.server.process.vector(made.server.model)


def judge(plan: Plan, seeds: range, **more: Any) -> None:
    """Run every seed's schedule; of the first that breaks, print the fewest faults that do."""
    for seed in seeds:
        faults = drawn(seed, [f"s{i}" for i in range(SITES)], people=plan.deadline is not None)
        if wrong := fault_of(plan, seed, faults, **more):
            least = shrunk(faults, lambda tried, seed=seed: fault_of(plan, seed, tried, **more) != "")
            lines: list[str] = []
            fault_of(plan, seed, least, chatter=lines.append, **more)
            pytest.fail(f"seed {seed}: {wrong}\nfaults = {least}\n" + "\n".join(lines[-60:]))


def test_a_quiet_run_has_the_bits_of_a_simulation() -> None:
    process, _, data = tallied(ROUNDS, SITES)
    state = process.init()
    for _ in range(ROUNDS):
        state, _ = process.next(state, data)
    assert torch.equal(quiet(STRICT), process.vector(state))


@pytest.mark.parametrize("start", range(0, 250, 50))
def test_every_update_counts_once(start: int) -> None:
    judge(STRICT, range(start, start + 50))


@pytest.mark.parametrize("start", range(0, 150, 50))
def test_deadlines_quorums_and_sites_that_come_and_go(start: int) -> None:
    judge(LOOSE, range(start, start + 50))


@pytest.mark.parametrize("plan", [EVALUATED, COMING], ids=["everybody", "whoever is there"])
def test_evaluations_hear_everybody_once_and_change_nothing(plan: Plan) -> None:
    judge(plan, range(40))
    assert torch.equal(quiet(EVALUATED), quiet(STRICT)), "the bits of a run that is never evaluated"


@pytest.mark.slow
@pytest.mark.parametrize("plan", [EVALUATED, COMING], ids=["everybody", "whoever is there"])
@pytest.mark.parametrize("start", range(1000, 2000, 100))
def test_evaluations_at_length(plan: Plan, start: int) -> None:
    judge(plan, range(start, start + 100))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 4000, 100))
def test_every_update_counts_once_at_length(start: int) -> None:
    judge(STRICT, range(start, start + 100))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 3000, 100))
def test_deadlines_at_length(start: int) -> None:
    judge(LOOSE, range(start, start + 100))


@pytest.mark.parametrize("who", [SERVER, "s1"])
def test_every_operation_of_a_disk_may_be_the_last(who: str) -> None:
    short = Plan("r", 2, least=SITES)
    total = world(short, 0, ()).run().machines[who].disk.operations
    assert not fault_of(short, 0, [("crash", who, 1, "before")])
    for n in range(1, total + 1):  # power that fails after an operation fails before the next
        assert not fault_of(short, 0, [("crash", who, n, "after")]), n


# --- the oracle sees what it is there for -----------------------------------------------------------------------------


class Forgetful:
    """A disk whose `sync` does nothing."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        if name in ("sync", "sync_folder"):
            return lambda path: None
        if name == "journal":
            return lambda path: Journal(self._disk, path, synced=False)
        return getattr(self._disk, name)


def caught(plan: Plan, seeds: range, **more: Any) -> str:
    return first_wrong(fault_of, plan, SITES, seeds, **more)


def test_acknowledging_before_it_is_durable_is_seen() -> None:
    def build(process: Any, plan: Plan, disk: Disk, **more: Any) -> Service:
        return Service(process, plan, Forgetful(disk), **more)

    assert caught(STRICT, range(60), service=build)


def test_answering_before_the_record_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hasty(Service):
        """Takes the new state and answers; the record follows at the next tick, if there is one."""

        def happen(self, event: coordinator.Event, now: float, content: bytes = b"") -> Any:
            after, effects = coordinator.handle(self.plan, self.state, event, now)
            if not isinstance(event, coordinator.Submitted) or len(effects) != 3:
                for entry in self.__dict__.pop("owed", []):
                    self._log.append(service.msgspec.json.encode(entry))
                return super().happen(event, now, content)
            store, record, reply = effects
            assert isinstance(store, coordinator.Store) and isinstance(record, coordinator.Record)
            assert isinstance(reply, coordinator.Reply)
            self._spool.put(store.claim, content)
            self.__dict__.setdefault("owed", []).append(record.entry)
            self._taken(after, event)
            return reply.answer, b""

    assert caught(LOOSE, range(60), service=Hasty)


def test_counting_a_repeated_update_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    known, reduction = coordinator._known, coordinator._reduction
    repeated: set[tuple[int, str]] = set()

    def noting(plan: Plan, state: coordinator.State, site: str, claim: Any) -> Any:
        found = known(plan, state, site, claim)
        if found:
            repeated.add((state.round, site))
        return found

    def doubled(state: coordinator.State) -> coordinator.Reduce:
        made = reduction(state)
        more = tuple(a for s, a in state.accepted.items() if (state.round, s) in repeated)
        return coordinator.Reduce(made.round, made.attempt, made.updates + more)

    monkeypatch.setattr(coordinator, "_known", noting)
    monkeypatch.setattr(coordinator, "_reduction", doubled)
    assert "sums" in caught(STRICT, range(60))


def test_adding_up_in_the_order_of_arrival_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_they_came(state: coordinator.State) -> coordinator.Reduce:
        return coordinator.Reduce(state.round, state.attempt, tuple(state.accepted.values()))

    quiet(STRICT)
    monkeypatch.setattr(coordinator, "_reduction", as_they_came)
    assert caught(STRICT, range(60)) == "other bits than without faults"


def test_remembering_before_it_counts_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = party._with

    def eager(state: party.State, entry: party.Entry) -> party.State:
        after = fold(state, entry)
        return party.replace(after, memory=after.stamp) if isinstance(entry, party.Kept) else after

    monkeypatch.setattr(party, "_with", eager)
    assert "remember" in caught(LOOSE, range(60))


def test_training_again_after_a_crash_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = party.replay
    unkept = lambda entries: [e for e in entries if not isinstance(e, party.Kept)]  # noqa: E731
    monkeypatch.setattr(party, "replay", lambda site, run, entries: fold(site, run, unkept(entries)))
    assert caught(STRICT, range(60))


def test_a_schedule_is_shrunk_to_what_breaks_it() -> None:
    faults = drawn(7, ["s0", "s1"])
    guilty = [faults[3], faults[-1]]
    assert shrunk(faults, lambda tried: all(g in tried for g in guilty)) == guilty


def test_the_same_seed_is_the_same_run() -> None:
    def lines(seed: int) -> list[str]:
        said: list[str] = []
        world(LOOSE, seed, drawn(seed, ["s0", "s1", "s2", "s3"]), chatter=said.append).run()
        return said

    assert lines(3) == lines(3) != lines(4)
