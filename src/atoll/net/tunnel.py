"""The way to a server behind a proxy that ends TLS: every request goes sealed, as the content of another.

Nothing of the requests changes but how they travel: what `client` signs is signed before, and looked at after, what is
done here. The proxy is shown `POST /v1/sealed` and bytes.
"""

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import cast

import httpx
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from atoll.net import sealing
from atoll.net.sealing import KEY, MISDIRECTED, PATH, Answered, Asked, Begun, Sealer, SealError, Shared


class Meddled(httpx.RemoteProtocolError):
    """What came on this way is not what the server sent, or a proxy answered in its place."""


class Tunnel(httpx.AsyncBaseTransport):
    """A transport that seals.

    Args:
        outer: connections to the proxy.
        server: the identity of the server behind it.
    """

    def __init__(self, outer: httpx.AsyncClient, server: Ed25519PublicKey) -> None:
        self._outer, self._server = outer, server
        self._key: X25519PublicKey | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the answer, whose content is still to come."""
        if self._key is None:
            self._key = await self._told(request)
        shared = Shared.drawn(self._key, self._server)
        headers = [(name.decode().lower(), value.decode()) for name, value in request.headers.raw]
        asked = Asked(request.method, request.url.raw_path.decode(), headers)
        begin = msgspec.json.encode(asked)
        length = asked.length
        size = sealing.WRAPPED + sealing.sealed_length(len(begin), *([length] if length else []))
        outer = self._outer.build_request(
            "POST", PATH, content=_sealed(shared, begin, cast(httpx.AsyncByteStream, request.stream), length),
            headers={
                "content-length": str(size), "content-type": "application/octet-stream", "accept-encoding": "identity",
            },
            extensions=dict(request.extensions),
        )  # fmt: skip
        answer = await self._outer.send(outer, stream=True)
        try:
            if answer.status_code != 200:
                if answer.status_code == MISDIRECTED:
                    self._key = None  # asked for anew
                raise Meddled(_refusal(answer.status_code))
            content = _Opened(answer, shared)
            told = sealing.head(Answered, await content.first())
        except BaseException as error:
            await answer.aclose()
            if isinstance(error, SealError):
                raise Meddled(str(error)) from error
            raise
        return httpx.Response(told.status, headers=told.headers, stream=content)

    async def _told(self, request: httpx.Request) -> X25519PublicKey:
        asking = self._outer.build_request("GET", KEY, extensions=dict(request.extensions))
        answer = await self._outer.send(asking, stream=True)
        try:
            if answer.status_code != 200:
                raise Meddled(_refusal(answer.status_code))
            told = b""
            async for part in answer.aiter_raw():
                told += part[: sealing.TOLD + 1]
                if len(told) > sealing.TOLD:
                    break
            return sealing.key_told(told, self._server)
        except SealError as error:
            raise Meddled(str(error)) from error
        finally:
            await answer.aclose()

    async def aclose(self) -> None:
        """Hang up."""
        await self._outer.aclose()


def _refusal(status: int) -> str:
    if status in (400, MISDIRECTED):
        return f"what was sealed for the server was changed on the way (status {status})."
    return f"a proxy in front of the server answered in its place, with status {status}."


async def _sealed(shared: Shared, begin: bytes, stream: httpx.AsyncByteStream, length: int) -> AsyncIterator[bytes]:
    """A request as it travels: a piece of its content at a time."""
    sealer = Sealer(shared.request_key())
    yield shared.wrapped + sealer.seal(begin, last=not length)
    left, rest = length, bytearray()
    async for part in stream:
        view = memoryview(part)
        while view:
            if not rest and len(view) >= sealing.PIECE:
                content, view = view[: sealing.PIECE], view[sealing.PIECE :]
            else:
                missing = sealing.PIECE - len(rest)
                rest += view[:missing]
                view = view[missing:]
                if len(rest) < min(sealing.PIECE, left):
                    continue
                content, rest = rest, bytearray()
            left -= len(content)
            yield sealer.seal(content, last=not left)


class _Opened(httpx.AsyncByteStream):
    """The content of an answer, as its pieces come."""

    def __init__(self, answer: httpx.Response, shared: Shared) -> None:
        self._answer, self._parts = answer, answer.aiter_raw()
        self._begun = Begun(sealing.SALT, shared.answer_key)
        self._left: list[bytes] = []

    async def first(self) -> bytes:
        """The first piece.

        Raises:
            SealError: there is none.
        """
        while not self._left:
            part = await anext(self._parts, None)
            if part is None:
                self._begun.end()
                raise SealError("truncated", "an answer has no head.")
            self._left = self._begun.take(part)
        return self._left.pop(0)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while True:
                while self._left:
                    if piece := self._left.pop(0):
                        yield piece
                part = await anext(self._parts, None)
                if part is None:
                    break
                self._left = self._begun.take(part)
            self._begun.end()
        except SealError as error:
            raise Meddled(str(error)) from error

    async def aclose(self) -> None:
        with suppress(httpx.HTTPError):
            await self._answer.aclose()
