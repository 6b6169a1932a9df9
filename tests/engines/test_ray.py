"""Ray: the bits of one process, whatever the number of actors, and whatever happens to them. Real Ray, one machine.

Actors take seconds to start: few tests, each of which asks a lot of the actors it has.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from registry import MODELS, Kind
from test_agreement import run
from test_workers import CASES, KIND, PLAN, SIZES, bits, troubled
from torch import Tensor

import atoll
from atoll.algorithms import Algorithm, fedavg, fedbn, scaffold
from atoll.cohort import Cohort
from atoll.data import FederatedDataset
from atoll.engines import Loop, Ray, Vectorized, resolve
from atoll.engines import ray as engine_ray
from atoll.engines.ray import _importable, _opened, packed, unpacked
from atoll.engines.spread import placed
from atoll.errors import InvalidArgument, NonFiniteError, RunError
from atoll.experiment import load_app
from atoll.local import local_sgd
from atoll.memory import ClientMemory
from atoll.rounds import Process, State

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster the user has started."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray keeps a token there
        for name, value in QUIET.items():
            patch.setenv(name, value)
        ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield ray
        ray.shutdown()


def played(engine: Any, algorithm: Algorithm, kind: Kind = KIND, **options: Any) -> dict[str, Tensor]:
    try:
        return run(kind.model(), kind.data(SIZES), algorithm, engine, rounds=3, **options)[2]
    finally:
        engine.stop()


ASKED = {
    "fedavg": ("dropout", 1), "a rule of rows": ("convolution", 3), "codes": ("attention", 1),
    "sums of codes": ("recurrent", 1),
}  # fmt: skip


def test_any_number_of_actors_gives_the_bits_of_one_process(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for case, (kind, count) in ASKED.items():
        build, _, options = CASES[case]
        expected = played(Vectorized(tile=2), build(), MODELS[kind], **options)
        engine = Ray(Vectorized(tile=2), count)
        hired: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(engine, "stop", lambda e=engine, h=hired: (h.append(e.describe()["workers"]), Ray.stop(e)))
            bits(played(engine, build(), MODELS[kind], **options), expected)
        assert hired[-1] == count and engine.describe()["engine"] == "ray"
        assert not engine.inner.notes, "something went wrong at an actor"
        assert cluster.is_initialized(), "the user's cluster was ended"


@pytest.mark.slow
def test_drawn_clients_and_personal_models_and_small_pieces(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_ray, "PIECE_BYTES", 1)
    kind = KIND
    packed_data = kind.data(SIZES)
    lazy = FederatedDataset.from_source(
        packed_data.clients, lambda c: (packed_data[c].train["x"], packed_data[c].train["y"])
    )
    ends: list[Tensor] = []
    for data, engine in ((packed_data, Vectorized(tile=1)), (lazy, Ray(Vectorized(tile=1), 2))):
        process = Process(kind.model(metrics=("accuracy",)), fedbn(PLAN), engine=engine)
        state = process.init()
        for cohort in (["c4", "c1", "c2"], ["c0", "c1", "c6"], ["c5", "c4", "c3", "c2"]):
            state, _ = process.next(state, data, cohort)
        ends.append(process.vector(state))
        assert "notes" not in process.engine.describe()
    assert torch.equal(*ends)
    expected = process.evaluate(state, packed_data, personal=True)  # these actors have seen only the sample
    assert process.engine.describe()["workers"] == 2 and expected.names == ("loss", "accuracy")
    process.engine.stop()
    alone = Process(kind.model(metrics=("accuracy",)), fedbn(PLAN), engine=Vectorized(tile=1))
    assert torch.equal(alone.evaluate(state, packed_data, personal=True).values, expected.values)


def test_rows_are_sent_only_to_actors_that_lack_them(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    rows = ClientMemory.rows

    def spied(self: ClientMemory, clients: Any, default: Tensor) -> Tensor:
        read.extend(clients)
        return rows(self, clients, default)

    base, data = scaffold(PLAN), KIND.data(SIZES)
    expected = Process(KIND.model(), base, engine=Vectorized(tile=2))
    other = Process(KIND.model(), scaffold(local_sgd(0.01, epochs=1, batch_size=4)), engine=Loop())
    process = Process(KIND.model(), base, engine=Ray(Vectorized(tile=2), 2))

    def kept(state: State) -> Tensor:
        return rows(state.memory, list(data.clients), torch.zeros(state.memory.layout.size, dtype=torch.float64))

    ends: list[tuple[Tensor, Tensor]] = []
    for played_by in (expected, process):
        monkeypatch.setattr(ClientMemory, "rows", spied if played_by is process else rows)
        state = played_by.init()
        counts: list[int] = []
        for turn, cohort in enumerate((None, None, ["c0", "c1", "c2"], None, ["c0"], None)):
            if turn == 5:  # somebody else works on the same memory in between
                state, _ = other.next(state, data)
            read.clear()
            if turn >= 3:  # refused at its end: actors have new rows, which did not become the clients'
                with monkeypatch.context() as patch, pytest.raises(NonFiniteError, match="server's step"):
                    patch.setattr(played_by, "close", lambda *a: replace(state, algorithm=_broken(state.algorithm)))
                    played_by.next(state, data)
            if turn == 4:  # the rows that were accepted since are those of somebody else
                state, _ = other.next(state, data)
            state, _ = played_by.next(state, data, cohort)
            counts.append(len(read))
        ends.append((played_by.vector(state), kept(state)))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert counts[:2] == [0, 0], "actors have the rows of the clients they worked on"
    assert counts[3] >= 7 and counts[5] == 14, "a stale row was used"
    monkeypatch.setattr(process.engine._crew, "_limit", 1)  # type: ignore[attr-defined]
    state, _ = process.next(state, data, ["c0"])
    read.clear()
    process.next(state, data)
    assert 1 <= len(read) <= 6, "actors forget what is too much for them"
    process.engine.stop()


def _broken(state: Any) -> Any:
    return state._replace(vector=state.vector * float("nan"))


# --- faults -----------------------------------------------------------------------------------------------------------


class Troubles:
    """Two actors, and files that make whoever works on certain clients die, fail or sleep."""

    def __init__(self, folder: Path) -> None:
        self.driver = driver = os.getpid()
        self.files = files = {name: folder / name for name in ("once", "always", "raise", "there", "slow")}

        def act(cohort: Cohort) -> None:
            away = os.getpid() != driver
            if "c4" in cohort.clients and away and files["once"].exists():
                files["once"].unlink()
                os._exit(7)
            if "c3" in cohort.clients and away and files["always"].exists():
                os._exit(7)
            if "c3" in cohort.clients and (files["raise"].exists() or (away and files["there"].exists())):
                raise ZeroDivisionError("a bug of one's own")
            if away and files["slow"].exists():
                time.sleep(60)

        self.data = KIND.data(SIZES)
        self.expected = Process(KIND.model(), troubled(lambda cohort: None), engine=Vectorized(tile=1))
        self.process = Process(KIND.model(), troubled(act), engine=Ray(Vectorized(tile=1), 2))
        self.engine: Any = self.process.engine
        self.states = {p: p.next(p.init(), self.data)[0] for p in (self.expected, self.process)}

    def both(self) -> None:
        """A round with actors and without: the same bits."""
        for p in self.states:
            self.states[p], _ = p.next(self.states[p], self.data)
        own = self.process.vector(self.states[self.process])
        assert torch.equal(self.expected.vector(self.states[self.expected]), own)

    def alone(self) -> None:
        """A round with actors, which may not end well."""
        self.process.next(self.states[self.process], self.data)

    def fresh(self, name: str) -> None:
        """This trouble from now on, and no other."""
        for file in self.files.values():
            file.unlink(missing_ok=True)
        self.files[name].touch()


def test_another_actor_takes_the_place_of_a_lost_one(cluster: Any, tmp_path: Path) -> None:
    scene = Troubles(tmp_path)
    scene.fresh("once")
    with pytest.warns(UserWarning, match=r"round 2: an actor was lost at c4, whose clients were done again.*died"):
        scene.both()
    assert not scene.files["once"].exists() and scene.engine.describe()["workers"] == 2
    assert any("lost at c4" in note for note in scene.engine.describe()["notes"])
    scene.fresh("raise")
    with pytest.raises(ZeroDivisionError, match="a bug of one's own") as caught:
        scene.alone()
    assert any(entry.name == "act" for entry in caught.traceback), "the place is lost"
    assert scene.engine._crew is None


@pytest.mark.slow
def test_lost_actors_errors_and_interrupts(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Troubles(tmp_path)
    engine = scene.engine
    # An actor is lost, and there is no room for another.
    scene.fresh("once")
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="round 2: an actor was lost"):
        patch.setattr(engine_ray._Crew, "_start", lambda self, count: [])
        scene.both()
        assert engine.describe()["workers"] == 1
    # One that is killed between rounds is no different; the crew is whole again.
    cluster.kill(engine._crew._workers[0].actor)
    with pytest.warns(UserWarning, match=r"round 3: an actor was lost .*ray\.kill"):
        scene.both()
    assert engine.describe()["workers"] == 2
    # A bug that shows there and not here is told; one that shows here too is raised here.
    scene.fresh("there")
    with pytest.warns(UserWarning, match=r"round 4: clients failed at an actor.*ZeroDivisionError: a bug.*: c3"):
        scene.both()
    # Ctrl-C leaves nothing behind.
    scene.fresh("slow")
    timer = threading.Timer(1.0, os.kill, (scene.driver, signal.SIGINT))
    began = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        scene.alone()
    assert time.monotonic() - began < 30 and engine._crew is None
    scene.files["slow"].unlink()
    scene.both()
    # The same clients cost two actors.
    scene.fresh("always")
    with (
        pytest.warns(UserWarning, match="round 6: an actor was lost"),
        pytest.raises(RunError, match=r"round 6: two actors were lost .*\(c3\)"),
    ):
        scene.alone()
    assert engine._crew is None and cluster.is_initialized()


def test_what_cannot_be_done_is_refused(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = KIND.data(SIZES)
    lock = threading.Lock()
    process = Process(KIND.model(), troubled(lambda cohort: lock.acquire()), engine=Ray(Vectorized(tile=2), 1))
    with pytest.raises(InvalidArgument, match=r"the algorithm cannot be sent to Ray's actors \(cannot pickle.*locks"):
        process.next(process.init(), data)
    process = Process(KIND.model(), fedavg(PLAN), engine="ray", workers=9)
    with pytest.raises(InvalidArgument, match=r"workers=9 is not allowed.*at most 3"):
        process.next(process.init(), data)

    class Idle:
        def here(self) -> bool:
            return True

    # A cluster whose CPUs are taken: as many actors as there is room for.
    occupied = cluster.remote(num_cpus=2)(Idle).remote()
    cluster.get(occupied.here.remote())
    monkeypatch.setattr(engine_ray, "PATIENCE_SECONDS", 15.0)
    process = Process(KIND.model(), fedavg(PLAN), engine=Ray(Vectorized(tile=2)))
    with pytest.warns(UserWarning, match="room for 1 actors, not for 3"):
        process.next(process.init(), data)
    assert process.engine.describe()["workers"] == 1
    process.engine.stop()


# --- a program --------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
import torch
import atoll
from atoll.engines import Ray, Vectorized
from atoll.experiment import load_app

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(4, 3)
    def forward(self, x):
        return scaled(self.body(x))

scaled = lambda x: x * FACTOR
FACTOR = 0.5

def vector(engine, result):
    return result.vector

def main():
    torch.manual_seed(0)
    model = atoll.Model(Net(), lambda o, target: torch.nn.functional.cross_entropy(o, target, reduction="none"))
    data = atoll.FederatedDataset.open(sys.argv[1])
    algorithm = atoll.fedavg(atoll.local_sgd(lr=0.1, batch_size=4))
    alone = atoll.simulate(model, data, algorithm=algorithm, rounds=2, engine=Vectorized(tile=2), progress=False)
    process = atoll.process(model, algorithm, engine=Ray(Vectorized(tile=2), 1))
    state = process.init()
    for _ in range(2):
        state, _ = process.next(state, data)
    assert torch.equal(process.vector(state), alone.vector), "other bits"
    import ray
    experiment = load_app(sys.argv[2])()
    found = experiment.simulate(engine="ray", workers=1, progress=False)
    assert found.engine["engine"] == "ray" and "notes" not in found.engine, found.engine
    assert torch.equal(found.vector, experiment.simulate(progress=False).vector), "other bits"
    assert ray.is_initialized(), "the first run still has actors"
    assert process.engine._crew._stored is None, "actors open the directory themselves"
    state, _ = process.next(state, data)
    process.engine.stop()
    assert not ray.is_initialized(), "what was started here was not ended"
    print("all is well")

if __name__ == "__main__":
    main()
"""

