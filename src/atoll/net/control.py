"""The messages that sites and server exchange: fixed fields, checked types, bounded lengths, unknown fields forbidden.

A message names its round and attempt, so that it may arrive late, twice or in any order. Tensors travel beside it, as
a frame whose hash the message announces. Every answer tells the site which of its updates was counted last: that is how
it learns, whatever was lost on the way, whether to keep what it remembers of a round.
"""

import hashlib
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from atoll.errors import InvalidArgument
from atoll.net.buffers import Buffer

Name = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"\A[A-Za-z0-9][A-Za-z0-9._@ -]*\Z")]
"""Of a run or a site: A-z 0-9 . _ @ - and blanks, at most 200 characters."""
LONGEST_TEXT = 1000
"""Characters of a text."""

Text = Annotated[str, Meta(max_length=LONGEST_TEXT)]
Line = Annotated[str, Meta(max_length=LONGEST_TEXT, pattern=r"\A[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]*\Z")]
"""Text from a party that a screen will show: no line breaks, no control characters, no change of direction."""

Count = Annotated[int, Meta(ge=0, le=2**53)]
Hash = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
MOST = 2**20
"""Bytes of what travels inside a message."""
Content = Annotated[bytes, Meta(max_length=MOST)]
"""A message of secure aggregation, which only its machines read."""
PublicKey = Annotated[str, Meta(max_length=43, pattern=r"\A[A-Za-z0-9_-]*\Z")]
"""As `keys.public_text` writes it."""
Value = int | float | bool | Text | None
"""A leaf of a task that is no tensor."""

Stamp = tuple[Count, Count]
"""(round, attempt)."""


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    run: Name


# --- from a site ------------------------------------------------------------------------------------------------------


class Ask(_Message, frozen=True):
    """Is there work, and what became of my last update?

    Attributes:
        at: round and attempt of the task the site is working on, which it need not be given again.
    """

    site: Name
    at: Stamp | None = None


class Deliver(_Message, frozen=True):
    """An update; its frame travels beside it.

    Attributes:
        base: `base` of the work it answers: the hash of the task's frame.
        sha256: hash of the report's frame.
        size: bytes of the report's frame.
        parts: lengths of the averaged part, the averaged buffers and the summed part.
        bytes: bytes the pipeline counts for it.

    With a secure sum it is a site's word that it is trained: there is no report, and all of these numbers are 0.
    """

    site: Name
    round: Count
    attempt: Count
    base: Hash
    sha256: Hash
    size: Count
    parts: tuple[Count, Count, Count]
    bytes: Count


class Decline(_Message, frozen=True):
    """This site will not answer this attempt."""

    site: Name
    round: Count
    attempt: Count
    reason: Line


Step = Literal["join", "reveal", "share", "mask", "confirm", "unmask"]
"""What a site answers in a turn at a secure sum, as in `secagg.client`."""
STEPS: tuple[Step, ...] = ("join", "reveal", "share", "mask", "confirm", "unmask")
"""In order."""


class Say(_Message, frozen=True):
    """A site's answer in a step of a secure sum.

    Attributes:
        turn: which turn at this round's sum, from 1; every turn has keys and masks of its own.
        step: what it answers.
        content: the answer, a message of `secagg`; empty where it travels beside as a frame.
        sha256: hash of the answer.
        size: bytes of the frame; 0: the answer is the content.
    """

    site: Name
    round: Count
    attempt: Count
    turn: Count
    step: Step
    content: Content
    sha256: Hash
    size: Count

    def __repr__(self) -> str:
        return f"Say({self.site!r}, round {self.round}, turn {self.turn}, {self.step})"


class Abstain(_Message, frozen=True):
    """This site takes no more part in this turn."""

    site: Name
    round: Count
    attempt: Count
    turn: Count
    reason: Line


# --- from the server --------------------------------------------------------------------------------------------------


