"""Data sets without owners: dealt out by a partitioner that is named."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from atoll.data.dataset import FederatedDataset
from atoll.data.partition import PARTITIONERS
from atoll.errors import invalid, unknown

_NAMES = tuple(name for name in PARTITIONERS if name != "by_group")


def dealt(
    partition: str, fields: Mapping[str, Tensor], clients: int, *, options: Mapping[str, Any], **common: Any
) -> FederatedDataset:
    """Partition fields by the partitioner of a name.

    Args:
        partition: "iid", "dirichlet", "shards", "quantity" or "by_label".
        fields: one tensor [n, ...] per field.
        clients: how many clients.
        options: arguments of that partitioner alone, such as alpha.
        common: arguments all partitioners share.

    Returns:
        The dataset.

    Raises:
        InvalidArgument: when the partitioner or an option is unknown, or an option it needs is missing.
    """
    if partition not in _NAMES:
        raise unknown("partition", partition, _NAMES)
    build = PARTITIONERS[partition]
    shared = {"seed", "test", "validation", "stratify", "name"}
    own = {
        name: parameter
        for name, parameter in inspect.signature(build).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in shared
    }
    for option in options:
        if option not in own:
            takes = f"takes {', '.join(own)}" if own else "takes no further arguments"
            raise invalid(option, options[option], f"an argument of partition {partition!r}, which {takes}")
    for name, parameter in own.items():
        if parameter.default is parameter.empty and name not in options:
            raise invalid("partition", partition, f"given with {name}=", f"For example {name}=1.")
    return build(dict(fields), clients, **common, **options)


def owners(
    partition: str, labels: Tensor, clients: int, *, seed: int, options: Mapping[str, Any]
) -> NDArray[np.object_]:
    """The client's name for each row of a table without owners: object [n]."""
    rows = np.arange(len(labels), dtype=np.int64)
    data = dealt(partition, {"row": _tensor(rows), "y": labels}, clients, options=options, seed=seed)
    out = np.empty(len(rows), dtype=object)
    placed = data.train.fields["row"].numpy()
    names = np.asarray(list(data.clients), dtype=object)
    out[placed] = np.repeat(names, data.train.sizes.numpy())
    return out


def _tensor(rows: NDArray[np.int64]) -> Tensor:
    import torch

    return torch.as_tensor(rows)
