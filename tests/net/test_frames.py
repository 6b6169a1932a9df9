"""Bytes from another party: a frame that was expected, or a FrameError, and never anything else."""

import json
import time
import tracemalloc
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.net.frames import (
    DTYPES,
    FrameError,
    Limits,
    Schema,
    TensorSpec,
    bytes_of,
    content_hash,
    decode,
    encode,
    schema_of,
)

NAMES = st.text("abcXYZ019._-/", min_size=1, max_size=12).filter(
    lambda n: not n.startswith("/") and ".." not in n.split("/")
)


@st.composite
def tensors(draw: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in draw(st.lists(NAMES, unique=True, max_size=5)):
        dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        raw = torch.randint(0, 2 if dtype == torch.bool else 100, shape)
        found[name] = raw.to(dtype)
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and left[n].shape == right[n].shape and bool((left[n] == right[n]).all())
        for n in left
    )


@given(tensors())
def test_what_goes_in_comes_out(given: dict[str, Tensor]) -> None:
    frame = encode(given)
    assert same(decode(frame, schema_of(given), sha256=content_hash(frame)), given)
    assert same(decode(bytearray(frame), schema_of(given)), given)
    assert same(decode(memoryview(frame), schema_of(given)), given)


@given(tensors())
def test_frames_are_what_the_reference_writer_writes(given: dict[str, Tensor]) -> None:
    assert encode(given) == safetensors.torch.save(given)
    assert bytes_of(given) == len(encode(given))


def test_views_and_scalars_travel() -> None:
    given = {"a": torch.arange(12.0).view(3, 4).T, "b": torch.tensor(3), "c": torch.arange(9)[::2]}
    assert same(decode(encode(given), schema_of(given)), given)


# --- what is refused --------------------------------------------------------------------------------------------------

GOOD = {"rows": torch.arange(6, dtype=torch.float32).view(1, 6), "weight": torch.ones(1, 1, dtype=torch.float64)}
SCHEMA: Schema = schema_of(GOOD)
FRAME = encode(GOOD)


