"""Drives the rounds of an experiment on one machine."""

import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from atoll import sampling
from atoll.aggregators import Aggregator
from atoll.algorithms import Algorithm
from atoll.engines import Engine
from atoll.errors import DataError, Interrupted, InvalidArgument, NonFiniteError, RunError, invalid
from atoll.evaluation import Evaluation, evaluate_holdout
from atoll.history import Record
from atoll.journal import (
    Checkpoint,
    Journal,
    discard_checkpoints,
    encode_leaves,
    locked,
    open_journal,
    read_checkpoint,
    write_checkpoint,
)
from atoll.memory import ClientMemory
from atoll.model import Model
from atoll.report.live import progress_for
from atoll.result import Result
from atoll.rounds import Process, State
from atoll.sampling import Sampler
from atoll.secagg.groups import differing
from atoll.spec import Spec, differences, digest, identity
from atoll.transforms import Channel, Transform
from atoll.tree import leaves, rebuild

if TYPE_CHECKING:
    from atoll.data import FederatedDataset, LazyDataset

CHECKPOINT_SECONDS = 5.0
"""A run directory gets a checkpoint about this often, and never spends more than a tenth of the time on them."""

CLIENTS_LISTED = 10_000
"""Populations up to this size have every client's final metrics in the result."""


def simulate(
    model: Model,
    data: "FederatedDataset | LazyDataset",
    *,
    algorithm: Algorithm,
    rounds: int,
    cohort: int | float | Sampler | None = None,
    transforms: Sequence[Transform] = (),
    channel: str | Channel = "plain",
    aggregator: Aggregator | None = None,
    initial: Tensor | None = None,
    evaluate_every: int = 1,
    splits: Sequence[str] | None = None,
    seed: int = 0,
    engine: str | Engine = "auto",
    workers: int | Literal["auto"] = "auto",
    directory: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    callbacks: Sequence[Callable[[Record], Any]] = (),
    progress: bool | Literal["auto"] = "auto",
    title: str = "",
) -> Result:
    """Train a model over clients whose examples stay apart.

    Args:
        model: what is trained.
        data: clients and their examples.
        algorithm: how, for instance `atoll.fedavg(atoll.local_sgd(lr=0.1))`.
        rounds: how many.
        cohort: who takes part: a number of clients, a fraction in (0, 1], or a rule from `atoll.sampling`;
            default everyone.
        transforms: stages between a client's work and the server.
        channel: "plain", or a channel from `atoll.transforms`.
        aggregator: default `atoll.aggregators.mean()`, weights by examples.
        initial: start vector [P]; default the module's own values (`model.init(seed)` draws new ones).
        evaluate_every: evaluate after every so many rounds, and after the last; 0: never.
        splits: which examples to evaluate on; default those of "validation" and "test" that the data has.
        seed: of all keyed randomness.
        engine: "auto" or "vectorized", "ray" (actors of a cluster), "loop" (the specification), or an engine.
        workers: processes that share the work; "auto": the machine's cores, where rounds are long enough to gain. The
            result has the same bits for any number.
        directory: where to keep the journal and checkpoints; None keeps nothing.
        resume: continue the run in `directory`, or begin it if it was killed before it wrote anything; the result
            has the same bits as that of an uninterrupted run.
        checkpoint_every: rounds between checkpoints; default about every five seconds.
        callbacks: called with the record of every round; an exception stops the run.
        progress: a live bar in a terminal, a line per round elsewhere; False: nothing.
        title: a name for reports.

    Returns:
        The model, its history and ways to look at both.

    Raises:
        InvalidArgument, DataError, CompositionError: refused before any work.
        RunError: a directory that holds another experiment or is in use.
        NonFiniteError: training diverged; its `result` is the run up to the last finite state.
        Interrupted: Ctrl-C, after the round at work; its `result` is the run so far.
    """
    _positive("rounds", rounds)
    if isinstance(evaluate_every, bool) or not isinstance(evaluate_every, int) or evaluate_every < 0:
        raise invalid("evaluate_every", evaluate_every, "a number of rounds, or 0 for never")
    if checkpoint_every is not None:
        _positive("checkpoint_every", checkpoint_every)
    for callback in callbacks:
        if not callable(callback):
            raise invalid("callbacks", callback, "a sequence of callables that take a record")
    if resume and directory is None:
        raise invalid("resume", resume, "False without a directory", "Give directory= the run to continue.")
    process = Process(
        model, algorithm, transforms=transforms, channel=channel, aggregator=aggregator, engine=engine, workers=workers
    )
    if algorithm.sampler is not None and cohort is not None:
        raise invalid("cohort", cohort, f"left out with {algorithm.name}", "The method prescribes its own order.")
    sampler = algorithm.sampler or sampling.resolve(cohort)
    training = data.pooled() if algorithm.pooled else data
    sampler.check(training.clients)
    evaluated = _splits(data, splits)
    state = process.init(seed, initial)
    process.engine.prepare(process, training)
    spec: Spec = {
        "title": title,
        "experiment": {
            **process.spec,
            "cohort": sampler.spec,
            "seed": seed,
            "initial": digest(process.vector(state)),
            "data": data.fingerprint() if directory is not None else data.name,
        },
    }
    folder = None if directory is None else Path(directory)
    if resume and folder is not None and not folder.exists():
        raise RunError(f"{folder} does not exist: there is no run to resume. Leave out resume=True to start one.")
    with locked(folder) if folder is not None else nullcontext():
        run = _Run(process, data, training, sampler, spec, folder, evaluated, evaluate_every, checkpoint_every)
        try:
            run.start(state, rounds, resume)
            with process.engine.threads():
                return run.rounds(rounds, callbacks, progress)
        finally:
            run.journal.close()
            process.engine.stop()


