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
from atoll.asynchronous import Asynchronous
from atoll.client_releases import ClientReleases, client_terms
from atoll.engines import Engine
from atoll.errors import (
    CompositionError,
    DataError,
    Interrupted,
    InvalidArgument,
    NonFiniteError,
    RunError,
    invalid,
    unknown,
)
from atoll.evaluation import Evaluation, evaluate_holdout
from atoll.example_releases import ExampleReleases
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
from atoll.privacy.client_noise import ClientTerms
from atoll.privacy.terms import Terms
from atoll.releases import Releases, check_splits, terms_of, veiled
from atoll.report.live import progress_for
from atoll.result import Result
from atoll.rounds import Process, State
from atoll.sampling import Sampler
from atoll.schedule import Buffered, Rounds, Schedule
from atoll.schedule import rounds as synchronous
from atoll.secagg.groups import differing
from atoll.spec import Spec, differences, digest, identity
from atoll.stopping import EarlyStopping
from atoll.transforms import Channel, Downlink, Transform
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
    downlink: "Downlink | Sequence[Transform]" = (),
    aggregator: Aggregator | None = None,
    server_data: Any = None,
    schedule: Schedule | None = None,
    initial: Tensor | None = None,
    evaluate_every: int = 1,
    splits: Sequence[str] | None = None,
    stop: EarlyStopping | None = None,
    seed: int = 0,
    engine: str | Engine = "auto",
    workers: int | Literal["auto"] = "auto",
    device: str = "auto",
    precision: str = "full",
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
        downlink: stages between the server and the clients: what is new about the model is sent through them. With
            `atoll.transforms.delta(...)` the whole model every so many rounds. (): always the whole model.
        aggregator: default `atoll.aggregators.mean()`, weights by examples.
        server_data: (x, y) or named fields of examples the server holds, for `aggregators.fltrust(root="server")`.
        schedule: when a round ends, by how long clients take: `atoll.schedule.rounds(...)`, or `.buffered(...)` for
            asynchronous training, where a round is a step of the server; default rounds that wait for everybody.
        initial: start vector [P]; default the module's own values (`model.init(seed)` draws new ones).
        evaluate_every: evaluate after every so many rounds, and after the last; 0: never.
        splits: which examples to evaluate on; default those of "validation" and "test" that the data has.
        stop: ends the run before `rounds` when a validation metric no longer improves: `atoll.early_stopping(...)`.
        seed: of all keyed randomness.
        engine: "auto" or "vectorized", "ray" (actors of a cluster), "loop" (the specification), or an engine.
        workers: processes that share the work; "auto": the machine's cores, where rounds are long enough to gain. The
            result has the same bits for any number.
        device: where clients train: "cpu", which "auto" means, or "cuda", in one process; evaluation is on the CPU.
        precision: "full", the model's own, or "bfloat16": mixed precision, in which matrix products and convolutions of
            local training are in bfloat16, and parameters, steps, losses and sums in float32. Part of the experiment.
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
        model, algorithm, transforms=transforms, channel=channel, downlink=downlink, aggregator=aggregator,
        engine=engine, workers=workers, device=device, precision=precision, server_data=server_data,
    )  # fmt: skip
    process.check_server(data.clients)
    if algorithm.sampler is not None and cohort is not None:
        raise invalid("cohort", cohort, f"left out with {algorithm.name}", "The method prescribes its own order.")
    training = data.pooled() if algorithm.pooled else data
    schedule = _checked(schedule, cohort, resume)
    private = process.chain.protects_clients
    if private or process.protects_examples:
        _check_private(schedule, stop)
    if isinstance(schedule, Buffered):
        sampler = sampling.fixed(schedule.concurrency)
        driver: Rounds | Asynchronous = Asynchronous(process, training, schedule, sampler)
    else:
        driver, sampler = schedule, algorithm.sampler or sampling.resolve(cohort)
        sampler.check(training.clients)
        schedule.asked(sampler, len(training)).check(training.clients)
        process.check_count(wanted := round(sampler.expected(len(training))), 0)
        _check_quorum(process, schedule, wanted)
    if private:
        check_splits(splits, unit="client")
    if process.protects_examples:
        check_splits(splits, unit="example")
    evaluated = () if private else _splits(data, splits)
    if stop is not None:
        evaluated = _stopped_by(stop, data, evaluated, evaluate_every, process)
    state = process.init(seed, initial)
    process.engine.prepare(process, training)
    folder = None if directory is None else Path(directory)
    if resume and folder is not None and not folder.exists():
        raise RunError(f"{folder} does not exist: there is no run to resume. Leave out resume=True to start one.")
    # A run that cannot begin leaves no directory; one that is resumed has terms.
    terms: Terms | ClientTerms | None = None
    if private and not resume:
        terms = _terms(process, sampler, training, seed, rounds)
    veil = private or process.protects_examples
    told = data.name if folder is None else veiled(data.fingerprint(), folder) if veil else data.fingerprint()
    spec: Spec = {
        "title": title,
        "experiment": {
            **process.spec,
            "cohort": sampler.spec,
            "seed": seed,
            "initial": digest(process.vector(state)),
            "data": told,
            **({} if stop is None else {"stop": stop.spec}),
            **({} if schedule == synchronous() else {"schedule": schedule.spec}),
        },
    }
    if process.server_data is not None:
        spec["experiment"]["server_data"] = process.server_data.fingerprint()
    with locked(folder) if folder is not None else nullcontext():
        run = _Run(
            process, data, training, sampler, spec, folder, evaluated, evaluate_every, checkpoint_every, stop,
            driver,
        )  # fmt: skip
        try:
            run.start(state, rounds, resume)
            run.guard(rounds, terms)
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
        stop: EarlyStopping | None,
        schedule: Rounds | Asynchronous,
    ) -> None:
        self.schedule = schedule
        self.process, self.data, self.training, self.sampler = process, data, training, sampler
        self.spec, self.directory, self.splits = spec, directory, splits
        self.evaluate_every, self.checkpoint_every = evaluate_every, checkpoint_every
        self.stop, self._ended = stop, False
        self.journal: Journal = open_journal(directory)
        self.history: list[Record] = []
        self.notes: list[str] = []
        self.summed: tuple[frozenset[str], ...] = ()  # what a summing channel showed in the round before
        self.state: State
        self.releases: Releases | None = None
        self.examples: ExampleReleases | None = None
        self.added: ClientReleases | None = None
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

    def guard(self, total: int, terms: Terms | ClientTerms | None) -> None:
        """Take up the terms on which noise is added: those of the journal, else these, else new ones."""
        if self.process.protects_examples:
            sizes = getattr(getattr(self.training, "train", None), "sizes", None)
            if sizes is None:
                raise InvalidArgument(
                    "example-level privacy needs to know how many examples every client has, which data that is drawn "
                    "when it is needed does not tell: use a FederatedDataset."
                )
            known = dict(zip(self.training.clients, sizes.tolist(), strict=True))
            self.examples = ExampleReleases(self.process, known, total, self.journal)
            self.process.example_multiplier = self.examples.multiplier
        if not self.process.chain.protects_clients:
            return
        kind = "privacy" if self.process.chain.noise is not None else "client_noise"
        if terms is None and next(iter(self.journal.events(kind)), None) is None:
            terms = _terms(self.process, self.sampler, self.training, self.state.seed, total)
        if self.process.chain.client_noise is not None:
            assert not isinstance(terms, Terms)
            self.added = ClientReleases(self.process, terms, self.training.clients, self.journal)
            return
        assert not isinstance(terms, ClientTerms)
        self.releases = Releases(self.process, self.sampler, terms, self.directory, self.journal, self.state.round)

    def rounds(
        self, total: int, callbacks: Sequence[Callable[[Record], Any]], progress: bool | Literal["auto"]
    ) -> Result:
        """Run up to round `total`, or as far as a privacy budget allows."""
        planned = total
        if self.releases is not None:
            total = self.releases.last(self.state.round, total)
            if total < planned:
                self.notes.append(
                    f"The run stops after round {total} of {planned}: the next release would exceed the privacy budget "
                    f"of epsilon {self.releases.terms.budget:g}."
                )
        with (
            progress_for(progress, total, self.state.round, self.spec["title"]) as show,
            _deferred_interrupt() as asked,
        ):
            if self.stop is not None and self.history and self.history[-1].validation:
                self._validate()  # for which way is better: the run may have been killed where it was to stop
                self._stop_if_done()
            while self.state.round < total and not self._ended:
                if self.added is not None and not self._allowed(1):
                    self.notes.append(
                        f"The run stops after round {self.state.round} of {planned}: the next release would exceed the "
                        f"privacy budget of epsilon {self.added.terms.budget:g}."
                    )
                    break
                try:
                    record = self._round(last=self.state.round + 1 == total or not self._allowed(2))
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
                self._stop_if_done()
                if asked() and self.state.round < total and not self._ended:
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
        notes: tuple[str, ...] = ()
        length: float | None = None
        expected = self.sampler.expected(len(self.training.clients))
        if isinstance(self.schedule, Asynchronous):
            self.state, metrics = self.schedule.next(self.state)
            length = metrics["clock"]
            notes = (f"updates were {metrics['staleness']:g} steps old on average.",)
        elif self.releases is not None:
            metrics = self._private_round(self.releases, expected)
        else:
            cohort, length, notes = self._cohort(self.schedule)
            if self.examples is not None:
                self.examples.enter(self.state.round, cohort)
            entered = None if self.added is None else self._entering(self.added, cohort)
            self.state, metrics = process.next(self.state, self.training, cohort, expected=expected, entered=entered)
        trained = time.perf_counter()
        number = self.state.round
        found: dict[str, Any] = {}
        if self.evaluate_every and (number % self.evaluate_every == 0 or last):
            found = self._evaluate()
        notes += tuple(found.pop("notes", ()))
        if metrics["saturated"]:
            notes += (f"{int(metrics['saturated'])} values were cut to the range of the channel.",)
        notes += (*metrics["notes"], *differing(self.summed, metrics["summed"]))
        self.summed = metrics["summed"] or self.summed
        guard = self.releases or self.added or self.examples
        train = {"loss": metrics["loss"]} | {n: v for n, v in found.pop("train", {}).items() if n != "loss"}
        return Record(
            round=number,
            clients=int(metrics["clients"]),
            train=train,
            **found,
            bytes_up=int(metrics["bytes_up"]),
            bytes_down=int(metrics["bytes_down"]),
            seconds={"train": trained - began, "evaluate": time.perf_counter() - trained},
            simulated=length,
            notes=notes,
            refused={name: dict(told) for name, told in metrics["refused"].items()},
            refusals=int(metrics["refusals"]),
            epsilon=None if guard is None else guard.epsilon,
            staleness=metrics.get("staleness"),
        )

    def _cohort(self, schedule: Rounds) -> tuple[tuple[str, ...], float | None, tuple[str, ...]]:
        """Whose updates the round is made of, how long it takes in simulated seconds, and notes."""
        seed, number, clients = self.state.seed, self.state.round, self.training.clients
        asked = schedule.asked(self.sampler, len(clients)).cohort(seed, number, clients)
        if schedule.waits:
            try:
                self.process.check_count(len(asked), number)
            except CompositionError as error:  # cohorts of this sampler differ in size
                return (), None, (f"No update counts: {error}",)
            return asked, None, ()
        wanted = len(asked) if schedule.over == 1.0 else round(self.sampler.expected(len(clients)))
        came, length, note = schedule.arrived(seed, number, asked, wanted)
        return came, length, (note,) if note else ()

    def _stop_if_done(self) -> None:
        """End the run where its rule says so, and note why."""
        if self.stop is None or not self.history[-1].validation:
            return
        evaluated = [r for r in self.history if r.validation]
        values, better = [r.validation[self.stop.metric] for r in evaluated], self._better
        if not self.stop.done(values, better):
            return
        best, where = self.stop.best(values, better), self.state.round
        told = "was never finite"
        if best >= 0:
            told = f"was best after round {evaluated[best].round} ({values[best]:.6g})"
        note = f"stopped after round {where}: the validation {self.stop.metric} {told}."
        if best >= 0:
            note += f" rounds={evaluated[best].round} without stop gives that model."
        self._ended = True
        self.notes.append(note)
        if all(event.body["round"] != where for event in self.journal.events("stopped")):
            self.journal.append("stopped", {"round": where, "note": note})

    def _validate(self) -> Evaluation:
        """Metrics on the validation examples: those the rule for stopping looks at, if there is one."""
        process, stop = self.process, self.stop
        if stop is None:
            return process.evaluate_global(self.state, self.data, "validation")
        data, split = (self.data, "validation") if stop.clients is None else (stop.clients, "train")
        if stop.personal:
            evaluation = process.evaluate(self.state, data, split=split, personal=True)
        else:
            evaluation = process.evaluate_global(self.state, data, split)
        self._better = evaluation.better[evaluation.names.index(stop.metric)]
        return evaluation

    def _private_round(self, releases: Releases, expected: float) -> dict[str, Any]:
        """A round with noise: taken from disk where it was made before the run was stopped."""
        state, clients = self.state, self.training.clients
        kept = releases.kept(state.round)
        if kept is not None:
            self.state, metrics = self.process.replay(state, len(clients), kept, expected)
            if state.memory.layout.size:
                lost = "what clients would have kept of this round was lost when the run was stopped; its sum was not."
                metrics["notes"] += (lost,)
            return metrics
        release = releases.release(state.round)
        cohort = releases.cohort(state.seed, state.round, clients)
        if self.examples is not None:  # who is in the cohort is a secret: the round counts for everybody
            self.examples.enter(state.round, clients)
        self.state, metrics = self.process.next(state, self.training, cohort, expected=expected, release=release)
        return metrics

    def _allowed(self, rounds: int) -> bool:
        """Whether a budget of clients' own noise allows the next so many rounds."""
        if self.added is None or not self.added.limited:
            return True
        seed, number, clients = self.state.seed, self.state.round, self.training.clients
        return self.added.allows([self.sampler.cohort(seed, number + i, clients) for i in range(rounds)])

    def _entering(self, added: ClientReleases, cohort: tuple[str, ...]) -> Callable[[], None]:
        """Enter the round now, where rows are counted; else what enters it when there is a sum."""
        number = self.state.round
        if added.in_sums:
            return lambda: added.enter(number, cohort)
        added.enter(number, cohort)
        return lambda: None

    def _evaluate(self) -> dict[str, Any]:
        process, state, found = self.process, self.state, dict[str, Any]()
        vector, notes = process.vector(state), list[str]()
        for split in self.splits:
            evaluation = self._validate() if split == "validation" else process.evaluate_global(state, self.data, split)
            found[split] = evaluation.metrics
            if split == "test":
                found["spread"] = evaluation.spread
                notes += evaluation.notes
        if self._has_test and process.personalised and self.examples is None:  # tuned models would be new releases
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
            if process.personalised and self.examples is None:
                evaluations["personal"] = self._personal()
            clients = {k: {c: e.client(c) for c in e.clients} for k, e in evaluations.items()}
        engine = process.engine.describe()
        if process.chain.protects_clients:  # how wide tiles are tells of the clients that were drawn last
            engine = {n: engine[n] for n in ("engine", "reason", "precision") if n in engine}
        privacy = [g.statement() for g in (self.releases, self.added, self.examples) if g is not None]
        if self.examples is not None and process.chain.protects_clients:
            privacy[0]["not_covered"].append("how many examples clients have, by which single examples' privacy counts")
        return Result(
            vector=process.vector(state),
            buffers=state.buffers,
            history=list(self.history),
            spec=self.spec,
            engine=engine,
            privacy=privacy,
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
        if self.added is not None:
            due = True  # a round that is run again is another release
        elif self.releases is not None and self.state.memory.layout.size:
            due = True  # what clients keep cannot be had again from a noised sum
        elif self.checkpoint_every is not None:
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
        if self.releases is not None and not self.releases.save(state.round):
            return  # the run goes on from the checkpoint before, by the sums that are kept
        tree = _tree(state)
        tensors, values = encode_leaves({**dict(leaves(tree)), "private": state.private})
        state.memory.flush()
        checkpoint = Checkpoint(
            state.round,
            tensors,
            {
                "values": values,
                "memory": state.memory.index,
                "served": dict(state.served),
                "summed": [sorted(members) for members in self.summed],
            },
        )
        write_checkpoint(self.directory, self.journal, checkpoint)
        state.memory.pin()
        if self.releases is not None:
            self.releases.settled(self._saved_round)  # until this checkpoint, too, is the older one
        self._saved_round, self._saved_at = state.round, time.monotonic()
        self._save_cost = self._saved_at - began

    def _restore(self, checkpoint: Checkpoint) -> None:
        assert self.directory is not None
        stored = {**checkpoint.tensors, **checkpoint.values["values"]}
        state = self.state
        tree = rebuild(_tree(state), stored)
        told = checkpoint.values.get("served", {})
        self.state = replace(state, round=checkpoint.round, private=stored["private"], served=told, **tree)
        self.summed = tuple(frozenset(members) for members in checkpoint.values.get("summed", ()))
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


def _tree(state: State) -> dict[str, Any]:
    """What a checkpoint holds of a state."""
    tree = {
        "algorithm": state.algorithm, "buffers": state.buffers, "transforms": state.transforms,
        "aggregator": state.aggregator,
    }  # fmt: skip
    return tree if state.downlink is None else tree | {"downlink": state.downlink}


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


def _terms(
    process: Process, sampler: Sampler, data: "FederatedDataset | LazyDataset", seed: int, rounds: int
) -> Terms | ClientTerms:
    """The terms of a run that begins."""
    if process.chain.client_noise is not None:
        return client_terms(process, sampler, data.clients, seed, rounds)
    return terms_of(process, sampler, len(data), rounds)


def _check_private(schedule: Schedule, stop: EarlyStopping | None) -> None:
    """Refuse what would tell of data, or draw clients, in a way that nobody counts.

    Raises:
        CompositionError: naming what, and the way out.
    """
    if schedule != synchronous():
        raise CompositionError(
            "a schedule decides whose updates come into a round, and the ledger of a private run knows of cohorts that "
            "a sampler draws and waits for: leave schedule out."
        )
    if stop is not None:
        raise CompositionError(
            "early stopping looks at validation examples, which no noise of this run protects: leave stop out and fix "
            "the number of rounds."
        )


def _check_quorum(process: Process, schedule: Rounds, wanted: int) -> None:
    """Refuse a deadline that may leave fewer updates than the rule or the channel can do with.

    Raises:
        CompositionError: with both, and the way out.
    """
    if schedule.deadline is None:
        return
    least = schedule.least(wanted)
    try:
        process.check_count(least, 0)
    except CompositionError as error:
        raise CompositionError(
            f"schedule.rounds(deadline={schedule.deadline:g}, quorum={schedule.quorum}) makes a step of {least} "
            f"updates if no more come, and {error} Or raise quorum: rounds with fewer updates then make no step."
        ) from None


def _checked(schedule: Schedule | None, cohort: object, resume: bool) -> Schedule:
    """The schedule; refuses what does not go with it."""
    if schedule is None:
        return synchronous()
    if not isinstance(schedule, Rounds | Buffered):
        raise invalid("schedule", schedule, "atoll.schedule.rounds(...) or atoll.schedule.buffered(...)")
    if isinstance(schedule, Buffered):
        if cohort is not None:
            raise invalid(
                "cohort", cohort, "left out with schedule.buffered", "concurrency= says how many are at work."
            )
        if resume:
            raise invalid(
                "resume", resume, "False with schedule.buffered",
                "Who is at work is not in its checkpoints; the same seed gives the same run from its start.",
            )  # fmt: skip
    return schedule


def _stopped_by(
    stop: EarlyStopping,
    data: "FederatedDataset | LazyDataset",
    splits: tuple[str, ...],
    evaluate_every: int,
    process: Process,
) -> tuple[str, ...]:
    """The splits to evaluate on under a rule for stopping; refuses rules that have nothing to go by."""
    if not isinstance(stop, EarlyStopping):
        raise invalid("stop", stop, "atoll.early_stopping(...)")
    if not evaluate_every:
        raise invalid("evaluate_every", evaluate_every, "at least 1 with stop=", "Stopping goes by evaluations.")
    if stop.metric not in ("loss", *process.model.names):
        raise unknown("metric", stop.metric, ["loss", *process.model.names])
    if stop.clients is None and not data.has("validation"):
        raise InvalidArgument(
            "stop=early_stopping(...) needs validation examples, and the data have none: cut some with "
            "data.split(test=0, validation=0.2), or name clients that do not train, early_stopping(clients=...). Test "
            "examples cannot stand in: a test that decides when to stop is none."
        )
    if stop.clients is not None and (shared := [c for c in stop.clients.clients if c in data]):
        raise invalid(
            "clients", shared[:5], "clients that do not train", "Train on data.select([...]) of the other clients."
        )
    return splits if "validation" in splits else ("validation", *splits)


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise invalid(name, value, "an integer of at least 1")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("atoll", "torch", "numpy")}
