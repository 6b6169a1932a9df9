"""Who is heard at the door, with what, and what everybody else is told."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from doors import ADDRESS, NAMES, House, problem, run

from atoll.errors import RunError
from atoll.net import calls, client, control, enrolment, server
from atoll.net.calls import ROLES, Charter, Done
from atoll.net.client import Turned, Unreachable
from atoll.net.home import home_for, settle
from atoll.net.hub import Hub
from atoll.net.keys import key_at, public_text
from atoll.net.server import Door
from atoll.net.state import State

pytestmark = pytest.mark.usefixtures("unsynced")

CHARTER = Charter("r", "0" * 64, {})
CALLS: dict[str, calls.Call] = {
    type(c).__name__: c
    for c in (
        calls.Agenda(-1, {}), calls.Statistic("r", "survey", "{}"), calls.MakeInvites(["x"], "site", 1.0),
        calls.Revoke("t"), calls.ListMembers(), calls.Submit(CHARTER, ""), calls.ListRuns(),
        calls.Control("r", "pause"), calls.Watch("r", -1),
    )
}  # fmt: skip


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture
def listening(house: House, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What got through to the hub."""
    heard: list[tuple[str, Any]] = []

    async def call(member: Any, call: Any) -> Any:
        heard.append((member.name, call))
        return Done()

    monkeypatch.setattr(house.hub, "call", call)
    return heard


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", CALLS)
def test_every_role_may_make_its_calls_and_no_other(
    house: House, listening: list[tuple[str, Any]], name: str, call: str
) -> None:
    answer = run(house.send(name, calls.encode(CALLS[call])))
    if NAMES[name] in ROLES[type(CALLS[call])]:
        assert answer.status_code == 200 and listening == [(name, CALLS[call])]
    else:
        assert answer.status_code == 403 and problem(answer).kind == "role" and not listening


def test_the_table_has_every_call_and_its_answer() -> None:
    assert set(ROLES) == set(calls.REPLIES) == {type(c) for c in CALLS.values()}


@pytest.mark.parametrize("name", [n for n, role in NAMES.items() if role != "site"])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/message", control.encode(control.Ask("r", "s"))),
        ("GET", f"/v1/objects/r/{'0' * 64}", b""),
        ("PUT", f"/v1/uploads/r/{'0' * 64}?size=1&offset=0", b"x"),
    ],
)
def test_rounds_are_for_sites(house: House, name: str, method: str, path: str, body: bytes) -> None:
    answer = run(house.send(name, body, path=path, method=method))
    assert answer.status_code == 403 and problem(answer).kind == "role"


# --- who is not heard -------------------------------------------------------------------------------------------------


def test_a_wrong_key_an_unknown_name_and_no_signature_are_turned_away(house: House, listening: list[Any]) -> None:
    body = calls.encode(calls.ListRuns())
    stranger = Ed25519PrivateKey.generate()

    async def knock() -> None:
        assert (await house.send("admin", body, key=stranger)).status_code == 401
        assert (await house.send("admin", body, key=house.key("r"))).status_code == 401, "another member's key"
        house.homes["nobody"] = house.homes["r"]
        assert (await house.send("nobody", body)).status_code == 401
        async with house.http() as http:
            assert (await http.post("/v1/call", content=body)).status_code == 401

    run(knock())
    assert not listening


def test_a_replay_is_refused_and_kept_for_the_audit(house: House, listening: list[Any]) -> None:
    body, nonce = calls.encode(calls.ListRuns()), f"{house.door.fresh.epoch}.1.p.1"

    async def knock() -> None:
        assert (await house.send("admin", body, nonce=nonce)).status_code == 200
        again = await house.send("admin", body, nonce=nonce)
        assert again.status_code == 409 and problem(again).kind == "replay"

    run(knock())
    assert len(listening) == 1
    assert any(isinstance(e, enrolment.Refused) and "replay" in e.why for e in house.hub.roster.entries())


def test_whoever_is_refused_is_told_so_although_the_roster_cannot_be_written(
    house: House, listening: list[Any]
) -> None:
    body, nonce = calls.encode(calls.ListRuns()), f"{house.door.fresh.epoch}.1.p.1"
    with house.hub.state.engine.begin() as line:
        line.exec_driver_sql("UPDATE atoll_journals SET records = 1")

    async def knock() -> None:
        assert (await house.send("admin", body, nonce=nonce)).status_code == 200
        assert (await house.send("admin", body, nonce=nonce)).status_code == 409

    run(knock())


