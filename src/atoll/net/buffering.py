"""The server's side of an asynchronous run (FedBuff) as a pure state machine, beside the one for rounds.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek & Huba 2022, algorithm 1, over sites: `concurrency` sites are at work,
each on the model of the moment it was asked; whoever delivers is replaced by another; whenever `size` accepted updates
are there the server makes a step, which is what a round is in `coordinator`.

    GATHERING  -> enough sites are there     -> OPENING     the task of a new model is being made
    OPENING    -> Opened                     -> COLLECTING  free places are given to sites, with this model
    COLLECTING -> `size` updates are there   -> REDUCING    the first of them are combined; more may come in meanwhile
    REDUCING   -> Reduced                    -> OPENING     the next model, or the last evaluation, or FINISHED
    COLLECTING -> nobody is left to ask      -> PAUSED      Resume begins anew with whoever failed
    any        -> Pause, a fault             -> PAUSED      Resume goes on where it was
    PAUSED     -> Discard                    -> PAUSED      the updates that wait are given up

Events, entries and effects are those of `coordinator`, and so is what is promised of them. A model goes by the number
of steps before it, its version. A site has one task at a time, from when it is asked until its update is counted, or
given up: (version, attempt), where `attempt` is the number of tasks given so far, so that a site's tasks are in order.
Every answer tells a site the version of its own task instead of the server's, as long as that is open: to a site it is
a round that is not over, and its machine (`party`) is the same as in synchronous runs.

An update that is acknowledged counts in the step that its place in the order of acceptance gives it: the i-th that
waits, from 0, in step `round + i // size`. So its staleness is known, and held to the limit, before it is accepted, and
one that would come behind the last step is not taken. The step itself combines its updates by version and site.

Sites are asked what a model is worth beside training, as attempt 0 at its version: everybody who is there when the
model is made, each before it is given another task to train. While an evaluation is at work none is begun, but the last
one is waited for. It holds no place of those at work.
"""

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec.structs import replace

from atoll import sampling
from atoll.errors import invalid
from atoll.net import coordinator as core
from atoll.net.control import (
    Cause,
    Deliver,
    Ended,
    Received,
    Refused,
    Stamp,
    Wait,
    named_well,
    plain,
)
from atoll.net.coordinator import (
    Accepted,
    Alarm,
    Effects,
    Forget,
    Offer,
    Open,
    Phase,
    Reduce,
    Reply,
    identified,
    misplaced,
    recorded,
    refuse,
)
from atoll.random import numpy_generator

TRY = 1
"""What a step's own effects and events have for an attempt: there is one, and 0 is an evaluation."""


class Plan(core.Plan, frozen=True, forbid_unknown_fields=True):
    """What an asynchronous run asks for: `rounds` are steps, `deadline` is that of a task, `attempts` is how often
    everybody may fail before a step is made.

    Attributes:
        size: updates of a step.
        concurrency: sites at work at once.
        limit: most steps that may lie between the model of an update and its step; None: any number.
        weighing: identity of what stale updates count.
    """

    size: int = 1
    concurrency: int = 1
    limit: int | None = None
    weighing: str = ""

    def __post_init__(self) -> None:
        core.Plan.__post_init__(self)
        for name in ("size", "concurrency"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "a number of sites of at least 1")
        if self.limit is not None and self.limit < 0:
            raise invalid("limit", self.limit, "a number of steps of at least 0, or None")
        why = "A step is made of as many updates as the schedule says."
        for name, value, own in (
            ("cohort", self.cohort, None),
            ("over", self.over, 1.0),
            ("quorum", self.quorum, None),
        ):
            if value != own:
                raise invalid(name, value, f"{own} with schedule.buffered", why)
        if self.sums or not self.keep:
            raise invalid("sums", self.sums, "0, with keep=True", "A secure sum leaves no weight to stale updates.")


class Job(msgspec.Struct, frozen=True):
    """What a site works on.

    Attributes:
        round: version of the model it was given.
        attempt: its task's number.
        deadline: when its place is given to another; None: never.
    """

    round: int
    attempt: int
    deadline: float | None

    @property
    def stamp(self) -> Stamp:
        """As messages have it."""
        return self.round, self.attempt