def frame(header: Any, body: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(dtype: Any = "F32", shape: Any = (1, 6), at: Any = (8, 32)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": at}


W = {"weight": entry("F64", [1, 1], [0, 8])}
BODY = FRAME[-32:]
WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "short": (FRAME[:7], "truncated"),
    "no body": (FRAME[:-32], "truncated"),
    "a byte too few": (FRAME[:-1], "truncated"),
    "a byte too many": (FRAME + b"\0", "truncated"),
    "a header that is too long": (frame(b"{}", length=2**63), "limit"),
    "a header beyond the end": (frame(b"{}", length=2**19), "truncated"),
    "no JSON": (frame(b"\x80\x02}q\x00."), "header"),
    "no UTF-8": (frame(b'{"\xff":1}'), "header"),
    "nested": (frame(b"[" * 100_000), "header"),
    "a list": (frame([]), "header"),
    "metadata": (frame({"__metadata__": {"a": "b"}, **W, "rows": entry()}, BODY), "header"),
    "an unknown key": (frame({**W, "rows": {**entry(), "code": "x"}}, BODY), "header"),
    "a missing key": (frame({**W, "rows": {"dtype": "F32", "shape": [1, 6]}}, BODY), "header"),
    "an unknown type": (frame({**W, "rows": entry("O")}, BODY), "dtype"),
    "a negative length": (frame({**W, "rows": entry(shape=[-1, 6])}, BODY), "header"),
    "a length as text": (frame({**W, "rows": entry(shape=["1", 6])}, BODY), "header"),
    "a product that overflows": (frame({**W, "rows": entry(shape=[2**33, 2**33])}, BODY), "limit"),
    "a length that overflows": (frame({**W, "rows": entry(shape=[2**64, 0])}, BODY), "header"),
    "an offset that overflows": (frame({**W, "rows": entry(at=[8, 2**70])}, BODY), "header"),
    "too many dimensions": (frame({**W, "rows": entry(shape=[1] * 9)}, BODY), "limit"),
    "a hole": (frame({**W, "rows": entry(at=[12, 36])}, BODY + bytes(4)), "layout"),
    "an overlap": (frame({**W, "rows": entry(at=[0, 24])}, BODY), "layout"),
    "backwards": (frame({**W, "rows": entry(at=[32, 8])}, BODY), "layout"),
    "size and shape differ": (frame({**W, "rows": entry(shape=[1, 5])}, BODY), "layout"),
    "a name with a way up": (frame({**W, "../rows": entry()}, BODY), "name"),
    "a name from the root": (frame({**W, "/rows": entry()}, BODY), "name"),
    "a name with NUL": (frame({**W, "ro\0ws": entry()}, BODY), "name"),
    "a name that looks the same": (frame({**W, "r\u043ews": entry()}, BODY), "name"),
    "an empty name": (frame({**W, "": entry()}, BODY), "name"),
    "a long name": (frame({**W, "r" * 257: entry()}, BODY), "name"),
    "a tensor too many": (frame({**W, "rows": entry(), "z": entry("U8", [0], [32, 32])}, BODY), "schema"),
    "a tensor too few": (frame(W, BODY[:8]), "schema"),
    "another name": (frame({**W, "row": entry()}, BODY), "schema"),
    "another type": (frame({**W, "rows": entry("I32")}, BODY), "dtype"),
    "another shape": (frame({**W, "rows": entry(shape=[6, 1])}, BODY), "shape"),
    "another rank": (frame({**W, "rows": entry(shape=[6])}, BODY), "shape"),
    "a key twice": (
        frame(json.dumps({**W, "rows": entry()}, separators=(",", ":")).replace("}}", '},"rows":{"dtype":"F32",'
        '"shape":[1,6],"data_offsets":[8,32]}}').encode(), BODY), "header",
    ),
    "another order": (frame({"rows": entry(at=[0, 24]), "weight": entry("F64", [1, 1], [24, 32])}, BODY), "header"),
    "spaces": (frame(json.dumps({**W, "rows": entry()}).encode(), BODY), "header"),
    "numbers in another form": (
        frame(json.dumps({**W, "rows": entry()}, separators=(",", ":")).replace("[1,6]", "[1.0,6]").encode(), BODY),
        "header",
    ),
}  # fmt: skip


def test_the_frame_they_are_made_from_is_good() -> None:
    assert frame({**W, "rows": entry()}, BODY) == FRAME


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_the_frame_is_refused(name: str) -> None:
    content, reason = WRONG[name]
    with pytest.raises(FrameError) as caught:
        decode(content, SCHEMA)
    assert caught.value.reason == reason


def test_limits() -> None:
    for limits in (Limits(bytes=len(FRAME) - 1), Limits(header=8), Limits(tensors=1), Limits(dimensions=1)):
        with pytest.raises(FrameError) as caught:
            decode(FRAME, SCHEMA, limits)
        assert caught.value.reason == "limit"
    with pytest.raises(FrameError) as caught:
        decode(FRAME, SCHEMA, Limits(name=4))
    assert caught.value.reason == "name"


def test_a_hash_that_differs_is_refused() -> None:
    with pytest.raises(FrameError) as caught:
        decode(FRAME, SCHEMA, sha256="0" * 64)
    assert caught.value.reason == "hash"


def test_truth_values_are_0_or_1() -> None:
    given = {"b": torch.tensor([True, False])}
    with pytest.raises(FrameError) as caught:
        decode(encode(given)[:-1] + b"\2", schema_of(given))
    assert caught.value.reason == "value"


def test_free_lengths_are_bounded_by_what_is_there() -> None:
    schema = (TensorSpec("codes", torch.uint8, (1, None)),)
    assert decode(encode({"codes": torch.ones(1, 5, dtype=torch.uint8)}), schema)["codes"].shape == (1, 5)
    with pytest.raises(FrameError):
        decode(encode({"codes": torch.ones(2, 5, dtype=torch.uint8)}), schema)


def test_an_empty_tensor_cannot_have_lengths_without_bound() -> None:
    schema = (TensorSpec("codes", torch.uint8, (0, None, None, None)),)
    content = frame({"codes": entry("U8", [0, 2**53, 2**53, 2**53], [0, 0])})
    with pytest.raises(FrameError) as caught:
        decode(content, schema)
    assert caught.value.reason == "limit"
    assert decode(frame({"codes": entry("U8", [0, 2**40, 3, 1], [0, 0])}), schema)["codes"].shape == (0, 2**40, 3, 1)


def test_what_cannot_travel_is_refused_where_it_is_written() -> None:
    with pytest.raises(FrameError, match="complex64 cannot travel"):
        encode({"a": torch.ones(1, dtype=torch.complex64)})
    with pytest.raises(FrameError, match="name"):
        encode({"a b": torch.ones(1)})


def test_refusing_is_cheap() -> None:
    """A claim of a petabyte costs no memory, and a header of a million tensors little time."""
    huge = frame({"rows": entry(shape=[2**25, 2**25], at=[0, 2**52])})
    many = frame(b'{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' * 10**6)
    tracemalloc.start()
    began = time.perf_counter()
    for content in (huge, many):
        with pytest.raises(FrameError):
            decode(content, SCHEMA)
    assert time.perf_counter() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


# --- anything at all --------------------------------------------------------------------------------------------------


def only_a_frame_error(content: bytes, schema: Schema = SCHEMA) -> None:
    """Bytes are refused, or they are the very frame of what they say."""
    try:
        found = decode(content, schema)
    except FrameError:
        return
    assert encode(found) == content


@given(st.binary(max_size=400))
def test_any_bytes(content: bytes) -> None:
    only_a_frame_error(content)
    only_a_frame_error(frame(content))


KEYS = st.sampled_from(["rows", "weight", "dtype", "shape", "data_offsets", "x"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@given(st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=3), max_leaves=12))
def test_any_json(header: Any) -> None:
    only_a_frame_error(frame(header, BODY))


@settings(max_examples=300)
@given(st.data())
def test_changed_frames(data: st.DataObject) -> None:
    content = bytearray(FRAME)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        kind = data.draw(st.sampled_from(["flip", "set", "cut", "insert", "remove", "repeat"]))
        if kind == "flip" and content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set" and content:
            content[at] = data.draw(st.sampled_from(list(b'0123456789{}[]",:. F\x00\xff')))
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(max_size=9))
        elif kind == "remove":
            del content[at : at + data.draw(st.integers(1, 9))]
        else:
            content[at:at] = content[at : at + data.draw(st.integers(1, 40))]
    only_a_frame_error(bytes(content))
    if bytes(content) != FRAME:
        with pytest.raises(FrameError):
            decode(bytes(content), SCHEMA, sha256=content_hash(FRAME))


def test_every_bit_of_a_header_counts() -> None:
    for bit in range(8 * (len(FRAME) - 32)):
        changed = bytearray(FRAME)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            decode(bytes(changed), SCHEMA)