def test_a_request_to_an_earlier_life_of_the_server_is_told_the_epoch(house: House, listening: list[Any]) -> None:
    answer = run(house.send("admin", calls.encode(calls.ListRuns()), nonce="old.1.p.1"))
    assert problem(answer) == calls.Problem("epoch", "sign with this epoch.", house.door.fresh.epoch)
    assert not listening

    async def call() -> Any:
        return await house.client("admin").call(calls.ListRuns())

    with pytest.raises(Unreachable):  # the stub's answer is of another kind; what matters is that it was heard
        run(call())
    assert len(listening) == 1


def test_the_older_of_two_programs_of_a_site_is_told_so(house: House, listening: list[Any]) -> None:
    async def both() -> None:
        first, second = house.client("s"), house.client("s")
        for each in (first, second, first):
            try:
                await each.call(calls.Agenda(-1, {}))
            except Unreachable:
                continue

    with pytest.raises(Turned, match="another program"):
        run(both())


def test_who_is_let_in_again_under_its_old_name_is_heard(house: House, tmp_path: Path) -> None:
    run(house.client("s").call(calls.Agenda(-1, {})))
    house.hub.roster.revoke("s", by="admin", now=2.0)
    token = house.hub.roster.invite("s", "site", hours=1, by="admin", now=3.0)
    (tmp_path / "again").mkdir()
    key = key_at(tmp_path / "again" / "key", make=True)
    house.hub.roster.enrol("s", public_text(key.public_key()), token, now=4.0)
    house.homes["s"] = settle(tmp_path / "again", house.homes["s"].identity, house.authority)
    assert run(house.client("s").call(calls.Agenda(-1, {}))).runs == []


def test_who_was_shut_out_is_told_so_and_others_are_not(house: House) -> None:
    house.hub.roster.revoke("s", by="admin", now=2.0)
    body = calls.encode(calls.Agenda(-1, {}))
    answer = run(house.send("s", body))
    assert answer.status_code == 403 and problem(answer).kind == "revoked"
    assert run(house.send("s", body, key=Ed25519PrivateKey.generate())).status_code == 401


def test_a_site_that_speaks_for_another_is_refused_by_the_coordinators_rule(house: House) -> None:
    """The signature's name is what counts: the run is asked with it, whatever the message claims."""
    heard: list[str] = []

    class Run:
        async def receive(self, site: str, message: Any) -> Any:
            heard.append(site)
            return control.Wait("r", 0, None)

    house.hub.runs["r"] = Run()  # type: ignore[assignment]
    answer = run(house.send("s", control.encode(control.Ask("r", "t")), path="/v1/message"))
    assert answer.status_code == 200 and heard == ["s"]


# --- how much is heard ------------------------------------------------------------------------------------------------


async def endless(taken: list[int]) -> AsyncIterator[bytes]:
    while True:
        taken.append(1)
        assert len(taken) < 100, "the server reads what it should have refused"
        yield b"x" * 2**16


@pytest.mark.parametrize("length", [str(calls.LONGEST + 1), str(10**18 - 1), "", "-1", "1e3", "9" * 40])
def test_a_content_that_says_it_is_too_long_is_not_read(house: House, listening: list[Any], length: str) -> None:
    taken: list[int] = []
    answer = run(house.send("admin", b"{}", sent=endless(taken), headers={"content-length": length}))
    assert answer.status_code in (413, 422) and len(taken) < 3 and not listening


def test_a_content_that_is_not_the_signed_one_is_refused(house: House, listening: list[Any]) -> None:
    body = calls.encode(calls.ListRuns())
    answer = run(house.send("admin", body, sent=body[:-1] + b" "))
    assert answer.status_code == 401 and problem(answer).kind == "signature" and not listening


def test_a_content_that_does_not_get_on_is_cut_off(
    house: House, listening: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "STALL", 0.05)

    async def stuck() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(30.0)

    answer = run(house.send("admin", b"{}", sent=stuck(), headers={"content-length": "2"}))
    assert answer.status_code == 408 and problem(answer).kind == "slow" and not listening


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\x80\x04.", b'{"type":"King"}', b'{"type":"ListRuns","x":1}', b"[" * 10**5]
)
def test_what_is_no_call_is_refused(house: House, listening: list[Any], body: bytes) -> None:
    answer = run(house.send("admin", body))
    assert answer.status_code == 422 and problem(answer).kind == "argument" and not listening


def test_strangers_have_a_small_budget_and_members_do_not_need_it(house: House, listening: list[Any]) -> None:
    async def flood() -> list[int]:
        async with house.http() as http:
            statuses = [(await http.post("/v1/call", content=b"{}")).status_code for _ in range(50)]
            statuses.append((await http.get("/v1/authority")).status_code)
        assert (await house.send("admin", calls.encode(calls.ListRuns()))).status_code == 200
        return statuses

    statuses = run(flood())
    assert 25 < statuses.count(401) < 45 and statuses[-1] == 503


