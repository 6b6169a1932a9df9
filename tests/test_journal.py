"""Events in order, checkpoints whole or not at all."""

from pathlib import Path

import pytest
import torch
from sqlalchemy import event

from atoll.database import Durability
from atoll.errors import RunError
from atoll.history import Record
from atoll.journal import (
    Checkpoint,
    DatabaseJournal,
    Journal,
    discard_checkpoints,
    locked,
    open_journal,
    read_checkpoint,
    read_journal,
    write_atomically,
    write_checkpoint,
)


@pytest.fixture(params=["memory", "sqlite"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Journal:
    return open_journal(None if request.param == "memory" else tmp_path)


def test_events_come_back_in_order(journal: Journal) -> None:
    for number in range(5):
        journal.append("odd" if number % 2 else "even", {"number": number})
    assert [e.body["number"] for e in journal.events()] == [0, 1, 2, 3, 4]
    assert [e.body["number"] for e in journal.events("odd")] == [1, 3]
    numbers = [e.number for e in journal.events()]
    assert numbers == sorted(numbers)


def test_what_is_computed_again_after_a_resume_replaces_what_was_there(journal: Journal) -> None:
    for number in (1, 2, 3):
        journal.append("round", Record(number, 1, {"loss": float(number)}).to_dict())
    journal.append("resumed", {"round": 1})
    journal.append("round", Record(2, 1, {"loss": 20.0}).to_dict())
    assert [(r.round, r.loss) for r in journal.history()] == [(1, 1.0), (2, 20.0)]


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint(number, {"a/b": torch.arange(4.0) * number, "none": torch.empty(0)}, {"n": [number]})


def test_the_newest_whole_checkpoint_is_read_and_two_are_kept(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    for number in (1, 2, 3):
        write_checkpoint(tmp_path, journal, checkpoint(number))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    found, damaged = read_checkpoint(tmp_path, journal)
    assert found is not None and found.round == 3 and found.values == {"n": [3]} and damaged == []
    assert torch.equal(found.tensors["a/b"], torch.arange(4.0) * 3)
    (tmp_path / "checkpoints" / "round-00000003.safetensors").write_bytes(b"torn")
    found, damaged = read_checkpoint(tmp_path, journal)
    assert found is not None and found.round == 2 and len(damaged) == 1 and "round-00000003" in damaged[0]
    discard_checkpoints(tmp_path, keep=2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["round-00000002.safetensors"]


def test_a_checkpoint_that_was_not_entered_does_not_count(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    write_checkpoint(tmp_path, journal, checkpoint(1))
    content = (tmp_path / "checkpoints" / "round-00000001.safetensors").read_bytes()
    write_atomically(tmp_path / "checkpoints" / "round-00000009.safetensors", content)
    found, _ = read_checkpoint(tmp_path, journal)
    assert found is not None and found.round == 1


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x", b"old")
    write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_a_directory_without_a_journal_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not a run directory.*no journal\.sqlite"):
        read_journal(tmp_path)


def test_a_directory_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(RunError, match="another process is running"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(("durability", "level"), [("process", 1), ("power", 2)])
def test_how_durable_a_journal_is_is_an_option(tmp_path: Path, durability: Durability, level: int) -> None:
    journal = open_journal(tmp_path, durability)
    assert isinstance(journal, DatabaseJournal)
    with journal._engine.connect() as line:
        assert line.exec_driver_sql("PRAGMA synchronous").scalar() == level


def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    """A run over sites waits for room then, and does not pause."""
    journal = open_journal(tmp_path)
    assert isinstance(journal, DatabaseJournal)
    event.listen(journal._engine, "connect", lambda line, record: line.execute("PRAGMA max_page_count=3"))
    with pytest.raises(OSError, match="full"):
        for _ in range(100):
            journal.append("round", {"text": "x" * 4096})
