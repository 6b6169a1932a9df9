"""The server's side of an asynchronous run: carries out what `buffering` decides, as `service` does for rounds.

Beside what a synchronous run keeps, checkpoints and task frames of all models stay on disk that a site works on, or was
asked about: of those at work, the newest, and of an evaluation its own. In memory there is the newest alone: admitting
or combining an update needs nothing of the model it was computed from, since no stage and no rule looks at it
(`asynchronous.check`).
"""

from dataclasses import replace
from typing import Any, NamedTuple

from atoll.asynchronous import check
from atoll.collecting import Collected
from atoll.errors import CompositionError, RunError
from atoll.messages import Task
from atoll.net import buffering, evaluating
from atoll.net import coordinator as core
from atoll.net.admission import Finding, examine
from atoll.net.buffering import Plan
from atoll.net.control import Deliver, Stamp, Value, Work, content_hash
from atoll.net.packing import pack_task, report_schema, unpack_state
from atoll.net.service import Service, Told, model_path, task_path
from atoll.net.spool import reduce
from atoll.net.storage import Content, FileSystem, write_whole
from atoll.rounds import Process, State
from atoll.schedule import Buffered


class Unlike(RunError):
    """A model that sites were given cannot be given again."""


class Given(NamedTuple):
    """A model's task as a site is offered it: without the model."""

    values: dict[str, Value]
    seed: int
    population: int
    frame: Content


