"""What the server sees, as numbers: uniform, and the same for all inputs with the same sum."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from parties import NAMES, World

from atoll.secagg import encode
from atoll.secagg.masks import add_masks
from atoll.secagg.messages import masking_of, own_mask


def uniform(values: NDArray[Any]) -> bool:
    """Chi-squared over the 256 values of every byte; fails by chance once in 10^5 for each place."""
    raw = values.view(np.uint8).reshape(len(values), -1)
    for place in range(raw.shape[1]):
        counts = np.bincount(raw[:, place], minlength=256)
        due = len(raw) / 256
        if ((counts - due) ** 2 / due).sum() > 365:
            return False
    return True


@pytest.mark.parametrize("bits", [32, 48])
@pytest.mark.parametrize("value", [0, 1, 2**31])
def test_a_masked_vector_is_uniform(bits: int, value: int) -> None:
    world = World(3, bits=bits, length=2**14)
    dtype = world.vectors[NAMES[0]].dtype
    world.vectors = {n: np.full(2**14, value, dtype=dtype) for n in world.names}
    world.until("mask").step()
    masked = [np.frombuffer(world.sent[n, "mask"].vector, dtype=dtype) for n in world.names]
    assert all(uniform(m) for m in masked)
    # Nor do they show anything together: differences and sums of two are uniform as well.
    assert uniform(masked[0] - masked[1]) and uniform(masked[0] + masked[2])
    assert abs(np.corrcoef(masked[0].astype(float), masked[1].astype(float))[0, 1]) < 5 / 2**7


def known(world: World, seeds: dict[str, bytes]) -> list[NDArray[Any]]:
    """What is left of the honest vectors once the server knows all seeds: pairwise masks alone."""
    left: list[NDArray[Any]] = []
    for name in world.names:
        vector = np.frombuffer(world.sent[name, "mask"].vector, dtype="<u4").copy()
        told = world.told[name, "mask"]
        add_masks(vector, [(own_mask(masking_of(told.session, told.dealt), seeds[name]), -1)])
        left.append(vector)
    return left


def test_after_unmasking_the_vectors_are_uniform_but_for_their_sum() -> None:
    """Two inputs with the same sum look the same to a server that has every seed, as it does in the end."""
    base = np.arange(2**14, dtype="<u4")
    for inputs in ((base, 0 * base, 5 * base), (2 * base, 2 * base, 2 * base)):
        world = World(3, length=2**14)
        world.vectors = dict(zip(world.names, (i.astype("<u4") for i in inputs), strict=True))
        world.until("mask")
        seeds = {n: world.clients[n]._fresh.seed for n in world.names}
        world.step()
        left = known(world, seeds)
        assert np.array_equal(left[0] + left[1] + left[2], 6 * base)
        assert all(uniform(v) for v in left) and uniform(left[0] - left[1])


def test_only_the_length_shows() -> None:
    """Messages of clients with very different vectors have the same bytes but for random ones: the same lengths."""
    lengths: list[dict[tuple[str, str], int]] = []
    for value in (0, 2**32 - 1):
        world = World(4, length=100)
        world.vectors = {n: np.full(100, value, dtype="<u4") for n in world.names}
        world.run({NAMES[3]: "mask"})
        lengths.append({k: len(encode(m)) for k, m in world.sent.items()})
    assert lengths[0] == lengths[1]


def test_traffic() -> None:
    """A number is 4 bytes in a ring of 32 bits; beside the vector there are some hundreds of bytes for a neighbour."""
    world = World(20, length=10_000)
    world.run()
    sent = {p: len(encode(world.sent[NAMES[0], p])) for p in ("join", "reveal", "share", "mask", "confirm", "unmask")}
    assert 40_000 < sent["mask"] < 40_100
    assert sum(sent.values()) - sent["mask"] < 20 * 250
