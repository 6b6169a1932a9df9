"""A PostgreSQL of the tests' own: a cluster in a new folder, on a socket in it, that ends with its parent."""

import ctypes
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sql

USER = "atoll"
PATIENCE = 120.0


def programs() -> Path | None:
    """Where PostgreSQL's programs are; None: it is not installed. Debian keeps them off the PATH, by version."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    every = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((p.parent for p in every), key=lambda p: int(p.parent.name), default=None)


class Cluster:
    """A cluster at work.

    Attributes:
        password: of its one user, who may do everything.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self.programs = folder, programs
        self.password = secrets.token_hex(16)
        self._who = None
        if os.geteuid() == 0:  # it refuses to work for root
            names = {u.pw_name for u in pwd.getpwall()}
            self._who = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
            os.chown(folder, self._who.pw_uid, self._who.pw_gid)
        word = folder / "password"
        word.write_text(self.password)
        if self._who is not None:
            os.chown(word, self._who.pw_uid, self._who.pw_gid)
        self._run("initdb", "-D", folder / "data", "-U", USER, "-A", "scram-sha-256", "--pwfile", word, "-N",
                  "-E", "UTF8", "--locale", "C").wait(PATIENCE)  # fmt: skip
        self._made = 0
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = (
            "listen_addresses=",
            "fsync=off",
            "full_page_writes=off",
            "shared_buffers=16MB",
            "max_connections=50",
        )
        told = [word for each in settings for word in ("-c", each)]
        self._postmaster = self._run("postgres", "-D", self.folder / "data", "-k", self.folder, *told)
        until = time.monotonic() + PATIENCE
        while True:
            try:
                self._do("SELECT 1")
                return
            except sql.exc.OperationalError:
                log = (self.folder / "log").read_text()
                assert self._postmaster.poll() is None and time.monotonic() < until, log
                time.sleep(0.05)

    def stop(self) -> None:
        """Stop it at once: lines break off."""
        self._postmaster.send_signal(signal.SIGINT)
        self._postmaster.wait(PATIENCE)

    def address(self) -> str:
        """The address of its database, password and all."""
        return f"postgresql://{USER}:{self.password}@/postgres?host={self.folder}"

    def database(self) -> str:
        """An address in which there are no tables yet: of a schema, which is made sooner than a database."""
        self._made += 1
        self._do(f"CREATE SCHEMA test{self._made}")
        return f"{self.address()}&options=-csearch_path%3Dtest{self._made}"

    def _do(self, statement: str) -> None:
        engine = sql.create_engine(self.address().replace("postgresql:", "postgresql+psycopg:"), poolclass=sql.NullPool)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as line:
            line.exec_driver_sql(statement)

    def _run(self, program: str, *words: object) -> "subprocess.Popen[bytes]":
        more = {} if self._who is None else {"user": self._who.pw_uid, "group": self._who.pw_gid, "extra_groups": []}

        def ends_with_parent() -> None:
            ctypes.CDLL(None).prctl(1, signal.SIGINT)

        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(
                [str(self.programs / program), *map(str, words)], cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, preexec_fn=ends_with_parent, **more,
            )  # fmt: skip


@contextmanager
def cluster(programs: Path) -> Iterator[Cluster]:
    """A cluster for as long as it is needed."""
    folder = Path(tempfile.mkdtemp(prefix="atoll-postgres-"))
    made = None
    try:
        made = Cluster(folder, programs)
        yield made
    finally:
        if made is not None:
            made.stop()
        shutil.rmtree(folder, ignore_errors=True)
