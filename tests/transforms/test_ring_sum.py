"""Sums in a ring of integers: near, never wrapped, and the same bits in any order."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import quadratics, scalar_model
from registry import MODELS

from atoll import aggregators, random
from atoll.algorithms import fedavg, scaffold
from atoll.errors import CompositionError, InvalidArgument
from atoll.local import local_sgd
from atoll.rounds import Process
from atoll.transforms import Channel, clip_norm, ring_sum
from atoll.transforms.base import Codes, Keys
from atoll.transforms.channel import Opened, add, merge


def step(count: int, bits: int) -> float:
    return 2 * count / (2**bits - 2 * count - 2)


def seal(channel: Channel, rows: torch.Tensor, split: int, weights: torch.Tensor, count: int, first: int = 0) -> Codes:
    assert channel.seal is not None
    keys = Keys(0, "channel", 3, random.client_keys([f"c{first + i}" for i in range(len(rows))]))
    return channel.seal(rows, split, weights[:, None], count, keys)


def through(channel: Channel, rows: torch.Tensor, split: int, weights: torch.Tensor) -> Opened:
    assert channel.unseal is not None
    total = add(seal(channel, rows, split, weights, len(rows)))
    return channel.unseal(total, split, len(rows), len(rows))


@settings(max_examples=40)
@given(
    n=st.integers(1, 30),
    bits=st.sampled_from([12, 16, 24, 31, 32, 33, 40, 48]),
    clip=st.floats(1e-3, 1e3),
    cap=st.floats(0.5, 100),
)
def test_sums_are_exact_to_a_step_for_every_client(n: int, bits: int, clip: float, cap: float) -> None:
    draw = torch.Generator().manual_seed(n)
    rows = (torch.rand(n, 6, generator=draw, dtype=torch.float64) * 2 - 1) * clip
    weights = torch.rand(n, generator=draw, dtype=torch.float64) * cap
    opened = through(ring_sum(clip=clip, weight_cap=cap, bits=bits), rows, 4, weights)
    near = n * step(n, bits) * (1 + 1e-9)
    assert float((opened.weighted - (weights[:, None] * rows[:, :4]).sum(0)).abs().max()) <= near * clip * cap
    assert float((opened.sums - rows[:, 4:].sum(0)).abs().max()) <= near * clip
    assert abs(opened.weight - float(weights.sum())) <= near * cap
    assert opened.saturated == 0


@pytest.mark.parametrize("bits", [16, 31, 32, 48])
@pytest.mark.parametrize("n", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_sum_wraps_at_the_extremes(bits: int, n: int, sign: float) -> None:
    rows = torch.full((n, 3), sign * 2.0, dtype=torch.float64)
    opened = through(ring_sum(clip=2.0, weight_cap=5.0, bits=bits), rows, 2, torch.full((n,), 5.0, dtype=torch.float64))
    near = n * step(n, bits) * (1 + 1e-9)
    assert float((opened.weighted - sign * n * 10.0).abs().max()) <= near * 10
    assert float((opened.sums - sign * n * 2.0).abs().max()) <= near * 2
    assert abs(opened.weight - 5.0 * n) <= near * 5


@pytest.mark.parametrize("bits", [16, 32, 40])
def test_a_smaller_cohort_than_announced_opens_the_same(bits: int) -> None:
    """Clients that drop out after sealing leave a sum of the others, on the cohort's grid."""
    channel = ring_sum(clip=1.0, bits=bits)
    rows, weights = torch.full((4, 2), 0.5, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    assert channel.unseal is not None
    opened = channel.unseal(add(seal(channel, rows[:3], 2, weights[:3], 4)), 2, 4, 3)
    assert float((opened.weighted - 1.5).abs().max()) <= 3 * step(4, bits) and abs(opened.weight - 3) <= 3 * step(
        4, bits
    )


@given(order=st.permutations(range(8)), cuts=st.sets(st.integers(1, 7)))
def test_order_and_tiles_do_not_change_a_bit(order: list[int], cuts: set[int]) -> None:
    draw = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(8, 5, generator=draw), torch.rand(8, generator=draw)
    channel = ring_sum(clip=1.0)
    singles = [seal(channel, rows[i : i + 1], 3, weights[i : i + 1], 8, first=i) for i in range(8)]
    expected = add(seal(channel, rows, 3, weights, 8))
    total: Codes | None = None
    bounds = [0, *sorted(cuts), 8]
    for a, b in itertools.pairwise(bounds):
        tile = {n: torch.cat([singles[i][n] for i in order[a:b]]) for n in singles[0]}
        total = add(tile) if total is None else merge(total, add(tile))
    assert total is not None and all(torch.equal(total[n], expected[n]) for n in expected)


def test_whole_rounds_have_the_same_bits_in_any_order() -> None:
    kind = MODELS["perceptron"]
    data = kind.data((3, 5, 1, 4))
    found = []
    for cohort in (["c0", "c1", "c2", "c3"], ["c3", "c1", "c0", "c2"]):
        process = Process(
            kind.model(), scaffold(local_sgd(0.1)), channel=ring_sum(clip=5.0, weight_cap=5.0), engine="loop"
        )
        found.append(process.vector(process.next(process.init(), data, cohort)[0]))
    assert torch.equal(found[0], found[1])


def test_rounding_is_unbiased() -> None:
    channel = ring_sum(clip=1.0, bits=8)
    rows = torch.tensor([[0.3, -0.7, 0.01, 0.0]], dtype=torch.float64).expand(4000, -1)
    sealed = seal(channel, rows, 4, torch.ones(4000, dtype=torch.float64), 8)
    values = sealed["ring"].double()[:, :4]
    values = torch.where(values >= 128, values - 256, values) * step(8, 8)
    assert bool(((values.mean(0) - rows[0]).abs() <= 5 * step(8, 8) / 2 / 4000**0.5).all())


def test_values_beyond_the_range_are_cut_and_counted() -> None:
    rows = torch.tensor([[3.0, -0.5], [-4.0, 9.0], [0.1, 0.2]], dtype=torch.float64)
    opened = through(ring_sum(clip=1.0), rows, 1, torch.ones(3, dtype=torch.float64))
    assert opened.saturated == 3
    assert float(opened.weighted[0]) == pytest.approx(1 - 1 + 0.1, abs=1e-7)
    assert float(opened.sums[0]) == pytest.approx(-0.5 + 1 + 0.2, abs=1e-7)
    process = Process(
        scalar_model(), fedavg(local_sgd(0.5, steps=1, batch_size=None)), channel=ring_sum(clip=0.1, weight_cap=2.0)
    )
    state, metrics = process.next(process.init(), quadratics((1.0, 1.0), (0.1, 9.0)))
    assert metrics["saturated"] == 1.0
    assert float(process.vector(state)) == pytest.approx((0.05 + 0.1) / 2, abs=1e-6)


def test_nothing_is_cut_behind_a_clip_norm() -> None:
    kind = MODELS["perceptron"]
    process = Process(
        kind.model(), fedavg(local_sgd(0.5)), transforms=(clip_norm(0.01),), channel=ring_sum(clip=0.01, weight_cap=9.0)
    )
    _, metrics = process.next(process.init(), kind.data((3, 5, 9)))
    assert metrics["saturated"] == 0.0


def test_weights_beyond_the_cap_are_refused_before_anything_is_summed() -> None:
    process = Process(scalar_model(), fedavg(local_sgd(0.1)), channel=ring_sum(clip=1.0))
    state = process.init()
    with pytest.raises(CompositionError, match=r"weight_cap=1\).* weight of 6.*weights=\"uniform\""):
        process.next(state, quadratics((1.0, 1.0), (0.0, 1.0), sizes=(2, 6)))
    uniform = Process(
        scalar_model(), fedavg(local_sgd(0.1, steps=1, batch_size=None)), channel=ring_sum(clip=1.0),
        aggregator=aggregators.mean(weights="uniform"),
    )  # fmt: skip
    state, _ = uniform.next(uniform.init(), quadratics((1.0, 1.0), (0.0, 1.0), sizes=(2, 6)))
    assert float(uniform.vector(state)) == pytest.approx(0.05, abs=1e-8)


def test_the_mean_is_that_of_the_plain_channel() -> None:
    kind = MODELS["batch norm, mean"]
    data = kind.data((2, 5, 8))
    found = []
    for channel in ("plain", ring_sum(clip=4.0, weight_cap=8.0, bits=48)):
        process = Process(kind.model(), scaffold(local_sgd(0.1, steps=2, batch_size=None)), channel=channel)
        state, _ = process.next(process.init(), data)
        found.append((process.vector(state), state.buffers, state.algorithm.variate))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("bits", "itemsize"), [(8, 4), (32, 4), (33, 8), (48, 8)])
def test_bytes_on_the_wire(bits: int, itemsize: int) -> None:
    sealed = seal(ring_sum(clip=1.0, bits=bits), torch.zeros(2, 5), 3, torch.ones(2), 2)
    assert sealed["ring"].shape == (2, 6) and sealed["ring"].element_size() == itemsize


def test_a_ring_too_small_for_the_cohort_is_refused() -> None:
    with pytest.raises(CompositionError, match=r"ring_sum\(bits=8\) is too small for 100 clients: use bits=24"):
        through(ring_sum(clip=1.0, bits=8), torch.zeros(100, 2), 2, torch.ones(100))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clip": 0.0}, "clip="),
        ({"clip": float("inf")}, "clip="),
        ({"clip": 1.0, "weight_cap": -1.0}, "weight_cap="),
        ({"clip": 1.0, "bits": 7}, "bits="),
        ({"clip": 1.0, "bits": 49}, "bits="),
        ({"clip": 1.0, "bits": 32.0}, "bits="),
    ],
)
def test_arguments_outside_their_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        ring_sum(**options)
