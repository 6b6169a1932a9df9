"""The secret source: published vectors, laws of what is drawn, and a stream that never repeats."""

import copy
import math
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from atoll.errors import InvalidArgument
from atoll.secret import Source, grid, keystream

# RFC 8439, appendix A.1, test vector 1, and section 2.3.2.
ZERO_BLOCK = (
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
)
COUNTED_BLOCK = (
    "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
    "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
)


# --- the stream -------------------------------------------------------------------------------------------------------


def test_the_keystream_is_that_of_the_standard() -> None:
    nonce = bytes.fromhex("000000090000004a00000000")
    assert keystream(bytes(range(32)), nonce, 1, 64).tobytes().hex() == COUNTED_BLOCK
    two = keystream(bytes(range(32)), nonce, 0, 128)
    assert two[64:].tobytes().hex() == COUNTED_BLOCK
    with pytest.raises(InvalidArgument, match="count"):
        keystream(bytes(32), bytes(12), 2**32 - 1, 65)


def test_a_source_is_the_keystream_under_keys_of_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def urandom(count: int) -> bytes:
        asked.append(count)
        return bytes([len(asked) - 1]) * count

    monkeypatch.setattr(os, "urandom", urandom)
    source = Source()
    assert "".join(source.bytes(n).hex() for n in (13, 0, 27, 24)) == ZERO_BLOCK and asked == [32]
    large = source.bytes(100_000)
    assert asked == [32, 32] and large == keystream(b"\1" * 32, bytes(12), 0, 100_000).tobytes()


def test_a_private_source_says_so_and_does_not_repeat() -> None:
    one, two = Source(), Source()
    assert one.private and two.private and one.bytes(32) != two.bytes(32) != one.bytes(32)
    assert one.derive("noise", 3) is one
    assert repr(one) == "Source()"


def test_a_seeded_source_repeats_and_is_marked() -> None:
    one, two, other = Source(seed=7), Source(seed=7), Source(seed=8)
    assert not one.private and "not private" in repr(one)
    first = one.bytes(5000)
    assert first == two.bytes(5000) != other.bytes(5000)
    assert one.bytes(5000) == two.bytes(5000) != first


def test_derived_sources_depend_on_seed_and_parts_alone() -> None:
    used = Source(seed=1)
    used.bytes(999)
    drawn = {
        repr(p): Source(seed=s).derive(*p).bytes(16)
        for s, p in ((1, ("a", 0)), (1, ("a", 1)), (1, ("a", "0")), (1, ("a0",)), (1, ()), (2, ("a", 2)))
    }
    assert len(set(drawn.values())) == len(drawn)
    assert used.derive("a", 0).bytes(16) == drawn[repr(("a", 0))]
    assert not used.derive("a").private


@pytest.mark.parametrize("seed", [None, 5])
def test_no_two_pieces_of_the_stream_are_the_same(seed: int | None) -> None:
    source = Source(seed=seed)
    sizes = [8, 13, 1000, 16, 5000, 8, 70_000, 4095, 4096, 4097, 16, 16_384, 16] * 5
    pieces = [source.bytes(n) for n in sizes]
    assert [len(p) for p in pieces] == sizes
    starts = [p[i : i + 8] for p in pieces for i in range(0, len(p) - 7, 8)]
    assert len(set(starts)) == len(starts)


@pytest.mark.parametrize("seed", [None, 5])
def test_a_forked_process_has_a_stream_of_its_own(seed: int | None) -> None:
    source = Source(seed=seed)
    derived = source.derive("x")
    source.bytes(100)  # what is left of a stretch must not be used by both
    drawn: list[bytes] = []
    for _ in range(2):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.write(writer, source.bytes(32) + derived.bytes(32))
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            found = pipe.read()
        os.waitpid(child, 0)
        drawn += [found[:32], found[32:]]
    drawn += [source.bytes(32), source.bytes(32), derived.bytes(32) if seed is not None else source.bytes(32)]
    assert all(len(d) == 32 for d in drawn) and len(set(drawn)) == len(drawn)


def test_threads_share_a_source_without_repetition() -> None:
    shared, alone = Source(seed=3), Source(seed=3)
    with ThreadPoolExecutor(4) as pool:
        lots = list(pool.map(lambda _: [shared.bytes(16) for _ in range(500)], range(8)))
    drawn = [piece for lot in lots for piece in lot]
    assert sorted(drawn) == sorted(alone.bytes(16) for _ in range(4000))


def test_a_source_cannot_be_copied() -> None:
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied"):
            way(Source(seed=1))
    with pytest.raises(InvalidArgument, match=r"seed=1\.5"):
        Source(seed=1.5)  # pyright: ignore[reportArgumentType]


# --- uniform ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 1000])
def test_integers_are_uniform(bound: int) -> None:
    drawn = Source(seed=bound).integers(bound, 40_000)
    assert drawn.dtype == torch.int64 and int(drawn.min()) >= 0 and int(drawn.max()) < bound
    if bound > 1:
        assert stats.chisquare(np.bincount(drawn.numpy(), minlength=bound)).pvalue > 1e-4


