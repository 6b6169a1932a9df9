"""The server's door: HTTPS, who is heard, and how much of it.

    GET  /v1/authority                          the certificate of the server's authority; for everybody
    POST /v1/enrol                              `calls.Enrol`, signed by the newcomer's key
    POST /v1/call                               a `calls.Call`
    POST /v1/message                            a `control.Request` of a site
    GET  /v1/objects/RUN/SHA256                 what sites fetch, from an offset on (Range)
    PUT  /v1/uploads/RUN/SHA256?size=&offset=   the next bytes of a report, which as a whole is held to its hash
    POST /v1/sealed                             any of these, sealed to the server (`unsealing`)

A request is looked at from the outside in: how large it says it is, whose signature it has (over headers that hold the
content's digest, but for bytes of a report, of which the whole's hash is signed as part of the path), whether it is
fresh, whether its sender may do this; only then is a byte of its content kept. Every answer to a signed request is
signed. Who has not shown a signature has little of everything: connections, requests,
time. Everybody must get on: headers and contents that trickle are cut off.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import resource
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from atoll.errors import AtollError, InvalidArgument, RunError, invalid
from atoll.net import calls, control, signing
from atoll.net.calls import ROLES, TRAINERS, Problem, Received, Welcome
from atoll.net.client import local
from atoll.net.enrolment import EnrolmentError, Member, Roster
from atoll.net.home import Home, Identity, settle
from atoll.net.hub import Denied, Hub
from atoll.net.keys import authority, authority_key, fingerprint, key_at, public_key, public_text, server_context
from atoll.net.signing import Fresh, SignatureError
from atoll.net.storage import state_of, write_file
from atoll.net.unsealing import Unsealing

if TYPE_CHECKING:  # a database is opened when the server starts
    from atoll.database import Durability
    from atoll.net.shelves import Shelves
    from atoll.net.state import State

CHUNK = 2**26
"""Bytes of an upload that come with one request at most."""
SMALL = 2**14
"""Bytes a newcomer may send."""
HEADERS = 2**14
"""Bytes of headers."""
STALL = 20.0
"""Seconds in which headers must be there, and within which some of a content must come."""
SLOWEST = 4096
"""Bytes a second that a content must bring on average, once it had `STALL` seconds."""
STRANGERS = 64
"""Connections from one address that have shown no signature."""
AT_ONCE = 64
"""Requests of one member that are looked at or held back at a time."""
CONNECTIONS = 8192
"""Connections at all."""
TRIES, REFILL = 30.0, 1.0
"""Requests of strangers from one address: at once, and more for every second."""
LETTING_GO = 5.0
"""Seconds that a server waits for one that was killed just now to let go of the state."""
OFTEN = 60.0
"""Seconds in which one kind of refusal of one member is written down once."""

STATUS = {
    "signature": 401, "epoch": 401, "replay": 409, "fenced": 409, "role": 403, "revoked": 403, "invite": 403,
    "argument": 422, "unknown": 404, "large": 413, "slow": 408, "busy": 503, "partial": 409,
    "sealed": 400,
}  # fmt: skip

log = logging.getLogger("atoll.server")


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy that ends TLS in front of a server.

    Attributes:
        tls: whether it speaks TLS to the server; else HTTP, on the server's own machine.
        authorities: who signed its certificate, as PEM; "": somebody whom machines trust.
    """

    tls: bool
    authorities: str = ""


