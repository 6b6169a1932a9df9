"""What an owner has not approved does not run, and what is no report does not leave."""

import asyncio
import contextlib
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save

from atoll.errors import InvalidArgument, RunError
from atoll.net import policy, site
from atoll.net.calls import Charter
from atoll.net.frames import encode
from atoll.net.policy import Approvals, Left, Outgoing, Sent, departed, experiment_hash, inspect, source
from atoll.net.site import Part
from atoll.net.storage import state_of

pytestmark = pytest.mark.usefixtures("unsynced")

CODE = "0" * 64
CHARTER = Charter("heart", CODE, {"lr": "0.1", "rounds": "5"})


def test_nothing_is_approved_that_the_owner_has_not_seen(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    assert approvals.verdict(CHARTER) == "waiting"
    with pytest.raises(InvalidArgument, match="none"):
        approvals.find(experiment_hash(CHARTER))
    approvals.ask(CHARTER)
    mark = approvals.find(experiment_hash(CHARTER)[:8])
    assert approvals.waiting() == {mark: CHARTER}
    approvals.settle(approvals.known()[mark], "approved")
    assert approvals.verdict(CHARTER) == "approved" and not approvals.waiting()
    approvals.settle(CHARTER, "denied")
    assert Approvals(tmp_path).verdict(CHARTER) == "denied"


def test_two_decisions_at_once_are_both_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is written over by a program that had read the file before the other wrote."""
    both, read = threading.Barrier(2), Approvals.decisions

    def slowly(approvals: Approvals) -> dict[str, policy.Decision]:
        found = read(approvals)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # both have read, unless one waits for the other
        return found

    monkeypatch.setattr(Approvals, "decisions", slowly)
    charters = [Charter("heart", CODE, {"lr": lr}) for lr in ("0.1", "0.2")]
    deciding = [threading.Thread(target=Approvals(tmp_path).settle, args=(c, "approved")) for c in charters]
    for each in deciding:
        each.start()
    for each in deciding:
        each.join()
    assert read(Approvals(tmp_path)).keys() == {experiment_hash(c) for c in charters}


@pytest.mark.parametrize(
    "other",
    [
        Charter("heart", "0" * 63 + "1", CHARTER.settings),
        Charter("heart", CODE, {"lr": "0.1"}),
        Charter("heart", CODE, {"lr": "0.2", "rounds": "5"}),
        Charter("heart", CODE, {"lr": "0.1", "rounds": "5", "x": ""}),
        Charter("heart", CODE, {"l": "r0.1", "rounds": "5"}),
    ],
)
def test_another_byte_of_code_or_settings_is_another_experiment(tmp_path: Path, other: Charter) -> None:
    approvals = Approvals(tmp_path)
    approvals.settle(CHARTER, "approved")
    assert approvals.verdict(other) == "waiting"


def test_the_same_experiment_in_another_run_is_approved_already(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    approvals.settle(CHARTER, "approved")
    again = Charter("heart 2", CODE, {"rounds": "5", "lr": "0.1"}, deadline=3.0, by="somebody")
    assert approvals.verdict(again) == "approved"


@pytest.mark.parametrize("mark", ["", "0", "abcdefg"])
def test_too_little_of_a_hash_is_refused(tmp_path: Path, mark: str) -> None:
    approvals = Approvals(tmp_path)
    approvals.ask(CHARTER)
    with pytest.raises(InvalidArgument, match="first eight"):
        approvals.find(mark)


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}', '{"' + "0" * 64 + '": {"verdict": "yes"}}'])
def test_a_damaged_file_approves_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "approvals.json").write_text(content)
    with pytest.raises(RunError, match="nothing is approved"):
        Approvals(tmp_path).verdict(CHARTER)


@pytest.mark.parametrize(
    "content",
    [
        b"# coding: utf-7\n# harmless +AAo-print('not in a comment')\n",
        b"#!/usr/bin/python\n# -*- coding: latin-1 -*-\n",
        b"# coding: nothing\n",
        b"x = '\xff'\n",
        b"\xef\xbb\xbf# coding: latin-1\n",
    ],
)
def test_code_that_python_reads_otherwise_than_its_owner_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidArgument, match="the code"):
        source(content)


@pytest.mark.parametrize("content", ["x = 'é'\n", "# coding: utf-8\nx = 1\n", "\ufeffx = 1\n", "# coding: UTF-8\n", ""])
def test_code_is_read_as_it_is(content: str) -> None:
    assert source(content.encode()) == content.removeprefix("\ufeff")


def taking_part(folder: Path, took: list[str]) -> Part:
    """A site's part in a run, which is approved, and of which nothing else is there."""
    part = Part.__new__(Part)
    part.site = SimpleNamespace(approvals=Approvals(folder))  # type: ignore[assignment]
    part.run, part.charter, part._training, part._child = "heart", CHARTER, None, None

    async def nothing() -> Path:
        return folder

    async def take_part() -> None:
        took.append("begun")
        try:
            await asyncio.sleep(60.0)
        except asyncio.CancelledError:
            took.append("ended")
            raise

    part._code, part._approved, part._take_part = nothing, nothing, take_part  # type: ignore[assignment]
    return part


def test_an_approval_that_is_taken_back_ends_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "LOOK", 0.01)
    approvals, took = Approvals(tmp_path), list[str]()
    approvals.settle(CHARTER, "approved")

    async def both() -> None:
        going = asyncio.ensure_future(taking_part(tmp_path, took).go())
        await asyncio.sleep(0.1)
        assert took == ["begun"] and not going.done()
        approvals.settle(CHARTER, "denied")
        with pytest.raises(site.Withdrawn):
            await asyncio.wait_for(going, 20.0)

    asyncio.run(both())
    assert took == ["begun", "ended"]


