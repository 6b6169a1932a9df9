"""What the update of a client with eight digits gives away, read off the first layer: with and without protection.

Nothing is optimised: each candidate is a row of the layer's change divided by the change of its bias
(`atoll.privacy.inversion`). So this shows the least that is given away, not the most.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from reporting import Findings, Table, finish, parser, pyplot
from torch import Tensor, nn

import atoll
from atoll import aggregators
from atoll.local import Plan
from atoll.privacy import example_level
from atoll.privacy.inversion import Found, candidates, nearest
from atoll.transforms import clip_norm, gaussian_noise, secure_sum

VICTIMS = 8
OTHERS = 49
SIDE = 8
RECOGNISED = 0.9
"""Similarity from which on a digit counts as recognised."""
CHANCE = 0.1
"""How much more alike than pictures of noise may be what is found behind noise."""


def digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of 8 x 8 pixels, scaled to 0 to 1, and what they show."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return torch.from_numpy(images).float()[chosen] / 16, torch.from_numpy(labels)[chosen]


def visible(clients: dict[str, tuple[Tensor, Tensor]], plan: Plan, **options: Any) -> Tensor:
    """What can be seen of a round: candidates from the difference of two models."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(SIDE * SIDE, 256), nn.ReLU(), nn.Linear(256, 10))
    model = atoll.Model(layers, loss="cross_entropy")
    process = atoll.process(model, atoll.fedavg(plan), **options)
    state = process.init()
    after, _ = process.next(state, atoll.FederatedDataset.from_arrays(clients))
    return candidates(model, process.vector(after) - process.vector(state))


def scenes(seed: int) -> tuple[Tensor, dict[str, Found]]:
    """The images of one client, and what is found of them in each scene."""
    x, y = digits(VICTIMS * (OTHERS + 1), seed)
    own = {"own": (x[:VICTIMS], y[:VICTIMS])}
    others = {
        f"c{i:02d}": (x[i * VICTIMS : (i + 1) * VICTIMS], y[i * VICTIMS : (i + 1) * VICTIMS])
        for i in range(1, OTHERS + 1)
    }
    one, many = atoll.local_sgd(0.1, steps=1, batch_size=None), atoll.local_sgd(0.1, epochs=5, batch_size=2)
    uniform = aggregators.mean(weights="uniform", denominator="expected")
    noisy = atoll.local_sgd(
        0.1, steps=4, batch_size=4, privacy=example_level(clip=1.0, noise_multiplier=1.0, delta=0.01)
    )
    alone = [nearest(visible({"own": (x[i : i + 1], y[i : i + 1])}, one), x[i : i + 1]) for i in range(VICTIMS)]
    found = {
        "one digit, one step": Found(*(torch.cat(parts) for parts in zip(*alone, strict=True))),
        "eight digits, one step": nearest(visible(own, one), x[:VICTIMS]),
        "eight digits, twenty steps": nearest(visible(own, many), x[:VICTIMS]),
        f"secure sum of {OTHERS + 1} clients": nearest(
            visible(own | others, one, channel=secure_sum(clip=1.0, weight_cap=float(VICTIMS))), x[:VICTIMS]
        ),
        f"clipping and noise on a sum of {OTHERS + 1}": nearest(
            visible(own | others, one, transforms=(clip_norm(1.0), gaussian_noise(1.0)), aggregator=uniform),
            x[:VICTIMS],
        ),
        "noise on every digit's gradient": nearest(visible(own, noisy), x[:VICTIMS]),
    }
    draw = torch.Generator().manual_seed(seed)
    found["pictures of noise"] = nearest(torch.randn(256, SIDE * SIDE, generator=draw), x[:VICTIMS])
    return x[:VICTIMS], found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration."""
    options = parser(__doc__ or "", seeds=(0, 1, 2, 3, 4)).parse_args(arguments)
    seeds = options.seeds[:1] if options.quick else options.seeds
    every = {seed: scenes(seed) for seed in seeds}
    images, shown = every[seeds[0]]
    likeness = {name: torch.cat([found[name].similarity for _, found in every.values()]) for name in shown}
    mean = {name: float(values.mean()) for name, values in likeness.items()}
    chance = mean["pictures of noise"]
    hidden = [n for n in mean if "noise on" in n]
    passed = mean["one digit, one step"] > 1 - 1e-4 and all(mean[n] < chance + CHANCE for n in hidden)

    def draw(path: Path) -> None:
        plt = pyplot()
        rows = {"the client's digits": images, **{name: found.inputs for name, found in shown.items()}}
        figure, axes = plt.subplots(len(rows), VICTIMS + 1, figsize=(10, 1.05 * len(rows)), layout="constrained")
        for line, (name, pictures) in zip(axes, rows.items(), strict=True):
            line[0].text(1.0, 0.5, name, ha="right", va="center", fontsize=9)
            line[0].axis("off")
            for axis, picture in zip(line[1:], pictures, strict=True):
                axis.imshow(picture.reshape(SIDE, SIDE).numpy(), cmap="gray_r")
                axis.axis("off")
        figure.savefig(path, dpi=110)
        plt.close(figure)

    return finish(
        "inversion",
        Findings(
            "What an update gives away",
            [
                __doc__ or "",
                "Network 64-256-10 with rectifiers on scikit-learn's digits (8 x 8 pixels); the client has eight of "
                f"them, as have {OTHERS} others. Found is, for every digit, the candidate most like it (cosine after "
                "the mean is taken off); an attacker who does not know the digits has all candidates to look through. "
                "`pictures of noise` is as many candidates that know nothing.",
            ],
            [
                Table(
                    "Similarity of what is found, and digits recognised",
                    ["what is seen", "mean similarity", f"above {RECOGNISED}"],
                    [
                        [name, f"{mean[name]:.3f}", f"{float((values > RECOGNISED).double().mean()):.0%}"]
                        for name, values in likeness.items()
                    ],
                )
            ],
            [
                f"Held to: one digit is told exactly, and behind noise nothing is found that is more than {CHANCE} "
                f"more alike than pictures of noise. {'Met' if passed else 'Not met'}.",
                "A secure sum hides who a picture belongs to, not that somebody has it: what it tells of single "
                "clients shrinks with the cohort, but nothing bounds it. Noise does.",
            ],
            passed,
            {"mean": mean, "similarity": {name: values.tolist() for name, values in likeness.items()}},
            {"digits": draw},
        ),
        quick=options.quick,
        out=options.out,
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
