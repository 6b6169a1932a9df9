"""What a deployed round costs: four sites over loopback, and a thousand connections to one server.

Sites do next to nothing, so that what is measured is the road between them and the server: TLS, signatures, durable
spools, journals, processes. Beside it stands a floor: the same bytes over bare TLS sockets between bare processes, put
into a file for each site and averaged.

    python benchmarks/deployment.py
"""

import asyncio
import itertools
import multiprocessing
import os
import resource
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from reporting import Findings, Table, finish, parser

SITES = 4
SIZES = (10**6, 10**7, 5 * 10**7)
FLOOR = 3.0
"""A round takes no longer than so many of the floor's."""
PEERS = {10**6: (2.5, 5.0), 10**7: (3.5, 3.0), 5 * 10**7: (8.0, 1.5)}
"""Seconds of a round of the best other framework, without TLS, and how many times faster Atoll is to be."""
MODELS = 3.0
"""The server's memory is at most so many models, whatever the number of sites."""
PIECE = 2**22
NEW = 16
"""Sites of a crowd that come at a time."""
LOOK = 0.25
"""Seconds between two looks at a crowd."""

APP = """
import torch
from torch import nn

import atoll


class Wide(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight[:1]


def experiment(*, size: int = 1000, rounds: int = 3, sites: int = 4) -> atoll.Experiment:
    given = {f"site-{i}": (torch.zeros(1, 1), torch.full((1, 1), i + 1.0)) for i in range(sites)}
    return atoll.Experiment(
        model=atoll.Model(Wide(size), "mse"),
        data=atoll.FederatedDataset.from_arrays(given),
        algorithm=atoll.fedavg(atoll.local_sgd(0.1, steps=1, batch_size=None)),
        rounds=rounds,
        evaluate_every=0,
        title="A deployed round",
    )
"""


# --- the floor --------------------------------------------------------------------------------------------------------


def received(line: ssl.SSLSocket, into: memoryview) -> None:
    """Fill `into` from a line."""
    at = 0
    while at < len(into):
        read = line.recv_into(into[at : at + PIECE])
        if not read:
            raise EOFError
        at += read


def floor_site(port: int, pem: str, size: int) -> None:
    """Take a model and send as many bytes back, until the line ends."""
    context = ssl.create_default_context(cadata=pem)
    context.check_hostname = False
    model = np.empty(size, np.float32)
    bare = socket.create_connection(("127.0.0.1", port))
    with context.wrap_socket(bare) as line, suppress(EOFError):
        while True:
            received(line, memoryview(model).cast("B"))
            line.sendall(memoryview(model).cast("B"))


def floor(size: int, rounds: int, durable: bool) -> list[float]:
    """Seconds of each round of bare processes: a model to each site, one back into a file each, and their mean."""
    from concurrent.futures import ThreadPoolExecutor

    from atoll.net.keys import authority, server_context

    key, spawn = Ed25519PrivateKey.generate(), multiprocessing.get_context("spawn")
    seconds = list[float]()
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as door:
        context = server_context(key, Path(folder))
        given = (door.getsockname()[1], authority(key).decode(), size)
        sites = [spawn.Process(target=floor_site, args=given, daemon=True) for _ in range(SITES)]
        for site in sites:
            site.start()
        lines = [context.wrap_socket(door.accept()[0], server_side=True) for _ in sites]
        files = [Path(folder) / f"{i}" for i in range(SITES)]
        model = np.zeros(size, np.float32)

        def served(line: ssl.SSLSocket, path: Path) -> None:
            line.sendall(memoryview(model).cast("B"))
            piece, left = bytearray(PIECE), 4 * size
            with open(path, "wb") as file:
                while left:
                    part = memoryview(piece)[: min(PIECE, left)]
                    received(line, part)
                    file.write(part)
                    left -= len(part)
                file.flush()
                if durable:
                    os.fsync(file.fileno())

        with ThreadPoolExecutor(SITES) as threads:
            for _ in range(rounds):
                began = time.perf_counter()
                list(threads.map(served, lines, files))
                kept = [np.memmap(path, np.float32, "r", shape=(size,)) for path in files]
                for at in range(0, size, PIECE):
                    part = slice(at, at + PIECE)
                    total = kept[0][part].astype(np.float64)
                    for other in kept[1:]:
                        total += other[part]
                    model[part] = total / SITES
                seconds.append(time.perf_counter() - began)
        for line in lines:
            line.close()
        for site in sites:
            site.join(10.0)
    return seconds


# --- Atoll ------------------------------------------------------------------------------------------------------------


