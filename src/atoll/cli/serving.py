"""`atoll server`, `atoll invite`, `atoll join`: the road between a server and its sites."""

import asyncio
import sys
from pathlib import Path
from typing import Any, cast

import typer

from atoll.cli.guard import console, say
from atoll.errors import AtollError, InvalidArgument, invalid
from atoll.net import calls
from atoll.net.client import Client, Unreachable, join
from atoll.net.enrolment import decode
from atoll.net.home import PREFIX, Home, home_for, through
from atoll.net.keys import proxy_context

ROLES = ("site", "researcher", "admin", "viewer")


def server(
    state: Path,
    *,
    host: str,
    port: int,
    address: str | None,
    database: str | None = None,
    durability: str = "power",
    metrics: str | None = None,
    among: str | None = None,
    objects: str | None = None,
    proxy: str | None = None,
    ca: str | None = None,
) -> None:
    """Serve until told to stop; see `atoll server --help`."""
    from atoll import __version__
    from atoll.net.server import Proxy, log_to_stderr, serve

    check_durability(durability)
    if proxy not in (None, "plain", "tls"):
        raise invalid("--proxy", proxy, '"plain" (HTTP, from this machine) or "tls"')
    if ca is not None and proxy is None:
        raise InvalidArgument("--ca is of a proxy in front of the server: say with --proxy how it speaks to it.")
    if proxy is not None and among is not None:
        raise InvalidArgument("--proxy cannot be given with --among: before several servers stands what passes TCP on.")
    if objects is not None and among is not None:
        raise InvalidArgument("--objects cannot be given with --among: several servers share a folder.")
    front = None if proxy is None else Proxy(proxy == "tls", authorities(ca) or "")
    scraped = None
    if metrics is not None:
        from atoll.net.exposition import listening

        scraped = listening(metrics)

    def told(reached: str, fingerprint: str, place: str) -> None:
        out = console()
        lines = [
            f"Atoll {__version__}, server",
            f"  listens on   {host}:{port or reached.rpartition(':')[2]}",
            f"  reached as   {reached}   (what invites say; another with --address HOST:PORT)",
            *([] if proxy is None else [f"  proxy        ends TLS; speaks {proxy} to this server; all is sealed"]),
            f"  fingerprint  {fingerprint}",
            f"  folder       {state}",
            f"  state        {place}",
            *([] if among is None else [f"  one of several, reached by the others as {among}"]),
            *([] if objects is None else [f"  objects      {objects}"]),
            *([] if scraped is None else [f"  metrics      http://{scraped[0]}:{scraped[1]}/metrics"]),
            "Let sites in, from this folder, in another terminal: atoll invite NAME...",
        ]
        for line in lines:
            out.print(line, markup=False, soft_wrap=True)
        sys.stdout.flush()

    log_to_stderr()
    common: dict[str, Any] = {
        "host": host, "port": port, "address": address, "told": told, "database": database, "durability": durability,
        "metrics": scraped,
    }  # fmt: skip
    if among is None:
        serve(state, objects=objects, proxy=front, **common)
    else:
        from atoll.net.several import serve_several

        serve_several(state, among=among, **common)


def invite(names: list[str], *, role: str, hours: float, home: Path | None, quiet: bool) -> None:
    """Make invites; see `atoll invite --help`."""
    if role not in ROLES:
        raise invalid("--role", role, f"one of {', '.join(ROLES)}")
    made: calls.Invites = ask(home_for(home, ("admin",), "invite"), calls.MakeInvites(names, role, hours))
    if quiet:
        for word in made.words:
            typer.echo(word)
        return
    say(f"Each of these lets one {role} in, once, within {hours:g} hours. Hand it to its owner over a private line.")
    for name, word in zip(names, made.words, strict=True):
        data = " --data PATH" if role == "site" else ""
        typer.echo(f"{name}:\n  atoll join {word}{data}")


def take_up(
    word: str | None,
    *,
    data: str | None,
    home: Path | None,
    task: float,
    memory: float,
    sums: tuple[int, bool],
    stay: bool,
    durability: str,
    ca: str | None = None,
) -> None:
    """Join a server, and for a site take part in its runs; see `atoll join --help`."""
    from atoll.net.server import log_to_stderr
    from atoll.net.site import Bounds, run_site

    check_durability(durability)
    trusted = authorities(ca)
    bounds = Bounds(task=task, memory=int(memory * 2**30), least=sums[0], again=sums[1])
    if data is not None and not Path(data).exists():
        raise invalid("--data", data, "a file or a folder that is there")
    if word is None:
        if home is None:
            raise InvalidArgument("give the INVITE you were sent; or --home, to go on as a party that joined already.")
        mine = Home(home)
        mine = mine if trusted is None else through(mine, trusted)
    else:
        invite = decode(sys.stdin.readline() if word == "-" else word)
        folder = home if home is not None else Path(f"{PREFIX}{invite.name}")
        known = (folder / "identity.json").exists()
        mine = asyncio.run(join(invite, folder, trusted))
        if known and trusted is not None:
            mine = through(mine, trusted)
        if not known:
            say(
                f"joined {mine.identity.address} as {mine.identity.name} ({mine.identity.role}); its key is in {folder}"
            )
    if mine.identity.role != "site":
        say(f"commands given in this folder act for {mine.identity.name}: atoll submit, watch, sites, ...")
        return
    if not stay:
        return
    log_to_stderr()
    say(f"site {mine.identity.name}: takes part in what its owner approves; Ctrl-C stops. Elsewhere: atoll review")
    run_site(mine, data or "", bounds, durability=cast(Any, durability))


def authorities(ca: str | None) -> str | None:
    """Authorities of a proxy, as PEM; "": those that this machine trusts; None: nothing was said.

    Raises:
        InvalidArgument: a file that cannot be read, or holds none.
    """
    if ca is None or ca == "public":
        return None if ca is None else ""
    try:
        found = Path(ca).read_text()
        proxy_context(found)
    except (OSError, UnicodeDecodeError, InvalidArgument) as error:
        raise invalid("--ca", ca, '"public", or a file of certificates of authorities in PEM') from error
    if not found:
        raise invalid("--ca", ca, "a file that is not empty")
    return found


def check_durability(durability: str) -> None:
    """Refuse what is no durability."""
    if durability not in ("process", "power"):
        raise invalid("--durability", durability, '"process" or "power"')


def ask(home: Home, call: calls.Call) -> Any:
    """Make one call.

    Raises:
        AtollError: the server will not, or cannot be reached.
    """

    async def once() -> Any:
        client = Client(home)
        try:
            return await client.call(call)
        except Unreachable as error:
            raise AtollError(f"{error}. Is the server at {home.identity.address} running? Try: atoll doctor") from error
        finally:
            await client.close()

    return asyncio.run(once())
