"""Alignment to a site without labels: source features are moved so that their moments are the target's.

Sun, Feng & Saenko 2016, "Return of frustratingly easy domain adaptation" (CORAL), algorithm 1, here with the means too:

    x' = (x - m_s) (C_s + ridge I)^(-1/2) (C_t + ridge I)^(1/2) + m_t

Symbols: m mean and C covariance of features, s of the source clients, t of the target site. A head trained on x' fits
the target's features, which stay as they are. "variances" does it feature by feature, "means" shifts only.
With ridge 0 the moments are equal afterwards; the paper adds the identity, ridge 1.

What a client sends are sums over its examples: how many, of features, and of their products (d(d + 1)/2 for "coral", d
squares for "variances", none for "means"), in double precision. No example and no label leaves; the target sends the
same sums and needs no label.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from atoll.algorithms.checks import check_number
from atoll.analytics import Statistic
from atoll.data import FederatedDataset, Split
from atoll.errors import DataError, invalid

Method = Literal["coral", "variances", "means"]


class Sums(NamedTuple):
    """What leaves a client."""

    examples: Tensor  # [] how many
    first: Tensor  # [d] sum of features, float64
    second: Tensor  # upper triangle [d(d + 1)/2], squares [d], or nothing [0], float64


class Moments(NamedTuple):
    """Mean [d], and covariance [d, d], variances [d] or nothing [0]; both of the population (divided by n)."""

    mean: Tensor
    spread: Tensor


class Alignment(NamedTuple):
    """What an alignment gives.

    Attributes:
        data: the source clients with moved features; everything else is as it was.
        source: moments of the source clients together; None when each was aligned by itself.
        target: moments of the target.
        bytes_up: bytes each client, and the target, sends; a source client that is aligned by itself sends nothing.
        bytes_down: bytes each source client receives.
    """

    data: FederatedDataset
    source: Moments | None
    target: Moments
    bytes_up: int
    bytes_down: int


def moments(method: Method) -> Statistic[Tensor, Sums, Moments]:
    """The federated statistic: features [n, d] of clients to the moments of all."""

    def local(features: Tensor) -> Sums:
        z = features.double()
        second = z.new_empty(0)
        if method == "coral":
            upper = torch.triu_indices(z.shape[1], z.shape[1])
            second = (z.T @ z)[upper[0], upper[1]]
        elif method == "variances":
            second = z.square().sum(0)
        return Sums(z.new_tensor(float(len(z))), z.sum(0), second)

    def merge(one: Sums, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(one, other, strict=True)))

    def finish(sums: Sums) -> Moments:
        mean = sums.first / sums.examples
        if method == "means":
            return Moments(mean, sums.second)
        if method == "variances":
            return Moments(mean, (sums.second / sums.examples - mean.square()).clamp(min=0.0))
        width = len(mean)
        upper = torch.triu_indices(width, width)
        second = mean.new_zeros(width, width)
        second[upper[0], upper[1]] = sums.second / sums.examples
        return Moments(mean, second + second.triu(1).T - torch.outer(mean, mean))

    return Statistic(local, merge, finish)


def align(
    source: FederatedDataset,
    target: FederatedDataset,
    *,
    method: Method = "coral",
    ridge: float = 1.0,
    each: bool = False,
) -> Alignment:
    """Move source clients' features to the moments of a target that has no labels.

    Args:
        source: labelled clients whose "x" are features [n, d], for instance from `atoll.features`.
        target: the unlabelled site (or several, taken together); only its training "x" [n, d] is looked at.
        method: "coral" (means and covariances), "variances" (means and variances) or "means".
        ridge: added to variances, at least 0; 0 matches moments exactly and needs features that all vary.
        each: align every source client by its own moments, which then stay with it; else by those of all together.

    Returns:
        The moved data, moments, and what travelled. Validation and test features of source clients are moved too; a
        holdout, which is no client's, is left out.

    Raises:
        InvalidArgument: an argument out of range.
        DataError: "x" is no table of numbers, widths differ, or with ridge=0 a feature does not vary.
    """
    if method not in ("coral", "variances", "means"):
        raise invalid("method", method, '"coral", "variances" or "means"')
    ridge = check_number("ridge", ridge)
    width = _width("source", source)
    if _width("target", target) != width:
        raise DataError(f"source has {width} features, target has {_width('target', target)}: they must be the same.")
    statistic = moments(method)
    wanted = statistic.over(target.train.client(i)["x"] for i in range(len(target)))
    each_own = [source.train.client(i)["x"] for i in range(len(source))]
    together = None if each else statistic.over(each_own)
    own = [together or statistic.over([x]) for x in each_own]
    maps = [_map(m, wanted, method, ridge) for m in own] if each else [_map(own[0], wanted, method, ridge)] * len(own)

    def moved(fields: Mapping[str, Tensor], offsets: Tensor) -> dict[str, Tensor]:
        x = fields["x"].double()
        pieces = [
            (x[int(a) : int(b)] - m.mean) @ matrix + wanted.mean
            for a, b, m, matrix in zip(offsets[:-1], offsets[1:], own, maps, strict=True)
        ]
        return {**fields, "x": torch.cat(pieces).to(fields["x"].dtype)}

    def split(part: Split | None) -> Split | None:
        return None if part is None else Split(moved(part.fields, part.offsets), part.offsets)

    train = split(source.train)
    assert train is not None
    data = FederatedDataset(
        source.clients, train, validation=split(source.validation), test=split(source.test), name=source.name
    )
    numbers = 1 + width + len(statistic.local(each_own[0]).second)
    down = (width + wanted.spread.numel() if each else 2 * width + maps[0].numel()) * 8
    return Alignment(data, together, wanted, 8 * numbers, down)


def _map(source: Moments, target: Moments, method: Method, ridge: float) -> Tensor:
    """The matrix [d, d] between centred features."""
    if method == "means":
        return torch.eye(len(source.mean), dtype=torch.float64)
    if method == "variances":
        least = float((source.spread + ridge).min())
        _check_spread(least, ridge)
        return ((target.spread + ridge) / (source.spread + ridge)).sqrt().diag()
    eye = torch.eye(len(source.mean), dtype=torch.float64)
    return _power(source.spread + ridge * eye, -0.5, ridge) @ _power(target.spread + ridge * eye, 0.5, ridge)


def _power(matrix: Tensor, exponent: float, ridge: float) -> Tensor:
    """A power of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    if exponent < 0:
        _check_spread(float(values.min() / values.max().clamp(min=1e-300)), ridge)
    return (vectors * values.clamp(min=0.0) ** exponent) @ vectors.T


def _check_spread(least: float, ridge: float) -> None:
    if least <= 1e-12:
        raise DataError(
            f"ridge={ridge:g}: the source's features do not all vary by themselves, so that their spread cannot be "
            'undone. Raise ridge (the paper uses 1), or use method="means".'
        )


def _width(name: str, data: FederatedDataset) -> int:
    if not isinstance(data, FederatedDataset):
        raise invalid(name, type(data).__name__, "a packed FederatedDataset")
    x = data.train.fields.get("x")
    if x is None or x.ndim != 2 or not x.is_floating_point():
        found = "missing" if x is None else f"{x.dtype} of shape {tuple(x.shape)}"
        raise DataError(f"{name}: x must be features [n, d], but is {found}. Compute them first: atoll.features.")
    return x.shape[1]
