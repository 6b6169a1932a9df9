"""Files and logs: whole or not at all, on a real disk and on one that fails."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from world import Crash
from world import Disk as Simulated

from atoll.errors import RunError
from atoll.net.storage import HEAD, Disk, Log, write_durably

disks = pytest.mark.parametrize("make", [Disk, lambda path: Simulated()], ids=["real", "simulated"])


@disks
def test_the_same_operations(make: Any, tmp_path: Path) -> None:
    files = make(tmp_path)
    assert files.names("a") == [] and files.size("a/x") == -1
    with pytest.raises(FileNotFoundError):
        files.read("a/x")
    files.write("a/x", b"12345")
    files.append("a/x", b"67")
    files.append("a/b/y", b"")
    files.sync("a/x")
    files.sync_folder("a")
    assert files.names("a") == ["b", "x"] and files.size("a/x") == 7
    assert files.read("a/x", 2, 3) == b"345" and files.read("a/x", 5) == b"67"
    files.truncate("a/x", 2)
    files.rename("a/x", "a/z")
    assert files.read("a/z") == b"12" and files.size("a/x") == -1
    files.write("a/z", b"0")
    files.remove("a/z")
    files.remove("a/z")
    assert files.names("a") == ["b"]
    files.remove("a/b/y")
    files.remove("a/b")
    assert files.names("a") == []
    matrix = files.matrix(2, 3, torch.float32)
    assert matrix.shape == (2, 3) and matrix.dtype == torch.float32
    write_durably(files, "c/d", b"whole")
    assert files.read("c/d") == b"whole" and files.names("c") == ["d"]


@disks
def test_a_log_is_read_again(make: Any, tmp_path: Path) -> None:
    files = make(tmp_path)
    records = [b"", b"a" * 1000, b"rec\n" * 30]
    log = Log(files, "log")
    for record in records:
        log.append(record)
    again = Log(files, "log")
    assert list(again) == list(log) == records and again.head == log.head and len(again) == 3


def filled() -> tuple[Simulated, list[bytes]]:
    files, records = Simulated(), [b"one", b"two", b"three"]
    log = Log(files, "log")
    for record in records:
        log.append(record)
    return files, records


def test_a_torn_record_is_left_out_wherever_it_was_torn() -> None:
    files, records = filled()
    whole = bytes(files.names_now["log"].now)
    for cut in range(len(whole)):
        files.names_now["log"].now[:] = whole[:cut]
        log = Log(files, "log")
        kept = list(log)
        assert kept == records[: len(kept)] and len(kept) >= sum(
            cut >= sum(HEAD + len(r) for r in records[: i + 1]) for i in range(3)
        )
        log.append(b"next")
        assert list(Log(files, "log")) == [*kept, b"next"]


def test_blocks_that_were_never_written_are_a_torn_record() -> None:
    files, records = filled()
    assert Log(files, "log").torn == 0
    files.names_now["log"].now.extend(bytes(500))
    assert Log(files, "log").torn == 500
    assert list(Log(files, "log")) == records


def test_a_record_that_was_changed_taken_out_or_moved_is_noticed() -> None:
    files, _ = filled()
    whole = bytes(files.names_now["log"].now)
    first, second = HEAD + 3, 2 * (HEAD + 3)
    changed = whole.replace(b"two", b"tow")
    for content in (changed, whole[:first] + whole[second:], whole[first:second] + whole[:first] + whole[second:]):
        files.names_now["log"].now[:] = content
        with pytest.raises(RunError, match="damaged at byte"):
            Log(files, "log")


@pytest.mark.parametrize("make", [lambda path: Disk(path), lambda path: Simulated()], ids=["disk", "simulated"])
def test_a_log_whose_file_could_not_be_made_begins_later(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make(tmp_path)
    log = Log(files, "log")

    def refuses(path: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "append", refuses)
        with pytest.raises(OSError, match="No space"):
            log.append(b"one")
    log.append(b"one")
    assert list(log) == list(Log(files, "log")) == [b"one"]


def test_a_full_disk_leaves_the_log_as_it_was() -> None:
    files, records = filled()
    log = Log(files, "log")
    files.full = lambda: True
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            log.append(b"four")
    files.full = lambda: False
    assert list(log) == list(Log(files, "log")) == records
    log.append(b"five")
    assert list(Log(files, "log")) == [*records, b"five"]


@pytest.mark.parametrize("seed", range(40))
def test_what_was_appended_survives_a_power_cut(seed: int) -> None:
    rng = random.Random(seed)
    files = Simulated()
    files.crash_at = {rng.randint(1, 30): rng.choice(["before", "after"]) for _ in range(4)}
    told: list[bytes] = []
    for turn in range(20):
        try:
            log = Log(files, "log")
            assert list(log)[: len(told)] == told and len(log) <= len(told) + 1
            told = list(log)
            log.append(b"%d" % turn)
            told.append(b"%d" % turn)
        except Crash:
            files.power_fails(rng)
    assert list(Log(files, "log"))[: len(told)] == told


@pytest.mark.parametrize("seed", range(40))
def test_a_file_is_the_old_or_the_new_one(seed: int) -> None:
    rng = random.Random(seed)
    files = Simulated()
    write_durably(files, "a/file", b"old" * 100)
    files.crash_at = {files.operations + rng.randint(1, 4): rng.choice(["before", "after"])}
    with pytest.raises(Crash):
        write_durably(files, "a/file", b"newer" * 100)
    files.power_fails(rng)
    assert files.read("a/file") in (b"old" * 100, b"newer" * 100)


def test_a_write_that_finds_no_room_changes_nothing() -> None:
    files = Simulated()
    write_durably(files, "a/file", b"old")
    files.full = lambda: True
    with pytest.raises(OSError, match="No space"):
        write_durably(files, "a/file", b"new")
    assert files.read("a/file") == b"old" and files.names("a") == ["file"]
