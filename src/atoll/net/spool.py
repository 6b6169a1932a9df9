"""Accepted updates on disk, and their reduction; of a secure sum the masked vectors, and the sum.

An update is one file, the frame as it came, durable before it is acknowledged. Updates are combined in the cohort's
order, whatever order they came in, by the process's own `combine` and `Collector`:

- where the server adds up rows, coordinates are taken block by block: a sum in double precision of one block stands in
  memory, however many sites there are and however large the model is;
- a rule that needs rows gets one matrix that lies on disk, and reads of it what it wants to;
- codes are decoded and added up one update after the other: memory of a few models.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from atoll.collecting import Collected
from atoll.errors import RunError
from atoll.messages import Partial, Report, Task
from atoll.net.control import Deliver, Say, content_hash
from atoll.net.frames import FrameError, Limits, Place, Schema, locate, tensor
from atoll.net.packing import clear, report_of
from atoll.net.storage import FileSystem, write_durably
from atoll.rounds import Process, State
from atoll.transforms.channel import Group

BLOCK = 2**20
"""Coordinates that are combined at a time."""


class SpoolError(RunError):
    """An accepted update is no longer what it was."""


class Spool:
    """Updates in a folder; names are hashes, so that no site's name becomes a path.

    Args:
        files: where.
        folder: in it.
    """

    def __init__(self, files: FileSystem, folder: str = "spool") -> None:
        self.files, self._folder = files, folder

    def put(self, claim: Deliver | Say, content: bytes) -> None:
        """Make an update or a masked vector durable.

        Raises:
            OSError: it is not.
        """
        write_durably(self.files, self.path(claim), content)

    def read(self, claim: Say) -> bytes:
        """A masked vector, as it came.

        Raises:
            OSError: it cannot be read.
            SpoolError: it is gone, or changed on disk.
        """
        what = f"the masked vector of {claim.site} in round {claim.round + 1}"
        return self._kept(self.path(claim), claim.sha256, what)

    def put_sum(self, round: int, turn: int, total: bytes) -> str:
        """Make a secure sum durable; its hash.

        Raises:
            OSError: it is not.
        """
        write_durably(self.files, self._sum_path(round, turn), total)
        return content_hash(total)

    def sum(self, round: int, turn: int, sha256: str) -> bytes:
        """A secure sum.

        Raises:
            OSError: it cannot be read.
            SpoolError: it is gone, or changed on disk.
        """
        return self._kept(self._sum_path(round, turn), sha256, f"the sum of round {round + 1}")

    def _kept(self, path: str, sha256: str, what: str) -> bytes:
        if self.files.size(path) < 0:
            raise SpoolError(f"{what} is gone from the disk.")
        content = self.files.read(path)
        if content_hash(content) != sha256:
            raise SpoolError(f"{what} is damaged on disk.")
        return content

    def _sum_path(self, round: int, turn: int) -> str:
        return f"{self._folder}/{round:08d}/sum.{turn}"

    def path(self, claim: Deliver | Say) -> str:
        """The file of an update: another one never takes its place, even while it is not known which will count."""
        name = hashlib.sha256(f"{claim.site}\n{claim.attempt}\n{claim.sha256}".encode()).hexdigest()[:32]
        return f"{self._folder}/{claim.round:08d}/{name}"

    def forget(self, round: int) -> None:
        """Remove the updates of earlier rounds."""
        for folder in self.files.names(self._folder):
            if folder.isdecimal() and int(folder) < round:  # what else lies there is not ours
                for name in self.files.names(f"{self._folder}/{folder}"):
                    self.files.remove(f"{self._folder}/{folder}/{name}")
                self.files.remove(f"{self._folder}/{folder}")


class Stored:
    """An update on disk, checked to be what was accepted; tensors are read when they are asked for.

    Args:
        spool: where it is.
        claim: its message.
        schema: of its frame.
        limits: of its frame.

    Raises:
        SpoolError: the file is gone or changed.
    """

    def __init__(self, spool: Spool, claim: Deliver, schema: Schema, limits: Limits) -> None:
        self.claim, self._files, self._path = claim, spool.files, spool.path(claim)
        if self._files.size(self._path) != claim.size:
            raise SpoolError(f"the update of {claim.site} in round {claim.round + 1} is gone or has another length.")
        state = hashlib.sha256()
        for a in range(0, claim.size, 2**24):
            state.update(self._files.read(self._path, a, 2**24))
        if state.hexdigest() != claim.sha256:
            raise SpoolError(f"the update of {claim.site} in round {claim.round + 1} is damaged on disk.")
        try:
            self._places: dict[str, Place] = locate(
                self._files.read(self._path, 0, 8 + limits.header), claim.size, schema, limits
            )
        except FrameError as error:
            raise SpoolError(f"the update of {claim.site} does not fit this experiment: {error}") from error
        self.small = {n: self.read(n) for n in ("weight", "metrics")}

    def read(self, name: str, a: int = 0, b: int | None = None) -> Tensor:
        """A tensor, or of one that is a row [1, L] the columns from a to b."""
        place = self._places[name]
        width = place.dtype.itemsize
        end = place.end if b is None else place.begin + b * width
        begin = place.begin + a * width
        flat = tensor(self._files.read(self._path, begin, end - begin), place.dtype)
        return flat.view(place.shape) if b is None else flat[None]

    def report(self, process: Process) -> Report:
        """The whole report."""
        return report_of(process, self.claim, {n: self.read(n) for n in self._places})

    def block(self, process: Process, a: int, b: int) -> Report:
        """The report as if the row had only the columns from a to b."""
        report = report_of(process, self.claim, {"wire": self.read("wire", a, b), **self.small})
        ends = list(accumulate(self.claim.parts))
        first, second, third = (
            max(0, min(b, end) - max(a, end - length)) for end, length in zip(ends, self.claim.parts, strict=True)
        )
        wire = report.wire
        if process.adds_rows:
            wire = clear(self.read("wire", a, b), first)
        return Report(
            report.clients, wire, (first, second, third), report.weight, report.metrics, report.finite, report.memory,
            report.bytes,
        )  # fmt: skip


def reduce(
    process: Process,
    state: State,
    task: Task,
    spool: Spool,
    claims: Sequence[Deliver],
    schema: Schema,
    *,
    expected: float | None = None,
    limits: Limits | None = None,
    block: int = BLOCK,
) -> Collected:
    """A round's updates, combined.

    Args:
        process: whose rules.
        state: before the round.
        task: of the round.
        spool: where the updates are.
        claims: which, in the cohort's order.
        schema: of their frames.
        expected: expected number of updates, for `mean(denominator="expected")`.
        limits: of their frames.
        block: coordinates that are combined at a time, where that is possible.

    Raises:
        SpoolError: an update is gone or damaged.
        CompositionError, InvalidArgument, NonFiniteError: as from `Collector`.
        OSError: the disk cannot be read, or has no room for a matrix.
    """
    updates = [Stored(spool, claim, schema, limits or Limits()) for claim in claims]
    if process.aggregator.rule is None and _in_columns(process):
        width = sum(process.parts[:2])
        mean = torch.empty(width, dtype=process.model.dtype)
        sums = torch.empty(process.parts[2], dtype=process.row_dtype)
        found: Collected | None = None
        for a in range(0, max(1, process.length), block):
            b = min(a + block, process.length)
            found = _collected(process, state, task, (u.block(process, a, b) for u in updates), expected)
            if found.count:
                mean[a : a + len(found.mean)] = found.mean
                start = max(a, width) - width
                sums[start : start + len(found.sums)] = found.sums
        assert found is not None
        return replace(found, mean=mean, sums=sums) if found.count else found
    if process.aggregator.rule is None or not updates:
        return _collected(process, state, task, (u.report(process) for u in updates), expected)
    matrix: Tensor | None = None
    seen: list[Partial] = []
    for i, update in enumerate(updates):
        partial = process.combine(task, update.report(process))
        assert partial.rows is not None
        if matrix is None:
            matrix = spool.files.matrix(len(updates), partial.rows.shape[1], partial.rows.dtype)
        matrix[i] = partial.rows[0]
        seen.append(replace(partial, rows=None))
    clients = tuple(c for p in seen for c in p.clients)
    collector = process.collector(state, replace(task, clients=clients))
    collector.add(
        Partial(
            clients,
            tuple(c for p in seen for c in p.broken),
            process.parts,
            None,
            matrix,
            None,
            torch.cat([p.weight for p in seen]),
            torch.stack([p.metrics for p in seen]).sum(dim=0),
            sum(p.bytes for p in seen),
        )
    )
    return collector.finish(expected)


def reduce_sum(
    process: Process,
    state: State,
    task: Task,
    total: bytes,
    claims: Sequence[Deliver],
    sent: int,
    *,
    expected: float | None = None,
) -> Collected:
    """A round's secure sum, read.

    Args:
        process: whose rules.
        state: before the round.
        task: of the round; its cohort is what the sites' scale was made for.
        total: bytes of the sum.
        claims: of the sites whose vectors it is the sum of, in the cohort's order.
        sent: bytes the pipeline counts for each of them.
        expected: as in `reduce`.

    Raises:
        InvalidArgument: a sum that so many sites within the range cannot give, or all of them have weight 0.
    """
    ring = process.chain.channel.ring
    assert ring is not None
    signed = np.frombuffer(total, dtype="<i4" if ring <= 32 else "<i8").astype(np.int64)
    members = tuple(claim.site for claim in claims)
    collector = process.collector(state, task)
    collector.take(Group(members, {"ring": torch.from_numpy(signed)}), process.parts, sent * len(claims))
    return collector.finish(expected)


def _in_columns(process: Process) -> bool:
    """Whether every coordinate of what travels is a coordinate of the row, for itself."""
    chain, size = process.chain, (process.length, process.split)
    undone = any(s.decode_each is not None or s.decode_sum is not None or s.gives == "codes" for s in chain.stages)
    return not chain.channel.sums_only and not undone and set(chain.sizes(*size)) == {size}


def _collected(
    process: Process, state: State, task: Task, reports: Iterator[Report], expected: float | None
) -> Collected:
    collector = process.collector(state, task)
    for report in reports:
        collector.add(process.combine(task, report))
    return collector.finish(expected)
