"""What parties ask of a server beside the rounds themselves: fixed fields, bounded lengths, and who may ask what.

A call is one JSON object, its answer another. `ROLES` says who may make which call; what is not in it is nobody's.
"""

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from atoll.net.control import Count, Hash, Line, MessageError, Name, Stamp
from atoll.net.enrolment import Role, Token

LONGEST = 2**21
"""Bytes of a call."""

Engine = Literal["auto", "vectorized", "loop"]
Setting = Annotated[str, Meta(max_length=1000)]
Settings = Annotated[dict[Annotated[str, Meta(max_length=100, pattern=r"\A[A-Za-z_][A-Za-z0-9_]*\Z")], Setting],
                     Meta(max_length=100)]  # fmt: skip
Code = Annotated[str, Meta(max_length=2**20)]
Body = Annotated[str, Meta(max_length=2**20)]
Names = Annotated[list[Name], Meta(min_length=1, max_length=1000)]


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class _Tagged(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    pass


class Charter(_Struct, frozen=True):
    """What a run is, before anything of it ran.

    Attributes:
        run: its name.
        code: SHA-256 of the app file.
        settings: of the app's parameters, as text.
        engine: what executes the work at a site.
        least: sites that must be there before a round opens; 0: all that are enrolled when the run is submitted.
        over, quorum, deadline, attempts: as in `coordinator.Plan`.
        weight_cap, norm_bound: as in `admission.Rules`.
        by: who submitted it.
        at: seconds since 1970.
    """

    run: Name
    code: Hash
    settings: Settings
    engine: Engine = "auto"
    least: Annotated[int, Meta(ge=0, le=100_000)] = 0
    over: Annotated[float, Meta(ge=1, le=100)] = 1.0
    quorum: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    deadline: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    attempts: Annotated[int, Meta(ge=1, le=1000)] = 3
    weight_cap: Annotated[float, Meta(gt=0, le=1e300)] | None = None
    norm_bound: Annotated[float, Meta(gt=0, le=1e300)] | None = None
    by: str = ""
    at: float = 0.0


# --- calls ------------------------------------------------------------------------------------------------------------


class Enrol(_Struct, frozen=True):
    """Take up an invite; signed by the very key, which is its holder's from now on."""

    name: Name
    key: Annotated[str, Meta(max_length=100)]
    token: Token

    def __repr__(self) -> str:
        return f"Enrol({self.name!r})"


class Standing(_Struct, frozen=True):
    """Where a site stands with a run."""

    status: Literal["waiting", "denied", "preparing", "ready", "failed", "left"]
    detail: Line = ""


class Agenda(_Tagged, frozen=True):
    """What is there to take part in? Held back while it is what the site knows.

    Attributes:
        known: version of the agenda the site has; -1: answer at once.
        standings: where the site stands with each run it knows of.
    """

    known: int
    standings: Annotated[dict[Name, Standing], Meta(max_length=1000)]


class Statistic(_Tagged, frozen=True):
    """A site's answer to a question about its table."""

    run: Name
    stage: Literal["survey", "spread"]
    content: Body


class MakeInvites(_Tagged, frozen=True):
    """Let newcomers in."""

    names: Names
    role: Role
    hours: float


class Revoke(_Tagged, frozen=True):
    """Shut a member out."""

    name: Name


class ListMembers(_Tagged, frozen=True):
    """Who is there?"""


class Submit(_Tagged, frozen=True):
    """Start a run; `by` and `at` of the charter are the server's to say."""

    charter: Charter
    code: Code


class ListRuns(_Tagged, frozen=True):
    """Which runs are there?"""


class Control(_Tagged, frozen=True):
    """Pause, resume or stop a run, or give up the updates a paused one has of its attempt at a round."""

    run: Name
    action: Literal["pause", "resume", "discard", "stop"]
    reason: Line = ""


class Watch(_Tagged, frozen=True):
    """How is a run? Held back while that is what the watcher knows.

    Attributes:
        known: `version` of what the watcher has; -1: answer at once.
    """

    run: Name
    known: int


Call = Agenda | Statistic | MakeInvites | Revoke | ListMembers | Submit | ListRuns | Control | Watch

ROLES: dict[type[_Tagged], frozenset[Role]] = {
    Agenda: frozenset({"site"}),
    Statistic: frozenset({"site"}),
    MakeInvites: frozenset({"admin"}),
    Revoke: frozenset({"admin"}),
    ListMembers: frozenset({"admin", "researcher", "viewer"}),
    Submit: frozenset({"admin", "researcher"}),
    ListRuns: frozenset({"admin", "researcher", "viewer"}),
    Control: frozenset({"admin", "researcher"}),  # a researcher steers its own runs alone: `hub` looks
    Watch: frozenset({"admin", "researcher", "viewer"}),
}
"""Who may make which call."""

TRAINERS: frozenset[Role] = frozenset({"site"})
"""Who may take part in rounds: messages, tasks and updates."""


# --- answers ----------------------------------------------------------------------------------------------------------


class Problem(_Struct, frozen=True):
    """Why there is no answer.

    Attributes:
        kind: "epoch": sign with this epoch and send it again; "busy": send it again later; the others are final.
        text: in words.
        epoch: of the server.
    """

    kind: Literal["signature", "epoch", "replay", "fenced", "role", "revoked", "invite", "argument", "unknown", "large",
                  "slow", "busy", "partial", "sealed"]  # fmt: skip
    text: str
    epoch: str = ""
    received: int = 0


class Welcome(_Struct, frozen=True):
    """The newcomer is enrolled."""

    name: Name
    role: Role


class Errand(_Struct, frozen=True):
    """A run that a site can take part in.

    Attributes:
        charter: what it is.
        identity: of what is trained and how, which must be the same at the site; "" while it is not known.
        stage: "" when the experiment's data needs no preparing; what is asked of sites now; "ready".
        question: what the stage needs to know, as JSON.
    """

    charter: Charter
    identity: str
    stage: Literal["", "survey", "spread", "ready"]
    question: str


class Errands(_Struct, frozen=True):
    """A site's agenda."""

    version: int
    runs: list[Errand]


class Done(_Struct, frozen=True):
    """It is done."""


class Invites(_Struct, frozen=True):
    """Invites, in the order of the names."""

    words: list[str]

    def __repr__(self) -> str:
        return f"Invites({len(self.words)})"


class Present(_Struct, frozen=True):
    """A member as operators see it.

    Attributes:
        seen: seconds since it was last heard; None: not since the server started.
    """

    name: str
    role: Role
    revoked: bool
    since: float
    fingerprint: str
    seen: float | None


class Members(_Struct, frozen=True):
    """Everybody."""

    members: list[Present]


class Submitted(_Struct, frozen=True):
    """The run is there, and waits for its sites."""

    run: Name


class SiteView(_Struct, frozen=True):
    """A site in a run, as watchers see it.

    Attributes:
        name: its name.
        standing: as it told.
        detail: why, as it told.
        doing: in the round at work: "asked" (for an update, or in a secure sum), "delivered", "out of the sum" (of the
            turn at work), "excluded", or "" when it is not in the cohort.
        why: it is excluded, or what was refused.
        counted: round and attempt of its update that was counted last, from 0.
        seen: seconds since it was last heard.
        behind: in an asynchronous run, steps since the model it works on; None: it works on none.
    """

    name: str
    standing: str
    detail: str
    doing: str
    why: str
    counted: Stamp | None
    seen: float | None
    behind: int | None = None


class Closed(_Struct, frozen=True):
    """A round that is over.

    Attributes:
        round: from 1.
        clients: updates that counted.
        loss: mean over the examples of local training; None: there is none.
        bytes_up: received.
        seconds: since its task was first given to a site.
        metrics: of its model on the sites' test examples, or their validation examples where there are no others; empty
            while it is not evaluated.
        staleness: steps between the models of its updates and their step, on average; None in a synchronous run.
    """

    round: int
    clients: int
    loss: float | None
    bytes_up: int
    seconds: float
    metrics: dict[str, float] = {}
    staleness: float | None = None


class InBuffer(_Struct, frozen=True):
    """What an asynchronous run is doing.

    Attributes:
        size: updates of a step.
        concurrency: sites at work at most.
        at_work: sites at work.
        waiting: updates that wait for a step.
    """

    size: int
    concurrency: int
    at_work: int
    waiting: int


class Spent(_Struct, frozen=True):
    """What a run's noise took so far; one unit of privacy is a site.

    Attributes:
        epsilon: spent.
        delta: at which it is told.
        budget: largest epsilon; None: none.
        private: False where the noise is seeded, for tests.
    """

    epsilon: float
    delta: float
    budget: float | None
    private: bool


class View(_Struct, frozen=True):
    """A run as watchers see it.

    Attributes:
        version: grows with every change.
        run: its name.
        title: of the experiment.
        phase: of the coordinator, "preparing" before it, "broken" when the run's process cannot work.
        reason: why it is paused, over or broken.
        round: at work, from 1.
        rounds: planned.
        attempt: at the round; 0: none yet, or its model is evaluated before.
        wanted: updates with which the attempt closes at once.
        least: sites it waits for.
        sites: everybody who takes part, or could.
        closed: rounds that are over, the last hundred.
        notices: what the operator should hear of, the last twenty.
        by: who submitted it.
        at: when, seconds since 1970.
        privacy: what its noise took; None: it has none.
        buffer: what an asynchronous run is doing, whose rounds are steps; None: the run is synchronous.
    """

    version: int
    run: Name
    title: str
    phase: str
    reason: str
    round: int
    rounds: int
    attempt: int
    wanted: int
    least: int
    sites: list[SiteView]
    closed: list[Closed]
    notices: list[str]
    by: str
    at: float
    privacy: Spent | None = None
    buffer: InBuffer | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.phase in ("finished", "stopped")

    @property
    def evaluating(self) -> bool:
        """Whether sites are asked what the model is worth."""
        return self.attempt == 0 and self.phase in ("opening", "collecting", "reducing")


class RunList(_Struct, frozen=True):
    """All runs, the newest first."""

    runs: list[View]


class Received(_Struct, frozen=True):
    """So many bytes of an object are there."""

    received: Count


Reply = Errands | Done | Invites | Members | Submitted | RunList | View

REPLIES: dict[type[_Tagged], type[_Struct]] = {
    Agenda: Errands, Statistic: Done, MakeInvites: Invites, Revoke: Done, ListMembers: Members, Submit: Submitted,
    ListRuns: RunList, Control: Done, Watch: View,
}  # fmt: skip
"""What a call is answered with."""

_calls: msgspec.json.Decoder[Call] = msgspec.json.Decoder(Call)
_T = TypeVar("_T")


def encode(message: msgspec.Struct) -> bytes:
    """A call or an answer as JSON."""
    return msgspec.json.encode(message)


def decode_call(content: bytes) -> Call:
    """A call.

    Raises:
        MessageError: for whatever is not exactly that; nothing else is ever raised.
    """
    return _decoded(_calls, content)


def decode(kind: type[_T], content: bytes) -> _T:
    """A message of a kind.

    Raises:
        MessageError: for whatever is not exactly that; nothing else is ever raised.
    """
    return _decoded(msgspec.json.Decoder(kind), content)


def _decoded(decoder: Any, content: bytes) -> Any:
    if len(content) > 2**26:
        raise MessageError(f"the message has {len(content)} bytes, too many.")
    try:
        return decoder.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MessageError(f"not a message: {str(error)[:200]}") from error
