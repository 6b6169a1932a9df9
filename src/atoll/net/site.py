"""The site's program: takes part in the runs its owner approved, for as long as it is left to.

One line to the server, opened from here; per run an agent (`net.agent`) in this process, and a process for the author's
code (`deployment.worker`). What that process gives is looked at before it leaves (`policy.inspect`) and written into
the site's own journal first. Everything may break off at any time: the program goes on asking, less and less often,
with jitter, and sends again what it had finished without training again.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import random
import signal
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.errors import AtollError, InvalidArgument, RunError, invalid
from atoll.net import calls, control, party
from atoll.net.agent import Agent, Done, Out
from atoll.net.buffers import Buffer
from atoll.net.calls import Errand, Standing
from atoll.net.children import (
    Begin,
    Broken,
    Child,
    ChildDied,
    Prepare,
    Ready,
    Spread,
    Survey,
    Train,
    Trained,
    WorkerCall,
    WorkerReply,
    worker_replies,
)
from atoll.net.client import Client, Turned, Unreachable
from atoll.net.control import Answer, Deliver, Refused, Request, Say, Turn, Work, content_hash
from atoll.net.evaluating import NOTHING
from atoll.net.home import Home
from atoll.net.masker import Masker
from atoll.net.news import News
from atoll.net.peers import Peers
from atoll.net.policy import Approvals, Left, Outgoing, Sent, What, experiment_hash, inspect, inspect_evaluation, source
from atoll.net.storage import Disk, scope, state_of, write_file
from atoll.secagg import Identity

WORKER = "atoll.deployment.worker"

PACE = party.Pace(0.05, 60.0)
"""The server holds questions back, so that a site may ask again at once."""
CODE = 2**20
"""Bytes of an app file."""
LOOK = 1.0
"""Seconds between two looks at what the owner decided."""
LOADING = 600.0
"""Seconds the author's process may take to load the experiment and the data."""
ANSWER = 2**20
"""Bytes of an answer about the table."""

if TYPE_CHECKING:
    from atoll.database import Durability

log = logging.getLogger("atoll.site")


