"""The server's side of a run as a pure state machine: `handle(plan, state, event, now) -> (state, effects)`.

    GATHERING  -> enough sites are there         -> OPENING     a cohort is chosen; its task is being made
    OPENING    -> Opened                         -> COLLECTING  sites of the cohort are offered the task
    COLLECTING -> all wanted, or quorum in time  -> REDUCING    the set of updates is fixed; they are combined
    COLLECTING -> too few in time                -> GATHERING   another attempt at the same round, or PAUSED
    REDUCING   -> Reduced                        -> GATHERING   the next round, or FINISHED
    any        -> Pause, a fault                 -> PAUSED      Resume goes on where it was
    PAUSED     -> Discard                        -> PAUSED      the attempt is void: Resume begins another

Nothing here reads a clock, a file or a socket. Effects are carried out in their order, and the new state is taken when
all went well; what changes the state comes with a `Record`, which must be durable before any answer behind it leaves.
So the state is always what its recorded events make of an empty one (`replay`), wherever the server was killed.

Whoever acts for a site is authenticated by the transport: the `site` of an event is that identity, and a message that
claims another is refused.

What a site is told is final stays so: a refused update is never accepted later, whatever else arrives, because whoever
is shut out of an attempt stays out until the next.
"""

import math
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Literal

import msgspec
from msgspec.structs import replace

