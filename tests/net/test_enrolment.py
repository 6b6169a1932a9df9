"""Invites open the door once, to whom they are for, for a time."""

from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from world import Disk as Memory

from atoll.errors import InvalidArgument, RunError
from atoll.net import enrolment
from atoll.net.enrolment import EnrolmentError, Invite, Roster
from atoll.net.keys import public_text
from atoll.net.storage import state_of

pytestmark = pytest.mark.usefixtures("unsynced")

KEYS = [public_text(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32).public_key()) for n in range(1, 5)]


def roster(files: Memory | None = None) -> Roster:
    return Roster((files or Memory()).journal("roster"))


def invited(found: Roster, name: str = "a", *, hours: float = 1.0, role: enrolment.Role = "site") -> str:
    return found.invite(name, role, hours=hours, by="admin", now=1000.0)


def test_an_invite_is_one_word_that_notices_a_lost_character() -> None:
    invite = Invite("host.example:8443", "0" * 64, "hospital a", "site", enrolment.new_token())
    word = enrolment.encode(invite)
    assert enrolment.decode(f"  {word}\n") == invite and " " not in word
    assert invite.token not in repr(invite)
    for wrong in ("", word[:-1], word[1:], word[:40] + word[41:], word[:50] + "é" + word[51:], word + "A" * 5000):
        with pytest.raises(InvalidArgument, match="whole invite"):
            enrolment.decode(wrong)


@pytest.mark.parametrize(
    "change", [{"address": "host"}, {"address": "h/x:1"}, {"role": "king"}, {"name": "../a"}, {"token": "x"}]
)
def test_an_invite_of_another_form_is_none(change: dict[str, str]) -> None:
    parts = {"address": "h:1", "fingerprint": "0" * 64, "name": "a", "role": "site", "token": enrolment.new_token()}
    with pytest.raises(InvalidArgument):
        enrolment.decode(enrolment.encode(Invite(**(parts | change))))


def test_a_newcomer_is_enrolled_once_and_told_again_when_its_answer_was_lost() -> None:
    found = roster()
    token = invited(found)
    member = found.enrol("a", KEYS[0], token, now=1001.0)
    assert (member.role, found.key("a") is not None) == ("site", True)
    assert found.enrol("a", KEYS[0], token, now=1002.0) == member
    assert sum(isinstance(e, enrolment.Enrolled) for e in found.entries()) == 1
    with pytest.raises(EnrolmentError, match="used already"):
        found.enrol("a", KEYS[1], token, now=1003.0)


@pytest.mark.parametrize(
    ("name", "token", "now", "match"),
    [
        ("a", "x" * 43, 1001.0, "unknown"),
        ("b", None, 1001.0, "another name"),
        ("a", None, 1000.0 + 3600.0, "expired"),
    ],
)
def test_invites_that_do_not_hold(name: str, token: str | None, now: float, match: str) -> None:
    found = roster()
    mine = invited(found)
    with pytest.raises(EnrolmentError, match=match):
        found.enrol(name, KEYS[0], token or mine, now=now)
    assert not found.members
    found.enrol("a", KEYS[0], mine, now=1001.0)


def test_a_newer_invite_takes_the_place_of_the_one_before() -> None:
    found = roster()
    old, new = invited(found), invited(found)
    with pytest.raises(EnrolmentError, match="unknown"):
        found.enrol("a", KEYS[0], old, now=1001.0)
    found.enrol("a", KEYS[0], new, now=1001.0)


def test_a_key_is_one_members_alone() -> None:
    found = roster()
    found.enrol("a", KEYS[0], invited(found), now=1001.0)
    with pytest.raises(EnrolmentError, match="another member"):
        found.enrol("b", KEYS[0], invited(found, "b"), now=1001.0)


@pytest.mark.parametrize("name", ["", "../a", "server", "a\n", "é", "x" * 201])
def test_names_that_nobody_can_have(name: str) -> None:
    with pytest.raises(InvalidArgument, match="NAME"):
        invited(roster(), name)


@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan"), 1e9])
def test_hours_must_be_some(hours: float) -> None:
    with pytest.raises(InvalidArgument, match="--hours"):
        invited(roster(), hours=hours)


def test_a_name_that_is_taken_is_not_invited_again_until_it_is_revoked() -> None:
    found = roster()
    token = invited(found)
    found.enrol("a", KEYS[0], token, now=1001.0)
    with pytest.raises(InvalidArgument, match="revoke"):
        invited(found)
    found.revoke("a", by="admin", now=1002.0)
    assert found.key("a") is None and found.members["a"].revoked
    with pytest.raises(EnrolmentError):
        found.enrol("a", KEYS[0], token, now=1003.0)
    found.enrol("a", KEYS[1], invited(found), now=1001.0)
    assert found.active("a") is not None


def test_revoking_voids_an_open_invite() -> None:
    found = roster()
    token = invited(found)
    found.revoke("a", by="admin", now=1001.0)
    with pytest.raises(EnrolmentError, match="unknown"):
        found.enrol("a", KEYS[0], token, now=1002.0)
    with pytest.raises(InvalidArgument):
        found.revoke("nobody", by="admin", now=1002.0)


def test_a_roster_is_what_its_log_says_and_holds_no_token(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    found = Roster(state.journal("roster"))
    first, second = invited(found), invited(found, "b", role="viewer")
    found.enrol("a", KEYS[0], first, now=1001.0)
    found.revoke("a", by="admin", now=1002.0)
    found.close()
    again = Roster(state.journal("roster"))
    assert again.members == found.members and again.head == found.head
    assert again.enrol("b", KEYS[1], second, now=1003.0).role == "viewer"
    content = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert b"Enrolled" in content
    assert first.encode() not in content and second.encode() not in content


def test_a_roster_that_was_changed_is_refused(tmp_path: Path) -> None:
    with closing(state_of(tmp_path)) as state:
        found = Roster(state.journal("roster"))
        for name in "abc":
            invited(found, name)
        found.close()
    path = tmp_path / "state.sqlite"
    path.write_bytes(path.read_bytes().replace(b'"site"', b'"king"', 1))
    with closing(state_of(tmp_path)) as state, pytest.raises(RunError, match=r"the journal roster .* is damaged"):
        Roster(state.journal("roster"))
