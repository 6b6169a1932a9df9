"""Workers: the bits of one process, whatever their number, and whatever happens to them."""

import gc
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from registry import MODELS
from test_agreement import run, same
from torch import Tensor

import atoll
from atoll import aggregators, transforms
from atoll.algorithms import Algorithm, fedavg, fedbn, fedper, scaffold
from atoll.algorithms.base import Memory, Message
from atoll.cohort import Cohort
from atoll.data import FederatedDataset
from atoll.engines import Loop, Vectorized, Workers
from atoll.engines.workers import Board, cores
from atoll.errors import InvalidArgument, NonFiniteError, RunError
from atoll.local import local_sgd
from atoll.memory import ClientMemory
from atoll.rounds import Process
from atoll.vectors import Layout, Update

SIZES = (6, 2, 7, 4, 11, 6, 6)
PLAN = local_sgd(0.05, epochs=2, batch_size=4)
KIND = MODELS["batch norm, local"]


def bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def played(count: int, algorithm: Algorithm, kind=KIND, *, tile: int = 2, **options: Any) -> dict[str, Tensor]:
    engine = Workers(Vectorized(tile=tile), count)
    try:
        return run(kind.model(), kind.data(SIZES), algorithm, engine, rounds=3, **options)[2]
    finally:
        engine.stop()


