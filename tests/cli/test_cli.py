import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import atoll
from atoll.cli import app
from atoll.cli.recipes import recipe_names, recipe_path

APP = """
import time
import torch, atoll
from torch import nn

def experiment(*, rounds: int = 3, lr: float = 0.1, pause: float = 0.0, test: float | None = 0.3, clients: int = 2,
               broken: bool = False) -> atoll.Experiment:
    x = torch.linspace(-1, 1, 40).reshape(20, 2)
    y = (x.sum(1) > 0).long()
    y = y[:, None].float() if broken else y
    data = atoll.FederatedDataset.from_arrays({f"[b]c{i}": (x, y) for i in range(clients)}, test=test)
    def forward(module, batch):
        time.sleep(pause)
        return module(batch["x"])
    loss, metrics = ("mse", ()) if broken else ("binary_cross_entropy", ("accuracy",))
    model = atoll.Model(nn.Linear(2, 1), loss=loss, metrics=metrics, forward=forward)
    return atoll.Experiment(model=model, data=data, algorithm=atoll.fedavg(atoll.local_sgd(lr=lr)), rounds=rounds,
                            initial=model.init(0))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "small.py").write_text(APP)
    return tmp_path


def call(*words, code=0):
    """Run a command in this process; returns what it printed to both streams."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def test_help_loads_nothing_heavy():
    script = (
        "import sys\nsys.argv = ['atoll', '--help']\nfrom atoll.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print('HEAVY', sorted({'torch', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for command in ("demo", "run", "runs", "report", "compare", "data", "bench"):
        assert re.search(rf"\b{command}\b", done.stdout)


def test_version():
    assert call("--version").strip() == f"atoll {atoll.__version__}"


def test_an_unknown_command_is_met_with_the_nearest():
    assert "'data'" in call("dota", code=2)


def test_run_leaves_a_directory_and_a_report(here):
    out = call("run", "small.py", "--set", "rounds=2")
    (folder,) = (here / "runs").iterdir()
    assert re.fullmatch(r"small-\d{8}-\d{6}", folder.name)
    assert (folder / "report.html").exists()
    assert f"runs/{folder.name}" in out
    assert "round 2/2" in out
    assert "[b]c0" in out  # names are text, not styles
    assert "all examples" in out
    assert len(atoll.Result.load(folder).history) == 2


def test_quiet_prints_the_directory_alone(here):
    assert call("run", "small.py", "--quiet", "--directory", "mine", "--no-report") == "mine\n"
    assert not (here / "mine" / "report.html").exists()
    assert call("run", "small.py", "-q", "--engine", "loop", "--directory", "other") == "other\n"
    assert atoll.Result.load("other").engine["engine"] == "loop"


def test_many_clients_are_summed_up(here):
    out = call("run", "small.py", "--set", "clients=21")
    assert "worst decile" in out and "[b]c20" not in out


def test_whose_updates_were_refused_is_told(here):
    app_file = here / "krum.py"
    app_file.write_text(
        APP.replace("initial=model.init(0))", "initial=model.init(0), aggregator=atoll.aggregators.krum(byzantine=1))")
    )
    shown = call("run", app_file, "--set", "clients=5", "--set", "rounds=2", "--no-report")
    assert "refused updates" in shown and "krum gave it no share" in shown and "[b]c1" in shown
    assert "Norm and distance from the round's result" in shown and "4 refused" in shown
    assert "refused" not in call("run", "small.py", "--no-report")


def test_without_test_examples_the_loss_is_shown(here):
    assert "nothing was evaluated" in call("run", "small.py", "--set", "test=none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "none.py"], "APP='none.py' is not allowed"),
        (["run", "none.py"], "healthcare"),
        (["run", "small.py", "--set", "round=2"], "Did you mean 'rounds'?"),
        (["run", "small.py", "--set", "rounds=two"], "--set rounds='two'"),
        (["run", "small.py", "--set", "rounds"], "of the form name=value"),
        (["run", "small.py", "--set", "lr=1", "--set", "lr=2"], "given once"),
        (["run", "small.py", "--set", "rounds=0"], "rounds=0"),
        (["run", "small.py", "--engine", "lop"], "'loop'"),
        (["run", "small.py", "--resume"], "--directory"),
        (["run", "small.py", "--resume", "--directory", "new"], "no run to resume"),
        (["run", "small.py", "--data", "x.csv"], "brings its own data"),
        (["run", "finance", "--data", "x.csv"], "--set client=COLUMN"),
        (["run", "finance", "--set", "client=a"], "--data PATH"),
        (["runs", "nowhere"], "nowhere is not a folder"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["compare", "a"], "two run directories or more"),
        (["data", "hart_disease"], "Did you mean 'heart_disease'?"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(here, words, message):
    out = call(*words, code=2)
    assert out.startswith("error: ")
    assert message in out
    assert len(out.splitlines()) == 1
    assert not (here / "runs").exists()


def test_debug_shows_the_traceback(here):
    done = CliRunner().invoke(app, ["run", "small.py", "--set", "lr=-1", "--debug"])
    assert isinstance(done.exception, atoll.errors.InvalidArgument)


def test_a_run_that_diverges_says_where_its_rounds_are(here):
    out = call("run", "small.py", "--set", "broken=yes", "--set", "lr=1e30", "--directory", "bad", code=2)
    assert "atoll report bad" in out
    assert "training became non-finite" in out
    assert "failed" in call("runs", ".")


def test_runs_report_and_compare(here):
    call("run", "small.py", "--directory", "runs/first", "--no-report")
    call("run", "small.py", "--directory", "runs/second", "--set", "lr=0.5", "--no-report")
    (here / "runs" / "third").mkdir()
    (here / "runs" / "third" / "journal.sqlite").write_text("no database")
    out = call("runs")
    assert out.index("second") < out.index("first")
    assert out.count("finished") == 2 and "damaged" in out
    assert call("report", "runs/first") == "runs/first/report.html\n"
    assert call("report", "runs/first", "--out", "page.html") == "page.html\n"
    assert (here / "page.html").stat().st_size > 10_000
    out = call("compare", "runs/first", "runs/second", "--out", "both.html")
    assert "algorithm.plan.lr: 0.1 != 0.5" in out and "test accuracy" in out
    assert "algorithm.plan.lr" in (here / "both.html").read_text()
    call("compare", "runs/first", "runs/second", "--out", "both.png", "--metric", "train_loss")
    assert (here / "both.png").read_bytes().startswith(b"\x89PNG")
    assert "both.gif" in call("compare", "runs/first", "runs/second", "--out", "both.gif", code=2)
    assert "different run directories" in call("compare", "runs/first", "runs/first", code=2)
    (here / "empty").mkdir()
    assert call("runs", "empty") == "empty holds no runs.\n"


def test_the_catalog(here):
    out = call("data")
    assert all(name in out for name in atoll.datasets.names())
    out = call("data", "heart_disease")
    assert "CC BY 4.0" in out and "VA Long Beach" in out and "train" in out
    assert "would download it" in call("data", "mnist")


def test_ctrl_c_prints_the_command_that_finishes_the_run(here):
    command = [sys.executable, "-c", "from atoll.cli import main; main()"]
    words = [
        "run",
        "small.py",
        "--set",
        "rounds=12",
        "--set",
        "pause=0.05",
        "--no-report",
        "--directory",
        "runs/my run",
    ]
    process = subprocess.Popen([*command, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = [process.stderr.readline() for _ in range(2)]
    assert lines[1].startswith("round  2/12"), lines
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "stopped after round" in rest and "Traceback" not in rest
    again = shlex.split(rest.splitlines()[-1])
    assert again == ["atoll", *words, "--resume"]
    assert "interrupted" in call("runs")
    done = subprocess.run([*command, *again[1:]], capture_output=True, text=True, check=True)
    assert "round  1/12" not in done.stderr and "round 12/12" in done.stderr
    uninterrupted = call("run", "small.py", "--set", "rounds=12", "--directory", "whole", "-q", "--no-report").strip()
    whole, resumed = atoll.Result.load(uninterrupted), atoll.Result.load("runs/my run")
    assert bool((whole.vector == resumed.vector).all())


def test_ctrl_c_before_the_first_round(here):
    (here / "waits.py").write_text("print('here', flush=True)\nimport time\ntime.sleep(60)\n")
    command = [sys.executable, "-c", "from atoll.cli import main; main()", "run", "waits.py"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest == "interrupted.\n"


def test_recipes_are_found():
    assert {"healthcare", "finance"} <= set(recipe_names())
    assert recipe_path("finance").name == "app.py"
    with pytest.raises(atoll.errors.InvalidArgument, match="Did you mean 'healthcare'"):
        recipe_path("helthcare")


def test_a_table_of_rare_events(here):
    rows = ["insurer,claim,amount,fraud"]
    rows += [
        f"{'ab'[i % 2]},{i % 3},{(i * 37) % 101},{'yes' if i % 10 == 3 or i % 10 == 4 else 'no'}" for i in range(200)
    ]
    Path("claims.csv").write_text("\n".join(rows))
    named = ("--set", "client=insurer", "--set", "target=fraud", "--set", "rounds=2")
    out = call("run", "finance", "--data", "claims.csv", *named)
    assert "fraud by insurer, federated" in out and "average precision" in out and "brier" in out


def test_demo_end_to_end(here):
    out = call("demo", "--quick", "--out", "demo")
    for name in ("report.html", "hospitals.png", "hospitals.svg", "study.json"):
        assert (here / "demo" / name).stat().st_size > 5000
    for hospital in ("Cleveland", "Hungary", "Switzerland", "VA Long Beach"):
        assert hospital in out
    page = (here / "demo" / "report.html").read_text()
    assert "<script" not in page
    assert "federated" in page and "Nadeau and Bengio" in page
    from atoll.study import Study

    found = Study.load(here / "demo" / "study.json")
    assert found.arms == ("alone", "federated", "pooled") and len(found.seeds) == 2
    assert found.overlap == pytest.approx(313 / 607)
