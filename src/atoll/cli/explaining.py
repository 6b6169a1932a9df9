"""`atoll explain RUN`: the first cause of where a run is, in a sentence, and what can be done."""

from pathlib import Path
from typing import Any

from atoll.cli.guard import console
from atoll.cli.serving import ask
from atoll.net import calls
from atoll.net.calls import SiteView, View
from atoll.net.home import home_for

SILENT = 120.0
"""Seconds after which a site that was not heard of is said to be silent: it asks at least every half minute."""
NAMED = 5
"""Sites that are named."""
LOOKING: tuple[Any, ...] = ("admin", "researcher", "viewer")


def explain(run: str, *, home: Path | None) -> None:
    """Say why a run is where it is."""
    view: View = ask(home_for(home, LOOKING, "explain"), calls.Watch(run, -1))
    console().print(explained(view), markup=False, soft_wrap=True)


def explained(view: View) -> str:
    """The first cause of where a run is, and what can be done about it."""
    told = _explained(view)
    if view.reason and view.phase not in ("finished", "stopped", "broken", "paused"):
        told = f"{told} The server cannot keep what comes: {_reason(view)} It tries again by itself."
    return told


def _explained(view: View) -> str:
    done = view.closed[-1].round if view.closed else 0
    what = "rounds" if view.buffer is None else "steps"
    where = f"{view.run}, after {done} of {view.rounds} {what}" if view.rounds else view.run
    match view.phase:
        case "finished":
            return f"{view.run} is finished: {_reason(view)}{_never(view)}"
        case "stopped":
            return f"{where}, was stopped: {_reason(view)} It does not go on."
        case "broken":
            return (
                f"{where}, rests: its process cannot work: {_reason(view)} The server starts it again by itself; "
                f"`atoll stop {view.run}` ends the run."
            )
        case "paused":
            return f"{where}, is paused: {_reason(view)}{_troubles(view)} `atoll resume {view.run}` lets it go on."
        case "preparing" | "gathering":
            ready = sum(s.standing == "ready" for s in view.sites)
            return f"{where}, waits for sites: {ready} of at least {view.least} are ready.{_troubles(view)}"
        case "collecting":
            late = [s.name for s in view.sites if s.doing == "asked"]
            told = f"{_names(late)} did not deliver yet." if late else "whoever was asked has delivered."
            if view.buffer is not None and not view.evaluating:
                there = f"step {view.round} has {view.buffer.waiting} of {view.buffer.size} updates"
                ready = sum(s.standing == "ready" for s in view.sites)
                if not late and ready < view.buffer.size:  # a site has one update in a step
                    told += f" A step is made of as many sites, and {ready} of {view.buffer.size} are ready."
                oldest = max(view.sites, key=lambda s: s.behind or 0, default=None)
                if oldest is not None and oldest.behind:
                    told += f" {oldest.name} works on a model that is {oldest.behind} steps old."
                return f"{where}, is at work: {there}; {told}{_troubles(view)}"
            asked = "what sites say of the model" if view.evaluating else f"updates of round {view.round}"
            return f"{where}, waits for {asked}: {told}{_troubles(view)}"
        case "summing":
            late = [s.name for s in view.sites if s.doing == "asked"]
            told = f"{_names(late)} did not answer yet." if late else "all that were asked have answered."
            return f"{where}, adds round {view.round} up under masks: {told}{_troubles(view)}"
        case _:
            return f"{where}, is at work: {view.phase}.{_troubles(view)}"


def _reason(view: View) -> str:
    text = view.reason or "no reason was given"
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _troubles(view: View) -> str:
    """What holds sites back: the gravest kind, with the sites it holds back."""
    found: dict[str, list[str]] = {}
    for site in view.sites:
        if (told := trouble(site)) is not None:
            found.setdefault(told, []).append(site.name)
    if not found:
        return ""
    told = min(found, key=lambda t: (-len(found[t]), t))
    more = len(found) - 1
    return f" {_names(found[told])}: {told}" + (
        f" {more} other trouble{'s' if more > 1 else ''}: atoll watch --once." if more else ""
    )


def trouble(site: SiteView) -> str | None:
    """What holds a site back, and what can be done about it; None: nothing."""
    detail = f" ({site.detail.rstrip('.')})" if site.detail else ""
    match site.standing:
        case "failed":
            return f"cannot take part{detail}; the site's own log says more."
        case "denied":
            return "the owner refused this run."
        case "waiting":
            return f"the owner has to decide{detail}."
        case "revoked":
            return "was shut out."
        case "left":
            return f"is not there{detail}; its owner starts it again with `atoll join`."
        case _:
            if site.why:
                left_out = site.doing in ("excluded", "out of the sum")
                return f"{'is left out of this attempt' if left_out else 'was refused'}: {site.why}"
            if site.seen is None or site.seen > SILENT:
                return "is silent: its machine or its line is down."
            return None


def _never(view: View) -> str:
    never = [s.name for s in view.sites if s.counted is None]
    return f" No update counted of {_names(never)}." if never else ""


def _names(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
