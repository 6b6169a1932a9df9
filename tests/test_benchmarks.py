"""Every benchmark runs in its quick mode and writes what it promises; the long run's memory, at a small scale."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from atoll.bench import figures, workloads

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = (
    "compression", "compression_speed", "deployment", "flamby_heart", "inversion", "long_run", "method_time",
    "mnist_2nn", "mnist_cnn", "niid_mnist", "opacus_mnist", "personalisation", "privacy", "recipes", "robustness",
    "round_time", "rules", "scale", "secagg", "transfer",
)  # fmt: skip
SHARED = ("mnist_images", "reporting")
SPEED = (
    "run",
    "scaling",
    "gpu_check",
    "environments",
    "figures",
    "workloads",
    "networks",
    "modules",
    "harness",
    "digest",
)
MNIST_FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import a benchmark as its script would be."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "speed"))
    yield importlib.import_module
    for name in (*NAMES, *SPEED, *SHARED):
        sys.modules.pop(name, None)


def arguments(name: str, scratch: Path) -> list[str]:
    """What a quick run takes on this machine."""
    folder = Path(os.environ.get("ATOLL_DATA", "/nonexistent"))
    at_hand = any(all((place / file).exists() for file in MNIST_FILES) for place in (folder, folder / "mnist"))
    synthetic = ["--synthetic"] if name in ("compression", "mnist_2nn", "robustness") and not at_hand else []
    return [*synthetic, *(["--keep", str(scratch / "kept")] if name in ("personalisation", "robustness") else [])]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in ("deployment", "long_run", "recipes") else []) for n in NAMES],
)
def test_quick_run_writes_its_result(name: str, load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "transfer" and not (Path(os.environ.get("ATOLL_DATA", "/nonexistent")) / "gtsrb-third.zip").is_file():
        pytest.skip("the pictures of traffic signs are not at hand")
    threads = torch.get_num_threads()
    kept = {path: path.read_bytes() for path in (BENCHMARKS / "results").glob("*")}
    assert load(name).main(["--quick", "--out", str(tmp_path / "found"), *arguments(name, tmp_path)]) == 0
    page, body = (tmp_path / "found.md").read_text(), json.loads((tmp_path / "found.json").read_text())
    assert "A quick run" in page
    assert body["quick"] is True
    assert body["context"]["command"].startswith(f"python benchmarks/{name}.py --quick")
    assert str(tmp_path) not in page
    assert set(body["context"]) == {
        "CPU", "load", "memory", "system", "python", "torch", "numpy", "atoll", "command", "date"
    }  # fmt: skip
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "| " in capsys.readouterr().out
    assert kept == {path: path.read_bytes() for path in (BENCHMARKS / "results").glob("*")}, "the results stay"
    assert torch.get_num_threads() == threads


def test_readme_and_results_cover_every_benchmark() -> None:
    readme = (BENCHMARKS / "README.md").read_text()
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - set(SHARED)
    assert scripts == set(NAMES)
    for name in NAMES:
        (row,) = (line for line in readme.splitlines() if line.startswith(f"| `{name}.py` |"))
        if "no full run is recorded yet" in row:
            assert not (BENCHMARKS / "results" / f"{name}.json").exists()
            continue
        assert f"results/{name}.md" in row
        body = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
        assert body["quick"] is False
        assert body["passed"] is True or "not met" in row, "what failed is told to have failed"
        assert (BENCHMARKS / "results" / f"{name}.md").exists()


def test_recipes_that_are_not_run_keep_what_is_recorded_of_them(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = load("recipes")
    monkeypatch.setattr(recipes, "RESULTS", tmp_path)
    assert recipes.recorded(["iot"]) == {}
    (tmp_path / "recipes.json").write_text(json.dumps({"recipes": {"iot": {"tables": []}, "voice": {"tables": [1]}}}))
    assert recipes.recorded(["iot"]) == {"voice": {"tables": [1]}}


def test_a_stopped_search_for_rates_goes_on_where_it_was(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    personal = load("personalisation")
    words = ["--quick", "--keep", str(tmp_path / "kept"), "--out", str(tmp_path / "found")]
    monkeypatch.setattr(personal, "METHODS", {n: personal.METHODS[n] for n in ("fedavg", "fedper", "local_only")})
    personal.main(words)
    first = (tmp_path / "found.md").read_text().partition("## Where")[0]
    lines = (tmp_path / "kept").read_text().splitlines()
    assert len(lines) == 3
    (tmp_path / "kept").write_text("\n".join(lines[:2]) + "\n")
    trained: list[str] = []
    tuned = personal.tuned

    def counted(method: str, *rest: object) -> object:
        trained.append(method)
        return tuned(method, *rest)

    monkeypatch.setattr(personal, "tuned", counted)
    personal.main(words)
    assert trained == ["local_only"], "the others were kept"
    assert (tmp_path / "found.md").read_text().partition("## Where")[0] == first


def test_flamby_patients_are_the_published_ones(load: Load) -> None:
    flamby = load("flamby_heart")
    hearts = flamby.patients()
    sizes = [(len(hearts.own[c].train["y"]), len(hearts.own[c].test["y"])) for c in flamby.HOSPITALS]
    assert sizes == [(199, 104), (172, 89), (30, 16), (85, 45)]
    for hospital in flamby.HOSPITALS:
        x = hearts.own[hospital].train["x"]
        assert x.shape[1] == 13
        assert torch.allclose(x.mean(dim=0), torch.zeros(13), atol=1e-4)
    together = hearts.pooled.train.fields["x"]
    assert torch.allclose(together.std(dim=0), torch.ones(13), atol=1e-4)


def test_published_figures_are_those_of_the_paper(load: Load) -> None:
    table = load("flamby_heart").published()
    means = {name: [round(sum(c) / len(c), 3) for c in zip(*rows, strict=True)] for name, rows in table.items()}
    assert means["fedavg"] == [0.731, 0.719, 0.650, 0.640, 0.748]
    assert means["fedyogi"] == means["fedadagrad"] == [0.760, 0.753, 0.738, 0.676, 0.779]
    assert means["pooled"] == [0.783, 0.764, 0.750, 0.644, 0.795]


def test_contestants_compute_the_same_round(load: Load) -> None:
    race = load("round_time")
    for name, tile in (("W1", 4), ("W2", 2)):
        small = race.replace(race.WORKLOADS[name], clients=8, cohort=6, tile=tile)
        assert race.agreement(small, *race.examples(small)) < race.AGREEMENT


def test_slope_finds_growth_and_its_absence(load: Load) -> None:
    slope = load("long_run").slope
    rounds = list(range(5, 1001, 5))
    noise = torch.randn(len(rounds), generator=torch.Generator().manual_seed(0)).mul(0.1).tolist()
    still = slope(rounds, [100 + e for e in noise], 200)
    growing = slope(rounds, [100 + 0.02 * r + e for r, e in zip(rounds, noise, strict=True)], 200)
    assert -0.2 < still[1] <= still[0] <= still[2] < 0.2
    assert 19.8 < growing[1] <= growing[0] <= growing[2] < 20.2


@pytest.mark.parametrize("directory", [pytest.param(False, marks=pytest.mark.slow), True])
def test_client_memory_does_not_grow_once_all_have_been_visited(load: Load, tmp_path: Path, directory: bool) -> None:
    long = load("long_run")
    found = long.run("scaffold", long.SMALL, tmp_path / "run" if directory else None)
    settled = next(i for i, number in enumerate(found["round"]) if number > long.SMALL.settled)
    # A row for every client and round would be 7 MiB, a copy of the data for every round hundreds.
    assert found["anonymous"][-1] - found["anonymous"][settled] < 4
    assert found["resident"][-1] - found["resident"][settled] < 16


# --- scale ------------------------------------------------------------------------------------------------------------


def test_a_client_has_the_same_examples_in_every_population(load: Load) -> None:
    scale = load("scale")
    whole = scale.packed(50)
    x, y = scale.load("37")
    assert torch.equal(whole["37"].train["x"], x) and torch.equal(whole["37"].train["y"], y)
    everything = whole.train.fields["x"]
    assert everything.min() >= -1 and everything.max() < 1 and abs(float(everything.mean())) < 0.1
    assert len(everything.unique()) > 0.99 * everything.numel()


def test_memory_of_a_large_model_is_counted_in_vectors(load: Load) -> None:
    scale = load("scale")
    small = replace(scale.FULL, width=1200)  # 5.8 million parameters, whose weights stand as factors
    large = scale.fresh("large", small, Path())
    assert set(large["engine"]["factors"]) == {"0.weight", "2.weight"}
    assert large["parameters"] == 2 * 1200 * 2400 + 3600
    # Beside vectors there is what the libraries load for the first round, some 120 MiB.
    assert large["peak"] - large["given"] < (scale.VECTORS + 1) * large["vector"] + 128


# --- speed ------------------------------------------------------------------------------------------------------------

HASHES = """
import hashlib
import sys
import numpy as np

