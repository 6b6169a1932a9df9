"""Connections over asyncio's streams: what comes is what was sent, and what breaks says so."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from atoll.net.client import line
from atoll.net.lines import PIECE, Lines

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
LONG = bytes(range(256)) * (3 * PIECE // 256)


def used(serve: Serve, use: Callable[[httpx.AsyncClient], Awaitable[Any]], **timeouts: float) -> tuple[Any, int]:
    """What a use of a client of a small server gives, and how many connections it made."""
    count = 0

    async def once() -> Any:
        async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal count
            count += 1
            await serve(reader, writer)
            writer.close()

        server = await asyncio.start_server(counted, "127.0.0.1", 0)
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        lines = Lines(ssl.create_default_context(), most=4, kept=4, seconds=30.0)
        try:
            async with httpx.AsyncClient(
                base_url=address, transport=lines, timeout=httpx.Timeout(10.0, **timeouts)
            ) as http:
                return await use(http)
        finally:
            server.close()

    return asyncio.run(once()), count


async def heard(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((int(w.split(b":")[1]) for w in head.split(b"\r\n") if w.lower().startswith(b"content-length")), 0)
    return head, await reader.readexactly(length)


def said(writer: asyncio.StreamWriter, body: bytes, length: int | None = None) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (len(body) if length is None else length) + body)


def test_long_contents_come_and_go_over_one_connection() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(3):
            said(writer, (await heard(reader))[1])
            await writer.drain()

    async def use(http: httpx.AsyncClient) -> list[bool]:
        return [(await http.put("/x", content=LONG)).content == LONG for _ in range(3)]

    assert used(echo, use) == ([True] * 3, 1)


def test_a_connection_that_the_server_closed_at_rest_is_not_used_again() -> None:
    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await heard(reader)
        said(writer, b"fine")
        await writer.drain()

    async def use(http: httpx.AsyncClient) -> list[bytes]:
        out: list[bytes] = []
        for _ in range(3):
            out.append((await http.get("/")).content)
            await asyncio.sleep(0.05)
        return out

    assert used(one, use) == ([b"fine"] * 3, 3)


def test_an_answer_that_nobody_asked_for_is_the_answer_to_nothing() -> None:
    async def goes_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await heard(reader)
        said(writer, b"fine")
        await writer.drain()
        await asyncio.sleep(0.05)
        said(writer, b"more")
        await reader.read()

    async def use(http: httpx.AsyncClient) -> list[bytes]:
        out: list[bytes] = []
        for _ in range(2):
            out.append((await http.get("/")).content)
            await asyncio.sleep(0.2)
        return out

    assert used(goes_on, use) == ([b"fine"] * 2, 2)


def test_of_two_addresses_the_one_that_answers_is_used() -> None:
    async def once() -> bytes:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await heard(reader)
            said(writer, b"fine")
            writer.close()

        with contextlib.ExitStack() as held:
            mute = held.enter_context(socket.socket())
            mute.bind(("127.0.0.2", 0))
            mute.listen(0)
            for _ in range(3):  # whoever comes after them waits for ever
                other = held.enter_context(socket.socket())
                other.setblocking(False)
                other.connect_ex(mute.getsockname())
            port = mute.getsockname()[1]
            await asyncio.start_server(serve, "127.0.0.1", port)
            loop = asyncio.get_running_loop()

            async def addresses(*_: Any, **__: Any) -> list[Any]:
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{i}", port)) for i in (2, 1)]

            loop.getaddrinfo = addresses  # type: ignore[method-assign]
            lines = Lines(ssl.create_default_context(), most=4, kept=4, seconds=30.0)
            async with httpx.AsyncClient(transport=lines, timeout=20.0) as http:
                return (await http.get(f"http://two.example:{port}/")).content

    assert asyncio.run(asyncio.wait_for(once(), 10.0)) == b"fine"


async def _hangs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await heard(reader)
    await asyncio.sleep(2.0)


async def _breaks_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await heard(reader)
    said(writer, b"half", length=8)


async def _resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def _talks_nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await heard(reader)
    writer.write(b"\x80\x04.\r\n\r\n")


async def _reads_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(2.0)


@pytest.mark.parametrize(
    ("serve", "error", "content"),
    [
        (_hangs, httpx.ReadTimeout, b""),
        (_breaks_off, httpx.RemoteProtocolError, b""),
        (_resets, (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError), b""),
        (_talks_nonsense, httpx.RemoteProtocolError, b""),
        (_reads_nothing, httpx.WriteTimeout, LONG * 20),
    ],
)
def test_what_breaks_is_an_error_of_httpx(serve: Serve, error: Any, content: bytes) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        with pytest.raises(error):
            await http.put("/", content=content)

    used(serve, use, read=0.2, write=0.2)


def test_where_nobody_listens() -> None:
    async def once() -> None:
        async with line("127.0.0.1:9", ssl.create_default_context()) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get("/")

    asyncio.run(once())


@pytest.mark.parametrize(
    ("address", "environment", "straight"),
    [
        ("atoll.example:8", {}, True),
        ("atoll.example:8", {"HTTPS_PROXY": "http://127.0.0.1:9"}, False),
        ("atoll.example:8", {"ALL_PROXY": "http://127.0.0.1:9"}, False),
        ("atoll.example:8", {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "atoll.example"}, True),
        ("127.0.0.1:8", {"HTTPS_PROXY": "http://127.0.0.1:9"}, True),
        ("[::1]:8", {"HTTPS_PROXY": "http://127.0.0.1:9"}, True),
    ],
)
def test_a_proxy_of_the_environment_is_used_but_to_this_machine(
    address: str, environment: dict[str, str], straight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    http = line(address, ssl.create_default_context())
    route = http._transport_for_url(httpx.URL(f"https://{address}/v1/call"))
    assert isinstance(route, Lines) is straight