APP = """
import torch
import atoll

def squares(output, target):
    return (output - target[:, None]).square().sum(1) * SCALE

SCALE = 0.5

class Line(torch.nn.Linear):
    pass

def experiment(*, rounds: int = 2) -> atoll.Experiment:
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 24).reshape(-1, 1)
    data = atoll.FederatedDataset.from_arrays({f"c{i}": (x[i::4], x[i::4, 0]) for i in range(4)})
    return atoll.Experiment(
        model=atoll.Model(Line(1, 1), squares), data=data, algorithm=atoll.fedavg(atoll.local_sgd(0.1)), rounds=rounds
    )
"""


def test_a_program_brings_its_own_code_and_ends_its_own_cluster(tmp_path: Path) -> None:
    MODELS["perceptron"].data(SIZES, torch.float32).save(tmp_path / "data")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "apps").mkdir()
    (tmp_path / "apps" / "app.py").write_text(APP)
    done = subprocess.run(
        [sys.executable, "program.py", "data", "apps/app.py"], cwd=tmp_path, text=True, capture_output=True,
        timeout=110, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("all is well\n"), done.stderr[-4000:]


# --- parts, without Ray -----------------------------------------------------------------------------------------------


def test_without_ray_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidArgument, match=r'engine="ray" needs Ray.*pip install "atoll\[ray\]"'):
        Process(KIND.model(), fedavg(PLAN), engine="ray")


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "two"])
def test_wrong_counts_are_refused(count: object) -> None:
    with pytest.raises(InvalidArgument, match="workers="):
        Process(KIND.model(), fedavg(PLAN), engine="ray", workers=count)  # type: ignore[arg-type]


