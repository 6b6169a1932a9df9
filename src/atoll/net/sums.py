"""Secure sums over sites, the server's side: the machine of a turn, made of what sites have answered.

The machine of `secagg.Server` does the work; the coordinator says when a step is closed and keeps the answers. A
machine is made anew of them wherever one is missing, as after a restart, and is always the same: it holds no secret.
Masked vectors lie in the spool, under masks; nothing else of a site's update is ever at the server.
"""

from collections.abc import Mapping

import msgspec

from atoll import secagg
from atoll.errors import CompositionError, invalid
from atoll.net.control import MOST, STEPS, Content, Say, Step, Terms, Value, content_hash
from atoll.net.coordinator import Sum
from atoll.net.keys import public_key
from atoll.net.spool import Spool
from atoll.rounds import Process
from atoll.secagg import Parameters, SecAggError
from atoll.secagg.messages import FromServer

ENVELOPE = 128
"""Bytes of a masked vector's message beside the vector."""


def summing(process: Process) -> Terms | None:
    """What an experiment's secure sum is about; None: its channel shows updates one by one.

    Raises:
        CompositionError: a summing channel that cannot be driven over sites.
    """
    channel = process.chain.channel
    if channel.seal is None:
        return None
    if (asked := channel.parameters) is None:
        raise CompositionError(
            f"the channel {channel.name} is not driven over sites yet: use a secure_sum alone, or simulate."
        )
    if channel.leaving is not None:
        raise CompositionError(
            f"the channel {channel.name} lets clients drop out on purpose (dropouts=...), which is for simulations: "
            "sites drop out by themselves. Leave dropouts out."
        )
    return Terms(
        asked.bits, asked.clip, asked.weight_cap, asked.threshold, asked.degree, channel.least, channel.server
    )  # fmt: skip


def parameters_of(terms: Terms, length: int) -> Parameters:
    """What a turn is about, for vectors of so many numbers."""
    return Parameters(length, terms.bits, terms.clip, terms.weight_cap, terms.threshold, terms.degree)


def task_hash(base: str, kind: str, seed: int, values: Mapping[str, Value]) -> str:
    """Hash of the model and the work that a task is: `base` is that of its frame.

    Round and cohort are left out: the same model in another round is the same model, of which a site gives no second
    sum.
    """
    return content_hash(msgspec.json.encode([base, kind, seed, sorted(values.items())]))


def roster_of(keys: Mapping[str, str]) -> secagg.Roster:
    """Sites and their public keys, which are text.

    Raises:
        InvalidArgument: one is no key, or two sites have the same.
    """
    return secagg.Roster(secagg.Member(name, public_key(key).public_bytes_raw()) for name, key in keys.items())


def ring_bytes(terms: Terms, length: int) -> int:
    """Bytes of a vector."""
    return length * (4 if terms.bits <= 32 else 8)


class Machine:
    """The machine of a turn.

    Args:
        run, round, number: of the turn.
        turn: what the coordinator knows of it.
        terms: of the experiment.
        length: numbers in a vector.
        task: `task_hash` of what its sites were trained on.
        spool: where masked vectors are.

    Raises:
        InvalidArgument: what cannot be summed, as from `secagg.Server`.
        OSError: a masked vector cannot be read.
    """

    def __init__(
        self, run: str, round: int, number: int, turn: Sum, terms: Terms, length: int, task: str, spool: Spool
    ) -> None:
        self.at = (round, number)
        self._largest = ring_bytes(terms, length) + ENVELOPE
        self._server = secagg.Server(
            run, round, number, roster_of(turn.keys), turn.keys, parameters_of(terms, length), bytes.fromhex(task),
            least=terms.least,
        )  # fmt: skip
        if len(secagg.encode(self._server.invitation)) > MOST:
            raise invalid("cohort", f"{len(turn.keys)} sites", f"sites whose names have at most {MOST} bytes together")
        self.told: Mapping[str, FromServer] = dict.fromkeys(turn.keys, self._server.invitation)
        for claim in turn.said:
            self._close_until(claim.step)
            self.take(claim.site, claim, spool.read(claim) if claim.size else b"")
        self._close_until(turn.step)

    def _close_until(self, step: Step) -> None:
        while self.step != step:
            self.told = self._server.close()

    @property
    def step(self) -> Step:
        """What it asks."""
        return STEPS[self._server.phase]

    @property
    def culprits(self) -> dict[str, str]:
        """Sites whose messages were wrong, and how."""
        return dict(self._server.culprits)

    def says(self, site: str) -> Content:
        """What a site is told in this step."""
        return secagg.encode(self.told[site])

    def take(self, site: str, claim: Say, frame: bytes) -> None:
        """Take an answer in.

        Raises:
            SecAggError: it is wrong, and nothing has changed.
        """
        if claim.step != self.step:
            raise SecAggError("order", f"{site} answers the step {claim.step}, not {self.step}.", site)
        if bool(claim.size) != (claim.step == "mask"):
            raise SecAggError("message", f"{site} answers otherwise than by a message, or by a masked vector.", site)
        raw, largest = (frame, self._largest) if claim.size else (claim.content, MOST)
        self._server.receive(site, secagg.decode_client(raw, largest))

    def close(self) -> secagg.Sum | None:
        """Close the step; the sum, if that was the last.

        Raises:
            Void: the turn cannot give a sum.
        """
        self.told = self._server.close()
        return self._server.result if self._server.phase == len(STEPS) else None
