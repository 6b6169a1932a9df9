"""What is sealed is read by its receiver alone, and not a byte of it can be changed, moved or taken away unseen."""

import hashlib
import hmac
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from doors import ADDRESS, House, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoders import mutated
from test_transfers import CONTENT, SHA256, Breaking, hosted, summary, there

from atoll.net import calls, client, enrolment, sealing, server
from atoll.net.calls import Charter
from atoll.net.client import Client, Turned, Unreachable
from atoll.net.control import content_hash
from atoll.net.home import Home, Identity
from atoll.net.hub import Run
from atoll.net.keys import key_at
from atoll.net.news import News
from atoll.net.sealing import Answered, Asked, Begun, Opener, Sealer, SealError, Shared
from atoll.net.tunnel import Tunnel

IDENTITY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = bytes(range(32))
WORDS = [b"first", b"the second piece", b""]


def sealed(contents: list[bytes]) -> list[bytes]:
    sealer = Sealer(KEY)
    return [sealer.seal(c, last=i == len(contents) - 1) for i, c in enumerate(contents)]


PIECES = sealed(WORDS)


def opened(stream: bytes, *, at: int = 0) -> list[bytes]:
    opener = Opener(KEY)
    found = [*opener.take(stream[:at]), *opener.take(stream[at:])]
    opener.end()
    return found


# --- keys and pieces --------------------------------------------------------------------------------------------------


def derived(secret: bytes, salt: bytes, label: bytes) -> bytes:
    """HKDF-SHA256 of one block, written out (RFC 5869)."""
    key = hmac.digest(salt or bytes(32), secret, hashlib.sha256)
    return hmac.digest(key, label + b"\x01", hashlib.sha256)


def test_the_form_is_the_one_that_is_written_down() -> None:
    private, server = sealing.sealing_key(IDENTITY), IDENTITY.public_key()
    assert private.private_bytes_raw() == derived(IDENTITY.private_bytes_raw(), b"", b"atoll sealing 1 key")
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
    wrapped = suite.encrypt(
        bytes(32), private.public_key(), info=b"atoll sealing 1 wrapped" + server.public_bytes_raw()
    )
    shared = Shared.opened(wrapped, private, server)
    assert shared.request_key() == derived(bytes(32), wrapped, b"atoll sealing 1 request")
    assert shared.answer_key(b"s" * 32) == derived(bytes(32), wrapped + b"s" * 32, b"atoll sealing 1 answer")
    cipher = ChaCha20Poly1305(KEY)
    for number, (content, piece) in enumerate(zip(WORDS, PIECES, strict=True)):
        last = number == 2
        secret = cipher.encrypt(number.to_bytes(11, "big") + bytes([last]), content, None)
        assert piece == (len(secret) | last << 31).to_bytes(4, "big") + secret


@pytest.mark.parametrize("at", [0, 1, 3, 4, 30, len(b"".join(PIECES))])
def test_pieces_are_opened_however_they_are_cut(at: int) -> None:
    assert opened(b"".join(PIECES), at=at) == WORDS


def test_a_long_content_is_cut_into_pieces_of_the_length_that_was_announced() -> None:
    for length in (0, 1, sealing.PIECE, sealing.PIECE + 1, 2 * sealing.PIECE):
        pieces = list(Sealer(KEY).all(bytes(length), last=True))
        assert sum(map(len, pieces)) == sealing.sealed_length(length) and b"".join(opened(b"".join(pieces))) == bytes(
            length
        )


