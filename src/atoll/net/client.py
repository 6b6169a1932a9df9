"""A party's line to its server: pinned TLS, signed requests, answers that only the server can have given.

Where a proxy ends TLS in front of the server, requests go sealed through it (`tunnel`). Nothing but outbound HTTPS.
What stands in an answer is looked at only after its signature held; objects are the bytes whose hash was asked for, or
nothing.
"""

import ipaddress
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast
from urllib.request import getproxies, proxy_bypass

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from atoll.errors import AtollError, InvalidArgument, RunError
from atoll.net import calls, control, enrolment
from atoll.net.buffers import Buffer, room
from atoll.net.calls import Problem
from atoll.net.control import content_hash
from atoll.net.home import Home, Identity, settle
from atoll.net.keys import authority_key, client_context, fingerprint, key_at, proxy_context, public_text
from atoll.net.lines import PIECE, Lines
from atoll.net.signing import Numbers, SignatureError, sign_request, verify_answer
from atoll.net.tunnel import Meddled, Tunnel

CHUNK = 2**24
"""Bytes of an object that are sent at a time."""
ATTEMPTS = 5
"""How often a transfer is taken up again without a byte more than the time before."""

SUBMISSION = 660.0
"""Seconds a submission may take."""

BUSY = "the server takes no more newcomers from this address now: try again in a minute."

# Every one of them is about progress, not about the whole: a slow link may take its time.
TIMEOUTS = httpx.Timeout(connect=10.0, read=60.0, write=60.0, pool=10.0)


class Unreachable(AtollError):
    """There was no answer of the server, or none that says more than that it will have one later."""


