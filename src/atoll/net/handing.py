"""Connections that one server hands to another, byte for byte: TLS goes on between the site and the one that answers.

The server that answers is told from where a connection came, since it has little patience with strangers and counts
them by address; and it hears that from servers of its own key alone:

    answers -> hands   32 bytes, drawn for this connection
    hands -> answers   host (46 bytes, filled up with zeros), port (2 bytes), and the server's signature (64 bytes) of
                       both, behind `LABEL` and the 32 bytes
    then               what the site says, and what it is told

What a site says is read when there is somebody to hand it to, so that a connection which came while nobody led loses
nothing.
"""

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

LABEL = b"atoll: a connection is handed over\n"
CHALLENGE, PLACE, SIGNATURE = 32, 48, 64
PIECE = 2**18
"""Bytes that are passed on at a time."""
WAIT = 9.0
"""Seconds that a connection waits for somebody who leads: shorter than a site waits for the server's first byte."""
AGAIN = 0.2
"""Seconds after which it is tried again."""
GREETING = 3.0
"""Seconds in which two servers must have shown each other who they are."""
ENDING = 5.0
"""Seconds that a site has to hang up, once it was told everything."""
CONNECTIONS = 8192
"""Connections that are handed over at a time."""
OFTEN = 60.0
"""Seconds in which it is written down once that connections cannot be handed over, or that a stranger tried to."""
UNKNOWN = 1024
"""Connections at a time that have not shown yet that they come from a server."""

log = logging.getLogger("atoll.server")


def place_of(host: str, port: int) -> bytes:
    """Host and port as they are told; a host that is too long is not told."""
    told = host.encode("ascii", "replace")
    return (told if len(told) <= PLACE - 2 else b"").ljust(PLACE - 2, b"\0") + port.to_bytes(2, "big")


async def listen(
    listener: socket.socket,
    take: Callable[[socket.socket, Any], Coroutine[Any, Any, None]],
    tasks: "set[asyncio.Task[None]]",
) -> None:
    """Take connections until cancelled.

    Args:
        listener: they come to it.
        take: called with each and where it came from, in a task of its own, which outlives this.
        tasks: those that are at work.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            line, where = await loop.sock_accept(listener)
        except OSError as error:  # no more files: others will be closed
            log.warning("a connection cannot be taken: %s", error)
            await asyncio.sleep(AGAIN)
            continue
        line.setblocking(False)
        task = loop.create_task(take(line, where))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


class Hands:
    """The side that hands connections over.

    Attributes:
        to: address of the server that answers, host:port; "": none is known.

    Args:
        key: the servers' own.
    """

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self.to, self._key, self._many, self._said = "", key, 0, -OFTEN

    async def take(self, line: socket.socket, where: Any) -> None:
        """Hand a connection to whoever leads, as soon as somebody does."""
        if self._many >= CONNECTIONS:
            line.close()
            return
        self._many += 1
        try:
            with line:
                there = await self._greeted(where)
                if there is not None:
                    with there:
                        await _spliced(line, there)
        except OSError:
            pass  # either side hung up
        finally:
            self._many -= 1

    async def _greeted(self, where: Any) -> socket.socket | None:
        until = time.monotonic() + WAIT
        while time.monotonic() < until:
            if self.to:
                with suppress(OSError, TimeoutError, EOFError):
                    async with asyncio.timeout(GREETING):
                        return await self._greet(self.to, place_of(str(where[0]), int(where[1])))
            await asyncio.sleep(AGAIN)
        if time.monotonic() - self._said > OFTEN:
            self._said = time.monotonic()
            log.warning("connections cannot be handed over to %s", self.to or "anybody: nobody leads")
        return None

    async def _greet(self, address: str, place: bytes) -> socket.socket:
        loop = asyncio.get_running_loop()
        host, _, port = address.rpartition(":")
        found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        family, kind, protocol, _, at = found[0]
        line = socket.socket(family, kind, protocol)
        try:
            line.setblocking(False)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            await loop.sock_connect(line, at)
            drawn = await _exactly(line, CHALLENGE)
            await loop.sock_sendall(line, place + self._key.sign(LABEL + drawn + place))
        except BaseException:
            line.close()
            raise
        return line


class Answers:
    """The side that is handed connections.

    Attributes:
        take: called with a connection and the host and port that it came from, while this server leads; else None.

    Args:
        key: the servers' own.
    """

    def __init__(self, key: Ed25519PublicKey) -> None:
        self.take: Callable[[socket.socket, tuple[str, int]], Coroutine[Any, Any, None]] | None = None
        self._key, self._unknown, self._said = key, 0, -OFTEN

    async def greeted(self, line: socket.socket, where: Any) -> None:
        """Take a connection, if a server of our key hands it over."""
        place = None
        if self.take is not None and self._unknown < UNKNOWN:
            self._unknown += 1
            try:
                with suppress(OSError, TimeoutError, EOFError):
                    async with asyncio.timeout(GREETING):
                        place = await self._greet(line)
            finally:
                self._unknown -= 1
        take = self.take
        if place is None or take is None:
            line.close()
            return
        host = place[:-2].rstrip(b"\0").decode("ascii", "replace")
        await take(line, (host, int.from_bytes(place[-2:], "big")))

    async def _greet(self, line: socket.socket) -> bytes | None:
        drawn = secrets.token_bytes(CHALLENGE)
        await asyncio.get_running_loop().sock_sendall(line, drawn)
        said = await _exactly(line, PLACE + SIGNATURE)
        place = said[:PLACE]
        try:
            self._key.verify(said[PLACE:], LABEL + drawn + place)
        except InvalidSignature:
            if time.monotonic() - self._said > OFTEN:  # strangers fill no log
                self._said = time.monotonic()
                log.warning("what wanted to hand a connection over is not a server of this key")
            return None
        return place


async def _exactly(line: socket.socket, length: int) -> bytes:
    """So many bytes, and not one more of what follows them."""
    loop, had = asyncio.get_running_loop(), b""
    while len(had) < length:
        part = await loop.sock_recv(line, length - len(had))
        if not part:
            raise EOFError
        had += part
    return had


async def _spliced(site: socket.socket, there: socket.socket) -> None:
    """Pass everything on, both ways, until the server has hung up or the site is gone."""
    site.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    site.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    up, down = asyncio.ensure_future(_passed(site, there)), asyncio.ensure_future(_passed(there, site))
    try:
        await down
        await asyncio.wait({up}, timeout=ENDING)
    finally:
        for each in (up, down):
            each.cancel()
        await asyncio.gather(up, down, return_exceptions=True)


async def _passed(source: socket.socket, target: socket.socket) -> None:
    """Pass on what one side says, and that it has ended or broken off."""
    loop = asyncio.get_running_loop()
    try:
        while part := await loop.sock_recv(source, PIECE):  # while nothing comes, there is no room for it either
            await loop.sock_sendall(target, part)
    finally:
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
