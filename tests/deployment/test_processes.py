"""The road as a newcomer walks it, and what it survives: real programs over loopback."""

import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from postgres import Cluster
from processes import Place, place
from sqlalchemy import make_url

import atoll
from atoll.cli.run import build
from atoll.net.enrolment import decode
from atoll.net.storage import state_of

SITES = ("hospital-a", "hospital-b")


def simulation(found: Place, rounds: int) -> atoll.Result:
    """What one client after the other gives, on one machine."""
    experiment = build(found.folder / "app.py", {"rounds": str(rounds)}, str(found.folder / "all.csv"))
    return experiment.simulate(engine="loop", progress=False)


def simulated(found: Place, rounds: int) -> torch.Tensor:
    """The model of the same."""
    return simulation(found, rounds).vector


def deployed(found: Place, name: str) -> torch.Tensor:
    return atoll.Result.load(found.run(name)).vector


def approved(found: Place) -> None:
    """Both owners approve what waits."""
    for name in SITES:
        waiting = found.folder / f"atoll-{name}" / "waiting"
        found.until(lambda w=waiting: waiting_in(w) != [], f"{name} is asked")
        mark = waiting_in(waiting)[0].stem[:12]
        found.atoll("approve", mark, "--home", f"atoll-{name}")


def waiting_in(folder: Path) -> list[Path]:
    return list(folder.glob("*.json"))


def test_a_newcomers_way_from_nothing_to_a_model(tmp_path: Path) -> None:
    with place(tmp_path) as found:
        words = found.join(SITES)
        listed = found.atoll("sites")
        assert all(name in listed for name in SITES)
        name = found.atoll("submit", "app.py", "--engine", "loop", "--name", "heart", "--quiet").strip()
        asked = [found.folder / f"atoll-{site}" / "waiting" for site in SITES]
        found.until(lambda: all(waiting_in(folder) for folder in asked), "the owners are asked")
        found.until(
            lambda: "atoll review" in found.atoll("watch", "heart", "--once"), "the operator sees it", every=1.0
        )
        with closing(state_of(found.folder / "atoll-hospital-a")) as state:
            assert not list(state.records("left")), "nothing runs that was not approved"
        shown = found.atoll("review", "--home", "atoll-hospital-a")
        assert "waiting" in shown and "heart" in shown
        mark = waiting_in(found.folder / "atoll-hospital-a" / "waiting")[0].stem
        assert "atoll.scaffold" in found.atoll("review", mark[:8], "--home", "atoll-hospital-a")
        approved(found)
        told = found.atoll("watch", name)
        assert "round 3/3: 2 updates" in told and "finished" in told
        assert told.count("held-out examples after round") == 3
        result, same = atoll.Result.load(found.run("heart")), simulation(found, 3)
        assert torch.equal(result.vector, same.vector), "the very bits of the simulation"
        for mine, expected in zip(result.history, same.history, strict=True):
            assert set(mine.test) == {"loss", "auc"}
            assert mine.test == pytest.approx(expected.test, abs=1e-6, nan_ok=True)
        for site, metrics in same.clients["global"].items():
            assert result.clients["global"][site] == pytest.approx(metrics, abs=1e-6, nan_ok=True)
        assert "finished" in found.atoll("runs", "atoll-server/runs") and "finished" in found.atoll("runs", "--server")
        left = found.atoll("audit", "--home", "atoll-hospital-a")
        assert left.count("update") == 3 and left.count("evaluation") == 3 and "survey" in left
        checked = found.atoll("doctor", "--home", "atoll-hospital-a", "--data", "hospital-a.csv")
        assert "BAD" not in checked and "20 rows" in checked
        no_secret_is_written(found, words)
        found.atoll("revoke", "hospital-b")
        found.until(lambda: found.programs["hospital-b"].poll() is not None, "who is shut out ends")
        assert "was shut out" in found.log("hospital-b")
        found.programs["server"].terminate()
        assert found.programs["server"].wait(60.0) == 0, "asked to stop, it ends well"


def no_secret_is_written(found: Place, words: list[str]) -> None:
    secrets = [decode(w).token.encode() for w in words] + [w.encode() for w in words]
    for path in found.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(s in content for s in secrets), path
            if b"PRIVATE KEY" in content:
                assert path.name in ("key", "port.pem") and path.stat().st_mode & 0o077 == 0, path