class Model(msgspec.Struct, frozen=True):
    """A model that is in use.

    Attributes:
        base: hash of its task's frame.
        population: sites there were when it was made.
    """

    base: str
    population: int


class Poll(msgspec.Struct, frozen=True):
    """An evaluation.

    Attributes:
        round: version of the model.
        cohort: who is asked, sorted.
        population: sites there were.
        base: hash of its task's frame; "" while it is not made.
        said: answers on disk, by site.
        out: sites that will not answer, and why.
        deadline: when it stops to wait; None: it did not begin.
        adding: whether the answers are being added up.
    """

    round: int
    cohort: tuple[str, ...]
    population: int
    base: str = ""
    said: dict[str, Accepted] = {}
    out: dict[str, str] = {}
    deadline: float | None = None
    adding: bool = False

    @property
    def awaited(self) -> list[str]:
        """Who may still answer."""
        return [] if self.adding else [s for s in self.cohort if s not in self.said and s not in self.out]


class State(core.State, frozen=True):
    """Everything the machine knows: as of `coordinator`, where `accepted` are the updates that wait, in the order of
    their acceptance, `excluded` are sites that are not asked again before the next step, and `cohort` is whoever is
    asked for something. `kind` is "evaluate" once all steps are made.

    Attributes:
        asked: tasks given so far.
        at_work: tasks that are open, by site.
        models: those that are in use, by version.
        taken: how many of the updates that wait are being combined.
        poll: the evaluation at work.
    """

    asked: int = 0
    at_work: dict[str, Job] = msgspec.field(default_factory=dict[str, Job])
    models: dict[int, Model] = msgspec.field(default_factory=dict[int, Model])
    taken: int = 0
    poll: Poll | None = None

    def told(self, site: str) -> int:
        """The round that a site is told: the version of what is open for it; else the server's own."""
        if (job := self.at_work.get(site)) is not None:
            return job.round
        if (held := self.accepted.get(site)) is not None:
            return held.claim.round
        if self.poll is not None and site in self.poll.awaited:
            return self.poll.round
        return self.round

    def task(self, site: str) -> Stamp | None:
        """What a site is asked for now."""
        if (job := self.at_work.get(site)) is not None:
            return job.stamp
        poll = self.poll
        if poll is not None and poll.base and site in poll.awaited and site not in self.accepted:
            return poll.round, 0
        return None

    @property
    def needed(self) -> frozenset[int]:
        """Versions of models of which somebody may still be in need."""
        mine = frozenset() if self.poll is None else frozenset({self.poll.round})
        return frozenset(self.models) | mine | {self.round}


Handled = tuple[State, Effects]
_Membership = core.Joined | core.Left | core.SitePaused | core.Revoked


def handle(plan: Plan, state: State, event: core.Event, now: float) -> Handled:
    """The state after an event, and what must be done; as `coordinator.handle`."""
    return TABLE[type(event)](plan, state, event, max(now, state.now))


def replay(plan: Plan, entries: Iterable[core.Entry]) -> State:
    """The state that recorded events make.

    Raises:
        RunError: entries that this plan's events cannot have made.
    """
    made = core.replay(plan, entries, handle, State())
    assert isinstance(made, State)
    return made


# --- parts of handlers ------------------------------------------------------------------------------------------------


def _on(plan: Plan, state: State, now: float) -> Handled:
    """Whatever its time has come for."""
    then: Effects = ()
    if state.phase in (Phase.PAUSED, Phase.FINISHED, Phase.STOPPED):
        return _looked(state), ()
    if state.phase is Phase.GATHERING and state.model and len(state.active) >= max(plan.least, plan.size):
        state = replace(state, phase=Phase.OPENING, attempt=TRY, wanted=plan.size, population=_population(state))
        then = (_opening(state),)
    if state.kind == "train" and state.phase is Phase.COLLECTING:
        if len(state.accepted) >= plan.size:
            state = replace(state, phase=Phase.REDUCING, taken=plan.size)
            then = (_step(state),)
        else:
            state = _filled(plan, state, now)
    state, more = _polled(plan, state)
    return _looked(state), then + more


def _population(state: State) -> int:
    return sum(s.status != "revoked" for s in state.sites.values())