def descendants(of: int) -> dict[int, str]:
    """Processes below one, with their command lines."""
    parents, words = dict[int, int](), dict[int, str]()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            number = int(path.name)
            parents[number] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            words[number] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    found, new = dict[int, str](), {of}
    while new:
        new = {n for n, parent in parents.items() if parent in new}
        found |= {n: words[n] for n in new}
    return found


def peak(number: int) -> int:
    """Bytes a process had at most."""
    for line in Path(f"/proc/{number}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0


def deployed(size: int, rounds: int, durable: bool) -> tuple[list[float], int]:
    """Seconds of each round after the first of a server and sites as programs, and bytes the server had at most."""
    from atoll.cli.local import over_sites

    ends, most = list[float](), 0

    def tell(line: str) -> None:
        nonlocal most
        if not line.startswith("round "):
            return
        ends.append(time.perf_counter())
        total = 0
        for number, words in descendants(os.getpid()).items():
            if " server " in words or "atoll.deployment.runner" in words:
                with suppress(OSError):
                    total += peak(number)
        most = max(most, total)

    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder) / "app.py"
        app.write_text(APP)
        view = over_sites(
            Path(folder) / "run", app, run="bench", data=None, engine="loop", tell=tell,
            settings={"size": str(size), "rounds": str(rounds), "sites": str(SITES)},
            clients=[f"site-{i}" for i in range(SITES)], durability="power" if durable else "process",
        )  # fmt: skip
    assert view.phase == "finished", view.reason
    return [after - before for before, after in itertools.pairwise(ends)], most


# --- a thousand connections -------------------------------------------------------------------------------------------


def enrolled(folder: Path, names: Sequence[str]) -> tuple[Any, list[Any], int]:
    """Homes of an administrator and of sites of a server that is still to be started, and the port it is to have.

    The server takes a stranger a second from one address, so that a crowd on one machine is written into its roster.
    """
    from atoll.net.enrolment import Roster
    from atoll.net.home import Identity, settle
    from atoll.net.keys import key_at, public_text
    from atoll.net.server import establish, opened

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address, homes = f"127.0.0.1:{port}", list[Any]()
    server = folder / "server"
    server.mkdir(mode=0o700)
    state, note = opened(server, None, "process")
    admin = establish(server, address, state)
    note()
    print_ = admin.identity.fingerprint
    with closing(state), closing(Roster(state.journal("roster"))) as roster:
        for name in names:
            home = folder / name
            home.mkdir(mode=0o700)
            token = roster.invite(name, "site", hours=1, by="admin", now=time.time())
            roster.enrol(name, public_text(key_at(home / "key", make=True).public_key()), token, now=time.time())
            homes.append(settle(home, Identity(name, "site", address, print_), admin.authority))
    return admin, homes, port


@contextmanager
def serving(folder: Path, port: int) -> Generator[int]:
    """A server as a program of its own; the number of its process."""
    log = folder / "server.log"
    words = ["server", "--state", str(folder / "server"), "--host", "127.0.0.1", "--port", str(port)]
    words += ["--durability", "process"]
    with log.open("wb") as out:
        program = subprocess.Popen(
            [sys.executable, "-c", "from atoll.cli import main; main()", *words], stdout=out, stderr=out
        )
    try:
        until = time.monotonic() + 120
        while "fingerprint" not in log.read_text(errors="replace"):
            assert program.poll() is None and time.monotonic() < until, log.read_text(errors="replace")
            time.sleep(0.1)
        yield program.pid
    finally:
        program.terminate()
        program.wait(60)


class Kept(list[bytes]):
    """A site's journal, which its program's end may take with it."""

    head = ""

    def close(self) -> None:
        """Nobody waits for it."""


class Shelf(dict[str, Kept]):
    """What stands for a site's database."""

    def journal(self, name: str) -> Kept:
        """One of the site's journals."""
        return self.setdefault(name, Kept())