A, B, C = PIECES
OTHER = sealed([b"first", b"another", b""])[1]
EMPTY = sealed([b"first", b"", b""])[1]
FORGED: dict[str, tuple[bytes, str]] = {
    "a bit of a content": (A[:-1] + bytes([A[-1] ^ 1]) + B + C, "altered"),
    "the mark of the last taken away": (A + B + bytes([C[0] ^ 128]) + C[1:], "limit"),
    "the mark of the last set": (A + bytes([B[0] ^ 128]) + B[1:], "altered"),
    "a piece left out": (A + C, "altered"),
    "a piece twice": (A + A + B + C, "altered"),
    "another order": (B + A + C, "altered"),
    "the end before its time": (C, "altered"),
    "no end": (A + B, "truncated"),
    "half a piece": (A + B[:-3], "truncated"),
    "nothing": (b"", "truncated"),
    "something behind": (A + B + C + A, "behind"),
    "a byte behind": (A + B + C + b"x", "behind"),
    "a piece too long": (A + (2**30).to_bytes(4, "big"), "limit"),
    "a piece too short": (A + (3).to_bytes(4, "big") + b"abc", "limit"),
    "an empty piece that is not the last": (A + EMPTY + C, "limit"),
}


@pytest.mark.parametrize("what", FORGED)
def test_whatever_is_not_the_next_piece_is_refused_by_name(what: str) -> None:
    stream, fault = FORGED[what]
    for at in range(0, len(stream) + 1, 7):
        with pytest.raises(SealError) as refused:
            opened(stream, at=at)
        assert refused.value.fault == fault


def test_a_piece_of_another_message_under_the_same_key_would_be_taken_and_keys_are_therefore_drawn_anew() -> None:
    assert opened(A + OTHER + C)[1] == b"another"
    keys = {Shared.drawn(sealing.sealing_key(IDENTITY).public_key(), IDENTITY.public_key()).request_key()
            for _ in range(3)}  # fmt: skip
    assert len(keys) == 3


@settings(max_examples=150)
@given(st.binary(max_size=200) | st.tuples(st.integers(0, 2**9), st.integers(0, 255), st.integers(0, 2)))
def test_any_bytes_give_a_beginning_of_what_was_sealed_or_an_error(how: Any) -> None:
    whole = b"".join(PIECES)
    if isinstance(how, bytes):
        stream = how
    else:
        at, byte, kind = how[0] % len(whole), bytes([how[1]]), how[2]
        stream = (whole[:at] + byte + whole[at + 1 :], whole[:at], whole[:at] + byte + whole[at:])[kind]
    opener, found = Opener(KEY), list[bytes]()
    try:
        for i in range(0, len(stream), 11):
            found += opener.take(stream[i : i + 11])
        opener.end()
    except SealError:
        assert found == WORDS[: len(found)]
    else:
        assert stream == whole


def test_a_claimed_length_holds_nothing_back() -> None:
    opener = Opener(KEY)
    with pytest.raises(SealError, match="claims"):
        opener.take((sealing.PIECE + 17).to_bytes(4, "big"))
    assert not opener._had
    with pytest.raises(SealError, match="claims"):
        opener.take(b"".join(PIECES))


def test_the_head_of_a_stranger_takes_no_more_room_than_a_head_has() -> None:
    begun = Begun(2, lambda start: KEY)
    assert begun.take(b"xx" + (sealing.HEAD + sealing.TAG).to_bytes(4, "big")) == []
    with pytest.raises(SealError, match="claims") as refused:
        Begun(2, lambda start: KEY).take(b"xx" + (sealing.HEAD + sealing.TAG + 1).to_bytes(4, "big"))
    assert refused.value.fault == "limit"
    sealer = Sealer(KEY)
    stream = b"xx" + sealer.seal(b"head") + sealer.seal(bytes(sealing.PIECE), last=True)
    assert Begun(2, lambda start: KEY).take(stream) == [b"head", bytes(sealing.PIECE)], "of the head alone"


def test_a_link_that_is_just_fast_enough_brings_a_piece_before_it_is_cut_off() -> None:
    assert sealing.sealed_length(sealing.PIECE) <= server.SLOWEST * server.STALL


