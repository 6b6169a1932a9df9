"""Layouts and selections: where named tensors lie in a flat vector."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.vectors import PIECE, Layout, lengths

shapes = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=5)


def layout(given: list[tuple[int, ...]]) -> Layout:
    return Layout(tuple(f"t{i}" for i in range(len(given))), tuple(given))


LAYOUT = Layout(("body.weight", "body.bias", "head.weight"), ((2, 3), (2,), (1, 2)))


def test_offsets_follow_each_other() -> None:
    assert LAYOUT.offsets == (0, 6, 8, 10) and LAYOUT.size == 10
    assert list(LAYOUT) == [("body.weight", (2, 3), 0, 6), ("body.bias", (2,), 6, 8), ("head.weight", (1, 2), 8, 10)]


def test_views_share_the_vectors_storage() -> None:
    vector = torch.arange(10.0)
    views = LAYOUT.view(vector)
    assert views["body.weight"].tolist() == [[0, 1, 2], [3, 4, 5]] and views["head.weight"].tolist() == [[8, 9]]
    views["body.bias"].fill_(-1)
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, -1, -1, 8, 9]


def test_rows_keep_their_first_axis() -> None:
    views = LAYOUT.view(torch.arange(20.0).reshape(2, 10))
    assert views["body.weight"].shape == (2, 2, 3) and views["head.weight"].tolist() == [[[8, 9]], [[18, 19]]]
    assert LAYOUT.view(torch.zeros(10).expand(5, -1))["body.bias"].shape == (5, 2)


def test_a_number_is_a_tensor_without_axes() -> None:
    scale = Layout(("scale", "bias"), ((), (2,)))
    assert scale.size == 3
    assert scale.view(torch.tensor([5.0, 1.0, 2.0]))["scale"].shape == ()
    assert scale.view(torch.ones(4, 3))["scale"].shape == (4,)


@given(shapes)
def test_flattening_undoes_views(given: list[tuple[int, ...]]) -> None:
    found = layout(given)
    vector = torch.arange(float(found.size))
    assert torch.equal(found.flatten(found.view(vector)), vector)
    assert Layout.of(found.view(vector)) == found
    rows = torch.stack((vector, -vector))
    assert all(torch.equal(t[1], found.view(-vector)[n]) for n, t in found.view(rows).items())


def test_flattening_copies_and_forgets_gradients() -> None:
    weight = torch.ones(2, requires_grad=True)
    flat = Layout(("w",), ((2,),)).flatten({"w": weight})
    flat[0] = 5
    assert weight.tolist() == [1, 1] and not flat.requires_grad


def test_an_empty_layout() -> None:
    nothing = Layout((), ())
    assert nothing.size == 0 and nothing.view(torch.empty(3, 0)) == {} and nothing.flatten({}).shape == (0,)
    assert nothing.flatten({"x": torch.ones(1, dtype=torch.float64)}).dtype == torch.float64


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vector=\(9,\).*of length 10"):
        LAYOUT.view(torch.zeros(9))


def test_patterns_and_masks() -> None:
    assert LAYOUT.matching(["body.*"]) == {"body.weight", "body.bias"}
    assert LAYOUT.matching(["*.bias", "head*"]) == {"body.bias", "head.weight"}
    assert LAYOUT.matching(["Body.*"]) == frozenset() == LAYOUT.matching([])
    assert LAYOUT.mask(["body.bias"]).tolist() == [False] * 6 + [True] * 2 + [False] * 2


@given(shapes, st.data())
def test_taking_and_putting_are_inverse(given: list[tuple[int, ...]], data: Any) -> None:
    whole = layout(given)
    dropped = data.draw(st.sets(st.sampled_from(whole.names)))
    part = whole.without(dropped)
    mask = ~whole.mask(dropped)
    rows = torch.arange(2.0 * whole.size).reshape(2, whole.size)
    taken = part.take(rows)
    assert part.size == taken.shape[1] == int(mask.sum()) and torch.equal(taken, rows[:, mask])
    assert part.layout.names == tuple(n for n in whole.names if n not in dropped)
    put = part.put(taken, torch.full_like(rows, -1.0))
    assert torch.equal(put[:, mask], rows[:, mask]) and bool((put[:, ~mask] == -1).all())
    one = part.put(taken[0], torch.zeros_like(rows))
    assert torch.equal(one[0], one[1]) and torch.equal(one[0][mask], rows[0][mask])
    assert part.everything == (part.size == whole.size)


def test_neighbours_are_taken_in_one_piece() -> None:
    assert LAYOUT.without(["head.weight"]).runs == ((0, 8),)
    assert LAYOUT.without(["body.bias"]).runs == ((0, 6), (8, 10))
    nothing = LAYOUT.without(LAYOUT.names)
    assert nothing.size == 0 and nothing.take(torch.zeros(3, 10)).shape == (3, 0)
    vector = torch.zeros(10)
    assert LAYOUT.without([]).take(vector) is vector


@pytest.mark.parametrize("columns", [0, 1, PIECE, 2 * PIECE, 5 * PIECE + 3, 100_001])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e30])
def test_norms_in_single_precision_are_never_too_small_and_hardly_too_large(columns: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(columns)
    rows = torch.randn(4, columns + 2, generator=draw)[:, 2:] * scale
    rows[1] = 0.1 * scale  # all roundings the same way
    rows[2] = 0.0
    exact, found = torch.linalg.vector_norm(rows.double(), dim=1), lengths(rows)
    assert found.shape == (4, 1) and found.dtype == torch.float64
    assert bool((found[:, 0] >= exact * (1 - 1e-14)).all()) and bool((found[:, 0] <= exact * (1 + 8e-6)).all())


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 3 * PIECE])
def test_norms_of_rows_that_are_not_finite_are_not_either(broken: float, at: int) -> None:
    rows = torch.ones(2, 3 * PIECE + 1)
    rows[1, at] = broken
    assert torch.isfinite(lengths(rows))[:, 0].tolist() == [True, False]


def test_norms_in_double_precision_are_torch_s() -> None:
    rows = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(lengths(rows)[:, 0], torch.linalg.vector_norm(rows, dim=1))
