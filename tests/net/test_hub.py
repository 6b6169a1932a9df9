"""What a server does with its runs, whatever their processes and its disk do."""

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from atoll.net import control, hub
from atoll.net.calls import Charter, Spent
from atoll.net.children import Happen, HostCall, Summary, Told
from atoll.net.enrolment import Member
from atoll.net.hub import Hub, Run
from atoll.net.state import State
from atoll.net.storage import Disk, state_of

pytestmark = pytest.mark.usefixtures("unsynced")

BLANK = Summary("", "", 0, 0, 0, 0, 0, 0, False, "", "", "", "", 0, [], [], {}, {}, {}, [], [])


def summary(phase: str, **more: Any) -> Summary:
    return hub.msgspec.structs.replace(BLANK, phase=phase, **more)


class Process:
    """A run's process that answers everything with the same state."""

    alive = True

    def __init__(self, told: Summary) -> None:
        self.told, self.heard = told, list[HostCall]()

    async def call(self, call: HostCall, replies: Any, blobs: Any, **more: Any) -> tuple[Told, bytes]:
        self.heard.append(call)
        if isinstance(call, Happen) and call.event == "revoked":
            self.told = hub.msgspec.structs.replace(self.told, sites={**self.told.sites, call.site: "revoked"})
        return Told(self.told), b""

    async def end(self) -> None:
        self.alive = False


def house(folder: Path, told: Summary) -> tuple[Hub, Run, Process]:
    made = Hub(folder, "f" * 64, "localhost:1")
    run = Run(folder, Charter("r", "0" * 64, {}), made.agenda, made.roster.members.get, made.state)
    process = Process(told)
    run._child, run.summary = process, told  # type: ignore[assignment]
    made.runs["r"] = run
    return made, run, process


async def until(true: Any) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not in time")


def test_a_run_ends_when_a_full_disk_has_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, real = [True], State.put
    tried = list[str]()

    def put(self: State, kind: str, name: str, body: bytes) -> None:
        tried.append(kind)
        if full[0]:
            raise OSError(28, "No space left on device")
        real(self, kind, name, body)

    monkeypatch.setattr(State, "put", put)

    async def both() -> None:
        _, run, _ = house(tmp_path, summary("finished"))
        run.keep()
        await until(lambda: tried)
        full[0] = False
        await until(lambda: run.over)
        await run.close()

    asyncio.run(both())
    assert list(state_of(tmp_path).documents("final")) == ["r"]


def test_a_run_that_was_at_work_hears_later_that_a_site_was_shut_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HOLD", 0.05)

    async def both() -> None:
        made, run, process = house(tmp_path, summary("collecting", sites={"s": "active", "t": "active"}))
        for name in "st":
            made.roster.members[name] = Member(name, "site", "k", 0.0)
        monkeypatch.setattr(made.roster, "_record", lambda entry: made.roster._take(entry))
        async with run._turn:  # at work
            await made._revoke("s", "admin")
            assert not process.heard
        run.keep()
        await until(lambda: process.heard)
        await run.close()
        assert [(c.event, c.site) for c in process.heard if isinstance(c, Happen)] == [("revoked", "s")]

    asyncio.run(both())


def test_one_runs_trouble_is_not_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(call: HostCall, blob: bytes = b"") -> bytes:
        raise hub.RunError("the server's disk refuses")

    async def ask() -> None:
        made, run, _ = house(tmp_path, summary("gathering"))
        monkeypatch.setattr(run, "ask", broken)
        told = await made._agenda("s", -1, {"r": hub.Standing("ready")})
        assert [e.charter.run for e in told.runs] == ["r"]

    asyncio.run(ask())


def test_what_an_authors_code_says_is_plain_text_to_watchers(tmp_path: Path) -> None:
    _, run, _ = house(tmp_path, BLANK)
    run._learn(summary("paused", title="a\x1b[2Jb", reason="c\x1b]0;d", notices=["e\nf"]))
    view = run.view({})
    assert all(text.isprintable() for text in (view.title, view.reason, *view.notices))


