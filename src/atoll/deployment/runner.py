"""The process of a run at the server: `net.service` over an author's experiment, told what to do by the server.

The author's code runs here and in no other process of the server. This one has neither the server's keys nor a socket
to the network; when it dies, a new one goes on where the run's journal ends. In the run's folder lie

    spool/, models/             of the service, whose journal is in the server's database
    journal.sqlite, result.*    the run as `atoll runs`, `atoll report` and `atoll compare` read it
    objects/SHA256              what sites fetch: the app file
    task/SHA256                 likewise: the frame of the task at work
    uploads/                    reports that are on their way
    survey/, spread/            what sites answered about their tables
"""

import hashlib
import math
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import msgspec
from torch import Tensor

from atoll.collecting import Collected
from atoll.data.table import Table
from atoll.deployment.chronicle import Chronicle, keep_result
from atoll.deployment.prepare import experiment_of, identity_of, plan_of, process_of, rules_of, unevaluated
from atoll.deployment.survey import Agreement
from atoll.deployment.telling import Teller
from atoll.errors import AtollError, RunError
from atoll.history import Record, plain
from atoll.journal import Journal, locked, open_journal
from atoll.net import buffering, control, coordinator, evaluating
from atoll.net.buffered import BufferedService
from atoll.net.buffers import Buffer
from atoll.net.calls import Closed, InBuffer, Spent
from atoll.net.children import (
    Answered,
    Broken,
    Channel,
    Do,
    Finish,
    Happen,
    Heard,
    Host,
    HostCall,
    Receive,
    Several,
    Summary,
    Tick,
    Told,
    host_calls,
)
from atoll.net.evaluating import Said
from atoll.net.frames import Limits
from atoll.net.mirror import Mirror
from atoll.net.noise import ledger_of, terms_of
from atoll.net.objects import store
from atoll.net.packing import report_length
from atoll.net.service import Service
from atoll.net.state import Overtaken, State
from atoll.net.storage import Content, Disk, scope, write_durably
from atoll.privacy.accounting import Event
from atoll.privacy.terms import statement
from atoll.result import Result, clients_of
from atoll.rounds import Process
from atoll.schedule import Buffered
from atoll.spec import digest, identity

COUNTS = 2**12
"""Bytes that a vector of a larger cohort may have more, and its message."""
SHOWN, NAMED = 100, 200
"""Metrics of a round that watchers are shown, and characters of their names."""
PATIENCE = 60.0
"""Seconds that a new process waits for one that is about to die to let go of the run."""


