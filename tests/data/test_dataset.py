"""The packed dataset: readers, views, cuts, identity and the errors users meet."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from atoll.data import FederatedDataset, Split
from atoll.data.names import Numbered
from atoll.errors import DataError, InvalidArgument


def client(n: int, start: int = 0, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    x = np.arange(start, start + 2 * n, dtype=np.float64).reshape(n, 2)
    return x, np.arange(n) % classes


def two(**options: object) -> FederatedDataset:
    return FederatedDataset.from_arrays({"a": client(10), "b": client(6, 100)}, **options)


# --- reading --------------------------------------------------------------------------------------------------------


def test_arrays_are_packed_in_order() -> None:
    data = two(name="two", features=["u", "v"])
    assert tuple(data.clients) == ("a", "b") and len(data) == 2 and list(data) == ["a", "b"]
    assert data.train.offsets.tolist() == [0, 10, 16] and data.train.sizes.tolist() == [10, 6] and len(data.train) == 16
    assert data.train.fields["x"].dtype == torch.float32 and data.train.fields["y"].dtype == torch.int64
    assert torch.equal(data["b"].train["x"], torch.arange(100.0, 112.0).reshape(6, 2))
    assert data["a"].test is None and data["a"].validation is None
    assert "a" in data and "c" not in data and data.index("b") == 1
    assert repr(data) == "FederatedDataset('two', clients=2, train=16)"


def test_a_client_is_a_view() -> None:
    data = two()
    view = data["b"].train["x"]
    assert view.untyped_storage().data_ptr() == data.train.fields["x"].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("y", "dtype"),
    [
        ([True, False], torch.int64),
        (np.array([1, 2], dtype=np.int8), torch.int64),
        ([0.5, 1.5], torch.float32),
        (np.array([0.5, 1.5], dtype=np.float16), torch.float16),
        (torch.tensor([0.5, 1.5], dtype=torch.float64), torch.float64),
        (torch.tensor([True, False]), torch.int64),
    ],
)
def test_dtypes_of_targets(y: object, dtype: torch.dtype) -> None:
    assert FederatedDataset.from_arrays({"a": ([[1.0], [2.0]], y)}).train.fields["y"].dtype == dtype


def test_dtypes_of_inputs() -> None:
    def stored(x: object) -> torch.dtype:
        return FederatedDataset.from_arrays({"a": (x, [0, 1])}).train.fields["x"].dtype

    assert stored(torch.zeros(2, 3, dtype=torch.float64)) == torch.float64
    assert stored(np.zeros((2, 3), dtype=np.uint8)) == torch.uint8
    assert stored(np.zeros((2, 3), dtype=np.int32)) == torch.int64
    assert stored([[0.0], [1.0]]) == torch.float32


def test_named_fields_and_scalar_examples() -> None:
    data = FederatedDataset.from_arrays({"a": {"tokens": [[1, 2], [3, 4]], "mask": np.ones((2, 2), bool), "y": [0, 1]}})
    assert data["a"].train["mask"].dtype == torch.bool and data["a"].train["tokens"].dtype == torch.int64


def test_given_test_and_holdout() -> None:
    data = two(test={"b": client(3)}, holdout=client(4))
    assert data.test is not None and data.test.sizes.tolist() == [0, 3]
    assert data["a"].test is not None and len(data["a"].test["x"]) == 0
    assert data.holdout is not None and len(data.holdout["y"]) == 4


def test_test_examples_and_a_validation_fraction() -> None:
    data = two(test={"b": client(3)}, validation=0.5)
    assert data.test is not None and data.test.sizes.tolist() == [0, 3]
    assert (
        data.validation is not None and data.validation.sizes.tolist() == [5, 3] and data.train.sizes.tolist() == [5, 3]
    )


def test_from_packed_names_clients_by_number() -> None:
    data = FederatedDataset.from_packed({"x": np.zeros((5, 1)), "y": np.zeros(5, int)}, [0, 2, 5], test=0.5)
    assert list(data.clients) == ["0", "1"] and data.test is not None and data.test.sizes.tolist() == [1, 2]
    assert isinstance(data.clients, Numbered)


class Pairs(Dataset):
    def __init__(self, n: int, form: str) -> None:
        self.n, self.form = n, form

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> object:
        x, y = torch.full((3,), float(index)), index % 2
        return (x, y) if self.form == "pair" else {"x": x, "y": y, "id": index}


def test_from_torch() -> None:
    data = FederatedDataset.from_torch(
        {"a": Pairs(4, "pair"), "b": TensorDataset(torch.zeros(2, 3), torch.ones(2).long())}
    )
    assert data.train.sizes.tolist() == [4, 2] and data["a"].train["x"][3].tolist() == [3.0, 3.0, 3.0]
    named = FederatedDataset.from_torch({"a": Pairs(4, "mapping")}, test=0.25)
    assert set(named.train.fields) == {"x", "y", "id"} and named.test is not None and len(named.test) == 1


# --- many clients ---------------------------------------------------------------------------------------------------


def test_a_million_clients_are_a_few_tensors() -> None:
    n = 1_000_000
    data = FederatedDataset.from_packed(
        {"x": torch.zeros(n, 1), "y": torch.zeros(n, dtype=torch.int64)}, torch.arange(n + 1)
    )
    assert len(data.clients) == n and data.clients[-1] == "999999" and data.index("777") == 777
    assert "1000000" not in data and "007" not in data and data.clients[1:3] == ("1", "2")
    assert data["5"].train["x"].shape == (1, 1)
    assert not any(
        isinstance(getattr(data, slot, None), (dict, list, tuple)) and len(getattr(data, slot)) > 10
        for slot in data.__slots__
    )


def test_numbered_names_equal_their_list() -> None:
    assert Numbered(3) == ["0", "1", "2"] and Numbered(3) == Numbered(3) and Numbered(3) != Numbered(4)
    assert hash(Numbered(3)) == hash(Numbered(3)) and Numbered(3).index("2") == 2


# --- deriving -------------------------------------------------------------------------------------------------------


def test_select_gathers_in_the_order_given() -> None:
    data = FederatedDataset.from_arrays(
        {name: client(n, 100 * n) for name, n in (("a", 3), ("b", 5), ("c", 2))}, test=0.4
    )
    chosen = data.select(["c", "a"])
    for name in ("c", "a"):
        assert torch.equal(chosen[name].train["x"], data[name].train["x"])
        assert torch.equal(chosen[name].test["y"], data[name].test["y"])
    with pytest.raises(InvalidArgument, match="all different"):
        data.select(["a", "a"])
    with pytest.raises(InvalidArgument, match="at least one"):
        data.select([])


def test_pooled_shares_the_tensors() -> None:
    data = two(test=0.5, holdout=client(2))
    pooled = data.pooled()
    assert tuple(pooled.clients) == ("pooled",) and pooled.train.fields["x"] is data.train.fields["x"]
    assert pooled.test is not None and pooled.test.offsets.tolist() == [0, 8] and pooled.holdout is data.holdout


def test_to_device_keeps_offsets_and_identity() -> None:
    data = two(test=0.5)
    data.fingerprint()
    moved = data.to("cpu")
    assert moved.fingerprint() == data.fingerprint() and moved.train.offsets.device.type == "cpu"


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    test=st.floats(0, 0.7),
    validation=st.floats(0, 0.29),
    seed=st.integers(0, 5),
    stratify=st.booleans(),
)
def test_the_cut_loses_and_doubles_nothing(
    sizes: list[int], test: float, validation: float, seed: int, stratify: bool
) -> None:
    total = sum(sizes)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    data = FederatedDataset.from_packed({"x": torch.arange(total).double(), "y": torch.arange(total) % 3}, offsets)
    parts = data.split(test=test, validation=validation, seed=seed, stratify=stratify)
    assert int(parts.train.sizes.min()) >= 1
    for place, n in enumerate(sizes):
        held = [parts.train.client(place)["x"]]
        for split, fraction in ((parts.test, test), (parts.validation, validation)):
            if split is not None:
                held.append(split.client(place)["x"])
                assert len(held[-1]) <= int(np.floor(n * fraction + 0.5))
        assert sorted(torch.cat(held).tolist()) == list(range(offsets[place], offsets[place + 1]))


def test_a_clients_cut_does_not_depend_on_the_others() -> None:
    both = FederatedDataset.from_arrays({"a": client(20), "b": client(500, 1000)}, test=0.3, validation=0.2, seed=7)
    alone = FederatedDataset.from_arrays({"b": client(500, 1000)}, test=0.3, validation=0.2, seed=7)
    for label in ("train", "validation", "test"):
        assert torch.equal(getattr(both["b"], label)["x"], getattr(alone["b"], label)["x"])
    other = FederatedDataset.from_arrays({"b": client(500, 1000)}, test=0.3, validation=0.2, seed=8)
    assert not torch.equal(alone["b"].test["x"], other["b"].test["x"])


def test_a_stratified_cut_keeps_the_label_shares() -> None:
    y = np.repeat([0, 1, 2], [70, 20, 10])
    data = FederatedDataset.from_arrays(
        {"a": (np.arange(100.0), y), "b": (np.arange(100.0), y)}, test=0.3, validation=0.1, stratify=True
    )
    for name in data:
        assert np.abs(torch.bincount(data[name].test["y"]).numpy() - [21, 6, 3]).max() <= 1
        assert np.abs(torch.bincount(data[name].validation["y"], minlength=3).numpy() - [7, 2, 1]).max() <= 1
    assert not torch.equal(data["a"].test["x"], data["b"].test["x"])


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.lists(st.integers(-3, 6), min_size=1, max_size=25), min_size=1, max_size=5),
    test=st.floats(0, 0.6),
    validation=st.floats(0, 0.39),
    stratify=st.booleans(),
)
def test_a_cut_keeps_groups_together(groups: list[list[int]], test: float, validation: float, stratify: bool) -> None:
    """Numbers may come in any order and again at other clients; fractions are of a client's groups."""
    numbers = [torch.tensor(own) for own in groups]
    whole = FederatedDataset.from_arrays(
        {str(i): {"x": torch.arange(len(n)), "y": n % 2, "cut_group": n} for i, n in enumerate(numbers)}
    )
    parts = whole.split(test=test, validation=validation, seed=3, stratify=stratify)
    for name, own in zip(whole.clients, numbers, strict=True):
        held = [s.client(int(name)) for s in (parts.train, parts.validation, parts.test) if s is not None]
        assert sorted(torch.cat([h["x"] for h in held]).tolist()) == list(range(len(own))), "nothing lost or doubled"
        sets = [set(h["cut_group"].tolist()) for h in held]
        assert sum(map(len, sets)) == len(set.union(*sets)) == len(own.unique()), "no group on two sides"
        assert sets[0]
        for split, fraction in ((parts.validation, validation), (parts.test, test)):
            if split is not None:
                here = set(split.client(int(name))["cut_group"].tolist())
                assert len(here) <= int(np.floor(len(own.unique()) * fraction + 0.5))


