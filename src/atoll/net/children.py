"""Processes that run an author's code, and what is said to them: by the server for a run, by a site for its tasks.

A child gets no key, no socket but the one to its parent, and an environment of listed variables. A message is two
lengths, a JSON object of a fixed schema and a blob; what a child says is read as a stranger's. A child that hangs, dies
or talks nonsense is ended with everything it started, and a new one is made when there is work.
"""

import asyncio
import ctypes
import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from atoll.errors import RunError
from atoll.net.buffers import Buffer, room
from atoll.net.calls import Charter, Closed, InBuffer, Spent
from atoll.net.control import Count, Name, PublicKey, Stamp, Terms, Work

HEADER = 2**25
"""Bytes of a message without its blob."""

ENVIRONMENT = (
    "PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "ATOLL_DATA",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES",
)  # fmt: skip
"""Variables that a child is given."""

TUNED = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Variables that are set for a child unless they are already: whole models are made and let go of in every round, and
memory that comes in large pages costs less than half of what it costs page by page."""


class _Said(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    pass


class Broken(_Said, frozen=True):
    """It cannot be done.

    Attributes:
        kind: of the error.
        text: for the owner of the machine alone.
    """

    kind: Annotated[str, Meta(max_length=100)]
    text: Annotated[str, Meta(max_length=4000)]


# --- the server and the process of a run ------------------------------------------------------------------------------


class Host(_Said, frozen=True):
    """Load a run from its folder and go on with it.

    Attributes:
        folder: of the run.
        charter: of the run.
        now: seconds on the server's clock.
        state: address of the database that the run's journal is in, password and all.
        durability: of what the run writes.
        objects: address of the store that the run's objects are in; "": they are in its folder alone.
    """

    folder: str
    charter: Charter
    now: float
    state: str
    durability: Literal["process", "power"] = "power"
    objects: str = ""

    def __repr__(self) -> str:
        return f"Host({self.folder!r})"


class Receive(_Said, frozen=True):
    """A message of a site, as the server has authenticated it; the blob is the message.

    Attributes:
        upload: name of the file of the report beside it; "": there is none.
    """

    site: Name
    upload: str
    now: float


class Happen(_Said, frozen=True):
    """Something happened to a site, or an operator decided something; `key` is that of a site that joined."""

    event: Literal["joined", "left", "revoked", "pause", "resume", "discard", "stop"]
    site: str
    reason: str
    now: float
    key: PublicKey = ""


class Answered(_Said, frozen=True):
    """A site answered a question about its table; the blob is what it answered."""

    site: Name
    stage: Literal["survey", "spread"]


class Tick(_Said, frozen=True):
    """Time has passed."""

    now: float


class Do(_Said, frozen=True):
    """Make a task or combine a round."""

    now: float


class Finish(_Said, frozen=True):
    """The run is over: write its result."""


class Several(_Said, frozen=True):
    """Do these in their order, one whatever becomes of another; the blob is theirs, one after the other.

    Attributes:
        calls: what to do.
        lengths: bytes of the blob of each.
    """

    calls: list[Receive | Happen | Answered]
    lengths: list[Count]


HostCall = Host | Receive | Happen | Answered | Several | Tick | Do | Finish


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A site in a run.

    Attributes:
        status: as the coordinator has it.
        counted: round and attempt of its update that was counted last.
        doing: in the round at work, as in `calls.SiteView`.
        why: it is excluded, or out of the sum.
        task: in an asynchronous run round and attempt of what it is asked for; None: nothing.
    """

    status: Literal["active", "paused", "left", "revoked"]
    counted: Stamp | None = None
    doing: Literal["", "asked", "delivered", "excluded", "out of the sum"] = ""
    why: str = ""
    task: Stamp | None = None


class Summary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A run between two events; names as in `coordinator.State`.

    Attributes:
        busy: whether `Do` has something to do.
        stage, question: of preparing, as in `calls.Errand`.
        identity: of what is trained.
        largest: bytes of a report at most.
        turn: turns there were at this round's secure sum.
        step: of the turn at work; "": there is none.
        sites: by name.
        closed: rounds that were closed since this process began to tell.
        notices: what came up since the last summary.
        privacy: what its noise took; None: it has none.
        buffer: of an asynchronous run.
    """

    phase: str = ""
    reason: str = ""
    round: int = 0
    rounds: int = 0
    attempt: int = 0
    wanted: int = 0
    least: int = 0
    number: int = 0
    busy: bool = False
    stage: Literal["", "survey", "spread", "ready"] = ""
    question: str = ""
    identity: str = ""
    title: str = ""
    largest: int = 0
    turn: int = 0
    step: str = ""
    sites: dict[str, Place] = {}
    closed: list[Closed] = []
    notices: list[str] = []
    privacy: Spent | None = None
    buffer: InBuffer | None = None


SITES = 100_000
"""Sites of a run."""


class Heard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of one of several calls.

    Attributes:
        length: bytes of its answer.
        broken: why it could not be done, for the owner of the machine alone; None: it is done.
    """

    length: Count = 0
    broken: Annotated[str, Meta(max_length=4000)] | None = None


