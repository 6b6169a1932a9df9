"""Noise over sites: counted before anybody sees a model of it, drawn once, never more than the budget allows."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import msgspec
import pytest
import torch
from deployed import deploy, sites
from problems import quadratics, scalar_model
from registry import MODELS, TRANSFORMS
from tally import Numbers, tally
from torch import Tensor
from world import SERVER, Disk, Fault, Journal, World, drawn, first_wrong, shrunk

import atoll
from atoll import aggregators, transforms
from atoll.algorithms import fedavg, scaffold
from atoll.data import FederatedDataset
from atoll.errors import BudgetSpent, CompositionError, InvalidArgument, RunError
from atoll.local import local_sgd
from atoll.model import Model
from atoll.net import control, coordinator, frames, noise
from atoll.net.admission import Finding, Rules, examine
from atoll.net.agent import Done, Trainer, Training
from atoll.net.coordinator import Failed, Guarantee, Phase, Plan, Reduced
from atoll.net.packing import pack_report, report_schema
from atoll.net.service import Service
from atoll.net.storage import Content
from atoll.privacy import example_level
from atoll.privacy.noise import releasing
from atoll.privacy.terms import statement
from atoll.rounds import Process
from atoll.secret import Source

KIND = MODELS["perceptron"]
DATA = KIND.data((5, 8, 6, 3), torch.float32)
LOCAL = local_sgd(0.1, epochs=2, batch_size=3)
UNIFORM = aggregators.mean(weights="uniform", denominator="expected")


def stages(*, seed: int | None = 3, multiplier: float = 0.5, **more: Any) -> tuple[Any, ...]:
    return transforms.clip_norm(0.05), transforms.gaussian_noise(multiplier, seed=seed, **more)


# --- the same as simulated --------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "clipped": lambda: {"transforms": stages()},
    "adaptive": lambda: {"transforms": (transforms.adaptive_clip(0.05), transforms.gaussian_noise(0.5, seed=3))},
    "calibrated": lambda: {"transforms": (transforms.clip_norm(0.05), transforms.gaussian_noise(epsilon=3, seed=3))},
    "turned": lambda: {"transforms": (*stages(), transforms.rotate())},
    "thinned": lambda: {"transforms": (transforms.rand_k(0.5), *stages())},
    "thinned behind": lambda: {"transforms": (*stages(), transforms.rand_k(0.5))},
    "sums": lambda: {"algorithm": scaffold(LOCAL), "transforms": stages()},
    "capped weights": lambda: {
        "transforms": stages(), "aggregator": aggregators.mean(clip=6, denominator="expected"),
    },
}  # fmt: skip


EXACT = ("adaptive", "turned", "thinned")


def parts(name: str) -> dict[str, Any]:
    return {"algorithm": fedavg(LOCAL), "aggregator": UNIFORM} | PARTS[name]()


def process(name: str = "clipped", **more: Any) -> Process:
    return Process(KIND.model(torch.float32), **(parts(name) | {"engine": "loop"} | more))


@pytest.mark.parametrize("name", PARTS)
def test_a_deployed_run_has_the_noise_and_the_bits_of_the_simulation(name: str) -> None:
    told = atoll.simulate(
        KIND.model(torch.float32), DATA, rounds=2, engine="loop", progress=False, **parts(name)
    )  # fmt: skip
    world = deploy(lambda: process(name), DATA, 2, sites(lambda: process(name), DATA))
    assert world.server is not None
    state = world.server.state
    got = world.server.process.vector(world.server.model)
    # A row that leaves a site is rounded; one that is scaled by its factor alone is not, in a simulation.
    assert float((told.vector - got).abs().max()) <= (0.0 if name in EXACT else 2e-7)
    assert state.guarantee is not None and state.releases == 2
    said = statement(noise.terms_of(state.guarantee, 2), noise.ledger_of(state.guarantee, 2, 2))
    (simulated,) = told.privacy
    for key in ("epsilon", "delta", "neighbours", "accountant", "budget", "releases", "events", "noise_multiplier"):
        assert said[key] == simulated[key], key
    assert said["unit"] == "site" and not said["private"]
    quiet = process(name, transforms=PARTS[name]()["transforms"][:1])
    still = quiet.init()
    for _ in range(2):
        still, _ = quiet.next(still, DATA, expected=4.0)
    assert float((told.vector - quiet.vector(still)).abs().max()) > 1e-3, "there is noise"


# --- schedules --------------------------------------------------------------------------------------------------------

SITES, ROUNDS = 4, 4
STRICT = Plan("r", ROUNDS, least=SITES)
LOOSE = Plan("r", ROUNDS, least=2, cohort=3, quorum=2, deadline=8.0, attempts=2)
CLIP = 2.0**60
HUSHED = 2.0**-64
"""Noise that is drawn and counted, and so small that a sum shows who is in it."""
MOST = 2
"""Rounds that the budget allows."""


@lru_cache
def noised(budget: bool) -> tuple[Process, dict[str, Training]]:
    """The tally under noise from the secret source; with a budget for MOST of its rounds."""
    model = Model(Numbers(3 * ROUNDS), "mse")
    data = {f"s{i}": (torch.zeros(i + 1, 1), torch.zeros(i + 1, dtype=torch.float64)) for i in range(SITES)}
    allowed = atoll.privacy.epsilon(noise_multiplier=1.0, steps=MOST, delta=1e-5, sampling="none") + 0.1
    asked = transforms.gaussian_noise(1.0, budget=allowed) if budget else transforms.gaussian_noise(HUSHED)

    def made() -> Process:
        return Process(
            model, tally(ROUNDS), transforms=(transforms.clip_norm(CLIP), asked), aggregator=UNIFORM, engine="loop"
        )

    return made(), {name: Trainer(made(), FederatedDataset.from_arrays({name: pair})) for name, pair in data.items()}


class Leak(AssertionError):
    """More is known outside than was counted."""


class Watched(World):
    """A world in which every model that a site is offered must have been counted before."""

    offered: dict[int, set[str]]

    def durable(self) -> list[coordinator.Entry]:
        disk = self.machines[SERVER].disk
        decoder = msgspec.json.Decoder(coordinator.Entry)
        there = disk.records_now.get("journal", [])[: disk.records_durable.get("journal", 0)]
        return [decoder.decode(record) for record in there]

    def carry(self, deliver: Callable[[], None], what: str) -> None:
        if self.told_sites and isinstance(answer := self.told_sites[-1][1], control.Work):
            self.offered = getattr(self, "offered", {})
            self.offered.setdefault(answer.round, set()).add(answer.base)
            spent = sum(isinstance(e.event, Reduced | Failed) and e.event.multiplier > 0 for e in self.durable())
            known = {base for bases in self.offered.values() for base in bases}
            if len(known) - 1 > spent:  # the first is the model that the run began with
                raise Leak(f"{len(known) - 1} noised models are known, {spent} were counted")
            if len(self.offered[answer.round]) > 1:
                raise Leak(f"round {answer.round + 1} has two models")
            if self.server is not None and self.server.state.spent:
                raise Leak("a round was begun that the budget does not allow")
        super().carry(deliver, what)


def fault_of(plan: Plan, seed: int, faults: Sequence[Fault], *, budget: bool = False, **more: Any) -> str:
    """What is wrong after a run under these faults; "" when nothing is."""
    process, training = noised(budget)
    made = Watched(process, plan, training, seed=seed, faults=faults, **more)
    try:
        made.run()
    except AssertionError as error:
        return f"{type(error).__name__}: {error}"
    if not made.done or made.server is None:
        return f"not done by {made.now:.0f}: {made.server and made.server.state.phase}"
    state, vector = made.server.state, process.vector(made.server.model)
    if coordinator.replay(plan, made.entries()) != state:
        return "the journal does not make the state"
    if state.releases != sum(isinstance(e.event, Reduced) for e in made.entries()) != state.round:
        return f"{state.releases} releases in {state.round} rounds"
    if state.round != (MOST if budget else ROUNDS) or budget is not ("budget" in state.reason):
        return f"ended after {state.round} rounds: {state.reason}"
    tallies = [float(sum(2 ** int(s[1:]) for s in who)) for who in made.counted()]
    if not budget and vector[:ROUNDS].round().tolist() != tallies:
        return f"sums {vector[:ROUNDS].tolist()}, but {tallies} were accepted"
    return ""


def judge(plan: Plan, seeds: range, **more: Any) -> None:
    for seed in seeds:
        faults = drawn(seed, [f"s{i}" for i in range(SITES)], people=plan.deadline is not None)
        if wrong := fault_of(plan, seed, faults, **more):
            least = shrunk(faults, lambda tried, seed=seed: fault_of(plan, seed, tried, **more) != "")
            pytest.fail(f"seed {seed}: {wrong}\nfaults = {least}")


@pytest.mark.parametrize("budget", [False, True])
@pytest.mark.parametrize("plan", [STRICT, LOOSE], ids=["strict", "loose"])
def test_nobody_is_offered_a_noised_model_that_is_not_counted(plan: Plan, budget: bool) -> None:
    judge(plan, range(4), budget=budget)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [False, True])
@pytest.mark.parametrize("start", range(1000, 2000, 100))
@pytest.mark.parametrize("plan", [STRICT, LOOSE], ids=["strict", "loose"])
def test_nobody_is_at_length(plan: Plan, start: int, budget: bool) -> None:
    judge(plan, range(start, start + 100), budget=budget)


class Timed(Service):
    """Notes during which operations of its disk a round is combined, recorded and the next begun."""

    windows: list[tuple[int, int]]

    def work(self, now: float) -> None:
        began, reduces = self.files.operations, isinstance(self._todo[0], coordinator.Reduce)  # pyright: ignore
        super().work(now)
        if reduces:
            self.windows.append((began + 1, self.files.operations + 1))  # pyright: ignore


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_power_may_fail_at_every_operation_of_the_servers_disk(everywhere: bool) -> None:
    process, training = noised(True)
    Timed.windows = []
    total = Watched(process, STRICT, training, service=Timed).run().machines[SERVER].disk.operations
    for n in range(1, total + 1) if everywhere else range(*Timed.windows[-1]):
        assert not fault_of(STRICT, 0, [("crash", SERVER, n, "after")], budget=True), n


# --- the oracle sees what it is there for -----------------------------------------------------------------------------


def caught(plan: Plan, seeds: range, **more: Any) -> str:
    return first_wrong(fault_of, plan, SITES, seeds, **more)


def test_offering_a_model_before_its_release_is_durable_is_seen() -> None:
    class Hasty(Service):
        """Enters a release when the next round's task is made."""

        def happen(self, event: coordinator.Event, now: float, content: bytes = b"") -> Any:
            if isinstance(event, Reduced):
                after, effects = coordinator.handle(self.plan, self.state, event, now)
                self.__dict__["owed"] = next(e for e in effects if isinstance(e, coordinator.Record)).entry
                self._taken(after, event)
                self._todo.extend(e for e in effects if isinstance(e, coordinator.Open))
                return None
            if not isinstance(event, coordinator.Opened | coordinator.Asked) and "owed" in self.__dict__:
                self._log.append(msgspec.json.encode(self.__dict__.pop("owed")))
            if isinstance(event, coordinator.Opened):
                after, effects = coordinator.handle(self.plan, self.state, event, now)
                if "owed" in self.__dict__:
                    self.state = after
                    return None
            return super().happen(event, now, content)

    assert "are known" in caught(STRICT, range(3), service=Hasty)


