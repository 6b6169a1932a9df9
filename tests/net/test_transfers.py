"""Objects on their way: by signed requests, taken up where they broke off, and never more than can be."""

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from doors import House, problem, run

from atoll.net import client, control
from atoll.net.calls import Charter
from atoll.net.children import Place, Summary, Told
from atoll.net.client import Turned, Unreachable
from atoll.net.control import content_hash
from atoll.net.hub import Denied, Run
from atoll.net.news import News

pytestmark = pytest.mark.usefixtures("unsynced")

CONTENT = bytes(i * 7 % 251 for i in range(10_000))
SHA256 = content_hash(CONTENT)


def summary(**more: Any) -> Summary:
    blank: dict[str, Any] = {
        "phase": "collecting", "rounds": 2, "attempt": 1, "wanted": 1, "least": 1, "number": 1, "largest": 20_000,
        "sites": {"s": Place("active", doing="asked")},
    }  # fmt: skip
    return Summary(**(blank | more))


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr(client, "CHUNK", 1000)
    house = House(tmp_path)
    folder = tmp_path / "server" / "runs" / "r"
    for name in ("task", "uploads"):
        (folder / name).mkdir(parents=True)
    made = Run(folder, Charter("r", "0" * 64, {}), News(), lambda name: False, house.hub.state)
    made.summary = summary()
    house.hub.runs["r"] = made
    return house


def hosted(house: House) -> Run:
    return house.hub.runs["r"]


def there(house: House, site: str = "s") -> bytes:
    path = hosted(house).upload(site, SHA256)
    return path.read_bytes() if path.exists() else b""


def append(house: House, site: str, sha256: str, size: int, offset: int, chunk: bytes) -> int:
    with closing(hosted(house).taking(site, sha256, size, offset, len(chunk))) as taking:
        taking.take(chunk)
        return taking.received


def test_an_upload_arrives_whole_and_an_object_is_fetched(house: House) -> None:
    (hosted(house).folder / "task" / SHA256).write_bytes(CONTENT)

    async def both() -> bytes:
        line = house.client("s")
        await line.upload("r", CONTENT, SHA256)
        return await line.fetch("r", SHA256, limit=10_000)

    assert run(both()) == CONTENT and there(house) == CONTENT


class Breaking(httpx.AsyncBaseTransport):
    """A line that breaks at every n-th request: before it is sent, or after it was heard."""

    def __init__(self, inner: httpx.AsyncBaseTransport, every: int, after: bool) -> None:
        self.inner, self.every, self.after, self.count = inner, every, after, 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.count += 1
        breaks = self.count % self.every == 0
        if breaks and not self.after:
            raise httpx.ConnectError("reset")
        answer = await self.inner.handle_async_request(request)
        if breaks:
            await answer.aclose()
            raise httpx.ReadError("reset")
        return answer


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("every", [2, 3, 5])
def test_an_upload_is_taken_up_where_it_broke_off(house: House, every: int, after: bool) -> None:
    line = house.client("s")
    line._http = httpx.AsyncClient(
        transport=Breaking(httpx.ASGITransport(app=house.door.app), every, after), base_url="https://h:1"
    )
    run(line.upload("r", CONTENT, SHA256))
    assert there(house) == CONTENT


def test_an_upload_that_another_program_began_is_gone_on_with(house: House) -> None:
    assert append(house, "s", SHA256, len(CONTENT), 0, CONTENT[:3500]) == 3500
    run(house.client("s").upload("r", CONTENT, SHA256))
    assert there(house) == CONTENT


def test_a_line_that_never_gets_on_is_given_up(house: House) -> None:
    line = house.client("s")
    line._http = httpx.AsyncClient(
        transport=Breaking(httpx.ASGITransport(app=house.door.app), 1, False), base_url="https://h:1"
    )
    for work in (line.upload("r", CONTENT, SHA256), line.fetch("r", SHA256, limit=10_000)):
        with pytest.raises(Unreachable, match="cannot be reached"):
            run(work)


