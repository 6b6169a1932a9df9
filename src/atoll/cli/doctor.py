"""`atoll doctor`: what stands between a party and its server, one thing after the other."""

import asyncio
import importlib.metadata
import shutil
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import typer

from atoll.cli.guard import console
from atoll.errors import AtollError
from atoll.net.client import line, line_of
from atoll.net.home import Home, home_for

RESERVE = 2**30
"""Bytes of free disk below which a warning is due."""
SKEW = 300.0
"""Seconds of difference between two clocks below which nobody need care."""

Finding = tuple[bool, str, str]
"""(fine, what was looked at, what was found and what to do)."""


def doctor(home: Path | None, data: str | None, objects: str | None = None) -> None:
    """Look at everything; see `atoll doctor --help`."""
    bad = False
    looked = findings(home_for(home, ("site", "researcher", "admin", "viewer"), "doctor"), data, objects)
    for fine, what, found in looked:
        bad = bad or not fine
        console().print(f"{'ok ' if fine else 'BAD'} {what:<10} {found}", markup=False, soft_wrap=True)
    if bad:
        raise typer.Exit(1)


def findings(home: Home, data: str | None, objects: str | None = None) -> Iterator[Finding]:
    """What was found, in an order in which the first that is bad explains those behind it."""
    who = home.identity
    yield True, "identity", f"{who.name}, {who.role} at {who.address}; its key is secret"
    names = ("atoll", "torch", "numpy", "httpx", "starlette", "cryptography")
    told = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
    yield True, "versions", f"Python {sys.version.split()[0]}, {told}"
    free = shutil.disk_usage(home.folder).free
    yield (
        free > RESERVE,
        "disk",
        f"{free / 2**30:.1f} GiB free at {home.folder}"
        + ("" if free > RESERVE else ": make room, or updates cannot be kept"),
    )
    yield from _line(home)
    if data is not None:
        yield from _data(data)
    if objects is not None:
        yield _objects(objects)


def _objects(url: str) -> Finding:
    from atoll.net.objects import probe, shown, store

    try:
        probe(store(url), shown(url))
    except (AtollError, OSError) as error:
        return False, "objects", str(error.strerror or error) if isinstance(error, OSError) else str(error)
    return True, "objects", f"{shown(url)} can be written, read and deleted from"


def _line(home: Home) -> Iterator[Finding]:
    host, _, port = home.identity.address.rpartition(":")
    host = host.strip("[]")
    try:
        found = sorted({str(a[4][0]) for a in socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)})
    except OSError as error:
        yield False, "name", f"{host} has no address ({error.strerror}): look at DNS, or ask for an invite with another"
        return
    yield True, "name", f"{host} is {', '.join(found)}"
    try:
        with socket.create_connection((host, int(port)), timeout=10.0):
            pass
    except OSError as error:
        yield (
            False,
            "port",
            f"{port} does not answer ({error}): does the server run, and do firewalls let it through?",
        )
        return
    yield True, "port", f"{port} answers"
    try:
        date = asyncio.run(_date(home))
    except (httpx.HTTPError, ssl.SSLError) as error:
        yield False, "TLS", f"what answers is not this party's server ({error}): somebody may stand between"
        return
    told = "1.3, and the server has the key of the invite"
    if home.identity.proxy:
        told = "by a proxy, which sees sealed contents; behind it the server has the key of the invite"
    yield True, "TLS", told
    if date is not None:
        off = time.time() - date
        text = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the server's"
        yield abs(off) < SKEW, "clock", text + ("" if abs(off) < SKEW else ": set it; runs go on, but logs mislead")


async def _date(home: Home) -> float | None:
    async with line(home.identity.address, home.context()) as http:
        answer = await http.get("/v1/authority")
    if home.identity.proxy:
        async with line_of(home) as sealed:  # only who has the server's key can open the question
            await sealed.get("/v1/authority")
    told = answer.headers.get("date")
    return None if told is None else parsedate_to_datetime(told).timestamp()


def _data(data: str) -> Iterator[Finding]:
    from atoll.data.frames import read_frame

    try:
        frame, _ = read_frame(data)
    except AtollError as error:
        yield False, "data", str(error)
        return
    columns = [f"{name} ({kind})" for name, kind in frame.dtypes.items()]
    yield len(frame) > 0, "data", f"{len(frame):,} rows; columns {', '.join(columns)}"
