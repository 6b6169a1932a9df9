"""Populations drawn cohort by cohort: the same examples as packed data, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll import random
from atoll.data import FederatedDataset, LazyDataset, Split
from atoll.data import lazy as lazy_module
from atoll.errors import DataError, InvalidArgument

COUNT = 40
NAMES = tuple(f"c{i}" for i in range(COUNT))


def load(client: str) -> tuple[np.ndarray, np.ndarray]:
    rng = random.numpy_generator(5, "lazy", client)
    n = int(rng.integers(1, 9))
    return rng.normal(size=(n, 3)), rng.integers(0, 4, size=n)


def lazy(**options: Any) -> LazyDataset:
    return FederatedDataset.from_source(NAMES, load, **options)


def packed(**options: Any) -> FederatedDataset:
    return FederatedDataset.from_arrays({name: load(name) for name in NAMES}, **options)


def same(a: Split | None, b: Split | None) -> None:
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        assert torch.equal(a.offsets, b.offsets) and list(a.fields) == list(b.fields)
        assert all(torch.equal(tensor, b.fields[name]) for name, tensor in a.fields.items())


@pytest.mark.parametrize("cut", [{}, {"test": 0.3}, {"test": 0.3, "validation": 0.2, "seed": 4, "stratify": True}])
def test_a_draw_is_a_selection_of_the_packed_data(cut: dict[str, Any]) -> None:
    data, whole = lazy(holdout=load("nobody"), **cut), packed(holdout=load("nobody"), **cut)
    for cohort in (["c7", "c0", "c33"], NAMES, ["c5"]):
        drawn, expected = data.draw(cohort), whole.select(cohort)
        assert drawn.clients == tuple(cohort)
        for label in ("train", "validation", "test"):
            same(getattr(drawn, label), getattr(expected, label))
            assert data.has(label) == whole.has(label)
        assert drawn.holdout is data.holdout and drawn.holdout is not None
    assert torch.equal(data["c3"].train["x"], whole["c3"].train["x"])
    assert data.sizes.tolist() == [len(load(name)[1]) for name in NAMES]


def test_names_and_numbers() -> None:
    data = lazy(name="made", test=0.2)
    assert len(data) == COUNT and list(data) == list(NAMES) and "c3" in data and "x" not in data
    assert data.index("c3") == 3 and data.places(["c3", "c1"]).tolist() == [3, 1]
    assert repr(data) == "LazyDataset('made', clients=40, with test)"
    numbered = FederatedDataset.from_source(1_000_000_000 // 1000, load)
    assert numbered.draw(["999999"]).clients == ("999999",) and "1000000" not in numbered
    with pytest.raises(InvalidArgument, match="one of the 40 clients"):
        data.draw(["c3", "x"])
    with pytest.raises(InvalidArgument, match="more than once"):
        data.draw(["c3", "c3"])
    with pytest.raises(InvalidArgument, match="clients='c3'"):
        data.draw("c3")


def test_only_the_cohort_is_loaded() -> None:
    asked: list[str] = []

    def watched(client: str) -> Any:
        asked.append(client)
        return load(client)

    data = FederatedDataset.from_source(NAMES, watched)
    assert asked == ["c0"]
    asked.clear()
    data.draw(["c9", "c2"])
    assert asked == ["c9", "c2"]
    asked.clear()
    sample = data.sample()
    assert sample is data.sample() and asked == list(sample.clients)
    assert len(asked) == lazy_module.SAMPLE and asked[0] == "c0" and asked[-1] == "c39"


def test_an_empty_cohort_is_a_dataset_of_nobody() -> None:
    drawn = lazy(test=0.2).draw([])
    assert len(drawn) == 0 and len(drawn.train) == 0 and drawn.train.fields["x"].shape == (0, 3)
    assert drawn.test is not None and drawn.validation is None and drawn.train.offsets.tolist() == [0]


def test_given_splits_are_selected() -> None:
    given = packed(test=0.5).test
    assert given is not None
    data = lazy(test=given, validation=0.2)
    drawn = data.draw(["c4", "c1"])
    same(drawn.test, given.take(torch.tensor([4, 1])))
    assert drawn.validation is not None and data.has("validation") and data.test is given
    ((names, part),) = data.chunks("test")
    assert names is data.clients and part is given


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_chunks_are_everybody_in_order(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_module, "CHUNK", 7)
    cut = {"test": 0.3, "validation": 0.2}
    expected = getattr(packed(**cut), split)
    pieces = list(lazy(**cut).chunks(split))
    assert [len(names) for names, _ in pieces] == [7] * 5 + [5]
    assert tuple(name for names, _ in pieces for name in names) == NAMES
    assert torch.equal(torch.cat([part.sizes for _, part in pieces]), expected.sizes)
    for field, tensor in expected.fields.items():
        assert torch.equal(torch.cat([part.fields[field] for _, part in pieces]), tensor)
    with pytest.raises(InvalidArgument, match="split='test'"):
        next(lazy().chunks("test"))


def test_saving_draws_everybody_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_module, "CHUNK", 7)
    options: dict[str, Any] = {"test": 0.3, "holdout": load("nobody"), "name": "made", "features": ("a", "b", "c")}
    lazy(**options).save(tmp_path / "data")
    opened, expected = FederatedDataset.open(tmp_path / "data"), packed(**options)
    same(opened.train, expected.train)
    same(opened.test, expected.test)
    assert opened.fingerprint() == expected.fingerprint() and opened.name == "made"
    opened.verify()


def test_a_population_is_not_pooled() -> None:
    with pytest.raises(DataError, match=r"40 clients.*save\(directory\)"):
        lazy().pooled()


def test_the_fingerprint_tells_populations_apart() -> None:
    def other(client: str) -> Any:
        x, y = load(client)
        return x + 1, y

    def few(client: str) -> Any:
        return load("c1")

    prints = [
        data.fingerprint()
        for data in (
            lazy(),
            lazy(version="2"),
            lazy(test=0.2),
            lazy(test=0.2, seed=1),
            lazy(holdout=load("nobody")),
            lazy(test=packed(test=0.5).test),
            FederatedDataset.from_source(NAMES, other),
            FederatedDataset.from_source(NAMES[:-1], load),
            FederatedDataset.from_source((NAMES[1], NAMES[0], *NAMES[2:]), load),
            FederatedDataset.from_source(NAMES, few),
            FederatedDataset.from_source(COUNT, few),
        )
    ]
    assert len(set(prints)) == len(prints)
    assert lazy().fingerprint() == lazy().fingerprint() == lazy(seed=3).fingerprint()
    data = lazy()
    before = data.fingerprint()
    data.draw(NAMES)
    assert FederatedDataset.from_source(NAMES, load).fingerprint() == before


# --- bad input ------------------------------------------------------------------------------------------------------


def once(first: Any, later: Any) -> Callable[[str], Any]:
    """Gives the first client something else."""
    return lambda client: first if client == "c0" else later


X, Y = np.zeros((2, 3)), np.zeros(2, dtype=int)
NARROW = FederatedDataset.from_source(NAMES, lambda client: (X[:, :1], Y))


@pytest.mark.parametrize(
    ("later", "parts"),
    [
        ((X[:, :2], Y), ["load('c1'), field 'x'", "[n, 2]", "load('c0')", "[n, 3]"]),
        ((X, Y + 0.5), ["load('c1'), field 'y'", "float32", "int64"]),
        ({"x": X}, ["load('c1')", "['x']", "['x', 'y']"]),
        ((X, Y[:1]), ["load('c1')", "x has 2", "y has 1"]),
        ([X, Y], ["load('c1')", "tuple (x, y)"]),
        ((X[:0], Y[:0]), ["client 'c1' has no examples", "leave"]),
        ((X * np.nan, Y), ["client 'c1'", "field 'x'", "NaN"]),
    ],
)
def test_what_differs_from_the_first_client_is_refused(later: Any, parts: list[str]) -> None:
    data = FederatedDataset.from_source(NAMES, once((X, Y), later))
    with pytest.raises(DataError) as caught:
        data.draw(["c1"])
    for part in parts:
        assert part in str(caught.value)


def test_a_client_that_changes_its_number_of_examples_is_refused() -> None:
    calls: list[str] = []

    def growing(client: str) -> Any:
        calls.append(client)
        return np.zeros((len(calls), 3)), np.zeros(len(calls), dtype=int)

    data = FederatedDataset.from_source(NAMES, growing)
    with pytest.raises(DataError, match=r"client 'c0' has 2 examples, but 1 were.*seed random numbers"):
        data.draw(["c0"])


def test_sizes_are_checked() -> None:
    sizes = [len(load(name)[1]) for name in NAMES]
    assert lazy(sizes=sizes).draw(["c4"]).train.sizes.tolist() == [sizes[4]]
    with pytest.raises(DataError, match=r"client 'c4' has \d examples, but \d were promised by sizes="):
        lazy(sizes=[*sizes[:4], sizes[4] + 1, *sizes[5:]]).draw(["c3", "c4"])
    for wrong in (sizes[1:], [0, *sizes[1:]], [1.5] * COUNT):
        with pytest.raises(InvalidArgument, match="sizes="):
            lazy(sizes=wrong)


def test_the_callers_sizes_are_left_alone() -> None:
    sizes = np.array([len(load(name)[1]) for name in NAMES])
    sizes.flags.writeable = False
    lazy(sizes=sizes).draw(NAMES)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FederatedDataset.from_source([], load), "clients="),
        (lambda: FederatedDataset.from_source(0, load), "clients=0"),
        (lambda: FederatedDataset.from_source(True, load), "clients=True"),
        (lambda: FederatedDataset.from_source("abc", load), "clients='abc'"),
        (lambda: FederatedDataset.from_source(["a", "b", "a"], load), "'a' appears more than once"),
        (lambda: FederatedDataset.from_source(["a", ""], load), "client=''"),
        (lambda: FederatedDataset.from_source(NAMES, 3), "load=3"),
        (lambda: lazy(test=1.0), "test=1.0"),
        (lambda: lazy(holdout=(X[:, :2], Y)), "holdout, field 'x'"),
        (lambda: lazy(holdout=(X / 0, Y)), "holdout.*NaN"),
        (lambda: lazy(test=Split({"x": torch.zeros(1, 3), "y": torch.zeros(1).long()}, torch.tensor([0, 1]))), "test"),
        (
            lambda: lazy(
                test=FederatedDataset.from_source(NAMES, once((X[:, :1], Y), (X[:, :1], Y))).draw(NAMES).train
            ),
            "'x'",
        ),
    ],
)
def test_bad_arguments_are_refused(build: Callable[[], object], message: str) -> None:
    with np.errstate(all="ignore"), pytest.raises((DataError, InvalidArgument), match=message):
        build()
