"""Several servers with one identity, one PostgreSQL and one folder: one leads, and each of them serves every site.

    load balancer, TCP --+-- server 1, leads:      answers
                         +-- server 2, stands by:  hands every connection to server 1, byte for byte
                         +-- server 3, stands by:  likewise

The one that leads (`leading`) is a server like any other: it alone has the roster, the runs with their processes, and
what is fresh of requests, so that an invite holds once and a request counts once whichever server it came to, and a
question that is held back is woken wherever it was asked. The others hand over what comes to them (`handing`). When the
leader is gone, the first of them to notice leads: it reads the state and goes on with every run, as a server does that
was killed and started again. Requests to the one before it are void, since it draws an epoch of its own.

Nobody works beside its successor. A server that finds its line to the database cut or dead stops answering, and ends
its runs' processes, at once; what it writes in between is refused by journals and documents. The files of a run belong
to whoever holds the lock in its folder, which is let go of last: a process of a run waits for the one before it.
"""

import asyncio
import fcntl
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn

from atoll.errors import InvalidArgument, RunError, invalid
from atoll.net.handing import Answers, Hands, listen
from atoll.net.hub import Hub
from atoll.net.keys import fingerprint, key_at
from atoll.net.leading import Lead
from atoll.net.server import Door, configured, establish, listening, opened, shelved
from atoll.net.state import State, Taken
from atoll.net.storage import write_file

if TYPE_CHECKING:
    from atoll.database import Durability

LOOK = 0.25
"""Seconds between two looks whether somebody leads."""
BEAT, STILL = 2.0, 5.0
"""Seconds between two questions whether the database is there, and in which it must answer: together they are shorter
than the time after which PostgreSQL lets go of the lock of one that it does not hear of."""
SHARED = 60.0
"""Seconds in which what the leader wrote into its folder must be seen here, and before which this one does not lead."""
ONE = "several servers need one folder, on a file system that they share."
LEADERS = 100
"""Tokens of those who led that the folder keeps."""

log = logging.getLogger("atoll.server")

T = TypeVar("T")


def serve_several(
    folder: Path,
    *,
    host: str,
    port: int,
    address: str | None,
    among: str,
    told: Callable[[str, str, str], None],
    database: str | None = None,
    durability: "Durability" = "power",
    metrics: tuple[str, int] | None = None,
) -> None:
    """Serve as one of several until a signal says to stop.

    Args:
        folder: as of `server.serve`, on a file system that all of the servers share.
        host: what to listen on.
        port: likewise.
        address: as sites reach whichever server: the load balancer's.
        among: where the other servers reach this one, host:port, in a network of their own; port 0: any free one.
        told: called with the address, the fingerprint and the place of the state when the server listens.
        database: address of the PostgreSQL that all of them share.
        durability: as of `server.serve`.
        metrics: likewise, told while this server leads.

    Raises:
        InvalidArgument: arguments that cannot be.
        RunError: the state is that of other servers, or they share another folder; a port is taken; the database cannot
            be used.
    """
    if address is None:
        raise InvalidArgument(
            "several servers have one address, that of what stands before them: name it with --address HOST:PORT."
        )
    where, _, number = among.rpartition(":")
    if where in ("", "0.0.0.0", "::", "[::]") or not number.isdecimal() or int(number) > 65535:
        raise invalid("--among", among, "HOST:PORT, where the other servers reach this one")
    os.umask(0o077)  # sites' updates lie here
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with ExitStack() as held:
        lock = held.enter_context(open(folder / "lock", "a+"))  # read, too: a shared lock of NFS asks for it
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"a server works in {folder} that is not one of several: stop it, and start it with --among."
            ) from None
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is a file
        listener = held.enter_context(listening(host, port))
        inside = held.enter_context(listening(where.strip("[]"), int(number), "--among"))
        state, note = opened(folder, database, durability)
        held.callback(state.close)
        if state.file is not None:
            raise RunError(
                f"several servers need a PostgreSQL that they share, and {state.shown} is a file of SQLite: name one "
                "with --database postgresql://USER@HOST/DATABASE."
            )
        reached = f"{where}:{inside.getsockname()[1]}"
        one = One(folder, state, note, listener, inside, Lead(state, reached), address, told, metrics)

        async def live() -> None:
            for each in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(each, one.ends)
            await one.live()

        asyncio.run(live())


