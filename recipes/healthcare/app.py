"""Heart disease at four hospitals that keep their patients' records.

Each patient sent for angiography has 13 measurements; the model predicts whether a coronary artery is narrowed. The
three methods train the same model with the same plan, so that they differ in one thing only: who learns from whom.
"""

from typing import Literal

from torch import nn

import atoll


def experiment(
    *,
    rounds: int = 30,
    lr: float = 0.1,
    method: Literal["federated", "alone", "pooled"] = "federated",
    seed: int = 0,
) -> atoll.Experiment:
    """Logistic regression over the four hospitals.

    Args:
        rounds: each one is one pass over every hospital's training patients.
        lr: learning rate.
        method: "federated" shares one model, "alone" gives each hospital its own, "pooled" puts all patients in one
            place.
        seed: of the cut into training and test, the initial values and the order of patients.
    """
    hospitals = atoll.datasets.heart_disease(seed=seed)
    model = atoll.Model(nn.Linear(len(hospitals.features), 1), loss="binary_cross_entropy", metrics=("accuracy", "auc"))
    plan = atoll.local_sgd(lr=lr, epochs=1, batch_size=32)
    methods = {"federated": atoll.fedavg, "alone": atoll.local_only, "pooled": atoll.pooled}
    return atoll.Experiment(
        model=model,
        data=hospitals,
        algorithm=methods[method](plan),
        rounds=rounds,
        initial=model.init(seed),
        seed=seed,
        title=f"Heart disease, {method}",
    )
