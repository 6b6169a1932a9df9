"""Who may speak to a server: invites, and the roster of those who took one up.

An invite carries the server's address, the fingerprint of its key, a name, a role and a token; it holds once and for a
time. Whoever has it makes a key of its own, shows the server the token and the public key, and is enrolled. The server
keeps a token's hash alone, and the private key never leaves the place where it was made.
"""

import base64
import hashlib
import secrets
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Meta

from atoll.errors import InvalidArgument, RunError, invalid
from atoll.net.control import Hash, Line, Name, named_well
from atoll.net.keys import public_key
from atoll.net.signing import SERVER
from atoll.net.storage import Journal

Role = Literal["site", "researcher", "admin", "viewer"]
"""A site trains; a researcher submits runs and steers its own; an admin does everything; a viewer looks on."""

Address = Annotated[str, Meta(min_length=3, max_length=300, pattern=r"\A[A-Za-z0-9._:\[\]-]+:[0-9]{1,5}\Z")]
"""host:port."""
Token = Annotated[str, Meta(min_length=43, max_length=43, pattern=r"\A[A-Za-z0-9_-]+\Z")]

MARK = "atoll-invite-"
HOURS = 24.0


class Invite(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a newcomer is handed.

    Attributes:
        address: of the server.
        fingerprint: of the server's key.
        name: of the newcomer.
        role: of the newcomer.
        token: the secret that opens the door once.
        proxy: whether the address is of a proxy that ends TLS in front of the server.
    """

    address: Address
    fingerprint: Hash
    name: Name
    role: Role
    token: Token
    proxy: bool = False

    def __repr__(self) -> str:
        return f"Invite({self.name!r}, {self.role}, {self.address})"


_invites = msgspec.json.Decoder(Invite)


def encode(invite: Invite) -> str:
    """An invite as one word, which notices when a character of it was lost."""
    content = msgspec.json.encode(invite)
    return MARK + base64.urlsafe_b64encode(_sum(content) + content).decode().rstrip("=")


def decode(text: str) -> Invite:
    """Undo `encode`.

    Raises:
        InvalidArgument: it is no invite, or not all of it.
    """
    broken = InvalidArgument("INVITE is not a whole invite: copy all of the word that `atoll invite` printed.")
    word = text.strip()
    if not word.startswith(MARK) or len(word) > 4096:
        raise broken
    body = word.removeprefix(MARK)
    try:
        raw = base64.b64decode(body.encode("ascii") + b"=" * (-len(body) % 4), altchars=b"-_", validate=True)
        invite = _invites.decode(raw[4:])
    except (ValueError, msgspec.MsgspecError):
        raise broken from None
    if raw[:4] != _sum(raw[4:]):
        raise broken
    return invite


def _sum(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:4]


def new_token() -> str:
    """256 bits from the operating system's source."""
    return secrets.token_urlsafe(32)


def token_hash(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


# --- the roster -------------------------------------------------------------------------------------------------------


class Member(msgspec.Struct, frozen=True):
    """Somebody who may speak.

    Attributes:
        name: theirs.
        role: what they may do.
        key: their public key, as text.
        since: seconds since 1970.
        revoked: whether they are shut out.
    """

    name: str
    role: Role
    key: str
    since: float
    revoked: bool = False


class _Entry(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    at: float


class Invited(_Entry, frozen=True):
    """An invite was made; `sha256` is what is kept of its token."""

    name: Name
    role: Role
    sha256: Hash
    expires: float
    by: Line


class Enrolled(_Entry, frozen=True):
    """An invite was taken up."""

    name: Name
    role: Role
    sha256: Hash
    key: str


class Revoked(_Entry, frozen=True):
    """A member was shut out."""

    name: Name
    by: Line


class Refused(_Entry, frozen=True):
    """Somebody was turned away who should not have come: for the audit."""

    name: Line
    why: Line


Entry = Invited | Enrolled | Revoked | Refused
_entries: msgspec.json.Decoder[Entry] = msgspec.json.Decoder(Entry)


class EnrolmentError(RunError):
    """A newcomer was turned away; the text may be told."""


class Roster:
    """Members and open invites.

    Args:
        journal: of who was invited, let in, shut out and turned away.
    """

    def __init__(self, journal: Journal) -> None:
        self._log = journal
        self.members: dict[str, Member] = {}
        self._invites: dict[str, Invited] = {}
        self._used: dict[str, str] = {}  # token's hash -> the key that took it up
        self._keys: dict[str, Ed25519PublicKey] = {}
        for record in self._log:
            self._take(_entries.decode(record))

    @property
    def head(self) -> str:
        """Hash of the whole journal."""
        return self._log.head

    def entries(self) -> Iterator[Entry]:
        """Everything that happened, in order."""
        return (_entries.decode(record) for record in self._log)

    def close(self) -> None:
        """Let somebody else write."""
        self._log.close()

    def active(self, name: str) -> Member | None:
        """Somebody who may speak now."""
        member = self.members.get(name)
        return None if member is None or member.revoked else member

    def key(self, name: str) -> Ed25519PublicKey | None:
        """The key of somebody who may speak now."""
        return self._keys[name] if self.active(name) is not None else None

    def invite(self, name: str, role: Role, *, hours: float, by: str, now: float) -> str:
        """Make an invite; its token. An earlier one for the same name is void from now on.

        Raises:
            InvalidArgument: a name that cannot be, or is taken; hours that are not positive.
        """
        if not named_well(name) or name == SERVER:
            raise invalid("NAME", name, "of A-z 0-9 . _ @ - and blanks, at most 200 characters, and not 'server'")
        if self.active(name) is not None:
            raise invalid("NAME", name, "free", f"It is enrolled; shut it out first: atoll revoke {name}")
        if not 0 < hours <= 24 * 366:
            raise invalid("--hours", hours, "above 0 and at most 8784")
        token = new_token()
        self._record(Invited(now, name, role, token_hash(token), now + hours * 3600, by))
        return token

    def enrol(self, name: str, key: str, token: str, *, now: float) -> Member:
        """Take up an invite. The same key with the same token is told the same again: its answer may have been lost.

        Raises:
            EnrolmentError: the token is unknown, void, used, expired, or for somebody else.
            InvalidArgument: the key is none.
        """
        sha256 = token_hash(token)
        invited = self._invites.get(sha256)
        held = self.members.get(name)
        if invited is None:
            raise EnrolmentError("this invite is unknown, or a newer one took its place: ask for a new one.")
        if invited.name != name:
            raise EnrolmentError("this invite is for another name.")
        if sha256 in self._used:
            if held is not None and not held.revoked and self._used[sha256] == key == held.key:
                return held
            raise EnrolmentError("this invite was used already: ask for a new one.")
        if now >= invited.expires:
            raise EnrolmentError("this invite has expired: ask for a new one.")
        if held is not None and not held.revoked:
            raise EnrolmentError("this name is enrolled already.")
        public_key(key)
        if any(m.key == key for m in self.members.values()):
            raise EnrolmentError("this key belongs to another member: every member has one of its own.")
        self._record(Enrolled(now, name, invited.role, sha256, key))
        return self.members[name]

    def revoke(self, name: str, *, by: str, now: float) -> None:
        """Shut a member out, and void the invites for its name.

        Raises:
            InvalidArgument: there is nobody of that name.
        """
        if self.active(name) is None and not any(i.name == name for i in self._invites.values()):
            raise invalid("NAME", name, f"a member ({', '.join(sorted(self.members)) or 'there are none'})")
        self._record(Revoked(now, name, by))

    def note(self, name: str, why: str, *, now: float) -> None:
        """Keep for the audit that somebody was turned away."""
        self._record(Refused(now, name, why))

    def _record(self, entry: Entry) -> None:
        self._log.append(msgspec.json.encode(entry))
        self._take(entry)

    def _take(self, entry: Entry) -> None:
        match entry:
            case Invited(_, name, _, sha256):
                self._invites = {h: i for h, i in self._invites.items() if i.name != name or h in self._used}
                self._invites[sha256] = entry
            case Enrolled(at, name, role, sha256, key):
                self._used[sha256] = key
                self.members[name] = Member(name, role, key, at)
                self._keys[name] = public_key(key)
            case Revoked(_, name):
                self._invites = {h: i for h, i in self._invites.items() if i.name != name or h in self._used}
                if name in self.members:
                    self.members[name] = msgspec.structs.replace(self.members[name], revoked=True)
            case Refused():
                pass