class Door:
    """What stands between HTTP and a hub.

    Args:
        hub: behind it.
        folder: of the server's own identity: its key signs answers.
        metrics: host and port for a Prometheus, in the clear; None: nothing is told.
    """

    def __init__(self, hub: Hub, folder: Path, metrics: tuple[str, int] | None = None) -> None:
        self.hub, self._key, self._metrics = hub, key_at(folder / "key"), metrics
        self._authority = (folder / "authority.pem").read_bytes()
        self.fresh = Fresh(hub.newest(), hub.keep_newest)
        self._at_work: Counter[str] = Counter()
        self._tries: dict[str, tuple[float, float]] = {}
        self._written: dict[str, float] = {}
        self.trusted: set[tuple[str, int]] = set()
        self.failed: RunError | None = None
        self.shut = False
        inner = Starlette(
            routes=[
                Route("/v1/authority", self._own, methods=["GET"]),
                Route("/v1/enrol", self._enrol, methods=["POST"]),
                Route("/v1/call", self._heard(self._call, calls.LONGEST), methods=["POST"]),
                Route("/v1/message", self._heard(self._message, calls.LONGEST), methods=["POST"]),
                Route("/v1/objects/{run}/{sha256}", self._heard(self._object, None), methods=["GET"]),
                Route("/v1/uploads/{run}/{sha256}", self._heard(self._upload, None), methods=["PUT"]),
            ],
            lifespan=self._life,
        )
        self.app = Unsealing(inner, self._key, stall=STALL, proxied=hub.proxied)

    @contextlib.asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncGenerator[None]:
        told = None
        if self._metrics is not None:
            from atoll.net.exposition import Exposition  # a library that a server without metrics need not load

            try:
                told, _ = Exposition(self.hub).start(*self._metrics)
            except RunError as error:
                self.failed = error
                raise
        await self.hub.start()
        try:
            yield
        finally:
            self.shut = True
            if told is not None:
                told.shutdown()
                told.server_close()
            await self.hub.close()

    # --- strangers ----------------------------------------------------------------------------------------------------

    async def _own(self, request: Request) -> Response:
        if not self._may_try(request):
            return _plain(503, "too many requests: try again later.")
        return Response(self._authority, media_type="application/x-pem-file")

    async def _enrol(self, request: Request) -> Response:
        if not self._may_try(request):
            return _plain(503, "too many requests: try again later.")
        seen = _seen(request)
        try:
            body = await _read(request, SMALL)
            wanted = calls.decode(calls.Enrol, body)
            key = public_key(wanted.key)
            name, _ = signing.verify_request(seen, lambda n: key if n == wanted.name else None, content=True)
            signing.check_content(seen.headers, body)
        except Denied as denied:
            if "signature" not in seen.headers:  # an answer is signed over its request's signature
                return _plain(STATUS[denied.problem.kind], str(denied))
            return self._refused(seen, denied.problem)
        except (control.MessageError, InvalidArgument, SignatureError):
            return _plain(401, "not the request of a newcomer.")
        try:
            member = self.hub.roster.enrol(name, wanted.key, wanted.token, now=time.time())
        except (EnrolmentError, InvalidArgument) as error:
            self._note(control.plain(name), f"enrolment refused: {error}", of="strangers")
            return self._refused(seen, Problem("invite", str(error)))
        except (OSError, RunError) as error:
            return self._unkept(seen, error)
        log.info("%s joined as %s", member.name, member.role)
        self.hub.agenda.tell()
        return self._answer(seen, 200, calls.encode(Welcome(member.name, member.role)))

    def _may_try(self, request: Request) -> bool:
        """A small budget for every address."""
        host, now = request.client.host if request.client else "", time.monotonic()
        if len(self._tries) > 10_000:
            self._tries = {h: v for h, v in self._tries.items() if now - v[1] < TRIES / REFILL}
            if len(self._tries) > 10_000 and host not in self._tries:
                host = ""  # who makes up addresses shares one budget with all others
        left, at = self._tries.get(host, (TRIES, now))
        left = min(TRIES, left + (now - at) * REFILL)
        self._tries[host] = (max(0.0, left - 1), now)
        return left >= 1

    # --- members ------------------------------------------------------------------------------------------------------

    def _heard(
        self, handle: Callable[[Request, Member, bytes], Awaitable[Any]], largest: int | None
    ) -> Callable[[Request], Awaitable[Response]]:
        """A handler that is reached by members alone.

        Args:
            handle: it.
            largest: bytes of a content, whose digest is signed; None: there is none, or the handler reads it.
        """

        async def handler(request: Request) -> Response:
            seen = _seen(request)
            try:
                name, nonce = signing.verify_request(seen, self.hub.roster.key, content=largest is not None)
            except SignatureError:
                if not self._may_try(request):
                    return _plain(503, "too many requests: try again later.")
                return self._stranger(request, seen)
            member = self.hub.roster.active(name)
            assert member is not None
            # By key: whoever is let in again under an old name begins to count anew.
            try:
                why = self.fresh.take(member.key, nonce, alone=member.role == "site")
            except OSError as error:
                return self._unkept(seen, error)
            if why == "epoch":
                return self._refused(seen, Problem("epoch", "sign with this epoch.", self.fresh.epoch))
            if why:
                self._note(name, f"a request was not fresh: {why}")
                text = {
                    "replay": "this request was made before.",
                    "fenced": "another program acts for this party, started later or from a copy of its folder.",
                }[why]
                return self._refused(seen, Problem("replay" if why == "replay" else "fenced", text))
            if self._at_work[name] >= AT_ONCE:
                return self._refused(seen, Problem("busy", f"more than {AT_ONCE} requests at once: try again later."))
            if request.client is not None and not self.hub.proxied:
                self.trusted.add((request.client.host, request.client.port))
            self.hub.seen[name] = time.monotonic()
            self._at_work[name] += 1
            try:
                body = b""
                if largest is not None:
                    body = await _read(request, largest)
                    signing.check_content(seen.headers, body)
                given = await handle(request, member, body)
            except Denied as denied:
                if denied.problem.kind in ("role", "large", "sealed"):
                    self._note(name, str(denied), of=f"{name}: {denied.problem.kind}")
                return self._refused(seen, denied.problem)
            except SignatureError as error:
                self._note(name, str(error))
                return self._refused(seen, Problem("signature", str(error)))
            except (control.MessageError, InvalidArgument) as error:
                return self._refused(seen, Problem("argument", str(error)[:2000]))
            except AtollError as error:
                return self._refused(seen, Problem("argument", str(error)[:2000]))
            except OSError as error:
                return self._unkept(seen, error)
            finally:
                self._at_work[name] -= 1
            if isinstance(given, Response):
                self._sign(seen, given, None)
                return given
            return self._answer(seen, 200, given)

        return handler

    def _stranger(self, request: Request, seen: signing.Request) -> Response:
        """Turn somebody away whose signature is of no member; of one who was shut out, say so."""
        claimed = re.search(r'keyid="([^"]{1,200})"', seen.headers.get("signature-input", ""))
        member = self.hub.roster.members.get(claimed.group(1)) if claimed else None
        if member is not None and member.revoked:
            key = public_key(member.key)
            with contextlib.suppress(SignatureError):
                signing.verify_request(seen, lambda n: key if n == member.name else None, content=False)
                self._note(member.name, "a revoked member asked for something")
                return self._refused(seen, Problem("revoked", f"{member.name} was shut out of this server."))
        return _plain(401, "the signature is missing or wrong.")

    async def _call(self, request: Request, member: Member, body: bytes) -> bytes:
        call = calls.decode_call(body)
        if member.role not in ROLES[type(call)]:
            raise Denied("role", f"a {member.role} may not ask for {type(call).__name__}.")
        return calls.encode(await self.hub.call(member, call))

    async def _message(self, request: Request, member: Member, body: bytes) -> bytes:
        _trains(member)
        message = control.decode_request(body)
        run = self.hub.run(message.run)
        return control.encode(await run.receive(member.name, message))

    async def _object(self, request: Request, member: Member, body: bytes) -> Response:
        _trains(member)
        run, sha256 = self._named(request)
        path = run.object(sha256)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise Denied("unknown", "there is no such object now.") from None
        found = re.fullmatch(r"bytes=(\d{1,18})-", request.headers.get("range", "bytes=0-"))
        start = int(found.group(1)) if found else -1
        if not 0 <= start < max(1, size):
            raise Denied("argument", "no part of the object.")
        headers = {"content-length": str(size - start), "content-type": "application/octet-stream"}
        return StreamingResponse(_parts(path, start), 206 if start else 200, headers)

    async def _upload(self, request: Request, member: Member, body: bytes) -> bytes:
        _trains(member)
        run, sha256 = self._named(request)
        numbers = [request.query_params.get(n, "") for n in ("size", "offset")]
        if not all(re.fullmatch(r"[0-9]{1,18}", n) for n in numbers):
            raise Denied("argument", "size and offset must be numbers.")
        taking = run.taking(member.name, sha256, int(numbers[0]), int(numbers[1]), _length(request, CHUNK))
        with contextlib.closing(taking):
            async for part in _parts_of(request):
                taking.take(part)
        return calls.encode(Received(taking.received))

    def _named(self, request: Request) -> tuple[Any, str]:
        sha256 = request.path_params["sha256"]
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise Denied("argument", "not a hash.")
        return self.hub.run(request.path_params["run"]), sha256

    # --- answers ------------------------------------------------------------------------------------------------------

    def _note(self, name: str, why: str, of: str = "") -> None:
        """Keep a refusal for the audit; of the same kind one a minute, so that nobody fills the log.

        Args:
            name: who was refused.
            why: in words.
            of: the kind, where name or words are the sender's to choose.
        """
        now, kind = time.monotonic(), of or f"{name}: {why}"
        if now - self._written.get(kind, -OFTEN) >= OFTEN:
            self._written[kind] = now
            log.warning("%s: %s", name, why)
            try:
                self.hub.roster.note(name, control.plain(why), now=time.time())
            except (OSError, RunError) as error:  # whoever is refused is refused all the same
                log.error("the disk or the database refuses: %s", error)

    def _refused(self, seen: signing.Request, problem: Problem) -> Response:
        return self._answer(seen, STATUS[problem.kind], calls.encode(problem))

    def _unkept(self, seen: signing.Request, error: OSError | RunError) -> Response:
        log.error("the disk or the database refuses: %s", error)
        return self._refused(seen, Problem("busy", "the server's disk refuses: try again later."))

    def _answer(self, seen: signing.Request, status: int, body: bytes) -> Response:
        response = Response(body, status, media_type="application/json")
        self._sign(seen, response, body)
        return response

    def _sign(self, seen: signing.Request, response: Response, body: bytes | None) -> None:
        signing.sign_answer(self._key, signing.Answer(response.status_code, response.headers, seen), body)


