"""A deployed run is the simulated one: same model, same memory at the clients, whatever the parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deployed import deploy, sites
from problems import quadratics, scalar_model
from registry import AGGREGATORS, ALGORITHMS, ENGINES, MODELS, TRANSFORMS
from torch import Tensor
from world import drawn

import atoll
from atoll import aggregators, transforms
from atoll.algorithms import fedadam, fedavg, fedbn, fedper, scaffold
from atoll.errors import CompositionError
from atoll.local import local_sgd
from atoll.net import control, frames
from atoll.net.agent import Agent, Trainer
from atoll.net.coordinator import Discard, Joined, Phase, Plan, Resume, Stop
from atoll.net.service import Service
from atoll.net.storage import Disk
from atoll.rounds import Process

PLAN = local_sgd(0.1, epochs=2, batch_size=3)
KIND = MODELS["perceptron"]
NORMS = MODELS["batch norm, mean"]
DATA = KIND.data((5, 8, 6, 3), torch.float32)

PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "fedavg": lambda: {"algorithm": fedavg(PLAN)},
    "fedadam": lambda: {"algorithm": fedadam(PLAN, lr=0.05)},
    "scaffold": lambda: {"algorithm": scaffold(PLAN)},
    "fedper": lambda: {"algorithm": fedper(PLAN, private=("head.*",))},
    "fedbn": lambda: {"algorithm": fedbn(PLAN), "kind": NORMS},
    "averaged buffers": lambda: {"algorithm": fedavg(PLAN), "kind": NORMS},
    "clip_norm": lambda: {"algorithm": fedavg(PLAN), "transforms": (transforms.clip_norm(0.05),)},
    "quantize": lambda: {"algorithm": fedavg(PLAN), "transforms": (transforms.quantize(8),)},
    "clipped and sealed": lambda: {
        "algorithm": fedavg(PLAN), "transforms": (transforms.clip_norm(0.5),),
        "channel": transforms.secure_sum(clip=0.5, weight_cap=8.0),
    },
    "sealed sums": lambda: {"algorithm": scaffold(PLAN), "channel": transforms.secure_sum(clip=2.0, weight_cap=8.0)},
    "median": lambda: {"algorithm": scaffold(PLAN), "aggregator": aggregators.median()},
    "median of codes": lambda: {
        "algorithm": fedavg(PLAN), "aggregator": aggregators.median(), "transforms": (transforms.quantize(8),)
    },
    "expected": lambda: {
        "algorithm": fedavg(PLAN), "aggregator": aggregators.mean(weights="uniform", denominator="expected")
    },
}  # fmt: skip


def process(name: str, engine: str = "loop") -> Process:
    parts = PARTS[name]()
    kind = parts.pop("kind", KIND)
    return Process(kind.model(torch.float32), parts.pop("algorithm"), engine=ENGINES[engine](), **parts)


def simulated(name: str, rounds: int, engine: str = "loop") -> tuple[Process, Any]:
    made = process(name, engine)
    state = made.init()
    for _ in range(rounds):
        state, _ = made.next(state, DATA)
    return made, state


def own(content: bytes, width: int) -> Tensor:
    spec = frames.TensorSpec("memory", torch.float32, (1, width))
    return frames.decode(content, (spec,))["memory"]


@pytest.mark.parametrize("name", PARTS)
def test_a_deployed_run_has_the_bits_of_the_specification(name: str) -> None:
    """With one client after the other in simulation, even the sums are the same."""
    made, state = simulated(name, 3)
    world = deploy(lambda: process(name), DATA, 3, sites(lambda: process(name), DATA))
    assert world.server is not None
    got = world.server.model
    assert torch.equal(made.vector(state), made.vector(got))
    assert torch.equal(state.buffers, got.buffers)
    width = state.memory.layout.size
    for client, agent in world.agents.items():
        if width:
            kept = state.memory.rows([client], torch.zeros(width))
            assert torch.equal(kept, own(agent.memory, width)), "what a client keeps"


MANY = KIND.data((5, 8, 6, 3, 5, 6, 8, 3), torch.float32)
LEFT_OUT = {"pooled", "cyclic"}  # one puts all examples into one place, the other has cohorts of its own
EVERY = (
    [("algorithm", n) for n in ALGORITHMS if n not in LEFT_OUT]
    + [("transform", n) for n in TRANSFORMS if TRANSFORMS[n]().client_noise is None]
    + [("aggregator", n) for n in AGGREGATORS]
)


def listed(what: str, name: str) -> Process:
    kind, method = KIND, ALGORITHMS["fedavg"]
    if what == "algorithm":
        method = ALGORITHMS[name]
        kind = NORMS if method.norms else KIND
    more: dict[str, Any] = {}
    if what == "transform":
        more = {"transforms": (TRANSFORMS[name](),)}
    if what == "aggregator":
        more = {"aggregator": AGGREGATORS[name]()}
    algorithm = method.build(method.plan(epochs=1, batch_size=3))
    return Process(kind.model(torch.float32), algorithm, engine="loop", **more)


@pytest.mark.parametrize(("what", "name"), EVERY, ids=lambda v: v)
def test_whatever_is_listed_can_be_deployed(what: str, name: str) -> None:
    made = listed(what, name)
    state = made.init()
    for _ in range(2):
        state, _ = made.next(state, MANY)
    world = deploy(lambda: listed(what, name), MANY, 2, sites(lambda: listed(what, name), MANY))
    assert world.server is not None
    assert torch.equal(made.vector(state), made.vector(world.server.model))


@pytest.mark.parametrize("name", [n for n in TRANSFORMS if TRANSFORMS[n]().client_noise is not None])
def test_noise_that_nobody_counts_is_not_deployed(name: str, tmp_path: Path) -> None:
    made = Process(
        KIND.model(torch.float32), fedavg(PLAN), transforms=(TRANSFORMS[name](),), engine="loop",
        aggregator=aggregators.mean(weights="uniform"),
    )  # fmt: skip
    with pytest.raises(CompositionError, match="is not counted over sites yet"):
        Service(made, Plan("run", 2), Disk(tmp_path), now=0.0)


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "averaged buffers"])
def test_engines_agree(name: str) -> None:
    made, state = simulated(name, 3, "auto")
    build = lambda: process(name, "auto")  # noqa: E731
    world = deploy(build, DATA, 3, sites(build, DATA))
    assert world.server is not None
    assert torch.allclose(made.vector(state), made.vector(world.server.model), atol=1e-6)


def test_a_deployed_run_agrees_with_simulate() -> None:
    result = atoll.simulate(KIND.model(torch.float32), DATA, algorithm=scaffold(PLAN), rounds=3, progress=False)
    build = lambda: process("scaffold", "auto")  # noqa: E731
    world = deploy(build, DATA, 3, sites(build, DATA))
    assert world.server is not None
    assert torch.allclose(result.vector, world.server.process.vector(world.server.model), atol=1e-6)


@pytest.mark.parametrize("name", ["scaffold", "median of codes"])
def test_faults_do_not_change_a_bit(name: str) -> None:
    training = sites(lambda: process(name), DATA)
    vectors: list[Tensor] = []
    for seed in range(8):
        faults = drawn(seed, list(DATA.clients)) if seed else ()
        world = deploy(lambda: process(name), DATA, 2, training, seed=seed, faults=faults)
        assert world.server is not None
        vectors.append(world.server.process.vector(world.server.model))
    assert all(torch.equal(v, vectors[0]) for v in vectors)


def test_on_a_real_disk_and_from_a_cold_start_at_every_step(tmp_path: Path) -> None:
    """The server and a site are made anew before every single message."""
    made, state = simulated("scaffold", 2)
    plan = Plan("r", 2, least=4)
    training = sites(lambda: process("scaffold"), DATA)
    disks: dict[str, Disk] = {}

    def disk(who: str) -> Disk:
        if who in disks:
            disks[who].close()
        disks[who] = Disk(tmp_path / who)
        return disks[who]

    def server() -> Service:
        found = Service(process("scaffold"), plan, disk("server"), now=0.0, block=7)
        while found.busy:
            found.work(0.0)
        return found

    def site(name: str) -> Agent:
        return Agent(name, "r", training[name], disk(name))

    for name in DATA.clients:
        server().happen(Joined(name), 0.0)
    for _ in range(40):
        for name in DATA.clients:
            agent = site(name)
            for message, frame in agent.due():
                answer, content = server().receive(name, control.encode(message), frame, 0.0)
                agent.heard(answer, content.whole())
                if agent.busy:
                    agent.train()
        if all(site(name).state.memory == (1, 1) for name in DATA.clients):
            break
    last = server()
    assert last.state.phase is Phase.FINISHED
    assert torch.equal(made.vector(state), made.vector(last.model))
    assert sorted(p.name for p in (tmp_path / "server" / "models").iterdir()) == ["00000001", "00000002"]
    assert not list((tmp_path / "server" / "spool").glob("*/*")), "what was counted is not kept"
    for name in DATA.clients:
        assert torch.equal(state.memory.rows([name], torch.zeros(state.memory.layout.size)), own(
            site(name).memory, state.memory.layout.size))  # fmt: skip


# --- what goes wrong at the rim ---------------------------------------------------------------------------------------


def scalar(algorithm: Any = None, **parts: Any) -> Process:
    return Process(
        scalar_model(), algorithm or fedavg(local_sgd(0.1, steps=1, batch_size=None)), engine="loop", **parts
    )


def begun(tmp_path: Path, **more: Any) -> tuple[Service, list[str]]:
    """A server that offers its first task to a and b, and what it tells its operator."""
    notices: list[str] = []
    plan = more.pop("plan", Plan("r", 2, least=2))
    made = Service(scalar(), plan, Disk(tmp_path), now=0.0, notice=notices.append, **more)
    for name in "ab":
        made.happen(Joined(name), 0.0)
    made.work(0.0)
    assert made.state.phase is Phase.COLLECTING
    return made, notices


def test_two_servers_do_not_work_on_one_run(tmp_path: Path) -> None:
    server, _ = begun(tmp_path)
    with pytest.raises(atoll.errors.RunError, match="another process writes to the journal"):
        Service(scalar(), server.plan, Disk(tmp_path), now=1.0)
    server.files.close()
    again = Service(scalar(), server.plan, Disk(tmp_path), now=1.0)
    assert again.state.phase is Phase.COLLECTING


def test_a_site_whose_code_raises_declines_and_stays_up(tmp_path: Path) -> None:
    server, _ = begun(tmp_path / "server")

    def breaks(work: Any, content: bytes, memory: bytes) -> Any:
        raise ZeroDivisionError("secret of a patient")

    heard: list[str] = []
    agent = Agent("a", "r", breaks, Disk(tmp_path / "a"), notice=heard.append)
    work, content = server.receive("a", control.encode(agent.due()[0][0]), b"", 0.0)
    agent.heard(work, content.whole())
    ((decline, _),) = agent.train()
    assert decline == control.Decline("r", "a", 0, 1, "ZeroDivisionError"), "the text stays at the site"
    assert "secret of a patient" in heard[0]
    server.receive("a", control.encode(decline), b"", 0.0)
    assert server.state.excluded == {"a": "ZeroDivisionError"}
    agent.heard(work, content.whole())
    assert not agent.busy, "it does not try the same task again"


def test_a_task_of_another_experiment_is_refused_by_the_site(tmp_path: Path) -> None:
    server, _ = begun(tmp_path / "server")
    data = quadratics((1.0,), (1.0,), names=["a"])
    other = Trainer(scalar(scaffold(local_sgd(0.1, steps=1, batch_size=None))), data)
    agent = Agent("a", "r", other, Disk(tmp_path / "a"))
    answer, content = server.receive("a", control.encode(control.Ask("r", "a")), b"", 0.0)
    agent.heard(answer, content.whole())
    ((decline, _),) = agent.train()
    assert isinstance(decline, control.Decline) and "missing" in decline.reason


def test_asking_in_anothers_name_is_refused(tmp_path: Path) -> None:
    server, notices = begun(tmp_path)
    answer, content = server.receive("a", control.encode(control.Ask("r", "b")), b"", 0.0)
    assert isinstance(answer, control.Refused) and answer.cause == "identity" and not content.size
    assert "in the name of b" in notices[-1]
    answer, _ = server.receive("a", control.encode(control.Ask("s", "a")), b"", 0.0)
    assert isinstance(answer, control.Refused) and answer.cause == "run"


def test_no_message_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    server, _ = begun(tmp_path)
    before = server.state
    with pytest.raises(control.MessageError):
        server.receive("a", b"\x80\x04.", b"", 0.0)
    assert server.state == before


def collected(tmp_path: Path, files: Disk | None = None, algorithm: Any = None) -> Service:
    """A server that has the updates of a and b, and is about to combine them."""
    server = Service(scalar(algorithm), Plan("r", 1, least=2), files or Disk(tmp_path / "s"), now=0.0)
    for name in "ab":
        server.happen(Joined(name), 0.0)
    server.work(0.0)
    for name in "ab":
        mine = Trainer(scalar(algorithm), quadratics((1.0,), (1.0,), names=[name]))
        agent = Agent(name, "r", mine, Disk(tmp_path / name))
        answer, content = server.receive(name, control.encode(control.Ask("r", name)), b"", 0.0)
        agent.heard(answer, content.whole())
        for message, frame in agent.train():
            server.receive(name, control.encode(message), frame, 0.0)
    assert server.state.phase is Phase.REDUCING
    return server


def stepped(tmp_path: Path, algorithm: Any) -> Service:
    """A server that has combined the updates of a and b, or could not."""
    server = collected(tmp_path, algorithm=algorithm)
    server.work(0.0)
    return server


def test_a_step_that_fails_pauses_the_run_with_its_reason(tmp_path: Path) -> None:
    from dataclasses import replace

    def step(state: Any, aggregate: Any) -> Any:
        raise ValueError("no such optimiser")

    server = stepped(tmp_path, replace(fedavg(local_sgd(0.1, steps=1, batch_size=None)), step=step))
    assert server.state.phase is Phase.PAUSED and server.state.reason == "ValueError: no such optimiser"
    assert set(server.state.accepted) == {"a", "b"}


@pytest.mark.parametrize("what", ["tensor", "number"])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path, what: str) -> None:
    from dataclasses import replace
    from typing import NamedTuple

    class Kept(NamedTuple):
        vector: Tensor
        second: Tensor
        best: float

    def step(state: Kept, aggregate: Any) -> Kept:
        if what == "tensor":
            return state._replace(second=state.second + torch.inf)
        return state._replace(best=float("inf"))

    plain = fedavg(local_sgd(0.1, steps=1, batch_size=None))
    algorithm = replace(plain, init=lambda vector: Kept(vector, torch.zeros_like(vector), 0.0), step=step)
    server = stepped(tmp_path, algorithm)
    assert server.state.phase is Phase.PAUSED and server.state.round == 0
    name = "second" if what == "tensor" else "best"
    assert f"algorithm/{name}" in server.state.reason and "non-finite" in server.state.reason
    server.files.close()
    again = Service(scalar(algorithm), Plan("r", 1, least=2), Disk(tmp_path / "s"), now=0.0)
    assert again.state.accepted
    again.happen(Discard("a smaller rate"), 0.0)
    again.happen(Resume(), 0.0)
    assert again.state.attempt == 2 and not again.state.accepted


def test_deadlines_hold_on_a_clock_that_goes_back(tmp_path: Path) -> None:
    plan = Plan("r", 2, least=2, deadline=10.0, attempts=1)
    files = Disk(tmp_path)
    server = Service(scalar(), plan, files, now=1e6)
    for name in "ab":
        server.happen(Joined(name), 1e6)
    server.work(1e6)
    files.close()
    server = Service(scalar(), plan, files, now=3.0)  # the machine was started again, and its clock with it
    server.work(3.0)
    server.tick(12.0)
    assert server.state.phase is Phase.COLLECTING
    server.tick(5.0)  # it goes back in the middle, too
    server.tick(5.9)
    assert server.state.phase is Phase.COLLECTING
    server.tick(6.1)
    assert server.state.phase is Phase.PAUSED, "ten seconds went by"


def test_a_folder_of_another_experiment_is_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    other = scalar(scaffold(local_sgd(0.1, steps=1, batch_size=None)))
    with pytest.raises(atoll.errors.RunError, match="another plan, model, algorithm or pipeline"):
        Service(other, Plan("r", 2, least=2), Disk(tmp_path), now=0.0)


def test_a_folder_of_another_plan_is_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(atoll.errors.RunError, match="another plan"):
        Service(scalar(), Plan("r", 3, least=2), Disk(tmp_path), now=0.0)


def test_a_stopped_run_leaves_no_updates_behind(tmp_path: Path) -> None:
    server = collected(tmp_path)
    assert list((tmp_path / "s" / "spool").glob("*/*"))
    server.happen(Stop("enough"), 0.0)
    assert not list((tmp_path / "s" / "spool").iterdir())
    assert (tmp_path / "s" / "models").is_dir(), "the model stays"


def test_a_disk_that_refuses_is_asked_again_when_time_has_passed(tmp_path: Path) -> None:
    class Full(Disk):
        full = False

        def write(self, path: str, content: bytes) -> None:
            if self.full:
                raise OSError(28, "No space left on device")
            super().write(path, content)

    files = Full(tmp_path / "s")
    server = collected(tmp_path, files)
    files.full = True
    server.work(0.0)
    assert server.state.phase is Phase.REDUCING and not server.busy
    files.full = False
    server.tick(1.0)
    assert server.busy
    server.work(1.0)
    assert server.state.phase is Phase.FINISHED


def test_an_experiment_that_changed_under_a_round_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    from atoll.algorithms.base import Message

    begun(tmp_path)
    algorithm = replace(
        fedavg(local_sgd(0.1, steps=1, batch_size=None)), broadcast=lambda state: Message(state.vector + 1)
    )
    server = Service(scalar(algorithm), Plan("r", 2, least=2), Disk(tmp_path), now=0.0)
    with pytest.raises(atoll.errors.RunError, match="changed under the run"):
        server.work(0.0)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    (path,) = (tmp_path / "models").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(atoll.errors.RunError, match="damaged"):
        begun(tmp_path)


def test_keeping_updates_that_depend_on_the_cohort_is_refused(tmp_path: Path) -> None:
    sealed = scalar(channel=transforms.secure_sum(clip=1.0, weight_cap=4.0))
    with pytest.raises(atoll.errors.InvalidArgument, match="keep"):
        Service(sealed, Plan("r", 1), Disk(tmp_path), now=0.0)
