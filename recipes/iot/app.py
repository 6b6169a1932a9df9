"""Which exercise is the wearer of a smart-watch doing? Ten people's recordings stay on their wrists.

Two and a half seconds of acceleration and rotation, as the watch records them, go through a small network. People move
differently: what the federation learnt is trained a little further on each wearer's own windows ("personal").
"""

from typing import Literal

from torch import nn

import atoll


def network() -> nn.Module:
    """Two convolutions along time and a linear layer."""
    return nn.Sequential(
        nn.Conv1d(6, 16, 9, padding=4), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool1d(4),
        nn.Conv1d(16, 32, 5, padding=2), nn.GroupNorm(4, 32), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(32, 7),
    )  # fmt: skip


def experiment(
    *,
    rounds: int = 60,
    lr: float = 0.1,
    method: Literal["federated", "personal", "alone", "pooled"] = "personal",
    without: str | None = None,
    seed: int = 0,
) -> atoll.Experiment:
    """Seven shoulder exercises over ten wearers.

    Args:
        rounds: each one is one pass over every wearer's training windows.
        lr: learning rate.
        method: "federated" shares one network, "personal" trains it two passes further at every wearer's, "alone" gives
            each their own, "pooled" puts all recordings in one place.
        without: a wearer who takes no part, such as "wearer-03", to judge the network on somebody new.
        seed: of the stretches that are the test, the initial values and the order of windows.
    """
    wearers = atoll.datasets.smartwatch(seed=seed)
    if without is not None:
        wearers = wearers.select([w for w in wearers.clients if w != without])
    model = atoll.Model(network(), loss="cross_entropy", metrics=("accuracy",))
    plan = atoll.local_sgd(lr=lr, epochs=1, batch_size=32, momentum=0.9)
    further = atoll.local_sgd(lr=lr / 4, epochs=2, batch_size=32, momentum=0.9)
    methods = {
        "federated": atoll.fedavg(plan),
        "personal": atoll.fine_tune(plan, personal=further),
        "alone": atoll.local_only(plan),
        "pooled": atoll.pooled(plan),
    }
    return atoll.Experiment(
        model=model,
        data=wearers,
        algorithm=methods[method],
        rounds=rounds,
        initial=model.init(seed),
        evaluate_every=5,
        seed=seed,
        title=f"Smart-watch exercises, {method}",
    )