def hashes(workloads, names):
    for name in names:
        load = workloads.smaller(workloads.WORKLOADS[name])
        data = workloads.examples(load, folder="/nonexistent")
        parts = (data.x, data.y, data.offsets, workloads.cohort(load, 3), workloads.order(load, 2, 5, 40),
                 workloads.flat(workloads.initial(load), load))
        yield name, hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()
"""


def test_workloads_are_the_same_in_an_environment_with_numpy_alone() -> None:
    names = ("W1", "W4", "N5")
    found: dict[str, object] = {}
    exec(HASHES, found)
    here = dict(found["hashes"](workloads, names))  # type: ignore[operator]
    folder = Path(workloads.__file__).parent
    script = (
        "import sys\nfor name in ('torch', 'atoll', 'pandas'):\n    sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(folder)!r})\nimport workloads\n{HASHES}\n"
        f"for name, value in hashes(workloads, {names!r}):\n    print(name, value)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert dict(line.split() for line in done.stdout.splitlines()) == here


def test_workloads_have_the_shapes_they_are_known_by() -> None:
    known = {
        "W1": (1000, 100, 100, 10, 2114), "W2": (1000, 60, 50, 20, 159010), "W3": (200, 100, 10, 20, 608702),
        "W4": (1000, 60, 50, 20, 159010), "W5": (1000, 60, 10, 10, 7850), "W6": (1000, 50, 50, 10, 1626442),
    }  # fmt: skip
    for name, (clients, examples, cohort, batch, parameters) in known.items():
        load = workloads.WORKLOADS[name]
        assert (load.clients, load.examples, load.cohort, load.batch) == (clients, examples, cohort, batch), name
        assert sum(int(np.prod(shape)) for shape in workloads.shapes(load).values()) == parameters, name
        chosen = workloads.cohort(load, 0)
        assert len(set(chosen.tolist())) == cohort and chosen.max() < clients and (np.diff(chosen) > 0).all()
        assert not np.array_equal(chosen, workloads.cohort(load, 1))
    sizes = workloads.sizes(workloads.WORKLOADS["W4"])
    assert sizes.min() >= 5 and sizes.max() <= 1000 and 55 <= np.median(sizes) <= 65 and len(set(sizes.tolist())) > 100
    equal = workloads.sizes(workloads.WORKLOADS["W4E"])
    assert len(set(equal.tolist())) == 1 and abs(equal.sum() / sizes.sum() - 1) < 0.01
    assert set(workloads.ROUNDS) == set(workloads.WORKLOADS)


@pytest.mark.parametrize("name", sorted(workloads.WORKLOADS))
def test_networks_and_the_digest_are_of_one_model(name: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch module and the forward in numpy, which compares everybody's models, give the same outputs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "speed" / "contestants"))
    harness, modules = load("harness"), load("modules")
    small = workloads.smaller(workloads.WORKLOADS[name])
    module = modules.module(small).eval()
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == workloads.shapes(small)
    data = workloads.examples(small, folder="/nonexistent")
    with torch.no_grad():
        outputs = module(torch.from_numpy(data.x[:20]))
    again = harness.digest.forward(small, workloads.initial(small), data.x[:20])
    torch.testing.assert_close(outputs, torch.from_numpy(again.astype(np.float32)), rtol=1e-4, atol=1e-5)
    vector = workloads.flat(workloads.initial(small), small)
    found = harness.digest.digest(small, vector, data)
    assert found["norm"] == pytest.approx(float(np.linalg.norm(vector)), rel=1e-5) and found["loss"] > 0


def test_the_contest_runs_and_everybody_trains_the_same_model(load: Load, tmp_path: Path) -> None:
    kept = figures.RECORDED.read_bytes() if figures.RECORDED.exists() else None
    contest = load("run")
    names = ["atoll", "batched-1"]
    words = [
        "--quick",
        "--workloads",
        "W1",
        "--repeats",
        "1",
        "--out",
        str(tmp_path / "speed"),
        "--contestants",
        *names,
    ]
    assert contest.main(words) == 0
    body, page = json.loads((tmp_path / "speed.json").read_text()), (tmp_path / "speed.md").read_text()
    assert [run["contestant"] for run in body["runs"]] == names
    for run in body["runs"]:
        (line,) = run["lines"]
        assert len(line["seconds"]) == 2 and line["first"] > 0 and line["peak_mib"] > 50
        assert run["difference"] < 1e-5
    assert body["left out"] == [] and "A quick run" in page and "Atoll" in page
    assert (tmp_path / "speed-rounds.png").read_bytes().startswith(b"\x89PNG")
    assert kept == (figures.RECORDED.read_bytes() if figures.RECORDED.exists() else None), "a quick run records nothing"


def test_what_a_contest_records_is_what_atoll_bench_reads(load: Load, tmp_path: Path) -> None:
    contest = load("run")
    line = {"seconds": [0.2, 0.1, 0.3], "engine": {"engine": "vectorized"}}
    found = {
        ("W1", "atoll"): contest.Measured(lines=[line, line]),
        ("W1", "atoll-2"): contest.Measured(lines=[{"seconds": [0.05]}]),
        ("W1", "batched-1"): contest.Measured(lines=[{"seconds": [0.4]}]),
        ("W1", "rows-1"): contest.Measured(lines=[{"seconds": [0.5]}]),
        ("W1", "flower"): contest.Measured(failure="not built"),
    }
    contest.record(found, {"CPU": "this"}, tmp_path / "recorded.json")
    read = figures.read(tmp_path / "recorded.json")
    assert read is not None and read.context == {"CPU": "this"} and len(read.figures) == 4
    what = str(workloads.WORKLOADS["W1"])
    own, two, hand = read.atoll(what), read.atoll(what, ("--workers", "2")), read.best(what, "hand")
    assert own is not None and two is not None and hand is not None
    assert own.milliseconds == pytest.approx((200, 200, 200)) and own.engine == {"engine": "vectorized"}
    assert two.milliseconds[0] == pytest.approx(50)
    assert hand.shown == "batched products, 1 thread"
    assert read.atoll("another") is None and read.best(what, "framework") is None
    assert figures.read(tmp_path / "none.json") is None


def test_recorded_figures_are_those_of_the_results() -> None:
    result = BENCHMARKS / "results" / "speed.json"
    read = figures.read()
    assert (read is not None) == result.exists(), "benchmarks/speed/run.py writes both"
    if read is not None:
        body = json.loads(result.read_text())
        assert read.context == body["context"]
        medians = {
            (run["workload"], run["contestant"]): float(
                np.median([np.median(line["seconds"]) for line in run["lines"]])
            )
            for run in body["runs"]
        }
        shown = {(f.workload, f.arguments): f.milliseconds[0] for f in read.figures if f.kind == "atoll"}
        for name in ("W1", "W2", "W3"):
            assert shown[name, ()] == pytest.approx(1e3 * medians[name, "atoll"])


def test_the_cost_of_a_round_is_charted(load: Load, tmp_path: Path) -> None:
    load("scaling").main(["--quick", "--out", str(tmp_path / "scaling")])
    body = json.loads((tmp_path / "scaling.json").read_text())
    assert [point["clients"] for point in body["cohort"]] == [10, 20, 40]
    assert (tmp_path / "scaling-chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_check_for_gpus_can_be_tried_on_the_cpu(load: Load, tmp_path: Path) -> None:
    given = ["--quick", "--device", "cpu", "--seconds", "1", "--out", str(tmp_path / "found")]
    assert load("gpu_check").main(given) == 0
    body = json.loads((tmp_path / "found.json").read_text())
    assert body["passed"] and {told["difference"] for told in body["compared"]} == {0.0}
    assert all(body["W6"][precision] for precision in ("full", "bfloat16"))


def test_readme_names_the_contest() -> None:
    readme = (BENCHMARKS / "README.md").read_text()
    for script in ("speed/run.py", "speed/scaling.py"):
        assert script in readme
    about = (BENCHMARKS / "speed" / "README.md").read_text()
    for path in (*(BENCHMARKS / "speed").glob("*.py"), *(BENCHMARKS / "speed" / "contestants").glob("*.py")):
        assert path.name in about or path.parent.name == "contestants", path