def _trains(member: Member) -> None:
    if member.role not in TRAINERS:
        raise Denied("role", f"a {member.role} takes no part in rounds.")


def _seen(request: Request) -> signing.Request:
    """A request as its signature sees it: as it came."""
    scope = request.scope
    query = scope["query_string"].decode("ascii", "replace")
    path = scope["raw_path"].decode("ascii", "replace")
    return signing.Request(request.method, f"https://atoll{path}{'?' + query if query else ''}", request.headers)


async def _read(request: Request, largest: int) -> bytes:
    """A request's content, when it says its length, keeps to it, and gets on.

    Raises:
        Denied: it does not.
    """
    _length(request, largest)
    return b"".join([part async for part in _parts_of(request)])


def _length(request: Request, largest: int) -> int:
    """How long a request says its content is.

    Raises:
        Denied: it does not say, or longer than it may be.
    """
    length = request.headers.get("content-length", "")
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise Denied("argument", "the content's length must be said.")
    if int(length) > largest:
        raise Denied("large", f"a content of {length} bytes; at most {largest} are taken here.")
    return int(length)


async def _parts_of(request: Request) -> AsyncIterator[bytes]:
    """A request's content as it comes, if it gets on.

    Raises:
        Denied: it does not.
    """
    had, began = 0, time.monotonic()
    stream = request.stream()
    try:
        while True:
            async with asyncio.timeout(STALL):
                part = await anext(stream, None)
            if part is None:
                return
            had += len(part)
            if had < SLOWEST * (time.monotonic() - began - STALL):
                raise TimeoutError
            yield part
    except TimeoutError:
        raise Denied("slow", "the content does not get on.") from None
    except ClientDisconnect:
        raise Denied("slow", "the sender went away.") from None


