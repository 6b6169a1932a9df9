"""Signatures hold what they say, and a request is taken once."""

import re
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.net import signing
from atoll.net.signing import Fresh, Numbers, SignatureError

KEY, SERVER, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2, 3))
URL = "https://atoll/v1/call?a=b"


def public(name: str) -> Any:
    return KEY.public_key() if name == "hospital a" else None


def signed(body: bytes | None = b"body", *, key: Ed25519PrivateKey = KEY) -> signing.Request:
    request = signing.Request("POST", URL, httpx.Headers())
    signing.sign_request(key, "hospital a", request, "e.1.p.1", body)
    return request


def test_a_request_tells_who_signed_it_and_its_number() -> None:
    request = signed()
    assert signing.verify_request(request, public, content=True) == ("hospital a", "e.1.p.1")
    signing.check_content(request.headers, b"body")
    with pytest.raises(SignatureError):
        signing.check_content(request.headers, b"bodY")


def by_library(do: Any, *given: Any, **named: Any) -> Any:
    """What is done where no message has our form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signing, "_plainly_signed", lambda *_: False)
        patch.setattr(signing, "_plainly_verified", lambda *_, **__: None)
        return do(*given, **named)


def changed(**change: Any) -> signing.Request:
    request = signed()
    for name, value in change.items():
        if name == "drop":
            del request.headers[value]
        elif name == "header":
            request.headers[value[0]] = request.headers[value[0]].replace(*value[1:])
        else:
            setattr(request, name, value)
    return request


@pytest.mark.parametrize(
    "change",
    [
        {"method": "PUT"},
        {"url": "https://atoll/v1/calls?a=b"},
        {"url": "https://atoll/v1/call?a=c"},
        {"url": "https://atoll/v1/call"},
        {"drop": "signature"},
        {"drop": "signature-input"},
        {"drop": "content-digest"},
        {"header": ("signature-input", "e.1.p.1", "e.1.p.2")},
        {"header": ("signature-input", "hospital a", "hospital b")},
        {"header": ("signature-input", '"content-digest"', "")},
        {"header": ("signature-input", 'tag="atoll"', 'tag="other"')},
        {"header": ("signature-input", "ed25519", "hmac-sha256")},
        {"header": ("content-digest", "sha-256", "sha-512")},
        {"headers": httpx.Headers({"signature": "\x00", "signature-input": "=;="})},
    ],
    ids=str,
)
def test_whatever_is_changed_in_a_request_is_noticed(change: dict[str, Any]) -> None:
    with pytest.raises(SignatureError):
        signing.verify_request(changed(**change), public, content=True)


def test_another_key_is_refused() -> None:
    with pytest.raises(SignatureError):
        signing.verify_request(signed(key=OTHER), public, content=True)


def test_a_second_signature_is_refused() -> None:
    request = signed()
    for name in ("signature", "signature-input"):
        request.headers[name] = f"{request.headers[name]}, b{request.headers[name]}"
    with pytest.raises(SignatureError):
        signing.verify_request(request, public, content=True)


def test_clocks_play_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender whose clock is days ahead or behind is heard."""
    import datetime

    from http_message_signatures import signatures

    for days in (-4000, 4000):
        real, skewed = datetime.datetime, signing.time.time() + 86400 * days

        class Skewed(real):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return real.fromtimestamp(skewed, tz)

        for library in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(signatures.datetime, "datetime", Skewed)
                patch.setattr(signing.time, "time", lambda: skewed)
                request = by_library(signed) if library else signed()
            assert f"created={int(skewed)};" in request.headers["signature-input"]
            assert signing.verify_request(request, public, content=True)[0] == "hospital a"
            assert by_library(signing.verify_request, request, public, content=True)[0] == "hospital a"


def answered(request: signing.Request, body: bytes | None = b"answer", key: Ed25519PrivateKey = SERVER) -> Any:
    answer = signing.Answer(200, {}, request)
    signing.sign_answer(key, answer, body)
    return answer


def test_an_answer_belongs_to_its_request() -> None:
    request = signed()
    answer = answered(request)
    signing.verify_answer(answer, SERVER.public_key(), b"answer")
    for wrong in (
        lambda: signing.verify_answer(answer, OTHER.public_key(), b"answer"),
        lambda: signing.verify_answer(answer, SERVER.public_key(), b"another"),
        lambda: signing.verify_answer(signing.Answer(404, answer.headers, request), SERVER.public_key(), b"answer"),
        lambda: signing.verify_answer(
            signing.Answer(200, answer.headers, signed(b"other")), SERVER.public_key(), b"answer"
        ),
        lambda: signing.verify_answer(signing.Answer(200, {}, request), SERVER.public_key(), b"answer"),
    ):
        with pytest.raises(SignatureError):
            wrong()


