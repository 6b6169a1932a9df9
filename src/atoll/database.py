"""Databases: one way to open them, whatever keeps its records there.

SQLite writes to a write-ahead log; PostgreSQL is reached through psycopg. What is durable when a transaction has
returned is an option:

    "process"   survives that the process is killed (SQLite: synchronous=NORMAL; PostgreSQL: synchronous_commit=off,
                with which PostgreSQL's own processes must not be killed)
    "power"     survives that the machine, or the database's, loses power (synchronous=FULL; synchronous_commit=on)

A database's password stands in its address and nowhere else: errors and logs name it by `shown`.
"""

import errno
import os
import socket
import struct
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sql
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from atoll.errors import InvalidArgument, RunError, invalid

Durability = Literal["process", "power"]

SYNCHRONOUS: dict[Durability, str] = {"process": "NORMAL", "power": "FULL"}
"""What SQLite's setting of that name is."""
PATIENCE = 30.0
"""Seconds that one who writes waits for others who write to the same SQLite file, or for a line that is dead."""
ALIVE = {"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3"}
"""So that PostgreSQL notices within half a minute that a machine is gone, and lets go of what it held."""


def sqlite(path: Path) -> str:
    """The address of an SQLite file."""
    return sql.URL.create("sqlite", database=str(path)).render_as_string()


def parsed(address: str) -> sql.URL:
    """An address of a database that can be opened, from whatever folder.

    Raises:
        InvalidArgument: it is none; the text never repeats it.
    """
    allowed = "an address such as postgresql://USER@HOST:5432/DATABASE or sqlite:////PATH"
    try:
        url = sql.make_url(address)
    except (ArgumentError, ValueError):
        raise InvalidArgument(f"the database must be {allowed}; what was given is none.") from None
    kind = url.get_backend_name()
    if "@" in (url.host or ""):
        raise InvalidArgument("the database's host holds an @: in a user's name or a password it is written %40.")
    if kind in ("postgres", "postgresql"):
        return url.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise invalid("database", kind, allowed)
    if not url.database or url.database == ":memory:":
        raise InvalidArgument("a database of SQLite must be a file: sqlite:////PATH.")
    return url.set(drivername="sqlite", database=str(Path(url.database).resolve()))


def shown(address: str) -> str:
    """An address without its secrets: no password, no options."""
    url = parsed(address)
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    user = f"{url.username}@" if url.username else ""
    port = f":{number}" if (number := url.port or url.query.get("port")) else ""
    host = url.host or str(url.query.get("host", ""))
    return f"postgresql://{user}{host}{port}/{url.database or ''}"


def complete(address: str) -> str:
    """An address that says all a process without this one's environment needs: for it alone, since it holds a password.

    Raises:
        InvalidArgument: it is no address.
        RunError: psycopg is missing.
    """
    url = parsed(address)
    if url.get_backend_name() != "postgresql":
        return url.render_as_string(hide_password=False)
    parts = {"user": "username", "password": "password", "host": "host", "port": "port", "dbname": "database"}
    for option in _psycopg().pq.Conninfo.get_defaults():
        name, value = option.keyword.decode(), os.environ.get((option.envvar or b"").decode())
        if not value or name in url.query or (name in parts and getattr(url, parts[name])):
            continue
        if name in (
            "user",
            "password",
            "dbname",
        ):  # a host may be a folder, which has no place before an address's path
            changed: dict[str, Any] = {parts[name]: value}
            url = url.set(**changed)
        else:
            url = url.update_query_dict({name: value})
    return url.render_as_string(hide_password=False)


def _psycopg() -> Any:
    """The library that speaks to PostgreSQL.

    Raises:
        RunError: it is missing.
    """
    try:
        import psycopg  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RunError("PostgreSQL needs psycopg: pip install 'atoll[postgresql]'.") from error
    return psycopg


