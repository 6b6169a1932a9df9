"""The state of a server or a site in one database, SQLite or PostgreSQL.

    atoll_meta       schema version; whose state it is; which of several servers leads (`leading`)
    atoll_journals   a row for each journal: its name, how many records it has, the hash of all of them
    atoll_records    journal, number -> a record, and the hash of all records up to it
    atoll_documents  kind, name -> what is replaced as a whole, and its hash

A journal has one writer: on PostgreSQL an advisory lock that ends with the writer's line, on SQLite a lock on a file
beside it, `STATE-ID.lock`, that ends with the writer's process. A record is written on condition that the journal is
as the writer left it, so that even one who lost the lock without knowing cannot write beside another.

No secret is in it: of invites the tokens' hashes, of members the public keys.
"""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.dialects import postgresql, sqlite

from atoll.database import Durability, complete, connect, parsed, refusals, shown
from atoll.errors import RunError

SCHEMA = "1"
"""Version of the tables."""
START = bytes(32)
"""The hash of no records."""
READ = 1000
"""Records that are read at a time."""
_CREATION = 0x61746F6C6C  # PostgreSQL's advisory lock under which tables are made

_metadata = sql.MetaData()
_meta = sql.Table(
    "atoll_meta",
    _metadata,
    sql.Column("key", sql.String(64), primary_key=True),
    sql.Column("value", sql.Text, nullable=False),
)
_journals = sql.Table(
    "atoll_journals",
    _metadata,
    sql.Column("id", sql.Integer, primary_key=True, autoincrement=True),
    sql.Column("name", sql.String(512), nullable=False, unique=True),
    sql.Column("records", sql.BigInteger, nullable=False),
    sql.Column("head", sql.LargeBinary, nullable=False),
)
_records = sql.Table(
    "atoll_records",
    _metadata,
    sql.Column("journal", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("number", sql.BigInteger, primary_key=True, autoincrement=False),
    sql.Column("head", sql.LargeBinary, nullable=False),
    sql.Column("body", sql.LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)
_documents = sql.Table(
    "atoll_documents",
    _metadata,
    sql.Column("kind", sql.String(64), primary_key=True),
    sql.Column("name", sql.String(512), primary_key=True),
    sql.Column("sha256", sql.LargeBinary, nullable=False),
    sql.Column("body", sql.LargeBinary, nullable=False),
)


class Taken(RunError):
    """Another process writes to a journal."""


class Overtaken(RunError):
    """A journal is not as its writer left it."""


LEAD = sql.select(_meta.c.value).where(_meta.c.key == "lead")
"""Which of several servers leads: its token and its address."""


def lead_row(value: str) -> "postgresql.Insert":
    """A statement that tells who leads from now on."""
    made = postgresql.insert(_meta).values(key="lead", value=value)
    return made.on_conflict_do_update(index_elements=[_meta.c.key], set_={"value": value})


class State:
    """The tables of a database, which are made if there are none.

    Attributes:
        token: of the server that leads, where there are several: documents are written for as long as it does; "":
            there is one.

    Args:
        address: of the database.
        durability: of what is written.
        patience: seconds that a writer waits for one that is about to let go.

    Raises:
        InvalidArgument: an address that cannot be.
        RunError: the database is damaged, or its tables are of another version.
        OSError: it cannot be reached.
    """

    def __init__(self, address: str, *, durability: Durability = "power", patience: float = 0.0) -> None:
        self.address, self.patience = complete(address), patience
        self.durability: Durability = durability
        self.token = ""
        self.shown = shown(address)
        url = parsed(address)
        self.file = Path(str(url.database)) if url.get_backend_name() == "sqlite" else None
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        self.engine = connect(self.address, durability)
        try:
            with refusals(self.shown):
                self._prepare()
        except BaseException:
            self.engine.dispose()
            raise

    def __repr__(self) -> str:
        return f"State({self.shown!r})"

    def _prepare(self) -> None:
        with self.engine.begin() as line:
            if not sql.inspect(line).has_table(_meta.name):
                if self.file is None:
                    line.execute(sql.select(sql.func.pg_advisory_xact_lock(_CREATION)))
                else:
                    line.exec_driver_sql("BEGIN IMMEDIATE")
                _metadata.create_all(line)
                if line.execute(_version()).scalar() is None:
                    line.execute(_meta.insert().values(key="schema", value=SCHEMA))
            found = line.execute(_version()).scalar()
        if found != SCHEMA:
            raise RunError(
                f"{self.shown} holds state of schema version {found!r}; this Atoll reads version {SCHEMA!r}: start the "
                "Atoll that wrote it, or name another database."
            )

    def owner(self) -> str | None:
        """Whose the state is; None: nobody's yet."""
        with refusals(self.shown), self.engine.connect() as line:
            return line.execute(sql.select(_meta.c.value).where(_meta.c.key == "owner")).scalar()

    def belongs(self, owner: str) -> None:
        """Make the state somebody's for good.

        Args:
            owner: who says that it is its own.

        Raises:
            RunError: it is somebody else's.
        """
        with refusals(self.shown), self.engine.begin() as line:
            found = line.execute(sql.select(_meta.c.value).where(_meta.c.key == "owner")).scalar()
            if found is None:
                line.execute(_meta.insert().values(key="owner", value=owner))
        if found not in (None, owner):
            raise RunError(
                f"{self.shown} is the state of another server, whose key has the fingerprint {found}; the key here has "
                f"{owner}: restore that server's folder, or name another database."
            )

    def alone(self) -> None:
        """There is one server from now on: of several that were there before none leads, nor writes.

        Raises:
            OSError: the database cannot be reached.
        """
        with refusals(self.shown), self.engine.begin() as line:
            line.execute(_meta.delete().where(_meta.c.key == "lead"))

    # --- documents ----------------------------------------------------------------------------------------------------

    def put(self, kind: str, name: str, body: bytes) -> None:
        """Write a document, in the place of what is there; durable when this returns.

        Raises:
            OSError: nothing is changed.
        """
        row = {"sha256": hashlib.sha256(body).digest(), "body": body}
        with refusals(self.shown), self.engine.begin() as line:
            self._leads(line)
            here = (_documents.c.kind == kind) & (_documents.c.name == name)
            if not line.execute(_documents.update().where(here).values(**row)).rowcount:
                line.execute(_documents.insert().values(kind=kind, name=name, **row))

    def _leads(self, line: sql.Connection) -> None:
        """Of several servers the one that leads writes; until this transaction is over no other begins to."""
        if self.token:
            told = line.execute(LEAD.with_for_update(read=True)).scalar() or ""
            if told.partition(" ")[0] != self.token:
                raise OSError(errno.EPERM, f"{self.shown}: another server leads by now; this one writes no more")

    def documents(self, kind: str) -> dict[str, bytes]:
        """All documents of a kind, by name.

        Raises:
            RunError: one is damaged.
            OSError: the database cannot be reached.
        """
        query = sql.select(_documents).where(_documents.c.kind == kind).order_by(_documents.c.name)
        with refusals(self.shown), self.engine.connect() as line:
            rows = line.execute(query).all()
        for row in rows:
            if hashlib.sha256(row.body).digest() != row.sha256:
                raise RunError(f"{self.shown}: the {kind} of {row.name} is damaged. Restore it from a backup.")
        return {row.name: row.body for row in rows}

    # --- journals -----------------------------------------------------------------------------------------------------

    def journal(self, name: str) -> "SqlJournal":
        """A journal to write to, made if there is none.

        Raises:
            RunError: another process writes to it; it is damaged.
            OSError: the database cannot be reached.
        """
        return SqlJournal(self, name)

    def records(self, name: str) -> "Records":
        """A journal to read, as far as it goes now; empty where there is none.

        Raises:
            RunError: it is damaged.
            OSError: the database cannot be reached.
        """
        return Records(self, name)

    def forget(self, scope: str) -> None:
        """Remove the journals whose names begin so, to which nobody writes.

        Raises:
            OSError: nothing is removed.
        """
        with refusals(self.shown), self.engine.begin() as line:
            self._leads(line)
            ours = sql.func.substr(_journals.c.name, 1, len(scope)) == scope  # SQLite's LIKE does not tell a from A
            line.execute(_records.delete().where(_records.c.journal.in_(sql.select(_journals.c.id).where(ours))))
            line.execute(_journals.delete().where(ours))

    def close(self) -> None:
        """Let go of the database; its journals are closed by whoever opened them."""
        self.engine.dispose()


class Records:
    """The records of a journal when it was opened.

    Each holds the hash of all records before it and its own: one that was changed, taken out or moved is noticed, and
    so is an end that is missing.

    Args:
        state: where.
        name: of the journal.

    Raises:
        RunError: the journal is damaged.
        OSError: the database cannot be reached.
    """

    def __init__(self, state: State, name: str) -> None:
        self._state, self._name = state, name
        self._id, self._count, self._head = -1, 0, START
        self._load()

    def _load(self) -> None:
        with refusals(self._state.shown), self._state.engine.connect() as line:
            self._read(line)

    def _read(self, line: sql.Connection) -> None:
        """How far the journal goes; its records are looked at, all of them."""
        row = line.execute(_row(self._name)).one_or_none()
        if row is not None:
            self._id, self._count, self._head = row.id, row.records, row.head
        for _ in self._through(line):
            pass

    def __iter__(self) -> Iterator[bytes]:
        """All records, read anew.

        Raises:
            RunError: one is damaged.
            OSError: the database cannot be reached.
        """
        with refusals(self._state.shown), self._state.engine.connect() as line:
            yield from self._through(line)

    def _through(self, line: sql.Connection) -> Iterator[bytes]:
        chain, number, count, head = START, 0, self._count, self._head
        while number < count:
            mine = (_records.c.journal == self._id) & (_records.c.number >= number) & (_records.c.number < count)
            query = sql.select(_records).where(mine).order_by(_records.c.number).limit(READ)
            rows = line.execute(query).all()
            for row in rows:
                chain = _chained(chain, row.body)
                if row.number != number or row.head != chain:
                    raise self._damaged(number)
                number += 1
                yield row.body
            if not rows:
                raise self._damaged(number)
        if chain != head:
            raise self._damaged(number)

    def __len__(self) -> int:
        return self._count

    @property
    def head(self) -> str:
        """Hash of all records, in hexadecimal digits."""
        return self._head.hex()

    def _damaged(self, number: int) -> RunError:
        return RunError(
            f"the journal {self._name} in {self._state.shown} is damaged at record {number}: its records no longer fit "
            "together. Restore it from a backup; nothing from that record on can be trusted."
        )


class SqlJournal(Records):
    """A journal whose one writer this process is, until it is closed.

    Args:
        state: where.
        name: of the journal.

    Raises:
        Taken: another process writes to it.
        RunError: it is damaged.
        OSError: the database cannot be reached.
    """

    def __init__(self, state: State, name: str) -> None:
        self._line: sql.Connection | None = None
        self._lock: Any = None
        self._owed: bytes | None = None  # the hash up to a record that may be there although it was refused
        super().__init__(state, name)

    def _load(self) -> None:
        with refusals(self._state.shown):
            with self._state.engine.begin() as line:
                self._id = self._made(line)
            try:
                self._line = self._opened()  # from here on nobody else writes
                self._read(self._line)
                behind = (_records.c.journal == self._id) & (_records.c.number >= self._count)
                if self._line.execute(sql.select(_records.c.number).where(behind).limit(1)).scalar() is not None:
                    raise self._damaged(self._count)
                self._line.rollback()
            except BaseException:
                self.close()
                raise

    def _made(self, line: sql.Connection) -> int:
        """The journal's number, which it is given if it has none."""
        row = line.execute(_row(self._name)).one_or_none()
        if row is not None:
            return row.id
        empty = {"name": self._name, "records": 0, "head": START}
        insert = postgresql.insert if self._state.file is None else sqlite.insert
        line.execute(insert(_journals).values(**empty).on_conflict_do_nothing())  # somebody else may make it just now
        return line.execute(_row(self._name)).one().id

    def append(self, record: bytes) -> None:
        """Add a record; it is durable when this returns.

        Raises:
            Overtaken: another process wrote to the journal, or its end is lost.
            OSError: the record is not in the journal; after a crash it may be.
        """
        after = _chained(self._head, record)
        with refusals(self._state.shown):
            line = self._held()
            self._owed = after
            try:
                with line.begin():
                    self._moves(line, (self._count, self._head), (self._count + 1, after))
                    row = {"journal": self._id, "number": self._count, "head": after, "body": record}
                    line.execute(_ADDED, row)
            except RunError:
                self._owed = None
                self._drop()
                raise
            except BaseException:
                self._drop()
                raise
        self._count, self._head, self._owed = self._count + 1, after, None

    def close(self) -> None:
        """Let somebody else write."""
        self._drop()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _moves(self, line: sql.Connection, before: tuple[int, bytes], after: tuple[int, bytes]) -> None:
        """Change the journal's row, which must be as it was left."""
        left = {"of": self._id, "from_records": before[0], "from_head": before[1]}
        done = line.execute(_MOVED, {**left, "records": after[0], "head": after[1]})
        if done.rowcount != 1:
            raise Overtaken(
                f"another process wrote to the journal {self._name} in {self._state.shown}, or the database lost the "
                "last of it: this process writes no more. Stop the other one, if there is one, and start this again."
            )

    def _held(self) -> sql.Connection:
        """The writer's own line; opened again if it broke, when the journal must be as it was left."""
        if self._line is None:
            try:
                line = self._opened()
            except Taken as taken:  # it may be this one's own line, of which PostgreSQL does not know yet that it broke
                raise OSError(errno.EBUSY, str(taken)) from None
            try:
                with line.begin():
                    row = line.execute(_row(self._name)).one()
                    found, left = (row.records, row.head), (self._count, self._head)
                    if found == (self._count + 1, self._owed):  # it was refused, and yet it is there
                        self._moves(line, found, left)
                        gone = (_records.c.journal == self._id) & (_records.c.number == self._count)
                        line.execute(_records.delete().where(gone))
                    else:
                        self._moves(line, left, left)
            except BaseException:
                line.invalidate()
                line.close()
                raise
            self._line, self._owed = line, None
        return self._line

    def _opened(self) -> sql.Connection:
        """A line that holds the lock."""
        line, until = self._state.engine.connect(), time.monotonic() + self._state.patience
        try:
            while True:
                try:
                    self._take(line)
                    break
                except Taken:
                    if time.monotonic() >= until:
                        raise
                    time.sleep(0.1)
        except BaseException:
            line.invalidate()
            line.close()
            raise
        return line

    def _drop(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.invalidate()
            line.close()

    def _take(self, line: sql.Connection) -> None:
        """Become the one writer."""
        if self._state.file is None:
            key = "(('atoll_journals'::regclass::oid::bigint << 32) | :id)"
            if not line.execute(sql.text(f"SELECT pg_try_advisory_lock({key})"), {"id": self._id}).scalar():
                who = line.execute(_HOLDER, {"id": self._id}).scalar()
                raise self._taken(str(who or "unknown"))
            line.commit()
        elif self._lock is None:
            path = self._state.file.with_name(f"{self._state.file.name}-{self._id}.lock")
            lock = open(path, "a+")  # noqa: SIM115
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                who = lock.read(100).strip()
                lock.close()
                raise self._taken(who) from None
            lock.truncate(0)
            lock.write(f"process {os.getpid()}")
            lock.flush()
            self._lock = lock

    def _taken(self, who: str) -> Taken:
        lost = "" if self._state.file else " Of a machine that was lost, PostgreSQL lets go within half a minute."
        return Taken(
            f"another process writes to the journal {self._name} in {self._state.shown} ({who}): stop it first.{lost}"
        )


_HOLDER = sql.text(
    "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.locktype = 'advisory' AND "
    "l.granted AND l.objsubid = 1 AND l.classid = 'atoll_journals'::regclass::oid AND l.objid::bigint = :id AND "
    "l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)

# Written once: a statement that is put together for every record costs more than the record.
_ADDED = _records.insert()
_MOVED = (
    _journals.update()
    .where(
        _journals.c.id == sql.bindparam("of"),
        _journals.c.records == sql.bindparam("from_records"),
        _journals.c.head == sql.bindparam("from_head"),
    )
    .values(records=sql.bindparam("records"), head=sql.bindparam("head"))
)


def _version() -> "sql.Select[Any]":
    return sql.select(_meta.c.value).where(_meta.c.key == "schema")


def _row(name: str) -> "sql.Select[Any]":
    return sql.select(_journals).where(_journals.c.name == name)


def _chained(head: bytes, record: bytes) -> bytes:
    return hashlib.sha256(head + record).digest()