def test_a_journal_that_does_not_outlive_power_is_seen() -> None:
    class Forgetful:
        def __init__(self, disk: Disk) -> None:
            self._disk = disk

        def __getattr__(self, name: str) -> Any:
            return (lambda n: Journal(self._disk, n, synced=False)) if name == "journal" else getattr(self._disk, name)

    def build(process: Process, plan: Plan, disk: Disk, **more: Any) -> Service:
        return Service(process, plan, Forgetful(disk), **more)  # type: ignore[arg-type]

    assert "are known" in caught(STRICT, range(1), service=build)


def test_drawing_other_noise_for_a_round_that_was_released_is_seen() -> None:
    class Forgetful(Service):
        """After a restart the model is drawn around anew."""

        def _loaded(self, state: coordinator.State) -> Any:
            model = super()._loaded(state)
            other = model.algorithm._replace(vector=model.algorithm.vector + torch.rand(()).item())
            return replace(model, algorithm=other)

    assert caught(STRICT, range(30), service=Forgetful)


def test_counting_none_of_a_budget_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator.State, "spent", property(lambda state: False))
    assert "ended after 4 rounds" in caught(STRICT, range(1), budget=True)


# --- what a site may add ----------------------------------------------------------------------------------------------


def examined(made: Process, spoil: Callable[[dict[str, Tensor]], None]) -> tuple[str, float]:
    """What is found of an update that was spoiled, and the L2 norm of what the server would add up of it."""
    from atoll.net.control import Deliver, Work, content_hash
    from atoll.net.frames import decode, encode
    from atoll.net.packing import pack_task, report_of

    trainer = Trainer(made, DATA.select(["c0"]) if "c0" in DATA else DATA.select([DATA.clients[0]]))
    site = DATA.clients[0]
    task = made.open(made.init(), (site,), 4)
    values, pieces = pack_task(task)
    frame = b"".join(pieces)
    work = Work("r", 0, 1, content_hash(frame), len(frame), task.kind, task.seed, (site,), 4, values, None)
    done, schema = trainer(work, frame, b""), report_schema(made, task)
    tensors = dict(decode(done.frame, schema))
    spoil(tensors)
    content = encode(tensors)
    claim = Deliver("r", site, 0, 1, work.base, content_hash(content), len(content), done.parts, done.sent)
    found = examine(made, task, claim, Content(content), schema, Rules(), block=7)
    if found.fault:
        return found.detail, 0.0
    total = made.combine(task, report_of(made, claim, tensors)).total
    assert total is not None
    return "", float(total.norm())


