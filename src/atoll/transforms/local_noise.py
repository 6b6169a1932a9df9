"""Noise by which each client protects its own update from everybody else, the server included: local privacy.

    send clip(x_i, c) + noise_i

    Gaussian: L2 clip, noise N(0, (z c)^2 I)
    Laplace: L1 clip, noise of density exp(-|v| / b) / (2 b) on each coordinate, b = z c / sqrt 2

Whatever the client's data are, its clipped rows are at most 2 c apart, so that the update alone tells little of them
(Kasiviswanathan, Lee, Nissim, Raskhodnikova & Smith 2011, "What can we learn privately?"; Dwork, McSherry, Nissim &
Smith 2006). `atoll.privacy.client_noise` says how little. A mean over n clients keeps the noise of each, smaller by
sqrt(n) only: where the server, or a channel, can be trusted with more, `gaussian_noise` and `skellam` are worth more.

Noise comes from a cryptographic source and lies on a public grid, to which the row is rounded as well; it is larger by
what rounding adds to the distance of two rows. Cost: one random number for each coordinate of each client's row.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from atoll.errors import invalid, unknown
from atoll.privacy.accounting import check_multiplier
from atoll.privacy.client_noise import ClientNoise, adding_laplace, clipped
from atoll.privacy.noise import noise, releasing
from atoll.secret import Source
from atoll.spec import record
from atoll.transforms.base import Keys, Transform


def local_noise(
    noise_multiplier: float | None = None,
    *,
    clip: float,
    epsilon: float | None = None,
    delta: float | None = None,
    budget: float | None = None,
    mechanism: Literal["gaussian", "laplace"] = "gaussian",
    seed: int | None = None,
) -> Transform:
    """Clip every client's row and add noise to it at the client, which then need trust nobody.

    All that follows is free: other stages, any channel, robust rules. All clients weigh the same, and neither losses
    nor numbers of examples leave a client. `atoll.simulate` counts each client's own rounds, and tells the epsilon of
    the client that took part most often.

    Args:
        noise_multiplier: standard deviation of the noise on each coordinate, divided by `clip`.
        clip: norm to which rows are clipped: L2 for "gaussian", L1 for "laplace".
        epsilon: instead of noise_multiplier: calibrate the noise so that no client spends more in the whole run.
        delta: at which epsilon is told, below 1 / population; default 1e-5, or population ** -1.1 where that is
            smaller. Left out for "laplace", whose epsilon holds at delta 0.
        budget: with noise_multiplier: stop the run before a round in which a client would spend more.
        mechanism: "gaussian" or "laplace"; for long rows Laplace noise hides the same by far more noise.
        seed: draw noise that anybody can draw again. For tests alone: the run is marked as not private.
    """
    clip = check_multiplier(clip, "clip")
    if mechanism not in ("gaussian", "laplace"):
        raise unknown("mechanism", mechanism, ["gaussian", "laplace"])
    if mechanism == "laplace" and delta is not None:
        raise invalid("delta", delta, 'left out with mechanism="laplace"', "Its epsilon holds at delta 0.")
    told = noise(noise_multiplier, epsilon, delta, budget, None, seed)
    adding, order = (releasing, 2) if mechanism == "gaussian" else (adding_laplace, 1)

    def stage(known: float | None) -> Transform:
        own = replace(told, noise_multiplier=known)

        def encode(
            rows: Tensor, memory: dict[str, Tensor], shared: None, keys: Keys
        ) -> tuple[Tensor, dict[str, Tensor]]:
            multiplier, source = own.calibrated("local_noise"), Source(seed=seed)
            out = torch.empty_like(rows)
            for row, client, sent in zip(rows, keys.clients.tolist(), out, strict=True):
                drawn = source.derive("local_noise", keys.seed, keys.stage, keys.round, client)
                sent.copy_(adding(multiplier, drawn)(clipped(row, clip, order), clip))
            return out, memory

        return Transform(
            record(
                "local_noise", noise_multiplier=noise_multiplier, clip=clip, epsilon=epsilon, delta=delta,
                budget=budget, mechanism=mechanism, seed=seed,
            ),
            encode,
            unbiased=False,
            contracts=False,
            bound=lambda before: None,
            randomness="private",
            client_noise=ClientNoise(own, mechanism, clip),
            calibrate=stage,
        )  # fmt: skip

    return stage(told.noise_multiplier)