class Turned(RunError):
    """The server will not do it; `problem` says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


class Client:
    """A party's line to its server.

    Args:
        home: of the party.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self._numbers = Numbers(home.live())
        self._http = line_of(home)

    async def close(self) -> None:
        """Hang up."""
        await self._http.aclose()

    @property
    def epoch(self) -> str:
        """Of the server as it answered last: it changes when the server starts again."""
        return self._numbers.epoch

    async def call(self, call: calls.Call) -> Any:
        """Make a call; its answer, of the kind that `calls.REPLIES` says.

        Raises:
            Turned: the server will not.
            Unreachable: there was no answer.
        """
        # A run is loaded before its submission is answered, which takes its time.
        seconds = SUBMISSION if isinstance(call, calls.Submit) else None
        content = await self._ask("POST", "/v1/call", calls.encode(call), seconds)
        return self._read(calls.REPLIES[type(call)], content)

    async def say(self, message: control.Request) -> control.Answer:
        """Send a message of a run; the answer.

        Raises:
            Turned, Unreachable: as for `call`.
        """
        content = await self._ask("POST", "/v1/message", control.encode(message))
        try:
            return control.decode_answer(content)
        except control.MessageError as error:
            raise Unreachable(f"the server's answer cannot be read: {error}") from error

    async def fetch(self, run: str, sha256: str, *, limit: int) -> Buffer:
        """An object of a run, by its hash; taken up again where it broke off.

        Raises:
            Unreachable: it did not come whole.
            Turned: it is not there, or longer than the limit.
        """
        content, at, without = room(0), 0, 0
        while True:
            before = at
            try:
                async with self._stream(f"/v1/objects/{run}/{sha256}", before) as answer:
                    told = answer.headers.get("content-length", "")
                    if not re.fullmatch("[0-9]{1,18}", told):
                        raise Unreachable("the server does not say how long an object is.")
                    whole = before + int(told)
                    if whole > limit:
                        raise Turned(Problem("large", f"the server offers {whole} bytes, limit {limit}."))
                    if before and whole != len(content):
                        raise Unreachable("an object has another length than before.")
                    content = content if before else room(whole)
                    async for part in answer.aiter_raw():
                        if at + len(part) > whole:
                            raise Unreachable("the server sent more than it announced.")
                        content[at : at + len(part)] = part
                        at += len(part)
            except httpx.HTTPError as error:
                without = 0 if at > before else without + 1
                if without >= ATTEMPTS:
                    raise Unreachable(_told(error)) from error
                continue
            if content_hash(content[:at]) != sha256:
                raise Unreachable("an object is not the one that was announced: its SHA-256 differs.")
            return content

    async def upload(self, run: str, content: Buffer, sha256: str) -> None:
        """Bring an object to the server; taken up again where it broke off.

        Args:
            run: whose.
            content: of the object.
            sha256: its `content_hash`.

        Raises:
            Turned, Unreachable: as for `call`.
        """
        at, without = 0, 0
        while at < len(content):
            path = f"/v1/uploads/{run}/{sha256}?size={len(content)}&offset={at}"
            try:
                answer = await self._ask("PUT", path, memoryview(content)[at : at + CHUNK], digest=False)
                received = self._read(calls.Received, answer).received
            except Turned as turned:
                if turned.problem.kind != "partial":
                    raise
                received = turned.problem.received
            except Unreachable:
                without += 1
                if without >= ATTEMPTS:
                    raise
                continue
            if received > len(content):
                raise Unreachable("the server has more of an object than there is.")
            without = 0 if received > at else without + 1
            if without >= ATTEMPTS:
                raise Unreachable("an upload does not get on.")
            at = received

    # --- requests -----------------------------------------------------------------------------------------------------

    async def _ask(
        self, method: str, path: str, body: Buffer, seconds: float | None = None, *, digest: bool = True
    ) -> bytes:
        """The content of the server's answer to one request, which is sent a second time at most: with the epoch that
        the server told. Without a digest the content is held to the hash in its path, once it is whole.
        """
        for again in (True, False):
            request = self._signed(method, path, body, digest=digest)
            if seconds is not None:
                request.extensions["timeout"] = httpx.Timeout(seconds, connect=10.0).as_dict()
            try:
                answer = await self._http.send(request)
            except httpx.HTTPError as error:
                raise Unreachable(_told(error)) from error
            self._check(answer, answer.content)
            if answer.status_code == 200:
                return answer.content
            problem = self._problem(answer.content)
            if problem.kind == "epoch" and again:
                self._numbers.epoch = problem.epoch
                continue
            _raise(problem)
        raise AssertionError

    @asynccontextmanager
    async def _stream(self, path: str, offset: int) -> AsyncGenerator[httpx.Response]:
        for again in (True, False):
            request = self._signed("GET", path, None)
            if offset:
                request.headers["range"] = f"bytes={offset}-"
            answer = await self._http.send(request, stream=True)
            try:
                if answer.status_code in (200, 206):
                    self._check(answer, None)
                    if (answer.status_code == 206) != (offset > 0):
                        raise Unreachable("the server answered with another part than was asked for.")
                    yield answer
                    return
                content = await answer.aread()
                self._check(answer, content)
                problem = self._problem(content)
            finally:
                await answer.aclose()
            if problem.kind == "epoch" and again:
                self._numbers.epoch = problem.epoch
                continue
            _raise(problem)

    def _signed(self, method: str, path: str, body: Buffer | None, *, digest: bool = True) -> httpx.Request:
        if isinstance(body, memoryview):
            length = {"content-length": str(len(body))}
            request = self._http.build_request(method, path, content=_parts(body), headers=length)
        else:
            request = self._http.build_request(method, path, content=None if body is None else bytes(body))
        covered = bytes(body) if body is not None and digest else None
        sign_request(self.home.key, self.home.identity.name, _Plain(request), self._numbers.next(), covered)
        return request

    def _check(self, answer: httpx.Response, content: bytes | None) -> None:
        try:
            verify_answer(answer, self.home.server, content)
        except SignatureError as error:
            raise Unreachable(
                f"what answered at {self.home.identity.address} with status {answer.status_code} is not the server, or "
                "something on the way changed its answer."
            ) from error

    def _read(self, kind: Any, content: bytes) -> Any:
        try:
            return calls.decode(kind, content)
        except control.MessageError as error:
            raise Unreachable(f"the server's answer cannot be read: {error}") from error

    def _problem(self, content: bytes) -> Problem:
        return cast(Problem, self._read(Problem, content))


async def _parts(content: memoryview) -> AsyncIterator[bytes]:
    """A long content as it is sent, without a copy of it all."""
    for at in range(0, len(content), PIECE):
        yield bytes(content[at : at + PIECE])


class _Plain:
    """A request of httpx as the library that signs wants it."""

    def __init__(self, request: httpx.Request) -> None:
        self.method, self.url, self.headers = request.method, str(request.url), request.headers


def _raise(problem: Problem) -> None:
    if problem.kind in ("busy", "slow", "epoch", "replay", "sealed"):
        raise Unreachable(problem.text)
    raise Turned(problem)


def _told(error: httpx.HTTPError) -> str:
    if isinstance(error, Meddled):
        return str(error)[:300]
    return f"the server cannot be reached ({type(error).__name__}{': ' + str(error) if str(error) else ''})"[:300]


def line_of(home: Home) -> httpx.AsyncClient:
    """Connections of a party to its server."""
    return line(home.identity.address, home.context(), home.server if home.identity.proxy else None)


