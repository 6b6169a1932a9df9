import json
import re

import pytest
from typer.testing import CliRunner

from atoll.bench import figures
from atoll.bench.workloads import WORKLOADS
from atoll.cli import app
from atoll.cli.bench import arguments, path


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def call(*words, code=0):
    done = CliRunner().invoke(app, ["bench", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def recorded(name, contestants):
    """A file of figures: (kind, arguments, median) of each contestant."""
    made = [
        {
            "workload": name, "what": str(WORKLOADS[name]), "shown": kind, "kind": kind, "arguments": words,
            "milliseconds": [middle, middle - 1, middle + 1], "engine": {},
        }
        for kind, words, middle in contestants
    ]  # fmt: skip
    return json.dumps({"context": {"CPU": "a CPU", "torch": "2", "date": "today", "command": "this"}, "figures": made})


@pytest.fixture
def record(monkeypatch, tmp_path):
    """Put figures of W5 where the package's are."""

    def put(*contestants):
        (tmp_path / "recorded.json").write_text(recorded("W5", contestants))
        read = figures.read
        monkeypatch.setattr(figures, "read", lambda: read(tmp_path / "recorded.json"))

    return put


def row(out, name):
    return re.split(r"\s{2,}", next(line for line in out.splitlines() if line.split()[:1] == [name]).strip())


def test_quick_runs_every_kind_of_workload():
    out = call("--quick", "--workloads", "W1,W4", "--workloads", "W5", "--workloads", "N5", "--workers", "1")
    for name in ("W1", "W4", "W5", "N5"):
        found = row(out, name)
        assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", found[1])
        assert found[2] == "1"
        assert "vectorized" in found[3]
    assert "its figures mean nothing" in out
    assert "ratio" not in out


def test_engine_and_workers_are_those_asked_for():
    assert "loop, one client at a time" in call("--quick", "--workloads", "W1", "--engine", "loop")
    assert row(call("--quick", "--workloads", "W3", "--workers", "2"), "W3")[2] == "2"


def test_without_recorded_figures_it_says_so(monkeypatch):
    monkeypatch.setattr(figures, "read", lambda: None)
    out = call("--workloads", "W5", "--rounds", "3")
    assert "No figures are recorded" in out and "ratio" not in out.lower()


def test_recorded_figures_stand_beside_and_the_reader_is_warned(record):
    record(("atoll", [], 1e-3), ("atoll", ["--workers", "1"], 2e-3), ("hand", [], 7.0), ("framework", [], 1.0))
    out = call("--workloads", "W5", "--rounds", "3", "--workers", "1")
    _, here, there, ratio, hand, _, _ = row(out, "W5")
    assert there.startswith("0.0 [") and hand == "7.0"
    assert float(ratio) == pytest.approx(float(here.split()[0]) / 2e-3, rel=0.05)
    assert "a CPU" in out and "Only ratios of one machine" in out
    assert "Not recorded" not in out


def test_other_options_are_compared_with_its_own_choice(record):
    record(("atoll", [], 1e-3))
    assert "Not recorded with these options: W5" in call("--workloads", "W5", "--rounds", "2", "--workers", "1")


def test_figures_of_a_workload_that_has_changed_are_not_used(record, tmp_path):
    record(("atoll", [], 1.0))
    file = tmp_path / "recorded.json"
    file.write_text(file.read_text().replace("logistic", "some other"))
    out = call("--workloads", "W5", "--rounds", "2")
    assert len(row(out, "W5")) == 4 and "Not recorded" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workloads", "W9"], "--workloads='W9'"),
        (["--workloads", ","], "--workloads=''"),
        (["--workers", "two"], '"auto" or a number of at least 1'),
        (["--workers", "0"], "--workers='0'"),
        (["--engine", "lop"], "'loop'"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(words, message):
    out = call("--quick", *words, code=2)
    assert "error: " in out.splitlines()[-1]
    assert message in out


def test_recorded_contestants_are_found_by_how_they_were_called():
    assert arguments("auto", "auto") == arguments("vectorized", "auto") == ()
    assert arguments("ray", "2") == ("--engine", "ray", "--workers", "2")


def test_the_path_in_words():
    assert path({"engine": "loop", "strategy": "one client at a time"}) == "loop, one client at a time"
    assert path({"engine": "vectorized", "strategy": "rows", "tile": 8}) == "vectorized, rows, 8 in a tile"


def test_the_figures_in_the_package_are_whole():
    found = figures.read()
    if found is None:
        pytest.skip("nothing was recorded yet")
    assert {"CPU", "torch", "date", "command"} <= set(found.context)
    for name in ("W1", "W2", "W3"):
        own, hand = found.atoll(str(WORKLOADS[name])), found.best(str(WORKLOADS[name]), "hand")
        assert own is not None and hand is not None
        assert own.milliseconds[1] <= own.milliseconds[0] <= own.milliseconds[2]