CASES: dict[str, tuple[Callable[[], Algorithm], str, dict[str, Any]]] = {
    "fedavg": (lambda: fedavg(PLAN), "perceptron", {}),
    "dropout": (lambda: fedavg(PLAN), "dropout", {}),
    "convolution": (lambda: fedavg(PLAN), "convolution", {}),
    "recurrent": (lambda: fedavg(PLAN), "recurrent", {}),
    "attention": (lambda: fedavg(PLAN), "attention", {}),
    "client memory": (lambda: scaffold(PLAN), "batch norm, local", {}),
    "private layers": (lambda: fedper(PLAN, private=("head.*",)), "batch norm, mean", {}),
    "private norms": (lambda: fedbn(PLAN), "batch norm, mean", {}),
    "a rule of rows": (lambda: scaffold(PLAN), "perceptron", {"aggregator": aggregators.median()}),
    "codes": (lambda: fedavg(PLAN), "perceptron", {"transforms": (transforms.quantize(4),)}),
    "sums of codes": (
        lambda: fedavg(PLAN), "perceptron", {"channel": transforms.secure_sum(clip=9.0, weight_cap=50.0, bits=40)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_workers_gives_the_bits_of_one(case: str) -> None:
    build, kind, options = CASES[case]
    expected = played(1, build(), MODELS[kind], **options)
    for count in (2, 3):
        bits(played(count, build(), MODELS[kind], **options), expected)
    same(run(MODELS[kind].model(), MODELS[kind].data(SIZES), build(), Loop(), rounds=3, **options)[2], expected)


def test_more_workers_than_tiles_are_not_started() -> None:
    process = Process(KIND.model(), fedavg(PLAN), engine=Vectorized(tile=3), workers=8)
    process.next(process.init(), KIND.data(SIZES))
    assert process.engine.describe()["workers"] == 4  # seven clients by threes, evened out
    process.engine.stop()


def test_a_small_board_is_emptied_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = played(1, scaffold(PLAN), tile=1)
    monkeypatch.setattr("atoll.engines.workers.BOARD_BYTES", 1)
    bits(played(2, scaffold(PLAN), tile=1), expected)


@pytest.mark.parametrize("algorithm", [fedavg(PLAN), scaffold(PLAN), fedper(PLAN, private=("head.*",))])
def test_the_global_model_is_evaluated_by_workers_too(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atoll.evaluation.LEAST", 5)
    found, asked, get = [], list[str](), Board.get

    def noting(board: Board, spec: Any) -> dict[str, Tensor]:
        asked.extend(name for name, *_ in spec)
        return get(board, spec)

    for count in (1, 3):
        engine = Workers(Vectorized(tile=2), count)
        process = Process(KIND.model(), algorithm, engine=engine)
        data = KIND.data((*SIZES, 3))
        state, _ = process.next(process.init(), data)
        if count > 1:
            monkeypatch.setattr(Board, "get", noting)
        evaluation = process.evaluate(state, data, split="train")
        other = atoll.evaluate(process.model, process.vector(state), data, split="train", buffers=state.buffers)
        assert torch.equal(evaluation.values, other.values) and torch.equal(evaluation.examples, other.examples)
        assert evaluation.examples.tolist() == [*map(float, SIZES), 3.0]
        found.append(evaluation)
        engine.stop()
    assert asked.count("sums") > 3, "the workers did not take part"
    assert torch.equal(found[0].values, found[1].values)


def test_personal_models_are_evaluated_by_workers_too() -> None:
    data, found = KIND.data(SIZES), []
    for count in (1, 2):
        process = Process(KIND.model(metrics=("accuracy",)), fedbn(PLAN), engine=Vectorized(tile=2), workers=count)
        state, _ = process.next(process.init(), data, ["c0", "c2", "c3", "c4"])
        found.append(process.evaluate(state, data, personal=True))
        process.engine.stop()
    assert torch.equal(found[0].values, found[1].values) and found[0].names == ("loss", "accuracy")


def test_clients_drawn_for_a_round_reach_the_workers() -> None:
    kind = MODELS["perceptron"]
    packed = kind.data(SIZES)
    lazy = FederatedDataset.from_source(packed.clients, lambda c: (packed[c].train["x"], packed[c].train["y"]))
    ends: list[Tensor] = []
    for data, count in ((packed, 1), (lazy, 1), (lazy, 2)):
        process = Process(kind.model(), scaffold(PLAN), engine=Vectorized(tile=2), workers=count)
        state = process.init()
        for cohort in (["c4", "c1", "c2"], ["c0", "c1", "c6"], ["c5", "c4", "c3", "c2"]):
            state, _ = process.next(state, data, cohort)
        ends.append(process.vector(state))
        process.engine.stop()
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


# --- faults -----------------------------------------------------------------------------------------------------------


def troubled(act: Callable[[Cohort], None]) -> Algorithm:
    """Scaffold whose local work first does something else."""
    base = scaffold(PLAN)

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        act(cohort)
        return base.local(message, memory, cohort)

    return replace(base, local=local)


def test_a_worker_that_dies_is_replaced_and_its_clients_are_done_again(tmp_path: Path) -> None:
    driver, flag = os.getpid(), tmp_path / "died"

    def die_once(cohort: Cohort) -> None:
        if os.getpid() != driver and cohort.round == 1 and "c4" in cohort.clients and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    expected = played(1, troubled(lambda cohort: None))
    engine = Workers(Vectorized(tile=2), 2)
    with pytest.warns(UserWarning, match=r"round 2: a worker ended by signal SIGKILL at .*c4"):
        found = run(KIND.model(), KIND.data(SIZES), troubled(die_once), engine, rounds=3)[2]
    engine.stop()
    assert flag.exists()
    bits(found, expected)
    assert any("SIGKILL" in note for note in engine.inner.notes)


def test_the_same_clients_killing_two_workers_stop_the_run_by_name() -> None:
    driver = os.getpid()

    def die(cohort: Cohort) -> None:
        if os.getpid() != driver and "c3" in cohort.clients:
            os._exit(7)

    process = Process(KIND.model(), troubled(die), engine=Vectorized(tile=1), workers=2)
    data, state = KIND.data(SIZES), process.init()
    with (
        pytest.warns(UserWarning, match="exit code 7"),
        pytest.raises(RunError, match=r"round 1: two workers ended with exit code 7.*\(c3\)"),
    ):
        process.next(state, data)
    again, _ = process.next(state, data, ["c0", "c1"])  # nothing was lost, and new workers start
    assert again.round == 1
    process.engine.stop()


def test_an_error_shows_where_it_happens() -> None:
    def fail(cohort: Cohort) -> None:
        if "c3" in cohort.clients:
            raise ZeroDivisionError("a bug of one's own")

    process = Process(KIND.model(), troubled(fail), engine=Vectorized(tile=2), workers=2)
    state, data = process.init(), KIND.data(SIZES)
    with pytest.raises(ZeroDivisionError, match="a bug of one's own") as caught:
        process.next(state, data)
    assert any(entry.name == "fail" for entry in caught.traceback), "the place is lost"
    process.next(state, data, ["c0", "c1", "c4"])
    process.engine.stop()


def test_divergence_is_told_by_name_and_leaves_the_memory_alone() -> None:
    kind, base = MODELS["perceptron"], scaffold(PLAN)

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        update, renewed = base.local(message, memory, cohort)
        return update.replace(mean=update.mean * float("inf")), renewed

    process = Process(kind.model(), replace(base, local=local), engine=Vectorized(tile=2), workers=2)
    state, data = process.init(), kind.data(SIZES)
    with pytest.raises(NonFiniteError, match="non-finite at c"):
        process.next(state, data)
    assert len(state.memory) == 0
    process.engine.stop()


def test_out_of_memory_halves_the_tile_and_says_so() -> None:
    driver, seen = os.getpid(), list[int]()

    def greedy(cohort: Cohort) -> None:
        if len(cohort.clients) > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")
        if os.getpid() == driver:
            seen.append(len(cohort.clients))

    expected = played(1, troubled(lambda cohort: None))
    for count in (1, 2):
        engine = Workers(Vectorized(tile=4), count)
        found = run(KIND.model(), KIND.data(SIZES), troubled(greedy), engine, rounds=3)[2]
        same(found, expected)
        told = engine.describe()["notes"]
        halved = [f"out of memory: tiles of {n} clients were halved" for n in (4, 3)]
        assert [note for note in told if note.startswith("out of memory")] == halved
        assert len(told) == len(halved) + (count > 1), "that it failed in a worker is said too"
        engine.stop()
    assert set(seen) == {1, 2}

    def hopeless(cohort: Cohort) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        run(KIND.model(), KIND.data(SIZES), troubled(hopeless), Vectorized(tile=4))


def test_ended_workers_leave_no_process_behind() -> None:
    process = Process(KIND.model(), fedavg(PLAN), engine=Vectorized(tile=2), workers=2)
    process.next(process.init(), KIND.data(SIZES))
    crew = process.engine._crew  # type: ignore[attr-defined]
    pids = [w.pid for w in crew._workers]
    assert len(pids) == 2 and all(os.path.exists(f"/proc/{pid}") for pid in pids)
    del crew, process
    gc.collect()  # driver and workers' crew know each other
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


# --- choices ----------------------------------------------------------------------------------------------------------


def test_short_rounds_stay_in_one_process_and_long_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(KIND.model(), fedavg(PLAN), engine=Vectorized(tile=2), workers="auto")
    data, state = KIND.data(SIZES), process.init()
    process = Process(KIND.model(), fedavg(PLAN))
    for _ in range(4):
        state, _ = process.next(state, data)
    assert process.engine.describe()["workers"] == 1, "one tile cannot be shared"
    monkeypatch.setattr("atoll.engines.workers.START_SECONDS", 0.0)
    monkeypatch.setattr("atoll.engines.workers.cores", lambda: 2)
    engine = Workers(Vectorized(tile=2))
    process = Process(KIND.model(), fedavg(PLAN), engine=engine)
    state = process.init()
    for expected in (1, 2, 2):
        state, _ = process.next(state, data)
        assert engine.describe()["workers"] == expected
    engine.stop()


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "two"])
def test_wrong_counts_are_refused(count: object) -> None:
    with pytest.raises(InvalidArgument, match="workers="):
        Process(KIND.model(), fedavg(PLAN), workers=count)  # type: ignore[arg-type]


def test_where_processes_cannot_be_forked_several_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(InvalidArgument, match=r'workers=2.*cannot be forked safely.*engine="ray"'):
        Process(KIND.model(), fedavg(PLAN), workers=2)
    assert Process(KIND.model(), fedavg(PLAN), workers="auto").engine.describe()["workers"] == 1
    assert cores() >= 1


def test_new_data_or_another_memory_makes_new_workers() -> None:
    process = Process(KIND.model(), scaffold(PLAN), engine=Vectorized(tile=2), workers=2)
    ends: list[Tensor] = []
    for seed in (0, 0, 1):
        state, _ = process.next(process.init(), KIND.data(SIZES, seed=seed))
        ends.append(process.vector(state))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])
    process.engine.stop()


