"""Files: whole or not at all, on a real disk and on one that fails."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from world import Crash
from world import Disk as Simulated

from atoll.net.storage import Disk, write_durably

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
