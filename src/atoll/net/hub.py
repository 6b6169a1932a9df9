"""What a server knows and does, without HTTP: members, runs, and the processes that the runs live in.

    key, authority.pem   the server's identity
    runs/NAME/           a run's folder, in the hands of its process (`deployment.runner`); of the server in it:
      uploads/             reports on their way, appended to chunk by chunk

and in the server's state, `state.sqlite` in its folder or a database elsewhere (`state`):

    roster               a journal: members and invites, `enrolment`
    charter, RUN         what a run is
    final, RUN           how it ended; from then on no process is needed
    newest, KEY          of each site the newest process that was heard
    runs/RUN/journal     a journal, written by the run's process

All methods run on one event loop. What a run's process says changes what is known of the run: it wakes watchers, and of
the questions that are held back those whose answer may be another now, so that what a round costs grows with the number
of its sites and not with its square.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec

from atoll.errors import InvalidArgument, RunError, invalid
from atoll.net import calls, control
from atoll.net.buffers import Buffer
from atoll.net.calls import Charter, Closed, Errand, Errands, Problem, SiteView, Standing, View
from atoll.net.children import (
    Answered,
    Broken,
    Child,
    ChildDied,
    Do,
    Finish,
    Happen,
    Host,
    HostCall,
    Receive,
    Several,
    Summary,
    Tick,
    Told,
    ended,
    host_replies,
    merged,
)
from atoll.net.control import Answer, Ask, Deliver, Ended, Refused, Request, Say, Wait
from atoll.net.enrolment import Invite, Member, Roster, encode
from atoll.net.news import Bells, News
from atoll.net.storage import Disk, scope, state_of, write_durably

if TYPE_CHECKING:  # what a command imports to start a server need not open a database
    from atoll.net.shelves import Shelves
    from atoll.net.state import State

RUNNER = "atoll.deployment.runner"

HOLD = 25.0
"""Seconds that a question is held back while there is no news: shorter than what middleboxes cut."""
LOADING, WORKING = 600.0, 3600.0
"""Seconds a run's process may take to load a run, and to do anything."""
AT_ONCE = 256
"""Calls that are brought to a run's process at a time: each by itself would wait for several turns of a loop that has a
thousand sites to serve."""
NOTICES, ROUNDS = 20, 100
"""What of a run is shown."""
GLANCE, LONGEST_GLANCE = 5e-4, 10.0
"""Seconds for every site of a run by which a watcher is told later, so that it is told of many things at a time; and at
most: it gives up after a minute."""
RESTS = ("paused", "finished", "stopped")
"""Phases that wake every question when they begin and end."""

log = logging.getLogger("atoll.server")


class Denied(RunError):
    """The server will not do it; `problem` is what the asker is told."""

    def __init__(self, kind: Any, text: str, *, received: int = 0) -> None:
        super().__init__(text)
        self.problem = Problem(kind, text, received=received)


