"""The server's side of a run as a pure state machine: `handle(plan, state, event, now) -> (state, effects)`.

    GATHERING  -> enough sites are there         -> OPENING     a cohort is chosen; its task is being made
    OPENING    -> Opened                         -> COLLECTING  sites of the cohort are offered the task
    COLLECTING -> all wanted, or quorum in time  -> REDUCING    the set of updates is fixed; they are combined
    COLLECTING -> the same, with a secure sum    -> SUMMING     sites are trained, and add up under masks
    COLLECTING -> too few in time                -> GATHERING   another attempt at the same round, or PAUSED
    SUMMING    -> Summed                         -> REDUCING    the sum is there; whoever is in it is counted
    SUMMING    -> too few, a void turn           -> SUMMING     another turn, with fresh keys; or PAUSED, or GATHERING
    REDUCING   -> Reduced                        -> GATHERING   the next round, or an evaluation, or FINISHED
    REDUCING   -> Evaluated                      -> GATHERING   the next round, or FINISHED
    any        -> Pause, a fault                 -> PAUSED      Resume goes on where it was
    PAUSED     -> Discard                        -> PAUSED      the attempt is void: Resume begins another

Nothing here reads a clock, a file or a socket. Effects are carried out in their order, and the new state is taken when
all went well; what changes the state comes with a `Record`, which must be durable before any answer behind it leaves.
So the state is always what its recorded events make of an empty one (`replay`), wherever the server was killed.

Whoever acts for a site is authenticated by the transport: the `site` of an event is that identity, and a message that
claims another is refused.

What a site is told is final stays so: a refused update is never accepted later, whatever else arrives, because whoever
is shut out of an attempt stays out until the next.

With a secure sum an accepted update is a site's word that it is trained; nothing of it is here. The sites then answer
step by step (`control.STEPS`) what a machine of `secagg` asks, which whoever carries out the effects has: it is made of
`Sum.said`, always the same. A step is closed when all that may answer have, or its time is over: `Close`, and the
machine tells by `Advanced`, `Summed` or `Voided`. A turn is never taken up again under its number, so that no site is
ever asked for two kinds of shares of one peer.

An evaluation asks every site that is there what the model after a round is worth on its own held-out examples. It goes
through the phases of a round as attempt 0 at the next one, of which there is no other: whoever answers in time is
heard, nobody is asked twice, and where it fails the run goes on without it. No update is counted by it, so that what a
site remembers stays that of its last one.

With noise on the sums (`Guarantee`) every noised sum is counted by the very entry by which its model becomes the run's:
before that nobody has seen anything of it. Where combining fails behind the noise, why is told, so that it counts too.
What the budget does not allow is not begun: the run is finished before it.
"""

import math
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, Literal, TypeVar

import msgspec
from msgspec.structs import replace

from atoll import random, sampling
from atoll.errors import RunError, invalid
from atoll.net.admission import Finding
from atoll.net.control import (
    STEPS,
    Abstain,
    Answer,
    Cause,
    Decline,
    Deliver,
    Ended,
    Received,
    Refused,
    Say,
    Stamp,
    Step,
    Wait,
    named_well,
    plain,
)

PATIENCE = 600.0
"""Seconds that an evaluation waits for a site that does not answer, where the run has no deadline."""

RELEASES = 2
"""Noised sums for every round of a run that are counted against its budget before it begins: of rounds, and of those
that fail behind their noise."""

Kind = Literal["train", "evaluate"]
"""What sites are asked for."""


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
        sums: fewest sites of a secure sum; 0: updates are seen one by one.
        step: seconds after which a step of a secure sum does not wait for more answers.
        evaluate: after every so many rounds, and after the last, sites are asked what the model is worth; 0: never.
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
    sums: int = 0
    step: float = 600.0
    evaluate: int = 0

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
        if self.sums and (self.keep or self.sums < 3):
            raise invalid("sums", self.sums, "at least 3, with keep=False", "What is summed depends on the cohort.")
        if self.cohort is not None and self.cohort < self.sums:
            raise invalid("cohort", self.cohort, f"at least {self.sums}, the fewest sites of a secure sum")
        if self.quorum is not None and self.quorum < self.sums:
            raise invalid("quorum", self.quorum, f"at least {self.sums}, the fewest sites of a secure sum")
        if not 0 < self.step < math.inf:
            raise invalid("step", self.step, "seconds above 0")
        if self.evaluate < 0:
            raise invalid("evaluate", self.evaluate, "a number of rounds, or 0 for never")
        if self.evaluate and self.sums:
            raise invalid("evaluate", self.evaluate, "0 with a secure sum", "What a site says of a model is no sum.")

    @property
    def patience(self) -> float:
        """Seconds after which an evaluation does not wait for more answers."""
        return PATIENCE if self.deadline is None else self.deadline


