"""Dealing one data set out to clients, evenly or with the skews that federated learning meets.

Every partitioner decides an owner for each example and gathers the examples once into packed tensors. Each example
goes to exactly one client. `test` as a fraction is cut from each client; as examples it becomes the holdout that
measures the global model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.data.arrays import fields_of
from atoll.data.cutting import TEST, TRAIN, VALIDATION, check_fractions, cut
from atoll.data.dataset import FederatedDataset
from atoll.data.names import Numbered
from atoll.data.packed import divide, groups_of, labels_of
from atoll.errors import DataError, invalid
from atoll.random import numpy_generator

_REDRAWS = 500


def iid(
    examples: Any,
    clients: int,
    *,
    seed: int = 0,
    test: Any = None,
    validation: float | None = None,
    stratify: bool = False,
    name: str = "",
) -> FederatedDataset:
    """Deal examples out at random, in equal numbers (sizes differ by one at most).

    Args:
        examples: (x, y) or a mapping of named fields, each [n, ...].
        clients: how many clients.
        seed: of the draw.
        test: a fraction to cut from each client, or examples that become the holdout.
        validation: a fraction to cut from each client.
        stratify: whether the cut keeps each client's label shares.
        name: what the data are.

    Returns:
        The dataset, clients named "0" to "n-1".

    Raises:
        InvalidArgument: when there are more clients than examples.
    """
    fields, total = _read(examples, clients)
    owner = np.empty(total, dtype=np.int64)
    owner[numpy_generator(seed, "partition", "iid").permutation(total)] = np.arange(total) % clients
    return _deal(fields, owner, Numbered(clients), seed, test, validation, stratify, name)


def dirichlet(
    examples: Any,
    clients: int,
    *,
    alpha: float,
    seed: int = 0,
    min_size: int = 1,
    test: Any = None,
    validation: float | None = None,
    stratify: bool = False,
    name: str = "",
) -> FederatedDataset:
    """Label skew: the examples of each class are shared out by proportions drawn from a Dirichlet distribution.

    For each class k, p_k ~ Dir(alpha * 1) over clients; client i receives the share p_ki of the class. All classes
    are drawn again until every client has `min_size` examples.

    Args:
        examples: (x, y) or a mapping of named fields, each [n, ...]; y integer labels [n].
        clients: how many clients.
        alpha: concentration > 0; small: few classes per client, large: nearly iid.
        seed: of the draw.
        min_size: examples every client must have, at least 1.
        test: a fraction to cut from each client, or examples that become the holdout.
        validation: a fraction to cut from each client.
        stratify: whether the cut keeps each client's label shares.
        name: what the data are.

    Returns:
        The dataset, clients named "0" to "n-1".

    Raises:
        InvalidArgument: when alpha or min_size is out of range, or no draw met min_size.

    Source: Yurochkin et al. 2019, "Bayesian nonparametric federated learning of neural networks", section 4.
    """
    fields, total = _read(examples, clients)
    _positive("alpha", alpha)
    _room(min_size, clients, total)
    labels, classes = _classes(fields, "dirichlet")
    sizes = np.bincount(labels, minlength=classes)
    rng = numpy_generator(seed, "partition", "dirichlet")
    # Members of a class are shuffled once; a redraw only moves the cuts between clients.
    members = _shuffled_by(labels, rng)
    best = 0
    for _ in range(_REDRAWS):
        shares = rng.dirichlet(np.full(clients, float(alpha)), size=classes)
        cuts = np.floor(np.cumsum(shares, axis=1) * sizes[:, None]).astype(np.int64)
        cuts[:, -1] = sizes
        counts = np.diff(np.minimum(cuts, sizes[:, None]), axis=1, prepend=0)
        best = max(best, smallest := int(counts.sum(axis=0).min()))
        if smallest >= min_size:
            owner = np.empty(total, dtype=np.int64)
            owner[members] = np.repeat(np.tile(np.arange(clients), classes), counts.reshape(-1))
            return _deal(fields, owner, Numbered(clients), seed, test, validation, stratify, name)
    raise invalid(
        "min_size",
        min_size,
        f"reachable: in {_REDRAWS} draws over {clients} clients, {classes} classes and {total} examples at "
        f"alpha={alpha:g} the smallest client had at most {best} examples",
        "Raise alpha, lower min_size or clients, or use partition.by_label for a fixed number of labels per client.",
    )


def shards(
    examples: Any,
    clients: int,
    *,
    per_client: int | None = None,
    size: int | None = None,
    seed: int = 0,
    test: Any = None,
    validation: float | None = None,
    stratify: bool = False,
    name: str = "",
) -> FederatedDataset:
    """Label skew: examples sorted by label, cut into equal shards, and a few shards dealt to each client at random.

    Args:
        examples: (x, y) or a mapping of named fields, each [n, ...]; y integer labels [n].
        clients: how many clients.
        per_client: shards per client, 2 by default; there are clients * per_client shards.
        size: examples per shard instead; n // (clients * size) shards go to each client and must use up all examples.
        seed: of the draw.
        test: a fraction to cut from each client, or examples that become the holdout.
        validation: a fraction to cut from each client.
        stratify: whether the cut keeps each client's label shares.
        name: what the data are.

    Returns:
        The dataset, clients named "0" to "n-1".

    Raises:
        InvalidArgument: when there are fewer examples than shards, or shards of that size do not come out even.

    Source: McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data",
    section 3 (MNIST: 200 shards of 300, 2 per client).
    """
    fields, total = _read(examples, clients)
    if size is not None:
        if per_client is not None:
            raise invalid("size", size, "None where per_client is given", "Give one of the two.")
        _count("size", size)
        if total % (size * clients):
            raise invalid(
                "size",
                size,
                f"such that clients * size ({clients * size}) divides the {total} examples",
                "Use per_client=, whose shards may differ by one example.",
            )
        per_client = total // (size * clients)
    per_client = 2 if per_client is None else per_client
    _count("per_client", per_client)
    count = clients * per_client
    if count > total:
        raise invalid(
            "per_client",
            per_client,
            f"at most {total // clients} for {total} examples and {clients} clients",
            "Lower per_client or clients.",
        )
    labels, _ = _classes(fields, "shards")
    rng = numpy_generator(seed, "partition", "shards")
    members = _shuffled_by(labels, rng)
    shard = (np.arange(total, dtype=np.int64) * count) // total
    holder = np.empty(count, dtype=np.int64)
    holder[rng.permutation(count)] = np.arange(count) // per_client
    owner = np.empty(total, dtype=np.int64)
    owner[members] = holder[shard]
    return _deal(fields, owner, Numbered(clients), seed, test, validation, stratify, name)


def quantity(
    examples: Any,
    clients: int,
    *,
    alpha: float,
    min_size: int = 1,
    seed: int = 0,
    test: Any = None,
    validation: float | None = None,
    stratify: bool = False,
    name: str = "",
) -> FederatedDataset:
    """Quantity skew: clients' sizes follow a Dirichlet distribution, their examples are drawn at random.

    Every client first receives `min_size` examples; the rest is shared out by p ~ Dir(alpha * 1).

    Args:
        examples: (x, y) or a mapping of named fields, each [n, ...].
        clients: how many clients.
        alpha: concentration > 0; small: a few large clients and many small ones.
        min_size: examples every client must have, at least 1.
        seed: of the draw.
        test: a fraction to cut from each client, or examples that become the holdout.
        validation: a fraction to cut from each client.
        stratify: whether the cut keeps each client's label shares.
        name: what the data are.

    Returns:
        The dataset, clients named "0" to "n-1".

    Raises:
        InvalidArgument: when alpha or min_size is out of range.

    Source: Li et al. 2022, "Federated learning on non-IID data silos: an experimental study", section 4.3.
    """
    fields, total = _read(examples, clients)
    _positive("alpha", alpha)
    _room(min_size, clients, total)
    rng = numpy_generator(seed, "partition", "quantity")
    wanted = rng.dirichlet(np.full(clients, float(alpha))) * (total - clients * min_size)
    sizes = np.floor(wanted).astype(np.int64)
    # Whole examples are left over after rounding down; they go where most was lost.
    left = total - clients * min_size - int(sizes.sum())
    sizes[np.argsort(sizes - wanted, kind="stable")[:left]] += 1
    owner = np.empty(total, dtype=np.int64)
    owner[rng.permutation(total)] = np.repeat(np.arange(clients), sizes + min_size)
    return _deal(fields, owner, Numbered(clients), seed, test, validation, stratify, name)


def by_label(
    examples: Any,
    clients: int,
    *,
    labels: int,
    seed: int = 0,
    test: Any = None,
    validation: float | None = None,
    stratify: bool = False,
    name: str = "",
) -> FederatedDataset:
    """Label skew: every client sees exactly `labels` of the labels.

    Labels are assigned so that all are held by nearly equal numbers of clients, ties at random; the examples of a
    label are shared out equally among those who hold it.

    Args:
        examples: (x, y) or a mapping of named fields, each [n, ...]; y integer labels [n].
        clients: how many clients.
        labels: distinct labels per client.
        seed: of the draw.
        test: a fraction to cut from each client, or examples that become the holdout.
        validation: a fraction to cut from each client.
        stratify: whether the cut keeps each client's label shares.
        name: what the data are.

    Returns:
        The dataset, clients named "0" to "n-1".

    Raises:
        InvalidArgument: when there are fewer labels than asked for, some label would be held by nobody, or a label
            has fewer examples than holders.

    Source: Li et al. 2022, "Federated learning on non-IID data silos: an experimental study", section 4.1 (#C = k).
    """
    fields, total = _read(examples, clients)
    codes, classes = _classes(fields, "by_label")
    _count("labels", labels)
    if labels > classes:
        raise invalid("labels", labels, f"at most the number of labels in the data ({classes})")
    if clients * labels < classes:
        raise invalid(
            "labels",
            labels,
            f"at least {math.ceil(classes / clients)}, so that {clients} clients hold all {classes} labels",
            "Raise labels or clients.",
        )
    rng = numpy_generator(seed, "partition", "by_label")
    holders: list[list[int]] = [[] for _ in range(classes)]
    held = np.zeros(classes, dtype=np.int64)
    for client in range(clients):
        # Those held least so far come first: everyone's labels are distinct and no label is forgotten.
        chosen = np.lexsort((rng.random(classes), held))[:labels]
        held[chosen] += 1
        for label in chosen:
            holders[int(label)].append(client)
    sizes = np.bincount(codes, minlength=classes)
    short = np.flatnonzero(sizes < held)
    if len(short):
        raise invalid(
            "labels",
            labels,
            f"such that no label has more holders than examples (label number {int(short[0])} in sorted order has "
            f"{int(sizes[short[0]])} examples for {int(held[short[0]])} clients)",
            "Lower labels or clients.",
        )
    members = _shuffled_by(codes, rng)
    owner = np.empty(total, dtype=np.int64)
    start = 0
    for label, names in enumerate(holders):
        count = int(sizes[label])
        dealt = rng.permutation(np.asarray(names, dtype=np.int64))
        owner[members[start : start + count]] = dealt[np.arange(count) % len(dealt)]
        start += count
    return _deal(fields, owner, Numbered(clients), seed, test, validation, stratify, name)


def by_group(
    examples: Any,
    groups: Any,
    *,
    order: Literal["sorted", "appearance"] = "sorted",
    seed: int = 0,
    test: Any = None,
    validation: float | None = None,
    stratify: bool = False,
    name: str = "",
) -> FederatedDataset:
    """One client for each distinct value of a grouping: a writer, a hospital, a device.

    Args:
        examples: (x, y) or a mapping of named fields, each [n, ...].
        groups: one value per example, [n]; its text is the client's name.
        order: clients sorted by value, or in order of first appearance.
        seed: of the cut.
        test: a fraction to cut from each client, or examples that become the holdout.
        validation: a fraction to cut from each client.
        stratify: whether the cut keeps each client's label shares.
        name: what the data are.

    Returns:
        The dataset, clients named by the groups' values.

    Raises:
        DataError: when a group is missing or lengths differ.
        InvalidArgument: when order is unknown.
    """
    fields = fields_of(examples, "examples")
    total = len(next(iter(fields.values())))
    if order not in ("sorted", "appearance"):
        raise invalid("order", order, "'sorted' or 'appearance'")
    values: list[Any] = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    if len(values) != total:
        raise DataError(f"groups has {len(values)} values, examples has {total} rows. Every example needs one group.")
    if total == 0:
        raise DataError("examples is empty: there is nothing to partition.")
    missing = sum(1 for value in values if value is None or value != value or str(value) in ("", "<NA>", "NaT"))
    if missing:
        raise DataError(f"groups: {missing} of {total} values are missing. Drop those examples or name their group.")
    distinct = list(dict.fromkeys(values))
    if order == "sorted":
        try:
            distinct.sort()
        except TypeError:
            distinct.sort(key=str)
    places = {value: place for place, value in enumerate(distinct)}
    owner = np.fromiter((places[value] for value in values), dtype=np.int64, count=total)
    return _deal(fields, owner, tuple(str(value) for value in distinct), seed, test, validation, stratify, name)


PARTITIONERS: Mapping[str, Callable[..., FederatedDataset]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "quantity": quantity,
    "by_label": by_label,
    "by_group": by_group,
}


def _read(examples: Any, clients: int) -> tuple[dict[str, Tensor], int]:
    fields = fields_of(examples, "examples")
    total = len(next(iter(fields.values())))
    if total == 0:
        raise DataError("examples is empty: there is nothing to partition.")
    _count("clients", clients)
    if clients > total:
        raise invalid("clients", clients, f"at most the number of examples ({total})", "Every client needs one.")
    return fields, total


def _deal(
    fields: Mapping[str, Tensor],
    owner: NDArray[np.int64],
    clients: Sequence[str],
    seed: int,
    test: Any,
    validation: float | None,
    stratify: bool,
    name: str,
) -> FederatedDataset:
    holdout = None
    fraction = 0.0
    if isinstance(test, (tuple, Mapping)):
        holdout = fields_of(test, "test")
    elif test is not None:
        fraction = test
    kept = 0.0 if validation is None else validation
    check_fractions(fraction, kept)
    sizes = np.bincount(owner, minlength=len(clients))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    order = np.argsort(owner, kind="stable")
    labels = labels_of(fields, "stratify=True").numpy()[order] if stratify else None
    groups = groups_of(fields)
    codes = cut(
        clients, offsets, test=fraction, validation=kept, seed=seed, labels=labels,
        groups=None if groups is None else groups[order],
    )  # fmt: skip
    parts = divide(fields, torch.as_tensor(offsets), codes, torch.as_tensor(order))
    return FederatedDataset(
        clients,
        parts[TRAIN],
        validation=parts[VALIDATION] if kept > 0 else None,
        test=parts[TEST] if fraction > 0 else None,
        holdout=holdout,
        name=name,
    )


def _classes(fields: Mapping[str, Tensor], why: str) -> tuple[NDArray[np.int64], int]:
    distinct, codes = np.unique(labels_of(fields, f"partition.{why}").cpu().numpy(), return_inverse=True)
    return codes.reshape(-1).astype(np.int64), len(distinct)


def _shuffled_by(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Places of the examples sorted by label, in random order within a label."""
    mixed = rng.permutation(len(labels))
    return mixed[np.argsort(labels[mixed], kind="stable")]


def _count(argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise invalid(argument, value, "a whole number of at least 1")


def _positive(argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
        raise invalid(argument, value, "a finite number above 0", "0.1 to 1 is a strong skew, 100 nearly none.")


def _room(min_size: int, clients: int, total: int) -> None:
    _count("min_size", min_size)
    if min_size * clients > total:
        raise invalid(
            "min_size",
            min_size,
            f"at most {total // clients} for {total} examples and {clients} clients",
            "Lower min_size or clients.",
        )
