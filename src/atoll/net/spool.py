"""Accepted updates on disk, and their reduction; of a secure sum the masked vectors, and the sum.

An update is one file, the frame as it came, durable before it is acknowledged. Updates are combined in the cohort's
order, whatever order they came in, by the process's own `combine` and `Collector`:

- where the server adds up rows, coordinates are taken block by block: a sum in double precision of one block stands in
  memory, however many sites there are and however large the model is;
- a rule that needs rows gets one matrix that lies on disk, and reads of it what it wants to;
- codes are decoded and added up one update after the other: memory of a few models.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from atoll.asynchronous import scaled
from atoll.collecting import Collected, Release
from atoll.errors import CompositionError, InvalidArgument, NonFiniteError, RunError
from atoll.messages import Partial, Report, Task
from atoll.net.control import Deliver, Say, content_hash
from atoll.net.frames import FrameError, Limits, Schema
from atoll.net.reading import BLOCK, Reading, in_columns
from atoll.net.storage import Content, FileSystem, write_durably
from atoll.rounds import Process, State
from atoll.transforms.channel import Group


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

    def put(self, claim: Deliver | Say, content: Content) -> None:
        """Make an update or a masked vector durable.

        Raises:
            OSError: it is not.
        """
        content.keep(self.files, self.path(claim))

    def reading(self, claim: Deliver, schema: Schema, limits: Limits) -> Reading:
        """An update, to be read.

        Raises:
            SpoolError: it is gone, or not what was accepted.
            OSError: it cannot be read.
        """
        try:
            reading = Reading(Content(files=self.files, path=self.path(claim)), claim, schema, limits)
            reading.locate()
        except (FrameError, FileNotFoundError) as error:
            raise _damaged(claim) from error
        return reading

    def whole(self, claim: Deliver) -> bytes:
        """A small answer, as it came.

        Raises:
            OSError: it cannot be read.
            SpoolError: it is gone, or changed on disk.
        """
        return self._kept(self.path(claim), claim.sha256, f"what {claim.site} sent for round {claim.round + 1}")

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

    def keep(self, claims: Iterable[Deliver]) -> None:
        """Remove all updates but these, whichever round they are of."""
        kept = {self.path(claim) for claim in claims}
        for folder in self.files.names(self._folder):
            if folder.isdecimal():  # what else lies there is not ours
                inside = [f"{self._folder}/{folder}/{name}" for name in self.files.names(f"{self._folder}/{folder}")]
                for path in inside:
                    if path not in kept:
                        self.files.remove(path)
                if kept.isdisjoint(inside):
                    self.files.remove(f"{self._folder}/{folder}")

    def forget(self, round: int) -> None:
        """Remove the updates of earlier rounds."""
        for folder in self.files.names(self._folder):
            if folder.isdecimal() and int(folder) < round:  # what else lies there is not ours
                for name in self.files.names(f"{self._folder}/{folder}"):
                    self.files.remove(f"{self._folder}/{folder}/{name}")
                self.files.remove(f"{self._folder}/{folder}")


def _damaged(claim: Deliver) -> SpoolError:
    return SpoolError(f"the update of {claim.site} in round {claim.round + 1} is gone, or damaged on disk.")


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
    release: Release | None = None,
    scales: Sequence[float] | None = None,
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
        release: adds the noise, where a stage asks for it: to the whole sum, once.
        scales: what every update's row is multiplied by, where some are stale (`schedule.Buffered.weight`); the rule
            is then a mean.

    Raises:
        SpoolError: an update is gone or damaged.
        CompositionError, InvalidArgument, NonFiniteError: as from `Collector`.
        OSError: the disk cannot be read, or has no room for a matrix.
    """
    updates = [spool.reading(claim, schema, limits or Limits()) for claim in claims]
    try:
        if process.chain.noise is not None:
            return _noised(process, state, task, updates, expected, block, release)
        return _reduced(process, state, task, spool, updates, expected, block, scales)
    except FrameError as error:
        raise SpoolError(f"an update of round {task.round + 1} is damaged on disk: {error}") from error
    except (CompositionError, InvalidArgument, NonFiniteError):
        _check(updates)  # what is damaged on disk is not the fault of whoever sent it
        raise


