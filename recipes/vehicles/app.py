"""Which traffic sign is it? A fleet drives different roads, and its pictures stay in the vehicles.

All pictures of a physical sign belong to one vehicle. A vehicle that has seen few kinds of signs alone knows few; what
the fleet learns together is tried on signs of other roads, too (the official test). A network that was trained on other
pictures before may stand in the place of the fleet's own; then only its last layer is the fleet's.
"""

from typing import Literal

from torch import nn

import atoll


def network() -> nn.Module:
    """Three convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 48, 3, padding=1), nn.GroupNorm(8, 48), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(48 * 4 * 4, 43),
    )  # fmt: skip


def experiment(
    *,
    rounds: int = 40,
    vehicles: int = 20,
    alpha: float = 1.0,
    lr: float = 0.05,
    method: Literal["federated", "personal", "alone", "pooled", "pretrained"] = "federated",
    seed: int = 0,
) -> atoll.Experiment:
    """43 kinds of signs over a fleet.

    Args:
        rounds: each one is one pass over every vehicle's training pictures.
        vehicles: how many.
        alpha: how different their roads are; small is very different.
        lr: learning rate.
        method: "federated" shares one network, "personal" trains it a pass further at every vehicle's, "alone" gives
            each their own, "pooled" puts all pictures in one place; "pretrained" leaves EfficientNet-Lite0 as ImageNet
            made it and solves for its last layer, from sums that every vehicle sends once.
        seed: of the roads, the cut into training and test, the initial values and the order of pictures.
    """
    fleet = atoll.datasets.traffic_signs(vehicles, alpha=alpha, seed=seed)
    if method == "pretrained":
        whole = atoll.pretrained("efficientnet_lite0", classes=43, size=64)
        model = atoll.Model(whole, loss="cross_entropy", metrics=("accuracy",), features="backbone")
        model, fleet = atoll.features(model, fleet)  # every vehicle computes its own, once
        rounds = 1
    else:
        model = atoll.Model(network(), loss="cross_entropy", metrics=("accuracy",))
    plan = atoll.local_sgd(lr=lr, epochs=1, batch_size=32, momentum=0.9)
    further = atoll.local_sgd(lr=lr / 4, epochs=1, batch_size=32, momentum=0.9)
    methods = {
        "federated": atoll.fedavg(plan),
        "personal": atoll.fine_tune(plan, personal=further),
        "alone": atoll.local_only(plan),
        "pooled": atoll.pooled(plan),
        "pretrained": atoll.fed3r(ridge=100.0),
    }
    return atoll.Experiment(
        model=model,
        data=fleet,
        algorithm=methods[method],
        rounds=rounds,
        initial=model.init(seed),
        evaluate_every=5,
        seed=seed,
        title=f"Traffic signs, {method}",
    )
