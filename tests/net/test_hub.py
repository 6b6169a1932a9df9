"""What a server does with its runs, whatever their processes and its disk do."""

import asyncio
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from atoll.deployment import runner
from atoll.errors import InvalidArgument, RunError
from atoll.net import children, control, coordinator, hub
from atoll.net.calls import Charter, Spent
from atoll.net.children import Happen, HostCall, Place, Summary, Told
from atoll.net.enrolment import Member
from atoll.net.hub import Hub, Run
from atoll.net.shelves import Shelves
from atoll.net.state import State
from atoll.net.storage import Disk, state_of

pytestmark = pytest.mark.usefixtures("unsynced")

BLANK = Summary()


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
            self.told = hub.msgspec.structs.replace(self.told, sites={**self.told.sites, call.site: Place("revoked")})
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
        made, run, process = house(tmp_path, summary("collecting", sites={"s": Place("active"), "t": Place("active")}))
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
    run._learn(Told(summary("paused", title="a\x1b[2Jb", reason="c\x1b]0;d", notices=["e\nf"])))
    view = run.view({})
    assert all(text.isprintable() for text in (view.title, view.reason, *view.notices))


def test_names_of_metrics_are_plain_text_to_watchers(tmp_path: Path) -> None:
    _, run, _ = house(tmp_path, summary("gathering"))
    run._learn(Told(summary("collecting", closed=[hub.Closed(1, 2, 0.5, 9, 1.0, {"a\x1b[2Jb": 0.25})])))
    assert [c.metrics for c in run.view({}).closed] == [{"a [2Jb": 0.25}]


def test_what_noise_took_is_told_to_watchers(tmp_path: Path) -> None:
    _, run, _ = house(tmp_path, BLANK)
    assert run.view({}).privacy is None
    version, spent = run.view({}).version, Spent(1.5, 1e-5, 3.0, True)
    run._learn(Told(summary("collecting", privacy=spent)))
    assert run.view({}).privacy == spent and run.view({}).version > version


@pytest.mark.parametrize("action", ["resume", "discard"])
def test_a_run_is_resumed_and_its_updates_are_given_up_while_it_is_paused_alone(tmp_path: Path, action: str) -> None:
    made, run, process = house(tmp_path, summary("collecting", reason="it was"))
    admin = Member("admin", "admin", "", 0.0)

    async def steered() -> None:
        with pytest.raises(InvalidArgument, match="not paused, it is collecting"):
            await made._control(admin, "r", action, "")
        run.summary = process.told = summary("paused")
        await made._control(admin, "r", action, "they cannot be combined")

    asyncio.run(steered())
    (told,) = (call for call in process.heard if isinstance(call, Happen))
    assert (told.event, told.reason) == (action, "they cannot be combined")
    happened = runner._event(action, "", "why", "")
    assert happened == (coordinator.Resume() if action == "resume" else coordinator.Discard("why"))


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


def test_the_store_is_swept_of_a_run_that_never_began_before_its_name_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = list[bool]()

    async def load(self: Run) -> None:
        raise RunError("the experiment cannot be loaded")

    def sweep(self: Shelves, run: str, enduring: Sequence[str] = ()) -> None:
        there.append((tmp_path / "runs" / run).exists())

    monkeypatch.setattr(Run, "load", load)
    monkeypatch.setattr(Shelves, "sweep", sweep)
    made = Hub(tmp_path, "f" * 64, "localhost:1", None, Shelves(f"file://{tmp_path}/store", "f" * 64))
    with pytest.raises(RunError, match="cannot be loaded"):
        asyncio.run(made._submit("admin", Charter("r", control.content_hash(b"code"), {}, least=1), "code"))
    assert there == [True, True] and not (tmp_path / "runs" / "r").exists()


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


EARLIER = {
    "phase": "finished", "reason": "all 2 rounds are done.", "round": 2, "rounds": 2, "attempt": 0, "wanted": 0,
    "least": 2, "number": 9, "busy": False, "stage": "ready", "question": "", "identity": "i", "title": "t",
    "largest": 5, "cohort": ["a"], "accepted": [], "excluded": {"b": "away"}, "sites": {"a": "active", "b": "revoked"},
    "counted": {"a": [1, 1]}, "closed": [], "notices": [], "turn": 0, "step": "", "awaited": [], "out": {},
}  # fmt: skip
"""How a run ended, as servers wrote it that told of all sites with every answer."""