class _Run:
    """One execution: the state, the journal, and what is written when."""

    def __init__(
        self,
        process: Process,
        data: "FederatedDataset | LazyDataset",
        training: "FederatedDataset | LazyDataset",
        sampler: Sampler,
        spec: Spec,
        directory: Path | None,
        splits: tuple[str, ...],
        evaluate_every: int,
        checkpoint_every: int | None,
    ) -> None:
        self.process, self.data, self.training, self.sampler = process, data, training, sampler
        self.spec, self.directory, self.splits = spec, directory, splits
        self.evaluate_every, self.checkpoint_every = evaluate_every, checkpoint_every
        self.journal: Journal = open_journal(directory)
        self.history: list[Record] = []
        self.notes: list[str] = []
        self.summed: tuple[frozenset[str], ...] = ()  # what a summing channel showed in the round before
        self.state: State
        self._saved_round = -1
        self._saved_at = time.monotonic()
        self._save_cost = 0.0

    def start(self, state: State, total: int, resume: bool) -> None:
        """Begin at round zero, or where the directory's run was."""
        self.state = state
        if self.directory is None:
            return
        begun = next(iter(self.journal.events("run")), None)
        if begun is not None and not resume:
            raise RunError(
                f"{self.directory} already holds a run: pass resume=True to continue it, or choose another directory."
            )
        if begun is None:
            self._use_memory(None)
            begun_by = {"spec": self.spec, "identity": self._identity, "rounds": total, "versions": _versions()}
            self.journal.append("run", begun_by)
            self._save()
            return
        if begun.body["identity"] != self._identity:
            lines = differences(begun.body["spec"]["experiment"], self.spec["experiment"])
            shown = "; ".join(lines[:5]) or "another version of the same code"
            raise RunError(
                f"{self.directory} belongs to another experiment ({shown}): choose another directory, or run the "
                "experiment it belongs to."
            )
        if next(iter(self.journal.events("checkpoint")), None) is None:
            # The run was killed before its first checkpoint: nothing had been computed.
            self._use_memory(None)
            self._save()
            return
        checkpoint, damaged = read_checkpoint(self.directory, self.journal)
        if checkpoint is None:
            raise RunError(f"{self.directory} has no whole checkpoint: the run cannot be resumed. {' '.join(damaged)}")
        if checkpoint.round > total:
            raise invalid(
                "rounds", total, f"at least {checkpoint.round}, where this run is", "Or choose another directory."
            )
        for line in damaged:
            warnings.warn(f"{line} The run continues from round {checkpoint.round}.", stacklevel=4)
            self.notes.append(line)
        self._restore(checkpoint)
        self.journal.append("resumed", {"round": checkpoint.round, "rounds": total, "notes": damaged})
        self.history = self.journal.history()

    def rounds(
        self, total: int, callbacks: Sequence[Callable[[Record], Any]], progress: bool | Literal["auto"]
    ) -> Result:
        """Run up to round `total`."""
        with (
            progress_for(progress, total, self.state.round, self.spec["title"]) as show,
            _deferred_interrupt() as asked,
        ):
            while self.state.round < total:
                try:
                    record = self._round(last=self.state.round + 1 == total)
                except DataError as error:
                    self.journal.append("failed", {"round": self.state.round + 1, "error": str(error)})
                    self._save()
                    raise
                except NonFiniteError as error:
                    self.journal.append("failed", {"round": self.state.round + 1, "error": str(error)})
                    self._save()
                    error.result = self._result()
                    raise
                self.history.append(record)
                self.journal.append("round", record.to_dict())
                self._save_if_due()
                show(record)
                for callback in callbacks:
                    callback(record)
                if asked() and self.state.round < total:
                    self._save()
                    self.journal.append("interrupted", {"round": self.state.round})
                    raise self._interrupted(total)
        self._save()
        result = self._result(final=True)
        if self.directory is not None:
            result.save(self.directory)
            self.journal.append("finished", {"round": self.state.round, "engine": result.engine})
        return result

    def _round(self, *, last: bool) -> Record:
        process, began = self.process, time.perf_counter()
        cohort = self.sampler.cohort(self.state.seed, self.state.round, self.training.clients)
        expected = self.sampler.expected(len(self.training.clients))
        self.state, metrics = process.next(self.state, self.training, cohort, expected=expected)
        trained = time.perf_counter()
        number = self.state.round
        found: dict[str, Any] = {}
        if self.evaluate_every and (number % self.evaluate_every == 0 or last):
            found = self._evaluate()
        notes: tuple[str, ...] = tuple(found.pop("notes", ()))
        if metrics["saturated"]:
            notes += (f"{int(metrics['saturated'])} values were cut to the range of the channel.",)
        notes += (*metrics["notes"], *differing(self.summed, metrics["summed"]))
        self.summed = metrics["summed"] or self.summed
        train = {"loss": metrics["loss"]} | {n: v for n, v in found.pop("train", {}).items() if n != "loss"}
        return Record(
            round=number,
            clients=int(metrics["clients"]),
            train=train,
            **found,
            bytes_up=int(metrics["bytes_up"]),
            bytes_down=int(metrics["bytes_down"]),
            seconds={"train": trained - began, "evaluate": time.perf_counter() - trained},
            notes=notes,
            refused={name: dict(told) for name, told in metrics["refused"].items()},
            refusals=int(metrics["refusals"]),
        )

    def _evaluate(self) -> dict[str, Any]:
        process, state, found = self.process, self.state, dict[str, Any]()
        vector, notes = process.vector(state), list[str]()
        for split in self.splits:
            evaluation = process.evaluate_global(state, self.data, split)
            found[split] = evaluation.metrics
            if split == "test":
                found["spread"] = evaluation.spread
                notes += evaluation.notes
        if self._has_test and process.personalised:
            personal = self._personal()
            found |= {"personal": personal.metrics, "personal_spread": personal.spread}
        if self.data.holdout is not None:
            found["holdout"] = evaluate_holdout(process.model, vector, state.buffers, self.data.holdout).metrics
        return found | {"notes": notes}

    @property
    def _has_test(self) -> bool:
        return "test" in self.splits

    def _personal(self) -> Evaluation:
        return self.process.evaluate(self.state, self.training, personal=True)

    def _result(self, *, final: bool = False) -> Result:
        process, state = self.process, self.state
        clients: dict[str, dict[str, dict[str, float]]] = {}
        if final and self._has_test and self.evaluate_every and len(self.data.clients) <= CLIENTS_LISTED:
            evaluations = {"global": process.evaluate_global(state, self.data, "test")}
            if process.personalised:
                evaluations["personal"] = self._personal()
            clients = {k: {c: e.client(c) for c in e.clients} for k, e in evaluations.items()}
        return Result(
            vector=process.vector(state),
            buffers=state.buffers,
            history=list(self.history),
            spec=self.spec,
            engine=process.engine.describe(),
            clients=clients,
            notes=list(self.notes),
            directory=self.directory,
            model=process.model,
            _process=process,
            _state=state,
            _data=self.training,
        )

    def _interrupted(self, total: int) -> Interrupted:
        where = self.state.round
        how = (
            f"continue with directory={str(self.directory)!r}, resume=True"
            if self.directory is not None
            else "nothing was kept on disk, since no directory was given; the exception's `result` holds the model"
        )
        error = Interrupted(f"stopped after round {where} of {total}; {how}.")
        error.result = self._result()
        return error

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def _identity(self) -> str:
        return identity(self.spec["experiment"])

    def _save_if_due(self) -> None:
        if self.checkpoint_every is not None:
            due = self.state.round % self.checkpoint_every == 0
        else:
            due = time.monotonic() - self._saved_at > max(CHECKPOINT_SECONDS, 10 * self._save_cost)
        if due:
            self._save()

    def _save(self) -> None:
        if self.directory is None or self._saved_round == self.state.round:
            return
        began = time.monotonic()
        state = self.state
        tree = {
            "algorithm": state.algorithm, "buffers": state.buffers, "transforms": state.transforms,
            "aggregator": state.aggregator,
        }  # fmt: skip
        tensors, values = encode_leaves({**dict(leaves(tree)), "private": state.private})
        state.memory.flush()
        checkpoint = Checkpoint(state.round, tensors, {"values": values, "memory": state.memory.index})
        write_checkpoint(self.directory, self.journal, checkpoint)
        state.memory.pin()
        self._saved_round, self._saved_at = state.round, time.monotonic()
        self._save_cost = self._saved_at - began

    def _restore(self, checkpoint: Checkpoint) -> None:
        assert self.directory is not None
        stored = {**checkpoint.tensors, **checkpoint.values["values"]}
        state = self.state
        template = {
            "algorithm": state.algorithm, "buffers": state.buffers, "transforms": state.transforms,
            "aggregator": state.aggregator,
        }  # fmt: skip
        tree = rebuild(template, stored)
        self.state = replace(state, round=checkpoint.round, private=stored["private"], **tree)
        self._use_memory(checkpoint.values["memory"])
        # The client memory keeps only the rows this checkpoint refers to, so no other may be resumed from again.
        discard_checkpoints(self.directory, keep=checkpoint.round)
        self._saved_round = checkpoint.round

    def _use_memory(self, index: dict[str, int] | None) -> None:
        assert self.directory is not None
        old = self.state.memory
        path = self.directory / "memory.bin" if old.layout.size else None
        memory = ClientMemory(old.layout, self.process.model.dtype, path, index)
        self.state = replace(self.state, memory=memory, memory_version=memory.version)


@contextmanager
def _deferred_interrupt() -> Generator[Callable[[], bool]]:
    """Ctrl-C once lets the round at work finish; twice interrupts at once. Only in the main thread."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        if asked.is_set():
            signal.default_int_handler(number, frame)
        asked.set()
        sys.stderr.write("\nstopping after this round; Ctrl-C again stops at once\n")

    signal.signal(signal.SIGINT, handle)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _splits(data: "FederatedDataset | LazyDataset", asked: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(asked, str):
        raise invalid("splits", asked, "a sequence of names", f"Write splits=({asked!r},).")
    for name in asked or ():
        if name not in ("train", "validation", "test"):
            raise invalid("splits", name, 'made of "train", "validation" and "test"')
        if not data.has(name):
            raise InvalidArgument(
                f"splits names {name!r}, but the data has no {name} examples: cut some with data.split()."
            )
    given = ("validation", "test") if asked is None else tuple(asked)
    # What a lazy population would have to draw for it is evaluated only when it is asked for.
    return tuple(n for n in given if data.has(n) and (asked is not None or getattr(data, n) is not None))


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise invalid(name, value, "an integer of at least 1")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("atoll", "torch", "numpy")}
