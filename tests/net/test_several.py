"""Several servers on one PostgreSQL, in one process: whichever a party comes to, it is heard as by one."""

import asyncio
import fcntl
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import sqlalchemy as sql

from atoll.errors import InvalidArgument, RunError
from atoll.net import calls, enrolment, handing, server, several, signing
from atoll.net.client import Client, Unreachable, client_context, join, line
from atoll.net.handing import Answers, Hands
from atoll.net.home import Home
from atoll.net.keys import key_at
from atoll.net.leading import Lead
from atoll.net.server import listening, opened
from atoll.net.several import One, serve_several
from atoll.net.state import Overtaken, State, Taken

pytestmark = pytest.mark.usefixtures("unsynced")

Call = Callable[[int, calls.Call], Coroutine[Any, Any, Any]]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 120.0))


async def until(done: Callable[[], bool]) -> None:
    while not done():
        await asyncio.sleep(0.01)


class House:
    """Servers in one folder with one database."""

    def __init__(self, folder: Path, database: str) -> None:
        self.folder, self.database = folder / "server", database
        self.ones: list[One] = []
        self.ports: list[int] = []
        self.tasks: list[asyncio.Task[None]] = []

    def one(self) -> One:
        self.folder.mkdir(exist_ok=True, mode=0o700)
        listener, inside = listening("127.0.0.1", 0), listening("127.0.0.1", 0)
        state, note = opened(self.folder, self.database, "process")
        lead = Lead(state, f"127.0.0.1:{inside.getsockname()[1]}")
        made = One(self.folder, state, note, listener, inside, lead, "127.0.0.1:9", lambda *words: None, None)
        self.ones.append(made)
        self.ports.append(listener.getsockname()[1])
        self.tasks.append(asyncio.create_task(made.live()))
        return made

    @property
    def leader(self) -> int:
        """Which leads; -1: none, or more than one."""
        found = [i for i, one in enumerate(self.ones) if one.leads]
        return found[0] if len(found) == 1 else -1

    def at(self, home: Home, which: int) -> Home:
        """A party that reaches a server of its choice."""
        found = Home(home.folder)
        found.identity = msgspec.structs.replace(home.identity, address=f"127.0.0.1:{self.ports[which]}")
        return found

    async def call(self, which: int, call: calls.Call, home: Home | None = None) -> Any:
        client = Client(self.at(home or Home(self.folder / "admin"), which))
        try:
            return await client.call(call)
        finally:
            await client.close()

    async def invite(self, name: str, which: int) -> enrolment.Invite:
        made: calls.Invites = await self.call(which, calls.MakeInvites([name], "site", 1.0))
        return enrolment.decode(made.words[0])

    def there(self, invite: enrolment.Invite, which: int) -> enrolment.Invite:
        return msgspec.structs.replace(invite, address=f"127.0.0.1:{self.ports[which]}")


@asynccontextmanager
async def house(folder: Path, database: str) -> AsyncIterator[House]:
    """Two servers, of which one leads."""
    made = House(folder, database)
    try:
        made.one()
        made.one()
        await until(lambda: made.leader >= 0 and (made.folder / "admin" / "identity.json").exists())
        yield made
    finally:
        for one in made.ones:
            one.ends()
        await asyncio.gather(*made.tasks, return_exceptions=True)
        for one in made.ones:
            one._state.close()
            one._inside.close()
            one._listener.close()


def test_parties_are_heard_as_by_one_whichever_server_they_come_to_and_whichever_leads(
    tmp_path: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several, "LOOK", 0.05)

    async def live() -> None:
        async with house(tmp_path, postgresql) as found:
            leads, stands_by = found.leader, 1 - found.leader

            # An invite lets one in, though two come to both servers at once.
            invite = await found.invite("a", stands_by)
            came = await asyncio.gather(
                *(join(found.there(invite, i % 2), tmp_path / f"a{i}") for i in range(6)), return_exceptions=True
            )
            homes = [c for c in came if isinstance(c, Home)]
            assert len(homes) == 1 and all("used already" in str(c) for c in came if not isinstance(c, Home)), came
            a = homes[0]

            # A question that is held back at one server is woken by what happens at the other.
            first: calls.Errands = await found.call(stands_by, calls.Agenda(-1, {}), a)
            held = asyncio.create_task(found.call(stands_by, calls.Agenda(first.version, {}), a))
            await asyncio.sleep(0)
            b = await join(found.there(await found.invite("b", leads), leads), tmp_path / "b")
            woken: calls.Errands = await held
            assert woken.version > first.version

            # A request counts once: brought again to another server it is refused.
            client = Client(found.at(b, leads))
            await client.call(calls.Agenda(-1, {}))
            body = calls.encode(calls.Agenda(-1, {}))
            answers = [await sent(found, b, client, body, which) for which in (stands_by, leads, stands_by)]
            assert [a.status_code for a in answers] == [200, 409, 409]
            await client.close()

            # Whoever is shut out at one is shut out at all.
            await found.call(leads, calls.Revoke("b"))
            with pytest.raises(RunError, match="shut out"):
                await found.call(stands_by, calls.Agenda(-1, {}), b)

            # The one whose line is cut steps down; it or the other one leads, and nothing is lost.
            before = found.ones[leads]._lead.token
            held = asyncio.create_task(found.call(stands_by, calls.Agenda(1_000, {}), a))
            with closing(State(postgresql)) as state, state.engine.begin() as cutting:
                assert cutting.execute(CUT).scalar() == 1
            await until(lambda: found.leader >= 0 and found.ones[found.leader]._lead.token != before)
            with pytest.raises(Unreachable):
                await held
            answers = [await sent(found, a, client, body, which) for which in range(2)]
            assert all(problem(answer).kind == "epoch" for answer in answers), "what was said to the one before is void"
            for which in range(2):
                assert isinstance(await found.call(which, calls.Agenda(-1, {}), a), calls.Errands)
            members: calls.Members = await found.call(0, calls.ListMembers())
            assert {m.name: m.revoked for m in members.members} == {"admin": False, "a": False, "b": True}

    run(live())