def test_an_answer_without_a_digest_does_not_stand_for_a_content() -> None:
    request = signed()
    answer = answered(request, None)
    signing.verify_answer(answer, SERVER.public_key(), None)
    with pytest.raises(SignatureError):
        signing.verify_answer(answer, SERVER.public_key(), b"anything")


# --- messages of our form, and the library ----------------------------------------------------------------------------

PATHS = st.text(st.sampled_from("azAZ09._~-!$&'()*+,;=:@/"), max_size=20).map(lambda t: f"/{t}")
QUERIES = st.none() | st.text(st.sampled_from("az09=&-._~:@/"), max_size=20)
BODIES = st.none() | st.binary(max_size=50)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["GET", "POST", "PUT"]), PATHS, QUERIES, BODIES, BODIES, st.sampled_from([200, 206, 404, 503]),
    st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._@ -]{0,30}\Z"),
)  # fmt: skip
def test_the_library_signs_the_same_and_holds_the_same_to_be_signed(
    method: str, path: str, query: str | None, body: bytes | None, content: bytes | None, status: int, name: str
) -> None:
    url = f"https://localhost:8443{path}{'' if query is None else f'?{query}'}"
    requests, answers = list[signing.Request](), list[signing.Answer]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signing.time, "time", lambda: 1.7e9)
        for do in (lambda f, *a: f(*a), by_library):
            request = signing.Request(method, url, httpx.Headers())
            do(signing.sign_request, KEY, name, request, "e.1.p.1", body)
            answer = signing.Answer(status, {}, request)
            do(signing.sign_answer, SERVER, answer, content)
            requests.append(request)
            answers.append(answer)
    for request, answer in zip(requests, answers, strict=True):
        assert _created(request.headers) == _created(requests[0].headers)
        assert set(answer.headers) == set(answers[0].headers)
        for do in (lambda f, *a, **k: f(*a, **k), by_library):
            assert do(signing.verify_request, request, lambda n: KEY.public_key(), content=body is not None) == (
                name, "e.1.p.1",
            )  # fmt: skip
            do(signing.verify_answer, answer, SERVER.public_key(), content)
            with pytest.raises(SignatureError):
                do(signing.verify_answer, answer, SERVER.public_key(), (content or b"") + b"x")


def _created(headers: Any) -> dict[str, str]:
    """Headers without the second in which they were signed, which the library takes from another clock."""
    return {n: re.sub(r"created=\d+", "", v) for n, v in headers.items() if n != "signature"}


def test_our_form_is_the_one_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise AssertionError("the library was asked")

    monkeypatch.setattr(signing.HTTPMessageSigner, "sign", broken)
    monkeypatch.setattr(signing.HTTPMessageVerifier, "verify", broken)
    for body in (None, b"", b"body"):
        request = signed(body)
        signing.verify_request(request, public, content=body is not None)
        signing.verify_answer(answered(request, body), SERVER.public_key(), body)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_passes_for_our_form_passes_with_the_library(data: st.DataObject) -> None:
    """Whatever is done to a signed message: if it is accepted, the library accepts it and reads the same out of it."""
    request = signed(data.draw(st.sampled_from([None, b"body"])))
    field = data.draw(st.sampled_from(["signature-input", "signature", "content-digest", "url", "method"]))
    text = getattr(request, field) if field in ("url", "method") else request.headers.get(field, "")
    at = data.draw(st.integers(0, len(text)))
    to = data.draw(st.integers(at, min(len(text), at + 3)))
    new = data.draw(st.text(st.sampled_from('aA0 ;,=:"()%?/\\\t@-'), max_size=3))
    text = text[:at] + new + text[to:]
    if field in ("url", "method"):
        setattr(request, field, text)
    else:
        request.headers[field] = text
    content = data.draw(st.booleans())
    try:
        plain = signing._plainly_verified(
            request, public, signing.REQUEST, signing._of_request(request), content=content
        )  # fmt: skip
    except SignatureError:
        with pytest.raises(SignatureError):
            by_library(signing.verify_request, request, public, content=content)
    else:
        if plain is not None and plain[1]:
            assert by_library(signing.verify_request, request, public, content=content) == plain


@pytest.mark.parametrize("created", ["00", "007", "-0"])
def test_a_second_that_is_not_written_as_it_should_be_is_refused_as_by_the_library(created: str) -> None:
    request = signed(None)
    parameters = re.sub(r"created=\d+", f"created={created}", request.headers["signature-input"].partition("=")[2])
    signature = KEY.sign(signing._base([f'"{c}"' for c in signing.REQUEST], ("POST", "/v1/call", "?a=b"), parameters))
    request.headers["signature-input"] = f"atoll={parameters}"
    request.headers["signature"] = f"atoll=:{signing.b64encode(signature).decode()}:"
    for do in (lambda f, *a, **k: f(*a, **k), by_library):
        with pytest.raises(SignatureError):
            do(signing.verify_request, request, public, content=False)


