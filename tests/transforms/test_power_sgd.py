"""PowerSGD: what is decoded is the projection the equations say, and it follows matrices of low rank exactly."""

from typing import Any

import pytest
import torch
from registry import MODELS
from torch import Tensor

from atoll import random
from atoll.algorithms import fedavg
from atoll.errors import CompositionError, InvalidArgument
from atoll.local import local_sgd
from atoll.rounds import Process
from atoll.transforms import error_feedback, plain, power_sgd, quantize, secure_sum
from atoll.transforms.chain import Chain, compose, keys_of
from atoll.transforms.power_sgd import Bases
from atoll.vectors import Aggregate, Layout

LAYOUT = Layout(("bias", "cube", "small", "matrix"), ((5,), (6, 2, 4), (2, 2), (9, 7)))
"""The small matrix would not become smaller."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def through(chain: Chain, state: Any, rows: Tensor) -> Tensor:
    keys = keys_of(0, 0, random.client_keys([f"c{i}" for i in range(len(rows))]), rows.shape[1])
    wire, _ = chain.encode(rows, {}, chain.share(state), keys)
    return chain.decode_each(wire, chain.share(state), rows.shape[1], keys, rows.dtype)


def after(chain: Chain, state: Any, mean: Tensor) -> Any:
    return chain.update(state, Aggregate(mean, mean[:0], 1.0, 1, 1, 0, 1.0))


def chained(rank: int) -> Chain:
    return compose((power_sgd(rank),), plain()).bind(LAYOUT)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_is_decoded_is_the_projection(rank: int) -> None:
    chain, rows = chained(rank), drawn(3, LAYOUT.size + 4)
    state = chain.init(rows.shape[1], LAYOUT.size)
    decoded, bases = through(chain, state, rows), state[0]
    assert isinstance(bases, Bases) and [u.shape[1] for u in bases.left] == [rank, rank]
    for name, place in (("cube", 0), ("matrix", 1)):
        u, q = bases.left[place].double(), bases.right[place].double()
        assert torch.allclose(u.T @ u, torch.eye(rank, dtype=torch.float64), atol=1e-6)
        for row, got in zip(rows, decoded, strict=True):
            m, found = (LAYOUT.view(r[: LAYOUT.size])[name].reshape(len(u), len(q)) for r in (row, got))
            left = torch.eye(len(u), dtype=torch.float64) - u @ u.T
            right = torch.eye(len(q), dtype=torch.float64) - q @ q.T
            torch.testing.assert_close(found, m - left @ m @ right, rtol=0, atol=1e-5)
            assert float((found - m).norm()) <= float(m.norm())
    whole = torch.ones(rows.shape[1], dtype=torch.bool)
    whole[LAYOUT.offsets[1] : LAYOUT.offsets[2]] = whole[LAYOUT.offsets[3] : LAYOUT.offsets[4]] = False
    assert torch.equal(decoded[:, whole], rows[:, whole]), "what is no matrix is sent as it is"


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_numbers_on_the_wire(rank: int) -> None:
    chain = chained(rank)
    length, _ = chain.sizes(LAYOUT.size + 4, LAYOUT.size)[-1]
    assert length == 5 + rank * (6 + 8) + 4 + rank * (9 + 7) + 4
    assert chain.bytes(LAYOUT.size + 4, LAYOUT.size, torch.float32) == 4 * length


def test_matrices_of_the_rank_that_stay_are_exact_from_the_second_round_on() -> None:
    chain = chained(2)
    row = torch.cat(
        (drawn(5), (drawn(6, 2) @ drawn(2, 8, seed=1)).view(-1), drawn(4), (drawn(9, 1) @ drawn(1, 7)).view(-1))
    )
    state = chain.init(len(row), len(row))
    first = through(chain, state, row[None])[0]
    assert float((first - row).norm()) > 0.1
    second = through(chain, after(chain, state, first), row[None])[0]
    torch.testing.assert_close(second, row, rtol=0, atol=1e-5)


def test_the_bases_are_those_of_the_power_method() -> None:
    """A matrix that stays: after k rounds Q spans (M^T M)^k Q, and what is lost goes down to the best there is."""
    chain, m = compose((power_sgd(2),), plain()).bind(Layout(("m",), ((9, 7),))), drawn(9, 7)
    state = chain.init(63, 63)
    q = state[0].right[0].double()
    for _ in range(30):
        decoded = through(chain, state, m.view(1, -1))[0]
        state = after(chain, state, decoded)
        q = torch.linalg.qr(m.T @ (m @ q)).Q
    found = state[0].right[0].double()
    torch.testing.assert_close(found @ found.T, q @ q.T, rtol=0, atol=1e-3)
    left = float((decoded - m.view(-1)).norm())
    # The two-sided projection is at least as good as the best of the rank.
    assert left <= float(torch.linalg.svdvals(m)[2:].norm()) * (1 + 1e-4)


def test_nothing_changed_leaves_the_bases() -> None:
    chain = chained(2)
    state = chain.init(LAYOUT.size, LAYOUT.size)
    same = after(chain, state, torch.zeros(LAYOUT.size))
    assert all(
        torch.equal(a, b) for a, b in zip(state[0].left + state[0].right, same[0].left + same[0].right, strict=True)
    )


def test_a_channel_that_adds_sees_what_the_plain_one_sees() -> None:
    kind = MODELS["perceptron"]
    data = kind.data((4, 3, 5))
    plan = fedavg(local_sgd(0.1, epochs=1, batch_size=2))
    for stage in (power_sgd(1), error_feedback(power_sgd(1))):
        vectors = []
        for channel in ("plain", secure_sum(clip=4.0, weight_cap=8.0, bits=48)):
            process = Process(kind.model(), plan, transforms=(stage,), channel=channel)
            state = process.init()
            for _ in range(4):
                state, _ = process.next(state, data)
            vectors.append(process.vector(state))
        torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=1e-9)


def test_factors_can_be_coded_inside_error_feedback() -> None:
    chain = compose((error_feedback(power_sgd(2), quantize(8)),), plain()).bind(LAYOUT)
    rows, memory, total = drawn(2, LAYOUT.size), {"0/error": torch.zeros(2, LAYOUT.size, dtype=torch.float64)}, 0
    state = chain.init(LAYOUT.size, LAYOUT.size)
    for round in range(12):
        keys = keys_of(0, round, random.client_keys(["a", "b"]), LAYOUT.size)
        wire, memory = chain.encode(rows, memory, chain.share(state), keys)
        got = chain.decode_each(wire, chain.share(state), LAYOUT.size, keys, torch.float64)
        total, state = total + got, after(chain, state, got.mean(0))
    torch.testing.assert_close(total + memory["0/error"], 12 * rows, rtol=0, atol=1e-9)
    assert float(memory["0/error"].norm()) < 4 * float(rows.norm()), "what is owed does not grow with the rounds"


@pytest.mark.parametrize("rank", [0, 1.0, True])
def test_wrong_ranks(rank: Any) -> None:
    with pytest.raises(InvalidArgument, match="rank="):
        power_sgd(rank)


def test_without_a_layout_it_says_who_tells_it() -> None:
    with pytest.raises(CompositionError, match=r"power_sgd needs to know the model's matrices.*chain.bind"):
        compose((power_sgd(2),), plain()).init(10, 10)
