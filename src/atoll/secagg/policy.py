"""What a client allows, whom it knows, and what it remembers: everything a server cannot talk it out of."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.errors import InvalidArgument, invalid
from atoll.secagg import graph
from atoll.secagg.encoding import Scale
from atoll.secagg.faults import SecAggError
from atoll.secagg.messages import MOST_CLIENTS, Invitation, Parameters
from atoll.secagg.primitives import KEY, digest

SMALL = 5
"""Clients below which a sum is worth a warning."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A client's lasting key; it never leaves the client.

    Attributes:
        name: the client's.
        key: Ed25519.
    """

    name: str
    key: Ed25519PrivateKey = field(repr=False)

    @staticmethod
    def new(name: str) -> "Identity":
        """A fresh identity from the secure source."""
        return Identity(name, Ed25519PrivateKey.generate())

    @property
    def public(self) -> bytes:
        """Its public key: 32 bytes."""
        return self.key.public_key().public_bytes_raw()

    def member(self, organisation: str = "") -> "Member":
        """Its entry in a roster."""
        return Member(self.name, self.public, organisation)


@dataclass(frozen=True, slots=True)
class Member:
    """A client as the others know it.

    Attributes:
        name: unique.
        public: its Ed25519 public key, 32 bytes.
        organisation: who runs it; empty: nobody else's.
    """

    name: str
    public: bytes
    organisation: str = ""


class Roster:
    """The clients a client knows, pinned when it joined: a server cannot add to it.

    Raises:
        InvalidArgument: names or keys that occur twice, or are none.
    """

    def __init__(self, members: Iterable[Member]) -> None:
        known: dict[str, Member] = {}
        owners: dict[bytes, str] = {}
        for member in members:
            if not member.name or len(member.name) > 200:
                raise invalid("name", member.name, "a name of 1 to 200 characters")
            if len(member.public) != KEY:
                raise invalid("public", f"{len(member.public)} bytes", f"{KEY} bytes", f"See {member.name}.")
            if member.name in known:
                raise invalid("members", member.name, "distinct names")
            if member.public in owners:
                raise invalid(
                    "members", f"{owners[member.public]}, {member.name}", "distinct keys", "One site has one identity."
                )
            owners[member.public] = member.name
            known[member.name] = member
        self._members: Mapping[str, Member] = known

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> Member:
        return self._members[name]

    def identities(self, cohort: Iterable[str]) -> bytes:
        """Hash of names and keys of a cohort."""
        return digest("identities", *(part for n in cohort for part in (n, self._members[n].public)))


class Mark(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The last attempt a client took part in, to be kept on disk before an answer leaves.

    Attributes:
        run: the run.
        round: the round.
        attempt: the attempt.
        broadcast: hash of the model and task.
        masked: whether its vector has left, under masks.
        survivors: the clients of the last sum it confirmed.
        sent: hashes of all models and tasks for which its vector has left in this run, under masks.
    """

    run: str
    round: int
    attempt: int
    broadcast: bytes = b""
    masked: bool = False
    survivors: tuple[str, ...] = ()
    sent: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """What a client takes part in.

    Attributes:
        server: "lying": the server may do anything, thresholds must be above two thirds of a group; "curious": it is
            taken to follow the protocol, thresholds must be above half.
        least: fewest clients in a cohort and in a sum, at least 3.
        colluding: share of a cohort that may collude with a lying server.
        risk: largest probability, for an attempt, that a client's keepers hold more of those than it bears.
        organisation: largest share of a cohort that one organisation may have, while the server may lie.
        length: most numbers in a vector.
        bits: fewest and most bits of a sum.
        clip: smallest and largest clip.
        weight_cap: largest cap of weights.
        attempts: at a round.
        again: whether a vector may be sent once more in another attempt at a round, or for the same model. A server
            that lies about the first attempt could then see single clients, as the difference of two sums.
    """

    server: Literal["lying", "curious"] = "lying"
    least: int = 3
    colluding: float = 0.05
    risk: float = 2.0**-30
    organisation: float = 1 / 3
    length: int = 2**31
    bits: tuple[int, int] = (16, 48)
    clip: tuple[float, float] = (0.0, math.inf)
    weight_cap: float = math.inf
    attempts: int = 16
    again: bool = False

    def __post_init__(self) -> None:
        if self.server not in ("lying", "curious"):
            raise invalid("server", self.server, '"lying" or "curious"')
        if isinstance(self.least, bool) or not isinstance(self.least, int) or self.least < 3:
            raise invalid(
                "least", self.least, "an integer of at least 3", "A sum of two shows each the other's vector."
            )
        for name in ("colluding", "risk", "organisation"):
            if not 0 <= getattr(self, name) <= 1:
                raise invalid(name, getattr(self, name), "a share from 0 to 1")

    def admit(self, name: str, invitation: Invitation, roster: Roster, mark: Mark | None) -> tuple[str, ...]:
        """Look at what a server asks of a client.

        Args:
            name: the client's own.
            invitation: what it was asked.
            roster: whom it knows.
            mark: its last attempt in this run.

        Returns:
            Warnings for the client's owner.

        Raises:
            SecAggError: "roster", "used" or "policy", with what is wrong and what is allowed.
        """
        cohort = invitation.cohort
        if list(cohort) != sorted(set(cohort)) or len(cohort) > MOST_CLIENTS:
            raise SecAggError("roster", "the cohort's names are not distinct and sorted.")
        if name not in cohort:
            raise SecAggError("roster", f"{name} is asked to take part in a cohort without it.")
        strangers = [n for n in cohort if n not in roster]
        if strangers:
            raise SecAggError("roster", f"clients that {name} does not know: {', '.join(strangers[:5])}.", strangers[0])
        if mark is not None and mark.run == invitation.run:
            self._check_mark(name, invitation, mark)
        self._check(len(cohort), invitation)
        if self.server == "lying":
            self._check_organisations(cohort, roster)
        if len(cohort) < SMALL:
            return (f"a sum over {len(cohort)} clients says much about each of them",)
        return ()

    def _check(self, clients: int, invitation: Invitation) -> None:
        asked = invitation.parameters
        allowed: list[tuple[bool, str, object, str]] = [
            (clients >= self.least, "clients", clients, f"at least {self.least}"),
            (1 <= invitation.attempt <= self.attempts, "attempt", invitation.attempt, f"at most {self.attempts}"),
            (asked.length <= self.length, "length", asked.length, f"at most {self.length}"),
            (self.bits[0] <= asked.bits <= self.bits[1], "bits", asked.bits, f"{self.bits[0]} to {self.bits[1]}"),
            (self.clip[0] <= asked.clip <= self.clip[1], "clip", asked.clip, f"{self.clip[0]} to {self.clip[1]}"),
            (asked.weight_cap <= self.weight_cap, "weight_cap", asked.weight_cap, f"at most {self.weight_cap}"),
        ]
        for fine, argument, value, rule in allowed:
            if not fine:
                raise SecAggError("policy", f"the server asks for {argument}={value}; this client allows {rule}.")
        if not (math.isfinite(asked.clip) and math.isfinite(asked.weight_cap)):
            raise SecAggError("policy", "the server asks for a clip or weight_cap that is not finite.")
        try:
            check_threshold(asked.threshold, self.server)
            Scale(clients, asked.bits)
        except InvalidArgument as error:
            raise SecAggError("policy", f"the server asks for what is not safe: {error}") from None
        self.admit_roll(clients, clients, asked)

    def admit_roll(self, present: int, cohort: int, asked: Parameters) -> None:
        """Look at how many of a cohort have sent keys. Those that collude with the server are among them.

        Raises:
            SecAggError: "few" or "policy".
        """
        if present < self.least:
            raise SecAggError("few", f"{present} clients have sent keys; this client allows {self.least} or more.")
        if self.server == "lying":
            colluding = min(math.ceil(self.colluding * cohort), present - 1)
            found = graph.risk(present, asked.degree, asked.threshold, colluding)
            if found > self.risk:
                raise SecAggError(
                    "policy",
                    f"with degree={asked.degree} and {colluding} of {present} clients colluding the server would see "
                    f"more than sums with probability {found:.2g}; this client allows {self.risk:.2g}.",
                )

    def _check_mark(self, name: str, invitation: Invitation, mark: Mark) -> None:
        asked = f"round {invitation.round}, attempt {invitation.attempt} of {invitation.run}"
        if (invitation.round, invitation.attempt) <= (mark.round, mark.attempt):
            raise SecAggError(
                "used",
                f"{asked} is not after round {mark.round}, attempt {mark.attempt}, in which {name} took part: nothing "
                "is taken up twice.",
            )
        last = mark.masked and (invitation.round == mark.round or invitation.broadcast == mark.broadcast)
        same = last or invitation.broadcast in mark.sent
        if same and not self.again:
            raise SecAggError(
                "used",
                f"{asked} asks for what {name} has sent already, in that round or for the same model: a server "
                "that kept that sum could take the sums of two attempts from each other and see a single client. Allow "
                "it with Policy(again=True) where the server is trusted not to.",
            )

    def _check_organisations(self, cohort: tuple[str, ...], roster: Roster) -> None:
        counts: dict[str, int] = {}
        for n in cohort:
            owner = roster[n].organisation
            if owner:
                counts[owner] = counts.get(owner, 0) + 1
        for owner, count in counts.items():
            if count > self.organisation * len(cohort) + 1e-9:
                raise SecAggError(
                    "policy",
                    f"{owner} runs {count} of {len(cohort)} clients; this client allows a share of "
                    f"{self.organisation:.3g}.",
                )


def check_threshold(over: tuple[int, int], server: Literal["lying", "curious"]) -> None:
    """Refuse a threshold that this server could get around.

    Args:
        over: share of a group (numerator, denominator) of which more must be there.
        server: "lying" or "curious".

    Raises:
        InvalidArgument: a share below two thirds (lying) or half (curious), or of 1 and more.
    """
    above, below = over
    least = (2, 3) if server == "lying" else (1, 2)
    if above * least[1] < least[0] * below or above >= below:
        why = (
            "a lying server would get both secrets of a client from two halves that it tells different things"
            if server == "lying"
            else "two disjoint halves would each have enough shares"
        )
        raise invalid(
            "threshold", f"{above}/{below}", f"from {least[0]}/{least[1]} to below 1 with a {server} server",
            f"Below that {why}.",
        )  # fmt: skip