def test_a_clients_groups_are_cut_without_looking_at_the_others() -> None:
    def owned(n: int, first: int) -> dict[str, torch.Tensor]:
        return {"x": torch.arange(n), "y": torch.zeros(n).long(), "cut_group": first + torch.arange(n) // 4}

    both = FederatedDataset.from_arrays({"a": owned(40, 0), "b": owned(80, 100)}, test=0.25, validation=0.25)
    alone = FederatedDataset.from_arrays({"b": owned(80, 7)}, test=0.25, validation=0.25)
    for label in ("train", "validation", "test"):
        assert torch.equal(getattr(both["b"], label)["x"], getattr(alone["b"], label)["x"])
    assert len(both["b"].test["x"]) == len(both["b"].validation["x"]) == 20
    with pytest.raises(DataError, match=r"'cut_group' is torch.float32.*one integer per example"):
        FederatedDataset.from_arrays({"a": owned(8, 0) | {"cut_group": torch.rand(8)}}, test=0.5)


def test_the_cut_is_uniform() -> None:
    n, clients = 10, 4000
    data = FederatedDataset.from_packed(
        {"x": torch.arange(n).repeat(clients), "y": torch.zeros(n * clients).long()}, torch.arange(clients + 1) * n
    )
    tested = data.split(test=0.3).test
    assert tested is not None
    shares = torch.bincount(tested.fields["x"], minlength=n) / clients
    assert float((shares - 0.3).abs().max()) < 5 * (0.3 * 0.7 / clients) ** 0.5


# --- identity and description ---------------------------------------------------------------------------------------


def test_the_fingerprint_covers_names_offsets_and_contents() -> None:
    base = {"a": client(4), "b": client(4, 50)}
    prints = {
        FederatedDataset.from_arrays(base).fingerprint(),
        FederatedDataset.from_arrays({"a": base["a"], "c": base["b"]}).fingerprint(),
        FederatedDataset.from_arrays(base, test=0.25).fingerprint(),
        FederatedDataset.from_arrays(base, holdout=client(1)).fingerprint(),
        FederatedDataset.from_arrays({"a": client(4), "b": client(4, 51)}).fingerprint(),
        FederatedDataset.from_arrays({"a": client(5), "b": client(3, 50)}).fingerprint(),
    }
    assert len(prints) == 6
    assert FederatedDataset.from_arrays(base).fingerprint() == FederatedDataset.from_arrays(base).fingerprint()


def test_describe_counts_classes() -> None:
    frame = two(test=0.5, stratify=True).describe()
    assert list(frame.columns) == ["client", "train", "validation", "test", "class 0", "class 1", "class 2"]
    assert (
        frame["train"].tolist() == [5, 3]
        and frame["test"].tolist() == [5, 3]
        and frame["validation"].tolist() == [0, 0]
    )
    assert (frame[["class 0", "class 1", "class 2"]].sum(axis=1) == frame["train"]).all()


def test_describe_means_of_a_numeric_target() -> None:
    data = FederatedDataset.from_arrays({"a": ([1.0, 2.0], [1.0, 3.0]), "b": ([1.0], [5.0])})
    assert data.describe()["target mean"].tolist() == [2.0, 5.0]


def test_describe_many_classes() -> None:
    data = FederatedDataset.from_arrays({"a": (np.zeros(80), np.arange(80)), "b": (np.zeros(2), [0, 1])})
    assert data.describe()["classes"].tolist() == [80, 2]


@pytest.mark.parametrize("clients", [4, 60])
def test_plot(tmp_path: object, clients: int) -> None:
    data = FederatedDataset.from_arrays({f"c{i}": client(3 + i % 5) for i in range(clients)}, name="demo")
    path = tmp_path / "labels.png"  # pyright: ignore
    figure = data.plot(path)
    assert path.stat().st_size > 5000 and "demo" in figure.axes[0].get_title(loc="left")
    FederatedDataset.from_arrays({"a": ([1.0], [0.5])}).plot()


# --- errors ---------------------------------------------------------------------------------------------------------

X, Y = client(4)
BAD = X.copy()
BAD[2, 1] = np.nan


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (lambda: FederatedDataset.from_arrays({}), ["clients is empty"]),
        (lambda: FederatedDataset.from_arrays({"a": (X, Y[:3])}), ["'a'", "x has 4", "y has 3"]),
        (
            lambda: FederatedDataset.from_arrays({"a": (X, Y), "b": (X[:0], Y[:0])}),
            ["client 'b' has no training", "leave"],
        ),
        (
            lambda: FederatedDataset.from_arrays({"a": (X, Y), "b": (BAD, Y)}, features=["age", "chol"]),
            ["'b'", "'chol'", "NaN", "mpute"],
        ),
        (lambda: FederatedDataset.from_arrays({"a": (X, Y)}, holdout=(BAD, Y)), ["holdout", "NaN"]),
        (lambda: FederatedDataset.from_arrays({"a": (X, Y)}, test={"a": (BAD, Y)}), ["test", "'a'"]),
        (lambda: FederatedDataset.from_arrays({"a": (X, Y), "b": (X[:, :1], Y)}), ["'b'", "'x'", "[n, 1]", "[n, 2]"]),
        (lambda: FederatedDataset.from_arrays({"a": (X, Y), "b": (X, Y * 0.5)}), ["'b'", "'y'", "float32", "int64"]),
        (lambda: FederatedDataset.from_arrays({"a": (X, Y), "b": {"x": X}}), ["'b'", "['x']", "['x', 'y']"]),
        (lambda: FederatedDataset.from_arrays({"a": (X, ["u", "v", "u", "v"])}), ["'a'", "'y'", "from_frame"]),
        (
            lambda: FederatedDataset.from_arrays({"a": ([[1.0], [1.0, 2.0]], [0, 1])}),
            ["'a'", "'x'", "different shapes"],
        ),
        (lambda: FederatedDataset.from_arrays({"a": (1.0, 2.0)}), ["'a'", "single number"]),
        (lambda: FederatedDataset.from_arrays({"a": [X, Y]}), ["'a'", "tuple (x, y)"]),
        (lambda: FederatedDataset.from_arrays([(X, Y)]), ["clients='list'", "mapping"]),
        (lambda: FederatedDataset.from_arrays({1: (X, Y)}), ["client=1", "string"]),
        (
            lambda: FederatedDataset.from_arrays({"ana": (X, Y)}, test={"anna": (X, Y)}),
            ["'anna'", "Did you mean 'ana'"],
        ),
        (lambda: FederatedDataset.from_arrays({"a": (X, Y)}, test=1.5), ["test=1.5", "[0, 1)"]),
        (lambda: FederatedDataset.from_arrays({"a": (X, Y)}, test=0.6, validation=0.5), ["test + validation=1.1"]),
        (
            lambda: FederatedDataset.from_arrays({"a": (X, X)}, test=0.5, stratify=True),
            ["stratify=True", "integer class"],
        ),
        (lambda: two(test=0.2).split(test=0.2), ["test=0.2", "already"]),
        (lambda: two()["anna"], ["client='anna'", "'a', 'b'"]),
        (lambda: FederatedDataset.from_packed({"x": X, "y": Y}, [0, 3]), ["offsets=(0, 3)", "4"]),
        (lambda: FederatedDataset.from_packed({"x": X, "y": Y}, [0, 3, 2, 4]), ["never decreasing", "client 1"]),
        (lambda: FederatedDataset.from_packed({"x": X, "y": Y}, [0, 2, 4], ["a", "a"]), ["'a' appears more than once"]),
        (lambda: FederatedDataset.from_packed({"x": X, "y": Y}, [0, 2, 4], ["a"]), ["2 clients", "1 names"]),
        (lambda: FederatedDataset.from_packed({}, [0]), ["empty"]),
        (lambda: FederatedDataset.from_torch({"a": iter(())}), ["'a'", "map-style"]),
        (lambda: FederatedDataset.from_torch({"a": []}), ["'a'", "empty"]),
        (lambda: Split({"x": torch.zeros(2)}, torch.tensor([0, 2])).client(1), ["index=1"]),
    ],
)
def test_bad_input_is_named(build: object, parts: list[str]) -> None:
    with pytest.raises((DataError, InvalidArgument)) as caught:
        build()  # pyright: ignore
    for part in parts:
        assert re.search(re.escape(part), str(caught.value)), (part, str(caught.value))


def test_one_example_is_fine() -> None:
    data = FederatedDataset.from_arrays({"a": ([[1.0]], [0])}, test=0.5)
    assert data.train.sizes.tolist() == [1] and data.test is not None and len(data.test) == 0


def test_infinities_that_cancel_are_found_and_large_sums_are_fine() -> None:
    with pytest.raises(DataError, match="infinite"):
        FederatedDataset.from_arrays({"a": ([[np.inf], [-np.inf]], [0, 1])})
    FederatedDataset.from_arrays({"a": ([[3e38], [3e38]], [0, 1])})