def test_the_sealing_key_is_the_servers_word() -> None:
    told, other = sealing.told_key(IDENTITY), Ed25519PrivateKey.generate()
    key = sealing.key_told(told, IDENTITY.public_key())
    assert key == sealing.sealing_key(IDENTITY).public_key() and len(told) == sealing.TOLD
    changed = told[:3] + bytes([told[3] ^ 1]) + told[4:]
    for bad, of in (
        (told, other),
        (changed, IDENTITY),
        (told[:-1], IDENTITY),
        (told + b"x", IDENTITY),
        (b"", IDENTITY),
    ):
        with pytest.raises(SealError, match="signed"):
            sealing.key_told(bad, of.public_key())


def test_a_request_is_opened_by_its_receiver_alone() -> None:
    key, server = sealing.sealing_key(IDENTITY), IDENTITY.public_key()
    wrapped = Shared.drawn(key.public_key(), server).wrapped
    assert len(wrapped) == sealing.WRAPPED
    others = [
        (wrapped, X25519PrivateKey.generate(), server), (wrapped, key, Ed25519PrivateKey.generate().public_key()),
        (wrapped[:-1], key, server), (wrapped + b"x", key, server), (bytes(80), key, server), (b"", key, server),
    ]  # fmt: skip
    for words, with_, of in others:
        with pytest.raises(SealError) as refused:
            Shared.opened(words, with_, of)
        assert refused.value.fault == "key"


GOOD = {"method": "GET", "target": "/v1/x?y=1", "headers": [("a-b", "c d"), ("e", "")]}


@settings(max_examples=100)
@given(st.binary(max_size=60) | mutated(msgspec.json.encode(GOOD)))
@pytest.mark.parametrize("kind", [Asked, Answered])
def test_heads_that_are_none(kind: Any, content: bytes) -> None:
    try:
        found = sealing.head(kind, content)
    except SealError:
        return
    assert found == sealing.head(kind, msgspec.json.encode(found)) and kind is Asked


@pytest.mark.parametrize(
    "change",
    [
        {"method": "get"}, {"method": "GET /"}, {"target": "v1"}, {"target": "/v1 x"}, {"target": "/\r\n"},
        {"headers": [("Host", "x")]}, {"headers": [("a", "b\r\nc: d")]}, {"headers": [("a b", "c")]},
        {"headers": [("a", " b")]}, {"headers": [("a", "b")] * 101}, {"headers": [("a", "b" * 2**14)]}, {"more": 1},
        {"headers": [("a", "é")]},
    ],
)  # fmt: skip
def test_a_head_that_http_would_refuse_is_refused(change: dict[str, Any]) -> None:
    assert sealing.head(Asked, msgspec.json.encode(GOOD)).target == "/v1/x?y=1"
    with pytest.raises(SealError):
        sealing.head(Asked, msgspec.json.encode(GOOD | change))


@pytest.mark.parametrize("told", [["1", "2"], ["-1"], ["1_0"], ["²"], ["x"], ["9" * 19], [""]])
def test_a_length_is_said_once_and_is_a_number(told: list[str]) -> None:
    with pytest.raises(SealError, match="one length"):
        _ = Asked("PUT", "/", [("content-length", v) for v in told]).length


# --- a proxy between --------------------------------------------------------------------------------------------------


class Proxy(httpx.AsyncBaseTransport):
    """Sees all that goes by, and may change it.

    Attributes:
        seen: what went by, both ways, line and headers included.
    """

    def __init__(self, house: House) -> None:
        self._inner = httpx.ASGITransport(app=house.door.app, client=("10.0.0.9", 5))
        self.seen = b""
        self.requests: list[bytes] = []
        self.answers: list[bytes] = []
        self.on_request: Callable[[bytes], bytes] = lambda body: body
        self.on_answer: Callable[[bytes], bytes] = lambda body: body

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        if request.url.path == sealing.PATH:
            assert str(len(body)) == request.headers["content-length"]
            self.requests.append(body)
            body = self.on_request(body)
        kept = {n: v for n, v in request.headers.items() if n != "content-length"}
        passed = httpx.Request(request.method, request.url, headers=kept, content=body)
        answer = await self._inner.handle_async_request(passed)
        given = await answer.aread()
        if request.url.path == sealing.PATH and answer.status_code == 200:
            self.answers.append(given)
            given = self.on_answer(given)
        heads = [request.headers.raw, answer.headers.raw]
        self.seen += str(request.url).encode() + b"".join(n + v for head in heads for n, v in head) + body + given
        return httpx.Response(answer.status_code, headers=answer.headers, stream=httpx.ByteStream(given))