# --- what leaves ------------------------------------------------------------------------------------------------------


def report(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = {
        "wire": torch.tensor([[3.0, 4.0]]),
        "weight": torch.ones(1, 1, dtype=torch.float64),
        "metrics": torch.ones(1, 2, dtype=torch.float64),
    }
    return parts | more


def test_a_report_is_told_by_names_shapes_and_norms() -> None:
    found = {s.name: s for s in inspect(encode(report()), 10_000)}
    assert found["wire"] == Sent("wire", "float32", (1, 2), 5.0)
    coded = report()
    del coded["wire"]
    coded |= {"wire/q": torch.ones(1, 4, dtype=torch.uint8), "wire/scale": torch.ones(1, 1)}
    assert [s.norm for s in inspect(encode(coded), 10_000) if s.name == "wire/q"] == [2.0]


def without(name: str) -> bytes:
    parts = report()
    del parts[name]
    return encode(parts)


@pytest.mark.parametrize(
    "frame",
    [
        b"", b"\x80\x04.", b"{}", encode(report())[:-1], encode(report()) + b"x",
        encode(report(patients=torch.ones(3))), encode(report(**{"wire/x": torch.ones(1, 1)})),
        without("wire"), without("weight"), without("metrics"),
        encode(report(wire=torch.tensor([[float("nan")]]))),
        encode(report(metrics=torch.ones(1, 3, dtype=torch.float64))), encode(report(metrics=torch.ones(1, 2))),
        encode(report(weight=torch.ones(5, 1, dtype=torch.float64))),
        save(report(), {"note": "a patient's name"}),
        len(b := json.dumps({"wire": {"dtype": "F32", "shape": [2**50], "data_offsets": [0, 2**52]}}).encode())
        .to_bytes(8, "little") + b,
    ],
)  # fmt: skip
def test_what_is_no_report_does_not_leave(frame: bytes) -> None:
    with pytest.raises(InvalidArgument):
        inspect(frame, 10_000)


def test_a_report_that_is_too_large_does_not_leave() -> None:
    with pytest.raises(InvalidArgument, match="limit"):
        inspect(encode(report()), 100)


def test_the_journal_of_what_left_is_whole_or_refused(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    outgoing = Outgoing(state.journal("left"))
    sent = Left(1.0, "heart", "update", 1, 1, 240, CODE, [Sent("wire", "float32", (1, 2), 5.0)])
    for _ in range(3):
        outgoing.write(sent)
    assert list(departed(state.records("left"))) == [sent] * 3
    with state.engine.begin() as line:
        line.exec_driver_sql(
            "UPDATE atoll_records SET body = CAST(replace(CAST(body AS TEXT), ':240', ':241') AS BLOB) WHERE number = 1"
        )
    with pytest.raises(RunError, match=r"the journal left .* is damaged at record 1"):
        state.records("left")


def test_policy_says_what_a_verdict_is() -> None:
    assert policy.Verdict.__args__ == ("waiting", "approved", "denied")  # type: ignore[attr-defined]
