"""The client's side of one attempt, as a state machine that does no input or output.

    join(invitation)      -> Advert    fresh keys, commitment to a nonce
    reveal(roll)          -> Reveal    everybody's commitments are fixed: its own nonce
    share(neighbours)     -> Shares    shares of its seed and key for its keepers
    mask(delivery, vector)-> Masked    the vector under its own mask and those it shares with its neighbours
    confirm(survivors)    -> Confirm   its signature of who is in the sum
    unmask(confirmations) -> Unmask    one share of every dealer: of the seed of a survivor, of the key of another

A message that does not belong here is refused and changes nothing. One that breaks the rules ends the attempt: the
client forgets its secrets and answers nothing more. Either way nothing is answered twice, so no two vectors ever get
the same masks and no peer's two shares are ever given. Nothing of an attempt is written to disk but its `mark`; a
client that was restarted sits the attempt out.

Source: Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning", figure 4, with the
malicious-server parts; Bell et al. 2020 (see `graph`).
"""

import secrets
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec.structs import replace

from atoll.secagg import graph, messages, shamir
from atoll.secagg.faults import SecAggError
from atoll.secagg.groups import differing
from atoll.secagg.masks import RINGS, Ring, add_masks
from atoll.secagg.messages import (
    Advert,
    Confirm,
    Confirmations,
    Delivery,
    Held,
    Invitation,
    Masked,
    Neighbours,
    Parameters,
    Reveal,
    Roll,
    Sealed,
    Shares,
    Survivors,
    Unmask,
    bits_of,
    places_of,
)
from atoll.secagg.policy import Identity, Mark, Policy, Roster
from atoll.secagg.primitives import KEY, agree, seal, unseal, verified


class Phase(IntEnum):
    """What a client does next."""

    JOIN = 0
    REVEAL = 1
    SHARE = 2
    MASK = 3
    CONFIRM = 4
    UNMASK = 5
    DONE = 6
    ABORTED = 7


@dataclass(slots=True, repr=False)
class _Secrets:
    """What is forgotten when the attempt ends, or earlier."""

    cipher: X25519PrivateKey
    mask: X25519PrivateKey
    nonce: bytes
    seed: bytes