def test_a_header_that_is_there_twice_has_not_our_form() -> None:
    request = signed()
    for name in ("signature", "signature-input", "content-digest"):
        twice = httpx.Headers([*request.headers.multi_items(), (name, request.headers[name])])

        class Both:
            def items(self, twice: httpx.Headers = twice) -> Any:
                return twice.multi_items()

        given = signing.Request("POST", URL, Both())
        assert (
            signing._plainly_verified(given, public, signing.REQUEST, signing._of_request(given), content=True) is None
        )
        with pytest.raises(SignatureError):
            signing.verify_request(given, public, content=True)


# --- what is fresh ----------------------------------------------------------------------------------------------------


def test_a_number_is_taken_once_in_any_order() -> None:
    fresh = Fresh()
    taken = [fresh.take("a", f"{fresh.epoch}.1.p.{n}", alone=True) for n in (3, 1, 2, 3, 1)]
    assert taken == ["", "", "", "replay", "replay"]
    assert fresh.take("b", f"{fresh.epoch}.1.p.3", alone=True) == "", "every sender counts for itself"


def test_what_is_far_behind_is_a_replay_and_memory_is_bounded() -> None:
    fresh = Fresh()
    for n in range(1, 3 * signing.WINDOW):
        assert fresh.take("a", f"{fresh.epoch}.1.p.{n}", alone=False) == ""
    assert fresh.take("a", f"{fresh.epoch}.1.p.5", alone=False) == "replay"
    assert len(fresh._seen["a"][1, "p"].numbers) <= 2 * signing.WINDOW


def test_what_was_sent_to_an_earlier_life_of_the_server_is_void() -> None:
    before, after = Fresh(), Fresh()
    assert after.take("a", f"{before.epoch}.1.p.1", alone=True) == "epoch"


@pytest.mark.parametrize(
    "nonce", ["", "a.b", "E.x.p.1", "E.1.p.x", "E.1.p.-1", "E.1.p.1.2", "E.1.p.²", "E.1.p." + "9" * 30]
)
def test_what_is_no_number_is_refused(nonce: str) -> None:
    fresh = Fresh()
    assert fresh.take("a", nonce.replace("E", fresh.epoch), alone=True) in ("replay", "epoch")


def test_the_newest_program_of_a_site_is_heard_alone() -> None:
    fresh = Fresh()

    def take(life: int, process: str, n: int, alone: bool = True) -> str:
        return fresh.take("a", f"{fresh.epoch}.{life}.{process}.{n}", alone=alone)

    assert take(1, "p", 1) == ""
    assert take(1, "copy", 1) == "fenced", "a copy of the folder has counted as far"
    assert take(2, "q", 1) == "", "it was started again"
    assert take(1, "p", 2) == "fenced"
    assert take(2, "q", 2) == ""


def test_a_server_that_was_started_again_knows_which_program_of_a_site_is_the_newest() -> None:
    kept: dict[str, tuple[int, str]] = {}

    def take(fresh: Fresh, life: int, process: str) -> str:
        return fresh.take("a", f"{fresh.epoch}.{life}.{process}.1", alone=True)

    assert take(Fresh(kept, kept.__setitem__), 2, "p") == "" and kept == {"a": (2, "p")}
    again = Fresh(kept, kept.__setitem__)
    assert [take(again, 1, "q"), take(again, 2, "copy")] == ["fenced", "fenced"]
    assert take(again, 2, "p") == "", "the very program that was heard before"
    assert take(Fresh(kept, kept.__setitem__), 3, "r") == "" and kept == {"a": (3, "r")}


def test_a_program_is_not_heard_while_it_cannot_be_kept_that_it_is_the_newest() -> None:
    full = [True]

    def keep(key: str, process: tuple[int, str]) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")

    fresh = Fresh({"a": (1, "p")}, keep)
    for _ in range(2):
        with pytest.raises(OSError):
            fresh.take("a", f"{fresh.epoch}.2.q.1", alone=True)
    assert fresh.take("a", f"{fresh.epoch}.1.p.1", alone=True) == "", "the one before is still the newest"
    full[0] = False
    assert fresh.take("a", f"{fresh.epoch}.2.q.1", alone=True) == ""


def test_operators_may_have_several_programs() -> None:
    fresh = Fresh()
    sent = ((1, 1), (2, 1), (1, 2), (1, 1))
    taken = [fresh.take("a", f"{fresh.epoch}.{life}.p.{n}", alone=False) for life, n in sent]
    assert taken == ["", "", "", "replay"]


def test_a_sender_counts_up_and_tells_its_life() -> None:
    numbers = Numbers(7)
    numbers.epoch = "e"
    first, second = numbers.next().split("."), numbers.next().split(".")
    assert first[:2] == second[:2] == ["e", "7"] and first[2] == second[2] and (first[3], second[3]) == ("1", "2")
    assert Numbers(7).next().split(".")[2] != first[2]