@pytest.mark.parametrize("name", ["../key", "..%2fkey", "key", "0" * 63, "A" * 64, "0" * 64 + "/../../key"])
def test_no_path_leads_out_of_a_runs_objects(house: House, name: str) -> None:
    class Run:
        folder = house.folder / "server" / "runs" / "r"

    (Run.folder / "objects").mkdir(parents=True)
    house.hub.runs["r"] = Run()  # type: ignore[assignment]
    for method, query in (("GET", ""), ("PUT", "?size=1&offset=0")):
        path = f"/v1/{'objects' if method == 'GET' else 'uploads'}/r/{name}{query}"
        answer = run(house.send("s", b"x", path=path, method=method))
        assert answer.status_code in (404, 422, 405) and b"PRIVATE" not in answer.content


def test_refusals_do_not_fill_the_log(house: House) -> None:
    """Neither lengths nor names that a sender chooses make a refusal another one."""
    before = len(list(house.hub.roster.entries()))

    async def knock() -> None:
        for i in range(20):
            over = str(control.LONGEST + i)
            assert (await house.send("s", b"x", sent=b"x", headers={"content-length": over})).status_code == 413
            key = Ed25519PrivateKey.generate()
            body = calls.Enrol(f"n{i}", public_text(key.public_key()), "x" * 43)
            assert (await knocks(house, body, key)).status_code == 403

    run(knock())
    refused = [e for e in house.hub.roster.entries() if isinstance(e, enrolment.Refused)]
    assert len(refused) == 2 and len(list(house.hub.roster.entries())) <= before + 2


def test_one_member_cannot_take_all_of_the_servers_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "AT_ONCE", 3)
    held = asyncio.Event()

    async def call(member: Any, call: Any) -> Any:
        if member.name == "s":
            await held.wait()
        return Done()

    monkeypatch.setattr(house.hub, "call", call)
    body = calls.encode(calls.Agenda(-1, {}))

    async def ask() -> None:
        nonces = [f"{house.door.fresh.epoch}.1000.p.{i}" for i in range(5)]
        asked = [asyncio.ensure_future(house.send("s", body, nonce=n)) for n in nonces[:4]]
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        assert [problem(d.result()).kind for d in done] == ["busy"]
        assert (await house.send("t", body)).status_code == 200
        held.set()
        assert sorted(a.status_code for a in await asyncio.gather(*asked)) == [200, 200, 200, 503]
        assert (await house.send("s", body, nonce=nonces[4])).status_code == 200

    run(ask())


# --- newcomers --------------------------------------------------------------------------------------------------------


async def knocks(house: House, body: calls.Enrol, key: Ed25519PrivateKey) -> Any:
    return await house.send(body.name, calls.encode(body), path="/v1/enrol", key=key, nonce="-.0.p.1")


def test_a_newcomer_shows_token_and_key(house: House) -> None:
    token = house.hub.roster.invite("n", "site", hours=1e3, by="admin", now=9e9)
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    body = calls.Enrol("n", public_text(key.public_key()), token)

    async def knock() -> None:
        assert (await knocks(house, body, other)).status_code == 401, "a key it does not have"
        assert house.hub.roster.active("n") is None
        assert (await knocks(house, body, key)).status_code == 200
        second = await knocks(house, calls.Enrol("n", public_text(other.public_key()), token), other)
        assert second.status_code == 403 and problem(second).kind == "invite"

    run(knock())
    assert token not in repr(body)
    assert not any(token.encode() in p.read_bytes() for p in (house.folder / "server").iterdir() if p.is_file())


def test_join_makes_a_home_and_refuses_another_server(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "line", lambda address, context, sealed=None: house.http())
    token = house.hub.roster.invite("n", "viewer", hours=1e3, by="admin", now=9e9)
    invite = enrolment.Invite(ADDRESS, house.fingerprint, "n", "viewer", token)
    wrong = enrolment.Invite(ADDRESS, "f" * 64, "n", "viewer", token)
    with pytest.raises(client.RunError, match="its key is another"):
        run(client.join(wrong, tmp_path / "wrong"))
    assert not (tmp_path / "wrong").exists() and house.hub.roster.active("n") is None, "nothing was sent"
    home = run(client.join(invite, tmp_path / "n"))
    assert home.identity.role == "viewer" and (tmp_path / "n" / "key").stat().st_mode & 0o077 == 0
    assert run(client.join(invite, tmp_path / "n")).identity == home.identity, "the same join again goes on"
    with pytest.raises(client.Turned, match="used already"):
        run(client.join(invite, tmp_path / "second"))
    house.hub.roster.revoke("n", by="admin", now=9e9)
    expired = house.hub.roster.invite("n", "site", hours=1, by="admin", now=0.0)
    with pytest.raises(client.Turned, match="expired"):
        run(client.join(enrolment.Invite(ADDRESS, house.fingerprint, "n", "site", expired), tmp_path / "late"))


