"""The server's side of one attempt, as a state machine that does no input or output.

`invitation` goes to the cohort. Then, phase by phase, `receive` takes in what clients answer, in any order, and `close`
ends the phase, whoever is missing, and says what goes to whom:

    ADVERT -> Roll    REVEAL -> Neighbours    SHARE -> Delivery    MASK -> Survivors    CONFIRM -> Confirmations
    UNMASK -> result

When to close is its owner's decision, by a clock or a number. Masked vectors are added up as they come: the server
keeps one vector. Whoever acts for a client is authenticated by what carries the messages; what clients rely on is
signed by themselves, and they check it. Where too few are left the attempt is `Void`, and so are its keys.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import NamedTuple, Never

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from atoll.errors import invalid
from atoll.secagg import graph, messages, shamir
from atoll.secagg.encoding import Scale
from atoll.secagg.faults import Reason, SecAggError, Void
from atoll.secagg.masks import Ring, add_masks
from atoll.secagg.messages import (
    Advert,
    Confirm,
    Confirmations,
    Delivery,
    FromClient,
    FromServer,
    Invitation,
    Masked,
    Neighbour,
    Neighbours,
    Parameters,
    Reveal,
    Roll,
    Sealed,
    Shares,
    Signed,
    Survivors,
    Unmask,
    bits_of,
)
from atoll.secagg.policy import Roster, check_threshold
from atoll.secagg.primitives import KEY, agree, verified


class Phase(IntEnum):
    """What the server waits for."""

    ADVERT = 0
    REVEAL = 1
    SHARE = 2
    MASK = 3
    CONFIRM = 4
    UNMASK = 5
    DONE = 6
    VOID = 7


_DUE: dict[Phase, type] = {
    Phase.ADVERT: Advert,
    Phase.REVEAL: Reveal,
    Phase.SHARE: Shares,
    Phase.MASK: Masked,
    Phase.CONFIRM: Confirm,
    Phase.UNMASK: Unmask,
}


class Sum(NamedTuple):
    """What an attempt gives."""

    total: Ring  # [length], the sum of the survivors' vectors in the ring
    survivors: tuple[str, ...]
    culprits: dict[str, str]  # clients whose messages were wrong, and how; the sum is right all the same


class Server:
    """One attempt at a sum.

    Args:
        run: the run's name.
        round: the round.
        attempt: at this round, from 1; a later attempt has a larger number.
        roster: the clients it knows.
        cohort: names of those that are asked.
        parameters: what it is about.
        broadcast: hash of the model and task the cohort was sent, 32 bytes.
        least: fewest clients of a sum, at least 3.

    Raises:
        InvalidArgument: fewer than `least` clients, strangers, bits with which the sum might wrap, a threshold at or
            below half.
    """

    def __init__(
        self,
        run: str,
        round: int,
        attempt: int,
        roster: Roster,
        cohort: Iterable[str],
        parameters: Parameters,
        broadcast: bytes,
        *,
        least: int = 3,
    ) -> None:
        names = tuple(sorted(cohort))
        if least < 3:
            raise invalid("least", least, "at least 3", "A sum of two shows each the other's vector.")
        if len(set(names)) != len(names) or not all(n in roster for n in names):
            raise invalid("cohort", names[:5], "distinct names of the roster")
        if len(names) < least:
            raise invalid("cohort", names, f"at least {least} clients", "A sum of fewer hides too little.")
        check_threshold(parameters.threshold, "curious")
        Scale(len(names), parameters.bits)
        self.phase = Phase.ADVERT
        self.culprits: dict[str, str] = {}
        self.invitation = Invitation(run, round, attempt, names, parameters, broadcast)
        self._names, self._places = names, {n: i for i, n in enumerate(names)}
        self._roster, self._asked, self._least = roster, parameters, least
        identities = roster.identities(names)
        self._base = messages.base_of(run, round, attempt, identities, parameters, broadcast)
        self._probe = X25519PrivateKey.generate()
        self._adverts: dict[int, Advert] = {}
        self._nonces: dict[int, bytes] = {}
        self._shares: dict[int, Shares] = {}
        self._masked: set[int] = set()
        self._confirmed: dict[int, bytes] = {}
        self._unmasked: dict[int, Unmask] = {}
        self._total = np.zeros(parameters.length, dtype=Scale(len(names), parameters.bits).dtype)
        self._session = self._base
        self._keepers: dict[int, tuple[int, ...]] = {}
        self._dealers: dict[int, list[int]] = {}
        self._result: Sum | None = None

    def __repr__(self) -> str:
        return f"Server({self.invitation.run!r}, round {self.invitation.round}, {self.phase.name.lower()})"

    @property
    def awaited(self) -> tuple[str, ...]:
        """Who may still answer in this phase."""
        return tuple(self._names[p] for p in sorted(self._expected() - self._answered()))

    @property
    def result(self) -> Sum:
        """The sum, once the attempt is done."""
        if self._result is None:
            raise SecAggError("order", f"{self!r} has no sum yet.")
        return self._result

    # --- what comes in ------------------------------------------------------------------------------------------------

    def receive(self, name: str, message: FromClient) -> None:
        """Take in a client's answer.

        Args:
            name: the client, as the transport knows it.
            message: what it sent.

        Raises:
            SecAggError: a message that is late, early, repeated, of another session or a stranger ("order"), or wrong
                in itself. Nothing has changed then.
        """
        due = _DUE.get(self.phase)
        place = self._places.get(name, -1)
        if due is None or type(message) is not due:
            raise SecAggError("order", f"{self!r} does not wait for {type(message).__name__} of {name}.", name)
        if place not in self._expected():
            raise SecAggError("order", f"{name} has no part in this phase: it left an earlier one out.", name)
        if place in self._answered():
            raise SecAggError("order", f"{name} has answered already.", name)
        theirs = message.base if isinstance(message, Advert) else message.session
        if theirs != self._session:
            raise SecAggError("order", f"{name} answers another session.", name)
        match message:
            case Advert():
                self._advert(place, name, message)
            case Reveal():
                if messages.nonce_commitment(self._base, name, message.nonce) != self._adverts[place].commitment:
                    raise SecAggError("graph", f"{name}'s nonce is not the one it committed to.", name)
                self._nonces[place] = message.nonce
            case Shares():
                if tuple(s.place for s in message.sealed) != self._keepers[place]:
                    raise SecAggError("graph", f"{name} deals shares to others than its keepers.", name)
                self._shares[place] = message
            case Masked():
                if len(message.vector) != self._total.nbytes:
                    raise SecAggError(
                        "input", f"{name} sent {len(message.vector)} bytes, not {self._total.nbytes}.", name
                    )
                self._total += np.frombuffer(message.vector, dtype=self._total.dtype)
                self._masked.add(place)
            case Confirm():
                if not verified(self._roster[name].public, message.signature, self._text):
                    raise SecAggError("survivors", f"{name} signed other survivors.", name)
                self._confirmed[place] = message.signature
            case Unmask():
                self._unmasked[place] = message

    def _advert(self, place: int, name: str, advert: Advert) -> None:
        if not verified(self._roster[name].public, advert.signature, messages.advert_text(name, advert)):
            raise SecAggError("signature", f"the advert of {name} is not signed by {name}.", name)
        try:
            agree(self._probe, advert.cipher_key)
            agree(self._probe, advert.mask_key)
        except ValueError:
            raise SecAggError("key", f"{name}'s public key is of small order.", name) from None
        self._adverts[place] = advert

    # --- the end of a phase -------------------------------------------------------------------------------------------

    def close(self) -> Mapping[str, FromServer]:
        """End the phase and say what goes to whom; at the last one nothing does, and there is a `result`.

        Raises:
            Void: the attempt cannot give a sum any more.
        """
        try:
            match self.phase:
                case Phase.ADVERT:
                    out = self._close_adverts()
                case Phase.REVEAL:
                    out = self._close_reveals()
                case Phase.SHARE:
                    out = self._close_shares()
                case Phase.MASK:
                    out = self._close_masked()
                case Phase.CONFIRM:
                    out = self._close_confirmed()
                case Phase.UNMASK:
                    self._result = self._open()
                    out: dict[int, FromServer] = {}
                case _:
                    raise SecAggError("order", f"{self!r} has no phase to close.")
        except Void:
            self.phase = Phase.VOID
            raise
        self.phase = Phase(self.phase + 1)
        return {self._names[p]: m for p, m in out.items()}

    def _close_adverts(self) -> dict[int, FromServer]:
        self._many(self._adverts, "sent keys")
        self._present = sorted(self._adverts)
        leaves = [
            messages.leaf_of(n, self._adverts[i]) if i in self._adverts else bytes(KEY)
            for i, n in enumerate(self._names)
        ]
        roll = Roll(self._base, b"".join(leaves))
        self._session = messages.session_of(roll)
        group = graph.group_size(len(self._present), self._asked.degree)
        self._threshold = graph.threshold_of(group, self._asked.threshold)
        return dict.fromkeys(self._present, roll)

    def _close_reveals(self) -> dict[int, FromServer]:
        self._many(self._nonces, "showed their nonces")
        complete = len(self._present) <= graph.COMPLETE
        self._dealers = {p: [] for p in self._present}
        for place, nonce in sorted(self._nonces.items()):
            self._keepers[place] = graph.keepers(nonce, self._session, place, self._present, self._asked.degree)
            for keeper in self._keepers[place]:
                self._dealers[keeper].append(place)
        out: dict[int, FromServer] = {}
        for place in self._nonces:
            drawn_by = set(self._dealers[place])
            known = [
                Neighbour(p, self._adverts[p], b"" if complete or p not in drawn_by else self._nonces[p])
                for p in sorted(drawn_by.union(self._keepers[place]))
            ]
            out[place] = Neighbours(self._session, tuple(known))
        return out

    def _close_shares(self) -> dict[int, FromServer]:
        self._many(self._shares, "dealt shares")
        self._dealt = bits_of(self._shares, len(self._names))
        dealt_to: dict[int, list[Sealed]] = {p: [] for p in self._shares}
        for dealer, shares in sorted(self._shares.items()):
            for s in shares.sealed:
                if s.place in dealt_to:
                    dealt_to[s.place].append(Sealed(dealer, s.seed_hash, s.key_hash, s.text))
        return {p: Delivery(self._session, self._dealt, tuple(sealed)) for p, sealed in dealt_to.items()}

    def _close_masked(self) -> dict[int, FromServer]:
        self._many(self._masked, "sent a vector")
        self._needed(self._masked, "sent a vector")
        survivors = bits_of(self._masked, len(self._names))
        self._text = messages.survivors_text(self._session, self._dealt, survivors)
        return dict.fromkeys(sorted(self._masked), Survivors(self._session, survivors))

    def _close_confirmed(self) -> dict[int, FromServer]:
        self._needed(self._confirmed, "confirmed the survivors")
        out: dict[int, FromServer] = {}
        for place in self._confirmed:
            # As many as it must see, with its own, and no more to check.
            signers = [p for p in self._keepers[place] if p in self._confirmed][: self._threshold - 1]
            if len(signers) == self._threshold - 1:
                signed = tuple(Signed(p, self._confirmed[p]) for p in signers)
                out[place] = Confirmations(self._session, signed)
        return out

    # --- the sum ------------------------------------------------------------------------------------------------------

    def _open(self) -> Sum:
        seeds, keys = self._collect()
        masking = messages.masking_of(self._session, self._dealt)
        off: list[tuple[bytes, int]] = []
        for place in sorted(self._masked):
            seed = self._combined(place, seeds.get(place, {}), "seed")
            if messages.seed_commitment(self._session, place, seed) != self._shares[place].seed_commitment:
                self._lied(place)
            off.append((messages.own_mask(masking, seed), -1))
        for place in sorted(self._gone()):
            raw = self._combined(place, keys.get(place, {}), "key")
            key = X25519PrivateKey.from_private_bytes(raw)
            if key.public_key().public_bytes_raw() != self._adverts[place].mask_key:
                self._lied(place)
            for peer in sorted(self._peers(place)):
                secret = agree(key, self._adverts[peer].mask_key)
                mask = messages.pair_mask(masking, secret, place, peer)
                off.append((mask, -1 if peer < place else 1))
        add_masks(self._total, off)
        survivors = tuple(self._names[p] for p in sorted(self._masked))
        return Sum(self._total, survivors, dict(self.culprits))

    def _collect(self) -> tuple[dict[int, dict[int, bytes]], dict[int, dict[int, bytes]]]:
        """Shares of seeds and of keys that are what was committed to: dealer, then keeper."""
        hashes: dict[int, dict[int, Sealed]] = {d: {s.place: s for s in m.sealed} for d, m in self._shares.items()}
        seeds: dict[int, dict[int, bytes]] = {}
        keys: dict[int, dict[int, bytes]] = {}
        complaints: set[tuple[int, int]] = set()
        for keeper, message in sorted(self._unmasked.items()):
            name = self._names[keeper]
            complaints |= {(keeper, dealer) for dealer in message.unreadable if keeper in hashes.get(dealer, {})}
            given = {held.place for held in message.held}.union(message.unreadable)
            silent = [self._names[d] for d, dealt in sorted(hashes.items()) if keeper in dealt and d not in given]
            if silent:
                self.culprits[name] = f"it gave no share of {', '.join(silent[:5])}, and did not say why"
            for held in message.held:
                dealer, kind = held.place, "seed" if held.place in self._masked else "key"
                if dealer == keeper:
                    committed = self._shares[dealer].own_seed_hash
                elif keeper in hashes.get(dealer, {}):
                    sealed = hashes[dealer][keeper]
                    committed = sealed.seed_hash if kind == "seed" else sealed.key_hash
                else:
                    continue
                if messages.share_hash(self._session, kind, dealer, keeper, held.share) != committed:
                    self.culprits[name] = f"it gave a share of {self._names[dealer]} that is not the one it was dealt"
                    continue
                (seeds if kind == "seed" else keys).setdefault(dealer, {})[keeper + 1] = held.share
        self._complained(complaints)
        return seeds, keys

    def _complained(self, complaints: set[tuple[int, int]]) -> None:
        """Name whom keepers complain of, or the keeper: one of the two lies, and whoever is in more complaints it is.

        Where nothing tells them apart both are named, so that blaming others costs whoever does it its own place.
        """
        often = Counter(place for pair in complaints for place in pair)
        for pair in sorted(complaints):
            keeper, dealer = (self._names[p] for p in pair)
            said = f"{keeper} said that it could not read the shares of {dealer} (or the server changed them)"
            for place in pair:
                if often[place] == max(often[p] for p in pair):
                    self.culprits.setdefault(self._names[place], said)

    def _combined(self, place: int, shares: dict[int, bytes], kind: str) -> bytes:
        if len(shares) < self._threshold:
            self._void("few", f"{len(shares)} shares of the {kind} of {self._names[place]}; {self._threshold} must be")
        chosen = dict(sorted(shares.items())[: self._threshold])
        secret = shamir.combine(chosen)
        if secret is None:
            self._lied(place)
        return secret

    def _gone(self) -> set[int]:
        """Clients that have dealt shares and sent no vector, and share a mask with somebody who has."""
        return {p for p in self._shares.keys() - self._masked if self._peers(p)}

    def _peers(self, place: int) -> set[int]:
        """Survivors that share a mask with a client."""
        return self._masked.intersection(self._keepers[place]) | self._masked.intersection(self._dealers[place])

    # --- who is left --------------------------------------------------------------------------------------------------

    def _expected(self) -> set[int]:
        before: dict[Phase, Iterable[int]] = {
            Phase.ADVERT: range(len(self._names)),
            Phase.REVEAL: self._adverts,
            Phase.SHARE: self._nonces,
            Phase.MASK: self._shares,
            Phase.CONFIRM: self._masked,
            Phase.UNMASK: self._confirmed,
        }
        return set(before.get(self.phase, ()))

    def _answered(self) -> set[int]:
        now: dict[Phase, Iterable[int]] = {
            Phase.ADVERT: self._adverts,
            Phase.REVEAL: self._nonces,
            Phase.SHARE: self._shares,
            Phase.MASK: self._masked,
            Phase.CONFIRM: self._confirmed,
            Phase.UNMASK: self._unmasked,
        }
        return set(now.get(self.phase, ()))

    def _many(self, alive: Iterable[int], what: str) -> None:
        """Refuse to go on with too few clients altogether."""
        count = len(set(alive))
        least = self._least
        if self.phase > Phase.ADVERT and len(self._present) <= graph.COMPLETE:
            least = max(least, self._threshold)
        if count < least:
            self._void("few", f"{count} clients {what}; {least} must")

    def _needed(self, alive: Iterable[int], what: str) -> None:
        """Refuse to go on where a secret that the sum needs cannot be had from those who are left."""
        there = set(alive)
        for place in sorted(self._masked | self._gone()):
            own = place in there and place in self._masked
            count = len(there.intersection(self._keepers[place])) + own
            if count < self._threshold:
                self._void("few", f"{count} in the group of {self._names[place]} {what}; {self._threshold} must")

    def _lied(self, place: int) -> Never:
        self.culprits[self._names[place]] = "its shares do not give the secret it committed to"
        self._void("dealer", f"the shares that {self._names[place]} dealt do not give the secret it committed to")

    def _void(self, reason: Reason, text: str) -> Never:
        raise Void(
            reason,
            f"round {self.invitation.round}, attempt {self.invitation.attempt} is void: {text}. Nothing was revealed; "
            "try again with fresh keys.",
            dict(self.culprits),
        )
