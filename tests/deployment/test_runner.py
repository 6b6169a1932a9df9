"""The process of a run, without a process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from atoll.deployment import runner
from atoll.errors import RunError
from atoll.history import Record
from atoll.net import control, coordinator, service
from atoll.net.calls import Charter
from atoll.net.children import Broken, Do, Heard, Host, Receive, Several, Summary, Told
from atoll.net.state import Overtaken
from atoll.net.storage import Content, Disk


def test_a_process_whose_journal_was_overtaken_ends_so_that_a_new_one_begins_with_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [Host(str(tmp_path), Charter("r", "0" * 64, {}), 0.0, "sqlite:////nowhere"), Do(1.0), Do(2.0), Do(3.0)]
    replies: list[Any] = []
    works = [RunError("later"), Overtaken("the journal was overtaken"), None]

    class Line:
        def __init__(self, descriptor: int) -> None:
            self.said = [(runner.msgspec.json.encode(call), b"") for call in said]

        def receive(self) -> tuple[bytes, bytes] | None:
            return self.said.pop(0) if self.said else None

        def reply(self, reply: Any, *blobs: bytes) -> None:
            replies.append(reply)

    class Run:
        def __init__(self, host: Host) -> None:
            pass

        def carry_out(self, call: Any, blob: bytes) -> bytes:
            if (error := works.pop(0)) is not None:
                raise error
            return b""

        def told(self, heard: Any) -> Told:
            return Told(Summary())

    monkeypatch.setattr(runner, "Channel", Line)
    monkeypatch.setattr(runner, "Runner", Run)
    runner.main(["0"])
    assert [type(reply) for reply in replies] == [Told, Broken, Broken]
    assert (replies[1].text, replies[2].text) == ("later", "the journal was overtaken")


def test_several_calls_are_done_in_their_order_whatever_becomes_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = object.__new__(runner.Runner)
    done = list[tuple[str, bytes]]()

    def carry_out(call: Receive, blob: Any) -> bytes:
        done.append((call.site, bytes(blob)))
        if call.site == "b":
            raise ValueError("the author's code")
        if call.site == "o":
            raise Overtaken("another process")
        return call.site.encode() * 3

    run.carry_out = carry_out
    calls = Several([Receive(s, "", 0.0) for s in "abc"], [1, 0, 2])
    heard, answers = run.several(calls, memoryview(b"xyz"))
    assert done == [("a", b"x"), ("b", b""), ("c", b"yz")] and answers == [b"aaa", b"ccc"]
    assert heard == [Heard(3), Heard(0, "ValueError: the author's code"), Heard(3)]
    monkeypatch.setattr(runner.control, "LONGEST", 3)
    heard, answers = run.several(calls, memoryview(b"xyz"))
    assert (heard, answers) == ([Heard(3)], [b"aaa"]), "the others are asked again"
    with pytest.raises(Overtaken):
        run.several(Several([Receive(s, "", 0.0) for s in "oa"], [0, 0]), memoryview(b""))


def test_a_report_that_was_brought_twice_is_answered_although_its_content_is_kept_by_now(tmp_path: Path) -> None:
    given: list[Content] = []

    def receive(site: str, message: bytes, content: Content, now: float) -> tuple[control.Answer, Content]:
        given.append(content)
        return control.Received("r", 0, 1, None), Content()

    held = SimpleNamespace(_files=Disk(tmp_path), _given="", service=SimpleNamespace(receive=receive))
    answer = runner.Runner._received(cast(Any, held), "s", b"", "gone", 0.0)
    assert control.decode_answer(answer) == control.Received("r", 0, 1, None) and given[0].size == 0


def test_an_error_that_is_no_text_can_be_told_all_the_same() -> None:
    """Names of files may be bytes that are no text, and an error's words then cannot be written as they are."""
    for error in (ValueError("data-\udcff.csv"), RunError("data-\udcff.csv")):
        for told in (runner._broken(error), coordinator.Failed(0, 1, service._told(error))):
            assert b"data-?.csv" in msgspec.json.encode(told)


def test_a_rounds_seconds_begin_with_its_own_task_and_not_with_an_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both may be the very same bytes."""
    clock, told = iter([10.0, 25.0]), list[float]()
    work = control.Work("r", 1, 0, "0" * 64, 1, "evaluate", 0, ("a",), 1, {}, None)
    train = msgspec.structs.replace(work, attempt=1, kind="train")
    said = iter([work, work, train, train])
    held: Any = SimpleNamespace(
        _last=0.0, _given=(-1, False),
        service=SimpleNamespace(receive=lambda *given: (next(said), Content())),
    )  # fmt: skip
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(clock))
    for _ in range(4):
        runner.Runner._received(held, "a", b"", "", 0.0)
        told.append(held._last)
    assert told == [10.0, 10.0, 25.0, 25.0]


def test_an_authors_metrics_fill_no_message() -> None:
    many = {f"{n:0500d}": 1.0 for n in range(5000)}
    shown = runner._shown(Record(1, 3, {"loss": 0.5}, test=many))
    assert len(msgspec.json.encode(shown)) < 2**15 and len(shown.metrics) == 1, "names that begin alike are one"
    few = {f"class {n}": 0.5 for n in range(5000)}
    assert len(runner._shown(Record(1, 3, {"loss": 0.5}, test=few)).metrics) == runner.SHOWN


@pytest.mark.parametrize("content", [None, b"raise SystemExit('ran what nobody submitted')"])
def test_an_app_file_that_was_not_submitted_is_not_run(tmp_path: Path, content: bytes | None) -> None:
    app = tmp_path / "objects" / "x"
    app.parent.mkdir()
    if content is not None:
        app.write_bytes(content)
    with pytest.raises(RunError, match="gone, or not the app file that was submitted"):
        runner._readable(tmp_path, app, "0" * 64)
    assert not (tmp_path / "app.py").exists()