def test_ray_is_an_engine_by_name() -> None:
    found = resolve("ray", 2)
    assert isinstance(found, Ray) and isinstance(found.inner, Vectorized) and resolve(found) is found
    with pytest.raises(InvalidArgument, match="workers=3"):
        resolve(found, 3)


def test_a_fresh_engine_has_the_settings_and_nothing_else() -> None:
    for engine in (Vectorized("single", threads=2), Loop(threads=2)):
        process = Process(KIND.model(), fedavg(PLAN), engine=engine)
        process.engine.prepare(process, KIND.data(SIZES))
        engine.notes["x"] = None
        twin = engine.fresh()
        assert type(twin) is type(engine) and twin.thread_count == 2 and twin.prepared is None and not twin.notes
        assert engine.prepared is not None and engine.notes
        twin.prepare(process, KIND.data(SIZES))
        assert {**twin.describe(), "notes": ["x"]} == engine.describe()


def test_tensors_travel_by_bytes() -> None:
    given = [
        torch.randn(3, 2).bfloat16(), torch.empty(0, 4), torch.tensor(7), torch.tensor([True, False]),
        torch.arange(6.0).view(2, 3).T, torch.randn(5, dtype=torch.complex64), torch.ones(2, requires_grad=True),
    ]  # fmt: skip
    for tensor in given:
        kind, shape, array = packed(tensor)
        array = array.copy()
        array.flags.writeable = False
        found = unpacked((kind, shape, array))
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype
    room = np.zeros(4 * 100 + 1, np.uint8)
    room[1:] = torch.arange(100.0).view(torch.uint8).numpy()
    found = unpacked(("float32", (100,), room[1:]))
    assert torch.equal(found, torch.arange(100.0)) and found.data_ptr() % 64 == 0