class Told(_Said, frozen=True):
    """The run after a call; the blob is the answer to a site, if there is one.

    Attributes:
        summary: the run.
        whole: whether all of it is told. Else `sites` are those alone that are other than this process told before, and
            there is a `question` only where the stage is another.
        heard: after `Several` what became of each, as far as their answers are not too long together; the blob is
            their answers, one after the other. What is left is asked again.
    """

    summary: Summary
    whole: bool = True
    heard: list[Heard] = []


def merged(before: Summary | None, told: Told) -> tuple[Summary, frozenset[str]]:
    """The run now, and the names of the sites that are other than they were.

    Args:
        before: the run as it was; where not all is told, its `sites` are taken over and changed in place.
        told: by the run's process.

    Raises:
        RunError: it told of more sites than a run can have.
    """
    now = told.summary
    known = {} if before is None else before.sites
    new = {name: place for name, place in now.sites.items() if known.get(name) != place}
    if len(known) + len(new.keys() - known.keys()) > SITES:
        raise RunError(f"the run's process told of more than {SITES:,} sites.")
    if told.whole or before is None:
        return now, frozenset(new.keys() | (known.keys() - now.sites.keys()))
    known |= new
    question = before.question if now.stage == before.stage else now.question
    return msgspec.structs.replace(now, question=question, sites=known), frozenset(new)


def ended(content: bytes) -> Summary:
    """How a run ended, as the server's state has it: in this form, or in the earlier one, where a site was its status.

    Raises:
        RunError: it has neither form.
    """
    try:
        told = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        if "counted" not in told:
            return msgspec.json.decode(content, type=Summary)
        counted = msgspec.json.decode(told["counted"], type=dict[str, Stamp])
        statuses = msgspec.json.decode(told["sites"], type=dict[str, str])
        known = {n: msgspec.json.decode(v) for n, v in told.items() if n in Summary.__struct_fields__ and n != "sites"}
        sites = {n: {"status": s, "counted": counted.get(n)} for n, s in statuses.items()}
        return msgspec.convert({**known, "sites": sites}, Summary)
    except (msgspec.MsgspecError, KeyError) as error:
        raise RunError(f"how it ended was written by another version of Atoll: {error}") from error


HostReply = Told | Broken


# --- a site and the process of a run's tasks --------------------------------------------------------------------------


class Begin(_Said, frozen=True):
    """Load an experiment.

    Attributes:
        app: path of the app file, which the site's owner has approved.
        charter: of the run.
        site: the site's name.
        data: what the experiment's recipe is bound to; "": the experiment brings its own data.
        memory: bytes of data this process may have; 0: no limit.
        files: bytes a file it writes may have.
    """

    app: str
    charter: Charter
    site: Name
    data: str
    memory: Count
    files: Count


class Survey(_Said, frozen=True):
    """Answer the first question about the table; the blob of the reply is the answer."""


class Spread(_Said, frozen=True):
    """Answer the second question, which is the blob."""


class Prepare(_Said, frozen=True):
    """Bind the data; the blob is the preprocessing that was agreed, or empty where there is none."""


class Train(_Said, frozen=True):
    """Work on a task; the blob is its frame, then what the client remembers."""

    work: Work
    frame: Count


class Ready(_Said, frozen=True):
    """It is done.

    Attributes:
        identity: of what is trained.
        recipe: whether the data must be prepared.
        sums: what its secure sum is about; None: it has none.
        silent: why nothing is said of what a model is worth; "": it may be.
    """

    identity: str
    recipe: bool
    sums: Terms | None
    silent: Annotated[str, Meta(max_length=1000)] = ""


class Trained(_Said, frozen=True):
    """A report; the blob is its frame, then what the client remembers if it counts."""

    parts: tuple[Count, Count, Count]
    sent: Count
    frame: Count


WorkerCall = Begin | Survey | Spread | Prepare | Train
WorkerReply = Ready | Trained | Broken

host_calls: msgspec.json.Decoder[HostCall] = msgspec.json.Decoder(HostCall)
host_replies: msgspec.json.Decoder[HostReply] = msgspec.json.Decoder(HostReply)
worker_calls: msgspec.json.Decoder[WorkerCall] = msgspec.json.Decoder(WorkerCall)
worker_replies: msgspec.json.Decoder[WorkerReply] = msgspec.json.Decoder(WorkerReply)

_T = TypeVar("_T")


# --- the parent's side ------------------------------------------------------------------------------------------------


class ChildDied(RunError):
    """A child ended, hung or talked nonsense; it is gone now."""