class Failed(AtollError):
    """A site cannot take part; `kind` is what the server is told, the text is for the owner."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Withdrawn(AtollError):
    """The owner took an approval back."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a site grants to an author's code and to its server.

    Attributes:
        task: seconds a task may take.
        memory: bytes of data the author's process may have; 0: no limit.
        files: bytes a file it writes may have.
        object: bytes of a task's frame at most.
        least: fewest sites of a secure sum that this one takes part in.
        again: whether it gives a second sum over the same model, when the first is said to have come to nothing.
    """

    task: float = 3600.0
    memory: int = 0
    files: int = 2**30
    object: int = 2**34
    least: int = 3
    again: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.task < float("inf"):
            raise invalid("task", self.task, "seconds above 0")
        for name in ("memory", "files", "object"):
            if getattr(self, name) < 0:
                raise invalid(name, getattr(self, name), "a number of bytes")
        if self.least < 3:
            raise invalid("least", self.least, "at least 3", "A sum of two shows each the other's update.")


class Site:
    """A site's program.

    Args:
        home: of the site.
        data: what recipes are bound to; "": nothing.
        bounds: of the author's code.
        durability: "power": what this site keeps survives that its machine loses power; "process": that a process is
            killed, and nothing is waited for.
    """

    def __init__(
        self, home: Home, data: str, bounds: Bounds | None = None, *, durability: "Durability" = "power"
    ) -> None:
        self.durability: Durability = durability
        self.home, self.data = home, str(Path(data).resolve()) if data else ""
        self.bounds = bounds or Bounds()
        self.name = home.identity.name
        self.approvals, self.state = Approvals(home.folder), state_of(home.folder, durability=durability)
        self.outgoing = Outgoing(self.state.journal("left"))
        self.peers = Peers(Disk(home.folder))
        self.client = Client(home)
        self.told = News()
        self._standings: dict[str, Standing] = {}
        self._parts: dict[str, asyncio.Task[None]] = {}
        self._errands: dict[str, Errand] = {}
        self._changed = asyncio.Event()
        self._unheard = 0

    async def run(self) -> None:
        """Take part until told to stop.

        Raises:
            RunError: the server shut this site out, or another program acts for it.
        """
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, stopped.set)
        asking = loop.create_task(self._ask())
        stopping = loop.create_task(stopped.wait())
        try:
            await asyncio.wait({asking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                asking.result()
            else:
                await self._leave()
        finally:
            tasks = (asking, stopping, *self._parts.values())
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.client.close()

    # --- the agenda ---------------------------------------------------------------------------------------------------

    async def _ask(self) -> None:
        """Ask for the agenda, for ever; tell at once what changed here."""
        known = -1
        while True:
            self._changed.clear()
            poll = asyncio.ensure_future(self.client.call(calls.Agenda(known, dict(self._standings))))
            news = asyncio.ensure_future(self._changed.wait())
            try:
                await asyncio.wait({poll, news}, return_when=asyncio.FIRST_COMPLETED)
                if not poll.done():
                    known = -1
                    continue
                errands: calls.Errands = poll.result()
            except Unreachable as error:
                known = -1
                await self._patience(str(error))
                continue
            except Turned as turned:
                if turned.problem.kind in ("revoked", "fenced"):
                    raise
                known = -1
                await self._patience(str(turned))
                continue
            finally:
                for each in (poll, news):
                    each.cancel()
                await asyncio.gather(poll, news, return_exceptions=True)
            if self._unheard:
                log.info("the server is back")
            self._unheard, known = 0, errands.version
            self._take_part(errands.runs)

    async def _patience(self, why: str) -> None:
        """Longer from time to time, up to a minute, half of it by chance: sites must not come back all at once."""
        if self._unheard in (0, 5) or self._unheard % 60 == 0:
            log.warning("%s; trying again", why)
        self._unheard += 1
        await asyncio.sleep(min(60.0, 0.25 * 2.0 ** min(self._unheard, 12)) * random.uniform(0.5, 1.0))

    def _take_part(self, errands: list[Errand]) -> None:
        self._errands = {e.charter.run: e for e in errands}
        for run in self._errands:
            if run not in self._parts:
                self._parts[run] = asyncio.get_running_loop().create_task(self._part(run))
        for run in [r for r, part in self._parts.items() if part.done() and r not in self._errands]:
            del self._parts[run]
        self.told.tell()

    def stand(self, run: str, standing: Standing) -> None:
        """Tell the server where this site stands with a run."""
        if self._standings.get(run) != standing:
            self._standings[run] = standing
            log.info("run %s: %s%s", run, standing.status, f", {standing.detail}" if standing.detail else "")
            self._changed.set()

    async def _leave(self) -> None:
        """Say goodbye, if the server hears it soon."""
        gone = {run: Standing("left", "the site's program was stopped.") for run in self._standings}
        with contextlib.suppress(AtollError, TimeoutError):
            await asyncio.wait_for(self.client.call(calls.Agenda(-1, gone)), 3.0)

    # --- a run --------------------------------------------------------------------------------------------------------

    async def _part(self, run: str) -> None:
        """Take part in a run until it is over; what fails is tried again, ever more seldom."""
        pause = 15.0
        while self.errand(run) is not None:
            try:
                await Part(self, run).go()
                break
            except Withdrawn:
                log.warning("run %s: its owner took the approval back", run)
                continue
            except (Failed, Turned) as failed:
                log.error("run %s: %s", run, failed)
                told = failed.kind if isinstance(failed, Failed) else str(failed)
            except Unreachable as error:
                log.warning("run %s: %s", run, error)
                told = "the connection broke off."
            except Exception as error:  # whatever it is, the other runs go on
                log.exception("run %s", run)
                told = f"the site's program failed ({type(error).__name__})."
            self.stand(run, Standing("failed", control.plain(told)))
            pause = min(600.0, 2 * pause)
            until = time.monotonic() + pause
            while self.errand(run) is not None and (left := until - time.monotonic()) > 0:
                await self.told.wait(left)
        self._standings.pop(run, None)

    def errand(self, run: str) -> Errand | None:
        """What the server told last of a run; None when it is over."""
        return self._errands.get(run)


class Part:
    """A site's part in one run."""

    def __init__(self, site: Site, run: str) -> None:
        self.site, self.run, self.client = site, run, site.client
        errand = site.errand(run)
        assert errand is not None
        self.charter, self.identity = errand.charter, errand.identity
        self.folder = site.home.folder / "runs" / run
        self.folder.mkdir(parents=True, exist_ok=True)
        self._app = Path()
        self._child: Child | None = None
        self._bound = False
        self._ready: Ready | None = None
        self._agreement = b""
        self._at: Work | None = None
        self._training: asyncio.Task[None] | None = None
        self._unheard = float("-inf")
        self._delivering = asyncio.Lock()
        self._last = ""

    async def go(self) -> None:
        """From approval to the end of the run.

        Raises:
            Failed: this site cannot take part now.
            Withdrawn: its owner wants it no more.
            Turned, Unreachable: the server will not have it, or the line broke off.
        """
        self._app = await self._code()
        await self._approved()
        loop = asyncio.get_running_loop()
        taking, watching = loop.create_task(self._take_part()), loop.create_task(self._withdrawn())
        try:
            await asyncio.wait({taking, watching}, return_when=asyncio.FIRST_COMPLETED)
            (taking if taking.done() else watching).result()
        finally:
            tasks = [t for t in (taking, watching, self._training) if t is not None]
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._drop()

    async def _take_part(self) -> None:
        self.site.stand(self.run, Standing("preparing"))
        await self._agree()
        await self._ready_child()
        with contextlib.closing(
            Disk(self.folder, state=self.site.state, scope=scope(self.run), durability=self.site.durability)
        ) as files:
            agent = Agent(
                self.site.name, self.run, _elsewhere, files, pace=PACE, masker=self._masker(),
                notice=lambda text: log.warning("run %s: %s", self.run, text),
            )  # fmt: skip
            self.site.stand(self.run, Standing("ready"))
            await self._speak(agent)

    def _masker(self) -> Masker | None:
        """This site's part in the run's secure sums: in this process, which runs nobody's code.

        What it took part in last must outlive the machine's power whatever else does, or it could be asked again.
        """
        assert self._ready is not None
        if self._ready.sums is None:
            return None
        files = Disk(self.folder)
        return Masker(
            Identity(self.site.name, self.site.home.key), self._ready.sums, files, self.site.peers,
            least=self.site.bounds.least, again=self.site.bounds.again, leaving=self._adds,
            notice=lambda text: log.warning("run %s: %s", self.run, text),
        )  # fmt: skip

    def _adds(self, turn: Turn, content: bytes, report: bytes) -> None:
        """Enter what leaves in a step of a secure sum; of a masked vector also what is under the mask."""
        tensors = inspect(report, len(report)) if report else []
        self._leaves(turn.step, turn.round + 1, turn.attempt, len(content), content_hash(content), tensors)

    async def _withdrawn(self) -> None:
        """For as long as the approval holds."""
        while self.site.approvals.verdict(self.charter) == "approved":
            await asyncio.sleep(LOOK)
        raise Withdrawn(f"the run {self.run} is approved no more.")

    # --- before the first round ---------------------------------------------------------------------------------------

    async def _code(self) -> Path:
        """The app file, whose content is the one that is named."""
        folder = self.site.home.folder / "code"
        folder.mkdir(exist_ok=True)
        path = folder / f"{self.charter.code}.py"
        if not path.exists() or content_hash(path.read_bytes()) != self.charter.code:
            write_file(path, await self.client.fetch(self.run, self.charter.code, limit=CODE))
        try:
            source(path.read_bytes())
        except InvalidArgument as error:
            raise Failed("its code cannot be read.", str(error)) from error
        return path

    async def _approved(self) -> None:
        """Until the owner has approved the experiment, or the run is over without this site."""
        approvals, mark = self.site.approvals, experiment_hash(self.charter)
        while (verdict := approvals.verdict(self.charter)) != "approved":
            approvals.ask(self.charter)
            detail = f"its owner has to decide: atoll review {mark[:12]}" if verdict == "waiting" else "by its owner."
            self.site.stand(self.run, Standing(verdict, detail))
            if self.site.errand(self.run) is None:
                raise Failed("the run is over.", "the run is over, without a decision on it.")
            await asyncio.sleep(LOOK)
        if content_hash(self._app.read_bytes()) != self.charter.code:
            raise Failed("its code changed.", f"{self._app} is not what was approved: it changed on this disk.")

    async def _agree(self) -> None:
        """What the columns mean: answer the questions about the table, until there is an answer for all."""
        answered = set[str]()
        while True:
            errand, version = self.site.errand(self.run), self.site.told.version
            if errand is None:
                raise Failed("the run is over.", "the run was over before it began.")
            if errand.stage == "":
                return
            if errand.stage == "ready":
                self._agreement = errand.question.encode()
                return
            if errand.stage not in answered:
                call = Survey() if errand.stage == "survey" else Spread()
                _, answer = await self._asked(call, errand.question.encode())
                self._leaves(errand.stage, 0, 0, len(answer), content_hash(answer), [])
                told = bytes(answer).decode(errors="replace")
                await self.client.call(calls.Statistic(self.run, errand.stage, told))
                answered.add(errand.stage)
            if self.site.told.version == version:
                await self.site.told.wait(30.0)

    # --- the author's process -----------------------------------------------------------------------------------------

    async def _asked(self, call: WorkerCall, blob: bytes = b"") -> tuple[WorkerReply, Buffer]:
        """Have the author's process do something before the first round."""
        child = await self._loaded()
        return await self._replied(child, call, blob)

    async def _replied(self, child: Child, call: WorkerCall, blob: bytes = b"") -> tuple[WorkerReply, Buffer]:
        try:
            reply, answer = await child.call(call, worker_replies, (blob,), seconds=LOADING, largest=ANSWER)
        except ChildDied as error:
            raise Failed(str(error), f"{error} What it printed is in {self.folder / 'process.log'}.") from error
        if isinstance(reply, Broken):
            raise Failed(f"it cannot take part ({_kind(reply)}); its owner sees why.", reply.text)
        return reply, answer

    async def _loaded(self) -> Child:
        """The author's process, with the experiment in it."""
        if self._child is not None and self._child.alive:
            return self._child
        self._bound = False
        self._child = await Child.start(WORKER, log=self.folder / "process.log", cwd=self.folder)
        bounds = self.site.bounds
        begin = Begin(
            str(self._app.resolve()), self.charter, self.site.name, self.site.data, bounds.memory, bounds.files
        )
        try:
            ready, _ = await self._replied(self._child, begin)
            if not isinstance(ready, Ready) or ready.identity != self.identity:
                raise Failed(
                    "its Atoll or PyTorch differs from the server's.",
                    "the same code makes another experiment here than at the server: install the server's versions of "
                    "Atoll and PyTorch.",
                )
            if self._ready not in (None, ready):  # what leaves, and how, was decided by what it said first
                raise Failed(
                    "its code says one thing and then another.",
                    "the experiment's secure sum or recipe was another one when its process was started before: its "
                    "code is not what it was approved as.",
                )
        except Failed:
            await self._drop()
            raise
        self._ready = ready
        return self._child

    async def _ready_child(self) -> Child:
        """The author's process, with this site's data bound."""
        child = await self._loaded()
        if not self._bound:
            await self._replied(child, Prepare(), self._agreement)
            self._bound = True
        return child

    async def _drop(self) -> None:
        if self._child is not None:
            await self._child.end()
            self._child = None

    # --- rounds -------------------------------------------------------------------------------------------------------

    async def _speak(self, agent: Agent) -> None:
        """Speak when it is time, until the run is over."""
        while agent.state.phase is not party.Phase.ENDED:
            began = time.monotonic()
            try:
                # While a report is on its way there is nothing else to say.
                out = [] if self._delivering.locked() else agent.due()
            except OSError as error:
                log.warning("run %s: the disk refuses: %s", self.run, error)
                out = []
            self._look(agent)
            await self._exchange(agent, out)
            await asyncio.sleep(max(0.0, agent.wake - (time.monotonic() - began)))
            if self._broke():
                assert self._training is not None
                self._training.result()

    async def _exchange(self, agent: Agent, out: list[Out]) -> None:
        """Bring messages to the server and hear the answers, and what they give rise to."""
        left = deque(out)
        while left:
            message, frame = left.popleft()
            try:
                answer, content = await self._sent(message, frame)
                left.extend(agent.heard(answer, content))
            except Unreachable as error:  # as if it had not been sent
                if time.monotonic() - self._unheard > 60.0:
                    self._unheard = time.monotonic()
                    log.warning("run %s: %s; trying again", self.run, error)
            except OSError as error:  # as if it had not been heard
                log.warning("run %s: the disk refuses: %s", self.run, error)
            self._look(agent)

    async def _sent(self, message: Request, frame: Buffer) -> tuple[Answer, Buffer]:
        if isinstance(message, Deliver | Say):
            async with self._delivering:  # one way of a report at a time: whoever waits finds it delivered
                new, self._last = frame and message.sha256 != self._last, message.sha256
                if new:  # of one that was sent before, the server may have all it needs
                    with contextlib.suppress(Turned):  # the answer to the message says why
                        await self.client.upload(self.run, frame, message.sha256)
                answer = await self.client.say(message)
                if isinstance(answer, Refused) and answer.cause == "transport" and frame and not new:
                    await self.client.upload(self.run, frame, message.sha256)
                    answer = await self.client.say(message)
                return answer, b""
        answer = await self.client.say(message)
        if not isinstance(answer, Work):
            return answer, b""
        if answer.size > self.site.bounds.object:
            text = f"a task of {answer.size} bytes is above this site's bound of {self.site.bounds.object}."
            raise Failed("the model is larger than it takes.", text)
        try:
            content = await self.client.fetch(self.run, answer.base, limit=answer.size)
        except Turned as turned:
            raise Unreachable(f"the task is gone already: {turned}") from turned
        return answer, content

    def _look(self, agent: Agent) -> None:
        """Begin to train when there is a task; end what trains for a task that is over."""
        training = self._training
        if training is not None and not training.done():
            if self._at is not None and (not agent.busy or agent.task[0] is not self._at):
                training.cancel()
        elif agent.busy and not self._broke():
            self._training = asyncio.get_running_loop().create_task(self._train(agent))
            self._training.add_done_callback(lambda _: self._look(agent))

    def _broke(self) -> bool:
        training = self._training
        return training is not None and training.done() and not training.cancelled() and bool(training.exception())

    async def _train(self, agent: Agent) -> None:
        """Work on the task that waits, and tell."""
        work, content = agent.task
        self._at = work
        try:
            done = agent.done or await self._trained(work, content, agent.memory)
        except Exception as error:  # the task is declined, the site stays up
            out = agent.failed(work, error)
        else:
            out = agent.finished(work, done)
        self._at = None  # what is left to do is not for nothing, whatever is heard meanwhile
        if agent.busy:  # the disk refused
            await asyncio.sleep(LOOK)
        await self._exchange(agent, out)

    async def _trained(self, work: Work, content: Buffer, memory: bytes) -> Done:
        """What the author's process gives, looked at as a stranger's, and entered in the site's journal.

        Whether anything is said of a model is decided here, by what the process said before it knew of a task.
        """
        try:
            child = await self._ready_child()
        except Failed as failed:
            log.error("run %s: %s", self.run, failed)
            raise RunError(failed.kind) from failed
        evaluates = work.kind == "evaluate"
        assert self._ready is not None
        if evaluates and self._ready.sums is not None:
            raise RunError("an evaluation was asked for, and the experiment shows the server sums alone.")
        if evaluates and self._ready.silent:
            raise RunError(f"an evaluation was asked for, and {control.plain(self._ready.silent)}.")
        largest = 4 * len(content) + 2**24
        reply, blob = await child.call(
            Train(work, len(content)), worker_replies, (content, memory), seconds=self.site.bounds.task, largest=largest
        )
        if isinstance(reply, Broken):
            log.error("run %s, round %d: %s: %s", self.run, work.round + 1, reply.kind, reply.text)
            raise RunError(f"its task failed ({_kind(reply)}); its owner sees why.")
        if not isinstance(reply, Trained) or reply.frame > len(blob):
            await self._drop()
            raise RunError("the task's process answered with something else than a report.")
        frame = blob[: reply.frame]
        tensors = inspect_evaluation(frame) if evaluates else inspect(frame, largest)
        sha256 = content_hash(frame)
        if self._ready.sums is None:  # else it stays here, and what is made of it in a sum is entered then
            what, round = ("evaluation", work.round) if evaluates else ("update", work.round + 1)
            self._leaves(what, round, work.attempt, len(frame), sha256, tensors)
        if evaluates:  # not a number more than was looked at, and the client remembers what it did
            return Done(frame, NOTHING, len(frame), memory, sha256)
        return Done(frame, reply.parts, reply.sent, blob[reply.frame :], sha256)

    def _leaves(self, what: What, round: int, attempt: int, size: int, sha256: str, tensors: list[Sent]) -> None:
        """Enter in the site's journal what is about to leave."""
        self.site.outgoing.write(Left(time.time(), self.run, what, round, attempt, size, sha256, tensors))


def _elsewhere(work: Work, content: Buffer, memory: bytes) -> Done:
    raise AssertionError("tasks are worked on by the author's process")


def _kind(broken: Broken) -> str:
    """The name of an error: all of it that may leave the site, whose text may tell of its data."""
    return broken.kind if broken.kind.isidentifier() and broken.kind.isascii() else "error"


def run_site(home: Home, data: str, bounds: Bounds | None = None, *, durability: "Durability" = "power") -> None:
    """Run a site's program until it is told to stop; arguments as of `Site`.

    Raises:
        RunError: another program works in the folder; the server shut this site out.
    """
    os.umask(0o077)  # what a run leaves here tells of the data
    with open(home.folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another program of this site works in {home.folder}: stop it first.") from None

        async def live() -> None:
            await Site(home, data, bounds, durability=durability).run()

        asyncio.run(live())