def test_integers_have_no_modulo_bias() -> None:
    """Of 2^64 words a bound of 3 * 2^62 leaves a quarter over: with them the first third would be twice as likely."""
    bound = 3 * 2**61
    drawn = Source(seed=0).integers(bound, 30_000)
    assert stats.chisquare(np.bincount((drawn // 2**61).numpy(), minlength=3)).pvalue > 1e-4
    assert Source(seed=0).integers(2**63, (2, 3)).shape == (2, 3)


@pytest.mark.parametrize("probability", [0.0, 2.0**-40, 1e-3, 0.1, 0.5, 0.9, 1.0])
def test_bernoulli_has_its_probability(probability: float) -> None:
    drawn = Source(seed=1).bernoulli(probability, (200, 500))
    assert drawn.dtype == torch.bool and drawn.shape == (200, 500)
    assert stats.binomtest(int(drawn.sum()), 100_000, probability).pvalue > 1e-4


def test_bernoulli_goes_on_where_64_bits_do_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(seed=0)
    third = Fraction(1, 3)
    words = iter([np.array([0x5555555555555555] * 3, np.uint64), np.array([0, 2**63, 0x5555555555555555], np.uint64)])
    monkeypatch.setattr(Source, "words", lambda self, count: next(words, np.zeros(count, np.uint64)))
    assert source.bernoulli(third, 3).tolist() == [True, False, True]


def test_permutations_are_uniform() -> None:
    source = Source(seed=2)
    drawn = np.stack([source.permutation(4).numpy() for _ in range(6000)]) @ np.array([64, 16, 4, 1])
    _, counts = np.unique(drawn, return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-4
    assert source.permutation(0).shape == (0,) and source.permutation(1).tolist() == [0]
    assert sorted(source.permutation(10_000).tolist()) == list(range(10_000))


@pytest.mark.parametrize(("population", "count"), [(5, 2), (9, 2), (12, 1), (4, 4)])
def test_samples_are_ordered_lists_without_repetition_all_equally_likely(population: int, count: int) -> None:
    source = Source(seed=4)
    drawn = np.stack([source.sample(population, count).numpy() for _ in range(6000)])
    assert all(len(set(row)) == count for row in drawn.tolist())
    _, counts = np.unique(drawn @ population ** np.arange(count), return_counts=True)
    lists = np.prod(np.arange(population - count + 1, population + 1))
    assert len(counts) == lists and stats.chisquare(counts).pvalue > 1e-4


def test_a_small_sample_of_a_large_population() -> None:
    drawn = Source(seed=0).sample(10**12, 1000)
    assert len(set(drawn.tolist())) == 1000 and stats.kstest(drawn.numpy() / 1e12, "uniform").pvalue > 1e-4
    assert Source().sample(3, 0).shape == (0,) and sorted(Source().sample(7, 7).tolist()) == list(range(7))


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.7, 1e4, 2.0**40])
def test_discrete_gaussian_has_its_moments(scale: float) -> None:
    drawn = Source(seed=1).discrete_gaussian(scale, 100_000).double().numpy()
    k = np.arange(-100, 101)
    mass = np.exp(-(k**2) / (2 * scale**2)) if scale < 5 else None
    variance = scale**2 if mass is None else float((k**2 * mass).sum() / mass.sum())
    assert abs(drawn.mean()) < 4.5 * (variance / len(drawn)) ** 0.5
    spread = stats.chi2.cdf((drawn**2).sum() / variance, len(drawn)) if scale >= 1 else 0.5
    assert 1e-5 < spread < 1 - 1e-5
    if scale > 100:
        assert stats.kstest(drawn / scale, "norm").pvalue > 1e-4


@pytest.mark.parametrize("scale", [0.5, 3.0, 1e6])
def test_discrete_laplace_is_a_difference_of_geometric_numbers(scale: float) -> None:
    drawn = Source(seed=1).discrete_laplace(scale, 100_000).numpy()
    q = np.exp(-1 / scale)
    variance = 2 * q / (1 - q) ** 2
    assert abs(drawn.mean()) < 4.5 * (variance / len(drawn)) ** 0.5
    assert abs((drawn.astype(float) ** 2).mean() / variance - 1) < 0.05
    zeros = stats.binomtest(int((drawn == 0).sum()), len(drawn), (1 - q) / (1 + q)).pvalue
    assert zeros > 1e-4


@pytest.mark.parametrize("mean", [1e-3, 0.8, 12.5, 3e5, 2.0**40])
def test_poisson_and_skellam_have_their_moments(mean: float) -> None:
    source = Source(seed=1)
    drawn = source.poisson(mean, 100_000).double().numpy()
    assert abs(drawn.mean() - mean) < 4.5 * (mean / len(drawn)) ** 0.5
    assert abs(drawn.var() / mean - 1) < 4.5 * ((1 / mean + 2) / len(drawn)) ** 0.5
    noise = source.skellam(mean, (100, 1000)).double().numpy()
    assert noise.shape == (100, 1000) and abs(noise.mean()) < 4.5 * (mean / noise.size) ** 0.5
    assert abs(noise.var() / mean - 1) < 4.5 * ((1 / mean + 2) / noise.size) ** 0.5


def test_skellam_has_its_law() -> None:
    drawn = Source(seed=9).skellam(3.0, 100_000).numpy()
    k = np.arange(-6, 7)
    expected = stats.skellam.pmf(k, 1.5, 1.5) * len(drawn)
    counts = np.array([(drawn == i).sum() for i in k])
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("std", [1e-30, 0.37, 1.0, 5e6, 1e30])
def test_normal_noise_is_normal_and_on_the_grid(std: float, dtype: torch.dtype) -> None:
    drawn = Source(seed=1).normal(std, (100, 1000), dtype=dtype)
    assert drawn.dtype == dtype and drawn.shape == (100, 1000)
    points = drawn.double() / grid(std, dtype)
    assert bool((points == points.round()).all())
    fine = 32 if dtype == torch.float64 else 19
    assert 2**fine <= std / grid(std, dtype) < 2 ** (fine + 1)
    assert stats.kstest(drawn.double().numpy().ravel() / std, "norm").pvalue > 1e-4


def test_laplace_noise_is_laplace_and_on_the_grid() -> None:
    drawn = Source(seed=1).laplace(2.5, 100_000)
    points = drawn / grid(2.5)
    assert bool((points == points.round()).all())
    assert stats.kstest(drawn.numpy() / 2.5, "laplace").pvalue > 1e-4


def test_neighbouring_draws_are_independent() -> None:
    drawn = Source(seed=1).normal(1.0, (50_000, 2)).numpy()
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 4.5 / 50_000**0.5
    assert abs(np.corrcoef(np.abs(drawn.T))[0, 1]) < 4.5 / 50_000**0.5
    assert len(np.unique(drawn)) == drawn.size


@pytest.mark.parametrize("way", ["add_normal", "add_laplace"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_mechanism_gives_points_of_the_grid_whatever_the_data(way: str, dtype: torch.dtype) -> None:
    values = torch.linspace(-3, 3, 60_000, dtype=dtype).reshape(200, 300).T
    before = values.clone()
    found = getattr(Source(seed=1), way)(values, 0.1)
    assert found.dtype == dtype and found.shape == values.shape and torch.equal(values, before)
    noise = (found.double() - values.double()).numpy().ravel()
    assert stats.kstest(noise / 0.1, "norm" if way == "add_normal" else "laplace").pvalue > 1e-4
    if dtype == torch.float64:
        points = found / grid(0.1)
        assert bool((points == points.round()).all())
    assert getattr(Source(), way)(torch.zeros(0, dtype=dtype), 0.1).shape == (0,)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 2.0**20])
def test_values_that_noise_cannot_protect_are_refused_without_telling_them(broken: float) -> None:
    with pytest.raises(InvalidArgument, match="clip what is summed") as told:
        Source(seed=1).add_normal(torch.tensor([0.0, broken], dtype=torch.float64), 1.0)
    assert "1048576" not in str(told.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_are_cut_before_the_same_noise_where_a_bound_is_told(dtype: torch.dtype) -> None:
    values = torch.tensor([-math.inf, -9.0, -8.0, 0.5, 8.0, 9e30, math.inf], dtype=dtype)
    found = Source(seed=1).add_normal(values, 0.1, within=8.0)
    assert torch.equal(found, Source(seed=1).add_normal(values.clamp(-8.0, 8.0), 0.1))
    assert torch.equal(values[[0, -1]], torch.tensor([-math.inf, math.inf], dtype=dtype))
    with pytest.raises(InvalidArgument, match="clip what is summed"):
        Source(seed=1).add_normal(torch.tensor([0.0, math.nan], dtype=dtype), 1.0, within=8.0)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda s: s.integers(0, 3), "bound"),
        (lambda s: s.integers(2**63 + 1, 3), "bound"),
        (lambda s: s.integers(2, -1), "size"),
        (lambda s: s.bernoulli(1.5, 3), "probability"),
        (lambda s: s.bernoulli(float("nan"), 3), "probability"),
        (lambda s: s.sample(3, 4), "count"),
        (lambda s: s.permutation(-1), "count"),
        (lambda s: s.bytes(-1), "count"),
        (lambda s: s.discrete_gaussian(0, 3), "scale"),
        (lambda s: s.discrete_gaussian(2.0**41, 3), "scale"),
        (lambda s: s.discrete_laplace(float("inf"), 3), "scale"),
        (lambda s: s.poisson(-1.0, 3), "mean"),
        (lambda s: s.skellam(float("nan"), 3), "variance"),
        (lambda s: s.normal(0.0, 3), "std"),
        (lambda s: s.normal(1.0, 3, dtype=torch.float16), "dtype"),
        (lambda s: s.add_normal(torch.zeros(3), 0.0), "std"),
        (lambda s: s.add_normal(torch.zeros(3, dtype=torch.int64), 1.0), "values"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(call: Callable[[Source], object], names: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{names}="):
        call(Source(seed=0))
