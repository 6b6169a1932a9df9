"""What secure aggregation costs: masks against the raw cipher, and whole attempts by clients, size and dropouts.

Every client's own machine runs, with fresh keys, masks and shares, and its messages travel as bytes between processes.
Clients are spread over processes as the cores allow; processor seconds are those of all of them together. Where the
environment `flower` exists (`python benchmarks/speed/environments.py flower`), the SecAgg+ of that framework is run on
the same sizes, by the functions of its own client and server.
"""

import json
import multiprocessing
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from reporting import Findings, Table, finish, parser

from atoll.secagg import Client, Identity, Parameters, Policy, Roster, Server, decode_client, decode_server, encode
from atoll.secagg.masks import add_masks
from atoll.secagg.primitives import stream
from atoll.secagg.session import PHASES, roster_of

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "speed"))
from environments import interpreter, ready  # noqa: E402

BROADCAST = bytes(32)
DEGREE = 64
CORES = 2
"""Cores that the bound on the large case is meant for."""
MINUTE = 60.0
HALF = 0.5
"""Share of the raw cipher's rate that masks must reach."""

_Frame = list[tuple[str, bytes]]
_frames = msgspec.msgpack.Decoder(_Frame)


@dataclass(frozen=True, slots=True)
class Case:
    """An attempt.

    Attributes:
        clients: in the cohort.
        length: numbers in a vector.
        dropped: share of the clients that drop out before they send their vector.
    """

    clients: int
    length: int
    dropped: float = 0.0


NAMED = {"sites": Case(32, 1_000_000), "devices": Case(1000, 100_000, 0.05)}
SWEEP = (
    Case(8, 100_000),
    Case(32, 100_000),
    Case(64, 100_000),
    Case(32, 10_000),
    Case(32, 100_000, 0.1),
    Case(32, 100_000, 0.25),
)


def vector_of(name: str, length: int) -> NDArray[np.uint32]:
    """A client's vector, the same in every process."""
    return np.random.default_rng(int(name[1:])).integers(0, 2**32, size=length, dtype="<u4")


def serve(
    pipe: Connection,
    identities: Mapping[str, Identity],
    roster: Roster,
    length: int,
    leaving: frozenset[str],
) -> None:
    """A process with some of the clients: answers frames of messages by frames of messages."""
    clients = {n: Client(i, roster, Policy()) for n, i in identities.items()}
    for phase in PHASES:
        answers: _Frame = []
        for name, raw in _frames.decode(pipe.recv_bytes()):
            message: Any = decode_server(raw)
            if phase == "join":
                answer = clients[name].join(message, BROADCAST)
            elif phase == "mask":
                if name in leaving:
                    continue
                answer = clients[name].mask(message, vector_of(name, length))
            else:
                answer = getattr(clients[name], phase)(message)
            answers.append((name, encode(answer)))
        pipe.send_bytes(msgspec.msgpack.encode(answers))


def attempt(case: Case, processes: int) -> dict[str, float]:
    """One attempt, checked: seconds of the clock, processor seconds of clients and server, bytes a client sends."""
    names = [f"c{i:05d}" for i in range(case.clients)]
    identities, roster = roster_of(names)
    leaving = frozenset(names[:: round(1 / case.dropped)] if case.dropped else ())
    asked = Parameters(case.length, degree=DEGREE)
    server = Server("benchmark", 0, 1, roster, names, asked, BROADCAST)
    pipes: list[Connection] = []
    before = processor()
    began = time.perf_counter()
    fork = multiprocessing.get_context("fork")
    workers: list[Any] = []
    for i in range(processes):
        ours, theirs = fork.Pipe()
        own = {n: identities[n] for n in names[i::processes]}
        worker = fork.Process(target=serve, args=(theirs, own, roster, case.length, leaving))
        worker.start()
        theirs.close()
        pipes.append(ours)
        workers.append(worker)
    due: Mapping[str, Any] = dict.fromkeys(names, server.invitation)
    sent = 0
    for _ in PHASES:
        for i, pipe in enumerate(pipes):
            own_names = set(names[i::processes])
            pipe.send_bytes(msgspec.msgpack.encode([(n, encode(m)) for n, m in due.items() if n in own_names]))
        for pipe in pipes:
            for name, raw in _frames.decode(pipe.recv_bytes()):
                sent += len(raw)
                server.receive(name, decode_client(raw, 4 * case.length + 2**20))
        due = server.close()
    wall = time.perf_counter() - began
    for worker in workers:
        worker.join()
    found, after = server.result, processor()
    total = np.zeros(case.length, dtype="<u4")
    for name in found.survivors:
        total += vector_of(name, case.length)
    if not np.array_equal(found.total, total) or len(found.survivors) != case.clients - len(leaving):
        raise RuntimeError(f"{case}: the sum is wrong")
    return {
        "wall": wall,
        "server": after[0] - before[0],
        "clients": after[1] - before[1],
        "bytes": sent / case.clients,
    }


