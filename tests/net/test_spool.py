"""Updates on disk and their reduction: any order of arrival, any block, the bits of a collector."""

from typing import Any

import msgspec
import pytest
import torch
from registry import MODELS
from torch import Tensor
from world import Disk

from atoll import aggregators, transforms
from atoll.algorithms import scaffold
from atoll.collecting import Collected
from atoll.errors import InvalidArgument
from atoll.local import local_sgd
from atoll.messages import Clear, Report, Task
from atoll.net.control import Deliver, Say
from atoll.net.frames import content_hash
from atoll.net.packing import clear, pack_report, report_schema
from atoll.net.spool import Spool, SpoolError, reduce
from atoll.net.storage import Content, write_durably
from atoll.random import client_keys
from atoll.rounds import Process
from atoll.transforms.chain import keys_of

KIND = MODELS["batch norm, mean"]
LOCAL = local_sgd(0.1, steps=1)
UNIFORM = aggregators.mean(weights="uniform", denominator="expected")
NAMES = tuple("abcde")
PARTS: dict[str, dict[str, Any]] = {
    "mean": {},
    "expected": {"aggregator": UNIFORM},
    "clip_norm": {"transforms": (transforms.clip_norm(1.0),)},
    "quantize": {"transforms": (transforms.quantize(8),)},
    "median": {"aggregator": aggregators.median()},
    "median of codes": {"aggregator": aggregators.median(), "transforms": (transforms.quantize(8),)},
}


NOISE = {"transforms": (transforms.clip_norm(1.0), transforms.gaussian_noise(1.0)), "aggregator": UNIFORM}


def made(name: str) -> tuple[Process, Task, Spool, list[Deliver], list[Report]]:
    """Five updates of random rows on disk, and the same as reports."""
    kind = MODELS["perceptron"] if name == "noise" else KIND  # whose buffers are not averaged
    process = Process(kind.model(torch.float32), scaffold(LOCAL), engine="loop", **(PARTS | {"noise": NOISE})[name])
    task = process.open(process.init(), NAMES, 5)
    draw = torch.Generator().manual_seed(1)
    spool, claims, reports = Spool(Disk()), list[Deliver](), list[Report]()
    for i, site in enumerate(NAMES):
        rows = torch.randn(1, process.length, generator=draw) * 10.0**i
        memory = {n: t[None] for n, t in process.chain.memory(process.length, process.split).items()}
        keys = client_keys([site])
        wire, _ = process.chain.encode(rows, memory, task.shared, keys_of(0, 0, keys, process.split))
        if process.adds_rows:
            assert isinstance(wire, Tensor)
            wire = clear(wire, process.parts[0])
        report = Report(
            (site,), wire, process.parts, torch.full((1, 1), i + 1.0, dtype=torch.float64),
            torch.tensor([[0.5 * i, i + 1.0]], dtype=torch.float64), torch.ones(1, dtype=torch.bool),
            torch.empty(1, 0), 7,
        )  # fmt: skip
        content = pack_report(report)
        claims.append(Deliver("r", site, 0, 1, "0" * 64, content_hash(content), len(content), process.parts, 7))
        reports.append(report)
    for i in (3, 0, 4, 2, 1):
        spool.put(claims[i], Content(pack_report(reports[i])))
    return process, task, spool, claims, reports


def same(left: Collected, right: Collected) -> bool:
    numbers = ("weight", "count", "loss", "examples", "bytes_up", "saturated")
    return (
        torch.equal(left.mean, right.mean)
        and torch.equal(left.sums, right.sums)
        and all(getattr(left, n) == getattr(right, n) for n in numbers)
    )


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("block", [1, 7, 64, 10**6])
def test_the_bits_are_those_of_a_collector(name: str, block: int) -> None:
    process, task, spool, claims, reports = made(name)
    collector = process.collector(process.init(), task)
    for report in reports:
        collector.add(process.combine(task, report))
    schema = report_schema(process, task)
    assert same(
        reduce(process, process.init(), task, spool, claims, schema, expected=9.0, block=block), collector.finish(9.0)
    )


