"""`atoll run APP --sites N`: a server and N sites on this machine, over loopback, each a program of its own.

What runs is what runs in a deployment: TLS, signatures, journals, processes. Only the owner's approval is given at
once, since there is one owner; and what a site needs of a pooled table it takes from it under its own name.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from atoll.cli.operating import follow
from atoll.errors import RunError, invalid
from atoll.net import calls
from atoll.net.calls import Charter, Engine, View
from atoll.net.client import Client, Unreachable, join
from atoll.net.control import content_hash, named_well
from atoll.net.enrolment import decode
from atoll.net.home import Home
from atoll.net.policy import Approvals
from atoll.net.signing import SERVER

if TYPE_CHECKING:
    from atoll.database import Durability

PATIENCE = 120.0
"""Seconds a server may take to start on a busy machine."""

_PROGRAM = "from atoll.net.children import end_with_parent as e; e({}); from atoll.cli import main; main()"


def over_sites(
    folder: Path,
    app: Path,
    *,
    run: str,
    settings: Mapping[str, str],
    data: str | None,
    clients: Sequence[str],
    engine: str,
    tell: Callable[[str], None],
    durability: "Durability" = "process",
) -> View:
    """Run an experiment over sites on this machine; the last view of it.

    Args:
        folder: for the server's folder and those of the sites.
        app: the app file.
        run: name of the run.
        settings: of the app's parameters.
        data: the pooled table; None: the experiment brings its own data.
        clients: names of the sites, which are clients of the data.
        engine: at each site.
        tell: called with lines about what happens.
        durability: of all programs; a trial need not outlive the machine.

    Raises:
        RunError: a program ended that should not have.
        InvalidArgument: a client's name that no site can have; an engine that no site can have.
    """
    for client in clients:
        if not named_well(client) or client in (SERVER, "admin"):
            raise invalid("client", client, "a name of A-z 0-9 . _ @ - and blanks to be a site's")
    code = app.read_bytes()
    if engine not in get_args(Engine):
        raise invalid("--engine", engine, f"one of {', '.join(get_args(Engine))} over sites")
    charter = Charter(run, content_hash(code), dict(settings), engine=cast(Engine, engine), least=len(clients))
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as programs:
        state = folder / "server"
        server = _program(
            programs, folder / "server.log", "server", "--state", state, "--host", "127.0.0.1", "--port", 0,
            "--durability", durability,
        )  # fmt: skip
        admin = _started(server, state)
        homes = asyncio.run(_joined(admin, folder, clients))
        watched = [server]
        for name, home in zip(clients, homes, strict=True):
            Approvals(home.folder).settle(charter, "approved")
            given = [] if data is None else ["--data", data]
            watched.append(
                _program(
                    programs, folder / f"{home.folder.name}.log", "join", "--home", home.folder, *given,
                    "--durability", durability,
                )
            )  # fmt: skip
            tell(f"site {name}: {home.folder}")
        return asyncio.run(_followed(admin, charter, code.decode(), watched, folder, tell))


def _program(programs: ExitStack, log: Path, *words: object) -> "subprocess.Popen[bytes]":
    """Start `atoll WORDS`; it is ended at the end."""
    out = programs.enter_context(log.open("ab"))
    program = subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM.format(os.getpid()), *map(str, words)],
        stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        # A trial is not in a real server's state.
        env={n: v for n, v in os.environ.items() if n not in ("ATOLL_DATABASE", "ATOLL_OBJECTS")},
    )  # fmt: skip

    def end() -> None:
        program.terminate()
        try:
            program.wait(10.0)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()

    programs.callback(end)
    return program


def _started(server: "subprocess.Popen[bytes]", state: Path) -> Home:
    until = time.monotonic() + PATIENCE
    while not (state / "admin" / "identity.json").exists():
        if server.poll() is not None or time.monotonic() > until:
            raise RunError(f"the server did not start; see {state.parent / 'server.log'}")
        time.sleep(0.05)
    return Home(state / "admin")


async def _joined(admin: Home, folder: Path, clients: Sequence[str]) -> list[Home]:
    client = Client(admin)
    try:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                made: calls.Invites = await client.call(calls.MakeInvites(list(clients), "site", 1.0))
                break
            except Unreachable:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.2)
    finally:
        await client.close()
    return [await join(decode(word), folder / f"site-{i}") for i, word in enumerate(made.words, 1)]


async def _followed(
    admin: Home,
    charter: Charter,
    code: str,
    programs: "Sequence[subprocess.Popen[bytes]]",
    folder: Path,
    tell: Callable[[str], None],
) -> View:
    client = Client(admin)
    try:
        await client.call(calls.Submit(charter, code))
    finally:
        await client.close()
    following = asyncio.ensure_future(follow(admin, charter.run, tell))
    while not following.done():
        await asyncio.wait({following}, timeout=1.0)
        if not following.done() and any(p.poll() is not None for p in programs):
            following.cancel()
            raise RunError(f"one of the programs ended; see the logs in {folder}")
    return following.result()