def processor() -> tuple[float, float]:
    """Processor seconds of this process and of its children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, children = (u.ru_utime + u.ru_stime for u in used)
    return own, children


def rates(megabytes: int, repeats: int) -> tuple[float, float, float]:
    """Bytes a second of the raw cipher and of masks, and the median ratio of pairs measured one after the other."""
    vector, zeros = np.zeros(megabytes * 2**18, dtype="<u4"), bytes(2**16)
    out = bytearray(2**16)
    raw: list[float] = []
    masks: list[float] = []
    for _ in range(repeats):
        began = time.process_time()
        encryptor = stream(bytes(32))
        for _ in range(vector.nbytes // len(zeros)):
            encryptor.update_into(zeros, out)
        between = time.process_time()
        add_masks(vector, [(bytes(32), 1)])
        masks.append(vector.nbytes / (time.process_time() - between))
        raw.append(vector.nbytes / (between - began))
    return median(raw), median(masks), median(m / r for m, r in zip(masks, raw, strict=True))


def flower(cases: Sequence[Case]) -> list[dict[str, float]] | None:
    """Processor seconds of Flower's functions on the same sizes; None without its environment."""
    if not ready("flower"):
        return None
    asked = json.dumps(
        [{"clients": c.clients, "length": c.length, "dropped": c.dropped, "degree": DEGREE} for c in cases]
    )
    done = subprocess.run(
        [str(interpreter("flower")), str(HERE / "speed" / "contestants" / "flower_secagg.py"), asked],
        capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    made = parser(__doc__ or "")
    made.add_argument("--processes", type=int, default=CORES, help="processes that share the clients")
    made.add_argument("--no-flower", action="store_true", help="leave the other framework out")
    options = made.parse_args(arguments)
    quick: bool = options.quick
    named = {"sites": Case(6, 1000), "devices": Case(70, 300, 0.05)} if quick else NAMED
    sweep = (Case(4, 1000),) if quick else SWEEP
    raw, masks, ratio = rates(1 if quick else 64, 3 if quick else 9)
    cases = [*named.values(), *sweep]
    ours = [attempt(case, options.processes) for case in cases]
    compared = [Case(4, 1000)] if quick else [c for c in cases if c.clients <= 64]
    theirs = None if options.no_flower or quick else flower(compared)
    rows = [
        (
            f"{c.clients:,}", f"{c.length:,}", f"{c.dropped:.0%}", f"{o['clients']:.2f}", f"{o['server']:.2f}",
            f"{o['wall']:.2f}", f"{o['bytes'] / (4 * c.length):.3f}",
        )
        for c, o in zip(cases, ours, strict=True)
    ]  # fmt: skip
    tables = [
        Table(
            "Masks against the cipher",
            ("", "GB in a processor second"),
            (
                ("ChaCha20 by itself", f"{raw / 1e9:.2f}"),
                ("masks, added up", f"{masks / 1e9:.2f}"),
                ("ratio", f"{ratio:.2f}"),
            ),
        ),
        Table(
            "Whole attempts",
            (
                "clients",
                "numbers",
                "dropped",
                "clients' processor s",
                "server's processor s",
                "clock s",
                "bytes up / 4 n",
            ),
            rows,
        ),
    ]
    if theirs is not None:
        by_case = dict(zip(cases, ours, strict=True))
        tables.append(
            Table(
                "Beside Flower's SecAgg+",
                ("clients", "numbers", "dropped", "Atoll, processor s", "Flower, processor s", "ratio"),
                [
                    (
                        f"{c.clients:,}", f"{c.length:,}", f"{c.dropped:.0%}", f"{sum_of(by_case[c]):.2f}",
                        f"{t['seconds']:.2f}", f"{t['seconds'] / sum_of(by_case[c]):.1f}",
                    )
                    for c, t in zip(compared, theirs, strict=True)
                ],
            )
        )  # fmt: skip
    devices = ours[list(named).index("devices")]
    busy = sum_of(devices) / CORES
    passed = ratio >= HALF and busy < MINUTE
    remarks = [
        f"Masks reach {ratio:.2f} of the raw cipher's rate (at least {HALF} is asked for). The case of "
        f"{named['devices'].clients:,} clients took {sum_of(devices):.1f} processor seconds, {busy:.1f} on each of "
        f"{CORES} cores (below {MINUTE:.0f} is asked for), and {devices['wall']:.1f} seconds of the clock with "
        f"{options.processes} processes on the machine as it was.",
        "Processor seconds are told beside those of the clock because the machine may be at work on other things; "
        "even they grow when two processes share a core.",
    ]
    if theirs is not None:
        remarks.append(
            "Flower's functions do less: keys are not signed, no survivors are confirmed, shares are not committed "
            "to, and masks come from a generator that is not cryptographic. Their driver here only hands messages on."
        )
    return finish(
        "secagg",
        Findings(
            "What secure aggregation costs",
            [__doc__ or "", f"Above 64 clients each has {DEGREE} keepers of its shares; rings of 32 bits."],
            tables,
            remarks,
            passed,
            {
                "rates": {"raw": raw, "masks": masks, "ratio": ratio},
                "attempts": [
                    {"clients": c.clients, "length": c.length, "dropped": c.dropped} | o
                    for c, o in zip(cases, ours, strict=True)
                ],
                "flower": theirs,
            },
        ),
        quick=quick,
        out=options.out,
        arguments=arguments,
    )


def sum_of(found: Mapping[str, float]) -> float:
    """Processor seconds of an attempt."""
    return found["clients"] + found["server"]


if __name__ == "__main__":
    sys.exit(main())