async def _parts(path: Path, start: int) -> AsyncIterator[bytes]:
    with open(path, "rb") as file:
        file.seek(start)
        while part := await asyncio.to_thread(file.read, 2**20):
            yield part


def _plain(status: int, text: str) -> Response:
    return Response(text, status, {"connection": "close"}, media_type="text/plain")


# --- connections ------------------------------------------------------------------------------------------------------


def guarded(door: Door) -> type[H11Protocol]:
    """Uvicorn's HTTP/1.1 with a time in which headers must come, and few connections for strangers."""
    strangers: Counter[str] = Counter()

    class Guarded(H11Protocol):
        told: tuple[str, int] | None = None  # where a connection came from that another server handed over
        _timer: asyncio.TimerHandle | None = None
        _host = ""
        _port = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.client = self.told or self.client
            self._host, self._port = self.client or ("", 0)
            strangers[self._host] += 1
            waiting = strangers[self._host] - sum(host == self._host for host, _ in door.trusted)
            if waiting > STRANGERS and not door.hub.proxied:  # all connections are the proxy's, strangers' and members'
                transport.close()
            if door.shut:  # its TLS took longer than this server led
                transport.abort()
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            strangers[self._host] -= 1
            if not strangers[self._host]:
                del strangers[self._host]
            door.trusted.discard((self._host, self._port))
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._wait()

        def _wait(self) -> None:
            """Give headers a time; uvicorn looks at connections that rest between two requests."""
            asking = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
            if asking and self._timer is None:
                self._timer = self.loop.call_later(STALL, self.transport.close)
            elif not asking and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Guarded


