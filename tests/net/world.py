"""A whole deployment in one process: a virtual clock, a network and disks that fail by a script.

A world is made of a seed and a list of faults, and nothing else: the same two always give the same run. So a failing
schedule is printed as its seed and the fewest faults that still break it (`shrunk`).

Faults:
    ("drop", n)                 the n-th message is lost
    ("twice", n, seconds)       it arrives a second time, so much later
    ("late", n, seconds)        it arrives so much later than it would have
    ("crash", who, n, when)     power fails at the n-th operation of somebody's disk, "before" or "after" it
    ("kill", who, time)         power fails at a time
    ("full", who, time, span)   somebody's disk is full for so many seconds
    ("leave", site, time, span) a site says that it is gone, and comes back
    ("rest", time, span)        an operator pauses the run, and lets it go on
    ("discard", time)           an operator pauses the run and gives up the attempt at work
    ("silent", site, step)      what a site says in this step of a secure sum is lost, always
"""

import hashlib
import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from atoll.net import control, coordinator
from atoll.net.agent import Agent, Training
from atoll.net.coordinator import Plan
from atoll.net.evaluating import Said
from atoll.net.keys import public_text
from atoll.net.masker import Masker
from atoll.net.party import Pace
from atoll.net.peers import Peers
from atoll.net.service import Service
from atoll.net.sums import summing
from atoll.rounds import Process
from atoll.secagg import Identity

Fault = tuple[Any, ...]
SERVER = "server"


def identity(site: str) -> Identity:
    """A site's lasting key."""
    return Identity(site, Ed25519PrivateKey.from_private_bytes(hashlib.sha256(site.encode()).digest()))


class Crash(BaseException):
    """The machine is gone; nothing but its disk is left."""


@dataclass
class Inode:
    now: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


class Journal:
    """A journal on a disk that fails: a record that was not synced is there after a power cut, or not."""

    def __init__(self, disk: "Disk", name: str, *, synced: bool = True) -> None:
        assert name not in disk.writers, f"two write to {name}"
        disk.writers[name] = self
        self._disk, self._name, self._synced = disk, name, synced
        self._there = disk.records_now.setdefault(name, [])
        self._count = len(self._there)

    def append(self, record: bytes) -> None:
        assert self._disk.writers.get(self._name) is self, "whoever let go of a journal wrote to it"

        def do() -> None:
            self._there[self._count :] = [record]  # in the place of one that was refused

        self._disk._step(do)
        if self._disk.full():
            raise OSError(28, "No space left on device")
        if self._synced:
            self._disk._step(lambda: self._disk.records_durable.update({self._name: len(self._there)}))
        self._count += 1

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._there[: self._count])

    def __len__(self) -> int:
        return self._count

    @property
    def head(self) -> str:
        return hashlib.sha256(repr(self._there[: self._count]).encode()).hexdigest()

    def close(self) -> None:
        self._disk.writers.pop(self._name, None)


