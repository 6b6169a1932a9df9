"""The server's end of sealed requests, in front of its door: what comes out is handled as if it had come by itself.

    GET  /v1/sealing   the server's sealing key, signed by it; for everybody
    POST /v1/sealed    a request of any kind, sealed; the answer is sealed to whoever sealed the request

The door looks at what comes out as at any request: signature, freshness, role, bounds. Nothing is believed because it
was sealed, which everybody can do. The head must come in time and is bounded before anything is made of it; a content
goes on piece by piece, and to the length its head says.
"""

import asyncio
import ipaddress
import os
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.net import sealing
from atoll.net.hub import Denied
from atoll.net.sealing import KEY, MISDIRECTED, PATH, Answered, Asked, Begun, Sealer, SealError, Shared

OPEN = ("/v1/authority", KEY)
"""What is told to everybody, and need not be sealed."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class Unsealing:
    """An ASGI application in front of another.

    Args:
        app: behind it.
        identity: of the server.
        stall: seconds in which the head of a sealed request must be there.
        proxied: whether a proxy stands in front: what is not sealed is refused then, and all come from its address.
    """

    def __init__(self, app: App, identity: Ed25519PrivateKey, *, stall: float, proxied: bool) -> None:
        self._app, self._stall, self._proxied = app, stall, proxied
        self._server, self._key = identity.public_key(), sealing.sealing_key(identity)
        self._told = sealing.told_key(identity)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and self._proxied:
            scope = dict(scope) | {"client": _peer(scope)}
        if scope["type"] != "http" or scope["path"] not in (PATH, KEY):
            if scope["type"] == "http" and self._proxied and scope["path"] not in OPEN:
                await _plainly(send, 403, b"this server stands behind a proxy, and hears sealed requests alone.")
                return
            await self._app(scope, receive, send)
        elif scope["path"] == KEY:
            await _plainly(send, 200, self._told)
        else:
            await self._sealed(scope, receive, send)

    async def _sealed(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        shared: Shared | None = None

        def key(wrapped: bytes) -> bytes:
            nonlocal shared
            shared = Shared.opened(wrapped, self._key, self._server)
            return shared.request_key()

        content = _Content(Begun(sealing.WRAPPED, key), receive)
        try:
            async with asyncio.timeout(self._stall):
                asked = await content.head()
        except SealError as error:
            await _plainly(send, MISDIRECTED if error.fault == "key" else 400, str(error).encode())
            return
        except TimeoutError:
            await _plainly(send, 408, b"the head of a sealed request did not come in time.")
            return
        assert shared is not None
        path, _, query = asked.target.partition("?")
        inner = dict(scope) | {
            "method": asked.method, "path": unquote(path), "raw_path": path.encode(), "query_string": query.encode(),
            "headers": [(n.encode(), v.encode()) for n, v in asked.headers if n != "transfer-encoding"],
        }  # fmt: skip
        await self._app(inner, content.receive, _Answer(shared, send).send)


class _Content:
    """What comes out of a sealed request, as its pieces come."""

    def __init__(self, begun: Begun, receive: Receive) -> None:
        self._begun, self._receive = begun, receive
        self._pieces, self._more = deque[bytes](), True
        self._left, self._over = 0, False

    async def _piece(self) -> bytes:
        """The next one.

        Raises:
            SealError: it is not what was sealed, or there is none.
            EOFError: the sender went away.
        """
        while not self._pieces:
            if not self._more:
                self._begun.end()
                raise SealError("truncated", "a sealed request is shorter than its head says.")
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise EOFError
            self._pieces.extend(self._begun.take(message.get("body", b"")))
            self._more = message.get("more_body", False)
        return self._pieces.popleft()

    async def head(self) -> Asked:
        """The head.

        Raises:
            SealError: there is none.
        """
        try:
            asked = sealing.head(Asked, await self._piece())
        except EOFError:
            raise SealError("truncated", "the sender of a sealed request went away.") from None
        self._left = asked.length
        self._over = not self._left
        return asked

    async def receive(self) -> Message:
        """The next part of the content, as the application behind asks for it.

        Raises:
            Denied: it is not what was sealed, or not as long as its head says.
        """
        if self._over:
            return await self._disconnected()
        try:
            piece = await self._piece()
            self._left -= len(piece)
            if self._left < 0:
                raise SealError("behind", "a sealed request is longer than its head says.")
            if not self._left:
                await self._finished()
        except EOFError:
            return {"type": "http.disconnect"}
        except SealError as error:
            self._over = True
            raise Denied("sealed", str(error)) from error
        return {"type": "http.request", "body": piece, "more_body": self._left > 0}

    async def _finished(self) -> None:
        """The content is there; nothing may be behind it."""
        self._over = True
        while self._more and not self._pieces:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise EOFError
            self._pieces.extend(self._begun.take(message.get("body", b"")))
            self._more = message.get("more_body", False)
        if any(self._pieces):
            raise SealError("behind", "a sealed request is longer than its head says.")
        self._begun.end()

    async def _disconnected(self) -> Message:
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return message


class _Answer:
    """Seals what an application answers."""

    def __init__(self, shared: Shared, send: Send) -> None:
        salt = os.urandom(sealing.SALT)
        self._begin, self._send, self._sealer = salt, send, Sealer(shared.answer_key(salt))

    async def send(self, message: Message) -> None:
        """A part of the answer."""
        if message["type"] == "http.response.start":
            headers = [(n.decode("latin-1").lower(), v.decode("latin-1")) for n, v in message["headers"]]
            begin = msgspec.json.encode(Answered(message["status"], headers))
            outer = [(b"content-type", b"application/octet-stream"), (b"cache-control", b"no-store")]
            outer += [(b"connection", b"close")] if ("connection", "close") in headers else []
            await self._send({"type": "http.response.start", "status": 200, "headers": outer})
            self._begin += self._sealer.seal(begin)  # goes with what comes first
            return
        more, content = message.get("more_body", False), message.get("body", b"")
        for piece in self._sealer.all(content, last=not more) if content or not more else ():
            begin, self._begin = self._begin, b""
            await self._send({"type": "http.response.body", "body": begin + piece, "more_body": True})
        if not more:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _peer(scope: MutableMapping[str, Any]) -> tuple[str, int] | None:
    """From where a request came to the proxy, as the proxy says it or its sender makes it say.

    It is good for one thing: whose budget the tries of strangers count in.
    """
    told = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    if not told:
        return scope["client"]
    try:
        address = ipaddress.ip_address(told[-1].rpartition(b",")[2].strip().decode("ascii"))
    except ValueError:
        return scope["client"]
    address = getattr(address, "ipv4_mapped", None) or address
    if address.version == 6:  # whoever has one of these has all of its network
        address = ipaddress.ip_network((address, 64), strict=False).network_address
    return str(address), 0


async def _plainly(send: Send, status: int, content: bytes) -> None:
    headers = [(b"content-length", str(len(content)).encode()), (b"content-type", b"application/octet-stream")]
    if status != 200:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": False})
