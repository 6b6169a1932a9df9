"""Contents that only their receiver can read, whoever ends TLS on the way.

A request is sealed to the server's sealing key, its answer to whoever sealed the request. What is sealed is the whole
of it, head and content, as it was signed: a proxy sees times, lengths and addresses, and neither names nor paths.

    secret       32 random bytes, drawn for one request
    wrapped      HPKE (RFC 9180; base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305) of the secret
    salt         32 random bytes, drawn for one answer: the same request may come twice, and two answers under one key
                 and the same numbers would show their difference
    request key  HKDF-SHA256(secret; salt = wrapped)
    answer key   HKDF-SHA256(secret; salt = wrapped || salt), after RFC 9458, section 4.4
    pieces       STREAM (Hoang, Reyhanitabar, Rogaway and Vizar, CRYPTO 2015) over ChaCha20-Poly1305 (RFC 8439): the
                 nonce of a piece is its number (11 bytes) and whether it is the last (1 byte)

    request      wrapped, pieces
    answer       salt, pieces
    piece        4 bytes: its length, with the highest bit set in the last one; then so many bytes
    first piece  the head as JSON: `Asked` or `Answered`; the content begins with the second

A piece is given out when it has been opened, so that a long content is never held as a whole, and what came of one that
broke off may be kept. Whatever was altered, left out, repeated, put elsewhere or taken from another message does not
open. The server's sealing key follows from its identity key, so that it need not be kept, and is signed by it. Who
has the identity key can therefore open what was recorded before: sealing is secret for as long as that key is.
"""

import os
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, TypeVar, cast

import msgspec
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Meta

from atoll.errors import AtollError
from atoll.net.buffers import Buffer

PATH, KEY = "/v1/sealed", "/v1/sealing"
"""Where sealed requests go to, and where the server's sealing key is."""
MISDIRECTED = 421
"""Status of a request that was sealed to another key."""

SECRET = SALT = 32
"""Bytes of a request's secret, and of an answer's salt."""
WRAPPED = 80
"""Bytes of a secret that is sealed to a server."""
TOLD = 96
"""Bytes of a signed sealing key."""
PIECE = 2**16
"""Bytes of a piece at most: the slowest link that a server bears with brings one before it is cut off."""
LENGTH, TAG = 4, 16
"""Bytes that a piece takes beside its content: its length, and what shows that nothing was changed."""

_LAST = 2**31
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
_KEY, _WRAP, _REQUEST, _ANSWER = (
    f"atoll sealing 1 {what}".encode() for what in ("key", "wrapped", "request", "answer")
)

HEAD = 2**14
"""Bytes of a head."""

Fault = Literal["key", "altered", "truncated", "limit", "behind", "head"]
"""Why something sealed was refused: for another key, not what was sealed there, not all of it, too long, with something
behind its last piece, or with a head that is none."""


class SealError(AtollError):
    """Something that is not, byte for byte, what was sealed; `fault` says why."""

    def __init__(self, fault: Fault, text: str) -> None:
        super().__init__(text)
        self.fault: Fault = fault


# --- keys -------------------------------------------------------------------------------------------------------------


def sealing_key(identity: Ed25519PrivateKey) -> X25519PrivateKey:
    """The sealing key of a server."""
    return X25519PrivateKey.from_private_bytes(_derived(identity.private_bytes_raw(), b"", _KEY))


def told_key(identity: Ed25519PrivateKey) -> bytes:
    """A server's sealing key as everybody may hear it: the public key, and the server's signature of it."""
    public = sealing_key(identity).public_key().public_bytes_raw()
    return public + identity.sign(_KEY + public)


def key_told(told: bytes, server: Ed25519PublicKey) -> X25519PublicKey:
    """Undo `told_key`.

    Raises:
        SealError: this server never said it.
    """
    public, signature = told[:32], told[32:]
    try:
        server.verify(signature, _KEY + public)
    except InvalidSignature as error:
        raise SealError("key", "the sealing key is not one that the server signed.") from error
    return X25519PublicKey.from_public_bytes(public)