def test_a_download_is_taken_up_and_held_against_its_hash(house: House) -> None:
    (hosted(house).folder / "task" / SHA256).write_bytes(CONTENT)
    line = house.client("s")
    real, calls = line._http.send, list[str]()

    async def send(request: httpx.Request, **more: Any) -> httpx.Response:
        calls.append(request.headers.get("range", ""))
        answer = await real(request, **more)
        if answer.status_code in (200, 206) and len(calls) < 6:
            parts = answer.aiter_raw

            async def some() -> Any:
                async for part in parts():
                    yield part[:1500]
                    raise httpx.ReadError("reset")

            answer.aiter_raw = some  # type: ignore[method-assign]
        return answer

    line._http.send = send  # type: ignore[method-assign]
    assert run(line.fetch("r", SHA256, limit=10_000)) == CONTENT
    assert calls[-1].startswith("bytes=") and len(set(calls)) > 3
    (hosted(house).folder / "task" / SHA256).write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(Unreachable, match="SHA-256 differs"):
        run(house.client("s").fetch("r", SHA256, limit=10_000))
    with pytest.raises(Turned, match="limit 100"):
        run(house.client("s").fetch("r", SHA256, limit=100))
    with pytest.raises(Turned, match="no such object"):
        run(house.client("s").fetch("r", "1" * 64, limit=100))


@pytest.mark.parametrize(
    ("size", "offset", "chunk", "kind"),
    [
        (20_001, 0, b"x", "large"), (0, 0, b"x", "large"), (2, 0, b"xxx", "large"), (10, 5, b"x", "partial"),
        (10**17, 0, b"x", "large"),
    ],
)  # fmt: skip
def test_a_chunk_that_cannot_be_is_refused_and_nothing_is_kept(
    house: House, size: int, offset: int, chunk: bytes, kind: str
) -> None:
    with pytest.raises(Denied) as refused:
        append(house, "s", SHA256, size, offset, chunk)
    assert refused.value.problem.kind == kind and not there(house)


def test_chunks_come_once_and_in_order(house: House) -> None:
    append(house, "s", SHA256, 10, 0, b"abc")
    for offset in (0, 1, 4):
        with pytest.raises(Denied) as refused:
            append(house, "s", SHA256, 10, offset, b"abc")
        assert refused.value.problem.received == 3
    assert append(house, "s", SHA256, 10, 3, b"defghij") == 10 and there(house) == b"abcdefghij"


def test_a_site_has_one_report_on_its_way_and_no_others(house: House) -> None:
    append(house, "s", "1" * 64, 10, 0, b"old")
    append(house, "t", SHA256, 10, 0, b"others")
    append(house, "s", SHA256, 10, 0, b"new")
    assert there(house) == b"new" and there(house, "t") == b"others"
    assert len(list((hosted(house).folder / "uploads").iterdir())) == 2


@pytest.mark.parametrize(
    "query", ["", "size=1", "size=-1&offset=0", "size=1&offset=x", "size=²&offset=0", "size=1e3&offset=0"]
)
def test_size_and_offset_must_be_numbers(house: House, query: str) -> None:
    answer = run(house.send("s", b"x", path=f"/v1/uploads/r/{SHA256}?{query}", method="PUT"))
    assert problem(answer).kind == "argument"


def test_of_two_requests_that_bring_the_same_report_the_later_one_does(house: House) -> None:
    run_ = hosted(house)
    with closing(run_.taking("s", SHA256, 6, 0, 6)) as first:
        first.take(b"ab")
        with closing(run_.taking("s", SHA256, 6, 2, 4)) as second:
            with pytest.raises(Denied) as refused:
                first.take(b"XY")
            assert refused.value.problem.kind == "partial"
            first.close()
            second.take(b"cd")
        with closing(run_.taking("s", SHA256, 6, 4, 2)) as third:
            third.take(b"e")
            with pytest.raises(Denied, match="more bytes"):
                third.take(b"fg")
    assert there(house) == b"abcde"