def times(factor: float) -> Callable[[dict[str, Tensor]], None]:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.startswith("wire"):
                tensor *= factor

    return spoil


def put(name: str, place: int, value: float) -> Callable[[dict[str, Tensor]], None]:
    def spoil(tensors: dict[str, Tensor]) -> None:
        (found,) = (t for n, t in tensors.items() if n.split("/")[0] == name)
        found.view(-1)[place] = value

    return spoil


@pytest.mark.parametrize("name", ["clipped", "adaptive", "turned", "thinned", "sums"])
def test_no_site_moves_the_sum_by_more_than_the_clip_norm(name: str) -> None:
    made = process(name, algorithm=(parts(name)["algorithm"]))
    bound = made.chain.facts.bound
    assert bound is not None
    why, honest = examined(made, lambda tensors: None)
    assert not why and 0 < honest <= bound * (1 + 2**-19)
    for factor in (1.01 * bound / honest, 1000.0, -1e6, 1e30):
        why, _ = examined(made, times(factor))
        assert "more than the clip norm" in why, factor
    for place in (0, -1):  # the last is the bit of adaptive clipping, or of the summed part
        for value in (3 * bound, 1e30):
            assert "more than the clip norm" in examined(made, put("wire", place, value))[0]
        assert "finite" in examined(made, put("wire", place, float("nan")))[0]
    for weight in (0.0, 0.5, 1.0, 7.0, 1e300):  # nobody is weighed
        why, norm = examined(made, put("weight", 0, weight))
        assert not why and norm <= honest
    for weight in (-1.0, float("nan"), float("inf")):
        assert "weight" in examined(made, put("weight", 0, weight))[0]


