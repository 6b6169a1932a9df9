"""Parties for the tests: a cohort whose messages travel as bytes, and hooks for whoever lies."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.secagg import Client, Identity, Parameters, Policy, Roster, Server, decode_client, decode_server, encode
from atoll.secagg.masks import RINGS
from atoll.secagg.server import Sum

PHASES = ("join", "reveal", "share", "mask", "confirm", "unmask")
BROADCAST = bytes(range(32))
NAMES = tuple(f"c{i:03d}" for i in range(300))
# Keys may be used again from test to test: every attempt has fresh ones of its own beside them.
IDENTITIES = {n: Identity.new(n) for n in NAMES}
LIMIT = 2**26


class World:
    """A server and its clients.

    Attributes:
        sent: every message a client sent, by (name, phase).
        told: every message a client was sent, by (name, phase).
    """

    def __init__(
        self,
        count: int,
        *,
        length: int = 4,
        bits: int = 32,
        over: tuple[int, int] = (2, 3),
        degree: int = 64,
        policy: Policy | None = None,
        attempt: int = 1,
        round: int = 0,
        **parameters: Any,
    ) -> None:
        self.names = NAMES[:count]
        self.roster = Roster(IDENTITIES[n].member() for n in self.names)
        self.asked = Parameters(length, bits, threshold=over, degree=degree, **parameters)
        self.policy = Policy(colluding=0.0) if policy is None else policy
        self.server = Server("run", round, attempt, self.roster, self.names, self.asked, BROADCAST)
        self.clients = {n: Client(IDENTITIES[n], self.roster, self.policy) for n in self.names}
        dtype = RINGS[32 if bits <= 32 else 64]
        draw = np.random.default_rng(count)
        self.vectors: dict[str, NDArray[Any]] = {
            n: draw.integers(0, np.iinfo(dtype).max, size=length, dtype=dtype, endpoint=True) for n in self.names
        }
        self.sent: dict[tuple[str, str], Any] = {}
        self.told: dict[tuple[str, str], Any] = {}
        self.due: Mapping[str, Any] = dict.fromkeys(self.names, self.server.invitation)
        self.phase = 0

    def answer(self, name: str, message: Any, phase: str) -> Any:
        """A client's answer, through bytes both ways."""
        message = decode_server(encode(message))
        client = self.clients[name]
        self.told[name, phase] = message
        if phase == "join":
            answer = client.join(message, BROADCAST)
        elif phase == "mask":
            answer = client.mask(message, self.vectors[name])
        else:
            answer = getattr(client, phase)(message)
        self.sent[name, phase] = answer
        return decode_client(encode(answer), LIMIT)

    def step(self, missing: Iterable[str] = (), change: Callable[[str, Any], Any] = lambda name, m: m) -> None:
        """One phase: everybody but those missing answers what `change` makes of the server's message."""
        phase, out = PHASES[self.phase], set(missing)
        for name, message in self.due.items():
            if name not in out:
                self.server.receive(name, self.answer(name, change(name, message), phase))
        self.due = self.server.close()
        self.phase += 1

    def until(self, phase: str) -> "World":
        """All phases before this one."""
        while PHASES[self.phase] != phase:
            self.step()
        return self

    def run(self, leaving: Mapping[str, str] | None = None) -> Sum:
        """All phases; clients drop out where `leaving` says."""
        gone: set[str] = set()
        while self.phase < len(PHASES):
            gone |= {n for n, p in (leaving or {}).items() if p == PHASES[self.phase]}
            self.step(gone)
        return self.server.result

    def total(self, survivors: Iterable[str]) -> NDArray[Any]:
        """The sum that is due, in the ring."""
        chosen = [self.vectors[n] for n in survivors]
        return np.sum(chosen, axis=0, dtype=chosen[0].dtype)
