"""Why a run is where it is: the first cause, named, and what can be done."""

from typing import Any

import pytest

from atoll.cli.explaining import explained
from atoll.net.calls import Closed, SiteView, View


def site(name: str, standing: str = "ready", **more: Any) -> SiteView:
    given: dict[str, Any] = {"detail": "", "doing": "", "why": "", "counted": None, "seen": 1.0} | more
    return SiteView(name, standing, **given)


def view(phase: str, *sites: SiteView, reason: str = "", closed: int = 2, attempt: int = 1) -> View:
    return View(
        version=1, run="r", title="", phase=phase, reason=reason, round=closed + 1, rounds=5, attempt=attempt,
        wanted=2, least=2, sites=list(sites),
        closed=[Closed(i + 1, 2, None, 0, 1.0) for i in range(closed)], notices=[],
        by="a", at=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            view("finished", site("a", counted=(4, 0)), site("b"), reason="all 5 rounds are done.", closed=5),
            "r is finished: all 5 rounds are done. No update counted of b.",
        ),
        (
            view("stopped", reason="stop by admin"),
            "r, after 2 of 5 rounds, was stopped: stop by admin. It does not go on.",
        ),
        (
            view("broken", reason="it has no memory left."),
            "r, after 2 of 5 rounds, rests: its process cannot work: it has no memory left. The server starts it again "
            "by itself; `atoll stop r` ends the run.",
        ),
        (
            view("paused", site("a", why="norm: 9 is above 4", doing="excluded"), site("b"), reason="too few."),
            "r, after 2 of 5 rounds, is paused: too few. a: is left out of this attempt: norm: 9 is above 4 "
            "`atoll resume r` lets it go on.",
        ),
        (
            view("gathering", site("a", "waiting", detail="atoll review 12ab"), site("b"), closed=0),
            "r, after 0 of 5 rounds, waits for sites: 1 of at least 2 are ready. a: the owner has to decide "
            "(atoll review 12ab).",
        ),
        (
            view("preparing", site("a", "failed", detail="no column age."), site("b", "denied"), site("c", "denied")),
            "r, after 2 of 5 rounds, waits for sites: 0 of at least 2 are ready. b, c: the owner refused this run. "
            "1 other trouble: atoll watch --once.",
        ),
        (
            view("collecting", site("a", doing="asked", seen=600.0), site("b", doing="delivered")),
            "r, after 2 of 5 rounds, waits for updates of round 3: a did not deliver yet. a: is silent: its machine or "
            "its line is down.",
        ),
        (
            view("collecting", site("a", doing="asked"), closed=5, attempt=0),
            "r, after 5 of 5 rounds, waits for what sites say of the model: a did not deliver yet.",
        ),
        (view("collecting", site("a", doing="delivered")), "updates of round 3: whoever was asked has delivered."),
        (
            view("summing", site("a", doing="out of the sum", why="it was started again."), site("b", doing="asked")),
            "adds round 3 up under masks: b did not answer yet. a: is left out of this attempt: it was started again.",
        ),
        (view("reducing", site("a")), "r, after 2 of 5 rounds, is at work: reducing."),
        (
            view("gathering", site("a", "left", seen=None)),
            "a: is not there; its owner starts it again with `atoll join`.",
        ),
    ],
)
def test_the_first_cause_is_told(given: View, said: str) -> None:
    assert said in explained(given)


def test_many_sites_are_counted() -> None:
    many = [site(f"s{i}", "denied") for i in range(8)]
    assert "s0, s1, s2, s3, s4 and 3 more: the owner refused" in explained(view("gathering", *many))


def test_a_store_that_refuses_is_told_of_while_the_run_is_at_work() -> None:
    said = "the object store s3://bucket/prefix: Access Denied"
    told = explained(view("collecting", site("s0", doing="asked"), reason=said))
    assert "waits for updates" in told
    assert told.endswith(f"The server cannot keep what comes: {said}. It tries again by itself.")