def test_a_weight_above_the_clip_is_refused() -> None:
    made = process("capped weights")
    assert examined(made, put("weight", 0, 1.0))[0] == ""
    assert "above the cap of 1" in examined(made, put("weight", 0, 1.5))[0]


def test_a_site_that_lies_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    process, training = noised(False)

    def lies(work: control.Work, content: bytes, memory: bytes) -> Done:
        done = training["s3"](work, content, memory)
        schema = report_schema(process, process.open(process.init(), ("s3",), 4))
        tensors = dict(frames.decode(done.frame, schema))
        tensors["wire"] *= 2.0**60
        return replace(done, frame=frames.encode(dict(tensors)))

    plan = Plan("r", ROUNDS, least=SITES, quorum=3)
    world = Watched(process, plan, {**training, "s3": lies}).run()
    assert world.done and world.server is not None
    refused = [a for s, a in world.told_sites if s == "s3" and isinstance(a, control.Refused)]
    told = {a.round: a.detail for a in refused if a.cause == "content"}
    assert len(told) == ROUNDS and all("more than the clip norm" in t for t in told.values())
    assert process.vector(world.server.model)[:ROUNDS].round().tolist() == [7.0] * ROUNDS


def test_a_site_that_does_not_answer_moves_no_denominator() -> None:
    made = process("clipped")
    gone = DATA.clients[-1]
    here = {s: t for s, t in sites(lambda: process("clipped"), DATA).items() if s != gone}
    plan = Plan("r", 2, least=4, quorum=3, deadline=5.0)
    world = Watched(process("clipped"), plan, here)
    world.at(0.0, lambda: world.told(coordinator.Joined(gone)))
    world.run()
    assert world.done and world.server is not None
    state = made.init()
    for number in range(2):
        source = Source(seed=3).derive("noise", number)
        state, _ = made.next(state, DATA, DATA.clients[:-1], expected=4.0, release=releasing(0.5, source))
    got = made.vector(world.server.model)
    assert float((made.vector(state) - got).abs().max()) <= 2e-7