def test_a_run_says_how_many_workers_it_had() -> None:
    kind = MODELS["perceptron"]
    result = atoll.simulate(
        kind.model(),
        kind.data(SIZES),
        algorithm=fedavg(PLAN),
        rounds=2,
        workers=2,
        engine=Vectorized(tile=2),
        progress=False,
    )
    assert result.engine["workers"] == 2


# --- parts ------------------------------------------------------------------------------------------------------------


def test_boards_carry_any_tensor() -> None:
    board = Board()
    given = {
        "half": torch.randn(3, 2).bfloat16(), "nothing": torch.empty(0, 4), "number": torch.tensor(7),
        "flags": torch.tensor([True, False]), "turned": torch.arange(6.0).view(2, 3).T, "wide": torch.randn(1000),
    }  # fmt: skip
    spec, end = board.put(given)
    assert board.region.size >= end
    found = board.get(spec)
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in given.items())
    more, _ = board.put({"more": torch.ones(5)}, end)
    assert torch.equal(board.get(more)["more"], torch.ones(5)) and torch.equal(board.get(spec)["wide"], given["wide"])


def test_a_window_reads_and_writes_what_it_was_given(tmp_path: Path) -> None:
    for path in (None, tmp_path / "memory.bin"):
        memory = ClientMemory(Layout(("a",), ((2,),)), torch.float32, path)
        memory.share()
        memory.stage(["x"], torch.ones(1, 2))
        memory.commit()
        read, write = memory.slots(["x", "y"]), memory.reserve(["x", "y"])
        window = memory.window(["x", "y"], read, write, memory.capacity)
        assert window.rows(["y", "x"], torch.zeros(2)).tolist() == [[0.0, 0.0], [1.0, 1.0]]
        window.stage(["x", "y"], torch.tensor([[2.0, 2.0], [3.0, 3.0]]))
        assert memory.rows(["x"], torch.zeros(2)).tolist() == [[1.0, 1.0]], "not before the commit"
        memory.commit()
        assert memory.rows(["x", "y"], torch.zeros(2)).tolist() == [[2.0, 2.0], [3.0, 3.0]]


