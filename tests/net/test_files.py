"""Files: whole or not at all, on a real disk and on one that fails."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from world import Crash
from world import Disk as Simulated

from atoll.net.storage import Content, Disk, write_durably

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
    files.write("a/x", b"12345")
    room = memoryview(bytearray(4))
    assert (files.into("a/x", 1, room), bytes(room)) == (4, b"2345") and files.into("a/x", 3, room) == 2
    with pytest.raises(FileNotFoundError):
        files.into("a/y", 0, room)
    files.remove("a/x")
    matrix = files.matrix(2, 3, torch.float32)
    assert matrix.shape == (2, 3) and matrix.dtype == torch.float32
    write_durably(files, "c/d", b"wh", b"", b"ole")
    assert files.read("c/d") == b"whole" and files.names("c") == ["d"]


@disks
def test_what_came_is_read_in_parts_and_kept(make: Any, tmp_path: Path) -> None:
    files = make(tmp_path)
    files.write("up/x", b"12345")
    room = memoryview(bytearray(3))
    for content in (Content(b"12345"), Content(files=files, path="up/x")):
        assert content.size == 5 and content.whole() == b"12345"
        assert content.part(1, 3) == content.part(1, 3, room) == b"23"
        content.keep(files, "kept/x")
        assert files.read("kept/x") == b"12345" and files.names("kept") == ["x"] and content.part(0, 5) == b"12345"
        files.remove("kept/x")
    assert files.size("up/x") < 0, "what lay in a file has moved"
    with pytest.raises(FileNotFoundError):
        Content(files=files, path="up/x")


def test_what_is_kept_outlives_a_loss_of_power() -> None:
    for seed in range(20):
        files = Simulated()
        files.write("up/x", b"12345")
        Content(files=files, path="up/x").keep(files, "kept/x")
        files.power_fails(random.Random(seed))
        assert files.read("kept/x") == b"12345"


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
