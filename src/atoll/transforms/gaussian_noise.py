"""Gaussian noise on the sum of what clients send: differential privacy for whole clients, with a trusted server.

    S = sum_i w_i clip(x_i, c) + N(0, (z c)^2 I),   mean = S / (expected cohort)

with weights w_i of at most 1. One client moves the sum by at most c (by 2 c if it is exchanged for another), so that
noise of standard deviation z c hides it: `atoll.privacy.epsilon` says how well. The denominator is a number known
beforehand; dividing by who came would move with the data. McMahan, Ramage, Talwar & Zhang 2018, "Learning
differentially private recurrent language models", algorithm 1.

Noise comes from a cryptographic source and is a multiple of a public grid, to which the sum is rounded as well, so that
no low bit of it can tell what was added to it (Mironov 2012). An empty cohort releases noise alone.
Cost: one normal number for each coordinate of the sum, in every round, at the server.
"""

import torch
from torch import Tensor

from atoll.privacy.accounting import Accountant
from atoll.privacy.noise import noise
from atoll.spec import record
from atoll.transforms.base import Keys, Transform


def gaussian_noise(
    noise_multiplier: float | None = None,
    *,
    epsilon: float | None = None,
    delta: float | None = None,
    budget: float | None = None,
    accountant: Accountant | None = None,
    seed: int | None = None,
) -> Transform:
    """Add Gaussian noise to the sum of the clients' rows, which stages before it have clipped.

    Needs `clip_norm` or `adaptive_clip` before it, and `aggregators.mean(weights="uniform", denominator="expected")`,
    or weights with a `clip`. `atoll.simulate` counts what the rounds that were run spent, by the sampler that drew the
    cohorts; a run over sites counts every round for every site.

    Args:
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip norm.
        epsilon: calibrate the noise so that all rounds together spend no more than this.
        delta: at which epsilon is told, below 1 / population; default 1e-5, or population ** -1.1 where that is
            smaller.
        budget: with noise_multiplier: stop the run before the release that would spend more.
        accountant: "pld", "rdp" or "analytic"; default the tightest that is right for the sampler.
        seed: draw noise and cohorts that anybody can draw again. For tests alone: the run is marked as not private.
    """
    told = noise(noise_multiplier, epsilon, delta, budget, accountant, seed)

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: None, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        return rows, memory

    return Transform(
        record(
            "gaussian_noise", noise_multiplier=told.noise_multiplier, epsilon=told.epsilon, delta=told.delta,
            budget=told.budget, accountant=told.accountant, seed=told.seed,
        ),
        encode,
        noise=told,
        scale=torch.ones_like,
    )  # fmt: skip