class Guarantee(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was decided, before round one, about noise on the sum of every round. One unit of privacy is a site.

    Attributes:
        multiplier: standard deviation of the noise, divided by the most that a site adds to the sum.
        expected: sites by which a sum is divided.
        population: sites there were to be.
        delta: at which epsilon is told.
        accountant: how releases are added up.
        budget: largest epsilon; None: none.
        most: releases that the budget allows; None: any number.
        private: False where the noise is seeded, for tests.
    """

    multiplier: float
    expected: int
    population: int
    delta: float
    accountant: Literal["pld", "rdp", "analytic"]
    budget: float | None
    most: int | None
    private: bool


class Phase(StrEnum):
    """Where a run is."""

    GATHERING = "gathering"
    OPENING = "opening"
    COLLECTING = "collecting"
    SUMMING = "summing"
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
        key: its public key, as its enrolment has it.
    """

    status: Literal["active", "paused", "left", "revoked"] = "active"
    counted: Stamp | None = None
    sha256: str = ""
    key: str = ""


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


class Sum(msgspec.Struct, frozen=True):
    """A turn at a secure sum.

    Attributes:
        keys: of its sites, by name.
        step: what is asked.
        due: who is asked.
        said: answers, in the order in which the machine took them; masked vectors are on disk.
        out: sites that take no more part in this turn, and why.
        closing: whether the step is closed, and the machine's word on it awaited.
    """

    keys: dict[str, str]
    step: Step
    due: tuple[str, ...]
    said: tuple[Say, ...] = ()
    out: dict[str, str] = {}
    closing: bool = False

    def answer(self, site: str) -> Say | None:
        """What a site answered in this step."""
        return next((s for s in self.said if s.step == self.step and s.site == site), None)

    @property
    def awaited(self) -> list[str]:
        """Who may still answer in this step."""
        answered = {s.site for s in self.said if s.step == self.step}
        return [] if self.closing else [s for s in self.due if s not in answered and s not in self.out]


class State(msgspec.Struct, frozen=True):
    """Everything the coordinator knows.

    Attributes:
        phase: where the run is.
        number: events recorded so far.
        now: seconds, of the last recorded event; never goes back.
        round: the round at work, from 0.
        attempt: at this round, from 1; 0 before the first, and while its model is evaluated.
        kind: what the sites of the attempt are asked for.
        evaluated: the last round before which the model was evaluated, or was to be; 0: none.
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
        turn: turns there were at this round's secure sum.
        sum: the turn at work.
        total: hash of the round's secure sum.
        guarantee: what was decided about noise; None: there is none.
        releases: noised sums of which something was known outside.
    """

    phase: Phase = Phase.GATHERING
    number: int = 0
    now: float = 0.0
    round: int = 0
    attempt: int = 0
    kind: Kind = "train"
    evaluated: int = 0
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
    turn: int = 0
    sum: Sum | None = None
    total: str = ""
    guarantee: Guarantee | None = None
    releases: int = 0

    @property
    def active(self) -> list[str]:
        """Sites that can be asked, sorted."""
        return sorted(n for n, s in self.sites.items() if s.status == "active")

    @property
    def outstanding(self) -> list[str]:
        """Sites of the cohort that may still answer."""
        return [s for s in self.cohort if s not in self.accepted and s not in self.excluded]

    def told(self, site: str) -> int:
        """The round that a site is told."""
        return self.round

    def awaits(self, site: str) -> bool:
        """Whether this attempt may still have an answer from a site."""
        return site in self.cohort and site not in self.accepted and site not in self.excluded

    @property
    def multiplier(self) -> float:
        """Of the noise on every sum; 0: none."""
        return 0.0 if self.guarantee is None else self.guarantee.multiplier

    @property
    def spent(self) -> bool:
        """Whether the budget allows no more releases."""
        most = None if self.guarantee is None else self.guarantee.most
        return most is not None and self.releases >= most


# --- events -----------------------------------------------------------------------------------------------------------


class _Event(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


class Started(_Event, frozen=True, omit_defaults=True):
    """The run begins from a checkpoint with the hash `model`; `experiment` is that of its plan and process.

    `guarantee`: what was decided about noise.
    """

    model: str
    experiment: str = ""
    guarantee: Guarantee | None = None


class Restarted(_Event, frozen=True):
    """The server came back after a stop or a crash: clocks may have jumped, and unrecorded work is lost."""


class Joined(_Event, frozen=True):
    """A site is there, for the first time or again; `key` is the public key of its enrolment."""

    site: str
    key: str = ""


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


class Spoke(_Event, frozen=True):
    """A site answered in a turn; the machine has taken it, unless something was found."""

    site: str
    claim: Say
    finding: Finding


class Abstained(_Event, frozen=True):
    """A site takes no more part in a turn."""

    site: str
    claim: Abstain


class Advanced(_Event, frozen=True):
    """The machine asks the next step of these sites."""

    round: int
    turn: int
    step: Step
    due: tuple[str, ...]


class Summed(_Event, frozen=True):
    """The sum of these sites' vectors is on disk; its bytes have the hash `total`."""

    round: int
    turn: int
    survivors: tuple[str, ...]
    total: str


class Voided(_Event, frozen=True):
    """The turn cannot give a sum; nothing was revealed. `culprits` are sites whose messages were wrong, and how."""

    round: int
    turn: int
    reason: str
    culprits: dict[str, str]


class Reduced(_Event, frozen=True, omit_defaults=True):
    """A round's updates are combined and the next model is on disk; its checkpoint has the hash `model`.

    `multiplier`: of the noise on their sum, which is released by this; 0: none.
    """

    round: int
    attempt: int
    model: str
    multiplier: float = 0.0


class Evaluated(_Event, frozen=True):
    """What sites said of the model a round begins with is added up."""

    round: int


class Failed(_Event, frozen=True, omit_defaults=True):
    """A task could not be made, or updates could not be combined, and trying again would not help.

    `multiplier`: of the noise on a sum that the reason may tell of; 0: it tells of none.
    """

    round: int
    attempt: int
    reason: str
    multiplier: float = 0.0


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
    Started | Restarted | Joined | Left | SitePaused | Revoked | Opened | Asked | Submitted | Declined | Spoke
    | Abstained | Advanced | Summed | Voided | Reduced | Evaluated | Failed | Ticked | Pause | Resume | Discard | Stop
)  # fmt: skip


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A recorded event: its number from 0, its time in seconds, and the event."""

    number: int
    now: float
    event: Event


# --- effects ----------------------------------------------------------------------------------------------------------


class Store(msgspec.Struct, frozen=True):
    """Make the frame of this update or masked vector durable."""

    claim: Deliver | Say


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


class Tell(msgspec.Struct, frozen=True):
    """Answer with what the machine of the turn says to this site."""

    site: str
    counted: Stamp | None


class Close(msgspec.Struct, frozen=True):
    """Have the machine close this step, store the sum if there is one, then tell by `Advanced`, `Summed`, `Voided`."""

    round: int
    attempt: int
    turn: int
    step: Step


class Open(msgspec.Struct, frozen=True):
    """Make the task of this attempt; when `base` is "" tell its hash by `Opened`, else it must have this one.

    Attempt 0 is an evaluation.
    """

    round: int
    attempt: int
    cohort: tuple[str, ...]
    population: int
    base: str


class Reduce(msgspec.Struct, frozen=True):
    """Combine these updates in this order, store the next model, then tell by `Reduced`.

    Of attempt 0 they are what sites say of the model: add them up, then tell by `Evaluated`. Where `total` is not "",
    they are the sum with this hash, of that turn.
    """

    round: int
    attempt: int
    updates: tuple[Accepted, ...]
    turn: int = 0
    total: str = ""


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


Effect = Store | Record | Reply | Offer | Tell | Open | Close | Reduce | Forget | Alarm | Misplaced
Effects = tuple[Effect, ...]
Handled = tuple[State, Effects]
AnyState = TypeVar("AnyState", bound=State)
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


def replay(
    plan: Any, entries: Iterable[Entry], handle: Callable[..., Handled] = handle, state: State | None = None
) -> State:
    """The state that recorded events make.

    Args:
        plan: of the run.
        entries: of its journal.
        handle: the machine whose they are.
        state: the one before them; default an empty one.

    Raises:
        RunError: entries that this plan's events cannot have made.
    """
    state = state or State()
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


def recorded(
    before: AnyState, after: AnyState, event: Event, now: float, then: Effects = (), *, first: Effects = ()
) -> tuple[AnyState, Effects]:
    """An event that goes into the journal: the state after it, and the effects before and behind its record."""
    entry = Entry(before.number, now, event)
    return replace(after, number=before.number + 1, now=now), (*first, Record(entry), *then)


def _settled(plan: Plan, state: State, now: float, *, late: bool = False) -> Handled:
    """Go on to the next phase if its time has come."""
    if state.phase is Phase.GATHERING:
        return _gathered(plan, state)
    if state.phase is Phase.SUMMING:
        return _stepped(plan, state, now, late=late)
    if state.phase is not Phase.COLLECTING:
        return state, ()
    count = len(state.accepted)
    if state.kind == "evaluate":
        if state.outstanding and not late:
            return state, ()
        if not count:
            return _spoken_of(plan, state)
        chosen = replace(state, phase=Phase.REDUCING, deadline=None)
        return chosen, (_reduction(chosen),)
    if count >= state.wanted or ((late or not state.outstanding) and count >= (plan.quorum or state.wanted)):
        if plan.sums:
            return _turned(plan, state, now)
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
        return replace(state, deadline=_deadline(plan, state, now)), (reopened,)
    if state.phase is Phase.SUMMING:
        if state.sum is None:
            after, then = _turned(plan, replace(state, tries=state.tries + 1), now)
        else:
            after = replace(state, deadline=None if state.sum.closing else now + plan.step)
            then = (_closing(state, state.sum),) if state.sum.closing else ()
        return after, ((reopened, *then) if after.phase is Phase.SUMMING else then)
    if state.phase is Phase.REDUCING:
        return _over(plan, state) if state.spent else (state, (reopened, _reduction(state)))
    return state, ()


def _over(plan: Plan, state: State) -> Handled:
    """No round is begun, or gone on with, whose release the budget does not allow."""
    assert state.guarantee is not None
    if state.releases >= RELEASES * plan.rounds:  # as far as was counted before round one: the budget may allow more
        reason = (
            f"{state.releases - state.round} sums failed behind their noise, which is released by them as by a round. "
            f"After round {state.round} there were {state.releases} releases, {RELEASES} for each of {plan.rounds} "
            f"rounds; against the budget of epsilon {state.guarantee.budget:g} no more were counted at its begin. "
            "Mend what made them fail, and submit it as another run."
        )
    else:
        reason = (
            f"the privacy budget of epsilon {state.guarantee.budget:g} is spent by {state.releases} releases, after "
            f"round {state.round}: the next would exceed it."
        )
    after = replace(
        state, phase=Phase.FINISHED, cohort=(), wanted=0, accepted={}, excluded={}, base="", deadline=None, sum=None,
        total="", reason=reason,
    )  # fmt: skip
    return after, (Forget(state.round + 1),)


def _reduction(state: State) -> Reduce:
    order = tuple(state.accepted[s] for s in sorted(state.accepted))
    return Reduce(state.round, state.attempt, order, state.turn if state.total else 0, state.total)


# --- turns at a secure sum --------------------------------------------------------------------------------------------


def _turned(plan: Plan, state: State, now: float) -> Handled:
    """Begin a turn with the sites that are trained and there; where they are too few, the attempt came to nothing."""
    there = _there(state)
    if len(there) < _needed(plan, state, "join"):
        return _tried(plan, state)
    begun = Sum({s: state.sites[s].key for s in there}, "join", tuple(there))
    return replace(state, phase=Phase.SUMMING, turn=state.turn + 1, sum=begun, deadline=now + plan.step), ()


def _there(state: State) -> list[str]:
    """Sites that are trained and there."""
    return [s for s in sorted(state.accepted) if state.sites[s].status == "active"]


def _needed(plan: Plan, state: State, step: Step) -> int:
    """Answers without which a step is void.

    Before vectors are sent another turn costs nothing, so that everybody who was wanted is waited for. From then on a
    site need not give a second vector: what the machine can do without, is done without.
    """
    if step in ("join", "reveal", "share"):
        return max(plan.quorum or state.wanted, plan.sums)
    return max(plan.quorum or 0, plan.sums) if step == "mask" else 0


def _closing(state: State, turn: Sum) -> Close:
    return Close(state.round, state.attempt, state.turn, turn.step)


def _stepped(plan: Plan, state: State, now: float, *, late: bool = False) -> Handled:
    """Close a step whose time has come, or give the turn up."""
    turn = state.sum
    if turn is None or turn.closing:
        return state, ()
    answered = sum(s.step == turn.step for s in turn.said)
    needed = _needed(plan, state, turn.step)
    if answered + (0 if late else len(turn.awaited)) < needed:
        silent = dict.fromkeys(turn.awaited, f"no answer in the step {turn.step}")
        why = "; ".join(f"{s}: {r}" for s, r in sorted({**silent, **turn.out}.items())[:5])
        return _void(plan, state, f"{answered} of {needed} answers in the step {turn.step} ({why})", {}, now)
    if turn.awaited and not late:
        return state, ()
    return replace(state, sum=replace(turn, closing=True), deadline=None), (_closing(state, turn),)


def _void(plan: Plan, state: State, why: str, culprits: dict[str, str], now: float) -> Handled:
    """A turn that came to nothing; whose messages were wrong is not asked again in this attempt."""
    accepted = {s: a for s, a in state.accepted.items() if s not in culprits}
    after = replace(state, sum=None, deadline=None, accepted=accepted, excluded={**state.excluded, **culprits})
    if len(_there(after)) < _needed(plan, state, "join"):
        gone = {s: f"the site is {state.sites[s].status}." for s in accepted if state.sites[s].status != "active"}
        return _tried(plan, replace(after, excluded={**after.excluded, **gone}))
    if state.tries >= plan.attempts:
        reason = f"round {state.round + 1} had no sum in {state.tries} attempts: {why}."
        return replace(after, phase=Phase.PAUSED, back=Phase.SUMMING, reason=reason), ()
    return _turned(plan, replace(after, tries=state.tries + 1), now)


def _tried(plan: Plan, state: State) -> Handled:
    """An attempt that came to nothing."""
    why = "; ".join(f"{s}: {r}" for s, r in sorted(state.excluded.items())[:5]) or "nobody else answered in time"
    kept = state.accepted if plan.keep else {}
    after = replace(state, phase=Phase.GATHERING, accepted=kept, deadline=None, base="", sum=None, total="")
    if state.tries >= plan.attempts:
        reason = (
            f"round {state.round + 1} had {len(state.accepted)} of {plan.quorum or state.wanted} updates in each of "
            f"{state.tries} attempts ({why})."
        )
        return replace(after, phase=Phase.PAUSED, back=Phase.GATHERING, reason=reason), ()
    return _gathered(plan, after)


def _deadline(plan: Plan, state: State, now: float) -> float | None:
    """When an attempt that begins now stops to wait."""
    waits = plan.patience if state.kind == "evaluate" else plan.deadline
    return None if waits is None else now + waits


def _due(plan: Plan, state: State) -> bool:
    """Whether the model the round begins with is to be evaluated before."""
    reached = state.round >= plan.rounds or (plan.evaluate > 0 and state.round % plan.evaluate == 0)
    return plan.evaluate > 0 and reached and state.round > state.evaluated


def _examined(plan: Plan, state: State) -> Handled:
    """Ask every site that is there what the model is worth; at the end nobody is waited for."""
    there = tuple(state.active)
    if not there:
        return _spoken_of(plan, state) if state.round >= plan.rounds else (state, ())
    population = sum(s.status != "revoked" for s in state.sites.values())
    after = replace(
        state, phase=Phase.OPENING, kind="evaluate", attempt=0, base="", cohort=there, population=population,
        wanted=len(there), excluded={},
    )  # fmt: skip
    return after, (Open(state.round, 0, there, population, ""),)


def _spoken_of(plan: Plan, state: State) -> Handled:
    """The model was evaluated, or could not be: the round begins, or the run is over."""
    done = state.round >= plan.rounds
    after = replace(
        state, phase=Phase.FINISHED if done else Phase.GATHERING, kind="train", evaluated=state.round, attempt=0,
        tries=0, base="", cohort=(), wanted=0, accepted={}, excluded={}, deadline=None,
        reason=f"all {plan.rounds} rounds are done." if done else "",
    )  # fmt: skip
    if done:
        return after, (Forget(state.round + 1),)
    return _gathered(plan, after)


def _gathered(plan: Plan, state: State) -> Handled:
    """Begin an attempt if enough sites are there."""
    if _due(plan, state):
        return _examined(plan, state)
    if state.round >= plan.rounds:  # the evaluation of the last model was given up
        return _spoken_of(plan, state)
    if state.spent:
        return _over(plan, state)
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
        phase=Phase.OPENING, kind="train", attempt=attempt, tries=state.tries + 1, base="", cohort=cohort,
        population=population, wanted=wanted, excluded={},
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


def refuse(
    plan: Plan, state: State, site: str, claim: Deliver | Decline | Say | Abstain, cause: Cause, detail: str
) -> Reply:
    """A refusal of a message."""
    answer = Refused(
        plan.run, claim.round, claim.attempt, cause, plain(detail), state.told(site), _counted(state, site)
    )
    return Reply(site, answer)


# --- handlers ---------------------------------------------------------------------------------------------------------


def misplaced(plan: Plan, state: AnyState, event: Event, now: float) -> tuple[AnyState, Effects]:
    """An event that has no place in the phase."""
    return state, (Misplaced(type(event).__name__, state.phase),)


def _started(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Started)
    if state.model:
        return misplaced(plan, state, event, now)
    begun = replace(state, model=event.model, experiment=event.experiment, guarantee=event.guarantee)
    after, then = _settled(plan, begun, now)
    return recorded(state, after, event, now, then)


def _restarted(plan: Plan, state: State, event: Event, now: float) -> Handled:
    after, then = _again(plan, state, now)
    return recorded(state, after, event, now, then)


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
    key = event.key if isinstance(event, Joined) else known.key if known is not None else ""
    if known is not None and (known.status, known.key) == (new, key):
        return state, ()
    site = replace(known or Site(), status=new, key=key)
    accepted = state.accepted
    # Once the set of a round is fixed it stays: all of its updates were admitted while their sites were.
    fixed = (state.back if state.phase is Phase.PAUSED else state.phase) in (Phase.SUMMING, Phase.REDUCING)
    if new == "revoked" and not fixed:
        accepted = {s: a for s, a in accepted.items() if s != event.site}
    excluded = state.excluded
    if new != "active" and event.site in state.cohort and event.site not in accepted and not fixed:
        # For the whole attempt, even if it comes back: it may have been told that its update was refused.
        excluded = {**excluded, event.site: f"the site is {new}."}
    turn = state.sum
    if turn is not None and event.site in turn.keys and (new != "active" or key != turn.keys[event.site]):
        # A vector that the sum has stays in it; what the site holds of the others' secrets is not asked for.
        told = "the site has another key." if new == "active" else f"the site is {new}."
        turn = replace(turn, out={**turn.out, event.site: told})
    changed = replace(state, sites={**state.sites, event.site: site}, accepted=accepted, excluded=excluded, sum=turn)
    after, then = _settled(plan, changed, now)
    return recorded(state, after, event, now, then)


def _opened(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Opened)
    if (event.round, event.attempt) != (state.round, state.attempt):
        return misplaced(plan, state, event, now)
    opened = replace(state, phase=Phase.COLLECTING, base=event.base, deadline=_deadline(plan, state, now))
    after, then = _settled(plan, opened, now)
    return recorded(state, after, event, now, then)


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
    if state.phase is Phase.SUMMING and state.sum is not None and event.site in state.sum.awaited:
        return state, (Tell(event.site, site.counted),)
    return state, (Reply(event.site, Wait(plan.run, state.round, site.counted)),)


def identified(plan: Plan, state: State, site: str, claim: Deliver | Decline | Say | Abstain) -> Effects:
    """Why a message is refused before its content matters; nothing when it is not."""
    known = state.sites.get(site)
    if known is None:
        return (refuse(plan, state, site, claim, "unknown site", ""),)
    if known.status == "revoked":
        return (refuse(plan, state, site, claim, "revoked", ""),)
    if claim.site != site:
        refusal = refuse(plan, state, site, claim, "identity", "the message claims to be another site's.")
        return Alarm(site, f"sent a message that claims to be {claim.site}'s"), refusal
    if claim.run != plan.run:
        return (refuse(plan, state, site, claim, "run", f"this is the run {plan.run}."),)
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
    refusal = refuse(plan, state, site, claim, "conflict", "another update of this site and attempt was accepted.")
    return Alarm(site, "sent two different updates for the same attempt"), refusal


def _submitted(plan: Plan, state: State, event: Event, now: float) -> Handled:
    """An update while a round collects."""
    assert isinstance(event, Submitted)
    site, claim, finding = event.site, event.claim, event.finding
    early = identified(plan, state, site, claim) or _known(plan, state, site, claim)
    if early:
        return state, early

    def refused(cause: Cause, detail: str) -> Handled:
        return state, (refuse(plan, state, site, claim, cause, detail),)

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
        reply = refuse(plan, state, site, claim, "content", finding.detail)
        return recorded(state, after, event, now, (reply, *then))
    accepted = Accepted(claim, finding.weight, finding.norm)
    after, then = _settled(plan, replace(state, accepted={**state.accepted, site: accepted}), now)
    reply = Reply(site, Received(plan.run, claim.round, claim.attempt, state.sites[site].counted))
    if plan.sums:
        return recorded(state, after, event, now, (reply, *then))
    twins = [s for s, a in state.accepted.items() if a.claim.sha256 == claim.sha256]
    if state.guarantee is not None or state.kind == "evaluate":
        twins = []  # that two updates are the same tells of the data, and no noise hides it; evaluations may be
    alarms = (Alarm(site, f"sent the very bytes of {', '.join(twins[:5])}"),) if twins else ()
    return recorded(state, after, event, now, (reply, *alarms, *then), first=(Store(claim),))


def _submitted_else(plan: Plan, state: State, event: Event, now: float) -> Handled:
    """An update in a phase that takes none."""
    assert isinstance(event, Submitted)
    site, claim = event.site, event.claim
    early = identified(plan, state, site, claim) or _known(plan, state, site, claim)
    if early:
        return state, early
    paused = state.phase is Phase.PAUSED and state.back is Phase.COLLECTING
    if paused and (claim.round, claim.attempt) == (state.round, state.attempt):
        return state, (refuse(plan, state, site, claim, "busy", f"the run is paused: {state.reason}"),)
    return state, (refuse(plan, state, site, claim, "stale", f"the run is {state.phase.value}."),)


def _declined(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Declined)
    site, claim = event.site, event.claim
    early = identified(plan, state, site, claim)
    if early:
        return state, early
    answer = Reply(site, Wait(plan.run, state.round, state.sites[site].counted))
    open_to = state.phase is Phase.COLLECTING and (claim.round, claim.attempt) == (state.round, state.attempt)
    if not open_to or not state.awaits(site):
        return state, (answer,)
    after, then = _settled(plan, replace(state, excluded={**state.excluded, site: claim.reason}), now)
    return recorded(state, after, event, now, (answer, *then))


def _spoke(plan: Plan, state: State, event: Event, now: float) -> Handled:
    """An answer in a turn."""
    assert isinstance(event, Spoke)
    site, claim, finding, turn = event.site, event.claim, event.finding, state.sum
    early = identified(plan, state, site, claim)
    if early:
        return state, early

    def refused(cause: Cause, detail: str) -> Reply:
        return refuse(plan, state, site, claim, cause, detail)

    at = (claim.round, claim.attempt, claim.turn, claim.step)
    if turn is None or at != (state.round, state.attempt, state.turn, turn.step):
        return state, (refused("turn", "another step is at work."),)
    known = turn.answer(site)
    if known == claim:
        return state, (Reply(site, Wait(plan.run, state.round, state.sites[site].counted)),)
    if known is not None:
        return state, (Alarm(site, f"answered the step {turn.step} twice"), refused("turn", "it was answered."))
    if site not in turn.awaited:
        return state, (refused("turn", turn.out.get(site, "this site's answer is not awaited.")),)
    if finding.fault == "transport":
        return state, (refused("transport", finding.detail),)
    if finding.fault:
        shut = replace(turn, out={**turn.out, site: finding.detail})
        after, then = _settled(plan, replace(state, sum=shut), now)
        return recorded(state, after, event, now, (refused("turn", finding.detail), *then))
    heard = replace(turn, said=(*turn.said, claim))
    after, then = _settled(plan, replace(state, sum=heard), now)
    reply = Reply(site, Wait(plan.run, state.round, state.sites[site].counted))
    first: Effects = (Store(claim),) if claim.size else ()
    return recorded(state, after, event, now, (reply, *then), first=first)


def _spoke_else(plan: Plan, state: State, event: Event, now: float) -> Handled:
    """An answer where no turn is at work."""
    assert isinstance(event, Spoke)
    site, claim = event.site, event.claim
    early = identified(plan, state, site, claim)
    if early:
        return state, early
    paused = state.phase is Phase.PAUSED and state.back is Phase.SUMMING and state.sum is not None
    if paused and (claim.round, claim.turn) == (state.round, state.turn):
        return state, (refuse(plan, state, site, claim, "busy", f"the run is paused: {state.reason}"),)
    return state, (refuse(plan, state, site, claim, "turn", f"the run is {state.phase.value}."),)


def _abstained(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Abstained)
    site, claim, turn = event.site, event.claim, state.sum
    early = identified(plan, state, site, claim)
    if early:
        return state, early
    answer = Reply(site, Wait(plan.run, state.round, state.sites[site].counted))
    at_work = (claim.round, claim.turn) == (state.round, state.turn)
    if turn is None or not at_work or site not in turn.keys or site in turn.out:
        return state, (answer,)
    after, then = _settled(plan, replace(state, sum=replace(turn, out={**turn.out, site: claim.reason})), now)
    return recorded(state, after, event, now, (answer, *then))


def _closes(state: State, event: Advanced | Summed | Voided) -> Sum | None:
    """The turn that the machine speaks of, if it was asked."""
    turn = state.sum
    asked = turn is not None and turn.closing and (event.round, event.turn) == (state.round, state.turn)
    return turn if asked else None


def _advanced(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Advanced)
    turn = _closes(state, event)
    if turn is None or event.step not in STEPS[STEPS.index(turn.step) + 1 :]:
        return misplaced(plan, state, event, now)
    on = replace(turn, step=event.step, due=event.due, closing=False)
    after, then = _settled(plan, replace(state, sum=on, deadline=now + plan.step), now)
    return recorded(state, after, event, now, then)


def _summed(plan: Plan, state: State, event: Event, now: float) -> Handled:
    """Whoever is in the sum is counted, and nobody else."""
    assert isinstance(event, Summed)
    if _closes(state, event) is None:
        return misplaced(plan, state, event, now)
    counted = {s: a for s, a in state.accepted.items() if s in event.survivors}
    after = replace(state, phase=Phase.REDUCING, accepted=counted, sum=None, deadline=None, total=event.total)
    return recorded(state, after, event, now, (_reduction(after),))


def _voided(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Voided)
    if _closes(state, event) is None:
        return misplaced(plan, state, event, now)
    after, then = _void(plan, state, event.reason, event.culprits, now)
    return recorded(state, after, event, now, then)


def _reduced(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Reduced)
    told = (event.round, event.attempt, event.multiplier)
    if state.kind != "train" or told != (state.round, state.attempt, state.multiplier):
        return misplaced(plan, state, event, now)
    sites = dict(state.sites)
    for name, update in state.accepted.items():
        stamp = (update.claim.round, update.claim.attempt)
        sites[name] = replace(sites[name], counted=stamp, sha256=update.claim.sha256)
    done = state.round + 1 >= plan.rounds and not plan.evaluate
    closed = replace(
        state,
        phase=Phase.FINISHED if done else Phase.GATHERING, round=state.round + 1, attempt=0, tries=0, base="",
        model=event.model, cohort=(), wanted=0, accepted={}, excluded={}, sites=sites, turn=0, sum=None, total="",
        reason=f"all {plan.rounds} rounds are done." if done else "",
        releases=state.releases + (event.multiplier > 0),
    )  # fmt: skip
    after, then = _settled(plan, closed, now)
    return recorded(state, after, event, now, (Forget(state.round + 1), *then))


def _evaluated(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Evaluated)
    if state.kind != "evaluate" or event.round != state.round:
        return misplaced(plan, state, event, now)
    after, then = _spoken_of(plan, state)
    return recorded(state, after, event, now, then)


def _failed(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Failed)
    if (event.round, event.attempt) != (state.round, state.attempt):
        return misplaced(plan, state, event, now)
    if state.kind == "evaluate":
        after, then = _spoken_of(plan, state)
        return recorded(state, after, event, now, then)
    if event.multiplier and (state.phase is not Phase.REDUCING or event.multiplier != state.multiplier):
        return misplaced(plan, state, event, now)
    after = replace(
        state, phase=Phase.PAUSED, back=state.phase, reason=event.reason, deadline=None,
        releases=state.releases + (event.multiplier > 0),
    )  # fmt: skip
    return recorded(state, after, event, now)


def _ticked(plan: Plan, state: State, event: Event, now: float) -> Handled:
    if state.deadline is None or now < state.deadline:
        return state, ()
    after, then = _settled(plan, state, now, late=True)
    return recorded(state, after, event, now, then)


def _idle(plan: Plan, state: State, event: Event, now: float) -> Handled:
    return state, ()


def _paused(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Pause)
    after = replace(state, phase=Phase.PAUSED, back=state.phase, reason=event.reason, deadline=None)
    return recorded(state, after, event, now)


def _resumed(plan: Plan, state: State, event: Event, now: float) -> Handled:
    anew = state.back is Phase.GATHERING or (state.back is Phase.SUMMING and state.sum is None)
    back = replace(state, phase=state.back, reason="", tries=0 if anew else state.tries)
    back, then = _again(plan, back, now)
    after, more = _settled(plan, back, now)
    return recorded(state, after, event, now, (*then, *more))


def _discarded(plan: Plan, state: State, event: Event, now: float) -> Handled:
    """The attempt at work is void, as if too few had answered: its sites are told by the next one's task."""
    assert isinstance(event, Discard)
    after = replace(
        state, back=Phase.GATHERING, accepted={}, excluded={}, base="", reason=event.reason, sum=None, total="",
        evaluated=state.round if state.kind == "evaluate" else state.evaluated,
    )  # fmt: skip
    return recorded(state, after, event, now)


def _stopped(plan: Plan, state: State, event: Event, now: float) -> Handled:
    assert isinstance(event, Stop)
    after = replace(state, phase=Phase.STOPPED, accepted={}, reason=event.reason, deadline=None, sum=None, total="")
    return recorded(state, after, event, now, (Forget(state.round + 1),))


_EVERYWHERE: dict[type[_Event], Handler] = {
    Restarted: _restarted, Joined: _member, Left: _member, SitePaused: _member, Revoked: _member, Asked: _asked,
    Declined: _declined, Submitted: _submitted_else, Spoke: _spoke_else, Abstained: _abstained, Advanced: misplaced,
    Summed: misplaced, Voided: misplaced, Ticked: _idle, Started: misplaced, Opened: misplaced,
    Reduced: misplaced, Evaluated: misplaced, Failed: misplaced, Pause: _paused, Resume: misplaced,
    Discard: misplaced, Stop: _stopped,
}  # fmt: skip
_SOMEWHERE: dict[tuple[Phase, type[_Event]], Handler] = {
    (Phase.GATHERING, Started): _started,
    (Phase.OPENING, Opened): _opened,
    (Phase.OPENING, Failed): _failed,
    (Phase.COLLECTING, Submitted): _submitted,
    (Phase.COLLECTING, Ticked): _ticked,
    (Phase.COLLECTING, Failed): _failed,
    (Phase.SUMMING, Spoke): _spoke,
    (Phase.SUMMING, Advanced): _advanced,
    (Phase.SUMMING, Summed): _summed,
    (Phase.SUMMING, Voided): _voided,
    (Phase.SUMMING, Ticked): _ticked,
    (Phase.SUMMING, Failed): _failed,
    (Phase.REDUCING, Reduced): _reduced,
    (Phase.REDUCING, Evaluated): _evaluated,
    (Phase.REDUCING, Failed): _failed,
    (Phase.PAUSED, Pause): misplaced,
    (Phase.PAUSED, Resume): _resumed,
    (Phase.PAUSED, Discard): _discarded,
    (Phase.FINISHED, Pause): misplaced,
    (Phase.FINISHED, Stop): misplaced,
    (Phase.STOPPED, Pause): misplaced,
    (Phase.STOPPED, Stop): misplaced,
}
TABLE: dict[tuple[Phase, type[_Event]], Handler] = {
    (phase, event): _SOMEWHERE.get((phase, event), handler) for event, handler in _EVERYWHERE.items() for phase in Phase
}
"""What handles an event in a phase: every pair is there."""