@pytest.mark.parametrize("lacking", [(), ("turn", "step", "awaited", "out")], ids=["sums", "without sums"])
def test_a_state_that_an_earlier_server_wrote_is_opened(tmp_path: Path, lacking: tuple[str, ...]) -> None:
    state = state_of(tmp_path)
    state.put("charter", "r", hub.msgspec.json.encode(Charter("r", "0" * 64, {})))
    state.put("final", "r", hub.msgspec.json.encode({n: v for n, v in EARLIER.items() if n not in lacking}))
    view = Hub(tmp_path, "f" * 64, "localhost:1", state).runs["r"].view({})
    assert (view.phase, view.reason, view.rounds) == ("finished", "all 2 rounds are done.", 2)
    assert [(s.name, s.counted) for s in view.sites] == [("a", (1, 1)), ("b", None)]
    assert view.sites[1].standing == "revoked"


@pytest.mark.parametrize(
    "content", [b"{}x", b"[]", b'{"new":1}', b'{"counted":{}}', b'{"counted":{},"sites":{"a":"?"}}']
)
def test_an_end_of_no_known_form_is_told_by_the_runs_name(tmp_path: Path, content: bytes) -> None:
    state = state_of(tmp_path)
    state.put("charter", "r", hub.msgspec.json.encode(Charter("r", "0" * 64, {})))
    state.put("final", "r", content)
    with pytest.raises(hub.RunError, match=r"run r: .*another version"):
        Hub(tmp_path, "f" * 64, "localhost:1", state)


@pytest.mark.parametrize("abandoned", [False, True])
def test_a_server_that_was_started_again_shows_the_rounds_of_a_run_that_is_over(
    tmp_path: Path, abandoned: bool
) -> None:
    closed = [hub.Closed(n, 2, 0.5, 9, 1.0) for n in (1, 2)]

    async def end() -> None:
        made, run, _ = house(tmp_path, summary("finished", notices=["a word"]))
        made.state.put("charter", "r", hub.msgspec.json.encode(run.charter))
        for one in closed:  # told once each
            run._learn(Told(summary("finished", closed=[one])))
        run.abandon("it is lost") if abandoned else await run._end()

    asyncio.run(end())
    view = Hub(tmp_path, "f" * 64, "localhost:1").runs["r"].view({})
    assert view.closed == closed and not view.notices


# --- calls that wait together -----------------------------------------------------------------------------------------


class Several:
    """A run's process that takes its time, answers a few at once, and says of one site that it cannot."""

    alive = True

    def __init__(self, at_most: int = 100) -> None:
        self.heard, self.at_most = list[list[str]](), at_most

    async def call(self, call: Any, replies: Any, blobs: Any, **more: Any) -> tuple[Told, bytes]:
        await asyncio.sleep(0.01)
        (blob,) = blobs
        if not isinstance(call, children.Several):
            self.heard.append([call.site])
            return Told(Summary(number=len(self.heard)), False), bytes(blob).upper()
        assert sum(call.lengths) == len(blob)
        self.heard.append([c.site for c in call.calls])
        heard, answers = list[children.Heard](), b""
        for one in call.calls[: self.at_most]:
            said, blob = blob[: call.lengths[len(heard)]], blob[call.lengths[len(heard)] :]
            bad = one.site == "bad"
            heard.append(children.Heard(0, "it cannot") if bad else children.Heard(len(said)))
            answers += b"" if bad else bytes(said).upper()
        return Told(Summary(number=len(self.heard)), False, heard), answers

    async def end(self) -> None:
        self.alive = False


def asked(run: Run, site: str) -> "asyncio.Future[bytes]":
    return asyncio.ensure_future(run.ask(children.Receive(site, "", 0.0), site.encode() * 2))


