"""The driver of rounds: what it records, refuses, survives and resumes."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import atoll
import atoll.journal
import atoll.result
from atoll.errors import AtollError, CompositionError, DataError, Interrupted, NonFiniteError, RunError

ROUNDS = 6


def data(clients: int = 6, *, seed: int = 0, test: float | None = 0.25) -> atoll.FederatedDataset:
    draw = torch.Generator().manual_seed(seed)
    truth = torch.randn(4, 3, generator=draw)
    made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for i in range(clients):
        x = torch.randn(8 + 3 * i, 4, generator=draw)
        made[f"c{i}"] = (x, (x @ truth).argmax(1))
    return atoll.FederatedDataset.from_arrays(made, test=test)


def model() -> atoll.Model:
    torch.manual_seed(0)
    return atoll.Model(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "cross_entropy", ("accuracy",))


def run(**changes: object) -> atoll.Result:
    arguments: dict[str, object] = {
        "algorithm": atoll.scaffold(atoll.local_sgd(0.1, epochs=2, batch_size=4), server=atoll.server.adam(0.1)),
        "rounds": ROUNDS,
        "cohort": atoll.sampling.poisson(0.5),
        "seed": 3,
        "progress": False,
    } | changes
    return atoll.simulate(model(), data(), **arguments)  # type: ignore[arg-type]


def test_history_has_a_record_for_each_round() -> None:
    seen: list[int] = []
    result = run(callbacks=(lambda record: seen.append(record.round),), cohort=3)
    assert seen == [record.round for record in result.history] == list(range(1, ROUNDS + 1))
    last = result.history[-1]
    assert last.clients == 3
    assert 0 <= last.test["accuracy"] <= 1 and last.test["loss"] > 0
    assert set(last.spread["accuracy"]) == {"mean", "weighted", "worst_decile", "std", "undefined"}
    # Up: x and the variate in float32, the weight and two metrics in 8 bytes each; down: model and variate.
    assert last.bytes_up == 3 * (2 * 43 * 4 + 8 + 16)
    assert last.bytes_down == 3 * 2 * 43 * 4
    assert result.to_frame().loc[ROUNDS, "test_accuracy"] == last.test["accuracy"]


def test_same_seed_same_bits_and_another_seed_differs() -> None:
    first, second, other = run(), run(), run(seed=4)
    assert torch.equal(first.vector, second.vector)
    assert not torch.equal(first.vector, other.vector)


def test_cohorts_too_small_for_the_rule_make_no_step_and_do_not_end_the_run() -> None:
    given = {"algorithm": atoll.fedavg(atoll.local_sgd(0.1)), "aggregator": atoll.aggregators.trimmed_mean(drop=1)}
    sampler, names = atoll.sampling.poisson(0.5), data().clients
    sizes = [len(sampler.cohort(3, r, names)) for r in range(8)]
    result = run(rounds=8, evaluate_every=0, **given)
    assert 0 < sum(size >= 3 for size in sizes) < 8
    for record, size in zip(result.history, sizes, strict=True):
        assert record.clients == (size if size >= 3 else 0)
        assert any("trimmed_mean needs at least 3 clients" in note for note in record.notes) == (0 < size < 3)
    with pytest.raises(CompositionError, match=r"needs at least 3 clients.* has 2"):
        run(cohort=atoll.sampling.poisson(2 / len(names)), **given)


def test_evaluate_every() -> None:
    result = run(rounds=5, evaluate_every=2)
    assert [bool(r.test) for r in result.history] == [False, True, False, True, True]
    assert not any(r.test for r in run(evaluate_every=0).history)


def test_empty_cohorts_change_nothing() -> None:
    result = run(cohort=atoll.sampling.sequence([[], ["c1"], []]), rounds=3)
    assert [r.clients for r in result.history] == [0, 1, 0]
    assert math.isnan(result.history[0].loss)
    one = run(cohort=atoll.sampling.sequence([["c1"]]), rounds=1)
    # Order of batches is keyed by the round, so only the shape of the history can agree.
    assert one.vector.shape == result.vector.shape


def test_result_gives_module_predictions_and_evaluation() -> None:
    result, clients = run(), data()
    x = clients["c5"].train["x"]
    assert torch.allclose(result.module()(x), result.predict(x))
    assert torch.allclose(result.predict(x.numpy()), result.predict(x))
    evaluation = result.evaluate(clients)
    assert evaluation.metrics == pytest.approx(result.history[-1].test)
    direct = (result.predict(clients["c5"].test["x"]).argmax(1) == clients["c5"].test["y"]).double().mean()
    assert evaluation.client("c5")["accuracy"] == pytest.approx(float(direct))
    assert atoll.evaluate(result.model, result.vector, clients).metrics == pytest.approx(evaluation.metrics)


def test_save_and_load(tmp_path: Path) -> None:
    algorithm = atoll.fedper(atoll.local_sgd(0.1), private=("2.*",))
    result = run(algorithm=algorithm, cohort=None)
    loaded = atoll.Result.load(result.save(tmp_path / "saved"), model=model())
    assert torch.equal(loaded.vector, result.vector)
    assert [r.to_dict() for r in loaded.history] == [r.to_dict() for r in result.history]
    assert loaded.clients == result.clients
    assert torch.equal(loaded.personal("c2"), result.personal("c2"))
    assert not torch.equal(loaded.personal("c2"), loaded.personal("c3"))
    x = data()["c2"].train["x"]
    assert torch.equal(loaded.predict(x, client="c2"), result.predict(x, client="c2"))
    bare = atoll.Result.load(tmp_path / "saved")
    with pytest.raises(AtollError, match="needs the model"):
        bare.module()
    with pytest.raises(AtollError, match=r"no result\.json"):
        atoll.Result.load(tmp_path)


def test_pooled_trains_one_client_and_is_evaluated_at_all() -> None:
    result = run(algorithm=atoll.pooled(atoll.local_sgd(0.1)), cohort=None)
    assert result.history[0].clients == 1
    assert set(result.clients["global"]) == set(data().clients)


def test_cyclic_visits_one_client_after_the_other() -> None:
    plan = atoll.local_sgd(0.1)
    result = run(algorithm=atoll.cyclic(plan), cohort=None)
    same = run(algorithm=atoll.fedavg(plan), cohort=atoll.sampling.sequence([[f"c{i}"] for i in range(6)]))
    assert torch.equal(result.vector, same.vector)
    with pytest.raises(AtollError, match="prescribes its own order"):
        run(algorithm=atoll.cyclic(plan), cohort=2)


def test_local_only_sends_nothing_but_metrics() -> None:
    result = run(algorithm=atoll.local_only(atoll.local_sgd(0.1)), cohort=None)
    assert torch.equal(result.vector, model().init())
    assert result.history[0].bytes_up == 6 * (8 + 16)
    assert result.history[-1].personal["loss"] < result.history[-1].test["loss"]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"rounds": -3}, "rounds=-3"),
        ({"rounds": 2.0}, "rounds=2.0"),
        ({"cohort": 7}, "at most the population of 6"),
        ({"cohort": 0}, "cohort=0"),
        ({"cohort": 1.5}, "fraction"),
        ({"cohort": "all"}, "cohort="),
        ({"cohort": atoll.sampling.sequence([["nobody"]])}, "not in the data: nobody"),
        ({"evaluate_every": -1}, "evaluate_every=-1"),
        ({"splits": ("validation",)}, "no validation examples"),
        ({"splits": "test"}, "Write splits="),
        ({"algorithm": "fedavg"}, "algorithm='fedavg'"),
        ({"engine": "turbo"}, "engine='turbo' is unknown"),
        ({"aggregator": "mean"}, "aggregator='mean'"),
        ({"channel": "tls"}, "channel='tls'"),
        ({"transforms": atoll.transforms.clip_norm(1.0)}, r"Write transforms=\(clip_norm"),
        ({"initial": torch.zeros(3)}, "vector of 43 values"),
        ({"initial": torch.full((43,), math.nan)}, "finite"),
        ({"seed": "a"}, "seed='a'"),
        ({"callbacks": (3,)}, "callbacks=3"),
        ({"resume": True}, "Give directory="),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(changes: dict[str, object], text: str) -> None:
    with pytest.raises(AtollError, match=text):
        run(**changes, callbacks=changes.get("callbacks", (_never,))) if "callbacks" not in changes else run(**changes)


def _never(record: atoll.Record) -> None:
    raise AssertionError("a round was run")


def test_divergence_stops_with_the_round_the_clients_and_the_last_finite_state(tmp_path: Path) -> None:
    diverging = atoll.fedavg(atoll.local_sgd(1e18, epochs=3, batch_size=4))
    regression = atoll.Model(nn.Linear(4, 3), lambda o, t: ((o - t[:, None]) ** 2).mean(1))
    with pytest.raises(NonFiniteError, match=r"round \d+: .* at c\d.*learning rate") as caught:
        atoll.simulate(regression, data(), algorithm=diverging, rounds=9, directory=tmp_path, progress=False)
    assert torch.isfinite(caught.value.result.vector).all()
    kinds = [e.kind for e in atoll.journal.read_journal(tmp_path).events()]
    assert kinds[:2] == ["run", "checkpoint"] and "failed" in kinds and "finished" not in kinds


# --- resume -----------------------------------------------------------------------------------------------------------


def test_directory_rules(tmp_path: Path) -> None:
    run(directory=tmp_path / "a")
    with pytest.raises(RunError, match="already holds a run"):
        run(directory=tmp_path / "a")
    with pytest.raises(RunError, match="there is no run to resume"):
        run(directory=tmp_path / "b", resume=True)
    with pytest.raises(RunError, match=r"another experiment \(seed: 3 != 9"):
        run(directory=tmp_path / "a", resume=True, seed=9)
    with pytest.raises(RunError, match=r"cohort"):
        run(directory=tmp_path / "a", resume=True, cohort=2)


def test_a_directory_serves_one_process_at_a_time(tmp_path: Path) -> None:
    with atoll.journal.locked(tmp_path), pytest.raises(RunError, match="another process is running"):
        run(directory=tmp_path)


def test_a_finished_run_can_be_extended(tmp_path: Path) -> None:
    whole = run()
    run(rounds=2, directory=tmp_path)
    result = run(directory=tmp_path, resume=True)
    assert torch.equal(result.vector, whole.vector)
    assert [r.test for r in result.history] == [r.test for r in whole.history]


def test_a_run_that_goes_on_knows_whose_sum_was_shown_before(tmp_path: Path) -> None:
    """Two sums that differ by one client tell of that client, wherever the run was stopped between them."""
    channel = atoll.transforms.secure_sum(clip=1.0, weight_cap=30, dropouts={"mask": 0.05})
    algorithm = atoll.fedavg(atoll.local_sgd(0.1))
    given: dict[str, object] = {"algorithm": algorithm, "cohort": None, "channel": channel, "seed": 5}
    whole = run(**given)
    said = [any("that of a round before" in note for note in record.notes) for record in whole.history]
    before = said.index(True)
    assert before > 0
    run(rounds=before, directory=tmp_path, **given)
    assert [r.notes for r in run(directory=tmp_path, resume=True, **given).history] == [r.notes for r in whole.history]


def test_a_run_is_not_taken_back(tmp_path: Path) -> None:
    run(rounds=3, directory=tmp_path)
    with pytest.raises(AtollError, match=r"rounds=1 .* at least 3, where this run is"):
        run(rounds=1, directory=tmp_path, resume=True)


def test_a_result_keeps_its_personal_models_when_its_run_goes_on(tmp_path: Path) -> None:
    algorithm = atoll.local_only(atoll.local_sgd(0.1))
    first = run(algorithm=algorithm, cohort=None, rounds=2, directory=tmp_path)
    before = first.personal("c0").clone()
    second = run(algorithm=algorithm, cohort=None, rounds=6, directory=tmp_path, resume=True)
    assert torch.equal(first.personal("c0"), before)
    assert not torch.equal(second.personal("c0"), before)


def test_only_clients_that_were_visited_are_saved_with_a_model_of_their_own(tmp_path: Path) -> None:
    algorithm = atoll.fedper(atoll.local_sgd(0.1), private=("2.*",))
    result = run(algorithm=algorithm, cohort=atoll.sampling.sequence([["c1"]]), rounds=2)
    loaded = atoll.Result.load(result.save(tmp_path))
    assert torch.equal(loaded.personal("c1"), result.personal("c1"))
    assert torch.equal(loaded.personal("c2"), result.vector)


@pytest.mark.parametrize("method", ["ditto", "apfl", "fedper"])
def test_methods_that_keep_models_save_those_of_visited_clients(method: str, tmp_path: Path) -> None:
    plan = atoll.local_sgd(0.1)
    algorithm = {
        "ditto": atoll.ditto(plan, lam=0.5), "apfl": atoll.apfl(plan), "fedper": atoll.fedper(plan, private=("2.*",)),
    }[method]  # fmt: skip
    result = run(algorithm=algorithm, cohort=atoll.sampling.sequence([["c1"]]), rounds=2)
    stored = safetensors.torch.load_file(result.save(tmp_path) / "result.safetensors")
    assert {n for n in stored if n.startswith("personal/")} == {"personal/c1"}
    loaded = atoll.Result.load(tmp_path)
    for client in ("c1", "c2"):
        assert torch.equal(loaded.personal(client), result.personal(client))


def test_many_models_made_for_whoever_asks_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = atoll.fine_tune(atoll.local_sgd(0.1))
    loaded = atoll.Result.load(run(algorithm=algorithm, rounds=1).save(tmp_path / "all"))
    with pytest.raises(RunError, match=r"no personal model of client 'x9': resume the run"):
        loaded.personal("x9")
    monkeypatch.setattr(atoll.result, "PERSONAL_CLIENTS", 5)
    result = run(algorithm=algorithm, rounds=1, directory=tmp_path / "run")
    result.save(tmp_path / "run")
    assert [n.partition(":")[0] for n in result.notes if "saved" in n] == [
        "the personal models of 6 clients (0.0 GiB) were not saved"
    ]
    assert not torch.equal(result.personal("c1"), result.vector), "the result of a run can still make them"
    loaded = atoll.Result.load(tmp_path / "run", model())
    assert loaded.notes == result.notes
    for ask in (loaded.personal, loaded.module, lambda client: loaded.predict(torch.ones(1, 4), client)):
        with pytest.raises(RunError, match=r"saved with no personal models: resume the run.*resume=True"):
            ask("c1")
    again = run(algorithm=algorithm, rounds=1, directory=tmp_path / "run", resume=True)
    assert torch.equal(again.personal("c1"), result.personal("c1"))


def test_saving_never_draws_a_lazy_population_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, asked = data(8, test=None), list[int]()
    lazy = atoll.FederatedDataset.from_source(
        packed.clients, lambda c: (packed[c].train["x"], packed[c].train["y"]), version="1"
    )
    draw = type(lazy).draw

    def watched(self: object, clients: Sequence[str]) -> atoll.FederatedDataset:
        asked.append(len(clients))
        return draw(self, clients)  # type: ignore[arg-type]

    monkeypatch.setattr(type(lazy), "draw", watched)
    monkeypatch.setattr(atoll.result, "PERSONAL_CLIENTS", 3)
    for algorithm, most in (
        (atoll.fine_tune(atoll.local_sgd(0.1)), 0),
        (atoll.ditto(atoll.local_sgd(0.1), lam=1.0), 3),
    ):
        result = atoll.simulate(model(), lazy, algorithm=algorithm, rounds=4, cohort=2, evaluate_every=0)
        asked.clear()
        result.save(tmp_path / str(most))
        assert max(asked, default=0) <= most
        assert bool(result.notes) == (most == 0)


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path) -> None:
    whole = run()
    run(rounds=4, directory=tmp_path, checkpoint_every=1)
    newest = max((tmp_path / "checkpoints").glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[-3] ^= 0xFF
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"round-00000004.* is damaged and was passed over.*continues from round 3"):
        result = run(directory=tmp_path, resume=True)
    assert torch.equal(result.vector, whole.vector)
    assert "damaged" in result.notes[0]
    for path in (tmp_path / "checkpoints").glob("*.safetensors"):
        path.write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"no whole checkpoint.*damaged"):
        run(directory=tmp_path, resume=True)


def test_not_a_journal(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"this is not a database, it only says so" * 100)
    with pytest.raises(RunError, match="is not a journal"):
        run(directory=tmp_path)


def test_ctrl_c_stops_after_the_round_and_says_how_to_resume(tmp_path: Path) -> None:
    def press(record: atoll.Record) -> None:
        if record.round == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    if threading.current_thread() is not threading.main_thread():
        pytest.fail("this test needs the main thread")
    with pytest.raises(Interrupted, match=r"stopped after round 3 of 6; continue with directory=.*resume=True") as stop:
        run(directory=tmp_path, callbacks=(press,))
    assert len(stop.value.result.history) == 3
    assert torch.equal(run(directory=tmp_path, resume=True).vector, run().vector)
    with pytest.raises(Interrupted, match="no directory was given"):
        run(callbacks=(press,))


CHILD = """
import os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import atoll.journal
import atoll.result
import atoll.memory
from test_simulation import run