def connect(address: str, durability: Durability = "process") -> sql.Engine:
    """A database, opened when it is first used.

    Args:
        address: as SQLAlchemy writes it.
        durability: of what is written.

    Raises:
        InvalidArgument: an address or a durability that cannot be.
        RunError: the log of an SQLite file is damaged; psycopg is missing.
    """
    url = parsed(address)
    if durability not in SYNCHRONOUS:
        raise invalid("durability", durability, '"process" or "power"')
    # Lines are few and long: a journal's own, and a short one now and then. None goes back to a pool with a lock on it.
    more: dict[str, Any] = {"hide_parameters": True, "poolclass": sql.NullPool}
    if url.get_backend_name() == "sqlite":
        assert url.database is not None
        whole(Path(url.database))
        engine = sql.create_engine(url, connect_args={"timeout": PATIENCE}, **more)

        def tune(connection: Any, _record: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA synchronous={SYNCHRONOUS[durability]}")

    else:
        _psycopg()
        line = {
            "application_name": f"atoll {socket.gethostname()[:40]} {os.getpid()}", "connect_timeout": 10,
            "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
            "tcp_user_timeout": int(PATIENCE * 1000),
        }  # fmt: skip
        more["connect_args"] = {n: v for n, v in line.items() if n not in url.query}
        engine = sql.create_engine(url, **more)

        def tune(connection: Any, _record: Any) -> None:
            settings = {"synchronous_commit": "on" if durability == "power" else "off", **ALIVE}
            connection.execute("; ".join(f"SET {name} = {value}" for name, value in settings.items()))
            connection.commit()

    event.listen(engine, "connect", tune)
    return engine


@contextmanager
def refusals(where: str) -> Generator[None]:
    """Tell what a database refuses as what a disk does, and damage as damage.

    Args:
        where: which database, without its secrets.

    Raises:
        RunError: the database is damaged, or none.
        OSError: it cannot be reached, has no room, or refuses for another reason.
    """
    try:
        yield
    except SQLAlchemyError as error:
        text = reason(error)
        if damaging(error):
            raise RunError(f"{where} is damaged or no database: {text}. Restore it from a backup.") from None
        raise OSError(errno.EIO, f"{where}: {text}") from None


def reason(error: SQLAlchemyError) -> str:
    """What a database said, in one line, without the statement and its values."""
    said = str(error.orig) if isinstance(error, DBAPIError) and error.orig is not None else type(error).__name__
    return " ".join(said.split())[:500]


def damaging(error: SQLAlchemyError) -> bool:
    """Whether an error tells that a database's own pages are damaged."""
    said = error.orig if isinstance(error, DBAPIError) else None
    name, state = getattr(said, "sqlite_errorname", None) or "", getattr(said, "sqlstate", None) or ""
    return name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or state in ("XX001", "XX002")


# --- SQLite's write-ahead log -----------------------------------------------------------------------------------------


def whole(path: Path) -> None:
    """Look whether a file's write-ahead log lost transactions: SQLite itself stops, without a word, at what is damaged.

    Each frame of the log has a checksum over all before it (https://sqlite.org/fileformat2.html, section 4). Power that
    fails tears the last transaction at most, where every one is synced; so more than one behind a frame that does not
    fit were there, and are no more.

    Raises:
        RunError: some are lost.
    """
    log = path.with_name(f"{path.name}-wal")
    for _ in range(3):  # a log that is written to just now may look so once
        if _behind_damage(log) < 2:
            return
        time.sleep(0.05)
    raise RunError(
        f"{log} is damaged: transactions behind the damage are lost. Restore the folder from a backup; or go on "
        f'without them: sqlite3 {path} "PRAGMA wal_checkpoint(TRUNCATE)"'
    )


def _behind_damage(log: Path) -> int:
    """Transactions from the first frame on that does not fit."""
    try:
        content = log.read_bytes()
    except FileNotFoundError:
        return 0
    if len(content) < 32:
        return 0
    magic, _, size, _, *salts, first, second = struct.unpack(">8I", content[:32])
    order = ">" if magic & 1 else "<"
    sums = _checksum(content[:24], (0, 0), order)
    fits, behind = sums == (first, second), 0
    if not fits:  # the salts may be what is damaged: those of the first frame are the same
        salts = list(struct.unpack(">2I", content[40:48])) if len(content) >= 56 else salts
        size = 4096 if not 512 <= size <= 65536 else size
    for at in range(32, len(content) - size - 23, 24 + size):
        frame = content[at : at + 24 + size]
        _, commits, *told = struct.unpack(">6I", frame[:24])
        if fits:
            sums = _checksum(frame[:8] + frame[24:], sums, order)
            fits = told[:2] == salts and tuple(told[2:]) == sums
        if not fits and commits and told[:2] == salts:
            behind += 1
    return behind


def _checksum(content: bytes, sums: tuple[int, int], order: str) -> tuple[int, int]:
    a, b = sums
    words = struct.unpack(f"{order}{len(content) // 4}I", content)
    for x, y in zip(words[::2], words[1::2], strict=True):
        a = (a + x + b) & 0xFFFFFFFF
        b = (b + y + a) & 0xFFFFFFFF
    return a, b