@pytest.mark.parametrize("name", ["clipped", "adaptive", "sums"])
def test_training_that_breaks_adds_nothing_and_is_told_to_nobody(name: str) -> None:
    data, done = quadratics((1.0, 2.0, 3.0), (1.0, -2.0, 1e200), names=list("abc")), list[Done]()  # a loss of 1e400

    def made() -> Process:
        return Process(scalar_model(), **parts(name), engine="loop")

    training = sites(made, data)

    def watched(work: control.Work, content: bytes, memory: bytes) -> Done:
        done.append(training["c"](work, content, memory))
        return done[-1]

    told = atoll.simulate(scalar_model(), data, rounds=2, engine="loop", progress=False, **parts(name))
    world = deploy(made, data, 2, {**training, "c": watched})
    assert world.server is not None
    schema = report_schema(made(), made().open(made().init(), ("c",), 3))
    for report in done:
        assert not any(t.any() for t in frames.decode(report.frame, schema).values()), "nothing, not even a loss"
    assert len(done) == 2 and torch.equal(told.vector, world.server.process.vector(world.server.model))
    assert not any(isinstance(m, control.Decline) for _, m, _ in world.sent) and not world.notices
    if name == "sums":
        state, own = made().init(), world.agents["c"].memory
        assert not frames.decode(own, (frames.TensorSpec("memory", torch.float64, (1, state.memory.layout.size)),))[
            "memory"
        ].any(), "it keeps what it had"


# --- what is counted --------------------------------------------------------------------------------------------------


def promise(**more: Any) -> Guarantee:
    return msgspec.structs.replace(Guarantee(1.5, 4, 4, 1e-5, "analytic", None, None, True), **more)


CASES = pytest.mark.parametrize(("multiplier", "releases"), [(0.7, 1), (1.5, 12), (8.0, 300)])


@CASES
def test_the_ledgers_epsilon_is_the_exact_one(multiplier: float, releases: int) -> None:
    """Balle & Wang 2018, theorem 8: releases of fresh noise are one with less of it."""
    m, phi = releases**0.5 / multiplier, NormalDist().cdf
    epsilon = noise.ledger_of(promise(multiplier=multiplier), releases, 1000).epsilon
    assert phi(m / 2 - epsilon / m) - math.exp(epsilon) * phi(-m / 2 - epsilon / m) == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.slow
@CASES
def test_and_that_of_an_independent_accountant(multiplier: float, releases: int) -> None:
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    theirs = get_epsilon_gaussian(multiplier / releases**0.5, 1e-5)
    ours = noise.ledger_of(promise(multiplier=multiplier), releases, 1000).epsilon
    assert theirs == pytest.approx(ours, rel=1e-6)


@pytest.mark.slow
def test_and_that_of_privacy_loss_distributions() -> None:
    from dp_accounting import dp_event
    from dp_accounting.pld import pld_privacy_accountant

    accountant = pld_privacy_accountant.PLDAccountant()
    accountant.compose(dp_event.GaussianDpEvent(1.5), 12)
    theirs = accountant.get_epsilon(1e-5)  # rounded up
    assert theirs * 0.998 <= noise.ledger_of(promise(), 12, 1000).epsilon <= theirs * 1.0001


def test_nothing_is_claimed_from_drawing_cohorts(tmp_path: Path) -> None:
    """Who takes part is known: two of ten sites cost what two of two do, and the sum is divided by two."""
    few, many = Plan("r", 3, least=2, cohort=2), Plan("r", 3, least=10, cohort=2)
    first, second = (noise.guaranteed(process("calibrated"), plan) for plan in (few, many))
    assert first is not None and second is not None
    assert first.multiplier == second.multiplier and (second.expected, second.population) == (2, 10)
    assert noise.terms_of(second, 3).event.sampling == "none"
    spent = noise.ledger_of(second, 3, 3).epsilon
    assert 2.98 < spent <= 3.0


def test_what_the_budget_forbids_is_refused_before_the_run_and_over_selection_too(tmp_path: Path) -> None:
    tight = process(transforms=stages(seed=None, budget=0.1))
    with pytest.raises(BudgetSpent):
        Service(tight, Plan("r", 3), Disk(), now=0.0)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"over=1.5 .*1 under noise"):
        Service(process(), Plan("r", 3, cohort=2, over=1.5), Disk(), now=0.0)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="delta"):
        Service(process(transforms=stages(delta=0.3)), Plan("r", 3, least=4), Disk(), now=0.0)  # type: ignore[arg-type]