@pytest.mark.parametrize("at_most", [1, 2, 100])
def test_what_waits_is_brought_together_and_everybody_has_the_own_answer(tmp_path: Path, at_most: int) -> None:
    async def ask() -> None:
        _, run, _ = house(tmp_path, summary("collecting"))
        run._child = process = Several(at_most)  # type: ignore[assignment]
        names = ["first", "a", "bad", "b", "gone", "c"]
        tasks = [asked(run, name) for name in names]
        await asyncio.sleep(0)
        tasks[4].cancel()
        told = await asyncio.gather(*tasks, return_exceptions=True)
        assert [t for t in told if isinstance(t, bytes)] == [b"FIRSTFIRST", b"AA", b"BB", b"CC"]
        assert str(told[2]) == "it cannot" and isinstance(told[4], asyncio.CancelledError)
        done = [name for names in process.heard for name in names[:at_most]]
        assert [name for name in done if name != "gone"] == ["first", "a", "bad", "b", "c"]
        assert ("gone" in done) == (at_most == 100), "who went away before it was heard is not"
        assert len(process.heard) == {1: 5, 2: 3, 100: 1}[at_most] and not run._waiting
        assert await asked(run, "alone") == b"ALONEALONE" and process.heard[-1] == ["alone"]

    asyncio.run(ask())


def test_no_more_is_brought_at_a_time_than_a_message_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        _, run, _ = house(tmp_path, summary("collecting"))
        run._child = process = Several()  # type: ignore[assignment]
        monkeypatch.setattr(hub.control, "LONGEST", 8)
        assert await asyncio.gather(*(asked(run, name) for name in ("long", "aa", "bb", "cc"))) == [
            b"LONGLONG", b"AAAA", b"BBBB", b"CCCC",
        ]  # fmt: skip
        assert process.heard == [["long"], ["aa", "bb"], ["cc"]]
        monkeypatch.setattr(hub, "AT_ONCE", 1)
        await asyncio.gather(asked(run, "a"), asked(run, "b"))
        assert process.heard[3:] == [["a"], ["b"]]

    asyncio.run(ask())


def test_a_process_that_dies_fails_all_it_was_told_and_nobody_waits_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(Several):
        async def call(self, call: Any, replies: Any, blobs: Any, **more: Any) -> tuple[Told, bytes]:
            await asyncio.sleep(0.01)
            raise children.ChildDied("it died")

    class Silent(Several):
        async def call(self, call: Any, replies: Any, blobs: Any, **more: Any) -> tuple[Told, bytes]:
            return Told(Summary(), False), b""

    class Broken(Several):
        async def call(self, call: Any, replies: Any, blobs: Any, **more: Any) -> tuple[Told, bytes]:
            raise ZeroDivisionError

    async def ask(process: Any, match: str) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        _, run, _ = house(tmp_path / match[:3], summary("collecting"))
        run._child = process
        tasks = [asked(run, name) for name in "abc"]
        told = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(t, hub.RunError) and match in str(t) for t in told) and not run._waiting
        run._child = Several()  # type: ignore[assignment]
        assert await asked(run, "d") == b"DD", "whoever comes then is heard"

    async def late() -> None:
        _, run, _ = house(tmp_path / "late", summary("collecting"))
        run._child = process = Several()  # type: ignore[assignment]
        monkeypatch.setattr(hub, "HOLD", 0.05)
        async with run._turn:
            with pytest.raises(hub.Denied, match="at work"):
                await asked(run, "a")
        assert not run._waiting and not process.heard
        assert await asked(run, "b") == b"BB"

    asyncio.run(ask(Dying(), "started again"))
    asyncio.run(ask(Silent(), "did not say"))
    asyncio.run(ask(Broken(), "broke off"))
    asyncio.run(late())


def test_what_was_left_for_the_next_time_does_not_wait_for_ever_when_that_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks(Several):
        async def call(self, call: Any, replies: Any, blobs: Any, **more: Any) -> tuple[Told, bytes]:
            if self.heard:
                raise ZeroDivisionError
            await asyncio.sleep(0.1)  # so long that nobody counts as waiting for the turn
            return await super().call(call, replies, blobs, **more)

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        _, run, _ = house(tmp_path, summary("collecting"))
        run._child = Breaks(1)  # type: ignore[assignment]
        monkeypatch.setattr(hub, "HOLD", 0.05)
        monkeypatch.setattr(hub, "AT_ONCE", 3)
        tasks = [asked(run, name) for name in ("a", "b", "c")]
        await asyncio.sleep(0.06)  # the last one's time for waiting is over while it is being brought
        monkeypatch.setattr(hub, "AT_ONCE", 1)
        told = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10.0)
        assert told[0] == b"AA" and all(isinstance(t, hub.Denied) and "broke off" in str(t) for t in told[1:])
        assert not run._waiting

    asyncio.run(ask())


