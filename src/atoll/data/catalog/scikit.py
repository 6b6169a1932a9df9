"""Data sets that come with scikit-learn."""

from typing import Any

import numpy as np
import torch

from atoll.data.catalog.dealing import dealt, owners
from atoll.data.dataset import FederatedDataset
from atoll.data.frames import need
from atoll.data.table import table


def breast_cancer(
    clients: int = 5,
    *,
    partition: str = "iid",
    test: float = 0.2,
    validation: float = 0.0,
    seed: int = 0,
    stratify: bool = True,
    standardise: bool = True,
    **options: Any,
) -> FederatedDataset:
    """Breast cancer from 30 measurements of cell nuclei, dealt out to clients.

    Args:
        clients: how many clients.
        partition: "iid", "dirichlet", "shards", "quantity" or "by_label".
        test: fraction of each client's patients for test.
        validation: fraction of each client's patients for validation.
        seed: of the partition and the cut.
        stratify: whether the cut keeps each client's share of malignant cases.
        standardise: whether numbers are shifted to mean 0 and scaled to variance 1, federated.
        options: arguments of the partitioner, such as alpha.

    Returns:
        The dataset: x float32 [n, 30], y int64 [n], 1 for malignant.

    Raises:
        DataError: when scikit-learn is not installed.

    Source: Wolberg, Mangasarian, Street and Street 1993, doi:10.24432/C5DW2B (CC BY 4.0).
    """
    bunch = need("sklearn.datasets", "scikit-learn", "breast_cancer", extra="datasets").load_breast_cancer(
        as_frame=True
    )
    malignant = np.asarray(bunch.target == 0, dtype=np.int64)
    frame = bunch.data.assign(
        client=owners(partition, torch.as_tensor(malignant), clients, seed=seed, options=options),
        diagnosis=np.where(malignant == 1, "malignant", "benign"),
    )
    recipe = table(
        client="client",
        target="diagnosis",
        test=test,
        validation=validation,
        seed=seed,
        stratify=stratify,
        standardise=standardise,
        classes=("benign", "malignant"),
        name="breast_cancer",
    )
    return recipe.bind(frame)


def digits(
    clients: int = 10,
    *,
    partition: str = "dirichlet",
    alpha: float | None = None,
    test: float | None = 0.2,
    validation: float | None = None,
    seed: int = 0,
    stratify: bool = True,
    flat: bool = True,
    **options: Any,
) -> FederatedDataset:
    """Handwritten digits of 8 x 8 pixels, dealt out to clients.

    Args:
        clients: how many clients.
        partition: "iid", "dirichlet", "shards", "quantity" or "by_label".
        alpha: concentration of "dirichlet" and "quantity"; 0.5 by default.
        test: fraction of each client's images for test.
        validation: fraction of each client's images for validation.
        seed: of the partition and the cut.
        stratify: whether the cut keeps each client's label shares.
        flat: x is [n, 64] rather than [n, 1, 8, 8].
        options: further arguments of the partitioner.

    Returns:
        The dataset: x float32 in [0, 1], y int64 [n].

    Raises:
        DataError: when scikit-learn is not installed.

    Source: Alpaydin and Kaynak 1998, doi:10.24432/C50P49 (CC BY 4.0).
    """
    bunch = need("sklearn.datasets", "scikit-learn", "digits", extra="datasets").load_digits()
    x = torch.as_tensor(np.asarray(bunch.data, dtype=np.float32) / np.float32(16.0))
    chosen = dict(options)
    if alpha is not None:
        chosen["alpha"] = alpha
    elif partition in ("dirichlet", "quantity"):
        chosen["alpha"] = 0.5
    return dealt(
        partition,
        {"x": x if flat else x.reshape(-1, 1, 8, 8), "y": torch.as_tensor(np.asarray(bunch.target, dtype=np.int64))},
        clients,
        options=chosen,
        seed=seed,
        test=test,
        validation=validation,
        stratify=stratify,
        name="digits",
    )