def test_what_is_not_counted_is_refused_by_name() -> None:
    plan = local_sgd(0.1, steps=2, batch_size=2, privacy=example_level(clip=1.0, noise_multiplier=1.0))
    for name, more in {
        "correlated_noise": {"transforms": (transforms.clip_norm(0.1), transforms.correlated_noise(1.0))},
        "local_noise": {"transforms": (TRANSFORMS["local_noise"](),)},
        "skellam": {
            "transforms": (transforms.skellam(noise_multiplier=1.0, clip=1.0, survivors=3, clients=4),),
            "channel": transforms.secure_sum(clip=1.0, least=3),
            "aggregator": aggregators.mean(weights="uniform"),
        },
        "privacy=": {"transforms": (), "algorithm": fedavg(plan)},
    }.items():
        with pytest.raises(CompositionError, match=f"{name}.* is not counted over sites yet"):
            Service(process(**more), Plan("r", 2), Disk(), now=0.0)  # type: ignore[arg-type]


def test_whom_data_would_leave_out_for_all_to_see_nothing_may_decide() -> None:
    judged = process(transforms=(transforms.norm_bound(0.05), *stages()))
    with pytest.raises(CompositionError, match="norm_bound cannot stand under noise over sites"):
        Service(judged, Plan("r", 2), Disk(), now=0.0)  # type: ignore[arg-type]
    for rules in (Rules(norm_bound=1.0), Rules(weight_cap=1.0)):
        with pytest.raises(CompositionError, match="cannot stand under noise"):
            Service(process(), Plan("r", 2), Disk(), now=0.0, rules=rules)  # type: ignore[arg-type]


def at_reducing(process: Process, files: Any, plan: Plan = STRICT, **more: Any) -> Service:
    """A server that is about to combine its first round."""
    _, training = noised(False)
    server = Service(process, plan, files, now=0.0, **more)
    for site in training:
        server.happen(coordinator.Joined(site), 0.0)
    server.work(0.0)
    for site in training:
        work, frame = server.receive(site, control.encode(control.Ask("r", site)), b"", 0.0)
        assert isinstance(work, control.Work)
        done = training[site](work, bytes(frame.whole()), b"")
        claim = control.Deliver(
            "r", site, 0, work.attempt, work.base, control.content_hash(done.frame), len(done.frame), done.parts,
            done.sent,
        )  # fmt: skip
        answer, _ = server.receive(site, control.encode(claim), done.frame, 0.0)
        assert isinstance(answer, control.Received), answer
    assert server.state.phase is Phase.REDUCING
    return server


def test_a_sum_that_fails_behind_its_noise_is_counted_until_the_budget_is_spent() -> None:
    def breaks(round: int, collected: Any) -> None:
        raise ValueError(f"the model begins with {collected.mean[0]}")  # tells of a noised sum

    process, _ = noised(True)
    server = at_reducing(process, Disk(), closed=breaks)
    for count in (1, 2):
        while server.busy:
            server.work(0.0)
        assert (server.state.phase, server.state.releases) == (Phase.PAUSED, count)
        assert "the model begins" in server.state.reason
        server.happen(coordinator.Resume(), 0.0)
    assert server.state.phase is Phase.FINISHED and "budget of epsilon" in server.state.reason
    assert server.state.round == 0 and not server.busy
    assert server.receive("s0", control.encode(control.Ask("r", "s0")), b"", 0.0)[0].__class__ is control.Ended


def test_a_run_that_fails_behind_its_noise_too_often_is_told_that_and_not_that_its_budget_is_spent() -> None:
    def breaks(round: int, collected: Any) -> None:
        raise ValueError("always")

    process = Process(
        Model(Numbers(3 * ROUNDS), "mse"), tally(ROUNDS), aggregator=UNIFORM, engine="loop",
        transforms=(transforms.clip_norm(CLIP), transforms.gaussian_noise(1.0, budget=1e4)),
    )  # fmt: skip
    server = at_reducing(process, Disk(), closed=breaks)
    for _ in range(2 * STRICT.rounds):
        while server.busy:
            server.work(0.0)
        server.happen(coordinator.Resume(), 0.0)
    state = server.state
    assert state.phase is Phase.FINISHED and (state.round, state.releases) == (0, 2 * STRICT.rounds)
    assert "is spent" not in state.reason
    assert f"{state.releases} sums failed behind their noise" in state.reason