@pytest.mark.parametrize(("name", "held"), [("mean", 2), ("noise", 1)])
def test_only_blocks_are_read_and_two_are_held_at_most(name: str, held: int) -> None:
    process, task, spool, claims, _ = made(name)
    read: list[tuple[int, int]] = []
    rooms: list[object] = []
    into = spool.files.into

    def watched(path: str, offset: int, buffer: memoryview) -> int:
        read.append((offset, len(buffer)))
        rooms.extend([buffer.obj] if len(buffer) == 32 else [])
        return into(path, offset, buffer)

    spool.files.into = watched  # type: ignore[method-assign]
    schema = report_schema(process, task)
    reduce(
        process, process.init(), task, spool, claims, schema, expected=5.0, block=8,
        release=lambda total, bound: total,
    )  # fmt: skip
    header = 8 + int.from_bytes(spool.files.read(spool.path(claims[0]), 0, 8), "little")
    assert all(length <= 32 for offset, length in read if offset >= header), "eight numbers of a row, or a weight"
    assert sum(length for _, length in read) == sum(claim.size for claim in claims), "each byte once, its hash included"
    assert len({id(room) for room in rooms}) == held, "of five updates"


def test_nothing_to_reduce_changes_nothing() -> None:
    for name in PARTS:
        process, task, spool, _, _ = made(name)
        assert reduce(process, process.init(), task, spool, (), report_schema(process, task)).count == 0


@pytest.mark.parametrize("harm", ["gone", "short", "flipped"])
def test_what_happened_to_an_update_is_noticed(harm: str) -> None:
    process, task, spool, claims, _ = made("mean")
    path = spool.path(claims[2])
    if harm == "gone":
        spool.files.remove(path)
    elif harm == "short":
        spool.files.truncate(path, 10)
    else:
        content = bytearray(spool.files.read(path))
        content[-1] ^= 1
        spool.files.write(path, bytes(content))
    with pytest.raises(SpoolError, match="update of c in round 1"):
        reduce(process, process.init(), task, spool, claims, report_schema(process, task))


def test_weights_of_nought_are_refused_as_in_a_simulation() -> None:
    process, task, spool, _, reports = made("mean")
    report = reports[0]
    nought = Report(report.clients, report.wire, report.parts, 0 * report.weight, *(
        getattr(report, n) for n in ("metrics", "finite", "memory", "bytes")))  # fmt: skip
    content = pack_report(nought)
    claim = Deliver("r", "a", 1, 1, "0" * 64, content_hash(content), len(content), process.parts, 7)
    spool.put(claim, Content(content))
    with pytest.raises(InvalidArgument, match="weight 0"):
        reduce(process, process.init(), task, spool, [claim], report_schema(process, task))


def test_names_of_sites_are_no_paths() -> None:
    spool = Spool(Disk())
    claim = Deliver("r", "../../etc/passwd", 0, 1, "0" * 64, "0" * 64, 1, (1, 0, 0), 1)
    assert ".." not in spool.path(claim) and "etc" not in spool.path(claim)


def test_another_update_of_the_same_attempt_takes_nobodys_place() -> None:
    _, _, spool, claims, reports = made("mean")
    other = pack_report(reports[1])
    spool.put(msgspec.structs.replace(claims[0], sha256=content_hash(other), size=len(other)), Content(other))
    assert content_hash(spool.files.read(spool.path(claims[0]))) == claims[0].sha256


def test_what_else_lies_in_the_folder_is_left_alone() -> None:
    _, _, spool, claims, _ = made("mean")
    write_durably(spool.files, "spool/lost+found/thing", b"x")
    spool.forget(1)
    assert spool.files.size(spool.path(claims[0])) == -1 and spool.files.size("spool/lost+found/thing") == 1


def test_rounds_that_are_over_are_forgotten() -> None:
    _, _, spool, claims, _ = made("mean")
    spool.forget(0)
    assert spool.files.size(spool.path(claims[0])) > 0
    spool.forget(1)
    assert spool.files.size(spool.path(claims[0])) == -1


def test_a_report_in_the_clear_keeps_its_parts() -> None:
    process, _, _, _, reports = made("mean")
    wire = reports[0].wire
    assert isinstance(wire, Clear) and wire.change.shape == (1, process.parts[0])


def test_what_happened_to_a_masked_vector_or_a_sum_is_noticed() -> None:
    disk = Disk()
    spool, vector = Spool(disk), b"under a mask"
    claim = Say("r", "a", 0, 1, 2, "mask", b"", content_hash(vector), len(vector))
    spool.put(claim, Content(vector))
    total = spool.put_sum(0, 2, b"a sum")
    assert spool.read(claim) == vector and spool.sum(0, 2, total) == b"a sum"
    for path, ask in (
        (spool.path(claim), lambda: spool.read(claim)),
        ("spool/00000000/sum.2", lambda: spool.sum(0, 2, total)),
    ):
        disk.names_now[path].now[0] ^= 1
        with pytest.raises(SpoolError, match="damaged"):
            ask()
        disk.remove(path)
        with pytest.raises(SpoolError, match="gone"):
            ask()