def test_nothing_is_added_to_a_report_that_is_looked_at_or_gone(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    made, looked = hosted(house), list[Any]()

    async def ask(call: Any, blob: bytes = b"") -> bytes:
        looked.append(call.upload)
        return control.encode(control.Received("r", 0, 1, None))

    monkeypatch.setattr(made, "ask", ask)
    deliver = control.Deliver("r", "s", 0, 1, "0" * 64, SHA256, 3, (1, 0, 0), 0)
    with closing(made.taking("s", SHA256, 3, 0, 3)) as taking:
        taking.take(b"abc")
        run(made.receive("s", deliver))
        with pytest.raises(Denied):
            taking.take(b"")
    with closing(made.taking("s", SHA256, 3, 0, 3)) as taking:
        run_ = made.taking("s", "1" * 64, 3, 0, 3)  # a site has one report on its way
        run_.close()
        with pytest.raises(Denied):
            taking.take(b"abc")
    assert looked == [made.upload("s", SHA256).name] and not there(house)


@pytest.mark.parametrize(("sha256", "size", "offset"), [(SHA256, 4, 3), (SHA256, 2, 0), ("1" * 64, 3, 0)])
def test_nobody_changes_a_report_between_the_look_at_it_and_its_keeping(
    house: House, monkeypatch: pytest.MonkeyPatch, sha256: str, size: int, offset: int
) -> None:
    made, kept = hosted(house), list[bytes]()

    async def ask(call: Any, blob: bytes = b"") -> bytes:
        with pytest.raises(Denied) as refused:
            append(house, "s", sha256, size, offset, b"x")
        assert refused.value.problem.kind == "busy" and append(house, "t", SHA256, 3, 0, b"abc") == 3
        kept.append(there(house))
        return control.encode(control.Received("r", 0, 1, None))

    monkeypatch.setattr(made, "ask", ask)
    append(house, "s", SHA256, 3, 0, b"abc")
    run(made.receive("s", control.Deliver("r", "s", 0, 1, "0" * 64, SHA256, 3, (1, 0, 0), 0)))
    assert kept == [b"abc"] and append(house, "s", SHA256, 3, 0, b"abc") == 3


@pytest.mark.parametrize("length", ["", "-5", "1e3", "x"])
def test_a_server_that_does_not_say_how_long_an_object_is(house: House, length: str) -> None:
    (hosted(house).folder / "task" / SHA256).write_bytes(CONTENT)
    line = house.client("s")
    real = line._http.send

    async def send(request: httpx.Request, **more: Any) -> httpx.Response:
        answer = await real(request, **more)
        if answer.status_code == 200:
            answer.headers["content-length"] = length
        return answer

    line._http.send = send  # type: ignore[method-assign]
    with pytest.raises(Unreachable, match="how long"):
        run(line.fetch("r", SHA256, limit=10_000))


# --- questions that are held back -------------------------------------------------------------------------------------


def test_a_question_is_answered_when_there_is_news(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = hosted(house), list[int]()
    answers = [control.Wait("r", 0, None), control.Wait("r", 0, None), control.Wait("r", 1, (0, 1))]

    async def received(site: str, request: Any) -> control.Answer:
        asked.append(1)
        return answers[min(len(asked), 3) - 1]

    monkeypatch.setattr(made, "_received", received)

    async def hold() -> control.Answer:
        held = asyncio.ensure_future(made.receive("s", control.Ask("r", "s")))
        for number, attempt in enumerate((1, 2, 3), 1):  # the first news is none for this site
            await asyncio.sleep(0.05)
            assert not held.done() and len(asked) == max(1, number - 1)
            made._learn(Told(summary(attempt=attempt, number=number)))
        return await asyncio.wait_for(held, 60.0)

    assert run(hold()) == answers[2] and len(asked) == 3


def test_a_run_that_is_over_tells_what_it_counted(house: House) -> None:
    made = hosted(house)
    made.over = True
    made.summary = summary(phase="finished", round=2, reason="done", sites={"s": Place("active", (1, 3))})
    told = run(house.client("s").say(control.Ask("r", "s")))
    assert told == control.Ended("r", 2, "done", (1, 3))
    assert run(house.client("t").say(control.Ask("r", "t"))).counted is None
    with pytest.raises(Turned):
        run(house.client("s").upload("r", CONTENT, SHA256))