from atoll import random, sampling
from atoll.errors import RunError, invalid
from atoll.net.admission import Finding
from atoll.net.control import Answer, Cause, Decline, Deliver, Ended, Received, Refused, Stamp, Wait, named_well, plain


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a run asks for.

    Attributes:
        run: its name.
        rounds: how many.
        seed: of cohorts.
        cohort: updates wanted in a round; None: one of every site that is there.
        least: sites that must be there before a round opens.
        over: how many times the wanted number of sites is asked (over-selection), at least 1.
        quorum: updates with which a round may close when no more can come, or the deadline is over; None: all wanted.
        deadline: seconds after which a round does not wait for the wanted number; None: it waits.
        attempts: how often a round is tried before the run pauses.
        keep: whether an accepted update still counts in a later attempt at its round. It may not where what a site
            sends depends on the cohort, as under a summing channel; updates of a failed attempt are then void.
    """

    run: str
    rounds: int
    seed: int = 0
    cohort: int | None = None
    least: int = 1
    over: float = 1.0
    quorum: int | None = None
    deadline: float | None = None
    attempts: int = 3
    keep: bool = True

    def __post_init__(self) -> None:
        if not named_well(self.run):
            raise invalid("run", self.run, "a name of A-z 0-9 . _ @ - and blanks, at most 200 characters")
        for name in ("rounds", "least", "attempts"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "a number of at least 1")
        if self.cohort is not None and self.cohort < 1:
            raise invalid("cohort", self.cohort, "a number of sites of at least 1, or None")
        if not 1 <= self.over < math.inf:
            raise invalid("over", self.over, "a finite factor of at least 1")
        if self.quorum is not None and not 1 <= self.quorum <= (self.cohort or self.quorum):
            raise invalid("quorum", self.quorum, "from 1 to the cohort")
        if self.deadline is not None and not 0 < self.deadline < math.inf:
            raise invalid("deadline", self.deadline, "seconds above 0, or None")


class Phase(StrEnum):
    """Where a run is."""

    GATHERING = "gathering"
    OPENING = "opening"
    COLLECTING = "collecting"
    REDUCING = "reducing"
    PAUSED = "paused"
    FINISHED = "finished"
    STOPPED = "stopped"


class Site(msgspec.Struct, frozen=True):
    """What is known of a site.

    Attributes:
        status: "active"; "paused" by its owner; "left", and may come back; "revoked" for good.
        counted: round and attempt of its update that was counted last.
        sha256: hash of that update.
    """

    status: Literal["active", "paused", "left", "revoked"] = "active"
    counted: Stamp | None = None
    sha256: str = ""


class Accepted(msgspec.Struct, frozen=True):
    """An update that is on disk.

    Attributes:
        claim: its message.
        weight: as found.
        norm: as found.
    """

    claim: Deliver
    weight: float
    norm: float


class State(msgspec.Struct, frozen=True):
    """Everything the coordinator knows.

    Attributes:
        phase: where the run is.
        number: events recorded so far.
        now: seconds, of the last recorded event; never goes back.
        round: the round at work, from 0.
        attempt: at this round, from 1; 0 before the first.
        tries: attempts since the round began or the run was resumed.
        base: hash of the task's frame; "" while it is not made.
        model: hash of the checkpoint the round starts from.
        experiment: hash of what is trained and how.
        cohort: sites of the attempt, sorted.
        population: sites there were when the attempt began.
        wanted: updates with which the attempt closes at once.
        deadline: when the attempt stops to wait; None: never.
        accepted: updates on disk, by site.
        excluded: sites that will not answer this attempt, and why.
        sites: every site there ever was.
        reason: why the run is paused, or over.
        back: the phase `Resume` goes back to.
    """

    phase: Phase = Phase.GATHERING
    number: int = 0
    now: float = 0.0
    round: int = 0
    attempt: int = 0
    tries: int = 0
    base: str = ""
    model: str = ""
    experiment: str = ""
    cohort: tuple[str, ...] = ()
    population: int = 0
    wanted: int = 0
    deadline: float | None = None
    accepted: dict[str, Accepted] = {}
    excluded: dict[str, str] = {}
    sites: dict[str, Site] = {}
    reason: str = ""
    back: Phase = Phase.GATHERING

    @property
    def active(self) -> list[str]:
        """Sites that can be asked, sorted."""
        return sorted(n for n, s in self.sites.items() if s.status == "active")

    @property
    def outstanding(self) -> list[str]:
        """Sites of the cohort that may still answer."""
        return [s for s in self.cohort if s not in self.accepted and s not in self.excluded]

    def awaits(self, site: str) -> bool:
        """Whether this attempt may still have an answer from a site."""
        return site in self.cohort and site not in self.accepted and site not in self.excluded


# --- events -----------------------------------------------------------------------------------------------------------


class _Event(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


class Started(_Event, frozen=True):
    """The run begins from a checkpoint with the hash `model`; `experiment` is that of its plan and process."""

    model: str
    experiment: str = ""


class Restarted(_Event, frozen=True):
    """The server came back after a stop or a crash: clocks may have jumped, and unrecorded work is lost."""


class Joined(_Event, frozen=True):
    """A site is there, for the first time or again."""

    site: str


class Left(_Event, frozen=True):
    """A site is gone and may come back."""

    site: str


class SitePaused(_Event, frozen=True):
    """A site's owner lets it rest."""

    site: str


class Revoked(_Event, frozen=True):
    """A site is shut out for good."""

    site: str


class Opened(_Event, frozen=True):
    """The task of an attempt is made; its frame has the hash `base`."""

    round: int
    attempt: int
    base: str


class Asked(_Event, frozen=True):
    """A site asks for work; `at` is what it is working on."""

    site: str
    at: Stamp | None = None


class Submitted(_Event, frozen=True):
    """A site sent an update, which was examined."""

    site: str
    claim: Deliver
    finding: Finding


class Declined(_Event, frozen=True):
    """A site will not answer an attempt."""

    site: str
    claim: Decline


class Reduced(_Event, frozen=True):
    """A round's updates are combined and the next model is on disk; its checkpoint has the hash `model`."""

    round: int
    attempt: int
    model: str


class Failed(_Event, frozen=True):
    """A task could not be made, or updates could not be combined, and trying again would not help."""

    round: int
    attempt: int
    reason: str


class Ticked(_Event, frozen=True):
    """Time has passed."""


class Pause(_Event, frozen=True):
    """Somebody lets the run rest."""

    reason: str


class Resume(_Event, frozen=True):
    """Somebody lets the run go on."""