# --- the program ------------------------------------------------------------------------------------------------------


def establish(folder: Path, address: str, state: "State | None" = None, proxy: str | None = None) -> Home:
    """Make a server's folder, or read it; the home of its first administrator.

    Args:
        folder: of the server.
        address: as others reach it.
        state: of the server; default `state.sqlite` in the folder.
        proxy: authorities of a proxy that ends TLS in front of it, as PEM; "": those that this machine trusts; None:
            there is no proxy.

    Raises:
        RunError: folder and state are not of one server.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = key_at(folder / "key", make=True)
    if not (folder / "authority.pem").exists():
        write_file(folder / "authority.pem", authority(key))
    pem = (folder / "authority.pem").read_bytes()
    print_ = fingerprint(key.public_key())
    if fingerprint(authority_key(pem)) != print_:
        raise RunError(f"{folder / 'authority.pem'} is not of this server's key: restore the folder from a backup.")
    admin = folder / "admin"
    admin.mkdir(exist_ok=True, mode=0o700)
    own = key_at(admin / "key", make=True)
    state = state or state_of(folder)
    state.belongs(print_)
    with contextlib.closing(Roster(state.journal("roster"))) as roster:
        if roster.active("admin") is None:
            token = roster.invite("admin", "admin", hours=1, by="the server", now=time.time())
            roster.enrol("admin", public_text(own.public_key()), token, now=time.time())
    return settle(admin, Identity("admin", "admin", address, print_, proxy is not None), pem, proxy or "")


def opened(folder: Path, database: str | None, durability: "Durability") -> "tuple[State, Callable[[], None]]":
    """The state of a server, which is where it was when the server last started; and what notes where it is.

    Raises:
        InvalidArgument: what is no address of a database.
        RunError: it is elsewhere, or gone; it cannot be reached, or is no state.
    """
    from atoll.database import complete, shown, sqlite
    from atoll.net.state import State

    own = folder / "state.sqlite"
    place, note = own.name if database is None else shown(complete(database)), folder / "database"
    if (folder / "authority.pem").exists() and note.exists() and (before := note.read_text()) != place:
        raise RunError(
            f"the state of {folder} is in {before}, not in {place}: name it with --database (or ATOLL_DATABASE). If it "
            f"was moved there, write {place} into {note}."
        )
    try:
        state = State(database or sqlite(own), durability=durability, patience=LETTING_GO)
        lost = (folder / "admin" / "identity.json").exists() and state.owner() is None
    except OSError as error:
        raise RunError(f"the database cannot be used: {error.strerror}") from None
    if lost:
        state.close()
        raise RunError(
            f"{folder} is of a server that has served, and its state in {state.shown} is gone, with members and runs: "
            "restore it from a backup. To begin anew, name another folder."
        )
    return state, lambda: write_file(note, place.encode())


def serve(
    folder: Path,
    *,
    host: str,
    port: int,
    address: str | None,
    told: Callable[[str, str, str], None],
    database: str | None = None,
    durability: "Durability" = "power",
    metrics: tuple[str, int] | None = None,
    objects: str | None = None,
    proxy: Proxy | None = None,
) -> None:
    """Serve until a signal says to stop.

    Args:
        folder: of the server's key, its runs' files and, by default, its state.
        host: what to listen on.
        port: likewise; 0: any free one.
        address: as others reach it, host:port; None: that of the last start, or what is listened on.
        told: called with the address, the fingerprint and the place of the state when the server listens.
        database: address of the database of its state; None: `state.sqlite` in the folder.
        durability: "power": what was acknowledged survives that a machine loses power; "process": that a process is
            killed, and nothing is waited for.
        metrics: host and port for a Prometheus, in the clear; None: nothing is told.
        objects: address of the store that runs' objects are in; None: they are in the folder alone.
        proxy: that ends TLS in front of it, at the address; None: there is none.

    Raises:
        InvalidArgument: what is no address of a database or an object store; HTTP for others than this machine; a proxy
            without an address.
        RunError: another server works in the folder or on the state; the port is taken; the database cannot be used.
    """
    from atoll.net.state import Taken

    if proxy is not None:
        address = _outside(folder, host, address, proxy)
    os.umask(0o077)  # sites' updates lie here
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"another server works in {folder}: stop it first, or name another folder. Several at once need "
                "PostgreSQL, and each of them --among HOST:PORT."
            ) from None
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is a file
        listener = listening(host, port)
        bound = listener.getsockname()[1]
        state, note = opened(folder, database, durability)
        trusted = None if proxy is None else proxy.authorities
        try:
            home = establish(folder, address or _address(folder, host, bound), state, trusted)
        except Taken as taken:
            several = "each needs --among HOST:PORT" if state.file is None else "they need PostgreSQL (--database)"
            raise RunError(
                f"another server works on the state in {state.shown}: stop it first; for several at once {several}. "
                f"({taken})"
            ) from None
        note()
        shelves = shelved(objects, home.identity.fingerprint, state)
        hub = Hub(folder, home.identity.fingerprint, home.identity.address, state, shelves, proxied=proxy is not None)
        state.alone()
        door = Door(hub, folder, metrics)
        config = configured(door, folder, tls=proxy is None or proxy.tls)
        told(home.identity.address, home.identity.fingerprint, state.shown)
        server = _Server(config)
        try:
            server.run(sockets=[listener])
        except SystemExit:  # uvicorn's word for a start that failed, whose reason it tells its own log alone
            if door.failed is None:
                raise
            raise door.failed from None


def shelved(objects: str | None, fingerprint: str, state: "State") -> "Shelves | None":
    """Where a server's objects are, once they can be kept there.

    Args:
        objects: address of the store; None: in the server's folder alone.
        fingerprint: of the server's key.
        state: of the server.

    Raises:
        InvalidArgument: it is no address.
        RunError: it cannot be written, read or deleted from; or the objects are elsewhere.
    """
    from atoll.net.shelves import Shelves, settled

    shelves = None if objects is None else Shelves(objects, fingerprint)
    try:
        settled(shelves, state)
    except OSError as error:
        raise RunError(f"the database cannot be used: {error.strerror}") from None
    return shelves


def configured(door: Door, folder: Path, *, tls: bool = True) -> uvicorn.Config:
    """How a door is served: HTTP/1.1 under TLS, or without it to a proxy beside it, with bounds on everything."""
    config = uvicorn.Config(
        door.app, http=guarded(door), ws="none", lifespan="on", log_config=None, access_log=False,
        proxy_headers=False, server_header=False, limit_concurrency=CONNECTIONS, timeout_keep_alive=75,
        timeout_graceful_shutdown=3, h11_max_incomplete_event_size=HEADERS,
    )  # fmt: skip
    config.load()
    if tls:
        config.ssl = server_context(key_at(folder / "key"), folder)
    return config


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """A signal that asks to stop is obeyed, and the program ends well."""
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def listening(host: str, port: int, named: str = "--host and --port") -> socket.socket:
    """A socket to listen on.

    Args:
        host: of this machine.
        port: 0: any free one.
        named: the options that say so.

    Raises:
        RunError: it cannot be listened on.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise RunError(
            f"cannot listen on {host}:{port}: {error.strerror}. Name another with {named}; ports below 1024 need "
            "permission."
        ) from error


