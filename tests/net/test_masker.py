"""A site's part in a secure sum: what it answers, once, and what a server that lies gets out of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from world import identity

from atoll import secagg
from atoll.errors import InvalidArgument
from atoll.net import frames
from atoll.net.control import STEPS, Abstain, Say, Step, Terms, Turn, content_hash
from atoll.net.coordinator import Sum
from atoll.net.keys import public_text
from atoll.net.masker import Masker
from atoll.net.peers import Peers
from atoll.net.spool import Spool
from atoll.net.storage import Content, Disk
from atoll.net.sums import Machine
from atoll.secagg import SecAggError, messages

pytestmark = pytest.mark.usefixtures("unsynced")

NAMES = ("a", "b", "c", "d")
TERMS = Terms(32, 1.0, 4.0, (2, 3), 64, 3, "lying")
LENGTH = 5
TASK = "7" * 64


def key_of(name: str) -> str:
    return public_text(identity(name).key.public_key())


KEYS = {name: key_of(name) for name in NAMES}


def report(value: int) -> bytes:
    return frames.encode({"wire/ring": torch.full((1, LENGTH), value, dtype=torch.int32)})


class Table:
    """Four sites and the server's machine, whose messages are carried by hand."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.folder, self.more, self.number, self.round = folder, more, 0, 0
        self.left: list[tuple[str, Step, bytes]] = []
        self.sites = {name: self.site(name) for name in NAMES}

    def site(self, name: str) -> Masker:
        """A site's program, started or started again."""
        disk = Disk(self.folder / name)
        return Masker(
            identity(name), TERMS, disk, Peers(disk),
            leaving=lambda turn, raw, report: self.left.append((name, turn.step, raw)), **self.more,
        )  # fmt: skip

    def begin(self, task: str = TASK, round: int = 0) -> "Table":
        self.number, self.round = self.number + 1, round
        begun = Sum(KEYS, "join", NAMES)
        self.machine = Machine("r", round, self.number, begun, TERMS, LENGTH, task, Spool(Disk(self.folder / "server")))
        return self

    def turn(self, name: str, **changes: Any) -> Turn:
        """What the server says to a site now."""
        step = self.machine.step
        keys = KEYS if step == "join" else {}
        said = Turn("r", self.round, 1, self.number, step, self.machine.says(name), keys, None)
        return replace(said, **changes)

    def hear(self, name: str, turn: Turn, task: str = TASK) -> list[tuple[Any, bytes]]:
        return self.sites[name].answer(turn, task, lambda: report(NAMES.index(name) + 1))

    def answers(self) -> dict[str, tuple[Any, bytes]]:
        return {name: self.hear(name, self.turn(name))[0] for name in sorted(self.machine.told)}

    def step(self, answers: dict[str, tuple[Any, bytes]] | None = None) -> secagg.Sum | None:
        for name, (said, frame) in (self.answers() if answers is None else answers).items():
            self.machine.take(name, said, frame)
        return self.machine.close()

    def until(self, step: Step) -> "Table":
        while self.machine.step != step:
            self.step()
        return self


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path).begin()


def abstains(answered: list[tuple[Any, bytes]], why: str) -> bool:
    ((said, frame),) = answered
    return isinstance(said, Abstain) and why in said.reason and not frame


def test_four_sites_give_their_sum_and_enter_what_leaves_before_it_does(table: Table) -> None:
    table.until("unmask")
    found = table.step()
    assert found is not None and found.total.tolist() == [1 + 2 + 3 + 4] * LENGTH
    assert [(n, s) for n, s, _ in table.left] == [(n, s) for s in STEPS for n in NAMES]


def test_the_same_question_has_the_same_answer_and_leaves_once(table: Table) -> None:
    for _ in STEPS:
        turn = table.turn("a")
        answers = table.answers()
        assert table.hear("a", turn) == [answers["a"]] == table.hear("a", turn)
        table.step(answers)
    assert len(table.left) == 6 * 4


