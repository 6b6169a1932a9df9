"""Quantisation: unbiased, bounded in error, and as small on the wire as it says."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import quadratics, scalar_model
from registry import MODELS

from atoll import random
from atoll.algorithms import fedavg, local_only
from atoll.errors import InvalidArgument
from atoll.local import local_sgd
from atoll.rounds import Process
from atoll.transforms import quantize
from atoll.transforms.base import Keys
from atoll.transforms.packing import PIECE, pack, unpack, unpack_values


def send(rows: torch.Tensor, bits: int, *, seed: int = 0, round: int = 0, first: int = 0) -> tuple[torch.Tensor, Any]:
    stage = quantize(bits)
    keys = Keys(seed, "transforms/0", round, random.client_keys([f"c{first + i}" for i in range(len(rows))]))
    codes, _ = stage.encode(rows, {}, None, keys)
    assert stage.decode_each is not None
    return stage.decode_each(codes, None, rows.shape[1], keys), codes  # type: ignore[arg-type]


@given(bits=st.integers(1, 16), length=st.integers(1, 40), clients=st.integers(1, 3), data=st.data())
def test_packing_is_undone(bits: int, length: int, clients: int, data: Any) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=clients * length, max_size=clients * length))
    codes = torch.tensor(values).reshape(clients, length)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (clients, -(-length * bits // 8))
    assert torch.equal(unpack(packed, bits, length).to(codes), codes)


@pytest.mark.parametrize("bits", range(1, 17))
def test_the_extremes_of_every_width_are_packed(bits: int) -> None:
    codes = torch.tensor([[0, 2**bits - 1, 0, 2**bits - 1, 2 ** (bits - 1)]])
    assert torch.equal(unpack(pack(codes, bits), bits, 5).to(codes), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8, 12])
def test_long_rows_are_packed_piece_by_piece_like_short_ones(bits: int) -> None:
    length = 2 * PIECE + 77
    codes = torch.randint(2**bits, (2, length), generator=torch.Generator().manual_seed(0))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, length).to(codes), codes)
    levels = torch.arange(2**bits, dtype=torch.float64) - 5
    assert torch.equal(unpack_values(packed, bits, length, levels), codes - 5.0)
    row = torch.linspace(-1, 1, length)[None]
    assert float((send(row, bits)[0] - row).abs().max()) <= 2 / (2**bits - 1) * (1 + 1e-6)
    drawn = Keys(0, "s", 0, random.client_keys(["a", "b"]))
    assert torch.equal(drawn.uniform("u", 100, 256), drawn.uniform("u", 400)[:, 256:356])
    assert torch.equal(drawn.signs("u", 100, 256), drawn.signs("u", 400)[:, 256:356])


def test_the_lowest_bit_comes_first() -> None:
    assert pack(torch.tensor([[1, 2, 3]]), 3).tolist() == [[0b11010001, 0b0]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_over_keys_is_the_value(bits: int, dtype: torch.dtype) -> None:
    row = torch.tensor([0.0, 1.0, -1.0, 0.3, -0.7, 1e-3, 0.999], dtype=dtype)
    draws = 4000
    decoded = send(row.expand(draws, -1), bits)[0].double()
    step = 2 / (2**bits - 1)
    off = (decoded.mean(0) - row.double()).abs()
    assert bool((off <= 5 * (step / 2) / draws**0.5 + 1e-6).all())
    assert bool((decoded.var(0) <= step**2 / 4 * 1.2 + 1e-12).all()), "variance beyond a quarter of the step's square"


@given(
    bits=st.integers(1, 16), values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12),
    round=st.integers(0, 1000),
)  # fmt: skip
def test_the_error_is_below_one_step(bits: int, values: list[float], round: int) -> None:
    rows = torch.tensor([values], dtype=torch.float64)
    decoded, codes = send(rows, bits, round=round)
    peak = float(rows.abs().max())
    assert float(codes["scale"]) >= peak
    step = 2 * float(codes["scale"]) / (2**bits - 1)
    assert float((decoded - rows).abs().max()) <= step * (1 + 1e-9)


@pytest.mark.parametrize("bits", [1, 5, 16])
def test_bytes_on_the_wire(bits: int) -> None:
    _, codes = send(torch.randn(3, 77, generator=torch.Generator().manual_seed(0)), bits)
    assert codes["codes"].shape == (3, -(-77 * bits // 8)) and codes["codes"].dtype == torch.uint8
    assert codes["scale"].shape == (3, 1) and codes["scale"].dtype == torch.float32
    kind = MODELS["perceptron"]
    sizes, totals = kind.model().size, []
    for stages in ((), (quantize(bits),)):
        process = Process(kind.model(), fedavg(local_sgd(0.1)), transforms=stages)
        totals.append(process.next(process.init(), kind.data((2, 3)))[1]["bytes_up"] / 2)
    assert totals[0] - totals[1] == 8 * sizes - (-(-sizes * bits // 8) + 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8, 12, 16])
def test_rows_of_half_precision_are_rounded_without_bias(bits: int, dtype: torch.dtype) -> None:
    row = torch.tensor([1.0, 0.2, 0.34, -0.6, 0.011], dtype=torch.float64).to(dtype)
    stage, own = quantize(bits), Keys(0, "transforms/0", 0, random.client_keys([f"c{i}" for i in range(4000)]))
    wire, _ = stage.encode(row.expand(4000, -1), {}, None, own)
    assert stage.decode_each is not None and not isinstance(wire, torch.Tensor)
    off = stage.decode_each(wire, None, 5, own).mean(dim=0) - row.double()
    assert float(off.abs().max()) < 5 / (2**bits - 1) / 4000**0.5


def test_rows_of_nought_tiny_and_huge_values() -> None:
    assert torch.equal(send(torch.zeros(2, 5), 4)[0], torch.zeros(2, 5, dtype=torch.float64))
    tiny = torch.full((1, 3), 1e-300, dtype=torch.float64)
    assert bool(torch.isfinite(send(tiny, 4)[0]).all())
    huge = torch.full((1, 3), 3e38)
    torch.testing.assert_close(send(huge, 4)[0].float(), huge)
    for value in (0.1, 1 / 3, 1e-5):
        rows = torch.full((1, 3), value, dtype=torch.float64)
        assert float(send(rows, 8)[0].abs().max()) >= value * (1 - 1e-12), "the largest value must be representable"


def test_keys_decide() -> None:
    rows = torch.randn(4, 60, generator=torch.Generator().manual_seed(0))
    base, tail = send(rows, 2)[0], send(rows[1:], 2, first=1)[0]
    assert torch.equal(base, send(rows, 2)[0]) and torch.equal(base[1:], tail)
    assert not torch.equal(base, send(rows, 2, seed=1)[0]) and not torch.equal(base, send(rows, 2, round=1)[0])


def test_clients_that_send_nothing_send_nothing() -> None:
    assert pack(torch.zeros(2, 0, dtype=torch.int64), 4).shape == (2, 0)
    process = Process(scalar_model(), local_only(local_sgd(0.1)), transforms=(quantize(4),))
    state, metrics = process.next(process.init(), quadratics((1.0, 2.0), (1.0, 2.0)))
    assert state.round == 1 and metrics["clients"] == 2


@pytest.mark.parametrize("bits", [0, 17, 2.0, True])
def test_bits_outside_their_range(bits: Any) -> None:
    with pytest.raises(InvalidArgument, match="bits="):
        quantize(bits)
