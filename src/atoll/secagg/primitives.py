"""The cryptography secure aggregation stands on: thin calls into the `cryptography` package, and nothing of our own.

Everything that is hashed, signed or derived has a label of its own and length-prefixed parts, so that no two purposes
ever share an input.

    hashes       SHA-256 (FIPS 180-4)          agreement   X25519 (RFC 7748)
    derivation   HKDF-SHA256 (RFC 5869)        signatures  Ed25519 (RFC 8032)
    sealing      ChaCha20-Poly1305 (RFC 8439)  streams     ChaCha20 (RFC 8439)
"""

import hashlib
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY = 32
"""Bytes of a key, a seed, a nonce of a client and a hash."""
SIGNATURE = 64
TAG = 16
"""Bytes by which sealing makes a text longer."""

_LENGTHS = [n.to_bytes(8, "little") for n in range(256)]
_ONCE = bytes(12)  # the nonce of a key that seals a single text


def encoded(*parts: bytes | str | int) -> bytes:
    """Parts as bytes that no other parts give: each with its length before it."""
    pieces: list[bytes] = []
    for part in parts:
        raw = part if isinstance(part, bytes) else str(part).encode()
        pieces += (_LENGTHS[len(raw)] if len(raw) < len(_LENGTHS) else len(raw).to_bytes(8, "little"), raw)
    return b"".join(pieces)


def digest(label: str, *parts: bytes | str | int) -> bytes:
    """SHA-256 of labelled parts: 32 bytes."""
    return hashlib.sha256(encoded(f"atoll secagg 1 {label}", *parts)).digest()


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int = KEY) -> bytes:
    """HKDF-SHA256 (RFC 5869)."""
    return HKDF(SHA256(), length, salt, info).derive(secret)


def derive(secret: bytes, session: bytes, label: str, *parts: bytes | str | int) -> bytes:
    """A key for one purpose in one session: 32 bytes."""
    return hkdf(secret, session, encoded(f"atoll secagg 1 {label}", *parts))


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """The X25519 secret of a private and somebody's public key (RFC 7748), never used but through `derive`.

    Raises:
        ValueError: a public key of small order, which gives the same secret with everybody.
    """
    return private.exchange(X25519PublicKey.from_public_bytes(public))


def seal(key: bytes, text: bytes, associated: bytes, nonce: bytes = _ONCE) -> bytes:
    """ChaCha20-Poly1305 (RFC 8439). A key seals one text only, so its nonce may be fixed."""
    return ChaCha20Poly1305(key).encrypt(nonce, text, associated)


def unseal(key: bytes, sealed: bytes, associated: bytes, nonce: bytes = _ONCE) -> bytes | None:
    """The text that was sealed; None where it was not sealed with this key and associated data."""
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, sealed, associated)
    except InvalidTag:
        return None


def stream(key: bytes, nonce: bytes = bytes(16)) -> Any:
    """A ChaCha20 key stream (RFC 8439; the nonce is a 32-bit block counter and 96 bits), as an encryptor of zeros."""
    return Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()


def verified(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether an Ed25519 signature (RFC 8032) is that of this key and message."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