class Runner:
    """A run in its folder.

    Raises:
        AtollError: the run cannot be loaded.
    """

    def __init__(self, host: Host) -> None:
        self._teller = Teller()
        self._stage: Literal["", "survey", "spread", "ready"] | None = None
        self._notices: list[str] = []
        self._closed: list[Closed] = []
        self._counted: tuple[int, Spent] | None = None
        self._record: Record | None = None
        self.folder, self.charter = Path(host.folder), host.charter
        self._files: Disk | Mirror = Disk(self.folder)
        app = self.folder / "objects" / host.charter.code
        if host.objects:
            self._files = Mirror(self._files, store(host.objects))
            self._files.size(f"objects/{host.charter.code}")  # it comes from the store where the folder has lost it
        experiment = experiment_of(_readable(self.folder, app, host.charter.code), host.charter.settings)
        self.process: Process = process_of(experiment, "loop")
        self.experiment, self.identity = experiment, identity_of(self.process)
        self.plan = plan_of(experiment, self.process, host.charter)
        self.largest = max(_largest(self.process), evaluating.LARGEST if self.plan.evaluate else 0)
        table, files = experiment.data, self._files
        # What was released is never forgotten, not by a machine without power either.
        durability = host.durability if self.process.chain.noise is None else "power"
        self._last, self._entered = time.monotonic(), 0
        self._given = (-1, False)  # the newest task that was given to a site: its round, and whether it is to train
        state = State(host.state, durability=durability, patience=PATIENCE)
        disk = Disk(self.folder, state=state, scope=scope(host.charter.run), durability=durability)
        if isinstance(self._files, Mirror):
            self._files.disk = disk
            self._journal: Journal = Chronicle(self.folder, state, host.charter.run, durability)
        else:
            self._files = disk
            self._journal = open_journal(self.folder, durability)
        more: dict[str, Any] = {
            "now": host.now, "rules": rules_of(self.process, host.charter), "limits": Limits(bytes=self.largest),
            "initial": experiment.initial, "closed": self._round_closed, "evaluated": self._model_evaluated,
            "notice": self._noticed,
        }  # fmt: skip
        self.service: Service
        if isinstance(self.plan, buffering.Plan):
            assert isinstance(experiment.schedule, Buffered)
            self.service = BufferedService(
                self.process, self.plan, self._files, schedule=experiment.schedule, **more
            )  # fmt: skip
        else:
            self.service = Service(self.process, self.plan, self._files, **more)
        # Behind the journal: from there on nobody else writes in these files.
        self.agreement = Agreement(table, self.plan.least, files) if isinstance(table, Table) else None
        state.put("plan", host.charter.run, msgspec.json.encode(self.plan))  # by which `atoll trace` reads the journal
        self._begin()
        self.process.model.forget()  # what is trained is in the service's state; nothing is computed with it here

    # --- what it is told ----------------------------------------------------------------------------------------------

    def carry_out(self, call: HostCall, blob: Buffer) -> bytes:
        """Do what the server says; the answer to a site, if there is one."""
        service = self.service
        match call:
            case Receive(site, upload, now):
                return self._received(site, blob, upload, now)
            case Happen(event, site, reason, now, key):
                self._happen(_event(event, site, reason, key), now)
            case Answered(site, stage):
                if self.agreement is not None:
                    self.agreement.answered(site, stage, bytes(blob))
                    if self.agreement.fault:
                        self._noticed(self.agreement.fault)
            case Tick(now):
                service.tick(now)
            case Do(now):
                if service.busy:
                    service.work(now)
            case Finish():
                self._finish()
            case Host() | Several():
                raise RunError("this process has a run already, and does one thing after the other.")
        try:
            self._enter(service.state.releases)
        except OSError as error:  # with the next call; the service's own journal has them
            self._noticed(f"the disk refuses: {error}")
        return b""

    def _received(self, site: str, message: Buffer, upload: str, now: float) -> bytes:
        content = Content()
        if upload:
            with suppress(FileNotFoundError):  # of a message that came twice, the first has taken it
                content = Content(files=self._files, path=f"uploads/{upload}")
        answer, _ = self.service.receive(site, message, content, now)
        if isinstance(answer, control.Work) and (given := (answer.round, answer.kind == "train")) > self._given:
            self._given, self._last = given, time.monotonic()
        return control.encode(answer)

    def _happen(self, event: coordinator.Event, now: float) -> None:
        try:
            self.service.happen(event, now)
        except OSError as error:
            self._noticed(f"the disk refuses: {error}")
            raise RunError("the server's disk refuses: try again later.") from error

    # --- what it tells ------------------------------------------------------------------------------------------------

    def several(self, calls: Several, blob: Buffer) -> tuple[list[Heard], list[bytes]]:
        """Do one after the other; what became of them, and their answers.

        Raises:
            Overtaken: this process must not go on.
        """
        heard, answers, at = list[Heard](), list[bytes](), 0
        for call, length in zip(calls.calls, calls.lengths, strict=True):
            try:
                answer = self.carry_out(call, blob[at : at + length])
                heard.append(Heard(len(answer)))
                answers.append(answer)
            except Overtaken:
                raise
            except Exception as error:
                heard.append(Heard(0, _broken(error).text))
            at += length
            if sum(map(len, answers)) >= control.LONGEST:
                break
        return heard, answers

    def told(self, heard: list[Heard] | None = None) -> Told:
        """The run now, and what of it is other than was told before; after several calls, what became of them."""
        state, agreement, stage = self.service.state, self.agreement, self._stage
        if stage != "ready":
            stage = "" if agreement is None else agreement.stage
        whole, question = self._stage is None, ""
        if agreement is not None and stage != self._stage:  # what a stage asks is settled when it begins
            question = agreement.question
        self._stage = stage
        notices, self._notices = self._notices[-20:], []
        closed, self._closed = self._closed, []
        sites = self._teller.tell(state)
        summary = Summary(
            phase=state.phase.value,
            reason=state.reason or (self._files.trouble if isinstance(self._files, Mirror) else ""),
            round=state.round,
            rounds=self.plan.rounds,
            attempt=state.attempt,
            wanted=state.wanted,
            least=self.plan.least,
            number=state.number,
            busy=self.service.busy or self._teller.more,  # whoever is busy is asked again
            stage=stage or "",
            question=question,
            identity=self.identity,
            title=self.experiment.title,
            largest=self.largest,
            turn=state.turn,
            step=state.sum.step if state.sum is not None else "",
            sites=sites,
            closed=closed,
            notices=notices,
            privacy=self._spent(),
            buffer=self._buffer(),
        )
        return Told(summary, whole, heard or [])

    def _buffer(self) -> InBuffer | None:
        state = self.service.state
        if not isinstance(state, buffering.State) or not isinstance(self.plan, buffering.Plan):
            return None
        return InBuffer(self.plan.size, self.plan.concurrency, len(state.at_work), len(state.accepted))

    def _spent(self) -> Spent | None:
        state, promised = self.service.state, self.service.state.guarantee
        if promised is None:
            return None
        if self._counted is None or self._counted[0] != state.releases:
            epsilon = ledger_of(promised, state.releases, self.plan.rounds).epsilon
            self._counted = state.releases, Spent(epsilon, promised.delta, promised.budget, promised.private)
        return self._counted[1]

    def _noticed(self, text: str) -> None:
        self._notices.append(control.plain(text))

    # --- the run as it is looked at -----------------------------------------------------------------------------------

    def _begin(self) -> None:
        told = next(iter(self._journal.events("run")), None)
        if told is None:
            versions = {name: version(name) for name in ("atoll", "torch", "numpy")}
            spec = self._made()
            body = {
                "spec": spec, "identity": identity(spec["experiment"]), "rounds": self.plan.rounds,
                "versions": versions,
            }  # fmt: skip
            self._journal.append("run", body)
        else:
            spec = told.body["spec"]
        self._spec: dict[str, Any] = spec
        promised = self.service.state.guarantee
        if promised is not None and next(iter(self._journal.events("privacy")), None) is None:
            self._journal.append("privacy", {"terms": asdict(terms_of(promised, self.plan.rounds))})
        self._entered = sum(1 for _ in self._journal.events("release"))
        self._enter(self.service.state.releases)
        for record in self._journal.history()[-100:]:
            if record.round <= self.service.state.round:
                self._closed.append(_shown(record))

    def _made(self) -> dict[str, Any]:
        return {
            "title": self.experiment.title or self.charter.run,
            "experiment": {
                **self.process.spec,
                "cohort": self.plan.cohort,
                "seed": self.plan.seed,
                "initial": digest(self._start()),
                "data": "sites",
                "code": self.charter.code,
                "settings": self.charter.settings,
            },
        }

    def _start(self) -> Tensor:
        """The model before the first round [P]."""
        process, state = self.process, self.service.model
        if state.round:  # the folder was restored from a backup, or its journal was lost
            state = process.init(self.plan.seed, self.experiment.initial)
        return process.whole(process.algorithm.model(state.algorithm), state.private)

    def _round_closed(self, round: int, collected: Collected) -> None:
        now = time.monotonic()
        loss = collected.loss / collected.examples if collected.examples else float("nan")
        stale, whose = list[int](), self.service.state.cohort
        if isinstance(self.service, BufferedService):
            stale, whose = self.service.staleness, self.service.taken
        task = self.process.open(self.service.model, whose, self.service.state.population)
        down = self.process.bytes_down(self.service.model, task)
        clients, state, epsilon = collected.count, self.service.state, None
        if state.guarantee is not None:  # the sum is that of an expected number
            clients = len(state.accepted)
            self._enter(state.releases + 1)
            epsilon = ledger_of(state.guarantee, state.releases + 1, self.plan.rounds).epsilon
        record = Record(
            round=round + 1, clients=clients, train={"loss": loss}, bytes_up=collected.bytes_up,
            bytes_down=down, seconds={"train": now - self._last}, epsilon=epsilon,
            staleness=sum(stale) / len(stale) if stale else None,
        )  # fmt: skip
        self._last = now
        self._journal.append("round", record.to_dict())
        self._record = record
        self._closed.append(_shown(record))

    def _model_evaluated(self, round: int, said: Said) -> None:
        """Write what sites said of the model into the record of the round it came from."""
        known = [] if self._record is None else [self._record]
        if not known or known[0].round != round:  # this process has not closed it itself
            known = [r for r in self._journal.history() if r.round == round]
        if not known:  # the folder was restored from a backup
            return
        found = {split: of.metrics for split, of in said.splits.items()}
        test, personal = said.splits.get("test"), said.splits.get("personal/test")
        record = replace(
            known[0],
            validation=found.get("validation", {}),
            test=found.get("test", {}),
            spread={} if test is None else test.spread,
            personal=found.get("personal/test", {}),
            personal_spread={} if personal is None else personal.spread,
            notes=said.notes,
        )
        self._journal.append("round", record.to_dict())
        if round == self.plan.rounds:
            each = (("global", test), ("personal", personal))
            final = {name: {c: of.client(c) for c in of.clients} for name, of in each if of is not None}
            self._journal.append("clients", plain(final))
        self._closed.append(_shown(record))

    def _enter(self, releases: int) -> None:
        """Enter releases, where the run is looked at, up to so many.

        A round that is combined again after a crash had released nothing: it is entered once.
        """
        if (promised := self.service.state.guarantee) is None:
            return
        while self._entered < releases:
            self._journal.append("release", asdict(Event(promised.multiplier)))
            self._entered += 1

    def _evaluation(self) -> str:
        """What the result's reader should know of its evaluations."""
        why = unevaluated(self.experiment, self.process)
        if not why and not any(r.test or r.validation for r in self._journal.history()):
            why = "no site said what the model is worth on its own examples"
        if why:
            return f"Trained over sites: nothing was evaluated, since {why}."
        return "Evaluated by the sites, each on its own held-out examples, which stayed where they are."

    def _finish(self) -> None:
        """Write the result of a run that is over."""
        process, state = self.process, self.service.model
        final = [e.body for e in self._journal.events("clients")]
        result = Result(
            vector=process.vector(state),
            buffers=state.buffers,
            history=[r for r in self._journal.history() if r.round <= self.service.state.round],
            spec=self._spec,
            engine={"engine": "sites", "sites": self.charter.engine},
            clients=clients_of(final[-1]) if final else {},
            notes=[self._evaluation()],
            directory=self.folder,
            model=process.model,
        )
        promised, releases = self.service.state.guarantee, self.service.state.releases
        if promised is not None:
            terms = terms_of(promised, self.plan.rounds)
            result.privacy.append(statement(terms, ledger_of(promised, releases, self.plan.rounds)))
            if self.service.state.spent and self.service.state.round < self.plan.rounds:
                result.notes.append(f"The run ended early: {self.service.state.reason}")
        result.save(self.folder)
        if next(iter(self._journal.events("finished")), None) is None:
            finished = self.service.state.phase is coordinator.Phase.FINISHED
            self._journal.append("finished" if finished else "interrupted", {"round": self.service.state.round})
        if isinstance(self._files, Mirror):
            keep_result(self._files, self.folder)