class Discard(_Event, frozen=True):
    """Somebody gives up the updates of the attempt at work: they cannot be combined, or a site must not count."""

    reason: str


class Stop(_Event, frozen=True):
    """Somebody ends the run."""

    reason: str


Event = (
    Started | Restarted | Joined | Left | SitePaused | Revoked | Opened | Asked | Submitted | Declined | Reduced
    | Failed | Ticked | Pause | Resume | Discard | Stop
)  # fmt: skip


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A recorded event: its number from 0, its time in seconds, and the event."""

    number: int
    now: float
    event: Event


# --- effects ----------------------------------------------------------------------------------------------------------


class Store(msgspec.Struct, frozen=True):
    """Make the frame of this update durable."""

    claim: Deliver


class Record(msgspec.Struct, frozen=True):
    """Make this entry durable; nothing behind it may happen before."""

    entry: Entry


class Reply(msgspec.Struct, frozen=True):
    """Answer the site whose message is being handled."""

    site: str
    answer: Answer


class Offer(msgspec.Struct, frozen=True):
    """Answer with the attempt's task."""

    site: str
    counted: Stamp | None


class Open(msgspec.Struct, frozen=True):
    """Make the task of this attempt; when `base` is "" tell its hash by `Opened`, else it must have this one."""

    round: int
    attempt: int
    cohort: tuple[str, ...]
    population: int
    base: str


class Reduce(msgspec.Struct, frozen=True):
    """Combine these updates in this order, store the next model, then tell by `Reduced`."""

    round: int
    attempt: int
    updates: tuple[Accepted, ...]


class Forget(msgspec.Struct, frozen=True):
    """Updates of rounds before this one are no longer needed."""

    round: int


class Alarm(msgspec.Struct, frozen=True):
    """Something that an honest site does not do; for the audit and the operator."""

    site: str
    text: str


class Misplaced(msgspec.Struct, frozen=True):
    """The event has no place in this phase and changed nothing."""

    event: str
    phase: Phase


Effect = Store | Record | Reply | Offer | Open | Reduce | Forget | Alarm | Misplaced
Effects = tuple[Effect, ...]
Handled = tuple[State, Effects]
Handler = Callable[[Plan, State, "Event", float], Handled]


def handle(plan: Plan, state: State, event: Event, now: float) -> Handled:
    """The state after an event, and what must be done.

    Args:
        plan: of the run.
        state: before.
        event: what happened.
        now: seconds on any clock; one that goes back is taken to stand still.
    """
    return TABLE[state.phase, type(event)](plan, state, event, max(now, state.now))


def replay(plan: Plan, entries: Iterable[Entry]) -> State:
    """The state that recorded events make.

    Raises:
        RunError: entries that this plan's events cannot have made.
    """
    state = State()
    for entry in entries:
        if entry.number != state.number:
            raise RunError(f"the journal has entry {entry.number} where {state.number} belongs: it is damaged.")
        state, effects = handle(plan, state, entry.event, entry.now)
        if not any(isinstance(e, Record) for e in effects):
            raise RunError(
                f"entry {entry.number} ({type(entry.event).__name__}) has no place in the journal: it belongs to "
                "another plan or version."
            )
    return state


# --- parts of handlers ------------------------------------------------------------------------------------------------


def _recorded(
    before: State, after: State, event: Event, now: float, then: Effects = (), *, first: Effects = ()
) -> Handled:
    entry = Entry(before.number, now, event)
    return replace(after, number=before.number + 1, now=now), (*first, Record(entry), *then)


def _settled(plan: Plan, state: State, now: float, *, late: bool = False) -> Handled:
    """Go on to the next phase if its time has come."""
    if state.phase is Phase.GATHERING:
        return _gathered(plan, state)
    if state.phase is not Phase.COLLECTING:
        return state, ()
    count = len(state.accepted)
    if count >= state.wanted or ((late or not state.outstanding) and count >= (plan.quorum or state.wanted)):
        chosen = replace(state, phase=Phase.REDUCING, deadline=None)
        return chosen, (_reduction(chosen),)
    if late or not state.outstanding:
        return _tried(plan, state)
    return state, ()