def _derived(secret: bytes, salt: bytes, label: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=label).derive(secret)


class Shared:
    """What the two ends of one request share.

    Attributes:
        wrapped: the secret, as it begins the request.
    """

    def __init__(self, secret: bytes, wrapped: bytes) -> None:
        self._secret, self.wrapped = secret, wrapped

    @classmethod
    def drawn(cls, key: X25519PublicKey, server: Ed25519PublicKey) -> "Shared":
        """For a request to a server.

        Args:
            key: its sealing key.
            server: its identity.
        """
        secret = os.urandom(SECRET)
        return cls(secret, _SUITE.encrypt(secret, key, info=_WRAP + server.public_bytes_raw()))

    @classmethod
    def opened(cls, wrapped: bytes, key: X25519PrivateKey, server: Ed25519PublicKey) -> "Shared":
        """Of a request that has come.

        Raises:
            SealError: it is for another key, or was changed.
        """
        try:
            if len(wrapped) != WRAPPED:
                raise InvalidTag
            secret = _SUITE.decrypt(wrapped, key, info=_WRAP + server.public_bytes_raw())
            if len(secret) != SECRET:
                raise InvalidTag
        except InvalidTag as error:
            raise SealError("key", "a request was not sealed to this server's key.") from error
        return cls(secret, wrapped)

    def request_key(self) -> bytes:
        """Of the request's pieces."""
        return _derived(self._secret, self.wrapped, _REQUEST)

    def answer_key(self, salt: bytes) -> bytes:
        """Of the pieces of the answer that begins with this salt."""
        return _derived(self._secret, self.wrapped + salt, _ANSWER)


# --- pieces -----------------------------------------------------------------------------------------------------------


