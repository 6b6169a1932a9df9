"""Decoders: whatever bytes come, a message or a typed error, and little work."""

import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import World

from atoll.secagg import SecAggError, decode_client, decode_server, encode
from atoll.secagg.messages import MOST_CLIENTS, Masked, Roll, Unmask, bits_of, places_of


def exchanged() -> dict[str, bytes]:
    """One of every message, as it travels."""
    world = World(4)
    world.run()
    found = {type(m).__name__: encode(m) for m in (*world.sent.values(), *world.told.values())}
    assert len(found) == 12
    return found


WIRE = exchanged()
SERVER = ("Invitation", "Roll", "Neighbours", "Delivery", "Survivors", "Confirmations")


def decoder(name: str) -> Any:
    return decode_server if name in SERVER else decode_client


def refused(call: Any, raw: bytes) -> None:
    """A message, or a typed error that does not show what was sent."""
    try:
        message = call(raw)
    except SecAggError as error:
        assert error.reason == "message"
        assert error.__cause__ is None and error.__suppress_context__
    else:
        assert encode(message) == raw


@pytest.mark.parametrize("name", WIRE)
def test_there_and_back(name: str) -> None:
    message = decoder(name)(WIRE[name])
    assert type(message).__name__ == name and encode(message) == WIRE[name]
    assert repr(message) == f"{name}(...)"


@pytest.mark.parametrize("name", WIRE)
def test_a_message_of_the_other_side_is_none(name: str) -> None:
    with pytest.raises(SecAggError):
        (decode_client if name in SERVER else decode_server)(WIRE[name])


@settings(max_examples=500)
@given(raw=st.binary(max_size=300))
def test_any_bytes(raw: bytes) -> None:
    refused(decode_server, raw)
    refused(decode_client, raw)


@settings(max_examples=400)
@given(name=st.sampled_from(sorted(WIRE)), data=st.data())
def test_changed_messages(name: str, data: st.DataObject) -> None:
    raw = bytearray(WIRE[name])
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "add", "copy"]))
        at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        if kind == "flip" and raw:
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del raw[at:]
        elif kind == "add":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=5))
        else:
            raw[at:at] = raw[at : at + data.draw(st.integers(1, 40))]
    refused(decoder(name), bytes(raw))


@settings(max_examples=200)
@given(
    content=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=70)
        | st.text(max_size=8) | st.sampled_from([*map(str.lower, WIRE)]),
        lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=20,
    )
)  # fmt: skip
def test_well_formed_nonsense(content: Any) -> None:
    raw = msgspec.msgpack.encode(content)
    refused(decode_server, raw)
    refused(decode_client, raw)


@pytest.mark.parametrize("name", WIRE)
def test_every_truncation_is_refused(name: str) -> None:
    for end in range(len(WIRE[name])):
        with pytest.raises(SecAggError):
            decoder(name)(WIRE[name][:end])
    with pytest.raises(SecAggError):
        decoder(name)(WIRE[name] + b"\0")


@pytest.mark.parametrize("header", [b"\xdd\x7f\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"])
def test_lying_lengths_allocate_nothing(header: bytes) -> None:
    session = b"\xc4\x20" + bytes(32)
    for name in ("unmask", "shares", "neighbours", "invitation", "masked"):
        raw = b"\x93" + msgspec.msgpack.encode(name) + session + header + b"\x01\x02"
        tracemalloc.start()
        for call in (decode_server, decode_client):
            with pytest.raises(SecAggError):
                call(raw)
        assert tracemalloc.get_traced_memory()[1] < 2**17
        tracemalloc.stop()


def test_limits_come_first() -> None:
    raw = encode(Masked(bytes(32), bytes(10_000)))
    assert isinstance(decode_client(raw, len(raw)), Masked)
    with pytest.raises(SecAggError, match="where 9999 are allowed"):
        decode_client(raw, 9999)
    with pytest.raises(SecAggError):
        decode_client(encode(Unmask(bytes(32), (), tuple(range(MOST_CLIENTS + 1)))))
    with pytest.raises(SecAggError):
        decode_server(encode(Roll(bytes(32), bytes(32 * MOST_CLIENTS + 32))))


def test_only_the_one_form() -> None:
    raw = WIRE["Confirm"]
    longer = b"\xdc\x00\x03" + raw[1:]  # an array of three with a 16-bit length
    assert msgspec.msgpack.decode(longer) == msgspec.msgpack.decode(raw)
    with pytest.raises(SecAggError, match="one form"):
        decode_client(longer)


@given(count=st.integers(1, 40), data=st.data())
def test_sets_as_bits(count: int, data: st.DataObject) -> None:
    places = data.draw(st.sets(st.integers(0, count - 1)))
    raw = bits_of(places, count)
    assert places_of(raw, count) == tuple(sorted(places))
    with pytest.raises(SecAggError):
        places_of(raw + b"\0", count)
    if count % 8:
        with pytest.raises(SecAggError, match="of"):
            places_of(raw[:-1] + b"\xff", count)
