"""Opacus's published figures for handwritten digits, trained by Atoll: accuracy and epsilon of private training.

The settings and accuracies are those of the example `mnist` in the Opacus repository (its README lists mean and
standard deviation over ten runs): a convolutional network of 26,010 numbers, Poisson batches of 0.004 of the 60,000
images, plain sgd, delta 1e-5. Here the images are those of one client, whose examples are protected one by one.

    python benchmarks/opacus_mnist.py
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from reporting import Findings, Table, finish, parser
from torch import nn

import atoll
from atoll import privacy

DELTA = 1e-5
RATE = 0.004
EXAMPLES = 60_000
DEVIATIONS = 3.0
"""An accuracy agrees when it is no more than so many published standard deviations below the published mean."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A line of the published list.

    Attributes:
        epochs: passes over the expected number of images.
        lr: learning rate.
        noise: noise multiplier.
        clip: bound on the L2 norm of an example's gradient.
        epsilon: as published, at delta 1e-5.
        accuracy: as published: mean over ten runs, in percent.
        deviation: its standard deviation.
    """

    epochs: int
    lr: float
    noise: float
    clip: float
    epsilon: float
    accuracy: float
    deviation: float


PUBLISHED = (
    Setting(15, 0.25, 1.3, 1.5, 1.19, 94.63, 0.34),
    Setting(60, 0.15, 1.1, 1.0, 3.01, 96.78, 0.21),
    Setting(45, 0.25, 0.7, 1.5, 7.10, 97.09, 0.17),
)


def network() -> nn.Module:
    """Two convolutions and two linear layers, pooled with stride 1."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def digits(quick: bool) -> atoll.FederatedDataset:
    """All images as one client's, with the test set as nobody's."""
    if not quick:
        return atoll.datasets.mnist(clients=1, seed=0)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 1, 28, 28, generator=draw), torch.randint(0, 10, (200,), generator=draw)
    return atoll.FederatedDataset.from_arrays({"all": (x, y)}, holdout=(x, y))


def trained(setting: Setting, data: atoll.FederatedDataset, seed: int, quick: bool) -> tuple[float, float]:
    """Accuracy on the test images in percent, and epsilon by Renyi divergences, as the run's own ledger has it."""
    torch.manual_seed(seed)
    model = atoll.Model(network(), "cross_entropy", metrics=("accuracy",))
    expected = 20 if quick else round(RATE * EXAMPLES)
    plan = atoll.local_sgd(
        setting.lr, steps=2 if quick else round(1 / RATE), batch_size=expected,
        privacy=privacy.example_level(clip=setting.clip, noise_multiplier=setting.noise, delta=DELTA, accountant="rdp"),
    )  # fmt: skip
    result = atoll.simulate(
        model, data, algorithm=atoll.fedavg(plan), rounds=1 if quick else setting.epochs, seed=seed,
        evaluate_every=1000, progress=False,
    )  # fmt: skip
    return 100 * float(result.history[-1].holdout["accuracy"]), float(result.privacy[0]["epsilon"])


def tight(setting: Setting) -> float:
    """Epsilon of the same steps by privacy-loss distributions."""
    steps = setting.epochs * round(1 / RATE)
    return privacy.epsilon(noise_multiplier=setting.noise, steps=steps, delta=DELTA, sampling_rate=RATE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train in every setting and write down what came out."""
    given = parser(__doc__ or "", seeds=(0,))
    known = [setting.epsilon for setting in PUBLISHED]
    given.add_argument("--epsilon", type=float, nargs="+", choices=known, default=known, help="published settings")
    options = given.parse_args(arguments)
    quick, seeds = bool(options.quick), list(options.seeds)
    torch.set_num_threads(1)
    data, rows, ours, agree = digits(quick), list[list[str]](), list[dict[str, object]](), True
    for setting in PUBLISHED[:1] if quick else [s for s in PUBLISHED if s.epsilon in options.epsilon]:
        found = [trained(setting, data, seed, quick) for seed in seeds]
        accuracies, epsilon = [accuracy for accuracy, _ in found], found[0][1]
        mean, distribution = statistics.mean(accuracies), tight(setting)
        agree &= mean >= setting.accuracy - DEVIATIONS * setting.deviation
        ours.append({"setting": repr(setting), "accuracies": accuracies, "rdp": epsilon, "pld": distribution})
        rows.append(
            [
                f"{setting.epochs} epochs, lr {setting.lr:g}, noise {setting.noise:g}, clip {setting.clip:g}",
                f"{setting.epsilon:.2f}", f"{epsilon:.2f}", f"{distribution:.2f}",
                f"{setting.accuracy:.2f} ± {setting.deviation:.2f}", " ".join(f"{a:.2f}" for a in accuracies),
            ]
        )  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    return finish(
        "opacus_mnist",
        Findings(
            title="Opacus's figures for handwritten digits",
            setting=[
                "Private training on MNIST as in the example of the Opacus repository: two convolutions and two linear "
                "layers (26,010 numbers), gradients of single examples clipped and noised, Poisson batches of 0.004 of "
                f"the images, plain sgd, delta 1e-5. Here all images are one client's. Seeds {seeds}: of the initial "
                "weights; batches and noise have none.",
            ],
            tables=[
                Table(
                    "Epsilon and accuracy",
                    ["setting", "epsilon, published", "Atoll, RDP", "Atoll, PLD", "accuracy, published", "Atoll"],
                    rows,
                )
            ],
            remarks=[
                f"It agrees when Atoll's mean is no more than {DEVIATIONS:g} published standard deviations below the "
                "published mean of ten runs.",
                "Epsilon by Renyi divergences may be below the published figure, whose conversion to delta was an "
                "older, looser one; that by privacy-loss distributions is the tightest and a run's default.",
            ],
            passed=agree,
            numbers={"seeds": seeds, "settings": ours},
        ),
        quick=quick,
        out=options.out,
        arguments=arguments,
    )


if __name__ == "__main__":
    raise SystemExit(main())