class Child:
    """A process, as its parent has it; calls are answered one after the other."""

    def __init__(self, process: asyncio.subprocess.Process, line: socket.socket) -> None:
        self._process, self._line = process, line
        self._calling = self._ended = False

    @staticmethod
    async def start(module: str, *, log: Path, cwd: Path, more: Mapping[str, str] | None = None) -> "Child":
        """Start `python -m module`, which writes what it prints to a file; `more` variables are its own."""
        ours, theirs = socket.socketpair()
        given = {n: os.environ[n] for n in ENVIRONMENT if n in os.environ} | dict(more or {})
        with theirs, open(log, "ab") as out:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", module, str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, cwd=cwd, pass_fds=(theirs.fileno(),),
                start_new_session=True, env=TUNED | given,
            )  # fmt: skip
        ours.setblocking(False)
        return Child(process, ours)

    @property
    def alive(self) -> bool:
        """Whether it can be called."""
        return self._process.returncode is None and not self._ended

    async def call(
        self,
        call: Any,
        replies: "msgspec.json.Decoder[_T]",
        blobs: Sequence[Buffer] = (),
        *,
        seconds: float | None,
        largest: int = 0,
    ) -> tuple[_T, Buffer]:
        """Make a call; the reply and its blob.

        Args:
            call: it.
            replies: what may be replied.
            blobs: what goes with it, one after the other.
            seconds: how long the reply may take; None: any time.
            largest: bytes the reply's blob may have.

        Raises:
            ChildDied: there was no reply that could be read in time.
        """
        self._calling = True
        try:
            async with asyncio.timeout(seconds):
                header = msgspec.json.encode(call)
                lengths = len(header).to_bytes(8, "little") + sum(map(len, blobs)).to_bytes(8, "little")
                loop = asyncio.get_running_loop()
                for part in (lengths + header, *blobs):
                    await loop.sock_sendall(self._line, part)
                head = await self._received(16)
                first, second = int.from_bytes(head[:8], "little"), int.from_bytes(head[8:], "little")
                if first > HEADER or second > largest:
                    raise ValueError(f"it announced {first} + {second} bytes, limit {HEADER} + {largest}")
                content = await self._received(first)
                return replies.decode(content), await self._received(second)
        except TimeoutError:
            await self.end()
            raise ChildDied(f"the task's process was ended: it had not answered after {seconds:g} seconds.") from None
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            await self.end()
            raise ChildDied("the task's process was ended: its answer could not be read.") from error
        except (OSError, EOFError) as error:
            with suppress(TimeoutError):  # how it ended is worth a moment
                await asyncio.wait_for(asyncio.shield(self._process.wait()), 1.0)
            await self.end()
            code = self._process.returncode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            raise ChildDied(f"the task's process died ({how}).") from error
        except asyncio.CancelledError:
            await self.end()
            raise
        finally:
            self._calling = False
            if self._ended:
                self._line.close()

    async def _received(self, length: int) -> Buffer:
        """So many bytes of what it says."""
        loop, into, at = asyncio.get_running_loop(), room(length), 0
        while at < length:
            got = await loop.sock_recv_into(self._line, into[at:])
            if not got:
                raise EOFError
            at += got
        return into

    async def end(self) -> None:
        """End it, with everything it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._ended = True
        if self._calling:  # the event loop waits at it, and would not hear of a socket that is closed
            with suppress(OSError):
                self._line.shutdown(socket.SHUT_RDWR)
        else:
            self._line.close()
        await asyncio.shield(self._process.wait())


# --- the child's side -------------------------------------------------------------------------------------------------


class Channel:
    """The line to the parent, as a child has it.

    Args:
        descriptor: of the socket, from the command line.
    """

    def __init__(self, descriptor: int) -> None:
        end_with_parent()
        os.set_inheritable(descriptor, False)
        self._line = socket.socket(fileno=descriptor)

    def receive(self) -> tuple[Buffer, Buffer] | None:
        """The next call and its blob; None when the parent is gone."""
        try:
            head = self._received(16)
            first, second = int.from_bytes(head[:8], "little"), int.from_bytes(head[8:], "little")
            return self._received(first), self._received(second)
        except (EOFError, ConnectionError):
            return None

    def _received(self, length: int) -> Buffer:
        into, at = room(length), 0
        while at < length:
            got = self._line.recv_into(into[at:])
            if not got:
                raise EOFError
            at += got
        return into

    def reply(self, reply: Any, *blobs: Buffer) -> None:
        """Reply to the call at hand."""
        header = msgspec.json.encode(reply)
        lengths = len(header).to_bytes(8, "little") + sum(map(len, blobs)).to_bytes(8, "little")
        for part in (lengths + header, *blobs):
            self._line.sendall(part)


def end_with_parent(parent: int | None = None) -> None:
    """Have this process killed when its parent is, where the system can do that (Linux).

    Args:
        parent: process id of the parent: if it is gone already, this process ends at once. None: whoever waits on a
            line to the parent notices that itself. A parent may well have the id 1, as in a container.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def limit(memory: int, files: int) -> None:
    """Bound this process before it runs anybody's code.

    Args:
        memory: bytes of data; 0: no limit.
        files: bytes of a file it writes.
    """
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (files, files))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