def _reduced(
    process: Process,
    state: State,
    task: Task,
    spool: Spool,
    updates: Sequence[Reading],
    expected: float | None,
    block: int,
    scales: Sequence[float] | None,
) -> Collected:
    if process.aggregator.rule is None and in_columns(process):
        width = sum(process.parts[:2])
        mean = torch.empty(width, dtype=process.model.dtype)
        sums = torch.empty(process.parts[2], dtype=process.row_dtype)
        found: Collected | None = None
        # Of two, one is read into while the other is added up: they are not as many as there are updates.
        rooms = [memoryview(bytearray(8 * min(block, process.length))) for _ in range(2)]
        with ThreadPoolExecutor(1) as reader:
            for a in range(0, max(1, process.length), block):
                b = min(a + block, process.length)
                reports = _ahead(
                    reader, [partial(u.columns, process, a, b, rooms[i % 2]) for i, u in enumerate(updates)]
                )
                found = _collected(process, state, task, reports, expected, scales)
                if found.count:
                    mean[a : a + len(found.mean)] = found.mean
                    start = max(a, width) - width
                    sums[start : start + len(found.sums)] = found.sums
        assert found is not None
        _check(updates)
        return replace(found, mean=mean, sums=sums) if found.count else found
    if process.aggregator.rule is None or not updates:
        return _collected(process, state, task, (_whole(process, u) for u in updates), expected, scales)
    matrix: Tensor | None = None
    seen: list[Partial] = []
    for i, update in enumerate(updates):
        given = process.combine(task, _whole(process, update))
        assert given.rows is not None
        if matrix is None:
            matrix = spool.files.matrix(len(updates), given.rows.shape[1], given.rows.dtype)
        matrix[i] = given.rows[0]
        seen.append(replace(given, rows=None))
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


def _ahead(reader: Executor, calls: Sequence[Callable[[], Report]]) -> Iterator[Report]:
    """What the calls give, in order; the next one is read and hashed while the last one is added up."""
    waiting = deque[Future[Report]]()
    for call in calls:
        waiting.append(reader.submit(call))
        if len(waiting) > 1:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _whole(process: Process, update: Reading) -> Report:
    """An update's report.

    Raises:
        SpoolError: it is not what was accepted.
    """
    report = update.report(process)
    _check([update])
    return report


def _check(updates: Sequence[Reading]) -> None:
    for update in updates:
        if not update.genuine():
            raise _damaged(update.claim)


def _noised(
    process: Process,
    state: State,
    task: Task,
    updates: Sequence[Reading],
    expected: float | None,
    block: int,
    release: Release | None,
) -> Collected:
    """The same under noise, which is added to the sum in double precision and whole."""
    assert expected is not None
    total = torch.zeros(process.chain.seen_size(process.length, process.split)[0], dtype=torch.float64)
    columns = in_columns(process)
    room = memoryview(bytearray(8 * min(block, process.length) if columns else 0))  # for one update, as for any number
    for a in range(0, max(1, process.length), block) if columns else (0,):
        b = min(a + block, process.length)
        place = total[a:b] if columns else total
        for update in updates:
            given = process.combine(task, update.columns(process, a, b, room) if columns else update.report(process))
            assert given.total is not None
            place += given.total
    _check(updates)  # before anything is released: what was judged is what was added
    found = process.released(task, total, expected, release)
    return replace(found, aggregator=state.aggregator, bytes_up=sum(u.claim.bytes for u in updates))


def _collected(
    process: Process,
    state: State,
    task: Task,
    reports: Iterator[Report],
    expected: float | None,
    scales: Sequence[float] | None,
) -> Collected:
    collector = process.collector(state, task)
    for report, scale in zip(reports, scales or repeat(1.0), strict=scales is not None):
        collector.add(scaled(process.combine(task, report), scale) if scales else process.combine(task, report))
    return collector.finish(expected)
