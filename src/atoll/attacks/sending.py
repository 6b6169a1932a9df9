"""Attacks on updates.

In every formula m and s are the honest updates' mean and standard deviation in each coordinate, n the clients of the
cohort and f the malicious ones among them, x_i what client i would have sent.
"""

import math

import torch

from atoll import random
from atoll.attacks.base import Attack, Scene, Sent
from atoll.errors import invalid
from atoll.spec import record


def sign_flip(scale: float = 1.0) -> Attack:
    """-scale x_i."""
    _positive("scale", scale)
    return Attack(record("sign_flip", scale=scale), lambda scene: Sent(-scale * scene.own))


def gaussian(scale: float = 10.0) -> Attack:
    """Noise with `scale` times the root mean square of the honest updates. Blanchard et al. 2017."""
    _positive("scale", scale)

    def send(scene: Scene) -> Sent:
        draw = random.generator(scene.seed, "attacks", "gaussian", scene.round)
        noise = torch.randn(scene.own.shape, generator=draw, dtype=torch.float64).to(scene.own.device)
        return Sent(scale * scene.honest.square().mean().sqrt() * noise)

    return Attack(record("gaussian", scale=scale), send, observes=True)


def model_replacement(scale: float | None = None) -> Attack:
    """x_i times `scale`, so that the mean becomes the attacker's model. Bagdasaryan et al. 2020, equation 3.

    Args:
        scale: default n / f.
    """
    if scale is not None:
        _positive("scale", scale)

    def send(scene: Scene) -> Sent:
        return Sent(scene.own * (scene.clients / len(scene.own) if scale is None else scale))

    return Attack(record("model_replacement", scale=scale), send)


def alie(z: float | None = None) -> Attack:
    """m - z s: a little is enough. Baruch, Baruch & Goldberg 2019, "A little is enough", algorithm 3.

    Args:
        z: default the largest for which enough honest updates lie farther out to win a majority: with
            a = floor(n / 2 + 1) - f supporters to gain, the Gaussian's quantile at (n - f - a) / (n - f); 0, which is
            the mean, where so few are malicious that it would be below.
    """
    if z is not None:
        _positive("z", z)

    def send(scene: Scene) -> Sent:
        honest = len(scene.honest)
        needed = math.floor(scene.clients / 2 + 1) - len(scene.own)
        share = min(max((honest - needed) / honest, 0.5), 1 - 1e-6)
        far = float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64))) if z is None else z
        return Sent(scene.mean - far * scene.spread)

    return Attack(record("alie", z=z), send, observes=True)


def ipm(scale: float = 0.5) -> Attack:
    """-scale m, so that the inner product with m becomes negative. Xie, Koyejo & Gupta 2020, "Fall of empires"."""
    _positive("scale", scale)
    return Attack(record("ipm", scale=scale), lambda scene: Sent(-scale * scene.mean), observes=True)


def mimic() -> Attack:
    """The update of the honest client that stands out most: it counts f + 1 times, and nothing looks odd.

    It is the one farthest out along the honest updates' first principal direction. Karimireddy, He & Jaggi 2022,
    "Byzantine-robust learning on heterogeneous datasets via bucketing", section 3.
    """

    def send(scene: Scene) -> Sent:
        around = scene.honest - scene.mean
        first = torch.linalg.eigh(around @ around.T).eigenvectors[:, -1]
        return Sent(scene.honest[int(first.abs().argmax())])

    return Attack(record("mimic"), send, observes=True)


def min_max() -> Attack:
    """m - g s with the largest g that takes it no farther from any honest update than two of them are from each other.

    Shejwalkar & Houmansadr 2021, "Manipulating the Byzantine", equation 8, with the standard deviation as direction.
    """

    def send(scene: Scene) -> Sent:
        apart = torch.cdist(scene.honest, scene.honest, compute_mode="donot_use_mm_for_euclid_dist").square().max()
        out = scene.mean - scene.honest
        length, along, own = scene.spread.square().sum(), -(out @ scene.spread), out.square().sum(dim=1)
        reach = (-along + (along.square() + length * (apart - own)).clamp(min=0).sqrt()) / length
        return Sent(scene.mean - (float(reach.min()) if float(length) else 0.0) * scene.spread)

    return Attack(record("min_max"), send, observes=True)


def min_sum() -> Attack:
    """m - g s with the largest g for which its squared distances to honest updates add up to no more than theirs do.

    Shejwalkar & Houmansadr 2021, equation 9.
    """

    def send(scene: Scene) -> Sent:
        each = torch.cdist(scene.honest, scene.honest, compute_mode="donot_use_mm_for_euclid_dist").square().sum(dim=1)
        own, length = (scene.mean - scene.honest).square().sum(), scene.spread.square().sum()
        reach = ((each.max() - own).clamp(min=0) / (len(scene.honest) * length)).sqrt()
        return Sent(scene.mean - (float(reach) if float(length) else 0.0) * scene.spread)

    return Attack(record("min_sum"), send, observes=True)


def lying_weight(factor: float = 1e6, *, scale: float = 1.0) -> Attack:
    """-scale x_i with a weight of `factor` times the true one."""
    _positive("factor", factor)
    _positive("scale", scale)
    return Attack(
        record("lying_weight", factor=factor, scale=scale),
        lambda scene: Sent(-scale * scene.own, scene.weights * factor),
    )


def non_finite() -> Attack:
    """NaN in the first number and infinity in the others."""

    def send(scene: Scene) -> Sent:
        rows = torch.full_like(scene.own, torch.inf)
        rows[:, :1] = torch.nan
        return Sent(rows)

    return Attack(record("non_finite"), send)


def free_rider() -> Attack:
    """Nothing: the model as it was received. Lin, Du & Liu 2019, "Free-riders in federated learning"."""
    return Attack(record("free_rider"), lambda scene: Sent(torch.zeros_like(scene.own)))


def stale() -> Attack:
    """The mean of what malicious clients sent in the first round they were in, from all of them, in every round."""
    return Attack(record("stale"), lambda scene: Sent(scene.past))


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise invalid(name, value, "a finite number above 0")
