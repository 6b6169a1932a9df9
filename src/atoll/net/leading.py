"""Which of several servers leads: one at a time at most, and what one that led before writes is void.

Whoever holds an advisory lock of their PostgreSQL leads. It is one session's, and free again when that session ends: at
once where its process was killed, within half a minute where its machine was lost. A row of `atoll_meta` tells whose
word holds and where it is reached:

    lead   TOKEN HOST:PORT

The token is drawn anew by whoever begins to lead. What is replaced as a whole (`state.State.put`) is written on
condition that the row still has the writer's token, in one transaction with it; journals are conditional by themselves.
So a server that lost the lock without knowing yet changes nothing any more.
"""

import os
import secrets
import socket
from contextlib import suppress
from typing import Any, NamedTuple

import sqlalchemy as sql

from atoll.database import refusals
from atoll.net.state import LEAD, State, lead_row


class Leader(NamedTuple):
    """Who leads, or led last.

    Attributes:
        token: drawn when it began.
        address: where the others reach it, host:port.
    """

    token: str
    address: str


class Lead:
    """A server's claim to lead.

    Attributes:
        address: where the others reach it.
        token: of its claim.

    Args:
        state: of the servers, in PostgreSQL.
        address: where the others reach this one.
    """

    def __init__(self, state: State, address: str) -> None:
        self._state, self.address = state, address
        self._line: sql.Connection | None = None
        self.token = secrets.token_hex(16)

    def take(self) -> bool:
        """Lead from now on, if nobody does.

        Raises:
            OSError: the database cannot be reached.
        """
        with refusals(self._state.shown):
            return bool(self._held().execute(_TAKEN).scalar())

    def tell(self) -> None:
        """Tell the others that this one leads; what whoever led before writes is void from now on.

        Raises:
            OSError: the database cannot be reached.
        """
        with refusals(self._state.shown):
            self._held().execute(lead_row(f"{self.token} {self.address}"))
        self._state.token = self.token

    def leader(self) -> Leader | None:
        """Who leads, or led last; None: nobody yet.

        Raises:
            OSError: the database cannot be reached.
        """
        with refusals(self._state.shown):
            told = self._held().execute(LEAD).scalar()
        if told is None:
            return None
        token, _, address = str(told).partition(" ")
        return Leader(token, address)

    def beat(self) -> None:
        """Ask the database whether the line is there.

        Raises:
            OSError: it is not.
        """
        with refusals(self._state.shown):
            if self._line is None:
                raise OSError("the line is gone.")
            self._line.execute(sql.text("SELECT 1"))

    def fileno(self) -> int:
        """The line's file: it becomes readable when the database has cut it."""
        assert self._line is not None
        line: Any = self._line.connection.driver_connection
        return line.fileno()

    def cut(self) -> None:
        """Break the line off, whoever is waiting for an answer on it."""
        with suppress(Exception), socket.socket(fileno=os.dup(self.fileno())) as line:  # it may be broken already
            line.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        """Lead no more, and let go of the line; the next claim is a new one."""
        line, self._line = self._line, None
        self.token = secrets.token_hex(16)
        if line is not None:
            with suppress(Exception):  # one that broke may say so
                line.invalidate()
                line.close()

    def _held(self) -> sql.Connection:
        if self._line is None:
            self._line = self._state.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        return self._line


_TAKEN = sql.text("SELECT pg_try_advisory_lock('atoll_meta'::regclass::oid::bigint << 32)")
