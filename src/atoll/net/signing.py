"""Signatures of requests and answers (RFC 9421), and what makes a request fresh.

A request is signed by its sender's Ed25519 key over method, path, query and the digest of its content (RFC 9530); an
answer by the server's key over its status, the digest of its content and the request it answers, so that no answer
can stand for another. Whoever ends TLS between the two can neither change nor forge them. Bytes of an object have no
digest of their own, either way: the path names the hash of the whole, without which nothing of it counts.

Fresh is what this server process has not seen. Every request carries `EPOCH.LIFE.PROCESS.NUMBER`:

    EPOCH    drawn by the server when it starts: what was sent to an earlier life of it is void
    LIFE     counted by the sender on its own disk, at every start
    PROCESS  drawn by the sender when it starts
    NUMBER   counted by the sender with every request

Of one process a number is taken once. Clocks play no part.
"""

import hashlib
import re
import secrets
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from http_message_signatures.algorithms import ED25519  # pyright: ignore[reportPrivateImportUsage]
from http_message_signatures.digests import ContentDigest
from http_message_signatures.exceptions import HTTPMessageSignaturesException
from http_message_signatures.resolvers import HTTPSignatureKeyResolver
from http_message_signatures.signatures import HTTPMessageSigner, HTTPMessageVerifier

from atoll.errors import AtollError

TAG = "atoll"
REQUEST = ("@method", "@path", "@query")
ANSWER = ("@status", '"@method";req', '"@path";req', '"@query";req', '"signature";req')
DIGEST = "content-digest"
SERVER = "server"
"""The server's name as a signer; nobody can be enrolled by it."""


class SignatureError(AtollError):
    """A message that is not signed as it must be."""


@dataclass(slots=True)
class Request:
    """A request as its signature sees it; of the address only path and query are signed."""

    method: str
    url: str
    headers: Any


@dataclass(slots=True)
class Answer:
    """An answer as its signature sees it."""

    status_code: int
    headers: Any
    request: Any


class _Keys(HTTPSignatureKeyResolver):
    def __init__(self, public: Callable[[str], Ed25519PublicKey | None], private: Ed25519PrivateKey | None) -> None:
        self._public, self._private = public, private

    def resolve_public_key(self, key_id: str) -> Ed25519PublicKey | None:
        return self._public(key_id)

    def resolve_private_key(self, key_id: str) -> Ed25519PrivateKey:
        assert self._private is not None
        return self._private


class _Verifier(HTTPMessageVerifier):
    def validate_created_and_expires(self, sig_input: Any, max_age: Any = None) -> None:
        """Clocks are not looked at: what is fresh is settled by numbers."""


def _nobody(key_id: str) -> None:
    return None


def sign_request(key: Ed25519PrivateKey, name: str, message: Any, nonce: str, body: bytes | None) -> None:
    """Sign a request in place; its content, if it has one, gets a digest.

    Args:
        key: the sender's.
        name: the sender's.
        message: with `method`, `url` and `headers`.
        nonce: from `Numbers.next`.
        body: the content; None for a request without.
    """
    if _plainly_signed(key, name, message, REQUEST, _of_request(message), body, nonce):
        return
    signer = HTTPMessageSigner(signature_algorithm=ED25519, key_resolver=_Keys(_nobody, key))
    signer.sign(message, key_id=name, nonce=nonce, tag=TAG, label=TAG, covered_component_ids=REQUEST, body=body)


def verify_request(message: Any, public: Callable[[str], Ed25519PublicKey | None], *, content: bool) -> tuple[str, str]:
    """Who signed a request, and its nonce. Its content is not looked at: `check_content` does, once it was read.

    Args:
        message: with `method`, `url` and `headers`.
        public: name -> public key, or None.
        content: whether a digest of the content must be signed as well.

    Raises:
        SignatureError: it is not signed as it must be.
    """
    plain = _plainly_verified(message, public, REQUEST, _of_request(message), content=content)
    if plain is not None and plain[1]:
        return plain
    required = (*REQUEST, DIGEST) if content else REQUEST
    found = _verified(message, public, required, None)
    if not isinstance(found.nonce, str):
        raise SignatureError("the request has no number.")
    return str(found.parameters["keyid"]), found.nonce


def check_content(headers: Any, body: bytes) -> None:
    """Whether a content is the one whose digest was signed.

    Raises:
        SignatureError: it is not.
    """
    told = [v for n, v in headers.items() if n.lower() == DIGEST]
    if told == [_digest(body)]:
        return
    try:
        ContentDigest.verify(", ".join(told), body)
    except HTTPMessageSignaturesException as error:
        raise SignatureError("the content is not the one that was signed.") from error