def _again(plan: Plan, state: State, now: float) -> Handled:
    """Take up a phase whose effects were lost, or held back."""
    reopened = Open(state.round, state.attempt, state.cohort, state.population, state.base)
    if state.phase is Phase.OPENING:
        return state, (reopened,)
    if state.phase is Phase.COLLECTING:
        # How long nobody could deliver is not known: sites get the whole time again.
        return replace(state, deadline=None if plan.deadline is None else now + plan.deadline), (reopened,)
    if state.phase is Phase.REDUCING:
        return state, (reopened, _reduction(state))
    return state, ()


def _reduction(state: State) -> Reduce:
    order = tuple(state.accepted[s] for s in sorted(state.accepted))
    return Reduce(state.round, state.attempt, order)


def _tried(plan: Plan, state: State) -> Handled:
    """An attempt that came to nothing."""
    why = "; ".join(f"{s}: {r}" for s, r in sorted(state.excluded.items())[:5]) or "nobody else answered in time"
    kept = state.accepted if plan.keep else {}
    after = replace(state, phase=Phase.GATHERING, accepted=kept, deadline=None, base="")
    if state.tries >= plan.attempts:
        reason = (
            f"round {state.round + 1} had {len(state.accepted)} of {plan.quorum or state.wanted} updates in each of "
            f"{state.tries} attempts ({why})."
        )
        return replace(after, phase=Phase.PAUSED, back=Phase.GATHERING, reason=reason), ()
    return _gathered(plan, after)


def _gathered(plan: Plan, state: State) -> Handled:
    """Begin an attempt if enough sites are there."""
    held = [s for s in sorted(state.accepted) if state.sites[s].status != "revoked"]
    there = sorted({*state.active, *held})
    if not state.model or len(there) < max(plan.least, plan.quorum or plan.cohort or 1):
        return state, ()
    attempt = state.attempt + 1
    wanted = len(there) if plan.cohort is None else min(plan.cohort, len(there))
    asked = len(there) if plan.cohort is None else min(len(there), math.ceil(plan.cohort * plan.over))
    cohort = _chosen(plan, state, there, held, asked, attempt)
    population = sum(s.status != "revoked" for s in state.sites.values())
    after = replace(
        state,
        phase=Phase.OPENING, attempt=attempt, tries=state.tries + 1, base="", cohort=cohort, population=population,
        wanted=wanted, excluded={},
    )  # fmt: skip
    return after, (Open(state.round, attempt, cohort, population, ""),)


def _chosen(plan: Plan, state: State, there: list[str], held: list[str], asked: int, attempt: int) -> tuple[str, ...]:
    """A cohort: whoever has delivered already, then sites that did not fail before, then the others."""
    if attempt == 1 and not held:
        # The very cohort of a simulation with the same seed.
        return sampling.fixed(asked).cohort(plan.seed, state.round, there)
    key = random.key(plan.seed, "cohort", "attempt", attempt)
    others = [s for s in there if s not in held]
    words = random.words(key, state.round, random.client_keys(others), 1)[:, 0].tolist()
    failed = set(state.cohort)  # of the attempt before, and not held
    order = sorted(range(len(others)), key=lambda i: (others[i] in failed, words[i], others[i]))
    return tuple(sorted([*held, *(others[i] for i in order[: max(0, asked - len(held))])]))


def _counted(state: State, site: str) -> Stamp | None:
    return state.sites[site].counted if site in state.sites else None


def _refusal(plan: Plan, state: State, site: str, claim: Deliver | Decline, cause: Cause, detail: str) -> Reply:
    answer = Refused(plan.run, claim.round, claim.attempt, cause, plain(detail), state.round, _counted(state, site))
    return Reply(site, answer)


# --- handlers ---------------------------------------------------------------------------------------------------------


def _misplaced(plan: Plan, state: State, event: Event, now: float) -> Handled:
    return state, (Misplaced(type(event).__name__, state.phase),)