@pytest.mark.parametrize("kind", ["ValueError", "Overtaken"])
@pytest.mark.parametrize("count", [1, 3])
def test_what_breaks_in_a_runs_process_is_not_told_to_sites_and_is_not_the_others_fault(
    tmp_path: Path, kind: str, count: int
) -> None:
    class Broken(Several):
        async def call(self, call: Any, replies: Any, blobs: Any, **more: Any) -> Any:
            if count == 1 or kind == "Overtaken":
                return children.Broken(kind, "/srv/atoll/secret"), b""
            told, answers = await super().call(call, replies, blobs, **more)
            return Told(told.summary, False, [children.Heard(0, "/srv/atoll/secret"), *told.heard[1:]]), answers[2:]

    async def ask() -> list[Any]:
        made, run, _ = house(tmp_path, summary("collecting"))
        run._child = Broken()  # type: ignore[assignment]
        member = Member("site0", "site", "", 0.0)
        first = asyncio.ensure_future(made.call(member, hub.calls.Statistic("r", "survey", "{}")))
        others = [asked(run, name) for name in "bc"[: count - 1]]
        return await asyncio.gather(first, *others, return_exceptions=True)

    told = asyncio.run(ask())
    wrong = [t for t in told if isinstance(t, hub.Denied)]
    assert wrong and not any("secret" in str(t) for t in told)
    if kind == "Overtaken":
        assert len(wrong) == count and all(t.problem.kind == "busy" for t in wrong), "nobody gives up for it"
    else:
        assert wrong == told[:1] and wrong[0].problem.kind == "argument" and told[1:] == [b"BB", b"CC"][: count - 1]


def test_a_site_is_not_told_what_broke_when_its_message_was_taken(tmp_path: Path) -> None:
    class Broken(Several):
        async def call(self, call: Any, replies: Any, blobs: Any, **more: Any) -> Any:
            return children.Broken("ValueError", "/srv/atoll/secret"), b""

    async def ask() -> None:
        _, run, _ = house(tmp_path, summary("collecting"))
        run._child = Broken()  # type: ignore[assignment]
        with pytest.raises(hub.Denied, match="log says why"):
            await run.receive("s", control.Ask("r", "s"))

    asyncio.run(ask())


def test_why_a_runs_process_cannot_start_is_shown_to_watchers_and_not_told_to_sites(tmp_path: Path) -> None:
    async def ask() -> None:
        _, run, _ = house(tmp_path, summary("collecting"))
        run._child = None
        run._broken("its process cannot be started: /srv/atoll/secret")
        with pytest.raises(hub.Denied) as denied:
            await run.receive("s", control.Ask("r", "s"))
        assert denied.value.problem.kind == "busy" and "secret" not in denied.value.problem.text
        assert "secret" in run.view({}).reason

    asyncio.run(ask())


def test_a_question_is_asked_anew_when_a_site_of_an_asynchronous_run_has_another_task(tmp_path: Path) -> None:
    """Whatever the phase, since a site may be asked while a step is made."""

    _, run, _ = house(tmp_path, summary("reducing"))

    def run_of(task: tuple[int, int] | None, doing: Any = "asked", counted: Any = None) -> Run:
        place = Place("active", counted, doing, task=task)
        run.summary = summary("reducing", round=4, attempt=1, sites={"s": place})
        return run

    def at(run: Run, working: tuple[int, int] | None) -> Any:
        return run._at("s", control.Ask("r", "s", working))

    idle = at(run_of(None, ""), None)
    assert at(run_of((4, 9)), None) != idle, "there is work for it"
    assert at(run_of((2, 7)), (2, 7)) == idle, "it has it"
    assert at(run_of((4, 9)), (2, 7)) != idle, "another one instead"
    assert at(run_of(None, "delivered", (2, 7)), None) != idle, "its update was counted"
    view = run_of((2, 7)).view({})
    assert view.sites[0].behind == 2 and run_of((4, 0)).view({}).sites[0].behind is None