die_at, where = int(sys.argv[2]), 0

def mortal(function):
    def wrapped(*arguments, **named):
        global where
        for after in (False, True):
            where += 1
            if where == die_at:
                os._exit(9)
            if not after:
                result = function(*arguments, **named)
        return result
    return wrapped

atoll.journal.write_atomically = mortal(atoll.journal.write_atomically)
atoll.journal.os.replace = mortal(os.replace)
atoll.journal.DatabaseJournal.append = mortal(atoll.journal.DatabaseJournal.append)
atoll.memory.ClientMemory.commit = mortal(atoll.memory.ClientMemory.commit)
atoll.memory.ClientMemory.pin = mortal(atoll.memory.ClientMemory.pin)
result = run(directory=sys.argv[1], resume=os.path.exists(sys.argv[1]), checkpoint_every=2)
print(result.vector.double().sum().item().hex())
"""


@pytest.mark.slow
def test_killed_at_every_write_the_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Each start dies one write later than the one before it; every start resumes what the last one left."""
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(tests=str(Path(__file__).parent)))
    expected = run().vector.double().sum().item().hex()
    for stride in (1, 2, 5):
        directory, died, die_at = tmp_path / f"run{stride}", 0, 1
        while True:
            done = subprocess.run(
                [sys.executable, str(script), str(directory), str(die_at)], capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                break
            assert done.returncode == 9, done.stderr
            died, die_at = died + 1, die_at + stride
            assert died < 60
        assert died > 3
        assert done.stdout.split()[-1] == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_with_sigkill_the_run_ends_with_the_same_bits(workers: int, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import sys, time\nimport torch\ntorch.set_num_threads(1)\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_simulation import run\n"
        "def tell(record):\n    print(record.round, flush=True)\n    time.sleep(0.05)\n"
        f"run(directory={str(tmp_path / 'run')!r}, checkpoint_every=2, callbacks=(tell,), workers={workers})\n"
    )
    child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "5":
            child.kill()
            break
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    result = run(directory=tmp_path / "run", resume=True, workers=3 - workers)
    assert torch.equal(result.vector, run().vector)
    assert [r.round for r in result.history] == list(range(1, ROUNDS + 1))


# --- data that is not at hand -----------------------------------------------------------------------------------------


def packed() -> atoll.FederatedDataset:
    return atoll.FederatedDataset.from_arrays({c: (data()[c].train["x"], data()[c].train["y"]) for c in data().clients})


@pytest.mark.parametrize("workers", [1, 2])
def test_a_lazy_population_gives_the_bits_of_the_packed_one(workers: int) -> None:
    whole = packed()
    lazy = atoll.FederatedDataset.from_source(
        whole.clients, lambda c: (whole[c].train["x"], whole[c].train["y"]), test=0.4, seed=3
    )
    cut = whole.split(test=0.4, seed=3)
    engine = atoll.engines.Vectorized(tile=1)
    plan = {"rounds": 4, "cohort": 3, "splits": ("train", "test"), "algorithm": atoll.scaffold(atoll.local_sgd(0.1))}
    ends = [
        atoll.simulate(model(), d, engine=engine, workers=workers, progress=False, **plan)  # type: ignore[arg-type]
        for d in (cut, lazy)
    ]
    assert torch.equal(ends[0].vector, ends[1].vector)
    for one, other in zip(ends[0].history, ends[1].history, strict=True):
        assert one.test == pytest.approx(other.test) and one.train == pytest.approx(other.train)
    quiet = atoll.simulate(model(), lazy, progress=False, **{**plan, "splits": None})  # type: ignore[arg-type]
    assert not quiet.history[-1].test, "what must be drawn for it is evaluated only when it is asked for"


def test_a_file_that_changes_under_a_run_stops_it_and_the_run_can_go_on(tmp_path: Path) -> None:
    packed().save(tmp_path / "data")
    held = atoll.FederatedDataset.open(tmp_path / "data")
    name = next(p for p in sorted((tmp_path / "data").iterdir()) if p.suffix == ".bin")
    before, stamp = name.read_bytes(), name.stat().st_mtime_ns

    def spoil(record: atoll.Record) -> None:
        if record.round == 2:
            name.write_bytes(before)
            os.utime(name, ns=(stamp + 10**9, stamp + 10**9))

    plan = {"rounds": 4, "algorithm": atoll.fedavg(atoll.local_sgd(0.1)), "progress": False}
    with pytest.raises(DataError, match=rf"{name.name}.*changed"):
        atoll.simulate(model(), held, directory=tmp_path / "run", callbacks=(spoil,), **plan)  # type: ignore[arg-type]
    os.utime(name, ns=(stamp, stamp))
    again = atoll.FederatedDataset.open(tmp_path / "data")
    result = atoll.simulate(model(), again, directory=tmp_path / "run", resume=True, **plan)  # type: ignore[arg-type]
    assert torch.equal(result.vector, atoll.simulate(model(), packed(), **plan).vector)  # type: ignore[arg-type]
    assert [r.round for r in result.history] == [1, 2, 3, 4]