class Line(httpx.AsyncBaseTransport):
    """HTTP/1.1 over TLS and nothing more: what a site's own library does beyond costs as much as a server's answer."""

    def __init__(self, address: str, context: ssl.SSLContext) -> None:
        self.host, _, self.port = address.rpartition(":")
        self.context, self.free = context, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request over a connection that is free, or a new one."""
        while self.free:
            reader, writer = self.free.pop()
            if not reader.at_eof():
                break
            writer.close()
        else:
            reader, writer = await asyncio.open_connection(self.host, int(self.port), ssl=self.context)
        try:
            lines = [f"{request.method} {request.url.raw_path.decode()} HTTP/1.1"]
            lines += [f"{name}: {value}" for name, value in request.headers.items()]
            writer.write("\r\n".join([*lines, "", ""]).encode() + await request.aread())
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = [(n, v.strip()) for n, _, v in (line.partition(":") for line in head[1:-2])]
            content = await reader.readexactly(int(dict(headers)["content-length"]))
        except (OSError, EOFError, asyncio.CancelledError) as error:
            writer.close()
            if isinstance(error, asyncio.CancelledError):
                raise
            raise httpx.ReadError(str(error)) from error
        self.free.append((reader, writer))
        return httpx.Response(int(head[0].split()[1]), headers=headers, stream=httpx.ByteStream(content))

    async def aclose(self) -> None:
        """Hang up."""
        for _, writer in self.free:
            writer.close()


def simulated(homes: Sequence[Any], app: Path, settings: Mapping[str, str]) -> list[Any]:
    """Sites of this process: a site's program without a database, and without the author's process: what the first site
    learns in a round is theirs, each times a factor of its own.
    """
    from atoll.deployment.prepare import experiment_of, process_of
    from atoll.net import site
    from atoll.net.agent import Trainer
    from atoll.net.children import Ready
    from atoll.net.frames import declared, decode, encode
    from atoll.net.keys import client_context

    experiment = experiment_of(app, settings)
    process, data = process_of(experiment, "loop"), experiment.data
    first, *_ = data.clients
    train, given = Trainer(process, type(data).from_arrays({first: data[first].train})), dict[tuple[int, int], Any]()

    class Part(site.Part):
        async def _ready_child(self) -> Any:
            self._ready = Ready(self.identity, False, None)
            return None

        async def _trained(self, work: Any, content: Any, memory: bytes) -> Any:
            at = work.round, work.attempt
            if at not in given:
                given[at] = train(work, content, memory)
            tensors = decode(given[at].frame, declared(given[at].frame))
            share = float(self.site.name.rpartition("-")[2]) / len(homes)
            scaled = {n: t * (1 + share) if n.startswith("wire") else t for n, t in tensors.items()}
            return replace(given[at], frame=encode(scaled))

    site.Part = Part
    site.state_of = lambda folder, durability: Shelf()
    site.LOOK = 60.0  # an owner of a thousand sites does not change his mind
    made = [site.Site(home, "", durability="process") for home in homes]
    context = client_context(homes[0].authority)
    for each in made:
        line = Line(each.home.identity.address, context)
        each.client._http = httpx.AsyncClient(transport=line, base_url=f"https://{each.home.identity.address}")
    return made


async def connected(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """One server, and as many sites as asked that take part in a run from here."""
    from atoll.net import calls
    from atoll.net.calls import Charter
    from atoll.net.client import Client
    from atoll.net.control import content_hash
    from atoll.net.policy import Approvals

    app, names = folder / "app.py", [f"site-{i}" for i in range(count)]
    app.write_text(APP)
    settings = {"size": "1000", "rounds": str(rounds), "sites": str(count)}
    charter = Charter("crowd", content_hash(app.read_bytes()), settings, engine="loop", least=count)
    admin, homes, port = enrolled(folder, names)
    for home in homes:
        Approvals(home.folder).settle(charter, "approved")
    with serving(folder, port) as server:
        client = Client(admin)
        await client.call(calls.Submit(charter, APP))
        sites = simulated(homes, app, settings)
        began = time.perf_counter()
        asking = list[asyncio.Future[None]]()
        for at in range(0, count, NEW):  # the server holds few connections of strangers from one address
            asking += [asyncio.ensure_future(each._ask()) for each in sites[at : at + NEW]]
            while any(each.client.epoch == "-" for each in sites[at : at + NEW]):
                await asyncio.sleep(0.02)
        ready, view, most, spent = 0.0, None, 0, [processors(server)]
        while view is None or not view.over:
            view = await client.call(calls.Watch("crowd", -1 if view is None else view.version))
            if not ready and sum(s.standing == "ready" for s in view.sites) == count:
                ready = time.perf_counter() - began
                spent.append(processors(server))
            if ready and not view.over and len(view.closed) + 2 > len(spent):
                most = max(most, connections(server))
                spent.append(processors(server))
            await asyncio.sleep(LOOK)
        assert view.phase == "finished", view.reason
        found = {
            "sites": count, "ready": ready, "rounds": [c.seconds for c in view.closed],
            "updates": [c.clients for c in view.closed], "connections": most, "memory": peak(server),
            "processor": spent, "seconds": time.perf_counter() - began,
        }  # fmt: skip
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await asyncio.gather(*(each.client.close() for each in sites), client.close())
    return found


def connections(number: int) -> int:
    """Sockets a process holds."""
    total = 0
    for link in Path(f"/proc/{number}/fd").iterdir():
        with suppress(OSError):
            total += os.readlink(link).startswith("socket:")
    return total


def processor(number: int) -> float:
    """Processor seconds of a process."""
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def processors(server: int) -> dict[str, float]:
    """Processor seconds so far of the server's process, that of its run, and this one, in which the sites are."""
    runs = sum(processor(n) for n, words in descendants(server).items() if "atoll.deployment.runner" in words)
    return {"server": processor(server), "run": runs, "sites": processor(os.getpid())}