def _outside(folder: Path, host: str, address: str | None, proxy: Proxy) -> str:
    """As others reach the proxy in front of the server.

    Raises:
        InvalidArgument: nobody said it; or the proxy would be spoken to in the clear over a network.
    """
    if not proxy.tls and not local(f"{host}:0"):
        raise invalid(
            "--host", host, "127.0.0.1 or ::1 with --proxy plain", "A proxy on another machine takes --proxy tls."
        )
    if address is None and (folder / "admin" / "identity.json").exists():
        before = Home(folder / "admin").identity
        address = before.address if before.proxy else None
    if address is None:
        raise InvalidArgument("a server behind a proxy must be told how sites reach the proxy: --address HOST:PORT.")
    return address


def _address(folder: Path, host: str, port: int) -> str:
    """As others reach the server, when nobody said it."""
    if (folder / "admin" / "identity.json").exists():
        before = Home(folder / "admin").identity.address
        if before.rpartition(":")[2] == str(port):
            return before
    if host in ("0.0.0.0", "::", ""):
        host = socket.getfqdn()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def log_to_stderr(level: int = logging.INFO) -> None:
    """Structured lines for the server's and the site's log: no secret is ever given to a logger."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.getLogger("atoll").addHandler(handler)
    logging.getLogger("atoll").setLevel(level)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever is in the message."""
        return control.plain(super().format(record)[:1000])
