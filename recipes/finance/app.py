"""Loans that go bad, learnt by lenders in fifty states that keep their borrowers' records.

One loan in twenty goes bad, so accuracy says nothing: a model that approves everything has 95 %. What counts is whether
bad loans are ranked above good ones (auc, average_precision) and whether a predicted 10 % means 10 % (brier,
calibration_error). Nothing is re-weighted or resampled: that would spoil the probabilities a lender prices with.
"""

from typing import Literal

from torch import nn

import atoll


def experiment(
    *,
    data: str | None = None,
    client: str | None = None,
    target: str | None = None,
    positive: str | None = None,
    rounds: int = 40,
    lr: float = 0.05,
    method: Literal["federated", "alone", "pooled"] = "federated",
    seed: int = 0,
) -> atoll.Experiment:
    """Logistic regression over lenders, or over the owners of any table of rare events.

    Args:
        data: a .csv, .csv.gz or .parquet file; default LendingClub's loans by state.
        client: the column of `data` that names the owner of a row.
        target: the column of `data` that says whether the event happened.
        positive: the target's value that means it did; default the last of the two in sorted order.
        rounds: each one is one pass over every lender's training loans.
        lr: learning rate.
        method: "federated" shares one model, "alone" gives each lender its own, "pooled" puts all loans in one place.
        seed: of the cut into training and test, the initial values and the order of loans.
    """
    if data is None:
        if client or target or positive:
            raise atoll.errors.InvalidArgument("client, target and positive describe a file: give it with --data PATH.")
        lenders, title = atoll.datasets.lending_club(seed=seed), "Loan default"
    else:
        if not client or not target:
            raise atoll.errors.InvalidArgument(
                "a file needs --set client=COLUMN --set target=COLUMN: who owns a row, and what to predict."
            )
        recipe = atoll.table(client=client, target=target, positive=positive, stratify=True, seed=seed)
        lenders, title = recipe.bind(data), f"{target} by {client}"
    model = atoll.Model(
        nn.Linear(len(lenders.features), 1),
        loss="binary_cross_entropy",
        metrics=("auc", "average_precision", "brier", "calibration_error"),
    )
    plan = atoll.local_sgd(lr=lr, epochs=1, batch_size=32)
    methods = {"federated": atoll.fedavg, "alone": atoll.local_only, "pooled": atoll.pooled}
    return atoll.Experiment(
        model=model,
        data=lenders,
        algorithm=methods[method](plan),
        rounds=rounds,
        initial=model.init(seed),
        seed=seed,
        title=f"{title}, {method}",
    )