def test_tiles_go_to_whoever_has_the_least_to_do() -> None:
    assert placed([5, 1, 1, 3, 4], 2) == [[0, 2], [1, 3, 4]] or placed([5, 1, 1, 3, 4], 2) == [[0, 1, 2], [3, 4]]
    assert placed([1, 1, 1], 5) == [[0], [1], [2], [], []]
    assert placed([2, 2, 1, 1], 2) == [[0, 2], [1, 3]]
    assert placed([2, 2, 1, 1], 2, held=[[0, 3], [1, 0], [0, 0], [0, 0]]) == [[1, 2], [0, 3]]


def test_data_of_another_directory_are_not_taken_for_the_same(tmp_path: Path) -> None:
    data = KIND.data(SIZES)
    data.save(tmp_path / "data")
    KIND.data(SIZES, seed=1).save(tmp_path / "other")
    assert _opened(str(tmp_path / "data"), data.fingerprint()) is not None
    assert _opened(str(tmp_path / "other"), data.fingerprint()) is None
    assert _opened(str(tmp_path / "nothing"), data.fingerprint()) is None


def test_modules_that_nobody_else_can_import_are_known(tmp_path: Path) -> None:
    assert _importable("atoll", atoll) and _importable("sys", sys) and _importable("subprocess", subprocess)
    (tmp_path / "app.py").write_text("def experiment():\n    pass\n")
    factory = load_app(tmp_path / "app.py")
    module = sys.modules[factory.__module__]
    assert not _importable(module.__name__, module)
    del sys.modules[factory.__module__]
