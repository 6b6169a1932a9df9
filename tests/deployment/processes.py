"""A server and sites as real programs, started and killed from outside."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from atoll.net.state import State
from atoll.net.storage import state_of

PROGRAM = "from atoll.net.children import end_with_parent as e; e(); from atoll.cli import main; main()"
PATIENCE = 240.0

APP = """
from torch import nn
import atoll


def experiment(*, rounds: int = 3, lr: float = 0.1, slow: float = 0.0) -> atoll.Experiment:
    import time

    def forward(module, batch):
        time.sleep(slow)
        return module(batch["x"])

    return atoll.Experiment(
        model=atoll.Model(nn.Linear(2, 1), loss="binary_cross_entropy", metrics=("auc",), forward=forward),
        data=atoll.table(client="hospital", target="disease"),
        algorithm=atoll.scaffold(atoll.local_sgd(lr=lr, epochs=1, batch_size=4)),
        rounds=rounds,
        title="Heart disease",
    )
"""


HOSPITALS = ("hospital-a", "hospital-b")


def rows(names: Sequence[str] = HOSPITALS) -> str:
    lines = ["hospital,age,pressure,disease"]
    for name, shift in zip(names, (0, 7, 3, 5), strict=False):
        for i in range(20):
            age, pressure = 40 + (7 * i + shift) % 31, 100 + (11 * i + shift) % 53
            lines.append(f"{name},{age},{pressure},{(i * i + shift) % 3 % 2}")
    return "\n".join(lines) + "\n"


class Place:
    """A folder with the app and the data, and the programs that run in it.

    Args:
        folder: it.
        app: the app file.
        names: of the sites.
        database: address of the server's state; "": a file in its folder.
    """

    def __init__(self, folder: Path, app: str = APP, names: Sequence[str] = HOSPITALS, database: str = "") -> None:
        self.folder, self.database = folder, database
        (folder / "app.py").write_text(app)
        (folder / "all.csv").write_text(rows(names))
        for name in names:
            lines = rows(names).splitlines()
            own = [line for line in lines if line.startswith(name)]
            (folder / f"{name}.csv").write_text("\n".join([lines[0], *own]) + "\n")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.programs: dict[str, subprocess.Popen[bytes]] = {}
        self.words: dict[str, Sequence[object]] = {}

    def atoll(self, *words: object, code: int = 0) -> str:
        """Give a command; what it printed."""
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROGRAM, *map(str, words)], cwd=self.folder, text=True,
            capture_output=True, timeout=PATIENCE, env=os.environ | {"COLUMNS": "200"},
        )  # fmt: skip
        assert done.returncode == code, (words, done.stdout, done.stderr, self.logs())
        return done.stdout

    def start(self, name: str, *words: object) -> None:
        """Start a program that stays, or start it again."""
        self.words[name] = words or self.words[name]
        with open(self.folder / f"{name}.log", "ab") as log:
            self.programs[name] = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, *map(str, self.words[name])], cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment(name),
            )  # fmt: skip

    def environment(self, name: str) -> dict[str, str]:
        more = {"ATOLL_DATABASE": self.database} if self.database and name == "server" else {}
        return os.environ | {"COLUMNS": "200"} | more

    @contextmanager
    def state(self) -> "Iterator[State]":
        """The server's state."""
        made = State(self.database) if self.database else state_of(self.folder / "atoll-server")
        with closing(made):
            yield made

    def kill(self, name: str) -> None:
        self.programs[name].kill()
        self.programs[name].wait(PATIENCE)

    def serve(self) -> None:
        """Start the server, and wait until it answers."""
        address = f"127.0.0.1:{self.port}"
        self.start("server", "server", "--host", "127.0.0.1", "--port", self.port, "--address", address)
        self.until(lambda: "fingerprint" in self.log("server"), "the server starts")

    def join(self, sites: Sequence[str]) -> list[str]:
        """A server that these sites have joined; the invites."""
        self.serve()
        words = self.atoll("invite", *sites, "--quiet").split()
        for name, word in zip(sites, words, strict=True):
            self.start(name, "join", word, "--data", f"{name}.csv")
        for name in sites:
            self.until(lambda name=name: "takes part" in self.log(name), f"{name} joins")
        return words

    def until(self, done: Callable[[], bool], what: str, *, every: float = 0.02) -> None:
        end = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < end, f"{what}: not in time\n{self.logs()}"
            time.sleep(every)

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        found = sorted(self.folder.rglob("*.log"))
        return "\n".join(f"--- {p.relative_to(self.folder)}\n{p.read_text(errors='replace')[-2000:]}" for p in found)

    def run(self, name: str) -> Path:
        return self.folder / "atoll-server" / "runs" / name

    def children(self, name: str) -> list[int]:
        """Processes that a program has started."""
        mine, found = self.programs[name].pid, list[int]()
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == mine and fields[0] != "Z":
                found.append(int(path.parent.name))
        return found

    def kill_children(self, name: str) -> None:
        for pid in self.children(name):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def place(folder: Path, app: str = APP, names: Sequence[str] = HOSPITALS, database: str = "") -> Iterator[Place]:
    made = Place(folder, app, names, database)
    try:
        yield made
    finally:
        for program in made.programs.values():
            program.kill()
            program.wait(PATIENCE)