CUT = sql.text(
    "SELECT count(pg_terminate_backend(pid)) FROM pg_locks WHERE locktype = 'advisory' AND objid = 0 AND "
    "classid = 'atoll_meta'::regclass::oid"
)


def problem(answer: httpx.Response) -> calls.Problem:
    return msgspec.json.decode(answer.content, type=calls.Problem)


_signed: dict[str, httpx.Headers] = {}


async def sent(found: House, home: Home, client: Client, body: bytes, which: int) -> httpx.Response:
    """The very same request, to a server."""
    context = client_context(home.authority)
    async with line(f"127.0.0.1:{found.ports[which]}", context) as http:
        request = http.build_request("POST", "/v1/call", content=body)
        if home.identity.name not in _signed:
            number = client._numbers.next()
            signing.sign_request(home.key, home.identity.name, Plain(request), number, body)
            _signed[home.identity.name] = request.headers
        for name in ("Content-Digest", "Signature-Input", "Signature"):
            request.headers[name] = _signed[home.identity.name][name]
        return await http.send(request)


def test_a_connection_that_a_server_took_while_it_led_is_not_answered_afterwards(
    tmp_path: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several, "LOOK", 0.05)

    async def live() -> None:
        async with house(tmp_path, postgresql) as found:
            before, slow = found.leader, ssl.create_default_context()
            slow.check_hostname, slow.verify_mode = False, ssl.CERT_NONE
            reader, writer = await asyncio.open_connection("127.0.0.1", found.ports[before])
            await asyncio.sleep(0.2)  # taken, and it says nothing yet
            epoch = found.ones[before]._lead.token
            found.ones[before]._lead.cut()
            await until(lambda: found.leader >= 0 and found.ones[before]._lead.token != epoch)
            heard = b""
            with suppress(OSError, asyncio.IncompleteReadError):
                await writer.start_tls(slow)
                writer.write(b"GET /v1/authority HTTP/1.1\r\nhost: x\r\n\r\n")
                heard = await reader.read(100)
            writer.close()
            assert heard == b""

    run(live())


class Plain:
    def __init__(self, request: httpx.Request) -> None:
        self.method, self.url, self.headers = request.method, str(request.url), request.headers


def test_whoever_lost_the_lead_writes_nothing_any_more(postgresql: str) -> None:
    states = [State(postgresql, durability="process") for _ in range(2)]
    one, two = (Lead(state, f"127.0.0.1:{i}") for i, state in enumerate(states))
    try:
        assert one.leader() is None and one.take() and not two.take()
        one.tell()
        told = two.leader()
        assert told == (one.token, "127.0.0.1:0")
        states[0].put("newest", "k", b"before")
        roster = states[0].journal("roster")
        roster.append(b"before")
        with pytest.raises(Taken):
            states[1].journal("roster")
        one.cut()
        with pytest.raises(OSError):
            one.beat()
        while not two.take():
            time.sleep(0.01)
        states[0].put("newest", "k", b"nobody has told anything else yet")
        two.tell()
        for write in (lambda: states[0].put("newest", "k", b"after"), lambda: states[0].forget("runs/")):
            with pytest.raises(OSError, match="another server leads"):
                write()
        states[1].put("newest", "k", b"two")
        assert states[0].documents("newest") == {"k": b"two"}
        states[1].alone()
        assert two.leader() is None
        with pytest.raises(OSError, match="another server leads"):
            states[1].put("newest", "k", b"beside one that is alone")
        roster._drop()  # as a line that broke with the other one
        with closing(states[1].journal("roster")) as taken:
            taken.append(b"two")
        with pytest.raises(Overtaken):
            roster.append(b"after")
        roster.close()
    finally:
        for each in (one, two):
            each.drop()
        for state in states:
            state.close()