def shares(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table: what a crowd took of the processor, from when it was ready to the last round seen to end."""
    spent, rows = found["processor"], list[list[str]]()
    work = found["sites"] * max(1, len(spent) - 2)
    names = {"server": "the server's process", "run": "the run's process", "sites": "the process of all sites"}
    for key, name in names.items():
        each = 1e3 * (spent[-1][key] - spent[min(1, len(spent) - 1)][key]) / work
        rows.append([f"processor of {name}, ms for a site and round", f"{each:.1f}", ""])
    return rows


def crowd(count: int, rounds: int) -> dict[str, Any]:
    """`connected`, in a folder that goes away."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # What the sites keep need not outlive the machine: it is not they who are measured.
    with tempfile.TemporaryDirectory() as folder, patch.object(os, "fsync"):
        return asyncio.run(connected(Path(folder), count, rounds))


# --- the page ---------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything and write it down."""
    given = parser(__doc__ or "")
    given.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=SIZES, help="parameters of the models")
    given.add_argument("--crowd", type=int, default=1000, help="sites that are connected at once")
    options = given.parse_args(arguments)
    quick = bool(options.quick)
    rounds, met = 3 if quick else 6, True
    numbers: dict[str, Any] = {}
    rows, memory = list[list[str]](), dict[int, int]()
    for durable in (False, True):
        for size in (10**4,) if quick else options.sizes:
            bare, (ours, most) = floor(size, rounds, durable), deployed(size, rounds, durable)
            least, own = statistics.median(bare[1:]), statistics.median(ours)
            numbers[f"{size}, {'power' if durable else 'process'}"] = {"floor": bare, "atoll": ours, "memory": most}
            memory[size] = max(memory.get(size, 0), most)
            seconds, times = PEERS.get(size, (0.0, 0.0))
            met &= quick or (own <= FLOOR * least and (durable or seconds / own >= times))
            rows.append(
                [
                    "loss of power" if durable else "end of a process", f"{size:,}", f"{least:.3f}", f"{own:.3f}",
                    f"{own / least:.1f}", f"{seconds / own:.1f}" if seconds else "", f"{times:g}" if seconds else "",
                ]
            )  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    small, large = min(memory), max(memory)
    models = (memory[large] - memory[small]) / (4 * (large - small)) if large > small else 0.0
    found = crowd(4 if quick else options.crowd, 3)
    met &= models <= MODELS and (quick or options.crowd >= 1000)
    numbers |= {"models": models, "crowd": found}
    return finish(
        "deployment",
        Findings(
            title="What a deployed round costs",
            setting=[
                f"{SITES} sites and a server as programs of this machine, over loopback and TLS; a model of one "
                "vector, one step of training on one example. A round lasts from the end of the one before to its own. "
                "The floor moves the same bytes over bare TLS sockets between as many processes, puts each site's into "
                "a file and averages them in double precision.",
                "What is acknowledged survives the end of a process (nothing is synced), or the loss of power (Atoll "
                "syncs files and journals of server and sites; the floor syncs the server's files).",
                "Other frameworks: seconds of the best of NVFlare and Flower, without TLS, measured on another day on "
                "a machine of this kind. The crowd: sites of one process, each with its own key and connections and a "
                "journal in memory, one update of 1,000 numbers each round from one training, where acknowledgements "
                "survive the end of a process.",
            ],
            tables=[
                Table(
                    "Seconds per round, median",
                    [
                        "survives", "parameters", "floor", "Atoll", f"Atoll / floor (bound {FLOOR:g})",
                        "best other / Atoll", "at least",
                    ],
                    rows,
                ),
                Table(
                    "The server",
                    ["what", "measured", "bound"],
                    [
                        ["memory that grows with the model, in models", f"{models:.2f}", f"{MODELS:g}"],
                        ["sites connected at once", f"{found['sites']:,}", "1,000"],
                        ["sockets the server held at most", f"{found['connections']:,}", ""],
                        ["until all were ready, seconds", f"{found['ready']:.1f}", ""],
                        ["rounds of all sites, seconds", " ".join(f"{s:.1f}" for s in found["rounds"]), ""],
                        ["updates that counted", " ".join(f"{n:,}" for n in found["updates"]), ""],
                        ["memory of the server's process, MiB", f"{found['memory'] / 2**20:.0f}", ""],
                        *shares(found),
                    ],
                ),
            ],
            remarks=["The machine's load is told below: other work makes all of these worse, and ratios less."],
            passed=met,
            numbers=numbers,
        ),
        quick=quick,
        out=options.out,
        arguments=arguments,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
