"""The site's side of a run as a pure state machine: `handle(state, event) -> (state, effects)`.

    IDLE      asks for work
    TRAINING  works on a task; goes on asking, so as to hear when the round is over without it
    SENDING   has a finished report in its journal, and sends it until the server has it on disk
    PENDING   the server has it; what the site learnt is not its memory before the update was counted. With a secure
              sum the server has its word alone, and the site answers the turns at the sum from here
    ENDED     the run is over

A report is recorded before it is sent, so that a site that was killed sends the same one again and does not train
again. What the client remembers is committed when an answer says that this very update was counted, and dropped when
the round is over without it. Answers may be lost, late, twice or out of order: every one of them says in which round
the server was and what it had counted, both only grow, and a task not newer than the last settled one is not taken but
declined, as often as it is offered.
"""

from enum import StrEnum

import msgspec
from msgspec.structs import replace

from atoll import random
from atoll.errors import invalid
from atoll.net.control import (
    Abstain,
    Answer,
    Ask,
    Decline,
    Deliver,
    Ended,
    Received,
    Refused,
    Request,
    Stamp,
    Turn,
    Wait,
    Work,
    plain,
)


class Phase(StrEnum):
    """What a site is doing."""

    IDLE = "idle"
    TRAINING = "training"
    SENDING = "sending"
    PENDING = "pending"
    ENDED = "ended"


class Pace(msgspec.Struct, frozen=True):
    """How often a site speaks.

    Attributes:
        every: seconds between two questions while the server answers.
        longest: seconds between two attempts when it has not answered for long.
        seed: of the jitter.
    """

    every: float = 1.0
    longest: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.every <= self.longest < float("inf"):
            raise invalid("every", self.every, f"seconds above 0 and at most longest={self.longest:g}")


class State(msgspec.Struct, frozen=True):
    """Everything the machine knows.

    Attributes:
        site: its name.
        run: the run's.
        phase: what it is doing.
        stamp: round and attempt of the task at work.
        claim: the message of the report that is kept.
        task: hash of the task it answers, of what it says of the model and the work alone.
        settled: the last task that is over for this site.
        memory: the update whose memory is the client's; None: the client was never counted.
        unheard: times it spoke since the server last answered.
        turn: times it spoke.
    """

    site: str
    run: str
    phase: Phase = Phase.IDLE
    stamp: Stamp | None = None
    claim: Deliver | None = None
    task: str = ""
    settled: Stamp | None = None
    memory: Stamp | None = None
    unheard: int = 0
    turn: int = 0


# --- events -----------------------------------------------------------------------------------------------------------


class Due(msgspec.Struct, frozen=True):
    """The time of the last `Sleep` is over."""


class Heard(msgspec.Struct, frozen=True):
    """The server answered."""

    answer: Answer


class Trained(msgspec.Struct, frozen=True):
    """Training is done; report and memory are on disk."""

    claim: Deliver
    task: str = ""


class Broke(msgspec.Struct, frozen=True):
    """Training failed."""

    stamp: Stamp
    reason: str


Event = Due | Heard | Trained | Broke


