"""Keyed randomness: known answers, distributions, and independence of everything but the key."""

import importlib.util
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from atoll import random

ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), ANSWERS)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    found = random.philox(np.array(counter, dtype=np.uint64)[:, None], *key)
    assert tuple(int(w) for w in found[:, 0]) == expected


def test_philox_treats_counters_one_by_one() -> None:
    counters = np.array([a[0] for a in ANSWERS], dtype=np.uint64).T
    together = random.philox(counters, 5, 6)
    for i in range(3):
        assert (random.philox(counters[:, i : i + 1], 5, 6)[:, 0] == together[:, i]).all()


def test_words_are_built_from_block_client_and_round() -> None:
    purpose = 0x299F31D0A4093822
    client = np.array([0x13198A2E85A308D3], dtype=np.uint64)
    block = 0x10
    drawn = random.words(purpose, 0x03707344, client, 2 * block + 2)[0]
    counter = np.array([block, 0x85A308D3, 0x13198A2E, 0x03707344], dtype=np.uint64)[:, None]
    a, b, c, d = (int(w) for w in random.philox(counter, 0xA4093822, 0x299F31D0)[:, 0])
    assert int(drawn[2 * block]) == a | b << 32 and int(drawn[2 * block + 1]) == c | d << 32


@given(count=st.integers(0, 40), more=st.integers(0, 9), width=st.integers(1, 5), first=st.integers(0, 4))
def test_a_word_does_not_depend_on_the_count_or_on_others(count: int, more: int, width: int, first: int) -> None:
    clients = random.client_keys([f"c{i}" for i in range(first + width)])
    full = random.words(7, 3, clients, count + more)
    part = random.words(7, 3, clients[first:], count)
    assert part.shape == (width, count) and (full[first:, :count] == part).all()


def test_an_index_of_each_client_draws_what_it_would_draw_alone() -> None:
    clients = random.client_keys(["a", "b", "c"])
    index = np.array([4, 0, 9], dtype=np.uint64)
    together = random.words(7, index, clients, 5)
    for i in range(3):
        assert (random.words(7, int(index[i]), clients[i : i + 1], 5)[0] == together[i]).all()


def test_words_differ_by_purpose_round_and_client() -> None:
    clients = random.client_keys([f"c{i}" for i in range(50)])
    drawn = [
        random.words(p, r, clients, 20)
        for p in (random.key(0, "x"), random.key(1, "x"), random.key(0, "y"))
        for r in range(4)
    ]
    flat = np.concatenate([d.ravel() for d in drawn])
    assert len(np.unique(flat)) == len(flat)


def test_keys_tell_seeds_purposes_and_kinds_apart() -> None:
    keys = [
        random.key(0), random.key(1), random.key(-1), random.key(0, "a"), random.key(0, "b"), random.key(0, "a", "b"),
        random.key(0, "ab"), random.key(0, 1), random.key(0, "1"), random.key(0, 1, 1), random.key(0, 11),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys) and all(0 <= k < 2**64 for k in keys)
    assert random.key(2**80, "a") == random.key(2**80, "a")


def fresh() -> ModuleType:
    """The module as it is before anything was drawn."""
    found = importlib.util.find_spec("atoll.random")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("other", [True, np.int64(1)])
def test_a_key_does_not_depend_on_the_keys_asked_for_before(other: int) -> None:
    one, two = fresh(), fresh()
    first = (one.key(0, "x", 1), one.key(0, "x", other))
    turned = (two.key(0, "x", other), two.key(0, "x", 1))
    assert first == turned[::-1]


def test_clients_are_known_by_name() -> None:
    keys = random.client_keys(["a", "b", "c"])
    assert keys.dtype == np.uint64 and len(set(keys.tolist())) == 3
    assert random.client_keys(["c"])[0] == keys[2] == random.client_key("c")
    assert random.client_keys([]).shape == (0,)