@dataclass(eq=False, slots=True)
class _Waiting:
    """A call to a run's process that waits its turn."""

    call: Receive | Happen | Answered
    blob: bytes
    answer: asyncio.Future[bytes]

    def tell(self, answer: bytes) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)

    def fail(self, error: RunError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Run:
    """A run at the server: its folder, its process, and what both told.

    Args:
        folder: of the run.
        charter: what it is.
        agenda: told when what sites have to know of it changes.
        member: who has a name, whether shut out or not.
        state: of the server.
        final: how the run ended, as the state has it; empty: it is not over.
        shelves: where its objects are; None: in its folder alone.
    """

    def __init__(
        self,
        folder: Path,
        charter: Charter,
        agenda: News,
        member: Callable[[str], Member | None],
        state: "State",
        final: bytes = b"",
        shelves: "Shelves | None" = None,
    ) -> None:
        self.folder, self.charter, self.news, self.agenda = folder, charter, News(), agenda
        self._member, self._state, self.shelves = member, state, shelves
        self.summary: Summary | None = None
        self.trouble = ""
        self.over = False
        self.standings: dict[str, Standing] = {}
        self.closed: dict[int, Closed] = {}
        self.notices: deque[str] = deque(maxlen=NOTICES)
        self.refusals: dict[str, str] = {}
        self._child: Child | None = None
        self._taking: dict[str, Taking] = {}
        self._looked = Counter[str]()
        self._turn = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None
        self._bells, self._due = Bells(), News()
        self._waiting = deque[_Waiting]()
        self._bringing: asyncio.Task[None] | None = None
        if final:
            self.over = True
            try:
                self._learn(Told(ended(final)))
            except RunError as error:
                raise RunError(f"run {charter.run}: {error}") from error

    def _shut_out(self, site: str) -> bool:
        member = self._member(site)
        return member is not None and member.revoked

    # --- its process --------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Start the run's process.

        Raises:
            RunError: the experiment cannot be loaded; the text says why.
        """
        async with self._turn:
            await self._load()

    async def _load(self) -> None:
        if self._child is not None and self._child.alive:
            return
        try:
            (self.folder / "uploads").mkdir(parents=self.shelves is not None, exist_ok=True)
            more = None if self.shelves is None else self.shelves.environment
            child = await Child.start(RUNNER, log=self.folder / "process.log", cwd=self.folder, more=more)
        except OSError as error:  # with a reason it can be stopped
            self._broken(f"its process cannot be started: {error}")
            raise
        state = self._state
        objects = "" if self.shelves is None else self.shelves.url(self.charter.run)
        host = Host(str(self.folder.resolve()), self.charter, time.time(), state.address, state.durability, objects)
        try:
            reply, _ = await child.call(host, host_replies, seconds=LOADING)
        except ChildDied as error:
            self._broken(str(error))
            raise
        if isinstance(reply, Broken):
            await child.end()
            self._broken(reply.text)
            raise RunError(reply.text)
        if self.over:  # somebody stopped it meanwhile
            await child.end()
            return
        self._child, self.trouble = child, ""
        self._learn(reply)

    def keep(self) -> None:
        """Keep the run going from now on."""
        if self._keeper is None and not self.over:
            self._keeper = asyncio.get_running_loop().create_task(self._kept())

    async def _kept(self) -> None:
        """Whatever is due: work, the time, a process that died, the end."""
        pause, ticked = 1.0, time.monotonic()
        while not self.over:
            try:
                if self._child is None:
                    await self.load()
                    pause = 1.0
                before = self.summary
                assert before is not None
                for site in [s for s, p in before.sites.items() if p.status != "revoked" and self._shut_out(s)]:
                    await self.ask(Happen("revoked", site, "", time.time()))
                if before.phase in ("finished", "stopped"):
                    await self._end()
                elif before.busy:
                    await self.ask(Do(time.time()))
                    if self.summary is not None and self.summary.busy and self.summary.number == before.number:
                        await asyncio.sleep(1.0)  # the disk refused: there may be room later
                elif time.monotonic() - ticked > 1.0:
                    ticked = time.monotonic()
                    await self.ask(Tick(time.time()))
                else:
                    await self._due.wait(1.0)
            except (RunError, OSError) as error:  # a full disk, or no room for a process: there may be later
                log.warning("run %s: %s", self.charter.run, error)
                await asyncio.sleep(pause)
                pause = min(60.0, 2 * pause)

    async def _end(self) -> None:
        await self.ask(Finish())
        assert self.summary is not None
        self._keep_final(self.summary)
        self.over = True
        async with self._turn:  # a question at work is answered first: the run's process must not be said to have died
            if self._child is not None:
                await self._child.end()
                self._child = None
        self._bells.ring()
        self.agenda.tell()
        self.news.tell()
        await self.tidy()

    async def tidy(self) -> None:
        """Of a run that is over, have in the store what stays, and on the disk its result."""
        if self.shelves is not None:
            try:
                await asyncio.to_thread(self.shelves.settle, self.charter.run, self.folder)
            except (RunError, OSError) as error:  # when the server starts, it is tried again
                log.warning("run %s: %s", self.charter.run, control.plain(str(error)))

    def abandon(self, reason: str) -> None:
        """End a run whose process cannot be started: what its journal says stays as it is."""
        summary = msgspec.structs.replace(self.summary or Summary(), phase="stopped", reason=reason, busy=False)
        summary = msgspec.structs.replace(summary, notices=[], closed=[])
        self._keep_final(summary)
        self.over, self.trouble = True, ""
        self._learn(Told(summary))
        self.agenda.tell()

    def _keep_final(self, summary: Summary) -> None:
        """Make durable how the run ended, with the rounds that its process told of before."""
        final = msgspec.structs.replace(summary, notices=[], closed=list(self.closed.values()))
        self._state.put("final", self.charter.run, msgspec.json.encode(final))

    async def close(self) -> None:
        """Let the run rest until the server starts again."""
        if self._child is not None:
            await self._child.end()  # whatever it is at: its journal tells where to go on
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper

    async def ask(self, call: HostCall, blob: bytes = b"") -> bytes:
        """Have the run's process do something; its answer to a site, if there is one.

        What concerns a site waits its turn together with what else there is, and is brought at once.

        Raises:
            Denied: it cannot now; kind "busy".
            RunError: it cannot; the text says why.
        """
        if not isinstance(call, Receive | Happen | Answered):
            try:
                async with asyncio.timeout(HOLD):
                    await self._turn.acquire()
            except TimeoutError:
                raise Denied("busy", "the run is at work: try again.") from None
            try:
                return bytes((await self._called(call, blob))[1])
            finally:
                self._turn.release()
        waiting = _Waiting(call, blob, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._bringing is None or self._bringing.done():
            self._bringing = asyncio.get_running_loop().create_task(self._bring())
        try:
            await asyncio.wait({waiting.answer}, timeout=HOLD)
            if waiting in self._waiting:
                raise Denied("busy", "the run is at work: try again.")
            return await waiting.answer
        finally:  # a caller that goes away is not waited for
            with suppress(ValueError):
                self._waiting.remove(waiting)
            waiting.answer.cancel()

    async def _bring(self) -> None:
        """Bring what waits to the run's process, as much at a time as there is."""
        while self._waiting:
            async with self._turn:
                taken, size = list[_Waiting](), 0
                while self._waiting and len(taken) < AT_ONCE and (not taken or size < control.LONGEST):
                    taken.append(self._waiting.popleft())
                    size += len(taken[-1].blob)
                try:
                    await self._brought(taken)
                except BaseException as error:  # whatever it is, nobody waits for ever
                    told = error if isinstance(error, RunError) else Denied("busy", "it broke off: try again.")
                    for each in taken if isinstance(error, RunError) else (*taken, *self._waiting):
                        each.fail(told)
                    if not isinstance(error, RunError):
                        raise

    async def _brought(self, taken: "list[_Waiting]") -> None:
        if len(taken) < 2:
            for each in taken:
                _, answer = await self._called(each.call, each.blob)
                each.tell(bytes(answer))
            return
        calls = Several([each.call for each in taken], [len(each.blob) for each in taken])
        reply, answers = await self._called(calls, b"".join(each.blob for each in taken))
        total, at = sum(h.length for h in reply.heard), 0
        if not 0 < len(reply.heard) <= len(taken) or total != len(answers):
            raise Denied("busy", "the run's process did not say what became of what it was told: try again.")
        for each, heard in zip(taken, reply.heard, strict=False):
            if heard.broken is None:
                each.tell(bytes(answers[at : at + heard.length]))
            else:
                each.fail(RunError(heard.broken))
            at += heard.length
        self._waiting.extendleft(w for w in reversed(taken[len(reply.heard) :]) if not w.answer.done())

    async def _called(self, call: HostCall, blob: bytes) -> tuple[Told, Buffer]:
        """What the run's process says to a call; for whoever has the turn."""
        if self._child is None:
            raise Denied("busy", "the run's process is being started again.")  # why, watchers are shown
        # A caller that goes away must not end the run's process in the middle of what it does.
        task = asyncio.ensure_future(
            self._child.call(call, host_replies, (blob,), seconds=WORKING, largest=2 * control.LONGEST)
        )
        try:
            reply, answer = await asyncio.shield(task)
        except ChildDied as error:
            self._child = None
            self._broken(str(error))
            raise Denied("busy", "the run's process is being started again.") from error
        except asyncio.CancelledError:
            with suppress(ChildDied, asyncio.CancelledError):
                reply, _ = await task
                if not isinstance(reply, Broken):
                    self._learn(reply)
            raise
        if isinstance(reply, Broken):
            if isinstance(call, Several) or reply.kind == "Overtaken":  # not what was asked is at fault
                log.warning("run %s: %s", self.charter.run, control.plain(reply.text))
                raise Denied("busy", "the run's process could not take it: try again.")
            raise RunError(reply.text)
        self._learn(reply)
        return reply, answer

    async def said(self, call: Receive | Answered, blob: bytes) -> bytes:
        """Have the run's process take what a site said; why it cannot is for the server's owner alone.

        Raises:
            Denied: it cannot.
        """
        try:
            return await self.ask(call, blob)
        except Denied:
            raise
        except RunError as error:
            log.warning("run %s: %s: %s", self.charter.run, call.site, control.plain(str(error)))
            raise Denied("argument", "the run's process cannot take it; the server's log says why.") from error

    def _broken(self, text: str) -> None:
        self.trouble = control.plain(text)
        self.notices.append(self.trouble)
        self._due.tell()
        self.news.tell()

    def _learn(self, told: Told) -> None:
        before = self.summary
        self.summary, others = merged(before, told)
        now = self.summary
        for text in now.notices:
            self.notices.append(control.plain(text))
            log.warning("run %s: %s", self.charter.run, text)
        if now.closed:
            self.closed |= {c.round: _readable(c) for c in now.closed}
            self.closed = dict(sorted(self.closed.items())[-ROUNDS:])
        if before is None or (before.stage, before.question) != (now.stage, now.question):
            self.agenda.tell()
        if before is None or _moment(before) != _moment(now):
            self._bells.ring()
        elif others:
            self._bells.ring(others)
        if before is None or (before.phase, before.busy) != (now.phase, now.busy):
            self._due.tell()
        if before is None or others or now.notices or _outline(before) != _outline(now):
            self.news.tell()

    # --- its sites ----------------------------------------------------------------------------------------------------

    async def stand(self, site: str, standing: Standing) -> None:
        """A site told where it stands: the coordinator hears what is new to it."""
        if self.standings.get(site) != standing:
            self.standings[site] = standing
            self.news.tell()
        if self.over or self.summary is None:
            return
        place = self.summary.sites.get(site)
        known = None if place is None else place.status
        wanted: Literal["joined", "left"] | None = None
        if standing.status == "ready":
            wanted = "joined" if known != "active" else None
        elif known == "active":
            wanted = "left"
        if wanted is not None and known != "revoked":
            member = self._member(site)
            key = member.key if member is not None and wanted == "joined" else ""
            await self.ask(Happen(wanted, site, standing.detail, time.time(), key))

    async def receive(self, site: str, request: Request) -> Answer:
        """A message of a site; a question is held back while its answer would be no news.

        Raises:
            Denied: try again later, or bring the report first.
        """
        until = time.monotonic() + HOLD
        first: Answer | None = None
        while True:
            if self.over:
                return self._ended(site)
            at = self._at(site, request)
            answer = await self._received(site, request)
            held = isinstance(request, Ask) and isinstance(answer, Wait) and answer == (first or answer)
            first = first or answer
            if not held or time.monotonic() >= until:
                return answer
            while self._at(site, request) == at and (left := until - time.monotonic()) > 0:
                await self._bells.wait(site, left)

    def _at(self, site: str, request: Request) -> tuple[object, ...]:
        """What the answer to a site's question depends on: while it stays the same, so does the answer.

        A question is asked anew when there is something to do for its site that it did not have, or when its update was
        counted or was not, which the next round tells.
        """
        s = self.summary
        if s is None:
            return (self.over,)
        place, due = s.sites.get(site), ()
        if place is not None and place.task is not None:  # of an asynchronous run, in any phase
            due = () if isinstance(request, Ask) and request.at == place.task else place.task
        elif place is not None and place.doing == "asked":
            if s.phase == "summing":
                due = s.attempt, s.turn, s.step
            elif s.phase == "collecting" and not (isinstance(request, Ask) and request.at == (s.round, s.attempt)):
                due = (s.attempt,)
        standing = (None, None) if place is None else (place.status, place.counted)
        return (self.over, s.phase if s.phase in RESTS else "", s.round, *standing, due)

    async def _received(self, site: str, request: Request) -> Answer:
        upload = ""
        if isinstance(request, Deliver | Say) and request.size:
            path = self.upload(site, request.sha256)
            if path.exists() and path.stat().st_size == request.size:
                upload = path.name
                self._taking.pop(upload, None)  # nothing is added to what is being looked at
                self._looked[site] += 1
        try:
            told = await self.said(Receive(site, upload, time.time()), control.encode(request))
        finally:
            self._looked[site] -= bool(upload)
        answer = control.decode_answer(told)
        if isinstance(answer, Refused):
            if answer.cause not in ("transport", "busy", "unknown site", "turn"):
                self.refusals[site] = f"{answer.cause}: {answer.detail}"
        elif isinstance(request, Deliver):
            self.refusals.pop(site, None)
        if upload and not (isinstance(answer, Refused) and answer.cause == "busy"):
            (self.folder / "uploads" / upload).unlink(missing_ok=True)
        return answer

    def _ended(self, site: str) -> Answer:
        summary = self.summary
        assert summary is not None
        place = summary.sites.get(site)
        counted = None if place is None else place.counted
        return Ended(self.charter.run, summary.round, control.plain(summary.reason), counted)

    def upload(self, site: str, sha256: str) -> Path:
        """Where a site's report is put together; no name of a site becomes a path."""
        owner = hashlib.sha256(site.encode()).hexdigest()[:32]
        return self.folder / "uploads" / f"{owner}.{sha256}"

    def object(self, sha256: str) -> Path:
        """Where what sites fetch may lie: the frame of the task at work, or the app file."""
        return self.folder / ("objects" if sha256 == self.charter.code else "task") / sha256

    def taking(self, site: str, sha256: str, size: int, offset: int, length: int) -> "Taking":
        """Begin to take some bytes of a report, which as a whole is held to its hash later.

        Args:
            site: whose.
            sha256: its `content_hash`.
            size: in bytes.
            offset: of the first of them.
            length: how many are to come.

        Raises:
            Denied: larger than a report can be, or not the next bytes, or one of the site is being looked at.
        """
        if self.over or self.summary is None:
            raise Denied("busy" if not self.over else "unknown", "the run takes no reports now.")
        if not 0 < size <= self.summary.largest:
            raise Denied("large", f"a report of {size} bytes; one has at most {self.summary.largest}.")
        if self._looked[site]:  # what was found to be what it should be stays that, until it lies where it is kept
            raise Denied("busy", "a report of this site is being looked at: try again.")
        path = self.upload(site, sha256)
        owner = path.name.partition(".")[0]
        for other in path.parent.glob(f"{owner}.*"):  # a site has one report on its way
            if other != path:
                other.unlink(missing_ok=True)
                self._taking.pop(other.name, None)
        there = path.stat().st_size if path.exists() else 0
        if there > size:
            path.unlink()
            there = 0
        if offset != there:
            raise Denied("partial", f"{there} bytes are there.", received=there)
        if offset + length > size:
            raise Denied("large", "more bytes than were announced.")
        taking = Taking(path, there, there + length, self._taking)
        self._taking[path.name] = taking
        return taking

    # --- what is shown ------------------------------------------------------------------------------------------------

    def errand(self) -> Errand | None:
        """What sites have to know of it; None while it is not known, or over."""
        summary = self.summary
        if summary is None or self.over:
            return None
        return Errand(self.charter, summary.identity, summary.stage, summary.question)

    def view(self, seen: dict[str, float]) -> View:
        """The run as watchers see it.

        Args:
            seen: when members were heard last, on the monotonic clock.
        """
        s, charter = self.summary, self.charter
        names = sorted({*self.standings, *(s.sites if s else ())})
        phase = "broken" if s is None or (self.trouble and not self.over) else s.phase
        if s is not None and phase == "gathering" and s.stage in ("survey", "spread"):
            phase = "preparing"
        return View(
            version=self.news.version,
            run=charter.run,
            title=control.plain(s.title) if s else "",
            phase=phase,
            reason=control.plain(self.trouble or (s.reason if s else "")),
            round=min(s.round + 1, s.rounds) if s else 0,
            rounds=s.rounds if s else 0,
            attempt=s.attempt if s else 0,
            wanted=s.wanted if s else 0,
            least=s.least if s else charter.least,
            sites=[self._site(name, seen) for name in names],
            closed=list(self.closed.values()),
            notices=list(self.notices),
            by=charter.by,
            at=charter.at,
            privacy=s.privacy if s else None,
            buffer=s.buffer if s else None,
        )

    def _site(self, name: str, seen: dict[str, float]) -> SiteView:
        standing = self.standings.get(name, Standing("left", "not heard of since the server started"))
        place = None if self.summary is None else self.summary.sites.get(name)
        status, doing, why, counted, behind = standing.status, "", "", None, None
        if place is not None:
            status, counted = "revoked" if place.status == "revoked" else status, place.counted
            if not self.over:
                doing, why = place.doing, place.why
                if place.task is not None and self.summary is not None and place.task[1]:
                    behind = self.summary.round - place.task[0]
        heard = time.monotonic() - seen[name] if name in seen else None
        return SiteView(
            name, status, standing.detail, doing, why or self.refusals.get(name, ""), counted, heard, behind
        )


def _moment(s: Summary) -> tuple[object, ...]:
    """What concerns all sites."""
    return (s.phase, s.round, s.attempt, s.turn, s.step)


def _readable(closed: Closed) -> Closed:
    """A closed round whose metrics, which an author's code named, can be shown."""
    return msgspec.structs.replace(closed, metrics={control.plain(n): v for n, v in closed.metrics.items()})


def _outline(s: Summary) -> Summary:
    """What watchers see of the run beside its sites and notices."""
    return msgspec.structs.replace(s, sites={}, notices=[], closed=[])


class Taking:
    """Bytes of a report that are coming in, each written where it belongs or not at all.

    Attributes:
        received: bytes of the report that are there.

    Args:
        path: the file they are added to.
        at: its length.
        end: its length when all have come.
        newest: of every file who adds to it: whoever began last.
    """

    def __init__(self, path: Path, at: int, end: int, newest: dict[str, "Taking"]) -> None:
        self.received, self._end, self._path, self._newest = at, end, path, newest
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def take(self, part: Buffer) -> None:
        """Take the next ones.

        Raises:
            Denied: too many, or another request adds to the report by now, or it is being looked at.
            OSError: they cannot be written.
        """
        if self.received + len(part) > self._end:
            raise Denied("large", "more bytes than were announced.")
        if self._newest.get(self._path.name) is not self:
            raise Denied("partial", f"{self.received} bytes are there.", received=self.received)
        view = memoryview(part)
        while view:
            view = view[self._file.write(view) :]
        self.received += len(part)

    def close(self) -> None:
        """No more will come."""
        self._file.close()
        if self._newest.get(self._path.name) is self:
            del self._newest[self._path.name]


class Hub:
    """A server.

    Args:
        folder: of its state.
        fingerprint: of its key, for invites.
        address: as others reach it, for invites.
        state: where members, runs and their journals are; default `state.sqlite` in the folder.
        shelves: where runs' objects are; None: in the folder alone.
        proxied: whether the address is of a proxy that ends TLS in front of it.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        address: str,
        state: "State | None" = None,
        shelves: "Shelves | None" = None,
        *,
        proxied: bool = False,
    ) -> None:
        self.folder, self.fingerprint, self.address, self.proxied = folder, fingerprint, address, proxied
        self.state, self.shelves = state or state_of(folder), shelves
        self._tidying: asyncio.Task[None] | None = None
        self.roster = Roster(self.state.journal("roster"))
        self.agenda = News()
        self.seen: dict[str, float] = {}
        self.runs: dict[str, Run] = {}
        Disk(folder / "runs", durability=self.state.durability)  # made durably
        finals = self.state.documents("final")
        for name, content in self.state.documents("charter").items():
            charter = msgspec.json.decode(content, type=Charter)
            self.runs[name] = Run(
                folder / "runs" / name, charter, self.agenda, self.roster.members.get, self.state,
                finals.get(name, b""), shelves,
            )  # fmt: skip

    async def start(self) -> None:
        """Go on with every run that is not over."""
        for run in self.runs.values():
            run.keep()
        if self.shelves is not None:
            self._tidying = asyncio.get_running_loop().create_task(self._tidy())

    async def _tidy(self) -> None:
        """What runs that are over left in the store, and what the disk lost of them."""
        for run in [r for r in self.runs.values() if r.over]:
            await run.tidy()

    async def close(self) -> None:
        """Let all runs rest."""
        if self._tidying is not None:
            self._tidying.cancel()
        await asyncio.gather(*(run.close() for run in self.runs.values()))

    def run(self, name: str) -> Run:
        """A run by its name.

        Raises:
            Denied: there is none.
        """
        if name not in self.runs:
            raise Denied("unknown", f"there is no run {name!r}; `atoll runs --server` lists them.")
        return self.runs[name]

    async def call(self, member: Member, call: calls.Call) -> calls.Reply:
        """Answer a call of somebody who may make it.

        Raises:
            Denied, InvalidArgument, RunError: it cannot be done; the text says why.
        """
        match call:
            case calls.Agenda(known, standings):
                return await self._agenda(member.name, known, standings)
            case calls.Statistic(run, stage, content):
                await self.run(run).said(Answered(member.name, stage), content.encode())
                return calls.Done()
            case calls.MakeInvites(names, role, hours):
                return self._invites(names, role, hours, member.name)
            case calls.Revoke(name):
                return await self._revoke(name, member.name)
            case calls.ListMembers():
                return self._members()
            case calls.Submit(charter, code):
                return await self._submit(member.name, charter, code)
            case calls.ListRuns():
                views = [run.view(self.seen) for run in self.runs.values()]
                return calls.RunList(sorted(views, key=lambda v: -v.at))
            case calls.Control(run, action, reason):
                return await self._control(member, run, action, reason)
            case calls.Watch(run, known):
                watched = self.run(run)
                if watched.news.version == known and not watched.over:
                    await watched.news.wait(HOLD)
                    if watched.summary is not None and not watched.over:
                        await asyncio.sleep(min(LONGEST_GLANCE, GLANCE * len(watched.summary.sites)))
                return watched.view(self.seen)

    async def _agenda(self, site: str, known: int, standings: dict[str, Standing]) -> Errands:
        for name, standing in standings.items():
            if name in self.runs:
                with suppress(RunError):  # it tells again; one run's trouble is not the others'
                    await self.runs[name].stand(site, standing)
        if self.agenda.version == known:
            await self.agenda.wait(HOLD)
        errands = [run.errand() for run in self.runs.values()]
        return Errands(self.agenda.version, [e for e in errands if e is not None])

    def _invites(self, names: Sequence[str], role: Any, hours: float, by: str) -> calls.Invites:
        for name in names:
            if self.roster.active(name) is not None:
                raise invalid("NAME", name, "free", f"It is enrolled; shut it out first: atoll revoke {name!r}")
        if len(set(names)) < len(names):
            raise invalid("NAME", list(names), "names that are all different")
        words: list[str] = []
        for name in names:
            token = self.roster.invite(name, role, hours=hours, by=by, now=time.time())
            words.append(encode(Invite(self.address, self.fingerprint, name, role, token, self.proxied)))
        return calls.Invites(words)

    async def _revoke(self, name: str, by: str) -> calls.Done:
        self.roster.revoke(name, by=by, now=time.time())
        for run in self.runs.values():
            if not run.over and run.summary is not None and name in run.summary.sites:
                with suppress(RunError):  # a run that is at work is told by its keeper as soon as it can hear
                    await run.ask(Happen("revoked", name, "", time.time()))
        self.agenda.tell()
        return calls.Done()

    def heard(self) -> dict[str, tuple[str, float | None]]:
        """Members who are not shut out: role, and seconds since they were heard of; None: not since the start."""
        now = time.monotonic()
        return {
            m.name: (m.role, now - self.seen[m.name] if m.name in self.seen else None)
            for m in self.roster.members.values()
            if not m.revoked
        }

    def _members(self) -> calls.Members:
        now = time.monotonic()
        return calls.Members([
            calls.Present(
                m.name, m.role, m.revoked, m.since, hashlib.sha256(m.key.encode()).hexdigest()[:16],
                now - self.seen[m.name] if m.name in self.seen else None,
            )
            for m in self.roster.members.values()
        ])  # fmt: skip

    async def _submit(self, by: str, charter: Charter, code: str) -> calls.Submitted:
        content = code.encode()
        if hashlib.sha256(content).hexdigest() != charter.code:
            raise InvalidArgument("the code is not the one whose hash the charter names.")
        if charter.run in self.runs:
            raise invalid("--name", charter.run, "new", "Runs keep their names for good.")
        sites = [m.name for m in self.roster.members.values() if m.role == "site" and not m.revoked]
        least = charter.least or len(sites)
        if not least:
            raise InvalidArgument("no site has joined yet: invite some, or say how many to wait for with --sites.")
        charter = msgspec.structs.replace(charter, least=least, by=by, at=time.time())
        folder = self.folder / "runs" / charter.run
        if folder.exists():
            raise invalid("--name", charter.run, "new", f"{folder} exists.")
        self.state.forget(scope(charter.run))  # of one that never began, and could not be forgotten then
        # The disk syncs the names of the folders that it makes.
        disk, code_path = Disk(folder, durability=self.state.durability), f"objects/{charter.code}"
        run = Run(folder, charter, self.agenda, self.roster.members.get, self.state, shelves=self.shelves)
        try:
            if self.shelves is None:
                write_durably(disk, code_path, content)
            else:
                await asyncio.to_thread(self.shelves.begin, charter.run, folder, code_path, content)
            await run.load()
            self.state.put("charter", charter.run, msgspec.json.encode(charter))
        except (RunError, OSError):
            await run.close()
            if self.shelves is not None:  # while the folder keeps others from the name
                with suppress(OSError):  # else whoever takes the name next
                    await asyncio.to_thread(self.shelves.sweep, charter.run, ())
            _remove(folder)
            with suppress(OSError):
                self.state.forget(scope(charter.run))
            raise
        self.runs[charter.run] = run
        run.keep()
        self.agenda.tell()
        return calls.Submitted(charter.run)

    def newest(self) -> dict[str, tuple[int, str]]:
        """The newest process of every site, by the site's key: how often it had started, and what it drew."""
        kept = self.state.documents("newest")
        told = {key: content.decode().partition(".") for key, content in kept.items()}
        return {key: (int(life), process) for key, (life, _, process) in told.items()}

    def keep_newest(self, key: str, process: tuple[int, str]) -> None:
        """Remember the newest process of a site, so that no restart of this server lets an older one in again."""
        self.state.put("newest", key, f"{process[0]}.{process[1]}".encode())

    async def _control(self, member: Member, name: str, action: str, reason: str) -> calls.Done:
        run = self.run(name)
        if member.role == "researcher" and run.charter.by != member.name:
            raise Denied("role", f"{name} is a run of {run.charter.by}: a researcher steers its own runs alone.")
        if run.over:
            assert run.summary is not None
            raise InvalidArgument(f"{name} is over: {run.summary.reason}")
        phase = run.summary.phase if run.summary else ""
        if action in ("resume", "discard") and phase != "paused":
            raise InvalidArgument(f"{name} is not paused, it is {phase or 'not loaded'}.")
        if action == "pause" and phase == "paused":
            raise InvalidArgument(f"{name} is paused already: {run.summary.reason if run.summary else ''}")
        told = reason or f"{action} by {member.name}."
        if action == "stop" and run.trouble:
            run.abandon(told)
            return calls.Done()
        await run.ask(Happen(cast(Any, action), "", told, time.time()))
        return calls.Done()


def _remove(folder: Path) -> None:
    """Remove a run that never began."""
    for path in sorted(folder.rglob("*"), key=lambda p: -len(p.parts)):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    os.rmdir(folder)