def test_an_answer_that_was_changed_on_the_way_is_no_answer(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    members = house.client("admin")

    async def tampered() -> Any:
        real = members._http.send

        async def send(request: Any, **more: Any) -> Any:
            answer = await real(request, **more)
            answer._content = answer.content.replace(b"viewer", b"admin ")
            return answer

        monkeypatch.setattr(members._http, "send", send)
        return await members.call(calls.ListMembers())

    assert len(run(house.client("admin").call(calls.ListMembers())).members) == len(NAMES)
    with pytest.raises(Unreachable, match="not the server"):
        run(tampered())


def test_no_command_acts_for_a_party_of_another_role(house: House) -> None:
    """It would be refused, but be counted as the site's newest program before: the one at work would be shut out."""
    with pytest.raises(RunError, match="is of a site"):
        home_for(house.folder / "s", ("admin", "viewer"), "watch")
    assert home_for(house.folder / "v", ("admin", "viewer"), "watch").identity.name == "v"


# --- where the state is -----------------------------------------------------------------------------------------------


def test_a_server_that_was_started_again_hears_no_older_program_of_a_site(house: House) -> None:
    epoch = house.door.fresh.epoch
    assert run(house.send("s", b"x", path="/v1/message", nonce=f"{epoch}.7.p.1")).status_code == 422
    house.door = Door(house.hub, house.folder / "server")  # as a new process makes it
    epoch = house.door.fresh.epoch
    for nonce, kind in ((f"{epoch}.6.o.1", "fenced"), (f"{epoch}.7.copy.1", "fenced"), (f"{epoch}.7.p.1", "argument")):
        answer = run(house.send("s", b"x", path="/v1/message", nonce=nonce))
        assert problem(answer).kind == kind, nonce


def test_while_the_state_cannot_be_written_nobody_new_is_heard(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*words: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(house.door.fresh, "_keep", full)
    monkeypatch.setattr(house.hub.roster, "note", full)
    answer = run(house.send("s", b"x", path="/v1/message"))
    assert answer.status_code == 503 and problem(answer).kind == "busy"
    answer = run(house.send("v", calls.encode(calls.MakeInvites(["x"], "site", 1.0))))
    assert answer.status_code == 403, "refused, although that cannot be written down"


def start(folder: Path, database: str | None = None) -> Any:
    """A server's state, folder and members, as `atoll server` makes them."""
    state, note = server.opened(folder, database, "power")
    server.establish(folder, "localhost:1", state)
    note()
    return state


def test_a_servers_state_may_be_in_postgresql(tmp_path: Path, postgresql: str) -> None:
    state = start(tmp_path, postgresql)
    hub = Hub(tmp_path, "f" * 64, "localhost:1", state)
    hub.keep_newest("key", (3, "p"))
    state.put("charter", "r", calls.encode(CHARTER))
    with pytest.raises(RunError, match="another process writes to the journal roster"):
        Hub(tmp_path, "f" * 64, "localhost:1", State(postgresql))
    hub.roster.close()
    again = Hub(tmp_path, "f" * 64, "localhost:1", State(postgresql))
    assert list(again.roster.members) == ["admin"] and again.newest() == {"key": (3, "p")}
    assert again.runs["r"].charter == CHARTER
    assert not (tmp_path / "state.sqlite").exists()
    again.roster.close()


def test_a_server_is_not_started_beside_its_state(tmp_path: Path, postgresql: str) -> None:
    start(tmp_path / "a", postgresql)
    with pytest.raises(RunError, match=r"the state of .* is in postgresql://atoll@.*, not in state.sqlite: name it"):
        start(tmp_path / "a")
    start(tmp_path / "b")
    with pytest.raises(RunError, match=r"is in state.sqlite, not in postgresql://"):
        start(tmp_path / "b", postgresql)
    with pytest.raises(RunError, match="the state of another server, whose key has the fingerprint"):
        start(tmp_path / "c", postgresql)
    start(tmp_path / "a", postgresql)


def test_a_database_that_cannot_be_used_is_told_of_without_its_password(tmp_path: Path) -> None:
    for address in ("postgresql://u:secret@127.0.0.1:1/d", f"postgresql://u:secret@/d?host={tmp_path}"):
        with pytest.raises(RunError, match=r"the database cannot be used: postgresql://u@") as refusal:
            start(tmp_path, address)
        assert "secret" not in str(refusal.value)
    assert not (tmp_path / "authority.pem").exists()