def sign_answer(key: Ed25519PrivateKey, answer: Answer, body: bytes | None) -> None:
    """Sign an answer in place.

    Args:
        key: the server's.
        answer: its request is signed.
        body: the content; None where the receiver knows its hash already.
    """
    if _plainly_signed(key, SERVER, answer, ANSWER, _of_answer(answer), body, ""):
        return
    signer = HTTPMessageSigner(signature_algorithm=ED25519, key_resolver=_Keys(_nobody, key))
    signer.sign(answer, key_id=SERVER, tag=TAG, label=TAG, covered_component_ids=ANSWER, body=body)


def verify_answer(answer: Any, key: Ed25519PublicKey, body: bytes | None) -> None:
    """Whether the server gave this answer to this very request.

    Args:
        answer: with `status_code`, `headers` and `request`.
        key: the server's.
        body: the content; None where its hash is known already.

    Raises:
        SignatureError: it did not.
    """

    def public(name: str) -> Ed25519PublicKey | None:
        return key if name == SERVER else None

    plain = _plainly_verified(answer, public, ANSWER, _of_answer(answer), content=body is not None)
    if plain is not None:
        if body is not None:
            check_content(answer.headers, body)
        return
    required = ANSWER if body is None else (*ANSWER, DIGEST)
    found = _verified(answer, public, required, body)
    assert found.parameters["keyid"] == SERVER


def _verified(
    message: Any, public: Callable[[str], Ed25519PublicKey | None], required: tuple[str, ...], body: bytes | None
) -> Any:
    verifier = _Verifier(signature_algorithm=ED25519, key_resolver=_Keys(public, None))
    try:
        found = verifier.verify(message, max_age=None, expect_tag=TAG, require_components=required, body=body)
    except Exception as error:  # hostile headers may break a parser in any way, and must break nothing else
        raise SignatureError("the signature is missing or wrong.") from error
    if len(found) != 1:
        raise SignatureError("there is more than one signature.")
    return found[0]


# --- messages of one form ---------------------------------------------------------------------------------------------

# All of ours have one form, which is signed and verified here without a parser: a server does that several times a
# round for each of its sites. What has another form, the library signs and verifies; tests hold both to each other.

_NAME = r"[A-Za-z0-9._@ -]{1,200}"
_FORM = re.compile(
    rf'{TAG}=(\(([a-z@;=" -]*)\);created=(?:0|[1-9][0-9]{{0,11}});keyid="({_NAME})";alg="ed25519"'
    rf'(?:;nonce="([A-Za-z0-9.-]{{1,200}})")?;tag="{TAG}")'
)
_SIGNATURE = re.compile(rf"{TAG}=:([A-Za-z0-9+/]{{86}}==):")
_CHARACTERS = r"(?:[A-Za-z0-9._~\-!$&'()*+,;=:@/]|%[0-9A-Fa-f]{2})*"
_URL = re.compile(rf"https://[A-Za-z0-9.-]+(?::[0-9]{{1,5}})?(/{_CHARACTERS})(?:\?({_CHARACTERS}))?")
_HEADERS = ("signature-input", "signature", DIGEST)


def _of_request(message: Any) -> tuple[str, ...] | None:
    """Values of what a request's signature is over; None where it has another form."""
    url = _URL.fullmatch(str(message.url))
    if url is None or re.fullmatch("[A-Z]{1,20}", message.method) is None:
        return None
    return message.method, url[1], f"?{url[2] or ''}"


def _of_answer(answer: Any) -> tuple[str, ...] | None:
    asked = _of_request(answer.request)
    signature = [v for n, v in answer.request.headers.items() if n.lower() == "signature"]
    if asked is None or len(signature) != 1 or _SIGNATURE.fullmatch(signature[0]) is None:
        return None
    return str(answer.status_code), *asked, signature[0]


def _quoted(component: str) -> str:
    return component if component.startswith('"') else f'"{component}"'


def _base(components: Sequence[str], values: Sequence[str], parameters: str) -> bytes:
    """What is signed (RFC 9421, section 2.5)."""
    lines = [f"{c}: {v}" for c, v in zip(components, values, strict=True)]
    return "\n".join([*lines, f'"@signature-params": {parameters}']).encode("ascii")


def _digest(body: bytes) -> str:
    return f"sha-256=:{b64encode(hashlib.sha256(body).digest()).decode()}:"


def _plainly_signed(
    key: Ed25519PrivateKey, name: str, message: Any, over: Sequence[str], values: Sequence[str] | None,
    body: bytes | None, nonce: str,
) -> bool:  # fmt: skip
    """Sign a message of our form; False: it has another."""
    headers = message.headers
    if values is None or re.fullmatch(_NAME, name) is None or re.fullmatch("[A-Za-z0-9.-]{0,200}", nonce) is None:
        return False
    if any(n.lower() in _HEADERS for n in headers):
        return False
    components = [_quoted(c) for c in over]
    if body is not None:
        headers["Content-Digest"] = digest = _digest(body)
        components, values = [*components, f'"{DIGEST}"'], [*values, digest]
    number = f';nonce="{nonce}"' if nonce else ""
    parameters = f'({" ".join(components)});created={int(time.time())};keyid="{name}";alg="ed25519"{number};tag="{TAG}"'
    signature = key.sign(_base(components, values, parameters))
    headers["Signature-Input"] = f"{TAG}={parameters}"
    headers["Signature"] = f"{TAG}=:{b64encode(signature).decode()}:"
    return True


