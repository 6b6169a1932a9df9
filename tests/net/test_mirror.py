"""A run's files in a store and on a disk that is lost: nothing acknowledged is, and the bits stay the same."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_buffered_world as asynchronous
from stores import Faulty
from tally import tallied
from test_world import LOOSE, SITES, STRICT, fault_of
from world import Disk as Simulated
from world import World, drawn

from atoll.net.buffered import BufferedService
from atoll.net.mirror import Mirror, read
from atoll.net.service import Service
from atoll.net.storage import Content, Disk, write_durably, write_whole


def wiped(disk: Simulated) -> Simulated:
    """The disk of another machine: the journals, which are in a database, are all there is."""
    disk.names_now.clear()
    disk.names_durable.clear()
    return disk


def test_what_is_kept_comes_back_when_the_disk_is_lost(tmp_path: Path) -> None:
    store = Faulty(0)
    files = Mirror(Disk(tmp_path / "a"), store, part=4)
    write_durably(files, "models/00000001", b"whole", b"", b" model")
    files.write("uploads/x", b"an update")
    Content(files=files, path="uploads/x").keep(files, "spool/00000000/abc")
    write_durably(files, "survey/of a site@home", b"")
    write_whole(files, "task/1", b"is made again")
    assert all(set(name) <= set("0123456789abcdef-/") for name in store.there)
    anew = Mirror(Disk(tmp_path / "b"), store, part=1000)
    assert anew.names("spool") == ["00000000"] and anew.names("spool/00000000") == ["abc"]
    assert anew.names("models") == ["00000001"] and anew.names("survey") == ["of a site@home"] and anew.names("a") == []
    assert anew.size("survey/of a site@home") == 0 and anew.size("task/1") == -1
    assert anew.read("models/00000001") == b"whole model" and anew.read("models/00000001", 2, 3) == b"ole"
    room = memoryview(bytearray(9))
    assert anew.into("spool/00000000/abc", 0, room) == 9 and bytes(room) == b"an update"
    assert not (tmp_path / "b" / "models" / "00000001.part").exists()


@pytest.mark.parametrize("content", [b"other by so many", b"shorter"])
def test_what_the_disk_holds_other_than_it_was_kept_comes_anew(tmp_path: Path, content: bytes) -> None:
    store = Faulty(0)
    write_durably(Mirror(Disk(tmp_path), store), "models/1", b"what was written")
    (tmp_path / "models" / "1").write_bytes(content)
    assert Mirror(Disk(tmp_path), store).read("models/1") == b"what was written"


def test_the_newer_counts_whatever_arrives_late(tmp_path: Path) -> None:
    store = Faulty(0)
    store.rng.choice = lambda of: "late"  # type: ignore[method-assign]
    store.rng.random = lambda: 0.5  # type: ignore[method-assign]
    files = Mirror(Disk(tmp_path / "a"), store)
    write_durably(files, "agreed", b"first")
    store.harm = 1.0
    with pytest.raises(OSError, match="does not answer"):
        write_durably(files, "agreed", b"sent, and never answered")
    assert files.trouble == "the object store does not answer" and len(store.late) == 1
    store.harm = 0.0
    assert files.read("agreed") == b"first", "nothing was changed"
    anew = Mirror(Disk(tmp_path / "b"), store)  # another process on another machine
    write_durably(anew, "agreed", b"second")
    for name, late in store.late:
        store.there[name] = late
    assert anew.read("agreed") == b"second"
    last = Mirror(Disk(tmp_path / "c"), store)
    assert last.read("agreed") == b"second"
    last.remove("agreed")
    assert not [p for p in read(store.names()) if p != "life"], "nothing of it stays"


def test_one_that_is_torn_gone_or_damaged_is_not_taken(tmp_path: Path) -> None:
    store = Faulty(0)
    files = Mirror(Disk(tmp_path / "a"), store, part=4)
    write_durably(files, "torn", b"0123456789")
    write_durably(files, "gone", b"0123456789")
    write_durably(files, "bad", b"0123456789")
    kept = {path: sorted(n for n in found.names) for path, found in read(store.names()).items()}
    store.there[kept["torn"][1]] = b"0"
    store.there[kept["bad"][1]] = b"0000"
    anew = Mirror(Disk(tmp_path / "b"), store)
    del store.there[kept["gone"][2]]
    assert [anew.size(name) for name in ("torn", "gone", "bad")] == [-1, -1, -1]
    with pytest.raises(FileNotFoundError, match="bad is gone from the object store or damaged there"):
        anew.read("bad")
    assert files.read("bad") == b"0123456789", "where the disk has it, the store is not asked"
    for name in ("torn", "gone", "bad"):
        anew.remove(name)
    assert list(read(store.names())) == ["life"]


def test_a_torn_one_does_not_hide_the_whole_one_before_it(tmp_path: Path) -> None:
    store, older = Faulty(0), dict[str, bytes]()
    files = Mirror(Disk(tmp_path / "a"), store)
    write_durably(files, "agreed", b"whole")
    older |= store.there
    write_durably(files, "agreed", b"another")
    (newer,) = set(store.there) - set(older)
    store.there |= older
    store.there[newer] = b"an"  # as a file that was copied while power failed
    assert Mirror(Disk(tmp_path / "b"), store).read("agreed") == b"whole"


def test_names_of_others_are_left_alone(tmp_path: Path) -> None:
    """A path in the store is no way out of the folder."""
    store = Faulty(0)
    outside = f"{b'../x'.hex()}/{1:012x}-{'0' * 64}-0/0-1"
    for name in (outside, "README", f"{b'a'.hex()}/x", f"ff/{1:012x}-{'0' * 64}-0/0-1"):
        store.there[name] = b""
    files = Mirror(Disk(tmp_path), store)
    assert files.paths == [] and files.names("..") == Disk(tmp_path).names("..")
    assert set(store.there) >= {outside, "README"}


def test_a_full_store_is_told_of_and_the_file_stays_where_it_was(tmp_path: Path) -> None:
    store = Faulty(0)
    files = Mirror(Disk(tmp_path), store)
    files.write("uploads/x", b"an update")
    store.harm = 1.0
    with pytest.raises(OSError, match="does not answer"):
        Content(files=files, path="uploads/x").keep(files, "spool/00000000/abc")
    assert (tmp_path / "uploads" / "x").exists() and not (tmp_path / "spool" / "00000000" / "abc").exists()
    store.harm = 0.0
    Content(files=files, path="uploads/x").keep(files, "spool/00000000/abc")
    assert files.trouble == "" and files.read("spool/00000000/abc") == b"an update"


def test_whoever_takes_the_journal_has_what_was_kept_until_then(tmp_path: Path) -> None:
    store = Faulty(0)
    before = Mirror(Disk(tmp_path / "a"), store)
    write_durably(before, "models/1", b"first")
    after = Mirror(Disk(tmp_path / "b"), store)  # waits for the one before it to let go
    write_durably(before, "models/1", b"second")
    write_durably(before, "spool/00000000/abc", b"acknowledged")
    after.journal("journal")
    assert after.read("spool/00000000/abc") == b"acknowledged" and after.read("models/1") == b"second"


def test_two_that_began_at_once_draw_numbers_of_their_own(tmp_path: Path) -> None:
    store = Faulty(0)
    one, two = (Mirror(Disk(tmp_path / name), store) for name in "ab")
    one.journal("journal")
    two.journal("journal")
    write_durably(two, "agreed", b"by the one that writes now")
    write_durably(one, "agreed", b"by one that was overtaken and does not know")
    assert Mirror(Disk(tmp_path / "c"), store).read("agreed") == b"by the one that writes now"


def test_a_disk_that_refuses_a_name_does_not_pass_off_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, store = Disk(tmp_path), Faulty(0)
    files = Mirror(disk, store)
    write_durably(files, "agreed", b"first")
    files.write("agreed.part", b"other")
    files.sync("agreed.part")

    def refuse(source: str, target: str) -> None:
        raise OSError(5, "the disk refuses")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "rename", refuse)
        with pytest.raises(OSError, match="the disk refuses"):
            files.rename("agreed.part", "agreed")
    assert files.read("agreed") == Mirror(Disk(tmp_path / "b"), store).read("agreed")


def served(
    store: Faulty, lose: Callable[[], bool], service: Callable[..., Service] = Service
) -> Callable[..., Service]:
    """A server over a store, whose disk may be another at every start."""

    def made(process: object, plan: object, disk: Simulated, **more: object) -> Service:
        return service(process, plan, Mirror(wiped(disk) if lose() else disk, store, part=64), **more)

    return made


def judged(plan: Any, seeds: range) -> None:
    """Run every seed's schedule, with a store whose faults are drawn as well."""
    for seed in seeds:
        store = Faulty(seed)
        store.harm, store.crash = store.rng.choice([0.0, 0.05, 0.2]), store.rng.choice([0.0, 0.01])
        faults = drawn(seed, [f"s{i}" for i in range(SITES)], people=plan.deadline is not None)

        def lost(store: Faulty = store, always: bool = seed % 2 == 0) -> bool:
            return always or store.rng.random() < 0.5

        if isinstance(plan, asynchronous.Plan):
            service = served(store, lost, partial(BufferedService, schedule=asynchronous.how(plan)))
            wrong = asynchronous.fault_of(plan, seed, faults, service=service)
        else:
            wrong = fault_of(plan, seed, faults, service=served(store, lost))
        assert not wrong, f"seed {seed}: {wrong}"


plans = pytest.mark.parametrize("plan", [STRICT, LOOSE, asynchronous.PLAIN], ids=["strict", "loose", "asynchronous"])


@plans
def test_under_faults_of_everything_nothing_is_lost_and_the_bits_are_those_of_a_quiet_run(plan: Any) -> None:
    judged(plan, range(2))


@pytest.mark.slow
@plans
def test_the_same_many_times(plan: Any) -> None:
    judged(plan, range(2, 100))


def test_a_run_that_is_done_has_left_two_models() -> None:
    store = Faulty(0)
    process, training, _ = tallied(STRICT.rounds, SITES)
    made = World(process, STRICT, training, service=served(store, lambda: True)).run()
    assert made.done
    assert sorted(read(store.names())) == ["life", "models/00000002", "models/00000003"]