def test_what_noise_took_is_told_to_watchers(tmp_path: Path) -> None:
    _, run, _ = house(tmp_path, BLANK)
    assert run.view({}).privacy is None
    version, spent = run.view({}).version, Spent(1.5, 1e-5, 3.0, True)
    run._learn(summary("collecting", privacy=spent))
    assert run.view({}).privacy == spent and run.view({}).version > version


def test_a_run_that_could_not_be_kept_never_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its folder nor its journal is in the way of the next one of its name."""
    full, real = [True], State.put

    def put(self: State, kind: str, name: str, body: bytes) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        real(self, kind, name, body)

    async def load(self: Run) -> None:
        with closing(self._state.journal("runs/r/journal")) as journal:
            assert len(journal) == 0
            journal.append(b"begun")

    monkeypatch.setattr(State, "put", put)
    monkeypatch.setattr(Run, "load", load)
    monkeypatch.setattr(Run, "keep", lambda self: None)
    made = Hub(tmp_path, "f" * 64, "localhost:1")
    charter = Charter("r", control.content_hash(b"code"), {}, least=1)
    with pytest.raises(OSError):
        asyncio.run(made._submit("admin", charter, "code"))
    assert not made.runs and not list((tmp_path / "runs").iterdir()) and not len(made.state.records("runs/r/journal"))
    with closing(made.state.journal("runs/r/journal")) as journal:
        journal.append(b"of a server that was killed before the run began")
    full[0] = False
    asyncio.run(made._submit("admin", charter, "code"))
    assert list(made.runs) == ["r"] and list(made.state.documents("charter")) == ["r"]


def test_a_run_whose_folder_is_gone_says_so_and_can_be_stopped(tmp_path: Path) -> None:
    made = Hub(tmp_path, "f" * 64, "localhost:1")
    run = Run(tmp_path / "runs" / "r", Charter("r", "0" * 64, {}), made.agenda, made.roster.members.get, made.state)
    made.runs["r"] = run

    async def stopped() -> None:
        with pytest.raises(OSError):
            await run.load()
        assert run.view({}).phase == "broken" and "No such file" in run.view({}).reason
        await made._control(Member("admin", "admin", "", 0.0), "r", "stop", "it is lost")

    asyncio.run(stopped())
    assert run.over and list(made.state.documents("final")) == ["r"]


def test_the_folder_of_a_run_is_durable_before_the_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, real = set[Path](), Disk._sync

    def sync(self: Disk, path: Path) -> None:
        synced.add(path)
        real(self, path)

    async def load(self: Run) -> None:
        runs = tmp_path / "server" / "runs"
        code = control.content_hash(b"code")
        names = {runs.parent, runs, runs / "r", runs / "r" / "objects"}
        assert names <= synced and (runs / "r" / "objects" / code).read_bytes() == b"code"

    monkeypatch.setattr(Disk, "_sync", sync)
    monkeypatch.setattr(Run, "load", load)
    monkeypatch.setattr(Run, "keep", lambda self: None)
    (tmp_path / "server").mkdir()
    made = Hub(tmp_path / "server", "f" * 64, "localhost:1")
    charter = Charter("r", control.content_hash(b"code"), {}, least=1)
    asyncio.run(made._submit("admin", charter, "code"))


def test_a_run_that_was_stopped_while_its_process_began_has_none_and_stays_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Hub(tmp_path, "f" * 64, "localhost:1")
    run = Run(tmp_path / "runs" / "r", Charter("r", "0" * 64, {}), made.agenda, made.roster.members.get, made.state)
    run.folder.mkdir()

    class Slow(Process):
        async def call(self, call: HostCall, replies: Any, blobs: Any = (), **more: Any) -> tuple[Told, bytes]:
            run.abandon("it is lost")
            return Told(self.told), b""

    process = Slow(summary("collecting"))

    async def start(*_: Any, **more: Any) -> Slow:
        return process

    monkeypatch.setattr(hub.Child, "start", start)
    asyncio.run(run.load())
    assert not process.alive and run._child is None
    assert run.summary is not None and run.summary.phase == "stopped"
