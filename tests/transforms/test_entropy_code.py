"""Entropy coding: nothing is lost, sizes are what is sent, and no damaged payload is taken for a whole one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from atoll import random
from atoll.errors import InvalidArgument
from atoll.transforms import PayloadError, Transform, eden, entropy_code, half, plain, quantize, sign, top_k
from atoll.transforms.chain import HEADER, Chain, compose, keys_of, sent

LENGTH = 5000


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, LENGTH, generator=torch.Generator().manual_seed(seed))


def keys(count: int) -> Any:
    return keys_of(0, 0, random.client_keys([f"c{i}" for i in range(count)]), LENGTH)


def chained(*stages: Transform) -> Chain:
    return compose(stages, plain())


@pytest.mark.parametrize(
    "before",
    [(), (half(),), (quantize(4),), (quantize(12),), (eden(1),), (sign(),), (top_k(0.1),), (top_k(0.1), quantize(4))],
    ids=lambda s: "-".join(t.name for t in s) or "rows",
)
def test_what_is_decoded_is_what_was_sent(before: tuple[Transform, ...]) -> None:
    given, nothing = rows(3), (None,) * (len(before) + 1)
    bare, behind = chained(*before), chained(*before, entropy_code())
    wire, _ = bare.encode(given, {}, nothing[:-1], keys(3))
    packed, _ = behind.encode(given, {}, nothing, keys(3))
    expected = bare.decode_each(wire, nothing[:-1], LENGTH, keys(3), torch.float32)
    assert torch.equal(behind.decode_each(packed, nothing, LENGTH, keys(3), torch.float32), expected)
    assert sent(packed) <= sent(wire) + 3 * 30, "what cannot be coded grows by little"


def test_bytes_are_those_of_the_frames() -> None:
    chain, given = chained(quantize(4), entropy_code()), rows(3)
    given[1, 10:] = 0
    packed, _ = chain.encode(given, {}, (None, None), keys(3))
    alone = [chain.encode(given[i : i + 1], {}, (None, None), keys_of(0, 0, random.client_keys([f"c{i}"]), LENGTH))[0]
             for i in range(3)]  # fmt: skip
    each = [a["payload"].shape[1] for a in alone]  # type: ignore[index]
    assert sent(packed) == sum(each) and len(set(each)) == 3
    assert packed["payload"].shape == (3, max(each))  # type: ignore[index]
    assert sent(packed) < 0.8 * 3 * chain.bytes(LENGTH, LENGTH, torch.float32), "small numbers are the more frequent"


def spoilt(change: Callable[[bytearray], bytes | bytearray]) -> Tensor:
    chain = chained(quantize(4), entropy_code())
    packed, _ = chain.encode(rows(1), {}, (None, None), keys(1))
    content = bytearray(packed["payload"][0].numpy().tobytes())  # type: ignore[index]
    return torch.frombuffer(bytearray(change(content)), dtype=torch.uint8)[None]


def framed(raw: bytes) -> bytes:
    return len(raw).to_bytes(HEADER, "little") + raw


def flipped(content: bytearray) -> bytearray:
    content[len(content) // 2] ^= 4
    return content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c[:-1], "cut off"),
        (lambda c: c[:3], "damaged|announces|cut off"),
        (flipped, "damaged"),
        (lambda c: framed(bytes(c[HEADER:]) + b"\0"), "damaged"),
        (lambda c: framed(b"nothing"), "damaged"),
        (lambda c: framed(b""), "damaged"),
        (lambda c: b"\xff" * 4 + c[4:], "cut off"),
        (lambda c: framed(entropy_code().coder.compress(bytes(10**6))), "announces 1000000 bytes"),  # type: ignore[union-attr]
        (lambda c: framed(entropy_code().coder.compress(bytes(10))), "announces 10 bytes"),  # type: ignore[union-attr]
    ],
)
def test_damaged_payloads_are_refused(change: Any, said: str) -> None:
    chain = chained(quantize(4), entropy_code())
    with pytest.raises(PayloadError, match=said):
        chain.decode_each({"payload": spoilt(change)}, (None, None), LENGTH, keys(1), torch.float32)


def test_payloads_for_other_layouts_and_stages_are_refused() -> None:
    coded, bare, given = chained(quantize(4), entropy_code()), chained(quantize(4)), rows(1)
    packed, _ = coded.encode(given, {}, (None, None), keys(1))
    with pytest.raises(PayloadError, match=r"announces 2504 bytes, expected 2505"):
        coded.decode_each(packed, (None, None), LENGTH + 2, keys(1), torch.float32)
    wire, _ = bare.encode(given, {}, (None,), keys(1))
    with pytest.raises(PayloadError, match=r"another layout: 0/codes has \(2500,\) numbers.*expected 2501"):
        bare.decode_each(wire, (None,), LENGTH + 2, keys(1), torch.float32)
    with pytest.raises(PayloadError, match=r"other stages.*0/scale"):
        bare.decode_each({"0/codes": wire["0/codes"]}, (None,), LENGTH, keys(1), torch.float32)  # type: ignore[index]
    with pytest.raises(PayloadError, match=r"another layout: 0/scale.*float64"):
        odd = {"0/codes": wire["0/codes"], "0/scale": wire["0/scale"].double()}  # type: ignore[index]
        bare.decode_each(odd, (None,), LENGTH, keys(1), torch.float32)
    with pytest.raises(PayloadError, match="expected coded bytes"):
        coded.decode_each(wire, (None, None), LENGTH, keys(1), torch.float32)
    sparse = chained(top_k(0.1))
    found, _ = sparse.encode(given, {}, (None,), keys(1))
    found["0/places"].fill_(255)  # type: ignore[index]
    with pytest.raises(PayloadError, match="top_k: a place is beyond the row"):
        sparse.decode_each(found, (None,), LENGTH, keys(1), torch.float32)


@pytest.mark.parametrize("level", [0, 20, 3.0, True])
def test_wrong_levels(level: Any) -> None:
    with pytest.raises(InvalidArgument, match="level="):
        entropy_code(level)