# --- who may say what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_a_step_takes_its_own_answer_and_no_other(step: Step, tmp_path: Path) -> None:
    """Every kind of answer, of this turn and of another, in every step: the machine takes one."""
    other = Table(tmp_path / "other").begin()
    table = Table(tmp_path).begin()
    answers: dict[Step, tuple[Say, bytes]] = {}
    strange: dict[Step, tuple[Say, bytes]] = {}
    for each in STEPS:
        for made, kept in ((table, answers), (other, strange)):
            if each == step and made is table:
                mine = table.answers()
                continue
            if STEPS.index(each) > STEPS.index(step) and made is table:
                break
            given = made.answers()
            kept[each] = given["a"]
            made.step(given)
    for kept in (answers, strange):
        for said, frame in kept.values():
            for claimed in {said.step, step}:
                if kept is strange and step == "join" and said.step == "join":
                    continue  # keys are fresh, but this site might have sent them
                with pytest.raises(SecAggError):
                    table.machine.take("a", replace(said, step=claimed), frame)
    # Vectors are not signed, and wrong shares are found out at the end: there the transport's word counts.
    for stranger in ("z",) if step in ("mask", "unmask") else ("b", "z"):
        with pytest.raises(SecAggError):
            table.machine.take(stranger, *mine["a"])
    table.machine.take("a", *mine["a"])
    with pytest.raises(SecAggError, match="answered already"):
        table.machine.take("a", *mine["a"])
    rest = {name: given for name, given in mine.items() if name != "a"}
    table.step(rest)


def test_a_masked_vector_comes_beside_and_everything_else_inside(table: Table) -> None:
    said, frame = table.answers()["a"]
    with pytest.raises(SecAggError, match="otherwise"):
        table.machine.take("a", replace(said, size=len(said.content)), said.content)
    table.until("mask")
    said, frame = table.answers()["a"]
    assert said.content == b"" and said.size == len(frame) and said.sha256 == content_hash(frame)
    with pytest.raises(SecAggError, match="otherwise"):
        table.machine.take("a", replace(said, size=0, content=frame), b"")


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_site_goes_on_with_the_turn_it_is_in_and_nothing_else(step: Step, tmp_path: Path) -> None:
    other = Table(tmp_path / "other").begin().until(step)
    table = Table(tmp_path).begin()
    past: list[Turn] = []
    while table.machine.step != step:
        past.append(table.turn("a"))
        table.step()
    here = table.turn("a")
    strange = other.turn("a")
    if step == "reveal":
        assert abstains(table.hear("a", strange), "does not hold the advert")
        return
    assert abstains(table.hear("a", replace(here, turn=0)), "a later turn"), "as after the server's backup was restored"
    for turn in (strange, replace(past[0], step=step)):
        assert table.hear("a", turn) == [], "late, or of another session: it is not answered, and nothing is lost"
    assert isinstance(table.hear("a", here)[0][0], Say)
    assert table.hear("a", past[-1]) == []


# --- a server that lies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"run": "s"}, "another turn"), ({"round": 1}, "another turn"), ({"turn": 9}, "another turn"),
        ({"keys": {**KEYS, "e": key_of("e")}}, "others than the cohort"), ({"keys": {}}, "others than the cohort"),
        ({"keys": {**KEYS, "b": KEYS["c"]}}, "cannot be used"), ({"keys": {**KEYS, "b": "no key"}}, "cannot be used"),
        ({"keys": {**KEYS, "a": key_of("e")}}, "own key"), ({"content": b"rubbish"}, "no message"),
        ({"step": "mask"}, "started again"),
    ],
    ids=lambda c: str(c)[:40],
)  # fmt: skip
def test_invitations_that_are_not_taken_up(table: Table, change: dict[str, Any], why: str) -> None:
    assert abstains(table.hear("a", table.turn("a", **change)), why)
    assert not Peers(Disk(table.folder / "a")).keys, "and no key is pinned for a turn that it is not in"
    assert isinstance(table.begin(round=2).hear("a", table.turn("a"))[0][0], Say)


@pytest.mark.parametrize("claimed", STEPS)
def test_a_vector_leaves_as_a_vector_and_is_looked_at(table: Table, claimed: Step) -> None:
    """Called another step, it would leave without an entry of what is under the mask."""
    table.until("mask")
    answered = table.hear("a", table.turn("a", step=claimed))
    seen = [step for name, step, _ in table.left if name == "a"]
    assert bool(answered) == (claimed == "mask") == (seen == list(STEPS[:4]))
    assert seen[:3] == list(STEPS[:3])