def _opening(state: State) -> Open:
    known = state.models.get(state.round)
    if known is not None:
        return Open(state.round, TRY, (), known.population, known.base)
    return Open(state.round, TRY, (), state.population, "")


def _asking(poll: Poll) -> Open:
    return Open(poll.round, 0, poll.cohort, poll.population, poll.base)


def _step(state: State) -> Reduce:
    """The first updates that wait, by version and site: whoever was faster, the same updates make the same model."""
    taken = list(state.accepted.values())[: state.taken]
    order = sorted(taken, key=lambda a: (a.claim.round, a.claim.site))
    return Reduce(state.round, TRY, tuple(order))


def _adding(poll: Poll) -> Reduce:
    return Reduce(poll.round, 0, tuple(poll.said[s] for s in sorted(poll.said)))


def _free(state: State) -> list[str]:
    """Who can be asked to train."""
    busy = {*state.at_work, *state.accepted, *(state.poll.awaited if state.poll is not None else ())}
    return [s for s in state.active if s not in busy]


def _filled(plan: Plan, state: State, now: float) -> State:
    """Give free places to sites, in the order of a simulation; where nobody is left to ask, whoever failed is asked
    again, up to the plan's attempts.
    """
    places = plan.concurrency - len(state.at_work)
    free = _free(state)
    fresh = [s for s in free if s not in state.excluded]
    waits = state.poll is not None and bool(state.poll.awaited)
    if free and not fresh and not state.at_work and not waits:
        if state.tries + 1 >= plan.attempts:
            why = "; ".join(f"{s}: {r.rstrip('.')}" for s, r in sorted(state.excluded.items())[:5])
            reason = (
                f"step {state.round + 1} had {len(state.accepted)} of {plan.size} updates, and nobody is left to ask "
                f"after {plan.attempts} attempts ({why})."
            )
            return replace(state, phase=Phase.PAUSED, back=Phase.COLLECTING, reason=reason)
        state, fresh = replace(state, tries=state.tries + 1, excluded={}), free
    if places <= 0 or not fresh:
        return state
    there = state.active
    first = sampling.fixed(min(plan.concurrency, len(there))).cohort(plan.seed, state.round, there)
    order = [there[int(i)] for i in numpy_generator(plan.seed, "asked", state.round).permutation(len(there))]
    allowed = set(fresh)
    chosen = [s for s in dict.fromkeys([*first, *order]) if s in allowed][:places]
    deadline = None if plan.deadline is None else now + plan.deadline
    given = {s: Job(state.round, state.asked + i + 1, deadline) for i, s in enumerate(chosen)}
    return replace(state, at_work={**state.at_work, **given}, asked=state.asked + len(given))


def _polled(plan: Plan, state: State) -> Handled:
    """Add an evaluation up when nobody is awaited; behind the last step begin the last one, or finish."""
    then: Effects = ()
    poll = state.poll
    if poll is not None and not poll.adding and not poll.awaited:
        if poll.said:
            poll = replace(poll, adding=True, deadline=None)
            state, then = replace(state, poll=poll), (_adding(poll),)
        else:
            state, poll = replace(state, poll=None, evaluated=poll.round), None
    if poll is None and state.round >= plan.rounds:
        if _due(plan, state) and state.active:
            state, then = _begun(state)
        else:
            reason = f"all {plan.rounds} steps are made."
            evaluated = state.round if plan.evaluate else state.evaluated
            state = replace(state, phase=Phase.FINISHED, kind="train", evaluated=evaluated, reason=reason)
            then = (Forget(state.round + 1),)
    return state, then


def _due(plan: Plan, state: State) -> bool:
    """Whether the model of this version is to be evaluated."""
    reached = state.round >= plan.rounds or (plan.evaluate > 0 and state.round % plan.evaluate == 0)
    return plan.evaluate > 0 and reached and state.round > state.evaluated


def _begun(state: State) -> Handled:
    """Ask everybody who is there what the model is worth."""
    poll = Poll(state.round, tuple(state.active), _population(state))
    return replace(state, poll=poll), (_asking(poll),)