def _started(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Started)
    if state.model:
        return _misplaced(plan, state, event, now)
    after, then = _settled(plan, replace(state, model=event.model, experiment=event.experiment), now)
    return _recorded(state, after, event, now, then)


def _restarted(plan: Plan, state: State, event: Event, now: float) -> Handled:
    after, then = _again(plan, state, now)
    return _recorded(state, after, event, now, then)


def _member(plan: Plan, state: State, event: Event, now: float) -> Handled:
    """A site comes, goes, rests or is shut out."""
    assert isinstance(event, Joined | Left | SitePaused | Revoked)
    known = state.sites.get(event.site)
    if isinstance(event, Joined):
        if known is not None and known.status == "revoked":
            return state, (Alarm(event.site, "a revoked site tried to join"),)
        if not named_well(event.site):
            return state, (Alarm(event.site, "a site cannot have this name"),)
        new = "active"
    else:
        new = {Left: "left", SitePaused: "paused", Revoked: "revoked"}[type(event)]
        if known is None or known.status == "revoked":
            return state, ()
    if known is not None and known.status == new:
        return state, ()
    site = replace(known or Site(), status=new)
    accepted = state.accepted
    # Once the set of a round is fixed it stays: all of its updates were admitted while their sites were.
    fixed = state.phase is Phase.REDUCING or (state.phase is Phase.PAUSED and state.back is Phase.REDUCING)
    if new == "revoked" and not fixed:
        accepted = {s: a for s, a in accepted.items() if s != event.site}
    excluded = state.excluded
    if new != "active" and event.site in state.cohort and event.site not in accepted and not fixed:
        # For the whole attempt, even if it comes back: it may have been told that its update was refused.
        excluded = {**excluded, event.site: f"the site is {new}."}
    changed = replace(state, sites={**state.sites, event.site: site}, accepted=accepted, excluded=excluded)
    after, then = _settled(plan, changed, now)
    return _recorded(state, after, event, now, then)


def _opened(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Opened)
    if (event.round, event.attempt) != (state.round, state.attempt):
        return _misplaced(plan, state, event, now)
    deadline = None if plan.deadline is None else now + plan.deadline
    after, then = _settled(plan, replace(state, phase=Phase.COLLECTING, base=event.base, deadline=deadline), now)
    return _recorded(state, after, event, now, then)


def _asked(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Asked)
    site = state.sites.get(event.site)
    if site is None or site.status == "revoked":
        cause: Cause = "unknown site" if site is None else "revoked"
        return state, (Reply(event.site, Refused(plan.run, 0, 0, cause, "", 0, None)),)
    if state.phase in (Phase.FINISHED, Phase.STOPPED):
        return state, (Reply(event.site, Ended(plan.run, state.round, plain(state.reason), site.counted)),)
    new = event.at != (state.round, state.attempt)
    if state.phase is Phase.COLLECTING and state.awaits(event.site) and new:
        return state, (Offer(event.site, site.counted),)
    return state, (Reply(event.site, Wait(plan.run, state.round, site.counted)),)


def _identified(plan: Plan, state: State, site: str, claim: Deliver | Decline) -> Effects:
    """Why a message is refused before its content matters; nothing when it is not."""
    known = state.sites.get(site)
    if known is None:
        return (_refusal(plan, state, site, claim, "unknown site", ""),)
    if known.status == "revoked":
        return (_refusal(plan, state, site, claim, "revoked", ""),)
    if claim.site != site:
        refusal = _refusal(plan, state, site, claim, "identity", "the message claims to be another site's.")
        return Alarm(site, f"sent a message that claims to be {claim.site}'s"), refusal
    if claim.run != plan.run:
        return (_refusal(plan, state, site, claim, "run", f"this is the run {plan.run}."),)
    return ()