def hosting(house: House) -> None:
    folder = house.folder / "server" / "runs" / "r"
    for name in ("task", "uploads"):
        (folder / name).mkdir(parents=True)
    made = Run(folder, Charter("r", "0" * 64, {}), News(), lambda name: False, house.hub.state)
    made.summary = summary()
    house.hub.runs["r"] = made
    (folder / "task" / SHA256).write_bytes(CONTENT)


@pytest.fixture
def house(tmp_path: Path, unsynced: None, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr(client, "CHUNK", 4000)
    monkeypatch.setattr(sealing, "PIECE", 1500)
    made = House(tmp_path, proxied=True)
    hosting(made)
    return made


def behind(house: House, proxy: httpx.AsyncBaseTransport, name: str = "s") -> Client:
    """A member whose requests go through a proxy."""
    made, base = house.client(name), f"https://{ADDRESS}"
    outer = httpx.AsyncClient(transport=proxy, base_url=base)
    made._http = httpx.AsyncClient(transport=Tunnel(outer, house.homes[name].server), base_url=base)
    return made


def shows(seen: bytes) -> list[bytes]:
    """What of a transfer and its signature is to be found."""
    parts = [CONTENT[i : i + 16] for i in range(0, len(CONTENT), 16)]
    words = [SHA256.encode(), b"/v1/uploads", b"/v1/objects", b"keyid", b"content-digest", b"offset", b"/r/"]
    return [p for p in (*parts, *words) if p in seen]


def test_a_proxy_sees_nothing_of_what_goes_up_and_down(house: House, tmp_path: Path) -> None:
    proxy = Proxy(house)

    async def both(line: Client) -> bytes:
        await line.upload("r", CONTENT, SHA256)
        return bytes(await line.fetch("r", SHA256, limit=10_000))

    assert run(both(behind(house, proxy))) == CONTENT and there(house) == CONTENT
    assert not shows(proxy.seen) and len(proxy.seen) > 2 * len(CONTENT)
    (tmp_path / "open").mkdir()
    other = House(tmp_path / "open")
    hosting(other)
    control, line = Proxy(other), other.client("s")
    line._http = httpx.AsyncClient(transport=control, base_url=f"https://{ADDRESS}")
    assert run(both(line)) == CONTENT
    assert len(shows(control.seen)) > len(CONTENT) / 16, "the search finds what is not sealed"


def test_what_is_not_sealed_is_not_heard_behind_a_proxy(house: House) -> None:
    for method, path in (
        ("POST", "/v1/call"), ("POST", "/v1/message"), ("PUT", f"/v1/uploads/r/{SHA256}?size=1&offset=0"),
        ("POST", "/v1/enrol"), ("GET", f"/v1/objects/r/{SHA256}"), ("GET", "/"),
    ):  # fmt: skip
        answer = run(house.send("s", b"x", path=path, method=method))
        assert answer.status_code == 403 and b"sealed requests alone" in answer.content

    async def told() -> list[int]:
        async with house.http() as http:
            return [(await http.get(p)).status_code for p in ("/v1/authority", "/v1/sealing")]

    assert run(told()) == [200, 200]
    assert run(house.send("s", b"x", method="PUT", path="/v1/sealed")).status_code in (400, 421)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("every", [2, 3, 5])
def test_transfers_are_taken_up_where_they_broke_off(house: House, every: int, after: bool) -> None:
    async def both() -> bytes:
        line = behind(house, Breaking(httpx.ASGITransport(app=house.door.app), every, after))
        await line.upload("r", CONTENT, SHA256)
        return bytes(await line.fetch("r", SHA256, limit=10_000))

    assert run(both()) == CONTENT and there(house) == CONTENT


def split(body: bytes, start: int) -> list[bytes]:
    """The start of a message, and its pieces."""
    found, at = [body[:start]], start
    while at < len(body):
        end = at + 4 + int.from_bytes(body[at : at + 4], "big") % 2**31
        found.append(body[at:end])
        at = end
    return found


def flipped(body: bytes, at: int) -> bytes:
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


REQUESTS: dict[str, tuple[Callable[[list[bytes], bytes], bytes], str]] = {
    "the wrapped secret": (lambda p, b: flipped(b, 40), "changed on the way"),
    "the head": (lambda p, b: flipped(b, 100), "changed on the way"),
    "the end of the content": (lambda p, b: flipped(b, len(b) - 1), "something on the way changed it"),
    "cut off": (lambda p, b: b[:-7], "cut off on the way"),
    "without the last piece": (lambda p, b: b"".join(p[:-1]), "cut off|shorter"),
    "without a piece": (lambda p, b: b"".join([*p[:2], *p[3:]]), "something on the way changed it"),
    "in another order": (lambda p, b: b"".join([*p[:2], p[3], p[2], *p[4:]]), "something on the way changed it"),
    "a piece twice": (lambda p, b: b"".join([*p[:3], p[2], *p[3:]]), "changed it|behind the end"),
    "something behind": (lambda p, b: b + p[1], "behind the end"),
    "nothing": (lambda p, b: b"", "changed on the way"),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_a_request_that_a_proxy_changed_is_refused_by_name_and_nothing_wrong_is_kept(house: House, what: str) -> None:
    change, told = REQUESTS[what]
    proxy = Proxy(house)
    proxy.on_request = lambda body: change(split(body, sealing.WRAPPED), body)
    with pytest.raises(Unreachable, match=told):
        run(behind(house, proxy).upload("r", CONTENT, SHA256))
    kept = there(house)
    assert kept == CONTENT[: len(kept)] and len(kept) < len(CONTENT)
    proxy.on_request = lambda body: body
    run(behind(house, proxy).upload("r", CONTENT, SHA256))
    assert there(house) == CONTENT, "what had come well was gone on with"


ANSWERS: dict[str, tuple[Callable[[list[bytes], bytes], bytes], str]] = {
    "the salt": (lambda p, b: flipped(b, 3), "changed it"),
    "the head": (lambda p, b: flipped(b, 50), "changed it"),
    "the content": (lambda p, b: flipped(b, len(b) - 30), "changed it"),
    "cut off": (lambda p, b: b[:-7], "cut off"),
    "without the end": (lambda p, b: b"".join(p[:-1]), "cut off"),
    "in another order": (lambda p, b: b"".join([*p[:-2], p[-1], p[-2]]), "changed it"),
    "nothing": (lambda p, b: b"", "cut off"),
    "words of its own": (lambda p, b: b"<html>" * 40, "at most|changed it"),
    "something behind": (lambda p, b: b + p[1], "behind the end"),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_an_answer_that_a_proxy_changed_is_refused_by_name(house: House, what: str) -> None:
    change, told = ANSWERS[what]
    proxy = Proxy(house)
    proxy.on_answer = lambda body: change(split(body, sealing.SALT), body)
    with pytest.raises(Unreachable, match=told):
        run(behind(house, proxy).fetch("r", SHA256, limit=10_000))


def test_an_answer_to_another_request_is_refused(house: House) -> None:
    proxy = Proxy(house)

    async def swapped() -> None:
        line = behind(house, proxy, "admin")
        await line.call(calls.ListMembers())
        proxy.on_answer = lambda body: proxy.answers[0]
        await line.call(calls.ListMembers())

    with pytest.raises(Unreachable, match="something on the way changed it"):
        run(swapped())


def test_a_request_that_comes_again_is_refused_and_its_two_answers_share_no_key(house: House) -> None:
    proxy = Proxy(house)

    async def replayed() -> Any:
        line = behind(house, proxy, "admin")
        await line.call(calls.ListMembers())
        proxy.on_request = lambda body: proxy.requests[-2]
        return await line.call(calls.ListMembers())

    with pytest.raises(Unreachable):
        run(replayed())
    assert any(isinstance(e, enrolment.Refused) and "replay" in e.why for e in house.hub.roster.entries())
    first, second = proxy.answers[-2:]
    assert first[: sealing.SALT] != second[: sealing.SALT]


def test_a_proxy_that_answers_in_the_servers_place_is_named(house: House) -> None:
    class Down(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(502, content=b"<html>bad gateway")

    with pytest.raises(Unreachable, match="a proxy in front of the server answered in its place, with status 502"):
        run(behind(house, Down()).call(calls.Agenda(-1, {})))


def test_a_proxy_that_shows_a_sealing_key_of_its_own_gets_nothing(house: House) -> None:
    sent = list[str]()

    class Own(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            sent.append(request.url.path)
            return httpx.Response(200, stream=httpx.ByteStream(sealing.told_key(Ed25519PrivateKey.generate())))

    with pytest.raises(Unreachable, match="not one that the server signed"):
        run(behind(house, Own()).call(calls.Agenda(-1, {})))
    assert sent == ["/v1/sealing"]


# --- at the door ------------------------------------------------------------------------------------------------------


def knocked(house: House, asked: dict[str, Any], contents: list[bytes]) -> tuple[int, bytes]:
    """One sealed request made by hand: status, and what was answered."""
    server = house.homes["s"].server
    shared = Shared.drawn(sealing.sealing_key(key_at(house.folder / "server" / "key")).public_key(), server)
    sealer, parts = Sealer(shared.request_key()), [msgspec.json.encode(asked), *contents]
    body = shared.wrapped + b"".join(sealer.seal(p, last=i == len(parts) - 1) for i, p in enumerate(parts))

    async def once() -> httpx.Response:
        async with house.http() as http:
            return await http.post(sealing.PATH, content=body)

    answer = run(once())
    if answer.status_code != 200:
        return answer.status_code, answer.content
    opener = Opener(shared.answer_key(answer.content[: sealing.SALT]))
    begin, *content = opener.take(answer.content[sealing.SALT :])
    opener.end()
    return sealing.head(Answered, begin).status, b"".join(content)


def test_what_is_sealed_is_looked_at_like_anything_else(house: House) -> None:
    good = {"method": "POST", "target": "/v1/call", "headers": [("content-length", "2")]}
    assert knocked(house, good, [b"{}"]) == (401, b"the signature is missing or wrong.")
    assert knocked(house, {"method": "GET", "target": "/v1/authority", "headers": []}, []) == (200, house.authority)
    assert knocked(house, good | {"target": "/v1/sealed"}, [b"{}"])[0] == 404, "once is enough"
    assert knocked(house, good | {"target": "/v2"}, [b"{}"])[0] == 404
    assert knocked(house, {"method": "get"}, [])[0] == 400


def test_a_content_is_as_long_as_its_head_says(house: House) -> None:
    """Of a newcomer, whose content is read before anything is known of it."""

    def head(length: str) -> dict[str, Any]:
        return {"method": "POST", "target": "/v1/enrol", "headers": [("content-length", length)]}

    assert knocked(house, head("5"), [b"abcde"]) == (401, b"not the request of a newcomer.")
    for length, contents, told in (
        ("5", [b"abcdef"], b"longer"), ("5", [b"abc", b"def"], b"longer"), ("5", [b"abcde", b"f"], b"longer"),
        ("9", [b"abcde"], b"shorter"), ("20000", [b"x"], b"at most 16384"),
    ):  # fmt: skip
        status, text = knocked(house, head(length), contents)
        assert status in (400, 413) and told in text
    assert knocked(house, head("1_0"), [b"x"])[0] == 400


@pytest.mark.usefixtures("unsynced")
def test_strangers_have_budgets_of_their_own_behind_a_proxy(tmp_path: Path) -> None:
    house = House(tmp_path, proxied=True)

    async def statuses(address: str, number: int) -> list[int]:
        async with house.http() as http:
            told = {"x-forwarded-for": f"1.1.1.1, {address}"} if address else {}
            return [(await http.get("/v1/authority", headers=told)).status_code for _ in range(number)]

    assert set(run(statuses("192.0.2.1", 30))) == {200} and run(statuses("192.0.2.1", 1)) == [503]
    assert run(statuses("192.0.2.2", 1)) == [200] and run(statuses("", 1)) == [200]
    assert set(run(statuses("2001:db8::1", 30))) == {200} and run(statuses("2001:db8::2", 1)) == [503]
    assert run(statuses("no address", 1)) == [200]
    assert len(house.door._tries) == 4
    assert set(run(statuses("::ffff:192.0.2.3", 30))) == {200} and run(statuses("192.0.2.3", 1)) == [503]
    assert run(statuses("::ffff:192.0.2.4", 1)) == [200], "IPv4 as a socket of both kinds shows it"
    house.door._tries = {str(i): (1.0, 1e12) for i in range(10_001)}
    for i in range(5):
        run(statuses(f"192.0.2.{i}", 1))
    assert len(house.door._tries) == 10_002, "addresses that are made up take no more room"


@pytest.mark.usefixtures("unsynced")
def test_without_a_proxy_nobodys_word_for_its_address_is_heard(tmp_path: Path) -> None:
    house = House(tmp_path)

    async def statuses() -> list[int]:
        async with house.http() as http:
            return [
                (await http.get("/v1/authority", headers={"x-forwarded-for": f"192.0.2.{i}"})).status_code
                for i in range(31)
            ]

    assert run(statuses())[-1] == 503 and len(house.door._tries) == 1


def test_a_newcomer_shows_its_token_to_the_server_alone(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, trusted = Proxy(house), list[Any]()

    def line(address: str, context: Any, sealed: Any = None) -> httpx.AsyncClient:
        trusted.append((context.verify_mode.name, context.check_hostname))
        outer = httpx.AsyncClient(transport=proxy, base_url=f"https://{address}")
        if sealed is None:
            return outer
        return httpx.AsyncClient(transport=Tunnel(outer, sealed), base_url=f"https://{address}")

    monkeypatch.setattr(client, "line", line)
    word = run(house.hub.call(house.hub.roster.members["admin"], calls.MakeInvites(["new"], "site", 1.0))).words[0]
    invite = enrolment.decode(word)
    assert invite.proxy
    proxy.on_request = lambda body: flipped(body, len(body) - 1)
    with pytest.raises(Unreachable, match="something on the way changed it"):
        run(client.join(invite, tmp_path / "new"))
    proxy.on_request, trusted[:] = (lambda body: body), ()
    home: Home = run(client.join(invite, tmp_path / "new"))
    assert home.identity == Identity("new", "site", ADDRESS, house.fingerprint, True)
    assert (
        invite.token.encode() not in proxy.seen
        and b"new" not in proxy.seen
        and trusted == [("CERT_REQUIRED", True)] * 2
    )
    with pytest.raises(Turned, match="used already"):
        run(client.join(invite, tmp_path / "second"))


def test_random_contents_go_through_as_they_are(house: House) -> None:
    (hosted(house).folder / "task").joinpath(SHA256).unlink()
    for length in (1, 1499, 1500, 1501, 4000, 9999):
        content = os.urandom(length)
        mark = content_hash(content)
        (hosted(house).folder / "task" / mark).write_bytes(content)
        assert run(behind(house, Proxy(house)).fetch("r", mark, limit=10_000)) == content
        run(behind(house, Proxy(house)).upload("r", content, mark))
        assert hosted(house).upload("s", mark).read_bytes() == content
