"""Noise over sites, at the server: decided before round one, drawn for a sum, counted by the coordinator's journal.

    S = sum_i r_i + N(0, (z c)^2 I),   |r_i|_2 <= c,   mean = S / m

with r_i what site i adds, at most c long: the site clips it, and the server takes no update that is longer
(`admission`). m is the number of sites that were to take part: a site that does not answer adds nothing and moves no
denominator. One site's data replaced by nothing moves S by at most c. Every round counts for every site: who takes part
is known to the sites and to whoever watches, so that drawing cohorts hides nobody, and nothing is claimed from it.

A noised sum is known to nobody before the journal has its release: sites are offered the model behind it only after
that, and a server that is killed before draws other noise, for which it has released nothing.
McMahan, Ramage, Talwar & Zhang 2018, "Learning differentially private recurrent language models", algorithm 1.
"""

import errno
import os

from msgspec.structs import replace
from torch import Tensor

from atoll.errors import CompositionError, RunError, invalid
from atoll.net.coordinator import RELEASES, Guarantee, Plan
from atoll.net.spool import SpoolError
from atoll.privacy.accounting import Event, calibrate, check_delta, check_known, usual_delta
from atoll.privacy.ledger import Ledger
from atoll.privacy.noise import deviation, releasing
from atoll.privacy.terms import Terms
from atoll.rounds import Process
from atoll.secret import Source


def check(process: Process) -> None:
    """Refuse what is not counted over sites.

    Raises:
        CompositionError: noise of another kind than the server's own, fresh in every round.
    """
    for stage in process.chain.stages:
        if stage.client_noise is not None:
            raise CompositionError(
                f"{stage.name} is not counted over sites yet: sites would draw its noise beside the author's code, and "
                "keep a ledger each. Use gaussian_noise, which the server adds, or run this experiment by "
                "atoll.simulate."
            )
        if stage.noise is not None and stage.noise.strategy is not None:
            raise CompositionError(
                f"{stage.name} is not counted over sites yet: nobody keeps a site's participations apart there. Use "
                "gaussian_noise, or run this experiment by atoll.simulate."
            )
        if stage.judge is not None and process.chain.noise is not None:
            raise CompositionError(
                f"{stage.name} cannot stand under noise over sites: which site it leaves out depends on the data, and "
                "everybody would see it. Leave it out: clip_norm shortens a row, and adaptive_clip, and the server "
                "takes no longer one."
            )
    if process.protects_examples:
        raise CompositionError(
            "local_sgd(privacy=...) is not counted over sites yet, and a guarantee that is not counted is none: run "
            "this experiment by atoll.simulate, or leave the noise out."
        )


def check_plan(process: Process, plan: Plan) -> None:
    """Refuse a plan under which one site could move a sum by more than its own row.

    Raises:
        InvalidArgument: over-selection: another site's row would be in the sum, or not, by how fast one's data let it
            be.
    """
    if process.chain.noise is not None and plan.over != 1:
        raise invalid(
            "over", plan.over, "1 under noise", "Whose updates come first would decide whose data are in the sum."
        )


def guaranteed(process: Process, plan: Plan) -> Guarantee | None:
    """What is decided about the noise of a run that begins; None: it has none.

    Raises:
        InvalidArgument: a delta that is too large, a calibration without a solution.
        BudgetSpent: the budget does not allow a single round.
    """
    noise = process.chain.noise
    if noise is None:
        return None
    expected, population = plan.cohort or plan.least, max(plan.cohort or 0, plan.least)
    delta = check_delta(usual_delta(population) if noise.delta is None else noise.delta, population)
    accountant = noise.accountant or "analytic"
    check_known(accountant, "none")
    multiplier = noise.noise_multiplier
    if multiplier is None:
        assert noise.epsilon is not None
        multiplier = calibrate(
            epsilon=noise.epsilon, steps=plan.rounds, delta=delta, sampling="none", accountant=accountant
        )  # fmt: skip
    deviation(multiplier, _bound(process), process.chain.seen_size(process.length, process.split)[0])
    budget = noise.budget if noise.epsilon is None else noise.epsilon
    made = Guarantee(multiplier, expected, population, delta, accountant, budget, None, noise.seed is None)
    if budget is None:
        return made
    event, ledger = Event(multiplier), terms_of(made, plan.rounds).ledger
    ledger.check(event)
    # Sums that failed behind their noise count beside those of rounds.
    return replace(made, most=ledger.fits(event, RELEASES * plan.rounds))


class Noising:
    """What adds the noise.

    Args:
        process: whose pipeline asks for it.
        guarantee: of the run, as its journal has it.
    """

    def __init__(self, process: Process, guarantee: Guarantee) -> None:
        assert process.chain.noise is not None
        seed = process.chain.noise.seed
        if (seed is None) is not guarantee.private:
            raise RunError("the run's journal and its experiment do not agree on whether its noise is seeded.")
        self.guarantee, self.drawn = guarantee, False
        self._source = Source() if seed is None else Source(seed=seed)
        self._round = 0

    @property
    def multiplier(self) -> float:
        """Of a sum that was noised since `begin`; 0: none was."""
        return self.guarantee.multiplier if self.drawn else 0.0

    def begin(self, round: int) -> None:
        """A round's updates are about to be combined."""
        self._round, self.drawn = round, False

    def __call__(self, total: Tensor, bound: float) -> Tensor:
        """The sum [L] float64, to which a site adds at most `bound`, with noise."""
        assert not self.drawn, "a sum is noised once"
        add = releasing(self.guarantee.multiplier, self._source.derive("noise", self._round))
        noised = add(total, bound)
        self.drawn = True
        return noised

    def told(self, error: Exception, text: str) -> str:
        """What may be told of an error in combining a round: before the noise, nothing that may hold data."""
        if self.drawn or isinstance(error, SpoolError):
            return text
        return f"the round cannot be combined ({type(error).__name__}); more would tell of updates without noise."

    @staticmethod
    def wordless(error: OSError) -> OSError:
        """The same error in the system's words: the round is tried again with other noise, and nothing is counted."""
        number = error.errno if isinstance(error.errno, int) else errno.EIO
        return OSError(number, os.strerror(number))


def terms_of(guarantee: Guarantee, rounds: int) -> Terms:
    """The terms of a run of so many rounds, as ledgers and statements have them."""
    return Terms(
        guarantee.multiplier, "none", 1.0, guarantee.population, float(guarantee.expected), guarantee.delta,
        guarantee.accountant, guarantee.budget, rounds, guarantee.private, unit="site",
    )  # fmt: skip


def ledger_of(guarantee: Guarantee, releases: int, rounds: int) -> Ledger:
    """The ledger of a run that made so many releases."""
    ledger = terms_of(guarantee, rounds).ledger
    ledger.enter(Event(guarantee.multiplier, count=releases))
    return ledger


def _bound(process: Process) -> float:
    bound = process.chain.facts.bound
    assert bound is not None
    return bound