def _shown(record: Record) -> Closed:
    loss = record.loss if record.loss == record.loss else None
    said = record.test or record.validation
    metrics = {name[:NAMED]: value for name, value in said.items() if math.isfinite(value)}
    metrics = dict(list(metrics.items())[:SHOWN])  # an author may have any number of them: the record has all
    return Closed(
        record.round, record.clients, loss, record.bytes_up, record.seconds.get("train", 0.0), metrics, record.staleness
    )


def _event(event: str, site: str, reason: str, key: str) -> coordinator.Event:
    match event:
        case "joined":
            return coordinator.Joined(site, key)
        case "left":
            return coordinator.Left(site)
        case "revoked":
            return coordinator.Revoked(site)
        case "pause":
            return coordinator.Pause(reason)
        case "resume":
            return coordinator.Resume()
        case "discard":
            return coordinator.Discard(reason)
        case _:
            return coordinator.Stop(reason)


def _largest(process: Process) -> int:
    """Bytes that a site's report can have: where codes differ in length, as many as several rows in the clear."""
    task = process.open(process.init(), ("",), 1, kind="evaluate")  # for what it is made of alone
    frame = report_length(process.blank(task))
    if process.chain.channel.seal is not None:
        return frame + COUNTS
    return frame if process.chain.facts.fixed_size else 4 * (frame + 8 * process.length) + 2**20


