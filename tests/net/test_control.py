"""Messages between sites and server: exactly what was meant, or a MessageError."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.net import control
from atoll.net.control import MessageError, decode_answer, decode_request, encode

H = "ab" * 32
REQUESTS: list[Any] = [
    control.Ask("r", "a", (1, 2)),
    control.Deliver("r", "a", 1, 2, H, H, 10, (3, 0, 0), 12),
    control.Decline("r", "a", 1, 2, "no room"),
    control.Say("r", "a", 1, 2, 3, "share", b"\x00\xff", H, 0),
    control.Abstain("r", "a", 1, 2, 3, "no room"),
]
ANSWERS: list[Any] = [
    control.Work("r", 1, 2, H, 10, "train", -5, ("a", "b"), 7, {"shared/0": 0.1, "n": 2**60, "x": None}, (0, 1)),
    control.Turn("r", 1, 2, 3, "join", b"\x00\xff", {"a": "k" * 43}, (0, 1)),
    control.Wait("r", 1, None),
    control.Received("r", 1, 2, (0, 1)),
    control.Refused("r", 1, 2, "stale", "another round", 3, None),
    control.Ended("r", 3, "done", None),
]


@pytest.mark.parametrize("message", [*REQUESTS, *ANSWERS], ids=lambda m: type(m).__name__)
def test_what_goes_in_comes_out(message: Any) -> None:
    decode, other = (decode_request, decode_answer) if message in REQUESTS else (decode_answer, decode_request)
    assert decode(encode(message)) == message
    with pytest.raises(MessageError):
        other(encode(message))


@pytest.mark.parametrize("message", [*REQUESTS, *ANSWERS], ids=lambda m: type(m).__name__)
def test_every_field_is_needed_and_no_other_taken(message: Any) -> None:
    decode = decode_request if message in REQUESTS else decode_answer
    plain = json.loads(encode(message))
    for name in plain:
        if name != "at":
            with pytest.raises(MessageError):
                decode(json.dumps({n: v for n, v in plain.items() if n != name}).encode())
        with pytest.raises(MessageError):
            decode(json.dumps(plain | {name: [{"odd": 1}]}).encode())
    with pytest.raises(MessageError):
        decode(json.dumps(plain | {"admin": True}).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"round": -1}, {"round": 1.5}, {"round": "1"}, {"round": 2**60}, {"attempt": True}, {"sha256": "AB" * 32},
        {"sha256": "ab" * 31}, {"base": ""}, {"site": ""}, {"site": "x" * 201}, {"site": "../a"}, {"site": "a\nb"},
        {"site": "a\u202eb"}, {"size": -1}, {"parts": [1, 2]}, {"parts": [1, 2, 3, 4]}, {"parts": [1, 2, -3]},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(MessageError):
        decode_request(json.dumps(json.loads(encode(REQUESTS[1])) | change).encode())


def test_long_messages_are_not_looked_at() -> None:
    with pytest.raises(MessageError, match="limit"):
        decode_request(b" " * (control.LONGEST + 1))
    with pytest.raises(MessageError):
        decode_request(b"[" * 10**6)


@pytest.mark.parametrize("reason", ["a\nb", "\x1b[2J", "a\u202eb", "\x00", "x" * 1001, "\x9b31m", "\u2028"])
def test_what_a_screen_would_obey_does_not_travel(reason: str) -> None:
    plain = json.loads(encode(REQUESTS[2]))
    with pytest.raises(MessageError):
        decode_request(json.dumps(plain | {"reason": reason}).encode())
    made = control.Decline("r", "a", 1, 2, control.plain(reason))
    assert decode_request(encode(made)) == made


@given(st.text())
def test_any_text_can_be_made_plain(text: str) -> None:
    made = control.Decline("r", "a", 1, 2, control.plain(text))
    assert decode_request(encode(made)) == made


@given(st.binary(max_size=300), st.sampled_from(range(len(REQUESTS))), st.integers(0, 400), st.integers(0, 40))
def test_any_bytes(noise: bytes, which: int, at: int, gone: int) -> None:
    good = encode(REQUESTS[which])
    for content in (noise, good[:at] + noise + good[at + gone :]):
        for decode in (decode_request, decode_answer):
            with contextlib.suppress(MessageError):
                decode(content)
