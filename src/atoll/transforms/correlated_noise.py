"""Correlated noise on the sum of what clients send: differential privacy for whole clients, however they are sampled.

    S_t = sum_i w_i clip(x_i, c) + N_t,   N = A^-1 B Z,   Z ~ N(0, (z sens(C) c)^2 I),   mean = S_t / (expected cohort)

DP-FTRL. Noise of later rounds takes back part of that of earlier ones, so that the model, which is a sum of steps, gets
less of it than under fresh noise. All rounds together are one Gaussian mechanism of noise multiplier z, whoever was in
the cohorts, if only nobody takes part more often, nor sooner again, than the strategy C is built for: see
`atoll.privacy.factorization`. Kairouz, McMahan, Song, Thakkar, Thakurta & Xu 2021, "Practical and private (deep)
learning without sampling or shuffling"; Choquette-Choo, McMahan, Rush & Thakurta 2023, "Multi-epoch matrix
factorization mechanisms for private machine learning".

Noise comes from a cryptographic source; what is released is a point of a public grid (`atoll.privacy.correlated`). The
server keeps vectors of noise between rounds, which are secret.
Cost: one normal number for each coordinate of the sum in every round (about two under "tree"), and one product for each
vector that the strategy keeps.
"""

import torch
from torch import Tensor

from atoll.errors import invalid, unknown
from atoll.privacy.factorization import STRATEGIES, Strategy
from atoll.privacy.noise import noise
from atoll.spec import record
from atoll.transforms.base import Keys, Transform


def correlated_noise(
    noise_multiplier: float | None = None,
    *,
    strategy: str | Strategy = "buffered",
    epsilon: float | None = None,
    delta: float | None = None,
    budget: float | None = None,
    seed: int | None = None,
) -> Transform:
    """Add Gaussian noise that is correlated between rounds to the sum of the clients' rows.

    Needs `clip_norm` before it, `aggregators.mean(weights="uniform", denominator="expected")`, or weights with a
    `clip`, and a run by `atoll.simulate` with `cohort=sampling.min_separation(size, separation)`: the more rounds lie
    between a client's participations, the less noise is needed. How many rounds there are is fixed when the run begins.

    Args:
        noise_multiplier: standard deviation of what is drawn, divided by the strategy's sensitivity and the clip norm:
            that of one Gaussian mechanism for the whole run.
        strategy: "buffered" (BLT, three vectors kept), "banded" (as many bands as the separation, one vector less),
            "tree" or "independent" (fresh noise), built for the run's rounds and the sampler's separation; or one of
            `atoll.privacy.factorization` for at least as many rounds and at most this separation.
        epsilon: calibrate the noise so that all rounds of the strategy together spend no more than this.
        delta: at which epsilon is told, below 1 / population; default 1e-5, or population ** -1.1 where that is
            smaller.
        budget: with noise_multiplier: stop the run before the release that would spend more.
        seed: draw noise that anybody can draw again. For tests alone: the run is marked as not private.
    """
    if isinstance(strategy, Strategy):
        if strategy.spec["name"] not in STRATEGIES:
            raise unknown("strategy", strategy.spec["name"], STRATEGIES)
        if strategy.spec.get("honaker"):
            raise invalid(
                "strategy", "a tree with Honaker's estimate", "noise that lies on a grid",
                "Use tree(..., honaker=False), or buffered(...), which adds less noise than either.",
            )  # fmt: skip
    elif strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    told = noise(noise_multiplier, epsilon, delta, budget, "analytic", seed, strategy)

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: None, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        return rows, memory

    return Transform(
        record(
            "correlated_noise", noise_multiplier=told.noise_multiplier, strategy=strategy, epsilon=told.epsilon,
            delta=told.delta, budget=told.budget, seed=told.seed,
        ),
        encode,
        noise=told,
        scale=torch.ones_like,
    )  # fmt: skip