def _looked(state: State) -> State:
    """The same state, where what follows from the rest of it is as it must be."""
    used = {j.round for j in state.at_work.values()} | {state.round}
    models = {v: m for v, m in state.models.items() if v in used}
    asked = {*state.at_work, *(state.poll.awaited if state.poll is not None else ())}
    cohort = tuple(sorted(asked))
    phase, poll = state.phase, state.poll
    if state.kind == "evaluate" and poll is not None and phase is not Phase.PAUSED:
        phase = Phase.REDUCING if poll.adding else Phase.COLLECTING if poll.base else Phase.OPENING
    return replace(
        state, phase=phase, models=models if models != state.models else state.models,
        cohort=cohort if cohort != state.cohort else state.cohort,
    )  # fmt: skip


def _without(state: State, site: str, why: str | None = None) -> State:
    """A site's task is over without its update; it is not asked again before the next step, where there is a reason."""
    at_work = {s: j for s, j in state.at_work.items() if s != site}
    excluded = state.excluded if why is None else {**state.excluded, site: why}
    return replace(state, at_work=at_work, excluded=excluded)


def _again(plan: Plan, state: State, now: float) -> Handled:
    """Take up a phase whose effects were lost, or held back; how long nobody could deliver is not known."""
    then: Effects = ()
    if state.kind == "train" and state.phase in (Phase.OPENING, Phase.COLLECTING, Phase.REDUCING):
        then = (_opening(state),)
        if state.phase is Phase.REDUCING:
            then += (_step(state),)
    if plan.deadline is not None:
        renewed = {s: replace(j, deadline=now + plan.deadline) for s, j in state.at_work.items()}
        state = replace(state, at_work=renewed)
    poll = state.poll
    if poll is not None and state.phase not in (Phase.PAUSED, Phase.FINISHED, Phase.STOPPED):
        then += (_asking(poll), *((_adding(poll),) if poll.adding else ()))
        if poll.deadline is not None:
            state = replace(state, poll=replace(poll, deadline=now + plan.patience))
    return state, then


def _waits(plan: Plan, state: State, site: str) -> Reply:
    return Reply(site, Wait(plan.run, state.told(site), state.sites[site].counted))


def _known(plan: Plan, state: State, site: str, claim: Deliver) -> Effects:
    """The answer to an update of which there is one already: the same one is acknowledged again, another refused."""
    past, stamp = state.sites[site], (claim.round, claim.attempt)
    there = dict[Stamp, str]()
    if past.counted is not None:
        there[past.counted] = past.sha256
    said = {} if state.poll is None else state.poll.said
    for held in (state.accepted.get(site), said.get(site)):
        if held is not None:
            there[held.claim.round, held.claim.attempt] = held.claim.sha256
    if stamp not in there:
        return ()
    if there[stamp] == claim.sha256:
        return (Reply(site, Received(plan.run, claim.round, claim.attempt, past.counted)),)
    refusal = refuse(plan, state, site, claim, "conflict", "another update of this site and task was accepted.")
    return Alarm(site, "sent two different updates for the same task"), refusal


# --- handlers ---------------------------------------------------------------------------------------------------------


def _started(plan: Plan, state: State, event: core.Started, now: float) -> Handled:
    if state.model:
        return misplaced(plan, state, event, now)
    after, then = _on(plan, replace(state, model=event.model, experiment=event.experiment), now)
    return recorded(state, after, event, now, then)


def _restarted(plan: Plan, state: State, event: core.Restarted, now: float) -> Handled:
    after, then = _again(plan, state, now)
    return recorded(state, after, event, now, then)


