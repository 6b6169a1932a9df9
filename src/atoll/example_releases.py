"""What example-level privacy spends in a run, client by client: every visit is entered before the client trains.

A visit is a round in which a client took part; it makes as many noised steps as the local plans say. A round that is
run again after a kill is another visit: its batches and noise are new, so that both count.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from atoll.engines.private import sampling_rate
from atoll.errors import InvalidArgument
from atoll.journal import Journal
from atoll.privacy.accounting import Event, check_delta, composed_epsilon, smallest, usual_delta
from atoll.privacy.ledger import ahead
from atoll.rounds import Process

LISTED = 50
"""Up to so many clients have their own epsilon in the statement."""

Use = tuple[tuple[float, int], ...]
"""Of every local plan: the share of a client's examples in a batch, and steps in a visit."""


class ExampleReleases:
    """The visits of one run.

    Args:
        process: whose local plans ask for privacy.
        sizes: examples of every client.
        rounds: of the whole run.
        journal: of the run.

    Raises:
        InvalidArgument: a delta that is too large, a calibration without a solution, or one for fewer rounds.
    """

    def __init__(self, process: Process, sizes: Mapping[str, int], rounds: int, journal: Journal) -> None:
        plans = process.algorithm.plans
        told = plans[0].privacy
        assert told is not None
        self._told, self._journal, self._rounds = told, journal, rounds
        self._lists = not process.chain.protects_clients  # a client's own epsilon tells how many examples it has
        each = {n: self._use(process, n) for n in set(sizes.values())}
        self._uses: dict[str, Use] = {client: each[n] for client, n in sizes.items()}
        begun = next(iter(journal.events("privacy_examples")), None)
        if begun is None:
            most = max(sizes.values())
            delta = check_delta(usual_delta(most) if told.delta is None else told.delta, most)
            multiplier = told.noise_multiplier
            if multiplier is None:
                assert told.epsilon is not None
                multiplier = self._calibrated(told.epsilon, delta)
            terms: dict[str, Any] = {"noise_multiplier": multiplier, "delta": delta, "rounds": rounds}
            journal.append("privacy_examples", terms)
        else:
            terms = begun.body
            if told.epsilon is not None and rounds > terms["rounds"]:
                raise InvalidArgument(
                    f"rounds={rounds} is more than the {terms['rounds']} rounds for which the noise was calibrated to "
                    f"epsilon={told.epsilon:g}: more would exceed it. Begin a new run with a larger epsilon."
                )
        self.multiplier, self.delta = float(terms["noise_multiplier"]), float(terms["delta"])
        self._visits: Counter[str] = Counter()
        for event in journal.events("visits"):
            named = event.body["clients"]
            self._visits.update(list(self._uses) if named is None else named)

    def enter(self, round: int, clients: Sequence[str]) -> None:
        """Enter that these clients are about to train in a round (from 0)."""
        everyone = len(clients) == len(self._uses)
        self._journal.append("visits", {"round": round + 1, "clients": None if everyone else list(clients)})
        self._visits.update(clients)

    @property
    def epsilon(self) -> float:
        """What the client that spent most has spent, or a little more while the run goes on."""
        return max(
            (self._spent(use, ahead(count, self._rounds), fine=False) for use, count in self._most()), default=0.0
        )

    def statement(self) -> dict[str, Any]:
        """What the run may say of itself, as plain JSON values; the events are those of the client that spent most."""
        worst, spent = (((), 0), 0.0)
        for use, count in self._most():
            if (own := self._spent(use, count)) >= spent:
                worst, spent = (use, count), own
        events: list[dict[str, Any]] = [
            {
                "mechanism": "gaussian",
                "noise_multiplier": self.multiplier,
                "sampling": "poisson",
                "sampling_rate": rate,
                "count": steps * worst[1],
            }
            for rate, steps in worst[0]
        ]
        listed = self._uses if self._lists and len(self._uses) <= LISTED else {}
        return {
            "unit": "example",
            "epsilon": spent,
            "delta": self.delta,
            "neighbours": "zero-out",
            "accountant": self._told.accountant or "pld",
            "budget": self._told.epsilon,
            "releases": sum(e["count"] for e in events),
            "events": events,
            "whose": "each single example of any client",
            "noise_multiplier": self.multiplier,
            "clip": self._told.clip,
            "clients": {c: self._spent(use, self._visits[c]) for c, use in listed.items()},
            "private": self._told.seed is None,
            "trusted": "",
            "not_covered": [
                "validation and test examples, whose metrics are told as they are",
                "how many examples a client has, and how long rounds took",
                "all of a client's examples together: that is client-level privacy",
            ],
        }

    @staticmethod
    def _use(process: Process, examples: int) -> Use:
        sizes = np.array([examples])
        return tuple((sampling_rate(p, examples), int(p.total_steps(sizes)[0])) for p in process.algorithm.plans)

    def _calibrated(self, wanted: float, delta: float) -> float:
        """The least noise that keeps every client below epsilon if it takes part in every round."""
        uses = {(use, self._rounds) for use in self._uses.values()}
        hardest = _undominated(uses)

        def spent(multiplier: float) -> float:
            return max(self._spent(use, count, multiplier, delta, fine=False) for use, count in hardest)

        found = smallest(spent, wanted)
        if found is None:
            raise InvalidArgument(
                f"epsilon={wanted:g} at delta={delta:g} cannot be reached in {self._rounds:,} rounds by any noise "
                "multiplier up to 10,000: allow a larger epsilon, fewer steps, or a smaller batch_size."
            )
        return found

    def _spent(
        self, use: Use, visits: int, multiplier: float | None = None, delta: float | None = None, *, fine: bool = True
    ) -> float:
        multiplier = self.multiplier if multiplier is None else multiplier
        events = [Event(multiplier, "poisson", rate, steps * visits) for rate, steps in use]
        return composed_epsilon(
            events, self.delta if delta is None else delta, self._told.accountant or "pld", fine=fine
        )  # fmt: skip

    def _most(self) -> list[tuple[Use, int]]:
        """Uses and visits of the clients of whom one has spent most."""
        return _undominated({(self._uses[c], n) for c, n in self._visits.items()})


def _undominated(found: Iterable[tuple[Use, int]]) -> list[tuple[Use, int]]:
    """Those of which no other has at least the rates and the steps."""
    kept: list[tuple[Use, int]] = []
    for use, visits in sorted(found, reverse=True):
        beaten = any(
            all(r >= rate and s * v >= steps * visits for (r, s), (rate, steps) in zip(other, use, strict=True))
            for other, v in kept
        )
        if not beaten:
            kept.append((use, visits))
    return kept
