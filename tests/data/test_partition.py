"""Partitioners: every example to exactly one client, the skew that was asked for, and clear refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll import partition
from atoll.data import FederatedDataset
from atoll.errors import DataError, InvalidArgument


def examples(n: int, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(n, dtype=torch.float64), torch.arange(n) % classes


def build(name: str, data: object, clients: int, **options: object) -> FederatedDataset:
    more: dict[str, dict[str, object]] = {
        "iid": {},
        "dirichlet": {"alpha": 0.5},
        "shards": {"per_client": 2},
        "quantity": {"alpha": 0.3},
        "by_label": {"labels": 3},
    }
    return getattr(partition, name)(data, clients, **more[name], **options)


NAMES = ["iid", "dirichlet", "shards", "quantity", "by_label"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(60, 300), clients=st.integers(2, 8), seed=st.integers(0, 3), test=st.sampled_from([None, 0.3]))
def test_every_example_goes_to_exactly_one_client(
    name: str, n: int, clients: int, seed: int, test: float | None
) -> None:
    x, y = examples(n)
    data = build(name, (x, y), clients, seed=seed, test=test, validation=0.2)
    assert list(data.clients) == [str(i) for i in range(clients)] and int(data.train.sizes.min()) >= 1
    assert (data.test is None) == (test is None) and data.validation is not None
    parts = [split for split in (data.train, data.validation, data.test) if split is not None]
    ids = torch.cat([split.fields["x"] for split in parts])
    assert torch.equal(ids.sort().values, x)
    assert torch.equal(torch.cat([split.fields["y"] for split in parts]), y[ids.long()])


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_fixes_the_draw(name: str) -> None:
    data = examples(200)
    first, again, other = (build(name, data, 4, seed=seed).fingerprint() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("name", NAMES)
def test_what_belongs_together_is_cut_in_one_piece(name: str) -> None:
    x, y = examples(300)
    data = build(name, {"x": x, "y": y, "cut_group": y}, 4, test=0.3, validation=0.3)
    for client in data.clients:
        of = data[client]
        sides = [set(part["cut_group"].tolist()) for part in (of.train, of.validation, of.test) if part is not None]
        assert sides[0] and sum(map(len, sides)) == len(set.union(*sides))


def test_iid_sizes_differ_by_one_at_most() -> None:
    sizes = partition.iid(examples(103), 10).train.sizes
    assert int(sizes.max() - sizes.min()) == 1


def counts(data: FederatedDataset) -> np.ndarray:
    counted = data.class_counts()
    assert counted is not None
    return counted[1]


def test_dirichlet_alpha_is_the_skew() -> None:
    data = examples(10_000)
    spread = [counts(partition.dirichlet(data, 10, alpha=alpha)).std(axis=0).mean() for alpha in (0.1, 1.0, 100.0)]
    assert spread[0] > 2 * spread[1] > 4 * spread[2]


def test_dirichlet_shares_have_the_right_moments() -> None:
    # A client's share of a class is Beta(alpha, (C - 1) alpha): variance (C - 1) / (C^2 (C alpha + 1)).
    clients, alpha, classes = 5, 0.7, 2000
    shares = counts(partition.dirichlet(examples(classes * 50, classes), clients, alpha=alpha)) / 50
    assert abs(shares.var() - (clients - 1) / (clients**2 * (clients * alpha + 1))) < 0.003


def test_dirichlet_min_size_holds() -> None:
    data = partition.dirichlet(examples(1000), 20, alpha=0.5, min_size=10)
    assert int(data.train.sizes.min()) >= 10


def test_shards_of_mcmahan() -> None:
    x, y = torch.arange(6000, dtype=torch.float64), torch.arange(6000) % 10
    by_count = partition.shards((x, y), 100)
    assert set(by_count.train.sizes.tolist()) == {60}
    assert int((counts(by_count) > 0).sum(axis=1).max()) <= 2
    assert partition.shards((x, y), 100, size=30).fingerprint() == by_count.fingerprint()


def test_quantity_skews_sizes_alone() -> None:
    data = partition.quantity(examples(5000), 10, alpha=0.3, min_size=20)
    sizes = data.train.sizes
    assert int(sizes.min()) >= 20 and int(sizes.max()) > 5 * int(sizes.min())


def test_by_label_gives_exactly_k_labels() -> None:
    data = partition.by_label(examples(1000, 10), 20, labels=3)
    held = counts(data) > 0
    assert set(held.sum(axis=1)) == {3} and set(held.sum(axis=0)) == {6}


def test_labels_need_not_be_consecutive() -> None:
    data = partition.by_label((np.zeros((30, 1)), np.repeat([-5, 7, 900], 10)), 3, labels=1)
    assert sorted(int(data[c].train["y"].unique()) for c in data) == [-5, 7, 900]


def test_by_group() -> None:
    x = np.arange(6.0)
    data = partition.by_group((x, np.zeros(6, int)), np.array(["b", "a", "b", "c", "a", "b"]))
    assert tuple(data.clients) == ("a", "b", "c") and data["b"].train["x"].tolist() == [0.0, 2.0, 5.0]
    first = partition.by_group((x, np.zeros(6, int)), [10, 9, 10, 2, 9, 10], order="appearance")
    assert tuple(first.clients) == ("10", "9", "2")
    assert tuple(partition.by_group((x, np.zeros(6, int)), [10, 9, 10, 2, 9, 10]).clients) == ("2", "9", "10")


def test_given_test_examples_become_the_holdout() -> None:
    data = partition.iid(examples(50), 5, test=examples(7), validation=0.2)
    assert data.test is None and data.holdout is not None and len(data.holdout["x"]) == 7
    assert data.validation is not None and data.validation.sizes.tolist() == [2] * 5


def test_stratified_test() -> None:
    data = partition.iid(examples(500), 5, test=0.2, stratify=True)
    for name in data:
        whole = torch.bincount(torch.cat([data[name].train["y"], data[name].test["y"]]), minlength=5)
        assert float((torch.bincount(data[name].test["y"], minlength=5) - whole * 0.2).abs().max()) <= 1


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda d: partition.iid(d, 0), ["clients=0", "at least 1"]),
        (lambda d: partition.iid(d, 101), ["clients=101", "(100)"]),
        (lambda d: partition.iid(d, True), ["clients=True"]),
        (lambda d: partition.dirichlet(d, 5, alpha=0.0), ["alpha=0.0", "above 0"]),
        (lambda d: partition.dirichlet(d, 5, alpha=float("nan")), ["alpha=nan"]),
        (lambda d: partition.dirichlet(d, 5, alpha=1.0, min_size=21), ["min_size=21", "at most 20"]),
        (lambda d: partition.dirichlet(d, 10, alpha=0.01, min_size=10), ["min_size=10", "Raise alpha"]),
        (lambda d: partition.dirichlet((d[0], d[0]), 5, alpha=1.0), ["partition.dirichlet", "integer class labels"]),
        (lambda d: partition.shards(d, 60, per_client=2), ["per_client=2", "at most 1"]),
        (lambda d: partition.shards(d, 3, size=7), ["size=7", "divides the 100"]),
        (lambda d: partition.shards(d, 5, size=10, per_client=2), ["size=10", "one of the two"]),
        (lambda d: partition.quantity(d, 5, alpha=-1.0), ["alpha=-1.0"]),
        (lambda d: partition.by_label(d, 5, labels=6), ["labels=6", "(5)"]),
        (lambda d: partition.by_label(d, 2, labels=2), ["labels=2", "at least 3"]),
        (lambda d: partition.by_label(d, 50, labels=5), ["labels=5", "20 examples for 50 clients"]),
        (lambda d: partition.by_group(d, ["a"] * 99), ["99 values", "100 rows"]),
        (lambda d: partition.by_group(d, ["a"] * 99 + [None]), ["1 of 100", "missing"]),
        (lambda d: partition.by_group(d, ["a"] * 100, order="up"), ["order='up'"]),
        (lambda d: partition.iid((d[0], d[1][:50]), 5), ["x has 100", "y has 50"]),
        (lambda d: partition.iid(d, 5, test=1.0), ["test=1.0"]),
        (lambda d: partition.iid((d[0][:0], d[1][:0]), 5), ["empty"]),
    ],
)
def test_impossible_requests_are_refused(make: object, parts: list[str]) -> None:
    with pytest.raises((InvalidArgument, DataError)) as caught:
        make(examples(100))  # pyright: ignore
    for part in parts:
        assert part in str(caught.value), str(caught.value)
