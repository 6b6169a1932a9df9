"""Privacy for single examples inside a client: what local training is told.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar & Zhang 2016, "Deep learning with differential privacy", algorithm 1,
with Poisson minibatches and a fixed denominator. In every local step, for a client with n examples and batch_size b:

    every example is in the batch with probability q = min(1, b / n), drawn in secret by the client
    g = (sum over the batch of clip(gradient of the example's loss, c) + N(0, (z c)^2 I)) / (q n)

The guarantee is for one example of the client (a patient of a hospital) against everybody outside it, the server
included. Every step of every round in which the client took part counts, for that client. The number of examples is no
secret; the neighbour is a client one of whose examples is replaced by nothing.
"""

from dataclasses import dataclass
from typing import Any

from atoll.errors import InvalidArgument, invalid
from atoll.privacy.accounting import (
    Accountant,
    check_accountant,
    check_delta,
    check_epsilon,
    check_known,
    check_multiplier,
)
from atoll.spec import Spec, record


@dataclass(frozen=True, slots=True)
class ExampleLevel:
    """Clipping and noise in local training.

    Attributes:
        clip: largest L2 norm c of an example's gradient.
        noise_multiplier: standard deviation of the noise on a batch's sum, divided by c; None: calibrated for
            `epsilon`.
        epsilon: what no client may exceed over the whole run.
        delta: at which epsilon is told; None: 1e-5, or n ** -1.1 of the largest client where that is smaller.
        accountant: "pld", "rdp", or None: "pld".
        seed: of noise and batches that anybody can draw again, for tests; None: the cryptographic source.
    """

    clip: float
    noise_multiplier: float | None
    epsilon: float | None
    delta: float | None
    accountant: Accountant | None
    seed: int | None

    @property
    def spec(self) -> Spec:
        """Name and arguments."""
        given: dict[str, Any] = {n: getattr(self, n) for n in self.__dataclass_fields__}
        return record("example_level", **given)


def example_level(
    *,
    clip: float,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    accountant: Accountant | None = None,
    seed: int | None = None,
) -> ExampleLevel:
    """Protect each single example of a client: `local_sgd(..., privacy=example_level(clip=1.0, epsilon=3))`.

    Args:
        clip: largest L2 norm of the gradient of one example's loss, above 0.
        noise_multiplier: standard deviation of the noise on the sum over a batch, divided by `clip`.
        epsilon: calibrate the noise so that no client spends more in a whole `atoll.simulate`. The smallest client, of
            whom a batch is the largest share, decides.
        delta: below 1 over the examples of the largest client; default 1e-5, or n ** -1.1 where that is smaller.
        accountant: "pld" (default) or "rdp".
        seed: draw noise and batches that anybody can draw again. For tests alone: the run is marked as not private.
    """
    clip = check_multiplier(clip, "clip")
    if (noise_multiplier is None) == (epsilon is None):
        raise InvalidArgument("example_level needs noise_multiplier= or epsilon=, and not both.")
    if noise_multiplier is not None:
        noise_multiplier = check_multiplier(noise_multiplier)
    if epsilon is not None:
        epsilon = check_epsilon(epsilon)
    if delta is not None:
        delta = check_delta(delta)
    if accountant is not None:
        check_known(check_accountant(accountant), "poisson")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise invalid("seed", seed, "an integer for tests, or None for privacy")
    return ExampleLevel(clip, noise_multiplier, epsilon, delta, accountant, seed)
