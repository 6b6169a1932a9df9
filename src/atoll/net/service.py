"""The server's side of a run: carries out what the coordinator decides, on a file system that is handed in.

    journal              the recorded events, each durable before an answer that depends on it leaves
    spool/ROUND/HASH     accepted updates; with a secure sum masked vectors, and the sum
    task/HASH            the frame of the task at work; after a restart it is made again
    models/ROUND         checkpoints; a recorded event names the hash of the one that counts

It has no clock, thread or socket: whoever owns those calls `receive` with what came, `tick` when time has passed, and
`work` while `busy`. Killed anywhere and made anew on the same files, it goes on where its journal ends.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping

import msgspec
import torch
from torch import Tensor

from atoll.aggregators.rows import finite_rows
from atoll.collecting import Collected
from atoll.errors import AtollError, NonFiniteError, RunError, invalid
from atoll.messages import Task
from atoll.net import coordinator as core
from atoll.net import evaluating, noise
from atoll.net.admission import Finding, Rules, examine
from atoll.net.buffers import Buffer
from atoll.net.control import (
    Abstain,
    Answer,
    Ask,
    Cause,
    Decline,
    Deliver,
    Refused,
    Request,
    Say,
    Turn,
    Value,
    Work,
    content_hash,
    decode_request,
)
from atoll.net.coordinator import Entry, Plan
from atoll.net.evaluating import Said
from atoll.net.frames import Limits, Schema
from atoll.net.packing import PARTS, pack_state, pack_task, report_schema, unpack_state
from atoll.net.reading import BLOCK
from atoll.net.spool import Spool, reduce, reduce_sum
from atoll.net.storage import Content, FileSystem, write_durably, write_whole
from atoll.net.sums import Machine, summing, task_hash
from atoll.rounds import Process, State
from atoll.secagg import SecAggError, Void
from atoll.spec import identity
from atoll.transforms.chain import sent
from atoll.tree import Leaf, leaves

Told = tuple[Answer, Content]
"""An answer and the frame beside it, which may be empty."""

KEPT = 2
"""Checkpoints that stay on disk."""


class Service:
    """A run on the server.

    Args:
        process: what is trained and how; the very one of the sites.
        plan: of the run.
        files: where the run's folder is.
        now: seconds on any clock; where it goes back, as after a reboot, the run's own time goes on from where it was.
        rules: what an update may be.
        limits: of frames.
        block: coordinates that are combined at a time.
        initial: start vector [P]; default the module's own values.
        closed: called with a round and its combined updates before the round is recorded: again for the same round
            after a crash in between.
        evaluated: likewise with the number of rounds that are done, and what sites said of the model after them.
        notice: called with what the operator should hear of: alarms, events out of place, disks that are full.

    Raises:
        RunError: the folder holds another run, or this one under another plan or experiment, or is damaged.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        process: Process,
        plan: Plan,
        files: FileSystem,
        *,
        now: float,
        rules: Rules | None = None,
        limits: Limits | None = None,
        block: int = BLOCK,
        initial: Tensor | None = None,
        closed: Callable[[int, Collected], None] | None = None,
        evaluated: Callable[[int, Said], None] | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.process, self.plan, self.files = process, plan, files
        self.rules, self.limits, self.block = rules or Rules(), limits or Limits(), block
        self.rules.check(process)
        noise.check(process)
        noise.check_plan(process, plan)
        if plan.keep and process.chain.channel.seal is not None:
            raise invalid("keep", True, "False with a summing channel, whose codes depend on the cohort")
        if plan.evaluate and (why := evaluating.why_not(process)):
            raise invalid("evaluate", plan.evaluate, "0", f"Nothing is evaluated: {why}.")
        self._terms = summing(process)
        least = 0 if self._terms is None else self._terms.least
        if plan.sums != least:
            raise invalid("sums", plan.sums, f"{least}, as the channel {process.chain.channel.name} has it")
        self._notice = notice or (lambda text: None)
        self._closed = closed or (lambda round, collected: None)
        self._evaluated = evaluated or (lambda round, said: None)
        self._spool = Spool(files)
        self._log = files.journal("journal")
        self._task: Task | None = None
        self._values: dict[str, Value] = {}
        self._given = Content()
        self._schema: Schema | None = None
        self._next: tuple[State, str] | None = None
        self._machine: Machine | None = None
        self._length = self._sent = 0
        self._todo: deque[core.Open | core.Close | core.Reduce] = deque()
        self._full = False
        self.model: State = process.init(plan.seed, initial)
        entries = [_decoder.decode(record) for record in self._log]
        self.state: core.State = self._replayed(entries)
        self._offset, self._latest = 0.0, self.state.now
        self._noising: noise.Noising | None = None
        experiment = identity({"plan": msgspec.to_builtins(plan), "process": process.spec})
        if not self.state.model:
            guarantee = noise.guaranteed(process, plan)
            self.happen(core.Started(self._saved(self.model), experiment, guarantee), now)
        else:
            if self.state.experiment != experiment:
                raise RunError(
                    f"this folder holds the run {plan.run} of another plan, model, algorithm or pipeline: start what "
                    "it began with, or choose another folder."
                )
            self.model = self._loaded(self.state)
            self.happen(core.Restarted(), now)
        if self.state.guarantee is not None:
            self._noising = noise.Noising(process, self.state.guarantee)
        self._tidy(self.state.round)

    @property
    def busy(self) -> bool:
        """Whether `work` has something to do now; after a disk refused, not before the next `tick`."""
        return bool(self._todo) and not self._full

    def receive(self, site: str, message: Buffer, content: Content | bytes, now: float) -> Told:
        """Answer a site's message.

        Args:
            site: whose it is, as the transport has authenticated it.
            message: as it came.
            content: the frame beside it; one that lies in a file of the run's folder is moved to where it is kept.
            now: seconds.

        Raises:
            MessageError: it is no message.
        """
        request = decode_request(bytes(message))
        content = content if isinstance(content, Content) else Content(content)
        event: core.Event
        if isinstance(request, Ask):
            event = core.Asked(site, request.at)
            if request.site != site or request.run != self.plan.run:
                cause: Cause = "run" if request.site == site else "identity"
                self._notice(f"{site}: asked in the name of {request.site} for the run {request.run}")
                return Refused(self.plan.run, 0, 0, cause, "", self.state.told(site), None), Content()
        elif isinstance(request, Decline):
            event = core.Declined(site, request)
        elif isinstance(request, Abstain):
            event = core.Abstained(site, request)
        elif isinstance(request, Say):
            event = core.Spoke(site, request, Finding())
            _, effects = self._handled(event, self.state.now)
            if any(isinstance(e, core.Record) for e in effects):
                if not self._summing():
                    return self._busy(site, request)
                event = core.Spoke(site, request, self._heard(site, request, content))
        else:
            event = core.Submitted(site, request, Finding())
            # Whether its content matters at all is known before it is looked at.
            _, effects = self._handled(event, self.state.now)
            if any(isinstance(e, core.Record) for e in effects):
                try:
                    event = core.Submitted(site, request, self._examined(request, content))
                except OSError as error:
                    self._notice(f"the disk refuses: {error}")
                    return self._busy(site, request)
        try:
            told = self.happen(event, now, content)
        except OSError as error:
            self._notice(f"the disk refuses: {error}")
            self._machine = None  # it may have taken what was not recorded
            told = None
        return told or self._busy(site, request)

    def _busy(self, site: str, request: Request) -> Told:
        at = (0, 0) if isinstance(request, Ask) else (request.round, request.attempt)
        known = self.state.sites.get(site)
        counted = None if known is None else known.counted
        return Refused(self.plan.run, *at, "busy", "try again later.", self.state.told(site), counted), Content()

    def tick(self, now: float) -> None:
        """Time has passed."""
        self._full = False
        try:
            self.happen(core.Ticked(), now)
        except OSError as error:
            self._notice(f"the disk refuses: {error}")

    def work(self, now: float) -> None:
        """Make a task or combine a round: the first thing that waits for it."""
        effect = self._todo[0]
        try:
            if isinstance(effect, core.Open):
                self._opened(effect, now)
            elif isinstance(effect, core.Close):
                self._step_closed(effect, now)
            else:
                self._reduced(effect, now)
        except OSError as error:  # it stays the first: there may be room the next time
            self._notice(f"the disk refuses: {error}")
            self._machine = None
            self._full = True
            return
        if self._todo and self._todo[0] is effect:
            self._todo.popleft()

    def happen(self, event: core.Event, now: float, content: Content | None = None) -> Told | None:
        """Handle an event and carry out its effects; the answer, if it has one.

        Raises:
            OSError: something could not be made durable; nothing has happened then.
        """
        after, effects = self._handled(event, self._time(now))
        told: Told | None = None
        for effect in effects:
            match effect:
                case core.Store(claim):
                    assert content is not None
                    self._spool.put(claim, content)
                case core.Record(entry):
                    self._log.append(msgspec.json.encode(entry))
                    self._taken(after, event)
                case core.Reply(_, answer):
                    told = answer, Content()
                case core.Offer(name, counted):
                    told = self._offer(name, counted)
                case core.Tell(name, counted):
                    told = self._said(name, counted)
                case core.Open() | core.Close() | core.Reduce():
                    self._todo.append(effect)
                case core.Forget(round):
                    self._tidy(round)
                case core.Alarm(site, text):
                    self._notice(f"{site}: {text}")
                case core.Misplaced(name, phase):
                    self._notice(f"{name} has no place while {phase.value}")
        return told

    def _time(self, now: float) -> float:
        """The run's own time: that of the clock, ahead by whatever the clock has ever gone back."""
        self._offset = max(self._offset, self._latest - now)
        self._latest = now + self._offset
        return self._latest

    def _taken(self, after: core.State, event: core.Event) -> None:
        """A recorded event is the truth from here on."""
        known = isinstance(event, core.Evaluated | core.Failed | core.Discard)
        if after.evaluated > self.state.evaluated and not known:
            self._notice(_unheard(self.state, event, after.evaluated))
        self.state = after
        if isinstance(event, core.Reduced):
            assert self._next is not None
            self.model, self._next = self._next[0], None
        elif after.phase is not core.Phase.REDUCING:
            self._next = None
        # What waits to be done for an attempt that is over is not done.
        self._todo = deque(e for e in self._todo if self._awaited(e))

    # --- what a machine of another kind does otherwise ----------------------------------------------------------------

    def _handled(self, event: core.Event, now: float) -> core.Handled:
        return core.handle(self.plan, self.state, event, now)

    def _replayed(self, entries: list[Entry]) -> core.State:
        return core.replay(self.plan, entries)

    def _awaited(self, effect: core.Open | core.Close | core.Reduce) -> bool:
        """Whether what waits to be done is still to be done."""
        return (effect.round, effect.attempt) == (self.state.round, self.state.attempt)

    def _silence(self) -> list[str]:
        """What a reader of the evaluation at work should know of sites that are not in it."""
        return _silent(self.state)

    # ------------------------------------------------------------------------------------------------------------------

    def _offer(self, site: str, counted: tuple[int, int] | None) -> Told | None:
        state, task = self.state, self._task
        if task is None or (task.round, task.clients) != (state.round, state.cohort):
            return None  # after a restart it is still to be made again
        work = Work(
            self.plan.run, state.round, state.attempt, state.base, self._given.size, task.kind, task.seed, task.clients,
            task.population, self._values, counted,
        )  # fmt: skip
        return work, self._given

    def _examined(self, claim: Deliver, content: Content) -> Finding:
        if self._task is None:
            return Finding("transport", "the task is being made again.")
        if self.state.kind == "evaluate":
            if content.size > evaluating.LARGEST:
                return Finding("content", f"it has {content.size} bytes, more than an answer has.")
            return evaluating.examine(claim, bytes(content.whole()), self.rules.weight_cap)
        if self._terms is not None:
            return self._trained(claim)
        assert self._schema is not None
        return examine(self.process, self._task, claim, content, self._schema, self.rules, self.limits)

    # --- turns at a secure sum ----------------------------------------------------------------------------------------

    def _trained(self, claim: Deliver) -> Finding:
        """What a site's word is that it is trained: nothing of its update is in it."""
        said = (claim.size, claim.sha256, claim.parts, claim.bytes)
        if said != (0, content_hash(b""), (0, 0, 0), 0):
            return Finding("content", "it is more than a site's word that it is trained.")
        return Finding()

    def _turn(self) -> Machine:
        """The machine of the turn at work, made anew of what sites have said where there is none."""
        state, terms = self.state, self._terms
        assert state.sum is not None and terms is not None and self._task is not None
        if self._machine is None or self._machine.at != (state.round, state.turn):
            task = task_hash(state.base, self._task.kind, self._task.seed, self._values)
            self._machine = Machine(
                self.plan.run, state.round, state.turn, state.sum, terms, self._length, task, self._spool
            )  # fmt: skip
        return self._machine

    def _summing(self) -> bool:
        """Whether there is a machine now: not before the task is made again, nor while the disk refuses."""
        if self._task is None or self.state.sum is None:
            return False
        try:
            self._turn()
            return True
        except (OSError, AtollError) as error:  # closing the step will tell what it is
            self._notice(f"the sum of round {self.state.round + 1} cannot go on: {error}")
            return False

    def _heard(self, site: str, claim: Say, content: Content) -> Finding:
        """What an answer was found to be; one without a fault the machine has taken."""
        beside = content.whole()
        if len(beside) != claim.size or content_hash(beside if claim.size else claim.content) != claim.sha256:
            return Finding("transport" if claim.size else "content", "the answer is not the one that was announced.")
        try:
            self._turn().take(site, claim, bytes(beside))
        except SecAggError as error:
            return Finding("content", str(error)[:500])
        return Finding()

    def _said(self, site: str, counted: tuple[int, int] | None) -> Told | None:
        if not self._summing():
            return None
        state, machine = self.state, self._turn()
        assert state.sum is not None
        keys = state.sum.keys if machine.step == "join" else {}
        turn = Turn(
            self.plan.run, state.round, state.attempt, state.turn, machine.step, machine.says(site), keys, counted
        )  # fmt: skip
        return turn, Content()

    def _step_closed(self, effect: core.Close, now: float) -> None:
        state = self.state
        turn = state.sum
        asked = (effect.turn, effect.step) == (state.turn, turn.step if turn else "")
        if state.phase is not core.Phase.SUMMING or turn is None or not turn.closing or not asked:
            return  # the run rests, or the turn is over
        try:
            machine = self._turn()
            found = machine.close()
        except Void as error:
            self._machine = None
            self.happen(core.Voided(state.round, state.turn, str(error)[:1000], error.culprits), now)
            return
        except (AtollError, ValueError) as error:
            self._machine = None
            self.happen(core.Failed(state.round, state.attempt, _told(error)), now)
            return
        if found is None:
            self.happen(core.Advanced(state.round, state.turn, machine.step, tuple(sorted(machine.told))), now)
            return
        for name, why in found.culprits.items():
            self._notice(f"{name}: {why}")
        total = self._spool.put_sum(state.round, state.turn, found.total.tobytes())
        self.happen(core.Summed(state.round, state.turn, found.survivors, total), now)
        self._machine = None

    def _opened(self, effect: core.Open, now: float) -> None:
        try:
            task = self._made(effect)
            values, frame = pack_task(task)
        except Exception as error:  # whatever an author's code raises, the run is paused and not lost
            self._fails(effect, error, now)
            return
        base = content_hash(*frame)
        if effect.base and effect.base != base:
            raise RunError(
                "the task of the round at work is not the one that sites were given: the experiment or the library has "
                "changed under the run. Start the version it began with."
            )
        path = task_path(base)
        write_whole(self.files, path, *frame)
        for name in self.files.names("task"):
            if name != base:
                self.files.remove(f"task/{name}")
        self._task, self._values, self._given = task, values, Content(files=self.files, path=path)
        if not effect.base:
            self.happen(core.Opened(effect.round, effect.attempt, base), now)

    def _made(self, effect: core.Open) -> Task:
        """The task of an attempt; what comes back on one to train is known from here on."""
        if not effect.attempt:
            return self.process.open_global(self.model, effect.cohort, effect.population)
        task = self.process.open(self.model, effect.cohort, effect.population)
        if self._terms is not None:
            blank = self.process.blank(task)
            assert isinstance(blank.wire, Mapping)
            self._length, self._sent = blank.wire["ring"].shape[1], sent(blank.wire)
        elif self._schema is None:
            self._schema = report_schema(self.process, task)
        return task

    def _fails(self, effect: core.Open | core.Reduce, error: Exception, now: float) -> None:
        """Tell that trying again would not help; an evaluation is gone on without."""
        if not effect.attempt:
            self._notice(f"the model after round {effect.round} is not evaluated: {_told(error)}")
        self.happen(core.Failed(effect.round, effect.attempt, _told(error)), now)

    def _summarised(self, effect: core.Reduce, now: float) -> None:
        """Add up what sites say of the model."""
        process, clients = self.process, tuple(u.claim.site for u in effect.updates)
        try:
            own = process.open(self.model, clients, len(clients), kind="evaluate").message.vector
            same = torch.equal(own, process.open_global(self.model, clients, len(clients)).message.vector)
            said = evaluating.added(process, self._spool, [u.claim for u in effect.updates], personal=same)
            self._evaluated(effect.round, said._replace(notes=(*said.notes, *self._silence())))
        except OSError:
            raise
        except Exception as error:  # metrics may be an author's
            self._fails(effect, error, now)
            return
        self.happen(core.Evaluated(effect.round), now)

    def _reduced(self, effect: core.Reduce, now: float) -> None:
        if not effect.attempt:
            self._summarised(effect, now)
            return
        noising = self._noising
        if self._next is None:  # else the journal refused it, and may have it nevertheless: it stays as it is
            if noising is not None:
                noising.begin(effect.round)
            try:
                model = self._combined(effect)
                self._next = model, self._saved(model)
            except OSError as error:
                if noising is not None:
                    raise noising.wordless(error) from None
                raise
            except Exception as error:  # as above; behind the noise it tells of a noised sum
                told, multiplier = _told(error), 0.0
                if noising is not None:
                    told, multiplier = noising.told(error, told), noising.multiplier
                self.happen(core.Failed(effect.round, effect.attempt, told, multiplier), now)
                return
        multiplier = 0.0 if noising is None else noising.multiplier
        self.happen(core.Reduced(effect.round, effect.attempt, self._next[1], multiplier), now)

    def _combined(self, effect: core.Reduce) -> State:
        process, (task, collected) = self.process, self._collected(effect)
        closed = process.close(self.model, task, collected, spare=True)
        wild = [name for name, leaf in leaves({n: getattr(closed, n) for n in PARTS}) if not _finite(leaf)]
        if wild:
            whole = bool(torch.isfinite(process.vector(closed)).all())
            what = f"{', '.join(wild[:5])} of its state" if whole else "the model"
            raise NonFiniteError(
                f"round {task.round + 1}: the server's step made {what} non-finite although every update was finite. "
                "Lower the server's lr, or bound the updates' norm."
            )
        self._closed(task.round, collected)
        return closed

    def _collected(self, effect: core.Reduce) -> tuple[Task, Collected]:
        """The updates of a round, combined, and the task by which they are."""
        task, process = self._task, self.process
        assert task is not None
        claims = [u.claim for u in effect.updates]
        expected = None if self.plan.cohort is None else float(self.plan.cohort)
        if self.state.guarantee is not None:
            expected = float(self.state.guarantee.expected)
        if effect.total:
            total = self._spool.sum(effect.round, effect.turn, effect.total)
            collected = reduce_sum(process, self.model, task, total, claims, self._sent, expected=expected)
        else:
            assert self._schema is not None
            collected = reduce(
                process,
                self.model,
                task,
                self._spool,
                claims,
                self._schema,
                expected=expected,
                limits=self.limits,
                block=self.block,
                release=self._noising,
            )
        return task, collected

    def _saved(self, model: State) -> str:
        parts = pack_state(model)
        write_durably(self.files, model_path(model.round), *parts)
        return content_hash(*parts)

    def _loaded(self, state: core.State) -> State:
        path = model_path(state.round)
        content = Content(files=self.files, path=path).whole() if self.files.size(path) >= 0 else memoryview(b"")
        if content_hash(content) != state.model:
            raise RunError(f"{path} is missing or damaged: restore it from a backup.")
        return unpack_state(self.model, content)

    def _tidy(self, round: int) -> None:
        """Remove what no restart will need, such as updates before a round; what cannot be now is the next time."""
        try:
            self._spool.forget(round)
            for name in self.files.names("models"):
                if name.isdecimal() and int(name) <= self.state.round - KEPT:
                    self.files.remove(f"models/{name}")
        except OSError as error:
            self._notice(f"the disk refuses: {error}")


