"""Connections of a client: HTTP by httpx and httpcore, over asyncio's own streams.

What httpcore brings for asyncio goes through several layers for every sixteen kilobytes of TLS; asyncio does TLS below
its streams, a quarter of a megabyte at a time, and a model comes in about half of the processor's time. At every
lock httpcore asks sniffio what it runs on, and where there is none looks for it on the whole path: it is depended on.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx

PIECE = 2**18
"""Bytes that are read ahead, and sent at a time."""
NEXT = 0.25
"""Seconds after which the next address of a server is tried beside the last one (RFC 8305)."""


class Lines(httpx.AsyncBaseTransport):
    """Connections to servers, kept for the next request.

    Args:
        context: of TLS.
        most: connections at a time.
        kept: connections that are kept.
        seconds: how long they are.
    """

    def __init__(self, context: ssl.SSLContext, *, most: int, kept: int, seconds: float) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context, max_connections=most, max_keepalive_connections=kept, keepalive_expiry=seconds,
            network_backend=_Backend(),
        )  # fmt: skip

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the answer, whose content is still to come."""
        url = request.url
        sent = httpcore.Request(
            request.method,
            httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with _told():
            answer = await self._pool.handle_async_request(sent)
        return httpx.Response(
            answer.status, headers=answer.headers, stream=_Stream(answer.stream), extensions=answer.extensions
        )

    async def aclose(self) -> None:
        """Close all of them."""
        await self._pool.aclose()


@contextmanager
def _told() -> Generator[None]:
    """The errors of httpcore as those of httpx, which have the same names."""
    try:
        yield
    except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
        raise getattr(httpx, type(error).__name__)(str(error)) from error
    except httpcore.ConnectionNotAvailable as error:
        raise httpx.ConnectError(str(error)) from error


class _Stream(httpx.AsyncByteStream):
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _told():
            async for part in self._stream:
                yield part

    async def aclose(self) -> None:
        with _told():
            await self._stream.aclose()


class _Reader(asyncio.StreamReader):
    """One that tells how much has come."""

    come = 0

    def feed_data(self, data: Any) -> None:
        """Take what has come."""
        self.come += len(data)
        super().feed_data(data)


class _Line(httpcore.AsyncNetworkStream):
    def __init__(self, reader: _Reader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer, self._had = reader, writer, 0

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _as(httpcore.ReadTimeout, httpcore.ReadError):
            async with asyncio.timeout(timeout):
                # httpcore asks for 64 KiB, and takes as much as is there.
                part = await self._reader.read(max(max_bytes, PIECE))
        self._had += len(part)
        return part

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        view = memoryview(buffer)
        with _as(httpcore.WriteTimeout, httpcore.WriteError):
            for at in range(0, len(view), PIECE):
                self._writer.write(view[at : at + PIECE])
                async with asyncio.timeout(timeout):
                    await self._writer.drain()

    async def aclose(self) -> None:
        self._writer.transport.abort()  # whoever closes waits for nobody: all that counts was answered

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        with _as(httpcore.ConnectTimeout, httpcore.ConnectError):
            async with asyncio.timeout(timeout):
                await self._writer.start_tls(ssl_context, server_hostname=server_hostname)
        return self

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # of a connection at rest: its end, or an answer that nobody asked for
            return self._reader.come > self._had or self._reader.at_eof() or self._writer.is_closing()
        names = {"ssl_object": "ssl_object", "socket": "socket", "client_addr": "sockname", "server_addr": "peername"}
        return self._writer.get_extra_info(names[info]) if info in names else None


class _Backend(httpcore.AsyncNetworkBackend):
    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        local = None if local_address is None else (local_address, 0)
        with _as(httpcore.ConnectTimeout, httpcore.ConnectError):
            async with asyncio.timeout(timeout):
                loop, reader = asyncio.get_running_loop(), _Reader(limit=PIECE)
                transport, protocol = await loop.create_connection(
                    lambda: asyncio.StreamReaderProtocol(reader), host, port, local_addr=local,
                    happy_eyeballs_delay=NEXT,
                )  # fmt: skip
                writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        for option in socket_options or ():
            writer.get_extra_info("socket").setsockopt(*option)
        return _Line(reader, writer)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@contextmanager
def _as(late: type[Exception], broken: type[Exception]) -> Generator[None]:
    try:
        yield
    except TimeoutError as error:
        raise late(str(error)) from error
    except (OSError, EOFError) as error:  # TLS's errors among them
        raise broken(str(error)) from error