def sealed_length(*parts: int) -> int:
    """Bytes that contents of these lengths take as pieces, when each begins a new one."""
    return sum(n + max(1, -(-n // PIECE)) * (LENGTH + TAG) for n in parts)


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


class Sealer:
    """Seals pieces, one after the other.

    Args:
        key: used for these and for nothing else.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher, self._number = ChaCha20Poly1305(key), 0

    def seal(self, content: Buffer, *, last: bool = False) -> bytes:
        """The next piece, of at most `PIECE` bytes; `last`: nothing comes behind it."""
        assert len(content) <= PIECE
        sealed = self._cipher.encrypt(_nonce(self._number, last), content, None)
        self._number += 1
        return (len(sealed) + _LAST * last).to_bytes(LENGTH, "big") + sealed

    def all(self, content: Buffer, *, last: bool = False) -> Iterator[bytes]:
        """A content of any length as pieces; at least one."""
        view = memoryview(content)
        for at in range(0, max(1, len(view)), PIECE):
            yield self.seal(view[at : at + PIECE], last=last and at + PIECE >= len(view))


class Opener:
    """Opens pieces as they come, however they are cut.

    Attributes:
        done: whether the last piece was there.

    Args:
        key: as of the sealer.
        first: bytes of the first piece at most; None: as of any other.
    """

    def __init__(self, key: bytes, first: int | None = None) -> None:
        self._cipher, self._number, self._first = ChaCha20Poly1305(key), 0, first
        self._had, self._fault = bytearray(), cast(SealError | None, None)
        self.done = False

    def take(self, part: Buffer) -> list[bytes]:
        """Contents of the pieces that are whole now; never more than a piece is held back.

        Raises:
            SealError: for whatever is not the next piece, once those before it were given out.
        """
        if self._fault is not None:
            raise self._fault
        self._had += part
        opened: list[bytes] = []
        try:
            while (piece := self._next()) is not None:
                opened.append(piece)
        except SealError as error:
            self._fault = error
            self._had.clear()
            if not opened:
                raise
        return opened

    def _next(self) -> bytes | None:
        """The content of the next piece, if it is whole."""
        if self.done and self._had:
            raise SealError("behind", "there is something behind the end of what was sealed.")
        if len(self._had) < LENGTH:
            return None
        word = int.from_bytes(self._had[:LENGTH], "big")
        length, last = word % _LAST, word >= _LAST
        most = (PIECE if self._number or self._first is None else self._first) + TAG
        if not TAG + (not last) <= length <= most:  # none but the last is empty: there is an end to them
            raise SealError("limit", f"a sealed piece claims {length} bytes; this one has at most {most}.")
        if len(self._had) < LENGTH + length:
            return None
        with memoryview(self._had) as had, had[LENGTH : LENGTH + length] as sealed:
            content = self._opened(sealed, last)
        del self._had[: LENGTH + length]
        self._number, self.done = self._number + 1, last
        return content

    def _opened(self, sealed: memoryview, last: bool) -> bytes:
        try:
            return self._cipher.decrypt(_nonce(self._number, last), sealed, None)
        except InvalidTag:
            raise SealError("altered", "what came is not what was sealed: something on the way changed it.") from None

    def end(self) -> None:
        """No more will come.

        Raises:
            SealError: it is not all.
        """
        if self._fault is not None:
            raise self._fault
        if not self.done:
            raise SealError("truncated", "what was sealed did not come whole: it was cut off on the way.")


class Begun:
    """The start of a message, which is of a length that is known, and the pieces behind it, the first of them a head.

    Args:
        length: of the start.
        key: of the pieces, by their start.
    """

    def __init__(self, length: int, key: Callable[[bytes], bytes]) -> None:
        self._start, self._length, self._key = bytearray(), length, key
        self._opener: Opener | None = None

    def take(self, part: Buffer) -> list[bytes]:
        """As `Opener.take`."""
        if self._opener is None:
            self._start += part
            if len(self._start) < self._length:
                return []
            self._opener = Opener(self._key(bytes(self._start[: self._length])), HEAD)
            part, self._start = bytes(self._start[self._length :]), bytearray()
        return self._opener.take(part)

    def end(self) -> None:
        """As `Opener.end`."""
        (self._opener or Opener(bytes(32))).end()

    @property
    def done(self) -> bool:
        """As `Opener.done`."""
        return self._opener is not None and self._opener.done


# --- heads ------------------------------------------------------------------------------------------------------------

# What a server's HTTP would refuse is refused here as well: nothing behind has seen a head that is not well formed.
_Method = Annotated[str, Meta(pattern=r"\A[A-Z]{1,20}\Z")]
_Target = Annotated[str, Meta(pattern=r"\A/[!-~]{0,4096}\Z")]
_Field = Annotated[str, Meta(pattern=r"\A[a-z0-9!#$%&'*+.^_`|~-]{1,100}\Z")]
_Text = Annotated[str, Meta(pattern=r"\A(?:[!-~](?:[ -~]*[!-~])?)?\Z")]
Fields = Annotated[list[tuple[_Field, _Text]], Meta(max_length=100)]
"""Headers: names in small letters, values of printable ASCII without blanks at their ends."""


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The head of a request; `target` is its path and query."""

    method: _Method
    target: _Target
    headers: Fields

    @property
    def length(self) -> int:
        """Bytes of its content.

        Raises:
            SealError: it says two lengths, or none that is a number.
        """
        told = [value for name, value in self.headers if name == "content-length"]
        if len(told) > 1 or not all(v.isascii() and v.isdecimal() and len(v) <= 18 for v in told):
            raise SealError("head", "the head of a sealed request does not say one length.")
        return int(told[0]) if told else 0


class Answered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The head of an answer."""

    status: Annotated[int, Meta(ge=200, le=599)]
    headers: Fields


_H = TypeVar("_H", Asked, Answered)


def head(kind: type[_H], content: bytes) -> _H:
    """A head.

    Raises:
        SealError: for whatever is not exactly that.
    """
    if len(content) > HEAD:
        raise SealError("limit", f"the head has {len(content)} bytes; at most {HEAD} are taken.")
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise SealError("head", "the head is not one.") from error