def test_workers_end_with_their_driver() -> None:
    """A driver killed outright leaves no worker that holds its lock."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            process = Process(KIND.model(), fedavg(PLAN), engine=Vectorized(tile=2), workers=2)
            process.next(process.init(), KIND.data(SIZES))
            workers = process.engine._crew._workers  # type: ignore[attr-defined]
            os.write(writer, ",".join(str(w.pid) for w in workers).encode() + b"\n")
        finally:  # whatever happened, this process must not go on as a second pytest
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    pids = [int(p) for p in os.read(reader, 100).decode().split(",")]
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"", "a worker kept a pipe open"  # end of file: nobody holds it any more
    os.close(reader)
    assert len(pids) == 2


def test_a_worker_that_dies_while_it_waits_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = played(1, scaffold(PLAN), tile=1)
    monkeypatch.setattr("atoll.engines.workers.BOARD_BYTES", 1)
    engine = Workers(Vectorized(tile=1), 2)
    process = Process(KIND.model(), scaffold(PLAN), engine=engine)
    data, state, killed = KIND.data(SIZES), process.init(), list[int]()
    real = process.engine.run

    def watched(*given: Any) -> Any:
        for partial in real(*given):
            yield partial
            for worker in engine._crew._workers if not killed else ():  # type: ignore[union-attr]
                if worker.waiting:
                    killed.append(worker.pid)
                    os.kill(worker.pid, signal.SIGKILL)
                    break

    monkeypatch.setattr(engine, "run", watched)
    cohorts = [list(data.clients), list(data.clients)[::2]]
    with pytest.warns(UserWarning, match="SIGKILL"):
        for number in range(3):
            state, _ = process.next(state, data, cohorts[number % 2])
    engine.stop()
    assert killed and torch.equal(process.vector(state), expected["vector"])


def test_evaluation_finds_its_metrics_where_examples_are() -> None:
    """The clients of the first tiles have no test examples."""
    draw = torch.Generator().manual_seed(0)

    def some(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 4, generator=draw, dtype=torch.float64), torch.randint(0, 3, (n,), generator=draw)

    train = {f"c{i}": some(n) for i, n in enumerate((9, 8, 7, 6, 5))}
    data, found = FederatedDataset.from_arrays(train, test={f"c{i}": some(3) for i in (2, 4)}), []
    for count in (1, 2):
        model = MODELS["perceptron"].model(metrics=("accuracy",))
        process = Process(model, fedper(PLAN, private=("head.*",)), engine=Vectorized(tile=1), workers=count)
        state, _ = process.next(process.init(), data)
        found.append(process.evaluate(state, data, personal=True))
        process.engine.stop()
    torch.testing.assert_close(found[1].values, found[0].values, rtol=0, atol=0, equal_nan=True)
    assert found[1].names == ("loss", "accuracy")


def test_threads_and_workers_do_not_mix() -> None:
    with pytest.raises(InvalidArgument, match=r"workers=2.*several threads"):
        Process(KIND.model(), fedavg(PLAN), engine=Vectorized(threads=2), workers=2)
    assert Workers(Vectorized(threads=2)).describe()["workers"] == 1


def test_a_child_of_the_users_own_leaves_the_workers_alone() -> None:
    process = Process(KIND.model(), fedavg(PLAN), engine=Vectorized(tile=2), workers=2)
    data = KIND.data(SIZES)
    state, _ = process.next(process.init(), data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            process.engine.stop()  # as the interpreter does when it ends
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        process.next(state, data)
    process.engine.stop()
