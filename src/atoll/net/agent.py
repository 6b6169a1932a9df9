"""The site's side of a run: carries out what the party decides, on a file system that is handed in.

    journal             finished reports and what became of them
    reports/ROUND.TRY   the frame of a finished report, until its round is over
    memory/ROUND.TRY    what the client remembers after it; the journal says which one counts

It has no clock, thread or socket: whoever owns those calls `due` when `wake` seconds have passed, `heard` with an
answer, and `train` while `busy`; each gives the messages to be sent. Whoever trains elsewhere takes the `task`, and
tells by `finished` or `failed`.

With a secure sum a finished report stays here, and the server is told that it is there: what leaves is what the masker
makes of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from atoll.aggregators.rows import finite_rows
from atoll.errors import NonFiniteError, RunError
from atoll.memory import ClientMemory
from atoll.messages import Report
from atoll.net import evaluating, party
from atoll.net.buffers import Buffer
from atoll.net.control import Abstain, Answer, Deliver, Request, Stamp, Turn, Work, content_hash
from atoll.net.frames import FrameError, Limits, TensorSpec, decode, encode
from atoll.net.masker import Masker
from atoll.net.packing import codes_of, pack_report, unpack_task
from atoll.net.party import Pace
from atoll.net.storage import FileSystem, write_durably
from atoll.net.sums import task_hash
from atoll.rounds import Process

if TYPE_CHECKING:
    from atoll.data import FederatedDataset


@dataclass(frozen=True, slots=True)
class Done:
    """What training gave.

    Attributes:
        frame: of the report.
        parts: lengths of the averaged part, the averaged buffers and the summed part.
        sent: bytes the pipeline counts.
        memory: what the client remembers if the update counts; empty: nothing.
        sha256: `content_hash` of the frame; "": nobody has taken it yet.
    """

    frame: Buffer
    parts: tuple[int, int, int]
    sent: int
    memory: Buffer
    sha256: str = ""


Training = Callable[[Work, Buffer, bytes], Done]
"""(message, frame of the task, memory) -> what training gave; the memory is empty for a client that has none yet."""

HARMLESS = (NonFiniteError, FrameError, RunError)
"""Errors whose text says nothing about a site's data."""

Out = tuple[Request, Buffer]
"""A message and the frame beside it, which may be empty."""