_decoder = msgspec.json.Decoder(Entry)


def model_path(round: int) -> str:
    """Where the checkpoint lies with which a round begins."""
    return f"models/{round:08d}"


def task_path(base: str) -> str:
    """Where the frame of a task lies that has this hash."""
    return f"task/{base}"


def _finite(leaf: Leaf) -> bool:
    if isinstance(leaf, torch.Tensor):
        return not leaf.is_floating_point() or bool(finite_rows(leaf.reshape(1, -1)))
    return not isinstance(leaf, float) or math.isfinite(leaf)


def _silent(state: core.State) -> list[str]:
    """What a reader of an evaluation should know of sites that are not in it."""
    out = [s for s in state.cohort if s not in state.accepted]
    told = "; ".join(f"{s}: {state.excluded.get(s, 'no answer in time').rstrip('.')}" for s in out[:5])
    return [f"{len(out)} of {len(state.cohort)} sites said nothing of the model ({told})."] if out else []


def _unheard(state: core.State, event: core.Event, round: int) -> str:
    """What an operator is told of an evaluation that this event ended, to which nobody answered."""
    out = dict(state.excluded)
    if isinstance(event, core.Declined):
        out[event.site] = event.claim.reason
    why = "; ".join(f"{site}: {reason.rstrip('.')}" for site, reason in sorted(out.items())[:5])
    return f"the model after round {round} is not evaluated: no site answered{f' ({why})' if why else ''}."


def _told(error: Exception) -> str:
    """What an operator is told of an error."""
    told = str(error) if isinstance(error, AtollError) else f"{type(error).__name__}: {error}"
    return told[:1000].encode(errors="replace").decode()  # names of files may be no text
