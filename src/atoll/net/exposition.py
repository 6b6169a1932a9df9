"""What a server tells a Prometheus that scrapes it: runs, rounds, sites and the process itself.

It is told in the clear, to whoever can reach the port: names of runs and sites, sizes and times, and the mean loss of a
round where a run has one; no update, no key, no data. So it listens on the machine itself unless it is told otherwise.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric

from atoll.errors import RunError, invalid
from atoll.net.calls import View
from atoll.net.hub import Hub

PHASES = (
    "preparing",
    "gathering",
    "opening",
    "collecting",
    "summing",
    "reducing",
    "paused",
    "broken",
    "finished",
    "stopped",
)
STANDINGS = ("waiting", "denied", "preparing", "ready", "failed", "left", "revoked")
PATIENCE = 5.0
"""Seconds a scrape waits for the server to look at itself."""


class Exposition:
    """Metrics of a hub, gathered when they are asked for.

    Args:
        hub: whose.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._loop: asyncio.AbstractEventLoop | None = None
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def start(self, host: str, port: int) -> tuple[Any, Any]:
        """Answer scrapes from now on, for the hub of the running loop; the web server and its thread.

        Raises:
            RunError: the port is taken.
        """
        self._loop = asyncio.get_running_loop()
        try:
            return start_http_server(port, host, registry=self.registry)
        except OSError as error:
            raise RunError(f"cannot listen on {host}:{port} for metrics: {error.strerror}.") from error

    def describe(self) -> Iterator[Metric]:
        """Nothing is asked of the hub before it runs."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now; called by the web server's threads."""
        assert self._loop is not None
        views, members = asyncio.run_coroutine_threadsafe(self._seen(), self._loop).result(PATIENCE)
        yield from gathered(views, members)

    async def _seen(self) -> tuple[list[View], dict[str, tuple[str, float | None]]]:
        """Runs, and members with role and seconds since they were heard; on the hub's own loop."""
        hub = self._hub
        return [run.view(hub.seen) for run in hub.runs.values()], hub.heard()


def gathered(views: list[View], members: dict[str, tuple[str, float | None]]) -> Iterator[Metric]:
    """Metrics of runs as watchers see them, and of members: role, and seconds since they were heard of."""
    phases = Counter(view.phase for view in views)
    runs = GaugeMetricFamily("atoll_runs", "Runs by phase.", labels=["phase"])
    for phase in PHASES:
        runs.add_metric([phase], phases[phase])
    yield runs
    told: dict[str, GaugeMetricFamily] = {
        name: GaugeMetricFamily(f"atoll_{name}", text, labels=["run"])
        for name, text in (
            ("round", "Rounds that are closed."), ("rounds_planned", "Rounds of the run."),
            ("attempt", "Attempt at the round at work."), ("last_round_updates", "Updates of the last closed round."),
            ("last_round_received_bytes", "Bytes received in the last closed round."),
            ("last_round_seconds", "Seconds of the last closed round."),
            ("last_round_loss", "Mean loss of local training in the last closed round."),
            ("privacy_epsilon", "Epsilon that the run's noise has spent, of a site's privacy."),
            ("privacy_budget", "Largest epsilon that the run may spend."),
            ("last_step_staleness", "Mean age, in steps, of the updates of an asynchronous run's last step."),
            ("buffer_updates", "Updates that wait for the next step of an asynchronous run."),
            ("sites_at_work", "Sites that train in an asynchronous run."),
            ("oldest_behind", "Steps since the oldest model that a site of an asynchronous run trains on."),
        )
    }  # fmt: skip
    said = GaugeMetricFamily(
        "atoll_model_metric", "Metrics of the model that sites evaluated last.", labels=["run", "metric"]
    )
    standing = GaugeMetricFamily("atoll_run_sites", "Sites of a run by where they stand.", labels=["run", "standing"])
    for view in views:
        last = view.closed[-1] if view.closed else None
        values: dict[str, float | None] = {
            "round": last.round if last else 0, "rounds_planned": view.rounds, "attempt": view.attempt,
        }  # fmt: skip
        if last is not None:
            values |= {
                "last_round_updates": last.clients, "last_round_received_bytes": last.bytes_up,
                "last_round_seconds": last.seconds, "last_round_loss": last.loss,
            }  # fmt: skip
        if view.privacy is not None and view.privacy.private:  # seeded noise buys nothing
            values |= {"privacy_epsilon": view.privacy.epsilon, "privacy_budget": view.privacy.budget}
        if view.buffer is not None:
            values |= {
                "buffer_updates": view.buffer.waiting, "sites_at_work": view.buffer.at_work,
                "oldest_behind": max((s.behind or 0 for s in view.sites), default=0),
                "last_step_staleness": None if last is None else last.staleness,
            }  # fmt: skip
        for name, value in values.items():
            if value is not None:
                told[name].add_metric([view.run], value)
        evaluated = [closed for closed in view.closed if closed.metrics]
        for name, value in evaluated[-1].metrics.items() if evaluated else ():
            said.add_metric([view.run, name], value)
        stand = Counter(site.standing for site in view.sites)
        for name in STANDINGS:
            standing.add_metric([view.run, name], stand[name])
    yield from told.values()
    yield said
    yield standing
    silence = GaugeMetricFamily(
        "atoll_member_silence_seconds", "Seconds since a member was heard of.", labels=["member", "role"]
    )
    for name, (role, seconds) in members.items():
        if seconds is not None:
            silence.add_metric([name, role], seconds)
    yield silence


def listening(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, or of a port alone: this machine's.

    Raises:
        InvalidArgument: it is neither.
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise invalid("--metrics", text, "PORT or HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)