def _member(
    plan: Plan, state: State, event: core.Joined | core.Left | core.SitePaused | core.Revoked, now: float
) -> Handled:
    """A site comes, goes, rests or is shut out."""
    known = state.sites.get(event.site)
    if isinstance(event, core.Joined):
        if known is not None and known.status == "revoked":
            return state, (Alarm(event.site, "a revoked site tried to join"),)
        if not named_well(event.site):
            return state, (Alarm(event.site, "a site cannot have this name"),)
        new, key = "active", event.key
    else:
        if known is None or known.status == "revoked":
            return state, ()
        new, key = _GONE[type(event)], known.key
    if known is not None and (known.status, known.key) == (new, key):
        return state, ()
    site = replace(known or core.Site(), status=new, key=key)
    after = replace(state, sites={**state.sites, event.site: site})
    if new != "active":
        after = _without(after, event.site)  # who comes back is given a task of its own
        if after.poll is not None and event.site in after.poll.awaited:
            out = {**after.poll.out, event.site: f"the site is {new}."}
            after = replace(after, poll=replace(after.poll, out=out))
    elif known is not None and known.status != "active":
        after = replace(after, excluded={s: r for s, r in after.excluded.items() if s != event.site})
    if new == "revoked":
        # What is being combined stays: it was admitted while its site was.
        fixed = list(after.accepted)[: after.taken]
        after = replace(after, accepted={s: a for s, a in after.accepted.items() if s in fixed or s != event.site})
    after, then = _on(plan, after, now)
    return recorded(state, after, event, now, then)


_GONE: dict[type, Any] = {core.Left: "left", core.SitePaused: "paused", core.Revoked: "revoked"}


def _opened(plan: Plan, state: State, event: core.Opened, now: float) -> Handled:
    poll = state.poll
    if event.attempt == 0:
        if poll is None or poll.round != event.round or poll.base or state.phase is Phase.PAUSED:
            return misplaced(plan, state, event, now)
        after = replace(state, poll=replace(poll, base=event.base, deadline=now + plan.patience))
    elif state.phase is Phase.OPENING and (event.round, event.attempt) == (state.round, TRY):
        models = {**state.models, state.round: Model(event.base, state.population)}
        after = replace(state, phase=Phase.COLLECTING, base=event.base, models=models)
    else:
        return misplaced(plan, state, event, now)
    after, then = _on(plan, after, now)
    return recorded(state, after, event, now, then)


def _asked(plan: Plan, state: State, event: core.Asked, now: float) -> Handled:
    site = state.sites.get(event.site)
    if site is None or site.status == "revoked":
        cause: Cause = "unknown site" if site is None else "revoked"
        return state, (Reply(event.site, Refused(plan.run, 0, 0, cause, "", 0, None)),)
    if state.phase in (Phase.FINISHED, Phase.STOPPED):
        return state, (Reply(event.site, Ended(plan.run, state.round, plain(state.reason), site.counted)),)
    task = state.task(event.site)
    if task is not None and task != event.at and state.phase is not Phase.PAUSED:
        return state, (Offer(event.site, site.counted),)
    return state, (_waits(plan, state, event.site),)


def _submitted(plan: Plan, state: State, event: core.Submitted, now: float) -> Handled:
    site, claim, finding = event.site, event.claim, event.finding
    early = identified(plan, state, site, claim) or _known(plan, state, site, claim)
    if early:
        return state, early

    def refused(cause: Cause, detail: str) -> Handled:
        return state, (refuse(plan, state, site, claim, cause, detail),)

    if state.task(site) != (claim.round, claim.attempt):
        why = None if state.poll is None or claim.attempt else state.poll.out.get(site)
        return refused("stale", why or f"this task is over: {state.round} steps are made.")
    if state.phase is Phase.PAUSED:
        return refused("busy", f"the run is paused: {state.reason}")
    if not claim.attempt:
        return _said(plan, state, event, now)
    base = state.models[claim.round].base
    step = state.round + len(state.accepted) // plan.size
    if step >= plan.rounds:
        return refused("busy", "the last step has its updates.")
    if plan.limit is not None and step - claim.round > plan.limit:
        told = f"the update is {step - claim.round} steps old, more than the limit of {plan.limit}."
        after, then = _on(plan, _without(state, site), now)
        return recorded(state, after, event, now, (refuse(plan, state, site, claim, "stale", told), *then))
    if claim.base != base:
        return refused("base", "the update was made from another task.")
    if finding.fault == "transport":
        return refused("transport", finding.detail)
    if finding.fault:
        after, then = _on(plan, _without(state, site, finding.detail), now)
        refusal = refuse(plan, state, site, claim, "content", finding.detail)
        return recorded(state, after, event, now, (refusal, *then))
    twins = [s for s, a in state.accepted.items() if a.claim.sha256 == claim.sha256]
    alarms = (Alarm(site, f"sent the very bytes of {', '.join(twins[:5])}"),) if twins else ()
    accepted = {**state.accepted, site: Accepted(claim, finding.weight, finding.norm)}
    after, then = _on(plan, replace(_without(state, site), accepted=accepted), now)
    reply = Reply(site, Received(plan.run, claim.round, claim.attempt, state.sites[site].counted))
    return recorded(state, after, event, now, (reply, *alarms, *then), first=(core.Store(claim),))


