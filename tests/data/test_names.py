"""Names that are not kept as objects, and looking up many at once."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.data import FederatedDataset
from atoll.data.names import Numbered, PackedNames
from atoll.errors import DataError, InvalidArgument

NAMES = ("Zürich", "b", "7", "一", "a b")


def data(clients: object, count: int) -> FederatedDataset:
    fields = {"x": torch.zeros(count, 1), "y": torch.zeros(count, dtype=torch.int64)}
    return FederatedDataset.from_packed(fields, torch.arange(count + 1), clients)  # type: ignore[arg-type]


POPULATIONS = {
    "numbered": data(None, 5),
    "tuple": data(NAMES, 5),
    "packed": data(PackedNames.of(NAMES), 5),
}
populations = pytest.mark.parametrize("kind", POPULATIONS)


def test_packed_names_are_the_names() -> None:
    packed = PackedNames.of(NAMES)
    assert tuple(packed) == NAMES and packed == NAMES and packed == list(NAMES) and packed != NAMES[:4]
    assert packed == PackedNames.of(NAMES) and hash(packed) == hash(PackedNames.of(NAMES))
    assert packed != PackedNames.of(("Zürich", "b", "7", "一", "a c"))
    assert packed[-1] == "a b" and packed[1:3] == ("b", "7") and packed[3] == "一"
    assert packed.take(np.array([3, 0])) == ("一", "Zürich") and "Zürich" in repr(packed)
    with pytest.raises(IndexError):
        packed[5]


@pytest.mark.parametrize("offsets", [[], [0, 1], [1, 3], [0, 0, 3], [0, 2, 1, 3]])
def test_offsets_that_do_not_cut_the_text_are_refused(offsets: list[int]) -> None:
    with pytest.raises(DataError, match="names of clients"):
        PackedNames(np.frombuffer(b"abc", dtype=np.uint8), np.array(offsets, dtype=np.int64))


@given(st.integers(1, 2000), st.data())
def test_numbers_are_found_together_as_one_by_one(count: int, draw: st.DataObject) -> None:
    names = Numbered(count)
    asked = draw.draw(st.lists(st.one_of(st.integers(0, 2 * count).map(str), st.text("0123+- _٣", max_size=4))))
    alone = [names.find(name) for name in asked]
    together = names.places(asked)
    if None in alone:
        assert together is None
    else:
        assert together is not None and together.tolist() == alone


@pytest.mark.parametrize("name", ["007", " 7", "+7", "7 ", "1_0", "-1", "٣", "5", "9" * 5000, "", "a", 3, None, [1]])
@populations
def test_strangers_are_refused_by_name(kind: str, name: object) -> None:
    asked = POPULATIONS[kind].clients
    with pytest.raises(InvalidArgument, match="must be one of the 5 clients"):
        POPULATIONS[kind].places([asked[2], name])  # type: ignore[list-item]


@populations
def test_places_are_those_of_the_index(kind: str) -> None:
    population = POPULATIONS[kind]
    asked = [population.clients[i] for i in (4, 0, 2)]
    found = population.places(asked)
    assert found.tolist() == [population.index(name) for name in asked] == [4, 0, 2] and found.dtype == np.int64
    assert population.places(population.clients).tolist() == [0, 1, 2, 3, 4]
    assert population.places([]).tolist() == []
    with pytest.raises(InvalidArgument, match="appears more than once"):
        population.places([asked[0], asked[1], asked[0]])
    with pytest.raises(InvalidArgument, match="a sequence of client names"):
        population.places("12")


def test_a_cohort_of_a_million_is_found_in_milliseconds() -> None:
    population = data(None, 1_000_000)
    cohort = population.clients.take(np.random.default_rng(0).choice(1_000_000, 10_000, replace=False))  # type: ignore[attr-defined]
    taken: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        found = population.places(cohort)
        taken.append(time.perf_counter() - began)
    assert tuple(map(str, found.tolist())) == cohort
    assert min(taken) < 0.05, "ten times what it takes on an idle machine"