# --- permutations -----------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6), round=st.integers(0, 2**32 - 1))
def test_permutations_are_permutations_whatever_the_tile(sizes: list[int], round: int) -> None:
    clients = random.client_keys([f"c{i}" for i in range(len(sizes))])
    together = random.permutations(3, round, clients, np.array(sizes))
    assert together.shape == (len(sizes), max(sizes))
    for i, n in enumerate(sizes):
        assert sorted(together[i, :n].tolist()) == list(range(n))
        alone = random.permutations(3, round, clients[i : i + 1], np.array([n]))
        assert (alone[0] == together[i, :n]).all()


def test_permutations_of_no_clients() -> None:
    assert random.permutations(3, 0, random.client_keys([]), np.array([], dtype=np.int64)).shape == (0, 0)


def test_permutations_are_uniform() -> None:
    clients = random.client_keys([f"c{i}" for i in range(12_000)])
    drawn = random.permutations(random.key(0, "test"), 0, clients, np.full(12_000, 4))
    _, counts = np.unique(drawn @ np.array([64, 16, 4, 1]), return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-4


def test_permutations_over_rounds_are_uniform_for_one_client() -> None:
    client, size = random.client_keys(["a"]), np.array([3])
    drawn = np.concatenate([random.permutations(1, r, client, size) for r in range(3000)])
    _, counts = np.unique(drawn @ np.array([9, 3, 1]), return_counts=True)
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 1e-4


# --- uniforms ---------------------------------------------------------------------------------------------------------


def test_uniforms_are_uniform_in_the_half_open_interval() -> None:
    clients = random.client_keys([f"c{i}" for i in range(200)])
    drawn = random.uniforms(random.key(0, "test"), 0, clients, 501).numpy()
    assert drawn.shape == (200, 501) and drawn.dtype == np.float32
    assert drawn.min() >= 0 and drawn.max() < 1
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 5 / 200**0.5
    assert (drawn * 2**24 == np.floor(drawn * 2**24)).all(), "24 bits each"


def test_uniforms_do_not_depend_on_count_or_tile() -> None:
    clients = random.client_keys(["a", "b"])
    full = random.uniforms(1, 2, clients, 9)
    assert (random.uniforms(1, 2, clients[1:], 4)[0] == full[1, :4]).all()
    assert random.uniforms(1, 2, clients, 0).shape == (2, 0)


def test_generators_are_keyed() -> None:
    assert random.generator(1, "a").initial_seed() != random.generator(1, "b").initial_seed()
    assert random.generator(1, "a").initial_seed() == random.generator(1, "a").initial_seed()
    first, again = (random.numpy_generator(1, "a").random(5) for _ in range(2))
    assert (first == again).all() and (first != random.numpy_generator(2, "a").random(5)).all()


def test_a_stretch_is_a_part_of_one_stream_for_each_client() -> None:
    clients = random.client_keys(["a", "b", "c"])
    full = random.stretch(random.key(3, "x"), 7, clients, 41)
    assert (random.stretch(random.key(3, "x"), 7, clients[1:], 9, begin=12) == full[1:, 12:21]).all()
    assert random.stretch(1, 2, clients, 0).shape == (3, 0) and random.stretch(1, 2, clients[:0], 5).shape == (0, 5)
    others = [random.stretch(random.key(3, "y"), 7, clients, 41), random.stretch(random.key(3, "x"), 8, clients, 41)]
    everything = np.concatenate([full.ravel(), *(o.ravel() for o in others)])
    assert len(np.unique(everything)) == len(everything)


def test_a_stretch_has_the_published_known_answer() -> None:
    """Random123's for Philox4x64-10 of a counter and a key of ones; the counter is counted up before it is used."""
    source = np.random.Philox(key=2**128 - 1, counter=2**256 - 2)
    known = [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]
    assert source.random_raw(4).tolist() == known
    same = np.random.Philox(key=5, counter=[3, int(random.client_key("a")), 9, 0]).random_raw(4)
    assert (random.stretch(5, 9, random.client_keys(["a"]), 4, begin=12)[0] == same).all()
