"""The messages of the protocol: fixed records of numbers and bytes, in MessagePack, as they travel.

    server -> client     Invitation   Roll     Neighbours   Delivery   Survivors   Confirmations
    client -> server     Advert       Reveal   Shares       Masked     Confirm     Unmask

What comes from another party is read by `decode`: the length is bounded before anything is read, every field has a type
and a bound, lengths of lists are bounded before they are allocated, unknown fields and tags are refused, and a text
that is not byte for byte what encoding its content gives is refused too. Clients are told by their place in the cohort,
which is sorted by name. Sets of clients are bits, one for each place.
"""

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from atoll.errors import invalid
from atoll.secagg.faults import SecAggError
from atoll.secagg.primitives import KEY, SIGNATURE, TAG, derive, digest, encoded
from atoll.secagg.shamir import SHARE

MOST_CLIENTS = 2**14
"""Clients in a cohort."""
MOST_NUMBERS = 2**33
"""Numbers in a vector."""
MOST_BYTES = 2**26
"""Bytes of a message that is not a vector."""

Hash = Annotated[bytes, Meta(min_length=KEY, max_length=KEY)]
Place = Annotated[int, Meta(ge=0, lt=MOST_CLIENTS)]
Number = Annotated[int, Meta(ge=0, le=2**53)]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
_Signature = Annotated[bytes, Meta(min_length=SIGNATURE, max_length=SIGNATURE)]
_Share = Annotated[bytes, Meta(min_length=SHARE, max_length=SHARE)]
_Sealed = Annotated[bytes, Meta(min_length=2 * SHARE + TAG, max_length=2 * SHARE + TAG)]
_Bits = Annotated[bytes, Meta(min_length=1, max_length=MOST_CLIENTS // 8)]
_Many = Meta(max_length=MOST_CLIENTS)


class Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What all records of the protocol share; they never show what they hold."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"


class Parameters(Record, frozen=True):
    """What an attempt is about; every client compares it with its policy.

    Attributes:
        length: numbers in a vector.
        bits: of the sum; up to 32 the ring has 32 bits, else 64.
        clip: largest absolute value of a number.
        weight_cap: largest weight of a client.
        threshold: share of a group (numerator, denominator) of which more must be there to the end.
        degree: keepers of a client's shares, where there are more clients than `graph.COMPLETE`.
    """

    length: Annotated[int, Meta(ge=1, le=MOST_NUMBERS)]
    bits: Annotated[int, Meta(ge=8, le=48)] = 32
    clip: Annotated[float, Meta(gt=0)] = 1.0
    weight_cap: Annotated[float, Meta(gt=0)] = 1.0
    threshold: tuple[Annotated[int, Meta(ge=1, le=1000)], Annotated[int, Meta(ge=2, le=1000)]] = (2, 3)
    degree: Annotated[int, Meta(ge=2, lt=MOST_CLIENTS)] = 64

    def __post_init__(self) -> None:
        for name in ("clip", "weight_cap"):
            if not isinstance(getattr(self, name), float):
                raise invalid(name, getattr(self, name), "a float, so that it has one form in bytes")

    @property
    def canonical(self) -> bytes:
        """Bytes that no other parameters give."""
        return msgspec.msgpack.encode(self)


class Invitation(Record, frozen=True, tag="invitation"):
    """The server asks a cohort.

    Attributes:
        run: the run's name.
        round: the round.
        attempt: at this round, from 1.
        cohort: names, sorted.
        parameters: what it is about.
        broadcast: hash of the model and the task the clients were sent.
    """

    run: Name
    round: Number
    attempt: Number
    cohort: Annotated[tuple[Name, ...], _Many]
    parameters: Parameters
    broadcast: Hash


class Advert(Record, frozen=True, tag="advert"):
    """A client's fresh keys and the commitment to its nonce, signed by its identity.

    Attributes:
        base: hash of everything in the invitation, as the client knows it.
        cipher_key: X25519 key for sealed shares.
        mask_key: X25519 key for masks.
        commitment: to the nonce.
        signature: over all that and the client's name.
    """

    base: Hash
    cipher_key: Hash
    mask_key: Hash
    commitment: Hash
    signature: _Signature


class Roll(Record, frozen=True, tag="roll"):
    """Hashes of all clients' adverts, one after the other; zeros where a client sent none."""

    base: Hash
    leaves: Annotated[bytes, Meta(min_length=KEY, max_length=KEY * MOST_CLIENTS)]


class Reveal(Record, frozen=True, tag="reveal"):
    """A client's nonce, now that everybody's commitments are fixed."""

    session: Hash
    nonce: Hash


class Neighbour(Record, frozen=True):
    """What a client needs to know of another.

    Attributes:
        place: whose.
        advert: its keys.
        nonce: by which it has drawn this client; empty where it has not, or need not have.
    """

    place: Place
    advert: Advert
    nonce: Annotated[bytes, Meta(max_length=KEY)]


class Neighbours(Record, frozen=True, tag="neighbours"):
    """The keepers a client has drawn, and those who have drawn it."""

    session: Hash
    known: Annotated[tuple[Neighbour, ...], _Many]


class Sealed(Record, frozen=True):
    """A share of a seed and a share of a key, sealed for one keeper.

    Attributes:
        place: the keeper's in `Shares`, the dealer's in `Delivery`.
        seed_hash: commitment to the share of the seed.
        key_hash: commitment to the share of the key.
        text: both, sealed.
    """

    place: Place
    seed_hash: Hash
    key_hash: Hash
    text: _Sealed


class Shares(Record, frozen=True, tag="shares"):
    """A client's shares for its keepers.

    Attributes:
        session: the session.
        seed_commitment: to the seed of its own mask.
        own_seed_hash: commitment to the share of the seed it keeps itself.
        sealed: one for each keeper.
    """

    session: Hash
    seed_commitment: Hash
    own_seed_hash: Hash
    sealed: Annotated[tuple[Sealed, ...], _Many]


class Delivery(Record, frozen=True, tag="delivery"):
    """Who has dealt shares, and the shares dealt to this client."""

    session: Hash
    dealt: _Bits
    sealed: Annotated[tuple[Sealed, ...], _Many]


class Masked(Record, frozen=True, tag="masked"):
    """A client's masked vector: ring elements, little endian."""

    session: Hash
    vector: bytes


class Survivors(Record, frozen=True, tag="survivors"):
    """Whose masked vectors are in the sum."""

    session: Hash
    survivors: _Bits


class Confirm(Record, frozen=True, tag="confirm"):
    """A client's signature of who has dealt and who survives: the only such set it signs in this session."""

    session: Hash
    signature: _Signature


class Signed(Record, frozen=True):
    """A client's signature of the survivors."""

    place: Place
    signature: _Signature


class Confirmations(Record, frozen=True, tag="confirmations"):
    """Signatures by members of a client's group."""

    session: Hash
    signed: Annotated[tuple[Signed, ...], _Many]


class Held(Record, frozen=True):
    """A share that is given to the server: of the dealer's seed if it survives, of its key if not."""

    place: Place
    share: _Share


class Unmask(Record, frozen=True, tag="unmask"):
    """The shares a client keeps, one for each dealer, and the dealers whose shares it could not read."""

    session: Hash
    held: Annotated[tuple[Held, ...], _Many]
    unreadable: Annotated[tuple[Place, ...], _Many]


FromServer = Invitation | Roll | Neighbours | Delivery | Survivors | Confirmations
FromClient = Advert | Reveal | Shares | Masked | Confirm | Unmask

_encoder = msgspec.msgpack.Encoder()
_from_server = msgspec.msgpack.Decoder(FromServer)
_from_client = msgspec.msgpack.Decoder(FromClient)


def encode(message: FromServer | FromClient) -> bytes:
    """A message as it travels."""
    return _encoder.encode(message)


def decode_server(raw: bytes, limit: int = MOST_BYTES) -> FromServer:
    """A message of the server.

    Raises:
        SecAggError: "message", for whatever is wrong with the bytes.
    """
    return _decode(_from_server, raw, limit)


def decode_client(raw: bytes, limit: int = MOST_BYTES) -> FromClient:
    """A message of a client.

    Args:
        raw: the bytes.
        limit: bytes allowed; where a masked vector is expected, those of the vector and 128 more.

    Raises:
        SecAggError: "message", for whatever is wrong with the bytes.
    """
    return _decode(_from_client, raw, limit)


def _decode(decoder: "msgspec.msgpack.Decoder[Any]", raw: bytes, limit: int) -> Any:
    if len(raw) > limit:
        raise SecAggError("message", f"a message of {len(raw)} bytes, where {limit} are allowed.")
    try:
        message = decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # The error's own text may hold what was sent; it is told without it.
        raise SecAggError("message", f"bytes that are no message of the protocol ({type(error).__name__}).") from None
    if _encoder.encode(message) != raw:
        raise SecAggError("message", "a message that is not written in its one form.")
    return message


def bits_of(places: Iterable[int], count: int) -> bytes:
    """A set of places as bits."""
    out = bytearray(-(-count // 8))
    for place in places:
        out[place >> 3] |= 1 << (place & 7)
    return bytes(out)


def places_of(bits: bytes, count: int) -> tuple[int, ...]:
    """The places whose bits are set, in order.

    Raises:
        SecAggError: "message", where the bits are not those of so many clients.
    """
    if len(bits) != -(-count // 8):
        raise SecAggError("message", f"{len(bits)} bytes of bits for {count} clients.")
    found = tuple(i for i in range(8 * len(bits)) if bits[i >> 3] >> (i & 7) & 1)
    if found and found[-1] >= count:
        raise SecAggError("message", f"a bit for client {found[-1]} of {count}.")
    return found


# --- what is hashed and signed ----------------------------------------------------------------------------------------


def base_of(run: str, round: int, attempt: int, identities: bytes, parameters: Parameters, broadcast: bytes) -> bytes:
    """Hash of what an attempt is, before any key: run, round, attempt, identities, parameters, broadcast."""
    return digest("base", run, round, attempt, identities, parameters.canonical, broadcast)


def nonce_commitment(base: bytes, name: str, nonce: bytes) -> bytes:
    """Commitment to a client's nonce."""
    return digest("nonce", base, name, nonce)


def advert_text(name: str, advert: Advert) -> bytes:
    """What the signature of an advert signs."""
    parts = (advert.base, name, advert.cipher_key, advert.mask_key, advert.commitment)
    return encoded("atoll secagg 1 advert", *parts)


def leaf_of(name: str, advert: Advert) -> bytes:
    """Hash of an advert, as it stands in the roll."""
    return digest("leaf", advert_text(name, advert), advert.signature)


def session_of(roll: Roll) -> bytes:
    """The session: hash of the base and of all adverts, with their keys and commitments to nonces."""
    return digest("session", roll.base, roll.leaves)


def survivors_text(session: bytes, dealt: bytes, survivors: bytes) -> bytes:
    """What a confirmation signs."""
    return encoded("atoll secagg 1 survivors", session, dealt, survivors)


def masking_of(session: bytes, dealt: bytes) -> bytes:
    """What masks are derived under: clients that were told of different dealers share no mask."""
    return digest("masking", session, dealt)


def own_mask(masking: bytes, seed: bytes) -> bytes:
    """Key of a client's own mask."""
    return derive(seed, masking, "own mask")


def pair_mask(masking: bytes, secret: bytes, one: int, other: int) -> bytes:
    """Key of the mask two clients share; the one with the lower place adds it, the other takes it away."""
    return derive(secret, masking, "pair mask", min(one, other), max(one, other))


def seal_key(session: bytes, secret: bytes, dealer: int, keeper: int) -> bytes:
    """Key under which a dealer seals one text for a keeper."""
    return derive(secret, session, "shares", dealer, keeper)


def seed_commitment(session: bytes, place: int, seed: bytes) -> bytes:
    """Commitment to the seed of a client's own mask."""
    return digest("seed", session, place, seed)


def share_hash(session: bytes, kind: str, dealer: int, keeper: int, share: bytes) -> bytes:
    """Commitment to a share."""
    return digest("share", session, kind, dealer, keeper, share)


def sealed_for(session: bytes, dealer: int, keeper: int, seed_hash: bytes, key_hash: bytes) -> bytes:
    """The associated data of sealed shares."""
    return encoded(session, dealer, keeper, seed_hash, key_hash)