class Disk:
    """A file system in memory that forgets, when power fails, some of what was not synced."""

    def __init__(self) -> None:
        self.records_now: dict[str, list[bytes]] = {}
        self.records_durable: dict[str, int] = {}
        self.writers: dict[str, Journal] = {}
        self.names_now: dict[str, Inode] = {}
        self.names_durable: dict[str, Inode] = {}
        self.operations = 0
        self.crash_at: dict[int, str] = {}
        self.full: Callable[[], bool] = lambda: False
        self.on = True

    def power_fails(self, rng: random.Random) -> None:
        """What is left: of every change that was not synced all, nothing or a part."""
        self.writers.clear()
        for name, now in self.records_now.items():
            del now[rng.randint(self.records_durable.get(name, 0), len(now)) :]
            self.records_durable[name] = len(now)
        names: dict[str, Inode] = {}
        for path in sorted({*self.names_now, *self.names_durable}):
            chosen = self.names_now if rng.random() < 0.5 else self.names_durable
            if path in chosen:
                names[path] = chosen[path]
        for inode in names.values():
            if bytes(inode.now) != inode.durable:
                inode.durable = self._torn(inode, rng)
            inode.now = bytearray(inode.durable)
        self.names_now, self.names_durable = dict(names), dict(names)

    def _torn(self, inode: Inode, rng: random.Random) -> bytes:
        kind = rng.choice(["old", "new", "cut", "noise"])
        new, old = bytes(inode.now), inode.durable
        if kind in ("old", "new"):
            return old if kind == "old" else new
        kept = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        cut = rng.randint(kept, len(new))
        if kind == "cut":
            return new[:cut]
        return new[:cut] + bytes(len(new) - cut)  # blocks that were allocated and never written

    def write(self, path: str, content: bytes) -> None:
        def do(part: bytes) -> None:
            inode = self.names_now.setdefault(path, Inode())
            inode.now = bytearray(part)

        self._fill(do, content)

    def append(self, path: str, content: bytes) -> None:
        self._fill(lambda part: self.names_now.setdefault(path, Inode()).now.extend(part), content)

    def truncate(self, path: str, length: int) -> None:
        def do() -> None:
            del self.names_now[path].now[length:]

        self._step(do)

    def sync(self, path: str) -> None:
        def do() -> None:
            self.names_now[path].durable = bytes(self.names_now[path].now)

        self._step(do)

    def sync_folder(self, path: str) -> None:
        def do() -> None:
            inside = f"{path}/" if path else ""
            for each in [n for n in self.names_durable if n.startswith(inside)]:
                if each not in self.names_now:
                    del self.names_durable[each]
            self.names_durable |= {n: i for n, i in self.names_now.items() if n.startswith(inside)}

        self._step(do)

    def rename(self, source: str, target: str) -> None:
        def do() -> None:
            self.names_now[target] = self.names_now.pop(source)

        self._step(do)

    def read(self, path: str, offset: int = 0, length: int = -1) -> bytes:
        if path not in self.names_now:
            raise FileNotFoundError(path)
        return bytes(self.names_now[path].now[offset : None if length < 0 else offset + length])

    def into(self, path: str, offset: int, buffer: memoryview) -> int:
        part = self.read(path, offset, len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def size(self, path: str) -> int:
        return len(self.names_now[path].now) if path in self.names_now else -1

    def names(self, folder: str) -> list[str]:
        return sorted({n[len(folder) + 1 :].split("/")[0] for n in self.names_now if n.startswith(f"{folder}/")})

    def remove(self, path: str) -> None:
        self._step(lambda: self.names_now.pop(path, None))

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype)

    def journal(self, name: str) -> Journal:
        return Journal(self, name)

    def close(self) -> None:
        self.writers.clear()

    def _step(self, do: Callable[[], Any]) -> None:
        assert self.on, "a machine without power wrote to its disk"
        self.operations += 1
        when = self.crash_at.get(self.operations)
        if when == "before":
            raise Crash
        do()
        if when == "after":
            raise Crash

    def _fill(self, do: Callable[[bytes], Any], content: bytes) -> None:
        if self.full():
            self._step(lambda: do(content[: len(content) // 3]))
            raise OSError(28, "No space left on device")
        self._step(lambda: do(content))


@dataclass
class Machine:
    disk: Disk = field(default_factory=Disk)
    life: int = 0  # how often it was switched on
    up: bool = False


class World:
    """One run of a plan.

    Args:
        process: of the server.
        plan: of the run.
        training: of every site.
        seed: of delays.
        faults: what goes wrong.
        chatter: called with a line for every step.
        second: whether sites give a second sum, as `again` in `Masker`.
    """

    def __init__(
        self,
        process: Process,
        plan: Plan,
        training: dict[str, Training],
        *,
        seed: int = 0,
        faults: Sequence[Fault] = (),
        chatter: Callable[[str], None] | None = None,
        service: Callable[..., Service] = Service,
        second: bool = True,
    ) -> None:
        self.process, self.plan, self.training = process, plan, training
        self.rng = random.Random(seed)
        self.seed, self.now, self.messages, self.turn = seed, 0.0, 0, 0
        self.say = chatter or (lambda line: None)
        self.make_service, self.second = service, second
        self.sent: list[tuple[str, control.Request, bytes]] = []
        self.told_sites: list[tuple[str, control.Answer]] = []
        self.silent: set[tuple[str, str]] = set()
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.machines = {name: Machine() for name in (SERVER, *training)}
        self.server: Service | None = None
        self.agents: dict[str, Agent] = {}
        self.acknowledged: set[tuple[str, int, int]] = set()
        self.trained: dict[tuple[str, int, int], int] = {}
        self.notices: list[str] = []
        self.said: dict[int, Said] = {}
        self.lost: set[int] = set()
        self.again: dict[int, float] = {}
        self.late: dict[int, float] = {}
        self.full: list[tuple[str, float, float]] = []
        for fault in faults:
            match fault:
                case ("drop", n):
                    self.lost.add(n)
                case ("twice", n, seconds):
                    self.again[n] = seconds
                case ("late", n, seconds):
                    self.late[n] = seconds
                case ("crash", who, n, when):
                    self.machines[who].disk.crash_at[n] = when
                case ("kill", who, time):
                    self.at(time, lambda who=who: self.power_off(who))
                case ("full", who, time, span):
                    self.full.append((who, time, time + span))
                case ("leave", site, time, span):
                    self.at(time, lambda s=site: self.told(coordinator.Left(s)))
                    self.at(time + span, lambda s=site: self.told(self.joined(s)))
                case ("silent", site, step):
                    self.silent.add((site, step))
                case ("rest", time, _):
                    self.at(time, lambda: self.told(coordinator.Pause("a rest")))
                case ("discard", time):
                    self.at(time, lambda: self.told(coordinator.Pause("a rest")))
                    self.at(time, lambda: self.told(coordinator.Discard("again")))
        for name, machine in self.machines.items():
            machine.disk.full = lambda name=name: any(w == name and a <= self.now < b for w, a, b in self.full)
            self.at(0.0, lambda name=name: self.power_on(name))

    # --- time ---------------------------------------------------------------------------------------------------------

    def at(self, time: float, do: Callable[[], None]) -> None:
        self.turn += 1
        heapq.heappush(self.queue, (time, self.turn, do))

    def run(self, until: float = 600.0) -> "World":
        """Let the world go on until the run is finished and all sites know, or time is over."""
        while self.queue and not self.done and self.now < until:
            time, _, do = heapq.heappop(self.queue)
            self.now = max(self.now, time)
            do()
        return self

    @property
    def done(self) -> bool:
        here = [self.agents.get(s) for s in self.training]
        return (
            self.server is not None
            and self.server.state.phase is coordinator.Phase.FINISHED
            and all(a is not None and a.state.phase == "ended" for a in here)
        )

    # --- machines -----------------------------------------------------------------------------------------------------

    def power_on(self, who: str) -> None:
        machine = self.machines[who]
        if machine.up:
            return
        machine.life += 1
        machine.up = machine.disk.on = True
        self.say(f"{self.now:8.2f} {who} starts")
        self.guarded(who, lambda: self.boot(who))

    def power_off(self, who: str) -> None:
        machine = self.machines[who]
        if not machine.up:
            return
        self.say(f"{self.now:8.2f} {who} loses power")
        machine.up = machine.disk.on = False
        machine.disk.power_fails(self.rng)
        if who == SERVER:
            self.server = None
        else:
            self.agents.pop(who, None)
        self.at(self.now + self.rng.uniform(0.1, 15), lambda: self.power_on(who))

    def guarded(self, who: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Crash:
            self.power_off(who)

    def later(self, who: str, seconds: float, do: Callable[[], None]) -> None:
        """Something the same life of a machine will do."""
        machine = self.machines[who]
        life = machine.life

        def then() -> None:
            if machine.up and machine.life == life:
                self.guarded(who, do)

        self.at(self.now + seconds, then)

    def masker(self, site: str) -> Masker | None:
        terms, disk = summing(self.process), self.machines[site].disk
        if terms is None:
            return None
        return Masker(
            identity(site), terms, disk, Peers(disk), again=self.second, attempts=1000, notice=self.notices.append
        )  # fmt: skip

    def boot(self, who: str) -> None:
        disk = self.machines[who].disk
        try:
            if who == SERVER:
                self.server = self.make_service(
                    self.process, self.plan, disk, now=self.now, block=3, notice=self.notices.append,
                    evaluated=self.said.__setitem__,
                )  # fmt: skip
                for site in self.training:
                    self.server.happen(self.joined(site), self.now)
                self.tick()
            else:
                self.agents[who] = Agent(
                    who, self.plan.run, self.watched(who), disk, pace=Pace(1.0, 8.0, self.seed),
                    masker=self.masker(who), notice=self.notices.append,
                )  # fmt: skip
                self.due(who)
        except OSError:  # no room: somebody starts it again
            self.machines[who].up = False
            self.machines[who].disk.close()
            self.server = None if who == SERVER else self.server
            self.agents.pop(who, None)
            self.at(self.now + 3.0, lambda: self.power_on(who))

    def joined(self, site: str) -> coordinator.Joined:
        return coordinator.Joined(site, public_text(identity(site).key.public_key()))

    def told(self, event: coordinator.Event) -> None:
        """Somebody tells the server something; if it is away, it is never told."""
        if self.server is not None:
            self.guarded(SERVER, lambda: self.tell(event))

    def tell(self, event: coordinator.Event) -> None:
        assert self.server is not None
        try:
            self.server.happen(event, self.now)
        except OSError:
            return
        self.busy()

    def tick(self) -> None:
        assert self.server is not None
        self.server.tick(self.now)
        if self.server.state.phase is coordinator.Phase.PAUSED and self.now > self.server.state.now + 5.0:
            self.tell(coordinator.Resume())
        self.busy()
        self.later(SERVER, 1.0, self.tick)

    def busy(self) -> None:
        if self.server is not None and self.server.busy:
            self.later(SERVER, self.rng.uniform(0.0, 1.0), self.server_works)

    def server_works(self) -> None:
        assert self.server is not None
        if self.server.busy:
            self.server.work(self.now)

    def watched(self, site: str) -> Training:
        def train(work: control.Work, content: bytes, memory: bytes) -> Any:
            key = (site, work.round, work.attempt)
            kept = [r for r in self.machines[site].disk.writers["journal"] if b'"Kept"' in r]
            assert not any(f'"round":{key[1]},"attempt":{key[2]},'.encode() in r for r in kept), "trained again"
            self.trained[key] = self.trained.get(key, 0) + 1
            return self.training[site](work, content, memory)

        return train

    def due(self, site: str) -> None:
        agent = self.agents[site]
        self.post(site, agent.due())
        self.later(site, agent.wake, lambda: self.due(site))
        self.site_works(site)

    def site_works(self, site: str) -> None:
        if self.agents[site].busy:
            self.later(site, self.rng.uniform(0.0, 3.0), lambda: self.train(site))

    def train(self, site: str) -> None:
        if self.agents[site].busy:
            self.post(site, self.agents[site].train())

    # --- network ------------------------------------------------------------------------------------------------------

    def post(self, site: str, out: Sequence[tuple[control.Request, bytes]]) -> None:
        for message, frame in out:
            encoded = control.encode(message)
            self.sent.append((site, message, frame))
            if isinstance(message, control.Say) and (site, message.step) in self.silent:
                continue
            self.carry(lambda e=encoded, f=frame: self.reach_server(site, e, f), f"{site} {type(message).__name__}")

    def carry(self, deliver: Callable[[], None], what: str) -> None:
        """Bring one message to the other side, or not."""
        self.messages += 1
        n, travel = self.messages, self.rng.uniform(0.01, 0.5)
        if n in self.lost:
            self.say(f"{self.now:8.2f} #{n} {what} is lost")
            return
        self.say(f"{self.now:8.2f} #{n} {what}")
        self.at(self.now + travel + self.late.get(n, 0.0), deliver)
        if n in self.again:
            self.at(self.now + travel + self.again[n], deliver)

    def reach_server(self, site: str, message: bytes, frame: bytes) -> None:
        if self.server is None:
            return

        def do() -> None:
            assert self.server is not None
            answer, content = self.server.receive(site, message, frame, self.now)
            self.told_sites.append((site, answer))
            if isinstance(answer, control.Received):
                self.acknowledged.add((site, answer.round, answer.attempt))
            self.busy()
            encoded, beside = control.encode(answer), bytes(content.whole())
            self.carry(lambda: self.reach_site(site, encoded, beside), f"to {site}: {answer}"[:150])

        self.guarded(SERVER, do)

    def reach_site(self, site: str, message: bytes, frame: bytes) -> None:
        if site not in self.agents:
            return

        def do() -> None:
            agent = self.agents[site]
            try:
                self.post(site, agent.heard(control.decode_answer(message), frame))
            except OSError:
                return  # as if it had not been heard
            self.site_works(site)

        self.guarded(site, do)

    # --- what became of it --------------------------------------------------------------------------------------------

    def entries(self) -> list[coordinator.Entry]:
        """The server's journal, as its disk has it."""
        decoder = coordinator.msgspec.json.Decoder(coordinator.Entry)
        return [decoder.decode(r) for r in self.machines[SERVER].disk.writers["journal"]]

    def given_up(self) -> set[tuple[str, int, int]]:
        """Site, round and attempt of every update that was accepted and that an operator gave up."""
        found, state = set[tuple[str, int, int]](), coordinator.State()
        for entry in self.entries():
            if isinstance(entry.event, coordinator.Discard):
                found |= {(s, a.claim.round, a.claim.attempt) for s, a in state.accepted.items()}
            state, _ = coordinator.handle(self.plan, state, entry.event, entry.now)
        return found

    def evaluated(self) -> dict[int, list[str]]:
        """Whose answers every evaluation has in it, by the journal; of one that failed, or had none, nobody's."""
        found, state = dict[int, list[str]](), coordinator.State()
        for entry in self.entries():
            before = state
            state, _ = coordinator.handle(self.plan, state, entry.event, entry.now)
            if state.evaluated > before.evaluated:
                whole = isinstance(entry.event, coordinator.Evaluated)
                found[state.evaluated] = sorted(before.accepted) if whole else []
        return found

    def counted(self) -> list[dict[str, int]]:
        """Which attempt of which site every closed round has in it, by the journal."""
        found: list[dict[str, int]] = []
        state = coordinator.State()
        for entry in self.entries():
            before = state
            state, _ = coordinator.handle(self.plan, state, entry.event, entry.now)
            if state.round > before.round:
                found.append({s: a.claim.attempt for s, a in sorted(before.accepted.items())})
        return found


def drawn(
    seed: int, sites: Sequence[str], *, messages: int = 120, seconds: float = 60.0, people: bool = False
) -> list[Fault]:
    """A random script of faults; how much goes wrong differs from seed to seed."""
    rng = random.Random(f"faults {seed}")
    faults: list[Fault] = []
    harm = rng.choice([0.02, 0.1, 0.3])
    for n in range(1, messages):
        if rng.random() < harm:
            kind = rng.choice(["drop", "twice", "late"])
            faults.append((kind, n) if kind == "drop" else (kind, n, round(rng.expovariate(0.2), 2)))
    everyone = [SERVER, SERVER, *sites]
    for _ in range(rng.randint(0, 8)):
        faults.append(("crash", rng.choice(everyone), rng.randint(1, 120), rng.choice(["before", "after"])))
    for _ in range(rng.randint(0, 3)):
        faults.append(("kill", rng.choice(everyone), round(rng.uniform(0, seconds), 2)))
    for _ in range(rng.choice([0, 0, 1, 2])):
        faults.append(("full", rng.choice(everyone), round(rng.uniform(0, seconds), 2), round(rng.uniform(1, 20), 2)))
    if people:
        for _ in range(rng.randint(0, 2)):
            site = rng.choice(list(sites))
            faults.append(("leave", site, round(rng.uniform(1, seconds), 2), round(rng.uniform(1, 20), 2)))
        for _ in range(rng.randint(0, 2)):
            faults.append(("rest", round(rng.uniform(1, seconds), 2), 5.0))
        if rng.random() < 0.25:
            faults.append(("discard", round(rng.uniform(1, seconds), 2)))
    return faults


def first_wrong(fault_of: Callable[..., str], plan: Plan, sites: int, seeds: range, **more: Any) -> str:
    """What is found wrong with the first schedule of faults that shows it; "" where none does."""
    for seed in seeds:
        faults = drawn(seed, [f"s{i}" for i in range(sites)], people=plan.deadline is not None)
        try:
            wrong = fault_of(plan, seed, faults, **more)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            return wrong
    return ""


def shrunk(faults: Sequence[Fault], breaks: Callable[[Sequence[Fault]], bool]) -> list[Fault]:
    """The fewest faults that still break: pieces are left out as long as it does."""
    left = list(faults)
    size = max(1, len(left) // 2)
    while size:
        at = 0
        while at < len(left):
            tried = left[:at] + left[at + size :]
            if breaks(tried):
                left = tried
            else:
                at += size
        size //= 2
    return left


def digest(vector: Tensor) -> str:
    return hashlib.sha256(vector.numpy().tobytes()).hexdigest()