class Work(_Message, frozen=True):
    """A task; its frame travels beside it.

    Attributes:
        base: hash of the task's frame.
        size: bytes of the task's frame.
        clients: the cohort, in order: a sealing channel and keyed randomness need it.
        values: leaves of the task that are no tensors, by path.
        counted: the site's update that was counted last.
    """

    round: Count
    attempt: Count
    base: Hash
    size: Count
    kind: Literal["train", "evaluate"]
    seed: int
    clients: Annotated[tuple[Name, ...], Meta(max_length=100_000)]
    population: Count
    values: Annotated[dict[Annotated[str, Meta(max_length=256)], Value], Meta(max_length=4096)]
    counted: Stamp | None


class Turn(_Message, frozen=True):
    """A step of a secure sum, which waits for the site's answer.

    Attributes:
        turn, step: as in `Say`.
        content: what the server says, a message of `secagg`.
        keys: in the first step the public keys of the cohort, by name.
        counted: the site's update that was counted last.
    """

    round: Count
    attempt: Count
    turn: Count
    step: Step
    content: Content
    keys: Annotated[dict[Name, PublicKey], Meta(max_length=2**14)]
    counted: Stamp | None

    def __repr__(self) -> str:
        return f"Turn({self.run!r}, round {self.round}, turn {self.turn}, {self.step})"


class Wait(_Message, frozen=True):
    """Nothing to do in this round for now: ask again."""

    round: Count
    counted: Stamp | None


class Received(_Message, frozen=True):
    """The update is on disk: it will not be lost, and need not be sent again."""

    round: Count
    attempt: Count
    counted: Stamp | None


Cause = Literal[
    "unknown site", "revoked", "identity", "run", "stale", "conflict", "base", "not in cohort", "excluded", "content",
    "transport", "busy", "turn",
]  # fmt: skip
"""Why a message was refused; after "transport" and "busy" the very same may be sent again; "turn" is about an answer in
a secure sum alone."""


class Refused(_Message, frozen=True):
    """The message with this round and attempt changed nothing; `now` is the server's own round."""

    round: Count
    attempt: Count
    cause: Cause
    detail: Text
    now: Count
    counted: Stamp | None


class Ended(_Message, frozen=True):
    """The run is over."""

    round: Count
    reason: Text
    counted: Stamp | None


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an experiment's secure sum is about, as its approved code says.

    Attributes:
        bits, clip, weight_cap, threshold, degree: as in `secagg.Parameters`.
        least: fewest sites of a sum.
        server: what thresholds must bear, as in `secagg.Policy`.
    """

    bits: Count
    clip: float
    weight_cap: float
    threshold: tuple[Count, Count]
    degree: Count
    least: Count
    server: Literal["lying", "curious"]


Request = Ask | Deliver | Decline | Say | Abstain
Answer = Work | Turn | Wait | Received | Refused | Ended

_T = TypeVar("_T")

LONGEST = 2**24
"""Bytes of a message."""

_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_answers: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


class MessageError(InvalidArgument):
    """Bytes that are no message of the kind expected."""


def encode(message: Request | Answer) -> bytes:
    """A message as JSON."""
    return msgspec.json.encode(message)


def content_hash(*parts: Buffer) -> str:
    """What messages call a content by, given in one or more parts: SHA-256 in hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def plain(text: str) -> str:
    """Any text as a `Line`."""
    return "".join(c if c.isprintable() else " " for c in text[:LONGEST_TEXT])


def named_well(name: str) -> bool:
    """Whether a run or a site can have this name."""
    try:
        msgspec.convert(name, Name)
    except msgspec.ValidationError:
        return False
    return True


def decode_request(content: bytes) -> Request:
    """A site's message.

    Raises:
        MessageError: for whatever is not exactly that; nothing else is ever raised.
    """
    return _decoded(_requests, content)


def decode_answer(content: bytes) -> Answer:
    """The server's message.

    Raises:
        MessageError: for whatever is not exactly that; nothing else is ever raised.
    """
    return _decoded(_answers, content)


def _decoded(decoder: "msgspec.json.Decoder[_T]", content: bytes) -> _T:
    if len(content) > LONGEST:
        raise MessageError(f"the message has {len(content)} bytes, more than the limit of {LONGEST}.")
    try:
        return decoder.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MessageError(f"not a message: {str(error)[:200]}") from error