def _known(plan: Plan, state: State, site: str, claim: Deliver) -> Effects:
    """The answer to an update of which there is one already: the same one is acknowledged again, another refused."""
    held, past = state.accepted.get(site), state.sites[site]
    stamp, sha256 = past.counted, past.sha256
    if held is not None and held.claim.round == claim.round:
        stamp, sha256 = (held.claim.round, held.claim.attempt), held.claim.sha256
    if stamp != (claim.round, claim.attempt):
        return ()
    if sha256 == claim.sha256:
        return (Reply(site, Received(plan.run, claim.round, claim.attempt, past.counted)),)
    refusal = _refusal(plan, state, site, claim, "conflict", "another update of this site and attempt was accepted.")
    return Alarm(site, "sent two different updates for the same attempt"), refusal


def _submitted(plan: Plan, state: State, event: Event, now: float) -> Handled:
    """An update while a round collects."""
    assert isinstance(event, Submitted)
    site, claim, finding = event.site, event.claim, event.finding
    early = _identified(plan, state, site, claim) or _known(plan, state, site, claim)
    if early:
        return state, early

    def refused(cause: Cause, detail: str) -> Handled:
        return state, (_refusal(plan, state, site, claim, cause, detail),)

    if (claim.round, claim.attempt) != (state.round, state.attempt):
        return refused("stale", f"attempt {state.attempt} at round {state.round + 1} is at work.")
    if site not in state.cohort:
        return refused("not in cohort", "this site was not asked.")
    if site in state.accepted:
        return refused("stale", "an update of an earlier attempt counts already.")
    if site in state.excluded:
        return refused("excluded", state.excluded[site])
    if claim.base != state.base:
        return refused("base", "the update was made from another task.")
    if finding.fault == "transport":
        return refused("transport", finding.detail)
    if finding.fault:
        changed = replace(state, excluded={**state.excluded, site: finding.detail})
        after, then = _settled(plan, changed, now)
        reply = _refusal(plan, state, site, claim, "content", finding.detail)
        return _recorded(state, after, event, now, (reply, *then))
    accepted = Accepted(claim, finding.weight, finding.norm)
    after, then = _settled(plan, replace(state, accepted={**state.accepted, site: accepted}), now)
    reply = Reply(site, Received(plan.run, claim.round, claim.attempt, state.sites[site].counted))
    twins = [s for s, a in state.accepted.items() if a.claim.sha256 == claim.sha256]
    alarms = (Alarm(site, f"sent the very bytes of {', '.join(twins[:5])}"),) if twins else ()
    return _recorded(state, after, event, now, (reply, *alarms, *then), first=(Store(claim),))


def _submitted_else(plan: Plan, state: State, event: Event, now: float) -> Handled:
    """An update in a phase that takes none."""
    assert isinstance(event, Submitted)
    site, claim = event.site, event.claim
    early = _identified(plan, state, site, claim) or _known(plan, state, site, claim)
    if early:
        return state, early
    paused = state.phase is Phase.PAUSED and state.back is Phase.COLLECTING
    if paused and (claim.round, claim.attempt) == (state.round, state.attempt):
        return state, (_refusal(plan, state, site, claim, "busy", f"the run is paused: {state.reason}"),)
    return state, (_refusal(plan, state, site, claim, "stale", f"the run is {state.phase.value}."),)


def _declined(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Declined)
    site, claim = event.site, event.claim
    early = _identified(plan, state, site, claim)
    if early:
        return state, early
    answer = Reply(site, Wait(plan.run, state.round, state.sites[site].counted))
    open_to = state.phase is Phase.COLLECTING and (claim.round, claim.attempt) == (state.round, state.attempt)
    if not open_to or not state.awaits(site):
        return state, (answer,)
    after, then = _settled(plan, replace(state, excluded={**state.excluded, site: claim.reason}), now)
    return _recorded(state, after, event, now, (answer, *then))


