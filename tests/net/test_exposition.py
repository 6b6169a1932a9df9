"""Metrics: what they say of runs, that a server tells them, and that no secret is among them."""

import asyncio
import socket
import urllib.request
from pathlib import Path

import pytest
from doors import House
from prometheus_client.parser import text_string_to_metric_families

from atoll.errors import InvalidArgument, RunError
from atoll.net.calls import Closed, SiteView, Spent, View
from atoll.net.exposition import Exposition, gathered, listening


def view(run: str, phase: str, closed: list[Closed], sites: list[SiteView], privacy: Spent | None = None) -> View:
    return View(1, run, "", phase, "", 1, 9, 2, 2, 2, sites, closed, [], "admin", 0.0, privacy)


def test_runs_rounds_and_sites_are_counted() -> None:
    sites = [SiteView(n, standing, "", "", "", None, 1.0) for n, standing in (("a", "ready"), ("b", "failed"))]
    views = [view("r", "collecting", [Closed(1, 2, 0.5, 900, 1.5), Closed(2, 3, None, 800, 2.5)], sites)]
    views.append(view("q", "preparing", [], [], Spent(1.5, 1e-5, 3.0, True)))
    views.append(view("p", "finished", [], [], Spent(1.5, 1e-5, None, False)))
    found = {
        (s.name, *s.labels.values()): s.value
        for family in gathered(views, {"a": ("site", 3.0), "b": ("site", None)})
        for s in family.samples
    }
    assert found["atoll_runs", "collecting"] == found["atoll_runs", "preparing"] == 1
    assert found["atoll_runs", "finished"] == 1 and found["atoll_runs", "paused"] == 0
    assert found["atoll_privacy_epsilon", "q"] == 1.5 and found["atoll_privacy_budget", "q"] == 3.0
    assert not {("atoll_privacy_epsilon", "p"), ("atoll_privacy_epsilon", "r")} & found.keys(), "no noise, or seeded"
    assert found["atoll_round", "r"] == 2 and found["atoll_round", "q"] == 0
    assert found["atoll_rounds_planned", "r"] == 9 and found["atoll_attempt", "r"] == 2
    assert found["atoll_last_round_updates", "r"] == 3 and found["atoll_last_round_received_bytes", "r"] == 800
    assert found["atoll_last_round_seconds", "r"] == 2.5
    assert ("atoll_last_round_loss", "r") not in found and ("atoll_last_round_seconds", "q") not in found
    assert found["atoll_run_sites", "r", "ready"] == found["atoll_run_sites", "r", "failed"] == 1
    assert found["atoll_member_silence_seconds", "a", "site"] == 3.0
    assert ("atoll_member_silence_seconds", "b", "site") not in found


def test_a_server_tells_them_over_http_and_no_secret(tmp_path: Path) -> None:
    house = House(tmp_path)

    async def scraped() -> str:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server, _ = Exposition(house.hub).start("127.0.0.1", port)
        try:
            with pytest.raises(RunError, match="for metrics"):
                Exposition(house.hub).start("127.0.0.1", port)
            opened = await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{port}/metrics", None, 10)
            return opened.read().decode()
        finally:
            server.shutdown()
            server.server_close()

    text = asyncio.run(scraped())
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {"atoll_runs", "atoll_member_silence_seconds", "process_resident_memory_bytes"} <= names
    for member in house.hub.roster.members.values():
        assert member.key not in text


@pytest.mark.parametrize(
    ("text", "found"),
    [("9100", ("127.0.0.1", 9100)), ("0.0.0.0:9100", ("0.0.0.0", 9100)), ("[::1]:9100", ("::1", 9100))],
)
def test_where_metrics_are_told(text: str, found: tuple[str, int]) -> None:
    assert listening(text) == found


@pytest.mark.parametrize("text", ["", "host", "host:", "host:0", ":70000", "a:b"])
def test_what_is_no_port_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="--metrics"):
        listening(text)