def line(address: str, context: ssl.SSLContext, sealed: Ed25519PublicKey | None = None) -> httpx.AsyncClient:
    """Connections to a server, straight or by the proxy that the environment names.

    Args:
        address: of the server, or of a proxy that ends TLS in front of it.
        context: of TLS.
        sealed: identity of the server that every request is sealed to; None: they are not sealed.
    """
    base = f"https://{address}"
    if sealed is not None:
        tunnel = Tunnel(line(address, context), sealed)
        return httpx.AsyncClient(base_url=base, transport=tunnel, timeout=TIMEOUTS, trust_env=False)
    proxied = {"https", "all"} & getproxies().keys() and not proxy_bypass(address.rpartition(":")[0].strip("[]"))
    if proxied and not local(address):
        return httpx.AsyncClient(base_url=base, verify=context, timeout=TIMEOUTS)
    lines = Lines(context, most=64, kept=16, seconds=30.0)
    return httpx.AsyncClient(base_url=base, transport=lines, timeout=TIMEOUTS, trust_env=False)


def local(address: str) -> bool:
    """Whether an address is of this machine: no proxy stands between."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- joining ----------------------------------------------------------------------------------------------------------


async def authority_of(address: str, expected: str, context: ssl.SSLContext | None = None) -> bytes:
    """The certificate of a server's authority, held against the fingerprint that an invite carries.

    Args:
        address: of the server, or of a proxy in front of it.
        expected: the fingerprint.
        context: of TLS to the proxy; None: there is none.

    Raises:
        Unreachable: nothing answers there.
        RunError: what answers is not that server.
    """
    if context is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # what comes is held against the fingerprint
    try:
        async with line(address, context) as http:
            answer = await http.get("/v1/authority")
            pem = answer.content
    except httpx.HTTPError as error:
        raise Unreachable(_told(error)) from error
    if answer.status_code == 503:
        raise Unreachable(BUSY)
    try:
        if answer.status_code != 200 or fingerprint(authority_key(pem)) != expected:
            raise InvalidArgument("another key")
    except InvalidArgument:
        raise RunError(
            f"what answers at {address} is not the server that made this invite: its key is another. Somebody may "
            "stand between, or the address is wrong. Nothing was sent to it. Ask whoever invited you."
        ) from None
    return pem


async def join(invite: enrolment.Invite, folder: Path, proxy: str | None = None) -> Home:
    """Take up an invite: make a key in the folder, enrol it with the server, remember the server.

    A join that was interrupted can be given again; the folder of a party that joined already is left as it is.

    Args:
        invite: it.
        folder: of the party.
        proxy: authorities of a proxy that ends TLS in front of the server, as PEM; "": those that this machine trusts;
            None: as the invite says.

    Raises:
        RunError: the server refused the invite, the server is another, or the folder is another party's.
        Unreachable: there was no answer.
    """
    if (folder / "identity.json").exists():
        home = Home(folder)
        wanted = (invite.name, invite.fingerprint)
        if (home.identity.name, home.identity.fingerprint) != wanted:
            raise RunError(
                f"{folder} is the folder of {home.identity.name} at another server or of another name: choose another "
                "with --home."
            )
        return home
    if proxy is None and invite.proxy:
        proxy = ""
    front = None if proxy is None else proxy_context(proxy)
    authority = await authority_of(invite.address, invite.fingerprint, front)
    sealed = None if front is None else authority_key(authority)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = key_at(folder / "key", make=True)
    body = calls.encode(calls.Enrol(invite.name, public_text(key.public_key()), invite.token))
    async with line(invite.address, front or client_context(authority), sealed) as http:
        request = http.build_request("POST", "/v1/enrol", content=body)
        sign_request(key, invite.name, _Plain(request), Numbers(0).next(), body)
        try:
            answer = await http.send(request)
        except httpx.HTTPError as error:
            raise Unreachable(_told(error)) from error
    try:
        verify_answer(answer, authority_key(authority), answer.content)
    except SignatureError as error:
        if answer.status_code == 503:
            raise Unreachable(BUSY) from error
        raise Unreachable(f"what answered with status {answer.status_code} is not the server.") from error
    if answer.status_code != 200:
        problem = calls.decode(Problem, answer.content)
        if problem.kind in ("busy", "slow", "sealed"):
            raise Unreachable(problem.text)
        raise Turned(problem)
    welcome = calls.decode(calls.Welcome, answer.content)
    found = Identity(welcome.name, welcome.role, invite.address, invite.fingerprint, front is not None)
    return settle(folder, found, authority, proxy or "")