def _readable(folder: Path, app: Path, sha256: str) -> Path:
    """The app file under a name that Python imports and tracebacks show.

    Raises:
        RunError: it is gone, or not the one that was submitted: whoever can write where it is kept runs nothing here.
    """
    named = folder / "app.py"
    content = app.read_bytes() if app.exists() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise RunError(
            f"{app} is gone, or not the app file that was submitted: restore it from a backup, or stop the run."
        )
    if not named.exists() or named.read_bytes() != content:
        write_durably(Disk(folder), "app.py", content)
    return named


def main(arguments: Sequence[str]) -> None:
    """Serve the parent on the socket that the command line names, until it is gone."""
    channel = Channel(int(arguments[0]))
    runner: Runner | None = None
    with ExitStack() as held:
        while (said := channel.receive()) is not None:
            content, blob = said
            try:
                call = host_calls.decode(content)
                heard, answers = list[Heard](), list[bytes]()
                if isinstance(call, Host) and runner is None:
                    _hold(held, Path(call.folder))
                    runner = Runner(call)
                elif runner is None:
                    raise RunError("there is no run yet.")
                elif isinstance(call, Several):
                    heard, answers = runner.several(call, blob)
                else:
                    answers = [runner.carry_out(call, blob)]
                channel.reply(runner.told(heard), *answers)
            except Overtaken as error:  # what is known here is not what is written: a new process begins with that
                channel.reply(Broken(type(error).__name__, str(error)))
                return
            except Exception as error:  # the author's code may raise anything; the server is told, and lives on
                channel.reply(_broken(error))


def _broken(error: Exception) -> Broken:
    """What the server is told of an error."""
    kind = type(error).__name__
    ours = isinstance(error, AtollError | OSError | control.MessageError | msgspec.MsgspecError)
    if not ours:
        traceback.print_exception(error)
    text = str(error) if ours else f"{kind}: {error}"
    return Broken(kind, text[:2000].encode(errors="replace").decode())  # names of files may be no text


def _hold(held: ExitStack, folder: Path) -> None:
    """Lock the folder; a process of this run whose server was killed may be about to let go of it."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            held.enter_context(locked(folder))
            return
        except RunError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1:])
