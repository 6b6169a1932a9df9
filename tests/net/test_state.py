"""Journals and documents, the same on SQLite, on PostgreSQL and in the simulated world: whole, or told of."""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql
from postgres import Cluster
from sqlalchemy import event
from world import Crash
from world import Disk as Simulated

from atoll.database import complete, shown, sqlite
from atoll.errors import InvalidArgument, RunError
from atoll.net.state import State
from atoll.net.storage import Disk, Journal, state_of

pytestmark = pytest.mark.usefixtures("unsynced")

Open = Callable[[], State]


@pytest.fixture(params=["sqlite", "postgresql"])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """What opens the same state, as often as it is called."""
    if request.param == "sqlite":
        address = sqlite(tmp_path / "state.sqlite")
    else:
        address = request.getfixturevalue("postgresql")
    opened: list[State] = []

    def again() -> State:
        opened.append(State(address))
        return opened[-1]

    yield again
    for each in opened:
        each.close()


@pytest.fixture(params=["sqlite", "postgresql", "simulated"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Journal]:
    """What opens the same journal, as often as it is called."""
    if request.param == "simulated":
        disk = Simulated()
        return lambda: disk.journal("a/b")
    address = sqlite(tmp_path / "state.sqlite") if request.param == "sqlite" else request.getfixturevalue("postgresql")
    made = State(address)
    request.addfinalizer(made.close)
    return lambda: made.journal("a/b")


def test_records_come_back_in_order(journal: Callable[[], Journal], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atoll.net.state.READ", 20)
    records = [b"", b"a" * 100_000, b"\x00\xff", *(b"%d" % n for n in range(57))]
    first = journal()
    empty = first.head
    for record in records[:39]:
        first.append(record)
    assert list(first) == records[:39]
    first.close()
    second = journal()
    for record in records[39:]:
        second.append(record)
    assert list(second) == records and len(second) == len(records)
    head = second.head
    second.close()
    third = journal()
    assert list(third) == records and third.head == head != empty and len(head) == 64


# --- one writer -------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from atoll.net.state import State
state = State(sys.argv[1])
journal = state.journal("a")
journal.append(b"one")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another(state: State) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process that writes to the journal "a"."""
    words = [sys.executable, "-c", HOLD, state.address]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_by_name_and_may_write_when_the_first_is_killed(state: Open) -> None:
    mine = state()
    with another(mine) as process:
        with pytest.raises(RunError, match=rf"another process writes to the journal a in .*{process.pid}\)"):
            mine.journal("a")
        assert list(mine.records("a")) == [b"one"], "to read is free"
        other = mine.journal("b")
        other.append(b"two")
        process.kill()
        process.wait()
    taken = once_free(lambda: mine.journal("a"))
    taken.append(b"three")
    assert list(taken) == [b"one", b"three"]


def once_free(open_: Callable[[], Journal]) -> Journal:
    """PostgreSQL notices within moments that a process is gone."""
    import time

    until = time.monotonic() + 60.0
    while True:
        try:
            return open_()
        except RunError:
            assert time.monotonic() < until
            time.sleep(0.02)


def test_a_journal_that_somebody_else_wrote_to_is_written_to_no_more(state: Open) -> None:
    mine = state()
    journal = mine.journal("a")
    journal.append(b"one")
    with mine.engine.begin() as line:  # who lost the lock, and another has it
        line.execute(sql.text("UPDATE atoll_journals SET records = 2"))
    for _ in range(2):
        with pytest.raises(RunError, match="another process wrote to the journal a"):
            journal.append(b"two")


RACE = """
import sys
from atoll.net.state import State
print("ready", flush=True)
sys.stdin.readline()
journal = State(sys.argv[1]).journal(sys.argv[2])
for n in range(30):
    journal.append(b"%d" % n)
"""


@pytest.mark.slow
def test_several_processes_begin_and_write_at_once_each_its_own_journal(state: Open) -> None:
    """Also the tables are made once, and by any of them."""
    mine = state()
    with mine.engine.begin() as line:
        for table in ("meta", "journals", "records", "documents"):
            line.exec_driver_sql(f"DROP TABLE atoll_{table}")
    words = [sys.executable, "-c", RACE, mine.address]
    started = [subprocess.Popen([*words, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for name in "abc"]
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    for process in started:
        process.communicate(b"go\n", timeout=200.0)
    assert [process.returncode for process in started] == [0, 0, 0]
    assert all(list(mine.records(name)) == [b"%d" % n for n in range(30)] for name in "abc")


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "at"),
    [
        ("UPDATE atoll_records SET body = (SELECT body FROM atoll_records WHERE number = 0) WHERE number = 1", 1),
        ("DELETE FROM atoll_records WHERE number = 1", 1),
        ("DELETE FROM atoll_records WHERE number = 3", 3),
        ("DELETE FROM atoll_records WHERE number = 0", 0),
        ("UPDATE atoll_records SET number = 7 - number WHERE number IN (3, 4)", 3),
        ("UPDATE atoll_journals SET records = 3", 3),
        ("DELETE FROM atoll_records", 0),
    ],
)
def test_a_record_that_was_changed_taken_out_or_moved_is_told(state: Open, statement: str, at: int) -> None:
    mine = state()
    with closing(mine.journal("a")) as journal:
        for n in range(4):
            journal.append(b"%d" % n)
    with mine.engine.begin() as line:
        line.exec_driver_sql(statement)
    for open_ in (mine.records, mine.journal, mine.journal):
        with pytest.raises(RunError, match=rf"the journal a in .* is damaged at record {at}"):
            open_("a")


def test_records_behind_the_end_are_told_to_the_writer(state: Open) -> None:
    mine = state()
    with closing(mine.journal("a")) as journal:
        for n in range(4):
            journal.append(b"%d" % n)
    with mine.engine.begin() as line:  # a journal's row from yesterday, and today's records
        before = "(SELECT head FROM atoll_records WHERE number = 2)"
        line.exec_driver_sql(f"UPDATE atoll_journals SET records = 3, head = {before}")
    with pytest.raises(RunError, match="is damaged at record 3"):
        mine.journal("a")


def test_a_file_that_is_none_or_is_torn_is_told(tmp_path: Path) -> None:
    with closing(state_of(tmp_path)) as made, closing(made.journal("a")) as journal:
        for n in range(100):
            journal.append(b"%d" % n * 500)
    path = tmp_path / "state.sqlite"
    whole = path.read_bytes()
    for content in (b"no database" * 1000, whole[: len(whole) // 2], whole[:8192] + bytes(4096) + whole[12288:]):
        path.write_bytes(content)
        with pytest.raises(RunError, match="damaged"), closing(state_of(tmp_path)) as made:
            made.journal("a")


def log_of(tmp_path: Path, records: int) -> tuple[Path, bytes]:
    """A state whose process was killed: its write-ahead log, and what is in it."""
    done = subprocess.run(
        [sys.executable, "-c", "import os, sys; from pathlib import Path; from atoll.net.storage import state_of\n"
         f"j = state_of(Path(sys.argv[1])).journal('a')\nfor n in range({records}): j.append(b'%d' % n)\nos._exit(0)",
         str(tmp_path)], check=False,
    )  # fmt: skip
    assert done.returncode == 0
    path = tmp_path / "state.sqlite-wal"
    return path, path.read_bytes()


def test_a_process_that_was_killed_loses_nothing(tmp_path: Path) -> None:
    log_of(tmp_path, 9)
    assert len(state_of(tmp_path).records("a")) == 9


def test_a_damaged_write_ahead_log_is_told_and_not_silently_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    path, content = log_of(tmp_path, 9)
    whole = (tmp_path / "state.sqlite").read_bytes()
    rng = random.Random(0)
    for at in (0, 9, 17, 25, *(rng.randrange(32, len(content) * 3 // 4) for _ in range(8))):
        (tmp_path / "state.sqlite").write_bytes(whole)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        for _ in range(2):  # it is not forgotten by looking
            with pytest.raises(RunError, match=r"state.sqlite-wal is damaged: transactions behind"):
                state_of(tmp_path)


def test_a_transaction_that_was_torn_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    path, content = log_of(tmp_path, 9)
    for cut in (1, 100, 4119, 4121):
        path.write_bytes(content[:-cut])
        with closing(state_of(tmp_path)) as made:
            assert len(made.records("a")) == 8
        path.write_bytes(content)
        for name in ("state.sqlite-shm",):
            (tmp_path / name).unlink(missing_ok=True)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_database_refused_is_not_in_the_journal(state: Open, when: str) -> None:
    """Also where the transaction was made durable before the line broke off, and its writer cannot know."""
    mine = state()
    journal = mine.journal("a")
    journal.append(b"one")

    def breaks(line: Any) -> None:
        if when == "after":
            line.connection.commit()
        raise sql.exc.OperationalError("", {}, Exception("the line broke off"))

    event.listen(mine.engine, "commit", breaks)
    for _ in range(2):
        with pytest.raises(OSError, match="the line broke off"):
            journal.append(b"lost")
    event.remove(mine.engine, "commit", breaks)
    assert list(journal) == [b"one"]
    journal.append(b"two")
    assert list(journal) == [b"one", b"two"]
    journal.close()
    assert list(mine.journal("a")) == [b"one", b"two"]


def test_a_record_whose_acknowledgement_was_lost_may_be_there_after_a_crash(state: Open) -> None:
    mine = state()
    journal = mine.journal("a")
    journal.append(b"one")

    def breaks(line: Any) -> None:
        line.connection.commit()
        raise sql.exc.OperationalError("", {}, Exception("the line broke off"))

    event.listen(mine.engine, "commit", breaks)
    with pytest.raises(OSError):
        journal.append(b"two")
    event.remove(mine.engine, "commit", breaks)
    journal.close()
    assert list(mine.journal("a")) == [b"one", b"two"]


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path) -> None:
    made = state_of(tmp_path)

    def limit(connection: Any, record: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={limits[-1]}")

    event.listen(made.engine, "connect", limit)
    made.engine.dispose()
    limits = [30]
    journal = made.journal("a")
    with pytest.raises(OSError, match="full"):
        for _ in range(100):
            journal.append(bytes(4096))
    there = len(journal)
    assert 0 < there == len(list(journal))
    with pytest.raises(OSError, match="full"):
        journal.append(bytes(4096))
    limits.append(1000)
    made.engine.dispose()
    journal.append(b"more")
    assert len(list(journal)) == there + 1


def test_postgresql_that_is_started_again(postgres: Cluster, postgresql: str) -> None:
    made = State(postgresql)
    journal = made.journal("a")
    journal.append(b"one")
    postgres.stop()
    try:
        for _ in range(2):
            with pytest.raises(OSError):
                journal.append(b"lost")
    finally:
        postgres.start()
    journal.append(b"two")
    assert list(journal) == [b"one", b"two"]
    with pytest.raises(RunError, match="another process writes"):
        made.journal("a")
    made.close()


@pytest.mark.parametrize("seed", range(40))
def test_what_was_appended_survives_a_power_cut_of_the_simulated_world(seed: int) -> None:
    rng = random.Random(seed)
    files = Simulated()
    files.crash_at = {rng.randint(1, 30): rng.choice(["before", "after"]) for _ in range(4)}
    files.full = lambda: rng.random() < 0.2
    told: list[bytes] = []
    for turn in range(20):
        try:
            journal = files.journal("log")
            assert list(journal)[: len(told)] == told and len(journal) <= len(told) + 1
            told = list(journal)
            journal.append(b"%d" % turn)
            told.append(b"%d" % turn)
        except (Crash, OSError):
            files.power_fails(rng)
        else:
            journal.close()
    assert list(files.journal("log"))[: len(told)] == told


# --- what is known of a state -----------------------------------------------------------------------------------------


def test_documents_are_replaced_as_a_whole_and_damage_is_told(state: Open) -> None:
    mine = state()
    assert mine.documents("charter") == {}
    mine.put("charter", "a", b"one")
    mine.put("charter", "a", b"two")
    mine.put("charter", "b", b"")
    mine.put("final", "a", b"three")
    assert state().documents("charter") == {"a": b"two", "b": b""}
    with mine.engine.begin() as line:
        line.exec_driver_sql("UPDATE atoll_documents SET kind = 'charter', name = 'c' WHERE kind = 'final'")
        line.exec_driver_sql(
            "UPDATE atoll_documents SET sha256 = (SELECT sha256 FROM atoll_documents WHERE name = 'a')"
        )
    with pytest.raises(RunError, match="the charter of b is damaged"):
        mine.documents("charter")


def test_a_state_of_another_version_is_refused_by_name(state: Open) -> None:
    mine = state()
    with mine.engine.begin() as line:
        line.exec_driver_sql("UPDATE atoll_meta SET value = '2' WHERE key = 'schema'")
    with pytest.raises(RunError, match="schema version '2'; this Atoll reads version '1'"):
        state()


def test_a_state_is_one_servers(state: Open) -> None:
    state().belongs("a" * 64)
    state().belongs("a" * 64)
    with pytest.raises(RunError, match=f"fingerprint {'a' * 64}; the key here has {'b' * 64}"):
        state().belongs("b" * 64)


def test_a_journal_that_is_forgotten_is_gone_and_no_other(state: Open) -> None:
    mine = state()
    others = ["b", "runs/A_%/journal", "runs/ab%/journal", "runs/a_/journal", "x/runs/a_%/journal"]
    for name in ("a", "runs/a_%/journal", *others):
        with closing(mine.journal(name)) as journal:
            journal.append(name.encode())
    for scope in ("a", "runs/a_%/"):
        mine.forget(scope)
    assert list(mine.records("a")) == list(mine.records("runs/a_%/journal")) == []
    assert all(list(mine.records(name)) == [name.encode()] for name in others)
    assert list(mine.journal("a")) == []


def test_a_password_is_nowhere_but_in_the_address(postgres: Cluster, postgresql: str, tmp_path: Path) -> None:
    made = State(postgresql)
    told = [repr(made), made.shown, repr(made.engine)]
    for wrong in (
        postgresql.replace(f":{postgres.password}@", ":wrong-password@"),
        postgresql.replace("/postgres?", "/nowhere?"),
    ):
        with pytest.raises(OSError) as refusal:
            State(wrong)
        told += [str(refusal.value), repr(refusal.value), repr(refusal.value.__cause__)]
    journal = made.journal("a")
    with pytest.raises(RunError) as taken:
        made.journal("a")
    told.append(str(taken.value))
    with pytest.raises(InvalidArgument) as no_address:
        State(f"postgresql:/{postgres.password}")
    told.append(str(no_address.value))
    with pytest.raises(InvalidArgument) as no_database:
        State(f"mysql://u:{postgres.password}@h/d")
    told.append(str(no_database.value))
    assert not any(postgres.password in text or "wrong-password" in text for text in told), told
    journal.close()
    made.close()


def test_a_password_may_come_from_the_environment_and_is_handed_on(
    postgres: Cluster, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of a run is given an address and not this one's environment."""
    without = postgresql.replace(f":{postgres.password}@", "@")
    monkeypatch.delenv("PGPASSWORD", raising=False)
    with pytest.raises(OSError, match="password"):
        State(without)
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    with closing(State(without)) as made:
        monkeypatch.delenv("PGPASSWORD")
        State(made.address).close()
        assert postgres.password not in made.shown


def test_what_the_environment_says_of_a_database_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, the process of a run would speak to another database, or to this one without TLS."""
    pytest.importorskip("psycopg")
    told = {
        "HOST": "/run/pg",
        "PORT": "6000",
        "USER": "u",
        "PASSWORD": "a@/b",
        "SSLMODE": "require",
        "PASSFILE": "/x y",
    }
    for name, value in told.items():
        monkeypatch.setenv(f"PG{name}", value)
    whole = complete("postgresql:///d")
    more = complete("postgresql://v:w@h:1/e?sslmode=verify-full")
    for name in told:
        monkeypatch.delenv(f"PG{name}")
    assert complete(whole) == whole and shown(whole) == "postgresql://u@/run/pg:6000/d"
    assert "a%40" not in repr(sql.make_url(whole)) and "a@" not in repr(sql.make_url(whole))
    url = sql.make_url(whole)
    _, found = url.get_dialect()().create_connect_args(url)
    assert found == {
        "host": "/run/pg", "port": "6000", "user": "u", "password": "a@/b", "dbname": "d", "sslmode": "require",
        "passfile": "/x y",
    }  # fmt: skip
    assert (sql.make_url(more).host, sql.make_url(more).password) == ("h", "w"), "what was named goes before it"
    assert sql.make_url(more).query["sslmode"] == "verify-full" and "port" not in sql.make_url(more).query


def test_half_a_password_is_not_taken_for_a_host() -> None:
    with pytest.raises(InvalidArgument, match="%40") as refusal:
        State("postgresql://u:secret@half@h/d")
    assert "half" not in str(refusal.value)


@pytest.mark.parametrize("address", ["", "nothing", "sqlite://", "sqlite:///:memory:", "mysql://u:p@h/d", "oracle://h"])
def test_what_is_no_address_of_a_database_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgument, match=r"postgresql://USER@HOST|must be a file"):
        State(address)


def test_what_is_durable_is_an_option(tmp_path: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for durability, sqlites, postgres in (("process", 1, "off"), ("power", 2, "on")):
        made = State(sqlite(tmp_path / "state.sqlite"), durability=durability)
        with made.engine.connect() as line:
            assert line.exec_driver_sql("PRAGMA synchronous").scalar() == sqlites
            assert line.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        made = State(postgresql, durability=durability)
        with made.engine.connect() as line:
            assert line.exec_driver_sql("SHOW synchronous_commit").scalar() == postgres
        made.close()
    with pytest.raises(InvalidArgument, match='"process" or "power"'):
        State(sqlite(tmp_path / "state.sqlite"), durability="hope")  # type: ignore[arg-type]


def test_a_disk_keeps_its_journals_beside_its_files(tmp_path: Path) -> None:
    disk = Disk(tmp_path, scope="runs/a/")
    disk.journal("journal").append(b"one")
    disk.close()
    assert list(state_of(tmp_path).journal("runs/a/journal")) == [b"one"]