def _said(plan: Plan, state: State, event: core.Submitted, now: float) -> Handled:
    """What a site says of a model; it was asked for it."""
    site, claim, finding, poll = event.site, event.claim, event.finding, state.poll
    assert poll is not None
    if claim.base != poll.base:
        return state, (refuse(plan, state, site, claim, "base", "it is about another model."),)
    if finding.fault == "transport":
        return state, (refuse(plan, state, site, claim, "transport", finding.detail),)
    if finding.fault:
        shut = replace(poll, out={**poll.out, site: finding.detail})
        after, then = _on(plan, replace(state, poll=shut), now)
        refusal = refuse(plan, state, site, claim, "content", finding.detail)
        return recorded(state, after, event, now, (refusal, *then))
    heard = replace(poll, said={**poll.said, site: Accepted(claim, finding.weight, finding.norm)})
    after, then = _on(plan, replace(state, poll=heard), now)
    reply = Reply(site, Received(plan.run, claim.round, claim.attempt, state.sites[site].counted))
    return recorded(state, after, event, now, (reply, *then), first=(core.Store(claim),))


def _declined(plan: Plan, state: State, event: core.Declined, now: float) -> Handled:
    site, claim = event.site, event.claim
    early = identified(plan, state, site, claim)
    if early:
        return state, early
    if state.task(site) != (claim.round, claim.attempt):
        return state, (_waits(plan, state, site),)
    if claim.attempt:
        changed = _without(state, site, claim.reason)
    else:
        assert state.poll is not None
        changed = replace(state, poll=replace(state.poll, out={**state.poll.out, site: claim.reason}))
    after, then = _on(plan, changed, now)
    return recorded(state, after, event, now, (_waits(plan, changed, site), *then))


def _spoke(plan: Plan, state: State, event: core.Spoke | core.Abstained, now: float) -> Handled:
    return state, (refuse(plan, state, event.site, event.claim, "turn", "there is no secure sum."),)


def _reduced(plan: Plan, state: State, event: core.Reduced, now: float) -> Handled:
    if state.phase is not Phase.REDUCING or not state.taken or event.multiplier:
        return misplaced(plan, state, event, now)
    if (event.round, event.attempt) != (state.round, TRY):
        return misplaced(plan, state, event, now)
    sites, made = dict(state.sites), state.round + 1
    for name, update in list(state.accepted.items())[: state.taken]:
        stamp = (update.claim.round, update.claim.attempt)
        sites[name] = replace(sites[name], counted=stamp, sha256=update.claim.sha256)
    late = [s for s, j in state.at_work.items() if plan.limit is not None and made - j.round > plan.limit]
    last = made >= plan.rounds
    after = replace(
        state, phase=Phase.OPENING, round=made, base="", model=event.model, sites=sites, excluded={}, tries=0, taken=0,
        accepted=dict(list(state.accepted.items())[state.taken :]), population=_population(state),
        at_work={} if last else {s: j for s, j in state.at_work.items() if s not in late},
        kind="evaluate" if last else "train", attempt=0 if last else TRY,
    )  # fmt: skip
    then: Effects = (Forget(made),)
    if not last:
        then += (_opening(after),)
        if after.poll is None and _due(plan, after):
            after, more = _begun(after)
            then += more
    after, more = _on(plan, after, now)
    return recorded(state, after, event, now, then + more)


def _evaluated(plan: Plan, state: State, event: core.Evaluated, now: float) -> Handled:
    poll = state.poll
    if poll is None or not poll.adding or poll.round != event.round or state.phase is Phase.PAUSED:
        return misplaced(plan, state, event, now)
    after, then = _on(plan, replace(state, poll=None, evaluated=poll.round), now)
    return recorded(state, after, event, now, (Forget(state.round), *then))


