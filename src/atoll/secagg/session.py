"""All machines of an attempt in one process: what a simulation runs, and where clients drop out on purpose.

Vectors may come one after the other: each is masked and added up, and nothing of it is kept.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from atoll.errors import unknown
from atoll.secagg.client import Client
from atoll.secagg.faults import SecAggError
from atoll.secagg.graph import threshold_of
from atoll.secagg.masks import Ring
from atoll.secagg.messages import Delivery, FromClient, Parameters
from atoll.secagg.policy import Identity, Policy, Roster
from atoll.secagg.server import Server, Sum

PHASES = ("join", "reveal", "share", "mask", "confirm", "unmask")
"""What a client answers, in order; one that drops out in a phase does not answer there, nor later."""


def roster_of(names: Iterable[str]) -> tuple[dict[str, Identity], Roster]:
    """Fresh identities for these names, and the roster they are in."""
    identities = {name: Identity.new(name) for name in names}
    return identities, Roster(i.member() for i in identities.values())


def lost(ends: Sequence[int], over: tuple[int, int], least: int) -> str:
    """Why an attempt is void in which everybody is everybody's neighbour; empty: it is not.

    Args:
        ends: for each client the number of the phase it drops out in; that after the last: none.
        over: the threshold's share of a group.
        least: fewest clients of a sum.
    """
    alive = [sum(end > phase for end in ends) for phase in range(len(PHASES))]
    threshold = threshold_of(alive[0], over)
    for phase, count in zip(PHASES, alive, strict=True):
        needed = least if phase == "join" else max(threshold, least) if phase in PHASES[1:4] else threshold
        if count < needed:
            return f"{count} clients are left after the phase {phase}; {needed} must be."
    return ""


class Session:
    """One attempt by every client's own machine.

    Args:
        identities: of the cohort.
        roster: with all of them in it.
        parameters: what it is about.
        leaving: in which of `PHASES` a client drops out; who is not named stays to the end.
        policy: of every client.
        run: the run's name.
        round: the round.

    Raises:
        Void: too few clients were left before the vectors.
        SecAggError: the parameters are not what the policy allows.
    """

    def __init__(
        self,
        identities: Mapping[str, Identity],
        roster: Roster,
        parameters: Parameters,
        leaving: Mapping[str, str],
        policy: Policy,
        *,
        run: str = "simulation",
        round: int = 0,
    ) -> None:
        for phase in leaving.values():
            if phase not in PHASES:
                raise unknown("leaving", phase, PHASES)
        broadcast = bytes(32)
        self._leaving = leaving
        self.server = Server(run, round, 1, roster, identities, parameters, broadcast, least=policy.least)
        self._clients = {n: Client(i, roster, policy) for n, i in identities.items()}
        for name in self._staying("join", list(identities)):
            self.server.receive(name, self._clients[name].join(self.server.invitation, broadcast))
        for phase in ("reveal", "share"):
            self._answer(phase)
        self._deliveries: Mapping[str, Any] = self.server.close()

    def add(self, name: str, vector: Ring) -> None:
        """A client's vector: masked, sent and added up, unless the client has dropped out."""
        delivery = self._deliveries.get(name)
        if isinstance(delivery, Delivery) and self._staying("mask", [name]):
            self._send(name, lambda: self._clients[name].mask(delivery, vector))

    def finish(self) -> Sum:
        """The sum of the vectors.

        Raises:
            Void: too few clients were left.
        """
        for phase in ("confirm", "unmask"):
            self._answer(phase)
        self.server.close()
        return self.server.result

    def _answer(self, phase: str) -> None:
        messages = self.server.close()
        for name in self._staying(phase, list(messages)):
            self._send(name, lambda n=name: getattr(self._clients[n], phase)(messages[n]))

    def _send(self, name: str, answer: Callable[[], FromClient]) -> None:
        """A client's answer; one that finds too few others in its group drops out."""
        try:
            message = answer()
        except SecAggError as error:
            if error.reason != "few":
                raise
            return
        self.server.receive(name, message)

    def _staying(self, phase: str, names: Sequence[str]) -> list[str]:
        left = PHASES[: PHASES.index(phase) + 1]
        return [n for n in names if self._leaving.get(n) not in left]