@pytest.mark.parametrize(
    "changes", [{"clip": 2.0}, {"weight_cap": 1.0}, {"bits": 16}, {"threshold": (1, 2)}, {"degree": 2}], ids=str
)
def test_a_sum_that_the_approved_experiment_does_not_ask_for(table: Table, changes: dict[str, Any]) -> None:
    message = secagg.decode_server(table.turn("a").content)
    assert isinstance(message, secagg.Invitation)
    fields = {n: getattr(message.parameters, n) for n in message.parameters.__struct_fields__} | changes
    lie = secagg.Invitation(
        message.run, message.round, message.attempt, message.cohort, secagg.Parameters(**fields), message.broadcast
    )
    answered = table.hear("a", table.turn("a", content=secagg.encode(lie)))
    assert abstains(answered, "another sum than the approved experiment")


def test_another_model_than_the_site_was_sent(table: Table) -> None:
    assert abstains(table.hear("a", table.turn("a"), task="8" * 64), "another model")


def test_two_stories_in_one_step_are_answered_once(table: Table) -> None:
    table.until("confirm")
    first, second = table.turn("a"), table.turn("a")
    told = secagg.decode_server(first.content)
    assert isinstance(told, messages.Survivors)
    fewer = messages.Survivors(told.session, messages.bits_of([0, 1, 2], 4))
    second = replace(second, content=secagg.encode(fewer))
    (answer,) = table.hear("a", first)
    assert isinstance(answer[0], Say)
    assert table.hear("a", second) == [], "it signs no second set"
    assert table.hear("a", first) == [answer]


def test_a_key_that_changed_is_refused_until_the_owner_forgets_it(tmp_path: Path) -> None:
    table = Table(tmp_path).begin()
    table.step()
    peers = Peers(Disk(tmp_path / "a"))
    assert peers.keys == KEYS
    with pytest.raises(SecAggError, match="b has another key"):
        peers.pin({**KEYS, "b": key_of("e")})
    peers.forget("b")
    peers.pin({**KEYS, "b": key_of("e")})
    assert peers.keys["b"] == key_of("e")
    with pytest.raises(InvalidArgument, match="--forget"):
        peers.forget("z")
    (tmp_path / "a" / "peers.json").write_bytes(b"rubbish")
    with pytest.raises(SecAggError, match="damaged"):
        peers.pin(KEYS)


# --- what a crash leaves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_a_site_that_was_started_again_sits_the_turn_out_and_takes_the_next(step: Step, tmp_path: Path) -> None:
    table = Table(tmp_path, again=True).begin().until(step)
    said = table.answers()["a"][0]
    table.sites["a"] = table.site("a")
    assert abstains(table.hear("a", table.turn("a")), "taken up twice" if step == "join" else "started again")
    assert {f.name for f in (tmp_path / "a").iterdir()} == {"peers.json", "mark"}, "no secret is on disk"
    (answer,) = table.begin().hear("a", table.turn("a"))
    assert isinstance(answer[0], Say) and answer[0].sha256 != said.sha256, "with fresh keys"


def test_a_vector_leaves_once_unless_the_owner_allows_it(tmp_path: Path) -> None:
    for again in (False, True):
        table = Table(tmp_path / str(again), again=again).begin().until("mask")
        table.answers()
        for started in (False, True):
            if started:
                table.sites["a"] = table.site("a")
            answered = table.begin().hear("a", table.turn("a"))
            assert isinstance(answered[0][0], Say) if again else abstains(answered, "has sent already")
        other = table.begin("9" * 64).hear("a", table.turn("a"), task="9" * 64)
        assert again or abstains(other, "has sent already"), "nor in the same round for another model"


