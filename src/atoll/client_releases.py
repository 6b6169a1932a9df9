"""Rounds in which clients add noise to their own rows: allowed beforehand, counted before they are used.

Noise in shares (`discrete_gaussian`, `skellam`): a round is entered in the journal when its channel has shown a sum,
before the sum is used for anything; a round that is void shows none and is not entered. Noise of each client alone
(`local_noise`): a round is entered for the clients of its cohort before they train, whatever becomes of their rows.

A checkpoint is written after every round. What was entered after the last one is run again when a run was killed, with
new noise, and counted again: the ledger never holds less than what ran.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from atoll.journal import Journal
from atoll.privacy.client_noise import ClientTerms, counted, decide, statement
from atoll.rounds import Process
from atoll.sampling import Sampler


def client_terms(process: Process, sampler: Sampler, clients: Sequence[str], seed: int, rounds: int) -> ClientTerms:
    """Decide the terms of a run.

    Raises:
        InvalidArgument: a delta that is too large, a ring that is too small, a calibration without a solution.
        BudgetSpent: the budget does not allow a single round.
    """
    noise = process.chain.client_noise
    assert noise is not None
    releases = rounds
    everybody = sampler.expected(len(clients)) >= len(clients)
    if noise.scheme is None and noise.told.noise_multiplier is None and not everybody:
        # Cohorts are no secret here: how often each client will take part is known beforehand.
        visits = Counter(c for r in range(rounds) for c in sampler.cohort(seed, r, clients))
        releases = max(visits.values(), default=rounds)
    size = process.chain.noised_size(process.length, process.split)
    return decide(noise, *size, population=len(clients), rounds=rounds, releases=releases)


class ClientReleases:
    """The releases of one run.

    Args:
        process: whose clients add noise; its noise is calibrated where an epsilon was asked for.
        terms: of a run that begins; those of one that goes on are in its journal.
        clients: all there are.
        journal: of the run.
    """

    def __init__(self, process: Process, terms: ClientTerms | None, clients: Sequence[str], journal: Journal) -> None:
        begun = next(iter(journal.events("client_noise")), None)
        if begun is not None:
            terms = ClientTerms.from_dict(begun.body["terms"])
        assert terms is not None
        if begun is None:
            journal.append("client_noise", {"terms": terms.to_dict()})
        self.terms, self._clients, self._journal = terms, clients, journal
        self._count = counted(e.body for e in journal.events("client_release"))
        self._most = terms.most
        process.chain = process.chain.calibrated(terms.noise_multiplier)

    @property
    def in_sums(self) -> bool:
        """Whether sums are counted; else every client's own rows."""
        return self.terms.scheme is not None

    @property
    def limited(self) -> bool:
        """Whether there is a budget."""
        return self._most is not None

    def allows(self, cohorts: Sequence[Sequence[str]]) -> bool:
        """Whether the budget allows rounds with these cohorts, one after the other."""
        if self._most is None:
            return True
        if self.in_sums:
            return self._count.all + len(cohorts) <= self._most
        more = Counter(c for cohort in cohorts for c in cohort)
        return all(self._count.all + self._count.named[c] + n <= self._most for c, n in more.items())

    def enter(self, round: int, clients: Sequence[str]) -> None:
        """Enter a round (from 0): that its channel has shown a sum, or that these clients are about to train."""
        named = None if self.in_sums or len(clients) == len(self._clients) else list(clients)
        self._journal.append("client_release", {"round": round + 1, "clients": named})
        self._count.enter(named)

    @property
    def epsilon(self) -> float:
        """What was spent so far, by the client that spent most."""
        return self.terms.spent(self._count.largest)

    def statement(self) -> dict[str, Any]:
        """What the run may say of itself."""
        return statement(self.terms, self._count, self._clients)