def _plainly_verified(
    message: Any, public: Callable[[str], Ed25519PublicKey | None], over: Sequence[str], values: Sequence[str] | None,
    *, content: bool,
) -> tuple[str, str] | None:  # fmt: skip
    """Who signed a message of our form, and its nonce; None: it has another.

    Raises:
        SignatureError: it has this form, and the signature is wrong.
    """
    if values is None:
        return None
    found: dict[str, str] = {}
    for name, value in message.headers.items():
        if (name := name.lower()) in _HEADERS:
            if name in found:
                return None
            found[name] = value
    form = _FORM.fullmatch(found.get("signature-input", ""))
    signature = _SIGNATURE.fullmatch(found.get("signature", ""))
    if form is None or signature is None:
        return None
    parameters, listed, name, nonce = form.groups()
    components = [_quoted(c) for c in over]
    if listed == " ".join([*components, f'"{DIGEST}"']) and re.fullmatch(r"[!-~]{1,200}", found.get(DIGEST, "")):
        components, values = [*components, f'"{DIGEST}"'], [*values, found[DIGEST]]
    elif content or listed != " ".join(components):
        return None
    key = public(name)
    if key is None:
        raise SignatureError("the signature is missing or wrong.")
    try:
        key.verify(b64decode(signature[1]), _base(components, values, parameters))
    except InvalidSignature as error:
        raise SignatureError("the signature is missing or wrong.") from error
    return name, nonce or ""


# --- what is fresh ----------------------------------------------------------------------------------------------------

WINDOW = 4096
"""Numbers below the highest seen that may still come: requests overtake each other."""
PROCESSES = 64
"""Processes of one sender that are told apart at a time."""


class Numbers:
    """What a sender puts into its requests.

    Args:
        life: of the sender, from its disk.
    """

    def __init__(self, life: int) -> None:
        self.epoch = "-"
        self._life, self._process, self._number = life, secrets.token_hex(8), 0

    def next(self) -> str:
        """Of the next request."""
        self._number += 1
        return f"{self.epoch}.{self._life}.{self._process}.{self._number}"


class _Seen:
    def __init__(self) -> None:
        self.highest, self.numbers = 0, set[int]()

    def take(self, number: int) -> bool:
        if number <= self.highest - WINDOW or number in self.numbers:
            return False
        self.highest = max(self.highest, number)
        self.numbers.add(number)
        if len(self.numbers) > 2 * WINDOW:
            self.numbers = {n for n in self.numbers if n > self.highest - WINDOW}
        return True


class Fresh:
    """What this server process has seen of every sender.

    Attributes:
        epoch: of this process.

    Args:
        newest: of senders whose newest process alone is heard, by key: LIFE and PROCESS of the last one, as an earlier
            process of the server has heard it.
        keep: called with a key and both when there is a newer one, before it is heard.
    """

    def __init__(
        self,
        newest: Mapping[str, tuple[int, str]] | None = None,
        keep: Callable[[str, tuple[int, str]], None] | None = None,
    ) -> None:
        self.epoch = secrets.token_hex(16)
        self._newest, self._keep = dict(newest or {}), keep or (lambda key, process: None)
        self._seen: dict[str, dict[tuple[int, str], _Seen]] = {}

    def take(self, key: str, nonce: str, *, alone: bool) -> str:
        """ "" for a request that is fresh; else why it is not: "epoch", "replay" or "fenced".

        Args:
            key: the sender's public key.
            nonce: of the request.
            alone: whether only the newest process of this sender is heard.

        Raises:
            OSError: it could not be kept which process is the newest; nothing was taken.
        """
        parts = nonce.split(".")
        if len(parts) != 4 or len(nonce) > 200 or not (parts[1].isascii() and parts[1].isdecimal()):
            return "replay"
        epoch, life, process, number = parts
        if epoch != self.epoch:
            return "epoch"
        if not (number.isascii() and number.isdecimal()) or len(number) > 18 or len(life) > 18:
            return "replay"
        seen = self._seen.setdefault(key, {})
        mine = (int(life), process)
        if mine not in seen:
            if alone and (newest := self._newest.get(key)) != mine:
                if newest is not None and int(life) <= newest[0]:
                    return "fenced"  # an earlier process, or a copy of the sender that has counted as far
                self._keep(key, mine)
                self._newest[key] = mine
            if len(seen) >= PROCESSES:
                oldest = min(seen)
                if mine < oldest:
                    return "replay"
                del seen[oldest]
            seen[mine] = _Seen()
        elif alone and mine != self._newest.get(key, mine):
            return "fenced"
        return "" if seen[mine].take(int(number)) else "replay"
