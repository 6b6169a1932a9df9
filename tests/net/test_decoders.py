"""Every decoder of the road takes its own form and raises its own error for everything else."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_door import CALLS

from atoll.errors import InvalidArgument
from atoll.net import calls, children, control, enrolment
from atoll.net.control import MessageError
from atoll.net.frames import FrameError, Limits, declared
from atoll.net.signing import Fresh

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
NOISE = st.binary(max_size=400) | JSON.map(lambda value: json.dumps(value).encode())


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """A message with a byte changed, cut off, or put in."""

    def change(how: tuple[int, int, int]) -> bytes:
        at, byte, kind = how
        at %= len(content)
        if kind == 0:
            return content[:at] + bytes([byte]) + content[at + 1 :]
        return content[:at] if kind == 1 else content[:at] + bytes([byte]) + content[at:]

    return st.tuples(st.integers(0, 10_000), st.integers(0, 255), st.integers(0, 2)).map(change)


MESSAGES = [calls.encode(c) for c in CALLS.values()]
WORD = enrolment.encode(enrolment.Invite("h:1", "0" * 64, "a", "site", "t" * 43))


@settings(max_examples=300)
@given(NOISE | st.sampled_from(MESSAGES).flatmap(mutated))
def test_calls(content: bytes) -> None:
    try:
        call = calls.decode_call(content)
    except MessageError:
        return
    assert type(call) in calls.ROLES and calls.decode_call(calls.encode(call)) == call


@settings(max_examples=200)
@given(NOISE)
@pytest.mark.parametrize("kind", [calls.Enrol, calls.Problem, calls.View, calls.Errands, calls.Welcome])
def test_answers(kind: Any, content: bytes) -> None:
    try:
        calls.decode(kind, content)
    except MessageError:
        return


@settings(max_examples=200)
@given(NOISE)
@pytest.mark.parametrize("decode", [control.decode_request, control.decode_answer])
def test_messages(decode: Any, content: bytes) -> None:
    with pytest.raises(MessageError):
        decode(content)


@settings(max_examples=200)
@given(st.text(max_size=200) | mutated(WORD.encode()).map(lambda b: b.decode("latin-1")))
def test_invites(word: str) -> None:
    try:
        assert enrolment.encode(enrolment.decode(word)) == WORD
    except InvalidArgument:
        return


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_headers_of_frames(content: bytes) -> None:
    try:
        declared(content, Limits(bytes=1000))
    except FrameError:
        return


@settings(max_examples=200)
@given(NOISE)
@pytest.mark.parametrize("name", ["worker_calls", "worker_replies", "host_calls", "host_replies"])
def test_what_processes_say(name: str, content: bytes) -> None:
    with pytest.raises((msgspec.MsgspecError, ValueError, RecursionError)):
        getattr(children, name).decode(content)


@settings(max_examples=300)
@given(st.text(max_size=60))
def test_numbers_of_requests(nonce: str) -> None:
    assert Fresh().take("a", nonce, alone=True) in ("epoch", "replay")


@pytest.mark.parametrize("decode", [calls.decode_call, control.decode_request, control.decode_answer])
def test_deep_and_long_messages_are_refused_early(decode: Any) -> None:
    for content in (b"[" * 10**6, b'{"a":' * 10**5, b'"' + b"x" * 2**25 + b'"'):
        with pytest.raises(MessageError):
            decode(content)