class One:
    """One of several servers; arguments as of `serve_several`, and what was opened for it."""

    def __init__(
        self,
        folder: Path,
        state: State,
        note: Callable[[], None],
        listener: socket.socket,
        inside: socket.socket,
        lead: Lead,
        address: str,
        told: Callable[[str, str, str], None],
        metrics: tuple[str, int] | None,
    ) -> None:
        self._folder, self._state, self._note, self._address, self._metrics = folder, state, note, address, metrics
        self._listener, self._inside, self._lead, self._told = listener, inside, lead, told
        self._hands: Hands | None = None
        self._answers: Answers | None = None
        self._stop = asyncio.Event()
        self._server: uvicorn.Server | None = None
        self._tasks = set[asyncio.Task[None]]()
        self._inner: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1)  # of its own: the answer of the database waits behind no disk

    async def _asked(self, call: Callable[[], T]) -> T:
        """What a call of the database gives."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def live(self) -> None:
        """Stand by, lead, and so on, until told to end.

        Raises:
            RunError: it cannot be one of the servers of this state.
        """
        self._listener.setblocking(False)
        self._inside.setblocking(False)
        try:
            while not self._stop.is_set() and await self._stands_by():
                try:
                    await self._leads()
                finally:
                    self._lead.cut()
                    await self._asked(self._lead.drop)  # behind a question that is still on its way
        finally:
            await self._asked(self._lead.drop)
            tasks = [*self._tasks, *([self._inner] if self._inner else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def leads(self) -> bool:
        """Whether this server leads, and answers."""
        return self._server is not None and self._server.started

    def ends(self) -> None:
        """End."""
        self._stop.set()
        if self._server is not None:
            self._listener.close()  # who comes from now on is sent to another server by what stands before
            self._server.should_exit = True

    # --- standing by --------------------------------------------------------------------------------------------------

    async def _stands_by(self) -> bool:
        """Hand connections over until this server leads; False: it is to stop."""
        taking: asyncio.Task[None] | None = None
        before, trouble, ours = "", "", time.monotonic()
        try:
            while not self._stop.is_set():
                try:
                    if await self._owned() and taking is None:
                        taking = asyncio.create_task(listen(self._listener, self._hand().take, self._tasks))
                    leader = await self._asked(self._lead.leader)
                    if leader is None or self._shares(leader.token):
                        ours = time.monotonic()
                        if await self._asked(self._lead.take):
                            return True
                    elif time.monotonic() - ours > SHARED:
                        raise RunError(
                            f"the server that leads on the state in {self._state.shown}, or led last, does not work in "
                            f"{self._folder.resolve()}: {ONE} If it is that folder, from a backup, start one server "
                            "in it without --among first."
                        )
                    if leader is not None and self._hands is not None:
                        self._hands.to = leader.address
                        if leader.token != before:
                            before = leader.token
                            log.info("stands by: %s leads, or led last", leader.address)
                    trouble = ""
                except OSError as error:
                    self._lead.drop()
                    if str(error) != trouble:
                        trouble = str(error)
                        log.error("the database cannot be used: %s; trying again", error)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), LOOK)
            return False
        finally:
            if taking is not None:
                taking.cancel()
                await asyncio.gather(taking, return_exceptions=True)

    def _hand(self) -> Hands:
        assert self._hands is not None
        return self._hands

    async def _owned(self) -> bool:
        """Whether the servers have an identity, and this folder has it; with it connections can be handed over.

        Raises:
            RunError: it is another one.
        """
        if self._hands is not None:
            return True
        owner = await self._asked(self._state.owner)
        if owner is None:  # whoever leads first makes it
            return False
        if not (self._folder / "key").exists():
            raise RunError(
                f"{self._folder.resolve()} has no key, and {self._state.shown} is the state of servers whose key has "
                f"the fingerprint {owner}: {ONE}"
            )
        own = fingerprint(key_at(self._folder / "key").public_key())
        await self._asked(lambda: self._state.belongs(own))
        self._begin()
        return True

    def _begin(self) -> None:
        """The identity is there: tell, and have connections handed over and taken."""
        if self._hands is None:
            key = key_at(self._folder / "key")
            self._hands, self._answers = Hands(key), Answers(key.public_key())
            self._inner = asyncio.create_task(listen(self._inside, self._answers.greeted, self._tasks))
            self._told(self._address, fingerprint(key.public_key()), self._state.shown)

    def _shares(self, token: str) -> bool:
        """Whether this folder is that of a server that led."""
        return token in self._led()

    def _led(self) -> list[str]:
        """Tokens of those who led, as the folder has them."""
        try:
            return (self._folder / "leaders").read_text().split()
        except FileNotFoundError:
            return []

    # --- leading ------------------------------------------------------------------------------------------------------

    async def _leads(self) -> None:
        """Lead until the database lets go of this server, or a signal comes."""
        try:
            door = await self._asked(self._taken_over)
        except (OSError, Taken) as error:  # whoever led before may be about to let go
            log.error("cannot lead yet: %s", error)
            await asyncio.sleep(1.0)
            return
        self._begin()
        with closing(door.hub.roster):
            server = self._server = _Server(configured(door, self._folder), self._ready)
            watch = asyncio.create_task(self._watched(server))
            try:
                if not self._stop.is_set():
                    await server.serve(sockets=[self._listener.dup()])
            except SystemExit:  # uvicorn's word for a start that failed, whose reason it tells its own log alone
                if door.failed is None:
                    raise
                raise door.failed from None
            finally:
                self._server = None
                if self._answers is not None:
                    self._answers.take = None
                for connection in list(server.server_state.connections):
                    connection.transport.abort()
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)

    def _ready(self, server: "_Server") -> None:
        """This server answers: whoever waits is handed over to itself."""
        assert self._answers is not None
        self._answers.take, self._hand().to = server.handed, self._lead.address
        log.info("leads; the others reach it at %s", self._lead.address)

    def _taken_over(self) -> Door:
        """Read the state, as whoever led before has left it.

        Raises:
            RunError: it is damaged, or of other servers.
            OSError: the database cannot be reached.
        """
        # First here: whoever is killed in between has told nobody, and what is told is always here.
        write_file(self._folder / "leaders", "\n".join([*self._led()[-LEADERS:], self._lead.token]).encode())
        self._lead.tell()
        home = establish(self._folder, self._address, self._state)
        self._note()
        shelved(None, home.identity.fingerprint, self._state)
        return Door(
            Hub(self._folder, home.identity.fingerprint, self._address, self._state), self._folder, self._metrics
        )

    async def _watched(self, server: uvicorn.Server) -> None:
        """Stop answering as soon as the line on which this server leads is cut, or the database is silent."""
        loop, cut = asyncio.get_running_loop(), asyncio.Event()
        file = self._lead.fileno()
        loop.add_reader(file, cut.set)
        try:
            while True:
                with suppress(TimeoutError):
                    await asyncio.wait_for(cut.wait(), BEAT)
                loop.remove_reader(file)  # the answer to a question is not news
                try:
                    await asyncio.wait_for(self._asked(self._lead.beat), STILL)
                except (OSError, TimeoutError) as error:
                    log.error("leads no more: %s", error or "the database does not answer")
                    server.config.timeout_graceful_shutdown = 0
                    server.should_exit = True
                    self._lead.cut()
                    return
                cut.clear()
                loop.add_reader(file, cut.set)
        finally:
            loop.remove_reader(file)


class _Server(uvicorn.Server):
    """A server that is stopped by who started it, and takes connections that were handed over.

    Args:
        config: of it.
        ready: called when it answers.
    """

    def __init__(self, config: uvicorn.Config, ready: "Callable[[_Server], None]") -> None:
        super().__init__(config)
        self._is_ready = ready

    @contextmanager
    def capture_signals(self) -> Any:
        """Leave signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        self._is_ready(self)

    async def handed(self, line: socket.socket, told: tuple[str, int]) -> None:
        """Take a connection as if it came straight from where it did."""
        config = self.config

        def made() -> Any:
            made: Any = config.http_protocol_class
            protocol = made(config=config, server_state=self.server_state, app_state=self.lifespan.state)
            protocol.told = told
            return protocol

        try:
            await asyncio.get_running_loop().connect_accepted_socket(made, line, ssl=config.ssl)
        except OSError:  # TLS came to nothing
            line.close()