POINTS: dict[str, tuple[str, str, str]] = {
    "the server when it offers a task": ("server", "program", "atoll-server/runs/heart/task/*"),
    "the run's process when it offers a task": ("server", "child", "atoll-server/runs/heart/task/*"),
    "the server when an update is accepted": ("server", "program", "atoll-server/runs/heart/spool/*/*"),
    "the run's process when an update is accepted": ("server", "child", "atoll-server/runs/heart/spool/*/*"),
    "the server when a model is written": ("server", "program", "atoll-server/runs/heart/models/*"),
    "a site when its report is written": ("hospital-a", "program", "atoll-hospital-a/runs/heart/reports/*"),
    "a site's process while it trains": ("hospital-b", "child", "atoll-server/runs/heart/task/*"),
    "a site when the server has its report": ("hospital-b", "program", "atoll-server/runs/heart/spool/*/*"),
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["sqlite", "postgresql"])
def test_whoever_is_killed_at_named_points_the_model_has_the_same_bits(
    tmp_path: Path, engine: str, request: pytest.FixtureRequest
) -> None:
    rounds = 3 * len(POINTS)
    database = request.getfixturevalue("postgresql") if engine == "postgresql" else ""
    with place(tmp_path, database=database) as found:
        found.join(SITES)
        found.atoll(
            "submit", "app.py", "--engine", "loop", "--name", "heart", "--quiet", "--attempts", "50",
            "--set", f"rounds={rounds}", "--set", "slow=0.02",
        )  # fmt: skip
        approved(found)
        for point, (who, what, pattern) in POINTS.items():
            before = newest(found, pattern)
            found.until(lambda p=pattern, b=before: newest(found, p) - b != set(), point, every=0.002)
            if what == "program":
                found.kill(who)
                found.start(who)
            else:
                found.kill_children(who)
            done = closed(found)
            found.until(lambda d=done: closed(found) > d or over(found), f"after {point} the run goes on")
        if engine == "postgresql":
            postgres: Cluster = request.getfixturevalue("postgres")
            done = closed(found)
            postgres.stop()
            time.sleep(1.0)
            postgres.start()
            found.until(
                lambda: closed(found) > done or over(found), "after PostgreSQL was started again the run goes on"
            )
        assert "finished" in found.atoll("watch", "heart")
        assert torch.equal(deployed(found, "heart"), simulated(found, rounds))
        assert len(atoll.Result.load(found.run("heart")).history) == rounds
        with found.state() as state:
            assert len(state.records("roster")) >= 6 and len(state.records("runs/heart/journal")) > 4 * rounds
        assert (tmp_path / "atoll-server" / "state.sqlite").exists() == (engine == "sqlite")
        if database:
            password = make_url(database).password
            assert password and password.encode() not in b"".join(
                p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()
            )


def newest(found: Place, pattern: str) -> set[str]:
    return {str(p) for p in found.folder.glob(pattern) if not p.name.endswith(".part")}


def closed(found: Place) -> int:
    names = [p.name for p in (found.run("heart") / "models").glob("*") if p.name.isdecimal()]
    return max(map(int, names), default=0)


def over(found: Place) -> bool:
    with found.state() as state:
        return "heart" in state.documents("final")


@pytest.mark.slow
def test_a_site_without_its_column_is_told_of_and_can_be_mended(tmp_path: Path) -> None:
    with place(tmp_path) as found:
        whole = (tmp_path / "hospital-b.csv").read_text()
        (tmp_path / "hospital-b.csv").write_text(whole.replace("disease", "outcome"))
        found.join(SITES)
        found.atoll("submit", "app.py", "--name", "heart", "--quiet", "--set", "rounds=1")
        approved(found)
        found.until(lambda: "failed" in found.atoll("watch", "--once"), "the site fails", every=1.0)
        shown = found.atoll("watch", "--once")
        assert "DataError" in shown and "outcome" not in shown, "what its columns are called stays at the site"
        assert "outcome" in found.log("hospital-b")
        (tmp_path / "hospital-b.csv").write_text(whole)
        found.programs["hospital-b"].terminate()
        assert found.programs["hospital-b"].wait(60.0) == 0
        found.start("hospital-b")
        assert "finished" in found.atoll("watch", "heart")


def test_two_servers_do_not_work_in_one_folder(tmp_path: Path) -> None:
    with place(tmp_path) as found:
        found.serve()
        done = subprocess.run(
            [sys.executable, "-P", "-c", "from atoll.cli import main; main()", "server", "--port", "0"], cwd=tmp_path,
            capture_output=True, text=True, timeout=120.0,
        )  # fmt: skip
        assert done.returncode == 2 and "another server works in" in done.stderr