class Kept(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Entry of the site's journal: a report is finished; `task` as in `State`."""

    claim: Deliver
    task: str = ""


class Settled(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Entry of the site's journal: a task is over, with the site's update in it or without."""

    stamp: Stamp
    counted: bool


Entry = Kept | Settled


# --- effects ----------------------------------------------------------------------------------------------------------


class Add(msgspec.Struct, frozen=True):
    """Answer a turn at the secure sum with the report that is kept."""

    turn: Turn


class Send(msgspec.Struct, frozen=True):
    """Send a message; beside a `Deliver` its report."""

    message: Request


class Train(msgspec.Struct, frozen=True):
    """Work on a task, then tell by `Trained` or `Broke`; what is at work for another task may be ended."""

    work: Work


class Record(msgspec.Struct, frozen=True):
    """Make this entry durable; nothing behind it may happen before."""

    entry: Entry


class Sleep(msgspec.Struct, frozen=True):
    """Tell by `Due` after so many seconds; takes the place of an earlier one."""

    seconds: float


class Tidy(msgspec.Struct, frozen=True):
    """Reports and memories but those of the state are no longer needed."""


Effect = Send | Add | Train | Record | Sleep | Tidy
Handled = tuple[State, tuple[Effect, ...]]


def handle(state: State, event: Event, pace: Pace) -> Handled:
    """The state after an event, and what must be done, in order."""
    match event:
        case Due():
            return _spoken(state, pace)
        case Trained(claim, task):
            return _kept(state, claim, task)
        case Broke(stamp, reason):
            return _broken(state, stamp, reason)
        case Heard(answer):
            return _heard(state, answer)


def replay(site: str, run: str, entries: "list[Entry]") -> State:
    """The state that a journal's entries make: it sends what it had kept, and trains on nothing it had finished."""
    state = State(site, run)
    for entry in entries:
        state = _with(state, entry)
    return state


def delay(state: State, pace: Pace) -> float:
    """Seconds until the site speaks again: doubled for every time it was not heard, up to `longest`, of which a keyed
    random half is left out, so that sites that lost the server together do not come back together.
    """
    doubled = min(pace.longest, pace.every * 2.0 ** min(state.unheard, 60))
    share = random.key(pace.seed, "pace", state.run, state.site, state.turn) / 2**64
    return doubled * (0.5 + 0.5 * share)


def _with(state: State, entry: Entry) -> State:
    """What an entry makes of a state, now or when the journal is read again."""
    if isinstance(entry, Kept):
        stamp = (entry.claim.round, entry.claim.attempt)
        return replace(state, phase=Phase.SENDING, stamp=stamp, claim=entry.claim, task=entry.task)
    memory = entry.stamp if entry.counted else state.memory
    return replace(state, phase=Phase.IDLE, stamp=None, claim=None, task="", settled=entry.stamp, memory=memory)


def _spoken(state: State, pace: Pace) -> Handled:
    if state.phase is Phase.ENDED:
        return state, ()
    message: Request = Ask(state.run, state.site, state.stamp if state.phase is Phase.TRAINING else None)
    if state.phase is Phase.SENDING:
        assert state.claim is not None
        message = state.claim
    after = replace(state, unheard=state.unheard + 1, turn=state.turn + 1)
    return after, (Sleep(delay(state, pace)), Send(message))


def _kept(state: State, claim: Deliver, task: str) -> Handled:
    if state.phase is not Phase.TRAINING or state.stamp != (claim.round, claim.attempt):
        return state, (Tidy(),)  # the round ended without this site while it was at work
    entry = Kept(claim, task)
    return _with(state, entry), (Record(entry), Send(claim))


def _broken(state: State, stamp: Stamp, reason: str) -> Handled:
    if state.phase is not Phase.TRAINING or state.stamp != stamp:
        return state, (Tidy(),)
    entry = Settled(stamp, False)
    decline = Decline(state.run, state.site, stamp[0], stamp[1], plain(reason))
    return _with(state, entry), (Record(entry), Send(decline), Tidy())


def _heard(state: State, answer: Answer) -> Handled:
    if answer.run != state.run or state.phase is Phase.ENDED:
        return state, ()
    busy = isinstance(answer, Refused) and answer.cause in ("busy", "transport", "unknown site", "revoked", "run")
    heard = state if busy else replace(state, unheard=0)
    after, effects = _settled(heard, answer)
    if isinstance(answer, Work):
        after, more = _offered(after, answer)
        effects += more
    elif isinstance(answer, Turn):
        effects += (_added(after, answer),)
    elif isinstance(answer, Received):
        if after.phase is Phase.SENDING and after.stamp == (answer.round, answer.attempt):
            after = replace(after, phase=Phase.PENDING)
    elif isinstance(answer, Ended) and after.phase in (Phase.IDLE, Phase.TRAINING):
        after = replace(after, phase=Phase.ENDED, stamp=None)
    return after, effects


def _added(state: State, turn: Turn) -> Effect:
    """What a turn at a secure sum asks for: what the site has to add, or its word that it has nothing."""
    if state.phase in (Phase.SENDING, Phase.PENDING) and state.stamp == (turn.round, turn.attempt):
        return Add(turn)
    told = "this site has nothing to add."
    return Send(Abstain(state.run, state.site, turn.round, turn.attempt, turn.turn, told))


def _settled(state: State, answer: Answer) -> Handled:
    """Whether an answer shows that the task at work is over."""
    stamp = state.stamp
    if stamp is None:
        return state, ()
    if answer.counted == stamp:
        entry = Settled(stamp, True)
    elif _over(stamp, answer):
        entry = Settled(stamp, False)
    else:
        return state, ()
    if state.phase is Phase.TRAINING:  # nothing was recorded of it, and nothing need be
        return replace(state, phase=Phase.IDLE, stamp=None, settled=stamp), ()
    return _with(state, entry), (Record(entry), Tidy())


def _over(stamp: Stamp, answer: Answer) -> bool:
    """Whether the server has gone on without an update that it had not counted when it answered."""
    match answer:
        case Work() | Turn():
            return (answer.round, answer.attempt) > stamp
        case Wait() | Received():
            return answer.round > stamp[0]
        case Ended():
            return True
        case Refused():
            mine = (answer.round, answer.attempt) == stamp
            return answer.now > stamp[0] or (mine and answer.cause in FINAL)


FINAL = frozenset({"identity", "stale", "conflict", "base", "not in cohort", "excluded", "content"})
"""Refusals after which the same update is never accepted."""


def _offered(state: State, work: Work) -> Handled:
    stamp = (work.round, work.attempt)
    if state.phase is Phase.PENDING and stamp == state.stamp:
        # A server that lost what it had acknowledged, as one restored from a backup, asks for it again.
        return replace(state, phase=Phase.SENDING), ()
    if state.phase is not Phase.IDLE:
        return state, ()
    if state.settled is not None and stamp <= state.settled:
        # The server still waits for it: what told it otherwise was lost.
        return state, (Send(Decline(state.run, state.site, *stamp, "this task is over for the site.")),)
    return replace(state, phase=Phase.TRAINING, stamp=stamp), (Train(work),)