# --- who may be one of several ----------------------------------------------------------------------------------------


def serve(folder: Path, database: str | None, **more: Any) -> None:
    common: dict[str, Any] = {
        "host": "127.0.0.1", "port": 0, "address": "sites.example:8443", "among": "127.0.0.1:0",
        "told": lambda *words: None,
    }  # fmt: skip
    serve_several(folder, database=database, **(common | more))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"address": None}, "--address HOST:PORT"),
        ({"among": "0.0.0.0:1"}, "where the other servers reach this one"),
        ({"among": "127.0.0.1"}, "where the other servers reach this one"),
    ],
)
def test_arguments_that_cannot_be_are_refused(tmp_path: Path, more: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        serve(tmp_path / "server", None, **more)
    assert not (tmp_path / "server").exists()


def test_several_need_a_postgresql(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.umask", lambda mask: mask)
    with pytest.raises(RunError, match=r"several servers need a PostgreSQL that they share.*--database postgresql://"):
        serve(tmp_path / "server", None)


def test_servers_of_another_key_or_folder_are_refused(
    tmp_path: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several, "SHARED", 0.3)
    monkeypatch.setattr(server, "LETTING_GO", 0.0)
    monkeypatch.setattr("os.umask", lambda mask: mask)

    found, other = tmp_path / "server", tmp_path / "other"
    found.mkdir()
    state = State(postgresql)
    server.establish(found, "sites.example:8443", state)
    lead = Lead(state, "127.0.0.1:1")
    assert lead.take()
    lead.tell()
    roster = state.journal("roster")
    with pytest.raises(RunError, match=r"has no key.*one folder"):
        alone(other, postgresql)
    key_at(other / "key", make=True)
    with pytest.raises(RunError, match="the state of another server"):
        alone(other, postgresql)
    (other / "key").write_bytes((found / "key").read_bytes())
    with pytest.raises(RunError, match="does not work in"):
        alone(other, postgresql)
    common: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "address": None, "told": lambda *words: None}
    with pytest.raises(RunError, match=r"works on the state in .* for several at once each needs --among"):
        server.serve(other, database=postgresql, **common)
    with open(found / "lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as each of several has it
        with pytest.raises(RunError, match=r"another server works in .* each of them --among"):
            server.serve(found, database=postgresql, **common)
    roster.close()
    lead.drop()
    state.close()


def alone(folder: Path, database: str) -> None:
    """A server that finds out soon that it cannot be one of several."""
    made = House(folder.parent, database)
    made.folder = folder

    async def live() -> None:
        one = made.one()
        try:
            await asyncio.wait_for(made.tasks[0], 30.0)
        finally:
            one._state.close()
            one._inside.close()
            one._listener.close()

    asyncio.run(live())


# --- connections that are handed over ---------------------------------------------------------------------------------


def test_a_connection_is_told_where_it_came_from_by_servers_of_the_key_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x").mkdir()
    own, strange = key_at(tmp_path / "key", make=True), key_at(tmp_path / "x" / "key", make=True)
    monkeypatch.setattr(handing, "WAIT", 0.5)
    places: list[tuple[str, int]] = []

    async def live() -> None:
        answers, tasks = Answers(own.public_key()), set[asyncio.Task[None]]()

        async def take(line: socket.socket, place: tuple[str, int]) -> None:
            places.append(place)
            loop = asyncio.get_running_loop()
            with line:
                await loop.sock_sendall(line, (await loop.sock_recv(line, 100)).upper())

        with listening("127.0.0.1", 0) as inside, listening("127.0.0.1", 0) as front:
            inside.setblocking(False)
            front.setblocking(False)
            hands = {key: Hands(key) for key in (own, strange)}
            now = own
            taking = [
                asyncio.create_task(handing.listen(inside, answers.greeted, tasks)),
                asyncio.create_task(handing.listen(front, lambda line, at: hands[now].take(line, at), tasks)),
            ]
            for each in hands.values():
                each.to = f"127.0.0.1:{inside.getsockname()[1]}"
            assert await said(front) == (b"", 0), "nobody answers"
            answers.take = take
            heard, port = await said(front)
            assert heard == b"WORD" and places == [("127.0.0.1", port)]
            now = strange
            for _ in range(2):
                assert (await said(front))[0] == b"" and len(places) == 1
            told = [m for m in caplog.messages if "not a server of this key" in m]
            assert len(told) == 1, "a stranger fills no log"
            for task in [*taking, *tasks]:
                task.cancel()
            await asyncio.gather(*taking, *tasks, return_exceptions=True)

    async def said(front: socket.socket) -> tuple[bytes, int]:
        reader, writer = await asyncio.open_connection(*front.getsockname())
        port = writer.get_extra_info("sockname")[1]
        writer.write(b"word")
        try:
            heard = await reader.read(100)
        except ConnectionError:
            heard = b""
        writer.close()
        return heard, port if heard else 0

    run(live())
