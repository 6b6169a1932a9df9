"""Every benchmark runs in its quick mode and writes what it promises; the long run's memory, at a small scale."""

import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = ("flamby_heart", "long_run", "mnist_2nn", "round_time")
MNIST_FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import a benchmark as its script would be."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in (*NAMES, "reporting"):
        sys.modules.pop(name, None)


def arguments(name: str) -> list[str]:
    """What a quick run takes on this machine."""
    folder = Path(os.environ.get("ATOLL_DATA", "/nonexistent"))
    at_hand = any(all((place / file).exists() for file in MNIST_FILES) for place in (folder, folder / "mnist"))
    return ["--synthetic"] if name == "mnist_2nn" and not at_hand else []


@pytest.mark.parametrize("name", NAMES)
def test_quick_run_writes_its_result(name: str, load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    kept = {path: path.read_bytes() for path in (BENCHMARKS / "results").glob("*")}
    assert load(name).main(["--quick", "--out", str(tmp_path / "found"), *arguments(name)]) == 0
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
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - {"reporting"}
    assert scripts == set(NAMES)
    for name in NAMES:
        assert f"{name}.py" in readme
        assert f"results/{name}.md" in readme
        body = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
        assert body["quick"] is False
        assert body["passed"] is True
        assert (BENCHMARKS / "results" / f"{name}.md").exists()


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


@pytest.mark.parametrize("directory", [False, True])
def test_client_memory_does_not_grow_once_all_have_been_visited(load: Load, tmp_path: Path, directory: bool) -> None:
    long = load("long_run")
    found = long.run("scaffold", long.SMALL, tmp_path / "run" if directory else None)
    settled = next(i for i, number in enumerate(found["round"]) if number > long.SMALL.settled)
    # A row for every client and round would be 7 MiB, a copy of the data for every round hundreds.
    assert found["anonymous"][-1] - found["anonymous"][settled] < 4
    assert found["resident"][-1] - found["resident"][settled] < 16