class Agent:
    """A run at a site.

    Args:
        site: its name.
        run: the run's.
        training: what works on a task.
        files: where the site's folder for this run is.
        pace: how often it speaks.
        masker: the site's part in secure sums; None: the experiment has none, and reports leave as they are.
        notice: called with what the site's owner should hear of.
    """

    def __init__(
        self,
        site: str,
        run: str,
        training: Training,
        files: FileSystem,
        *,
        pace: Pace | None = None,
        masker: Masker | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self._masker = masker
        self._training, self._files, self._pace = training, files, pace or Pace()
        self._notice = notice or (lambda text: None)
        self._log = files.journal("journal")
        self.state = party.replay(site, run, [_decoder.decode(r) for r in self._log])
        self._todo: tuple[Work, Buffer] | None = None
        self._done: Done | None = None
        self.wake = 0.0
        self._tidy()

    @property
    def busy(self) -> bool:
        """Whether `train` has something to do."""
        return self._todo is not None

    @property
    def memory(self) -> bytes:
        """What the client remembers; empty for one that was never counted.

        Raises:
            OSError: it is not there.
        """
        stamp = self.state.memory
        return b"" if stamp is None else self._files.read(f"memory/{_name(stamp)}")

    def due(self) -> list[Out]:
        """`wake` seconds have passed."""
        return self._happen(party.Due())

    def heard(self, answer: Answer, content: Buffer = b"") -> list[Out]:
        """The server answered; beside a `Work` its frame."""
        return self._happen(party.Heard(answer), content)

    @property
    def done(self) -> Done | None:
        """What came of the task that waits, if it is only the disk that is missing."""
        return self._done

    @property
    def task(self) -> tuple[Work, Buffer]:
        """The task that waits: its message and its frame."""
        assert self._todo is not None
        return self._todo

    def train(self) -> list[Out]:
        """Work on the task that waits, and tell."""
        work, content = self.task
        try:
            done = self._done or self._training(work, content, self.memory)
        except Exception as error:  # whatever the author's code raises, the site stays up and says so
            return self.failed(work, error)
        return self.finished(work, done)

    def finished(self, work: Work, done: Done) -> list[Out]:
        """Training on a task is done."""
        if self._todo is not None and self._todo[0] is work:
            self._done = done  # a disk that is full now may have room later
        try:
            task = task_hash(work.base, work.kind, work.seed, work.values)
            return self._happen(party.Trained(self._stored(work, done), task))
        except OSError as error:
            return self._refused(error)

    def failed(self, work: Work, error: Exception) -> list[Out]:
        """Training on a task came to nothing."""
        told = str(error) if isinstance(error, HARMLESS) else type(error).__name__
        self._notice(f"round {work.round + 1}: {type(error).__name__}: {error}")
        try:
            return self._happen(party.Broke((work.round, work.attempt), told))
        except OSError as refusal:
            return self._refused(refusal)

    def _refused(self, error: OSError) -> list[Out]:
        """The task waits, and what came of it: there may be room the next time."""
        self._notice(f"the disk refuses: {error}")
        self._settle()
        return []

    def _stored(self, work: Work, done: Done) -> Deliver:
        """Make a report and its memory durable; its message."""
        name = _name(_stamp(work))
        write_durably(self._files, f"memory/{name}", done.memory)
        write_durably(self._files, f"reports/{name}", done.frame)
        leaves = done.sha256 or content_hash(done.frame), len(done.frame), done.parts, done.sent
        if self._masker is not None:  # it is trained: not a number that the author's code chose goes with that word
            leaves = content_hash(), 0, (0, 0, 0), 0
        return Deliver(work.run, self.state.site, work.round, work.attempt, work.base, *leaves)

    def _sent(self, claim: Deliver) -> Buffer:
        """The report of a message; the one that was finished just now is still at hand."""
        if self._done is not None and self._todo is not None and _stamp(self._todo[0]) == _stamp(claim):
            return self._done.frame
        return self._files.read(f"reports/{_name(_stamp(claim))}")

    def _report(self) -> bytes:
        """The report that is kept."""
        assert self.state.stamp is not None
        return self._files.read(f"reports/{_name(self.state.stamp)}")

    def _happen(self, event: party.Event, content: Buffer = b"") -> list[Out]:
        after, effects = party.handle(self.state, event, self._pace)
        out: list[Out] = []
        recorded = not any(isinstance(e, party.Record) for e in effects)
        for effect in effects:
            match effect:
                case party.Record(entry):
                    self._log.append(msgspec.json.encode(entry))
                    self.state, recorded = after, True
                case party.Send(message):
                    frame: Buffer = b""
                    if isinstance(message, Deliver) and message.size:
                        frame = self._sent(message)
                    out.append((message, frame))
                case party.Add(turn):
                    out += self._added(turn, after)
                case party.Train(work):
                    self._todo, self._done = (work, content), None
                case party.Sleep(seconds):
                    self.wake = seconds
                case party.Tidy():
                    self._tidy()
        assert recorded
        self.state = after
        self._settle()
        return out

    def _added(self, turn: Turn, state: party.State) -> list[Out]:
        """What the site says in a turn at a secure sum."""
        if self._masker is None:
            told = "the approved experiment has no secure sum."
            return [(Abstain(turn.run, state.site, turn.round, turn.attempt, turn.turn, told), b"")]
        return list(self._masker.answer(turn, state.task, self._report))

    def _settle(self) -> None:
        """Let go of a task that is done, or over without this site."""
        training = self.state.phase is party.Phase.TRAINING
        if self._todo is not None and not (training and self.state.stamp == _stamp(self._todo[0])):
            self._todo = self._done = None

    def _tidy(self) -> None:
        """Remove what no restart will need; what cannot be removed now is the next time."""
        state = self.state
        if self._masker is not None and state.claim is None:
            self._masker.forget()
        needed = {_name(s) for s in (state.stamp, state.memory) if s is not None}
        try:
            for folder in ("memory", "reports"):
                for name in self._files.names(folder):
                    if name not in needed:
                        self._files.remove(f"{folder}/{name}")
        except OSError as error:
            self._notice(f"the disk refuses: {error}")


class Trainer:
    """Works on tasks, to train or to evaluate, with a process and the site's own data.

    Args:
        process: the very one of the server.
        data: the site's, with the site as its only client.
        limits: of frames.
        splits: held-out examples of which something is said in evaluations.
    """

    def __init__(
        self,
        process: Process,
        data: "FederatedDataset",
        limits: Limits | None = None,
        *,
        splits: Sequence[str] = evaluating.SPLITS,
    ) -> None:
        self._process, self._data, self._limits, self._splits = process, data, limits, splits
        (self._site,) = data.clients
        start = process.init()
        self._template = process.open(start, (self._site,), 1, kind="evaluate")  # for what it is made of alone
        self._layout, self._dtype = start.memory.layout, process.model.dtype

    def __call__(self, work: Work, content: Buffer, memory: Buffer) -> Done:
        """Train on a task, or evaluate its model; the content is used up.

        Raises:
            FrameError: a task that is not of this experiment, or a memory that is not this process's.
            NonFiniteError: training diverged; nothing may be sent.
            RunError: the task is not for this site, or asks what must not be told.
        """
        process = self._process
        task = unpack_task(self._template, work, content, self._limits)
        if self._site not in task.clients:
            raise RunError(f"{self._site} was given a task of a cohort it is not in.")
        kept = ClientMemory(self._layout, self._dtype)
        if memory and self._layout.size:
            spec = TensorSpec("memory", self._dtype, (1, self._layout.size))
            kept.stage([self._site], decode(memory, (spec,))["memory"])
            kept.commit()
        if task.kind == "evaluate":
            if why := evaluating.why_not(process):
                raise RunError(f"an evaluation was asked for, and {why}.")
            frame = evaluating.answer(process, task, self._data, kept, self._splits)
            return Done(frame, evaluating.NOTHING, len(frame), memory)  # it remembers what it did
        engine = process.engine
        engine.prepare(process, self._data)
        with engine.threads():
            chosen = np.array([task.clients.index(self._site)])
            cohort, remembered = engine.tile(process, task, self._data, kept, chosen)
            report = process.work(task, cohort, remembered)
            frame = pack_report(report)
        codes = codes_of(report)
        fine = bool(report.finite.all() and torch.isfinite(report.metrics).all())
        if process.chain.noise is not None and not (fine and all(bool(finite_rows(c).all()) for c in codes.values())):
            # It adds nothing, and that is told to nobody: whether training broke depends on the data.
            report, rows = _nothing(report), [t.reshape(1, -1) for t in remembered.values()]
            frame = pack_report(report)
            report = replace(report, memory=torch.cat(rows, dim=1) if rows else report.memory)
        elif not fine or ("wire" in codes and not bool(finite_rows(codes["wire"]).all())):
            raise NonFiniteError(f"round {task.round + 1}: training became non-finite.")
        return Done(frame, report.parts, report.bytes, encode({"memory": report.memory.to(self._dtype)}))


def _nothing(report: Report) -> Report:
    """A report of the same form that adds nothing."""
    zeros = torch.zeros_like
    codes = {n: zeros(t) for n, t in codes_of(report).items()}
    wire = codes["wire"] if "wire" in codes else {n.removeprefix("wire/"): t for n, t in codes.items()}
    return replace(report, wire=wire, weight=zeros(report.weight), metrics=zeros(report.metrics))


_decoder: msgspec.json.Decoder[party.Entry] = msgspec.json.Decoder(party.Entry)


def _stamp(message: Work | Deliver) -> Stamp:
    return message.round, message.attempt


def _name(stamp: Stamp) -> str:
    return f"{stamp[0]:08d}.{stamp[1]}"
