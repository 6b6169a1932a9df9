"""A server whose machine is lost: keys, database and object store are enough to go on, with the same bits."""

import shutil
from pathlib import Path

import pytest
import torch
from processes import Place, place
from test_processes import SITES, approved, closed, deployed, newest, over, simulated

import atoll
from atoll.net.mirror import read
from atoll.net.objects import store
from atoll.net.shelves import Shelves

ROUNDS = 5
KEYS = {"key", "authority.pem", "admin"}
"""What of a server's folder must be backed up."""


def lose_the_machine(found: Place) -> None:
    """Kill the server and all it started, and take its disk but for the keys."""
    children = found.children("server")
    found.kill("server")
    found.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "its processes end")
    folder = found.folder / "atoll-server"
    for path in folder.iterdir():
        if path.name not in KEYS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite and a folder", "postgresql and s3"])
def test_a_server_that_lost_its_disk_goes_on_with_the_same_bits(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = kind == "postgresql and s3"
    database = request.getfixturevalue("postgresql") if remote else f"sqlite:///{tmp_path}/elsewhere.sqlite"
    url = request.getfixturevalue("bucket") if remote else f"file://{tmp_path}/objects"
    monkeypatch.setenv("ATOLL_OBJECTS", url)
    with place(tmp_path, database=database) as found:
        found.join(SITES)
        found.atoll(
            "submit", "app.py", "--engine", "loop", "--name", "heart", "--quiet", "--attempts", "50",
            "--set", f"rounds={ROUNDS}", "--set", "slow=0.05",
        )  # fmt: skip
        found.until(lambda: (found.folder / "atoll-server").exists(), "it begins")
        for lost in range(2):  # before the first round, and in the middle of one
            if lost == 1:
                approved(found)
            if lost:
                done = closed(found)
                found.until(lambda d=done: closed(found) > d, "a round closes")
                pattern = "atoll-server/runs/heart/spool/*/*"
                before = newest(found, pattern)
                found.until(lambda p=pattern, b=before: newest(found, p) - b != set(), "an update is kept", every=0.002)
            lose_the_machine(found)
            found.start("server")
            found.until(lambda n=lost: found.log("server").count("fingerprint") == n + 2, "the server starts")
        assert "finished" in found.atoll("watch", "heart")
        expected = simulated(found, ROUNDS)
        assert torch.equal(deployed(found, "heart"), expected)
        assert [r.round for r in atoll.Result.load(found.run("heart")).history] == list(range(1, ROUNDS + 1))
        assert over(found)
        shelf = store(Shelves(url, fingerprint_of(found)).url("heart"))
        stays = {"result.json", "result.safetensors", "journal.sqlite"}
        found.until(lambda: len(read(shelf.names())) == 4, "nothing else is kept")
        assert stays < set(read(shelf.names()))
        lose_the_machine(found)
        found.start("server")
        files = [found.run("heart") / name for name in sorted(stays)]
        found.until(lambda: all(f.exists() for f in files), "the result comes back")
        assert torch.equal(deployed(found, "heart"), expected)
        assert "finished" in found.atoll("runs", "atoll-server/runs")
        if remote:
            from s3 import SECRET

            assert not any(SECRET.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
            checked = found.atoll("doctor", "--home", "atoll-server/admin", "--objects", url)
            assert "can be written, read and deleted from" in checked and "BAD" not in checked


def fingerprint_of(found: Place) -> str:
    from atoll.net.home import Home

    return Home(found.folder / "atoll-server" / "admin").identity.fingerprint
