"""Several servers behind a load balancer: real programs, a real PostgreSQL, and whoever leads is killed."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from balancer import Balancer, balancer
from postgres import Cluster
from processes import HOSPITALS, Place
from test_processes import approved, closed, deployed, newest, over, simulated

SERVERS = ("one", "two")


class Places(Place):
    """Two servers behind a balancer, with one folder and one database."""

    def __init__(self, folder: Path, database: str) -> None:
        super().__init__(folder, database=database)
        self.ports = dict(zip(SERVERS, free(2), strict=True))

    def environment(self, name: str) -> dict[str, str]:
        return super().environment("server" if name in SERVERS else name)

    def one_of(self, name: str, front: Balancer) -> None:
        self.start(
            name, "server", "--state", "atoll-server", "--host", "127.0.0.1", "--port", self.ports[name],
            "--address", f"127.0.0.1:{front.port}", "--among", "127.0.0.1:0",
        )  # fmt: skip

    def leads(self, name: str) -> bool:
        """Whether a server has said last that it leads."""
        said = [line for line in self.log(name).splitlines() if "leads" in line]
        return bool(said) and "leads; the others" in said[-1]

    def leader(self) -> str:
        self.until(lambda: any(map(self.leads, self.running())), "somebody leads")
        return next(filter(self.leads, self.running()))

    def running(self) -> list[str]:
        return [n for n in SERVERS if n in self.programs and self.programs[n].poll() is None]


def free(many: int) -> list[int]:
    lines = [socket.create_server(("127.0.0.1", 0)) for _ in range(many)]
    ports = [line.getsockname()[1] for line in lines]
    for line in lines:
        line.close()
    return ports


@contextmanager
def places(folder: Path, database: str) -> Iterator[tuple[Places, Balancer]]:
    made = Places(folder, database)
    with balancer(list(made.ports.values())) as front:
        try:
            for name in SERVERS:
                made.one_of(name, front)
            for name in SERVERS:
                made.until(lambda name=name: "fingerprint" in made.log(name), f"{name} starts")
            yield made, front
        finally:
            for program in made.programs.values():
                program.kill()
                program.wait()


@pytest.mark.slow
def test_whichever_server_leads_and_is_killed_the_model_has_the_same_bits(
    tmp_path: Path, postgresql: str, postgres: Cluster
) -> None:
    rounds = 12
    with places(tmp_path, postgresql) as (found, front):
        words = found.atoll("invite", *HOSPITALS, "--quiet", "--home", "atoll-server/admin").split()
        for name, word in zip(HOSPITALS, words, strict=True):
            found.start(name, "join", word, "--data", f"{name}.csv")
        for name in HOSPITALS:
            found.until(lambda name=name: "takes part" in found.log(name), f"{name} joins")
        found.atoll(
            "submit", "app.py", "--engine", "loop", "--name", "heart", "--quiet", "--attempts", "50",
            "--set", f"rounds={rounds}", "--set", "slow=0.02",
        )  # fmt: skip
        approved(found)
        for pattern in ("task/*", "spool/*/*", "models/*"):
            where = f"atoll-server/runs/heart/{pattern}"
            before = newest(found, where)
            found.until(lambda p=where, b=before: newest(found, p) - b != set(), pattern, every=0.002)
            leader = found.leader()
            other = next(n for n in SERVERS if n != leader)
            found.kill(leader)
            found.until(lambda: found.leads(other), "the other one leads")
            found.start(leader)
            done = closed(found)
            found.until(lambda d=done: closed(found) > d or over(found), f"after {pattern} the run goes on")
        assert not over(found), "the servers are killed while the run is at work"
        before = sum(found.log(name).count("leads no more") for name in SERVERS)
        postgres.stop()
        postgres.start()
        found.until(lambda: sum(found.log(n).count("leads no more") for n in SERVERS) > before, "it steps down")
        assert len(found.running()) == 2, "and lives on"
        assert "finished" in found.atoll("watch", "heart", "--home", "atoll-server/admin")
        assert torch.equal(deployed(found, "heart"), simulated(found, rounds))
        assert all(front.taken[port] > 1 for port in found.ports.values()), front.taken
        for name in SERVERS:
            found.programs[name].terminate()
            assert found.programs[name].wait(60.0) == 0, "asked to stop, it ends well"