def test_a_sum_that_fails_before_its_noise_is_not_counted() -> None:
    process, _ = noised(True)
    files = Disk()
    server = at_reducing(process, files)
    path = next(n for n in files.names_now if n.startswith("spool/"))
    files.write(path, b"damaged")
    server.work(0.0)
    assert (server.state.phase, server.state.releases) == (Phase.PAUSED, 0)
    server.happen(coordinator.Discard("again"), 0.0)
    server.happen(coordinator.Resume(), 0.0)
    assert server.state.phase is Phase.OPENING


def test_an_error_before_the_noise_is_told_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    process, _ = noised(True)
    server = at_reducing(process, Disk())

    def breaks(task: Any, report: Any) -> Any:
        raise ValueError(f"a row begins with {report.wire[0, 0]}")

    monkeypatch.setattr(process, "combine", breaks)
    server.work(0.0)
    assert (server.state.phase, server.state.releases) == (Phase.PAUSED, 0)
    assert "(ValueError)" in server.state.reason and "begins" not in server.state.reason


def test_a_disk_that_refuses_tells_nothing_of_sums_that_are_not_counted() -> None:
    def refuses(round: int, collected: Any) -> None:
        raise OSError(28, f"no room for a model that begins with {collected.mean[0]}")

    said = list[str]()
    server = at_reducing(noised(True)[0], Disk(), closed=refuses, notice=said.append)
    for _ in range(2):  # with other noise
        server.work(0.0)
        server.tick(0.0)
    assert (server.state.phase, server.state.releases, len(said)) == (Phase.REDUCING, 0, 2)
    assert said[0] == said[1] and "No space left" in said[0] and "begins" not in said[0]


def test_no_sequence_of_events_exceeds_the_budget() -> None:
    """Whatever happens, in whatever order: no round is begun whose release the budget does not allow."""
    ends = [sequence(random.Random(seed), most=2) for seed in range(20)]
    assert ends.count((Phase.FINISHED, 2)) > 2 and all(releases <= 2 for _, releases in ends)


def sequence(rng: random.Random, most: int) -> tuple[Phase, int]:
    """What random events come to."""
    plan = Plan("r", 9, least=3, quorum=2, deadline=10.0, attempts=2)
    state, entries = coordinator.State(), list[coordinator.Entry]()
    now, made = 0.0, 0
    begins = coordinator.Started("c" * 64, "", promise(multiplier=1.5, budget=1.0, most=most))
    for number in range(400):
        at, now = (state.round, state.attempt), now + rng.choice([0.0, 1.0, 6.0])
        claims = [
            control.Deliver("r", s, *at, state.base, rng.choice("12") * 64, 9, (1, 0, 0), 9) for s in ("a", "b", "c")
        ]
        site = rng.choice("abc")
        events: list[coordinator.Event] = [
            *(coordinator.Submitted(c.site, c, Finding("", "", 1.0, 1.0)) for c in claims),
            coordinator.Opened(*at, "b" * 64), Reduced(*at, "c" * 64, 1.5), Reduced(*at, "c" * 64, 0.0),
            Failed(*at, "why", rng.choice([0.0, 1.5])), coordinator.Ticked(), coordinator.Restarted(),
            coordinator.Pause("a rest"), coordinator.Resume(), coordinator.Resume(), coordinator.Discard("again"),
            coordinator.Joined(site), coordinator.Left(site), coordinator.Joined(site),
        ]  # fmt: skip
        event = begins if not number else rng.choice(events)
        state, effects = coordinator.handle(plan, state, event, now)
        new = [e.entry for e in effects if isinstance(e, coordinator.Record)]
        made += sum(isinstance(e.event, Reduced | Failed) and e.event.multiplier > 0 for e in new)
        entries += new
        assert state.releases == made <= most
        if state.phase in (Phase.OPENING, Phase.COLLECTING, Phase.REDUCING):
            assert not state.spent, event
    assert coordinator.replay(plan, entries) == state
    return state.phase, state.releases


def test_a_model_whose_record_was_refused_is_offered_to_the_record_again() -> None:
    """A database may have what it said it could not write: another draw would overwrite the model that it names."""
    process, _ = noised(False)
    files = Disk()
    server = at_reducing(process, files)
    append, refused = server._log.append, list[bytes]()

    def refuses(record: bytes) -> None:
        if b"Reduced" in record and not refused:
            refused.append(record)
            raise OSError(28, "no answer")
        append(record)

    server._log.append = refuses  # type: ignore[method-assign]
    server.work(0.0)
    model = files.read("models/00000001")
    assert refused and server.state.phase is Phase.REDUCING
    server.tick(1.0)
    server.work(1.0)
    assert server.state.round == 1 and files.read("models/00000001") == model
    assert control.content_hash(model) == server.state.model and server.state.model.encode() in refused[0]


