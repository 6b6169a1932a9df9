"""Which digit was said? Six people's recordings stay on their devices.

A second of sound becomes a picture, 40 bands of pitch by 63 moments, and a small convolutional network reads it. Voices
differ: what the federation learnt is trained a little further on each speaker's own recordings ("personal").
"""

from typing import Literal

from torch import nn

import atoll


def network() -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.LazyLinear(10),
    )  # fmt: skip


def experiment(
    *,
    rounds: int = 40,
    lr: float = 0.05,
    method: Literal["federated", "personal", "alone", "pooled"] = "personal",
    without: str | None = None,
    seed: int = 0,
) -> atoll.Experiment:
    """Ten spoken digits over six speakers.

    Args:
        rounds: each one is one pass over every speaker's training recordings.
        lr: learning rate.
        method: "federated" shares one network, "personal" trains it two passes further at every speaker's, "alone"
            gives each their own, "pooled" puts all recordings in one place.
        without: a speaker who takes no part, such as "theo", to judge the network on a voice it has not heard.
        seed: of the cut into training and test, the initial values and the order of recordings.
    """
    speakers = atoll.datasets.spoken_digits(seed=seed)
    if without is not None:
        speakers = speakers.select([s for s in speakers.clients if s != without])
    module = network()
    module(speakers.train.fields["x"][:1])
    model = atoll.Model(module, loss="cross_entropy", metrics=("accuracy",))
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
        data=speakers,
        algorithm=methods[method],
        rounds=rounds,
        initial=model.init(seed),
        evaluate_every=5,
        seed=seed,
        title=f"Spoken digits, {method}",
    )