def _reduced(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Reduced)
    if (event.round, event.attempt) != (state.round, state.attempt):
        return _misplaced(plan, state, event, now)
    sites = dict(state.sites)
    for name, update in state.accepted.items():
        stamp = (update.claim.round, update.claim.attempt)
        sites[name] = replace(sites[name], counted=stamp, sha256=update.claim.sha256)
    done = state.round + 1 >= plan.rounds
    closed = replace(
        state,
        phase=Phase.FINISHED if done else Phase.GATHERING, round=state.round + 1, attempt=0, tries=0, base="",
        model=event.model, cohort=(), wanted=0, accepted={}, excluded={}, sites=sites,
        reason=f"all {plan.rounds} rounds are done." if done else "",
    )  # fmt: skip
    after, then = _settled(plan, closed, now)
    return _recorded(state, after, event, now, (Forget(state.round + 1), *then))


def _failed(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Failed)
    if (event.round, event.attempt) != (state.round, state.attempt):
        return _misplaced(plan, state, event, now)
    after = replace(state, phase=Phase.PAUSED, back=state.phase, reason=event.reason, deadline=None)
    return _recorded(state, after, event, now)


def _ticked(plan: Plan, state: State, event: Event, now: float) -> Handled:
    if state.deadline is None or now < state.deadline:
        return state, ()
    after, then = _settled(plan, state, now, late=True)
    return _recorded(state, after, event, now, then)


def _idle(plan: Plan, state: State, event: Event, now: float) -> Handled:
    return state, ()


def _paused(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Pause)
    after = replace(state, phase=Phase.PAUSED, back=state.phase, reason=event.reason, deadline=None)
    return _recorded(state, after, event, now)


def _resumed(plan: Plan, state: State, event: Event, now: float) -> Handled:
    back = replace(state, phase=state.back, reason="", tries=0 if state.back is Phase.GATHERING else state.tries)
    back, then = _again(plan, back, now)
    after, more = _settled(plan, back, now)
    return _recorded(state, after, event, now, (*then, *more))


def _discarded(plan: Plan, state: State, event: Event, now: float) -> Handled:
    """The attempt at work is void, as if too few had answered: its sites are told by the next one's task."""
    assert isinstance(event, Discard)
    after = replace(state, back=Phase.GATHERING, accepted={}, excluded={}, base="", reason=event.reason)
    return _recorded(state, after, event, now)


def _stopped(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Stop)
    after = replace(state, phase=Phase.STOPPED, accepted={}, reason=event.reason, deadline=None)
    return _recorded(state, after, event, now, (Forget(state.round + 1),))


_EVERYWHERE: dict[type[_Event], Handler] = {
    Restarted: _restarted, Joined: _member, Left: _member, SitePaused: _member, Revoked: _member, Asked: _asked,
    Declined: _declined, Submitted: _submitted_else, Ticked: _idle, Started: _misplaced, Opened: _misplaced,
    Reduced: _misplaced, Failed: _misplaced, Pause: _paused, Resume: _misplaced, Discard: _misplaced, Stop: _stopped,
}  # fmt: skip
_SOMEWHERE: dict[tuple[Phase, type[_Event]], Handler] = {
    (Phase.GATHERING, Started): _started,
    (Phase.OPENING, Opened): _opened,
    (Phase.OPENING, Failed): _failed,
    (Phase.COLLECTING, Submitted): _submitted,
    (Phase.COLLECTING, Ticked): _ticked,
    (Phase.COLLECTING, Failed): _failed,
    (Phase.REDUCING, Reduced): _reduced,
    (Phase.REDUCING, Failed): _failed,
    (Phase.PAUSED, Pause): _misplaced,
    (Phase.PAUSED, Resume): _resumed,
    (Phase.PAUSED, Discard): _discarded,
    (Phase.FINISHED, Pause): _misplaced,
    (Phase.FINISHED, Stop): _misplaced,
    (Phase.STOPPED, Pause): _misplaced,
    (Phase.STOPPED, Stop): _misplaced,
}
TABLE: dict[tuple[Phase, type[_Event]], Handler] = {
    (phase, event): _SOMEWHERE.get((phase, event), handler) for event, handler in _EVERYWHERE.items() for phase in Phase
}
"""What handles an event in a phase: every pair is there."""