def test_noise_is_drawn_anew_where_nothing_was_released() -> None:
    process, _ = noised(True)
    models = set[str]()
    for _ in range(2):
        server = at_reducing(process, Disk())
        server.work(0.0)
        models.add(server.state.model)
    assert len(models) == 2, "noise from the secret source"


def test_the_noise_is_as_large_as_was_promised_and_never_the_same() -> None:
    made, told = process(transforms=stages(seed=None)), promise(multiplier=0.5)
    drawn = list[Tensor]()
    for noising in (noise.Noising(made, told), noise.Noising(made, told)):
        for _ in range(2):  # a round that is combined again
            noising.begin(0)
            assert noising.multiplier == 0.0
            drawn.append(noising(torch.zeros(4000, dtype=torch.float64), 0.05))
            assert noising.multiplier == 0.5
    for one in drawn:
        assert abs(float(one.std()) / 0.025 - 1) < 0.08 and abs(float(one.mean())) < 7 * 0.025 / 4000**0.5
        assert sum(bool(torch.equal(one, other)) for other in drawn) == 1


def test_the_coordinator_takes_no_sum_without_the_noise_that_was_promised() -> None:
    process, _ = noised(True)
    server = at_reducing(process, Disk())
    state, plan = server.state, server.plan
    for multiplier in (0.0, 0.5):
        after, effects = coordinator.handle(plan, state, Reduced(0, 1, "c" * 64, multiplier), 0.0)
        assert after is state and isinstance(effects[0], coordinator.Misplaced)
    after, _ = coordinator.handle(plan, state, Reduced(0, 1, "c" * 64, 1.0), 0.0)
    assert (after.round, after.releases) == (1, 1)
    with pytest.raises(RunError, match="no place"):
        entry = coordinator.Entry(0, 0.0, Reduced(0, 1, "c" * 64, 1.0))
        coordinator.replay(plan, [entry])


def test_two_updates_that_are_the_same_raise_no_alarm_under_noise() -> None:
    """Sites whose training broke all send the same: that must not be told."""
    process, _ = noised(True)
    zeros = process.blank(process.open(process.init(), ("",), 4, kind="evaluate"))
    frame, said = pack_report(zeros), list[str]()
    server = Service(process, STRICT, Disk(), now=0.0, notice=said.append)  # type: ignore[arg-type]
    for site in noised(True)[1]:
        server.happen(coordinator.Joined(site), 0.0)
    server.work(0.0)
    for site in ("s0", "s1"):
        claim = control.Deliver(
            "r", site, 0, 1, server.state.base, control.content_hash(frame), len(frame), process.parts, len(frame)
        )
        assert isinstance(server.receive(site, control.encode(claim), frame, 0.0)[0], control.Received)
    assert not said


def test_a_journal_without_noise_is_what_it_always_was() -> None:
    """Runs that began before there was noise go on, and a server of before could go on with theirs."""
    lines = (
        b'{"number":0,"now":0.0,"event":{"type":"Started","model":"%s","experiment":"%s"}}' % (b"c" * 64, b"d" * 64),
        b'{"number":1,"now":0.0,"event":{"type":"Joined","site":"a","key":""}}',
        b'{"number":2,"now":0.0,"event":{"type":"Opened","round":0,"attempt":1,"base":"%s"}}' % (b"b" * 64),
        b'{"number":3,"now":0.0,"event":{"type":"Failed","round":0,"attempt":1,"reason":"why"}}',
    )
    decoder = msgspec.json.Decoder(coordinator.Entry)
    entries = [decoder.decode(line) for line in lines]
    assert tuple(msgspec.json.encode(e) for e in entries) == lines
    state = coordinator.replay(Plan("r", 2), entries)
    assert (state.phase, state.guarantee, state.releases) == (Phase.PAUSED, None, 0)
    reduced = b'{"number":9,"now":1.0,"event":{"type":"Reduced","round":0,"attempt":1,"model":"%s"}}' % (b"c" * 64)
    assert msgspec.json.encode(decoder.decode(reduced)) == reduced