def test_a_vector_of_a_model_leaves_once_whatever_lies_between(tmp_path: Path) -> None:
    table = Table(tmp_path).begin().until("confirm")
    other, same = table.begin("9" * 64, round=1), "has sent already"
    assert isinstance(other.hear("a", other.turn("a"), task="9" * 64)[0][0], Say)
    for _ in range(2):
        later = table.begin(round=table.round + 1)
        assert abstains(later.hear("a", later.turn("a")), same)
        table.sites["a"] = table.site("a")


def test_a_disk_that_refuses_lets_nothing_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(tmp_path).begin()

    def full(self: Disk, path: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Disk, "write", full)
        assert abstains(table.hear("a", table.turn("a")), "its disk refuses")
    assert abstains(table.hear("a", table.turn("a")), "its disk refuses"), "for this turn"
    assert not table.left
    assert isinstance(table.begin().hear("a", table.turn("a"))[0][0], Say)


def test_a_journal_that_cannot_be_written_lets_nothing_leave(tmp_path: Path) -> None:
    def full(turn: Turn, raw: bytes, report: bytes) -> None:
        raise OSError(28, "No space left on device")

    table = Table(tmp_path).begin()
    table.sites["a"] = Masker(identity("a"), TERMS, Disk(tmp_path / "x"), Peers(Disk(tmp_path / "x")), leaving=full)
    assert abstains(table.hear("a", table.turn("a")), "its disk refuses")


def test_a_damaged_mark_takes_nothing_up(tmp_path: Path) -> None:
    table = Table(tmp_path).begin()
    table.step()
    (tmp_path / "a" / "mark").write_bytes(b"rubbish")
    table.sites["a"] = table.site("a")
    assert abstains(table.begin().hear("a", table.turn("a")), "cannot be read")


@pytest.mark.parametrize(
    "content",
    [b"rubbish", frames.encode({"wire": torch.ones(1, 5)}), frames.encode({"wire/ring": torch.ones(1, 5)}),
     frames.encode({"wire/ring": torch.ones(2, 5, dtype=torch.int32)}), report(1)[:-4],
     frames.encode({"wire/ring": torch.ones(1, 4, dtype=torch.int32)}),
     frames.encode({"wire/ring": torch.ones(1, 5, dtype=torch.int64)}),
     frames.encode({"wire/ring": torch.ones(1, 5, dtype=torch.bfloat16)})],
)  # fmt: skip
def test_a_report_that_is_no_vector_of_the_ring_does_not_leave(table: Table, content: bytes) -> None:
    table.until("mask")
    answered = table.sites["a"].answer(table.turn("a"), TASK, lambda: content)
    assert isinstance(answered[0][0], Abstain) and not any(s == "mask" for _, s, _ in table.left)


def test_an_owner_may_ask_for_more_sites(tmp_path: Path) -> None:
    table = Table(tmp_path, least=5).begin()
    assert abstains(table.hear("a", table.turn("a")), "at least 5")


def test_nothing_secret_is_shown(table: Table) -> None:
    table.until("confirm")
    shown = repr(table.sites["a"]) + repr(table.turn("a")) + repr(table.answers()["a"])
    assert shown == (
        "Masker('a', Client('a', confirm))Turn('r', round 0, turn 1, confirm)(Say('a', round 0, turn 1, confirm), b'')"
    )


# --- the server's machine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_a_machine_made_anew_says_the_same(step: Step, tmp_path: Path) -> None:
    """Of what was said alone, in the middle of a step or at its end."""
    table, said = Table(tmp_path).begin(), list[Say]()
    spool = Spool(Disk(tmp_path / "server"))
    for each in STEPS:
        for name, (claim, frame) in table.answers().items():
            if claim.size:
                spool.put(claim, Content(frame))
            said.append(claim)
            table.machine.take(name, claim, frame)
            if each == step:
                again = Machine(
                    "r", 0, 1, Sum(KEYS, step, tuple(table.machine.told), tuple(said)), TERMS, LENGTH, TASK, spool
                )  # fmt: skip
                assert again.step == step and again.told == table.machine.told
        if each == step:
            mine, theirs = table.machine.close(), again.close()
            assert again.told == table.machine.told
            if step == "unmask":
                assert mine is not None and theirs is not None and np.array_equal(mine.total, theirs.total)
            break
        table.machine.close()