def _failed(plan: Plan, state: State, event: core.Failed, now: float) -> Handled:
    poll = state.poll
    if state.phase in (Phase.PAUSED, Phase.FINISHED, Phase.STOPPED):
        return misplaced(plan, state, event, now)
    if event.attempt == 0:
        if poll is None or poll.round != event.round:
            return misplaced(plan, state, event, now)
        after, then = _on(plan, replace(state, poll=None, evaluated=poll.round), now)
        return recorded(state, after, event, now, then)
    if (event.round, event.attempt) != (state.round, TRY) or state.kind != "train":
        return misplaced(plan, state, event, now)
    after = _looked(replace(state, phase=Phase.PAUSED, back=state.phase, reason=event.reason))
    return recorded(state, after, event, now)


def _ticked(plan: Plan, state: State, event: core.Ticked, now: float) -> Handled:
    if state.phase in (Phase.PAUSED, Phase.FINISHED, Phase.STOPPED):
        return state, ()
    silent = [s for s, j in state.at_work.items() if j.deadline is not None and j.deadline <= now]
    poll = state.poll
    late = poll is not None and poll.deadline is not None and poll.deadline <= now and bool(poll.awaited)
    if not silent and not late:
        return state, ()
    after = state
    for site in silent:
        after = _without(after, site, f"no update in {plan.deadline:g} s")
    if late:
        assert poll is not None
        gone = {**poll.out, **dict.fromkeys(poll.awaited, "no answer in time")}
        after = replace(after, poll=replace(poll, out=gone))
    after, then = _on(plan, after, now)
    return recorded(state, after, event, now, then)


def _paused(plan: Plan, state: State, event: core.Pause, now: float) -> Handled:
    if state.phase in (Phase.PAUSED, Phase.FINISHED, Phase.STOPPED):
        return misplaced(plan, state, event, now)
    return recorded(state, replace(state, phase=Phase.PAUSED, back=state.phase, reason=event.reason), event, now)


def _resumed(plan: Plan, state: State, event: core.Resume, now: float) -> Handled:
    if state.phase is not Phase.PAUSED:
        return misplaced(plan, state, event, now)
    back, then = _again(plan, replace(state, phase=state.back, reason="", tries=0, excluded={}), now)
    after, more = _on(plan, back, now)
    return recorded(state, after, event, now, (*then, *more))


def _discarded(plan: Plan, state: State, event: core.Discard, now: float) -> Handled:
    """The updates that wait are given up; whose they are hears of it by its next task. At the end it is the last
    evaluation that is.
    """
    if state.phase is not Phase.PAUSED:
        return misplaced(plan, state, event, now)
    after = replace(state, accepted={}, taken=0, reason=event.reason)
    if state.kind == "evaluate":
        after = replace(after, poll=None, evaluated=state.round)
    elif state.back is Phase.REDUCING:
        after = replace(after, back=Phase.COLLECTING)
    return recorded(state, _looked(after), event, now)


def _stopped(plan: Plan, state: State, event: core.Stop, now: float) -> Handled:
    if state.phase in (Phase.FINISHED, Phase.STOPPED):
        return misplaced(plan, state, event, now)
    after = replace(state, phase=Phase.STOPPED, accepted={}, taken=0, at_work={}, poll=None, reason=event.reason)
    return recorded(state, _looked(after), event, now, (Forget(state.round + 1),))


TABLE: dict[type, Any] = {
    core.Started: _started, core.Restarted: _restarted, core.Joined: _member, core.Left: _member,
    core.SitePaused: _member, core.Revoked: _member, core.Opened: _opened, core.Asked: _asked,
    core.Submitted: _submitted, core.Declined: _declined, core.Spoke: _spoke, core.Abstained: _spoke,
    core.Advanced: misplaced, core.Summed: misplaced, core.Voided: misplaced, core.Reduced: _reduced,
    core.Evaluated: _evaluated, core.Failed: _failed, core.Ticked: _ticked, core.Pause: _paused,
    core.Resume: _resumed, core.Discard: _discarded, core.Stop: _stopped,
}  # fmt: skip
"""What handles an event: every one is there, and looks at the phase itself."""
