"""CORAL over clients: the moments of the moved source are the target's, and nothing but sums is exchanged."""

from typing import Any

import numpy as np
import pytest
import torch
from registry import stack
from torch import Tensor, nn

import atoll
from atoll.algorithms import fed3r
from atoll.data import FederatedDataset
from atoll.errors import DataError, InvalidArgument
from atoll.model import Model
from atoll.transfer.alignment import moments

WIDTH = 4


def source(sizes: tuple[int, ...] = (30, 50, 20)) -> FederatedDataset:
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64)
    clients: dict[str, tuple[Tensor, Tensor]] = {}
    for i, n in enumerate(sizes):
        x = torch.randn(n, WIDTH, generator=draw, dtype=torch.float64) @ mix + i
        clients[f"c{i}"] = (x, torch.arange(n) % 3)
    return FederatedDataset.from_arrays(clients, test=0.2)


def target() -> FederatedDataset:
    draw = torch.Generator().manual_seed(1)
    mix = torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64)
    x = torch.randn(80, WIDTH, generator=draw, dtype=torch.float64) @ mix - 5
    return FederatedDataset.from_arrays({"night": {"x": x[:50]}, "fog": {"x": x[50:]}})


def table(data: FederatedDataset) -> np.ndarray:
    return data.train.fields["x"].numpy()


def covariance(x: np.ndarray) -> np.ndarray:
    return np.cov(x.T, bias=True)


def test_moments_of_clients_are_those_of_the_pooled_table() -> None:
    data = source()
    found = moments("coral").over(data.train.client(i)["x"] for i in range(3))
    np.testing.assert_allclose(found.mean, table(data).mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.spread, covariance(table(data)), rtol=0, atol=1e-12)
    found = moments("variances").over(data.train.client(i)["x"] for i in range(3))
    np.testing.assert_allclose(found.spread, table(data).var(0), rtol=0, atol=1e-12)


def test_the_moved_source_has_the_targets_moments() -> None:
    aim = table(target())
    moved = table(atoll.align(source(), target(), ridge=0.0).data)
    np.testing.assert_allclose(moved.mean(0), aim.mean(0), rtol=0, atol=1e-10)
    np.testing.assert_allclose(covariance(moved), covariance(aim), rtol=0, atol=1e-9)
    moved = table(atoll.align(source(), target(), method="variances", ridge=0.0).data)
    np.testing.assert_allclose(moved.mean(0), aim.mean(0), rtol=0, atol=1e-10)
    np.testing.assert_allclose(moved.var(0), aim.var(0), rtol=0, atol=1e-10)
    assert np.abs(covariance(moved) - covariance(aim)).max() > 0.1
    moved = table(atoll.align(source(), target(), method="means").data)
    np.testing.assert_allclose(moved - table(source()), np.tile(aim.mean(0) - table(source()).mean(0), (len(moved), 1)))


def test_every_client_by_itself_has_the_targets_moments_too() -> None:
    found = atoll.align(source(), target(), ridge=0.0, each=True)
    assert found.source is None
    for i in range(3):
        own = found.data.train.client(i)["x"].numpy()
        np.testing.assert_allclose(own.mean(0), table(target()).mean(0), rtol=0, atol=1e-9)
        np.testing.assert_allclose(covariance(own), covariance(table(target())), rtol=0, atol=1e-8)


def test_the_papers_formula_with_its_ridge() -> None:
    x, aim = table(source()), table(target())

    def power(matrix: np.ndarray, exponent: float) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return vectors @ np.diag(values**exponent) @ vectors.T

    eye = np.eye(WIDTH)
    matrix = power(covariance(x) + eye, -0.5) @ power(covariance(aim) + eye, 0.5)
    expected = (x - x.mean(0)) @ matrix + aim.mean(0)
    found = atoll.align(source(), target())
    np.testing.assert_allclose(table(found.data), expected, rtol=0, atol=1e-10)
    test = source().test
    assert test is not None and found.data.test is not None
    shifted = (test.fields["x"].numpy() - x.mean(0)) @ matrix + aim.mean(0)
    np.testing.assert_allclose(found.data.test.fields["x"].numpy(), shifted, rtol=0, atol=1e-10)
    assert torch.equal(found.data.train.fields["y"], source().train.fields["y"])


def test_a_source_that_is_the_target_stays() -> None:
    for options in ({"ridge": 0.0}, {"ridge": 1.0}, {"method": "variances"}, {"method": "means"}):
        found = atoll.align(source(), source(), **options)  # type: ignore[arg-type]
        np.testing.assert_allclose(table(found.data), table(source()), rtol=0, atol=1e-9)


def test_only_sums_travel() -> None:
    one, other = atoll.align(source(), target()), atoll.align(source((30, 50, 2000)), target())
    assert one.bytes_up == other.bytes_up == 8 * (1 + WIDTH + WIDTH * (WIDTH + 1) // 2)
    assert atoll.align(source(), target(), method="variances").bytes_up == 8 * (1 + 2 * WIDTH)
    assert atoll.align(source(), target(), method="means").bytes_up == 8 * (1 + WIDTH)


def test_a_head_on_aligned_features_fits_the_site_without_labels() -> None:
    """Two clouds whose place and scale differ between source and target: without alignment all is one class."""
    draw = torch.Generator().manual_seed(4)

    def clouds(n: int, shift: float, scale: float) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % 2
        x = torch.randn(n, 2, generator=draw, dtype=torch.float64) * 0.3
        x[:, 0] += 2.0 * y
        return x * scale + shift, y

    labelled = FederatedDataset.from_arrays({c: clouds(60, 0.0, 1.0) for c in "ab"})
    x, y = clouds(200, 9.0, 3.0)
    site = FederatedDataset.from_arrays({"site": {"x": x}})
    accuracy: list[float] = []
    for data in (labelled, atoll.align(labelled, site, ridge=1e-3).data):
        model = Model(stack(head=nn.Linear(2, 2)).double(), "cross_entropy")
        result = atoll.simulate(model, data, algorithm=fed3r(), rounds=1, progress=False)
        accuracy.append(float((result.predict(x).argmax(1) == y).double().mean()))
    assert accuracy[0] < 0.6 and accuracy[1] > 0.97


@pytest.mark.parametrize(("options", "said"), [({"method": "moments"}, '"coral"'), ({"ridge": -1.0}, "ridge=-1.0")])
def test_arguments_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        atoll.align(source(), target(), **options)


def test_data_that_cannot_be_aligned() -> None:
    flat = FederatedDataset.from_arrays({"a": {"x": torch.ones(5, WIDTH).double()}})
    for method in ("coral", "variances"):
        with pytest.raises(DataError, match="do not all vary"):
            atoll.align(flat, target(), method=method, ridge=0.0)  # type: ignore[arg-type]
    images = FederatedDataset.from_arrays({"a": {"x": torch.rand(5, 1, 2, 2)}})
    with pytest.raises(DataError, match=r"features \[n, d\].*atoll\.features"):
        atoll.align(images, target())
    with pytest.raises(DataError, match="source has 2 features, target has 4"):
        atoll.align(FederatedDataset.from_arrays({"a": {"x": torch.rand(5, 2)}}), target())