class Client:
    """One client in one attempt; it is made anew for the next.

    Args:
        identity: its lasting key.
        roster: the clients it knows.
        policy: what it takes part in.
        mark: the last attempt it took part in, from disk.

    Attributes:
        phase: what it does next.
        mark: what must be on disk before an answer of `join`, `mask` or `confirm` leaves.
        warnings: what its owner should know of this attempt.

    Raises:
        SecAggError: "roster", where the identity is not the roster's.
    """

    def __init__(self, identity: Identity, roster: Roster, policy: Policy | None = None, mark: Mark | None = None):
        self._identity, self._roster, self._policy = identity, roster, Policy() if policy is None else policy
        if identity.name not in roster or roster[identity.name].public != identity.public:
            raise SecAggError("roster", f"{identity.name}'s own key is not in the roster it was given.", identity.name)
        self.phase = Phase.JOIN
        self.mark = mark
        self.warnings: tuple[str, ...] = ()
        self._secrets: _Secrets | None = None
        self._kept: dict[int, tuple[bytes, bytes]] = {}
        self._own_share = b""
        self._unreadable: list[int] = []

    def __repr__(self) -> str:
        return f"Client({self._identity.name!r}, {self.phase.name.lower()})"

    # --- the six answers ----------------------------------------------------------------------------------------------

    def join(self, invitation: Invitation, broadcast: bytes) -> Advert:
        """Take part.

        Args:
            invitation: what the server asks.
            broadcast: hash of the model and task that this client was really sent, by its own reckoning.

        Returns:
            The advert. `mark` must be on disk before it leaves.
        """
        self._expect(Phase.JOIN)
        with self._or_abort():
            self.warnings = self._policy.admit(self._identity.name, invitation, self._roster, self.mark)
            if broadcast != invitation.broadcast:
                raise SecAggError("broadcast", "the server names another model or task than it sent to this client.")
            last = self.mark if self.mark is not None and self.mark.run == invitation.run else None
            before, sent = ((), ()) if last is None else (last.survivors, last.sent)
            self.mark = Mark(invitation.run, invitation.round, invitation.attempt, broadcast, False, before, sent)
            self._cohort = invitation.cohort
            self._own = invitation.cohort.index(self._identity.name)
            self._asked: Parameters = invitation.parameters
            identities = self._roster.identities(invitation.cohort)
            self._base = messages.base_of(
                invitation.run, invitation.round, invitation.attempt, identities, invitation.parameters, broadcast
            )
            fresh = _Secrets(
                X25519PrivateKey.generate(),
                X25519PrivateKey.generate(),
                secrets.token_bytes(KEY),
                secrets.token_bytes(KEY),
            )
            self._secrets = fresh
            unsigned = Advert(
                self._base,
                fresh.cipher.public_key().public_bytes_raw(),
                fresh.mask.public_key().public_bytes_raw(),
                messages.nonce_commitment(self._base, self._identity.name, fresh.nonce),
                bytes(64),
            )
            self._advert = signed(self._identity, unsigned)
            self.phase = Phase.REVEAL
            return self._advert

    def reveal(self, roll: Roll) -> Reveal:
        """Show the nonce, now that nobody can change who has committed to what."""
        self._expect(Phase.REVEAL)
        self._belongs(roll.base, self._base)
        with self._or_abort():
            count = len(self._cohort)
            if len(roll.leaves) != KEY * count:
                raise SecAggError("roster", f"a roll of {len(roll.leaves) // KEY} adverts for {count} clients.")
            self._leaves = [roll.leaves[KEY * i : KEY * (i + 1)] for i in range(count)]
            self._present = [i for i, leaf in enumerate(self._leaves) if leaf != bytes(KEY)]
            if self._leaves[self._own] != messages.leaf_of(self._identity.name, self._advert):
                raise SecAggError("roster", "the roll does not hold the advert this client sent.")
            self._policy.admit_roll(len(self._present), count, self._asked)
            self._session = messages.session_of(roll)
            self.phase = Phase.SHARE
            return Reveal(self._session, self._fresh.nonce)

    def share(self, neighbours: Neighbours) -> Shares:
        """Deal shares of the seed and of the mask key to its keepers."""
        self._expect(Phase.SHARE)
        self._belongs(neighbours.session, self._session)
        with self._or_abort():
            own, degree = self._own, self._asked.degree
            complete = len(self._present) <= graph.COMPLETE
            self._keepers = graph.keepers(self._fresh.nonce, self._session, own, self._present, degree)
            self._group = frozenset((*self._keepers, own))
            self._threshold = graph.threshold_of(len(self._group), self._asked.threshold)
            self._adverts: dict[int, Advert] = {}
            dealers: list[int] = []
            chosen = frozenset(self._keepers)
            for known in neighbours.known:
                place = known.place
                self._check_advert(place, known.advert)
                if complete:
                    dealers.append(place)
                elif known.nonce:
                    self._check_drawn(place, known.advert, known.nonce)
                    dealers.append(place)
                elif place not in chosen:
                    raise SecAggError("graph", f"{self._cohort[place]} is no neighbour of {self._identity.name}.")
                self._adverts[place] = known.advert
            missing = [p for p in self._keepers if p not in self._adverts]
            if missing:
                raise SecAggError("graph", f"the server holds back {self._cohort[missing[0]]}, a keeper.")
            self._dealers = frozenset(dealers)
            answer = self._deal()
            self.phase = Phase.MASK
            return answer

    def mask(self, delivery: Delivery, vector: Ring) -> Masked:
        """Mask a vector of ring elements.

        Args:
            delivery: shares of the clients that have drawn this one, and who has dealt.
            vector: [length] unsigned integers of the ring; it is not changed.
        """
        self._expect(Phase.MASK)
        self._belongs(delivery.session, self._session)
        dtype = RINGS[32 if self._asked.bits <= 32 else 64]
        if vector.dtype != dtype or vector.shape != (self._asked.length,):
            raise SecAggError(
                "input", f"a vector of {vector.dtype} {vector.shape}, where {dtype} ({self._asked.length},) is due."
            )
        with self._or_abort():
            dealt = places_of(delivery.dealt, len(self._cohort))
            self._dealt = frozenset(dealt)
            if self._own not in self._dealt or not self._dealt.issubset(self._present):
                raise SecAggError("survivors", "the clients that have dealt shares do not fit the roll.")
            self._enough(self._dealt, "have dealt shares")
            self._take(delivery.sealed)
            masking = messages.masking_of(self._session, bits_of(dealt, len(self._cohort)))
            keys = [(messages.own_mask(masking, self._fresh.seed), 1)]
            for peer in sorted(self._dealt & self._adverts.keys()):
                secret = self._agreed(self._fresh.mask, peer, self._adverts[peer].mask_key)
                keys.append((messages.pair_mask(masking, secret, self._own, peer), 1 if self._own < peer else -1))
            masked = np.array(vector)
            add_masks(masked, keys)
            assert self.mark is not None
            sent = (*(s for s in self.mark.sent if s != self.mark.broadcast), self.mark.broadcast)
            self.mark = replace(self.mark, masked=True, sent=sent)
            # From here on only shares of others are needed.
            self._secrets = None
            self.phase = Phase.CONFIRM
            return Masked(self._session, masked.tobytes())

    def confirm(self, survivors: Survivors) -> Confirm:
        """Sign who is in the sum; this client signs no other set in this session."""
        self._expect(Phase.CONFIRM)
        self._belongs(survivors.session, self._session)
        with self._or_abort():
            count = len(self._cohort)
            self._survivors = frozenset(places_of(survivors.survivors, count))
            if self._own not in self._survivors:
                raise SecAggError("survivors", "this client's vector is not in the sum.")
            if not self._survivors <= self._dealt:
                raise SecAggError("survivors", "clients survive that have dealt no shares.")
            self._enough(self._survivors, "survive")
            assert self.mark is not None
            names = tuple(self._cohort[p] for p in sorted(self._survivors))
            self.warnings += tuple(differing([frozenset(self.mark.survivors)], [frozenset(names)]))
            self.mark = replace(self.mark, survivors=names)
            self._text = messages.survivors_text(
                self._session, bits_of(self._dealt, count), bits_of(self._survivors, count)
            )
            self.phase = Phase.UNMASK
            return Confirm(self._session, self._identity.key.sign(self._text))

    def unmask(self, confirmations: Confirmations) -> Unmask:
        """Give one share of every dealer, once enough of its group have signed the same survivors."""
        self._expect(Phase.UNMASK)
        self._belongs(confirmations.session, self._session)
        with self._or_abort():
            allowed, agreed = self._group & self._survivors, {self._own}
            for signed_by in confirmations.signed:
                place = signed_by.place
                if place not in allowed or place in agreed:
                    raise SecAggError("survivors", f"client {place} may not confirm, or confirms twice.")
                name = self._cohort[place]
                if not verified(self._roster[name].public, signed_by.signature, self._text):
                    raise SecAggError("survivors", f"{name} did not sign these survivors.", name)
                agreed.add(place)
            if len(agreed) < self._threshold:
                raise SecAggError(
                    "survivors", f"{len(agreed)} of the group have signed the survivors; {self._threshold} must."
                )
            held = [
                Held(dealer, seed if dealer in self._survivors else key)
                for dealer, (seed, key) in sorted({**self._kept, self._own: (self._own_share, b"")}.items())
            ]
            answer = Unmask(self._session, tuple(held), tuple(sorted(self._unreadable)))
            self._forget(Phase.DONE)
            return answer

    # --- parts --------------------------------------------------------------------------------------------------------

    @property
    def _fresh(self) -> _Secrets:
        assert self._secrets is not None
        return self._secrets

    def _expect(self, phase: Phase) -> None:
        if self.phase is not phase:
            raise SecAggError("order", f"{self!r} cannot {phase.name.lower()} now.")

    def _belongs(self, theirs: bytes, ours: bytes) -> None:
        if theirs != ours:
            raise SecAggError("order", f"a message of another session than that of {self!r}.")

    @contextmanager
    def _or_abort(self) -> Generator[None]:
        try:
            yield
        except BaseException:
            self._forget(Phase.ABORTED)
            raise

    def _forget(self, phase: Phase) -> None:
        self.phase = phase
        self._secrets, self._own_share = None, b""
        self._kept.clear()

    def _enough(self, alive: frozenset[int], what: str) -> None:
        there = len(alive & self._group)
        if there < self._threshold:
            raise SecAggError("few", f"{there} of {len(self._group)} in the group {what}; {self._threshold} must.")
        if len(alive) < self._policy.least:
            raise SecAggError("few", f"{len(alive)} clients {what}; this client allows {self._policy.least} or more.")

    def _agreed(self, private: X25519PrivateKey, place: int, public: bytes) -> bytes:
        try:
            return agree(private, public)
        except ValueError:
            name = self._cohort[place]
            raise SecAggError("key", f"{name}'s public key is of small order.", name) from None

    def _check_advert(self, place: int, advert: Advert) -> None:
        if place == self._own or place in self._adverts or place >= len(self._cohort):
            raise SecAggError("graph", f"client {place} is told of twice, or is this client, or nobody.")
        name = self._cohort[place]
        if advert.base != self._base or messages.leaf_of(name, advert) != self._leaves[place]:
            raise SecAggError("signature", f"the advert of {name} is not the one in the roll.", name)
        if not verified(self._roster[name].public, advert.signature, messages.advert_text(name, advert)):
            raise SecAggError("signature", f"the advert of {name} is not signed by {name}.", name)

    def _check_drawn(self, place: int, advert: Advert, nonce: bytes) -> None:
        name = self._cohort[place]
        if messages.nonce_commitment(self._base, name, nonce) != advert.commitment:
            raise SecAggError("graph", f"the nonce of {name} is not the one it committed to.", name)
        if not graph.drew(nonce, self._session, place, self._present, self._asked.degree, self._own):
            raise SecAggError("graph", f"{name} did not draw {self._identity.name}.", name)

    def _deal(self) -> Shares:
        own, session, fresh = self._own, self._session, self._fresh
        points = [p + 1 for p in (own, *self._keepers)]
        seeds = shamir.split(fresh.seed, self._threshold, points)
        keys = shamir.split(fresh.mask.private_bytes_raw(), self._threshold, points)
        self._own_share = seeds[0]
        sealed: list[Sealed] = []
        for keeper, seed, key in zip(self._keepers, seeds[1:], keys[1:], strict=True):
            seed_hash = messages.share_hash(session, "seed", own, keeper, seed)
            key_hash = messages.share_hash(session, "key", own, keeper, key)
            secret = self._agreed(fresh.cipher, keeper, self._adverts[keeper].cipher_key)
            text = seal(
                messages.seal_key(session, secret, own, keeper),
                seed + key,
                messages.sealed_for(session, own, keeper, seed_hash, key_hash),
            )
            sealed.append(Sealed(keeper, seed_hash, key_hash, text))
        return Shares(
            session,
            messages.seed_commitment(session, own, fresh.seed),
            messages.share_hash(session, "seed", own, own, seeds[0]),
            tuple(sealed),
        )

    def _take(self, delivered: Sequence[Sealed]) -> None:
        """Open what dealers sealed. What cannot be read is complained of at the end; it is no reason to give up."""
        session, own = self._session, self._own
        due = self._dealers & self._dealt
        read: set[int] = set()
        for sealed in delivered:
            dealer = sealed.place
            if dealer not in due or dealer in read:
                raise SecAggError("graph", f"shares of client {dealer}, which are not due, or come twice.")
            read.add(dealer)
            secret = self._agreed(self._fresh.cipher, dealer, self._adverts[dealer].cipher_key)
            text = unseal(
                messages.seal_key(session, secret, dealer, own),
                sealed.text,
                messages.sealed_for(session, dealer, own, sealed.seed_hash, sealed.key_hash),
            )
            seed, key = (text[: shamir.SHARE], text[shamir.SHARE :]) if text is not None else (b"", b"")
            if (
                messages.share_hash(session, "seed", dealer, own, seed) == sealed.seed_hash
                and messages.share_hash(session, "key", dealer, own, key) == sealed.key_hash
            ):
                self._kept[dealer] = (seed, key)
            else:
                self._unreadable.append(dealer)
        self._unreadable += sorted(due - read)


def signed(identity: Identity, advert: Advert) -> Advert:
    """An advert under an identity's signature."""
    fields: dict[str, Any] = {n: getattr(advert, n) for n in ("base", "cipher_key", "mask_key", "commitment")}
    return Advert(**fields, signature=identity.key.sign(messages.advert_text(identity.name, advert)))