class BufferedService(Service):
    """An asynchronous run on the server.

    Attributes:
        taken: sites of the updates that were combined last.
        staleness: how many steps old those were, in that order.

    Args:
        schedule: says what stale updates count.
        plan: of the run, from the same schedule.

    The others, and what is raised, as of `Service`.
    """

    plan: Plan
    state: buffering.State  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, process: Process, plan: Plan, files: FileSystem, *, schedule: Buffered, **more: Any) -> None:
        check(process)
        if (plan.size, plan.concurrency, plan.limit) != (schedule.size, schedule.concurrency, schedule.limit):
            raise CompositionError("the plan is not of this schedule.")
        self._schedule = schedule
        self._models: dict[Stamp, Given] = {}
        self.staleness: list[int] = []
        self.taken: tuple[str, ...] = ()
        super().__init__(process, plan, files, **more)

    # --- another machine ----------------------------------------------------------------------------------------------

    def _handled(self, event: core.Event, now: float) -> core.Handled:
        return buffering.handle(self.plan, self.state, event, now)

    def _replayed(self, entries: list[core.Entry]) -> buffering.State:
        return buffering.replay(self.plan, entries)

    def _awaited(self, effect: core.Open | core.Close | core.Reduce) -> bool:
        state, poll = self.state, self.state.poll
        if state.phase in (core.Phase.PAUSED, core.Phase.FINISHED, core.Phase.STOPPED):
            return False
        if not effect.attempt:
            asked = poll is not None and poll.round == effect.round
            return asked and (isinstance(effect, core.Open) or (poll is not None and poll.adding))
        if effect.round != state.round or state.kind != "train":
            return False
        return isinstance(effect, core.Open) or state.phase is core.Phase.REDUCING

    def _silence(self) -> list[str]:
        poll = self.state.poll
        if poll is None:
            return []
        out = [s for s in poll.cohort if s not in poll.said]
        told = "; ".join(f"{s}: {poll.out.get(s, 'no answer in time').rstrip('.')}" for s in out[:5])
        return [f"{len(out)} of {len(poll.cohort)} sites said nothing of the model ({told})."] if out else []

    # --- models -------------------------------------------------------------------------------------------------------

    def _offer(self, site: str, counted: Stamp | None) -> Told | None:
        state, at = self.state, self.state.task(site)
        assert at is not None
        version, attempt = at
        given = self._models.get((version, min(attempt, buffering.TRY)))
        if given is None:
            return None  # after a restart it is still to be made again
        poll = state.poll
        trains = attempt > 0
        base = state.models[version].base if trains or poll is None else poll.base
        # Nothing that a site computes depends on who else is asked when.
        work = Work(
            self.plan.run, version, attempt, base, given.frame.size, "train" if trains else "evaluate", given.seed,
            (site,), given.population, given.values, counted,
        )  # fmt: skip
        return work, given.frame

    def _opened(self, effect: core.Open, now: float) -> None:
        known = bool(effect.base)
        try:
            base, task = self._given_out(effect, self.model if effect.round == self.model.round else None)
        except (OSError, Unlike):
            raise
        except Exception as error:  # whatever an author's code raises, the run is paused and not lost
            self._fails(effect, error, now)
            return
        if effect.attempt:
            self._task = task
            if self._schema is None:
                self._schema = report_schema(self.process, task)
            for version, model in self.state.models.items():  # after a restart older ones are made again, one at a time
                if (version, buffering.TRY) not in self._models:
                    self._given_out(core.Open(version, buffering.TRY, (), model.population, model.base), None)
        if not known:
            self.happen(core.Opened(effect.round, effect.attempt, base), now)

    def _given_out(self, effect: core.Open, model: State | None) -> tuple[str, Task]:
        """Make the task of a model and write its frame; the frame's hash, and the task."""
        model = self._kept(effect.round) if model is None else model
        made = self.process.open if effect.attempt else self.process.open_global
        task = made(model, effect.cohort, effect.population)
        values, frame = pack_task(task)
        base = content_hash(*frame)
        if effect.base and effect.base != base:
            raise Unlike(
                f"the task of the model after step {effect.round} is not the one that sites were given: the experiment "
                "or the library has changed under the run. Start the version it began with."
            )
        path = task_path(base)
        write_whole(self.files, path, *frame)
        content = Content(files=self.files, path=path)
        self._models[effect.round, effect.attempt] = Given(values, task.seed, task.population, content)
        return base, task

    def _kept(self, version: int) -> State:
        """The checkpoint of an older model."""
        path = model_path(version)
        if self.files.size(path) < 0:
            raise Unlike(f"{path} is missing: restore it from a backup.")
        return unpack_state(self.model, Content(files=self.files, path=path).whole())

    def _tidy(self, round: int) -> None:
        state = self.state
        poll = state.poll
        in_use = {(v, buffering.TRY) for v in state.models} | ({(poll.round, 0)} if poll is not None else set())
        self._models = {k: given for k, given in self._models.items() if k in in_use}
        bases = {m.base for m in state.models.values()} | ({poll.base} if poll is not None else set())
        held = [*state.accepted.values(), *(poll.said.values() if poll is not None else ())]
        needed = state.needed | {state.round - 1}
        try:
            self._spool.keep(u.claim for u in held)
            for name in self.files.names("task"):
                if name not in bases:
                    self.files.remove(task_path(name))
            for name in self.files.names("models"):
                if name.isdecimal() and int(name) < state.round and int(name) not in needed:
                    self.files.remove(f"models/{name}")
        except OSError as error:
            self._notice(f"the disk refuses: {error}")

    # --- updates ------------------------------------------------------------------------------------------------------

    def _examined(self, claim: Deliver, content: Content) -> Finding:
        if not claim.attempt:
            if content.size > evaluating.LARGEST:
                return Finding("content", f"it has {content.size} bytes, more than an answer has.")
            return evaluating.examine(claim, bytes(content.whole()), self.rules.weight_cap)
        if self._task is None or self._schema is None:
            return Finding("transport", "the task is being made again.")
        task = replace(self._task, round=claim.round)
        return examine(self.process, task, claim, content, self._schema, self.rules, self.limits)

    def _collected(self, effect: core.Reduce) -> tuple[Task, Collected]:
        assert self._task is not None and self._schema is not None
        claims = [u.claim for u in effect.updates]
        self.taken = tuple(c.site for c in claims)
        task = replace(self._task, clients=self.taken)
        self.staleness = [effect.round - c.round for c in claims]
        collected = reduce(
            self.process,
            self.model,
            task,
            self._spool,
            claims,
            self._schema,
            expected=float(self.plan.size),
            limits=self.limits,
            block=self.block,
            scales=[self._schedule.weight(tau) for tau in self.staleness],
        )
        return task, collected
