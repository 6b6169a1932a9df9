"""What operators do with runs and members, from `atoll submit` and `watch` to `discard`, `stop` and `revoke`."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import typer

from atoll.cli.guard import console, say
from atoll.cli.run import app_path, parsed
from atoll.cli.serving import ask
from atoll.errors import InvalidArgument, RunError, invalid
from atoll.net import calls
from atoll.net.calls import Charter, SiteView, View
from atoll.net.client import Client, Unreachable
from atoll.net.control import content_hash
from atoll.net.home import Home, home_for

LOOKING: tuple[Any, ...] = ("admin", "researcher", "viewer")
STEERING: tuple[Any, ...] = ("admin", "researcher")


def submit(
    app: str, *, name: str | None, settings: Sequence[str], options: Mapping[str, Any], home: Path | None, quiet: bool
) -> None:
    """Start a run over sites; see `atoll submit --help`."""
    from atoll.deployment.prepare import experiment_of, plan_of, process_of, rules_of, unevaluated

    mine, path = home_for(home, STEERING, "submit"), app_path(app)
    given = parsed(settings)
    code = path.read_bytes()
    run = name if name is not None else _name(path)
    charter = _charter(run, content_hash(code), given, options)
    experiment = experiment_of(path, given)
    process = process_of(experiment, "loop")
    plan_of(experiment, process, charter)
    rules_of(process, charter)
    ask(mine, calls.Submit(charter, _text(code, path)))
    if quiet:
        typer.echo(run)
        return
    if experiment.evaluate_every and (why := unevaluated(experiment, process)):
        say(f"nothing is evaluated, since {why}: rounds tell the loss of local training, where it may be told.", "dim")
    say(f"submitted {run}: sites take part once their owners approve it (atoll review, at each site). Watch it with:")
    say(f"  atoll watch {run}")


def _charter(run: str, code: str, settings: Mapping[str, str], options: Mapping[str, Any]) -> Charter:
    charter = Charter(run, code, dict(settings), **options)
    try:
        return calls.decode(Charter, calls.encode(charter))
    except RunError as error:
        raise InvalidArgument(str(error)) from error


def _text(code: bytes, path: Path) -> str:
    from atoll.net.policy import source

    source(code)  # a site would refuse it
    try:
        return code.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid("APP", str(path), "a file of UTF-8 text") from error


def _name(path: Path) -> str:
    base = path.resolve().parent.name if path.name == "app.py" else path.stem
    return f"{base}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"


# --- looking ----------------------------------------------------------------------------------------------------------


def watch(run: str | None, *, once: bool, home: Path | None) -> None:
    """Follow a run to its end; see `atoll watch --help`."""
    mine = home_for(home, LOOKING, "watch")
    if run is None:
        listed: calls.RunList = ask(mine, calls.ListRuns())
        if not listed.runs:
            raise RunError("there is no run yet: atoll submit APP starts one.")
        run = listed.runs[0].run
    if once:
        show(ask(mine, calls.Watch(run, -1)))
        return
    last = asyncio.run(follow(mine, run, lambda line: console().print(line, markup=False, soft_wrap=True)))
    if last.phase != "finished":
        raise typer.Exit(1)


async def follow(home: Home, run: str, tell: Any) -> View:
    """Tell what happens in a run until it is over; the last view of it."""
    client, view, lost = Client(home), None, False
    try:
        while True:
            try:
                now: View = await client.call(calls.Watch(run, -1 if view is None or lost else view.version))
            except Unreachable as error:
                if not lost:
                    tell(f"{error}; trying again")
                lost = True
                await asyncio.sleep(1.0)
                continue
            if lost:
                tell("the server is back")
            lost = False
            for line in changes(view, now):
                tell(line)
            view = now
            if now.over:
                return now
    finally:
        await client.close()


def changes(before: View | None, now: View) -> list[str]:
    """What is new in a run, as lines."""
    lines: list[str] = []
    if before is None:
        lines.append(f"{now.run}: {now.title or 'a run'} over sites, {now.rounds} rounds, submitted by {now.by}")
    known = {s.name: s for s in before.sites} if before is not None else {}
    for site in now.sites:
        line = _site_line(site)
        if site.name not in known or _site_line(known[site.name]) != line:
            lines.append(f"  {site.name}: {line}")
    told = {c.round: c for c in before.closed} if before is not None else dict[int, calls.Closed]()
    for closed in now.closed:
        if closed.round not in told:
            loss = "" if closed.loss is None else f", loss {closed.loss:.4g}"
            old = "" if closed.staleness is None else f", {closed.staleness:.2g} steps old on average"
            lines.append(
                f"{'round' if now.buffer is None else 'step'} {closed.round}/{now.rounds}: {closed.clients} "
                f"updates{old}{loss}, {closed.bytes_up:,} bytes, {closed.seconds:.1f} s"
            )
        if closed.metrics and (closed.round not in told or told[closed.round].metrics != closed.metrics):
            lines.append(f"  held-out examples after round {closed.round}: {_metrics(closed)}")
    if now.privacy is not None and (before is None or before.privacy != now.privacy):
        lines.append(_privacy(now.privacy))
    lines += [f"  ! {n}" for n in now.notices if before is None or n not in before.notices]
    state = (now.phase, now.reason)
    if now.phase in ("paused", "broken", "finished", "stopped") and (
        before is None or state != (before.phase, before.reason)
    ):
        lines.append(f"{now.phase}: {now.reason}")
    waiting = now.phase in ("gathering", "preparing") and not now.closed
    if waiting and (before is None or before.phase != now.phase):
        ready = sum(s.standing in ("ready", "preparing") for s in now.sites)
        lines.append(f"waiting for {now.least} sites; {ready} are there")
    return lines


def buffered(buffer: calls.InBuffer) -> str:
    """What an asynchronous run is doing, in words."""
    return (
        f"{buffer.waiting} of {buffer.size} updates are there, {buffer.at_work} of {buffer.concurrency} places at work"
    )


def _metrics(closed: calls.Closed) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in closed.metrics.items())


def _privacy(spent: calls.Spent) -> str:
    if not spent.private:
        return "privacy: NONE, since the noise is seeded, as for tests"
    of = "" if spent.budget is None else f" of {spent.budget:g}"
    return f"privacy: epsilon {spent.epsilon:.4g}{of} is spent at delta {spent.delta:g}, for each site"


def _site_line(site: SiteView) -> str:
    parts = [site.standing, site.detail]
    if site.doing == "excluded":
        parts.append(f"left out of this attempt: {site.why}")
    elif site.why:
        parts.append(site.why)
    return ", ".join(p for p in parts if p)


def show(view: View) -> None:
    """A run and its sites as they are now."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    out = console()
    at = f"round {view.round} of {view.rounds}, attempt {view.attempt}"
    if view.buffer is not None:
        at = f"step {view.round} of {view.rounds}, {buffered(view.buffer)}"
    head = f"{view.run}: {view.phase}, {'what sites say of the model' if view.evaluating else at}"
    out.print(head + (f"; {view.reason}" if view.reason else ""), markup=False, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("site", "stands", "this round", "counted", "heard", "last"):
        table.add_column(column, overflow="fold")
    for site in view.sites:
        counted = "" if site.counted is None else f"round {site.counted[0] + 1}"
        doing = site.doing if not site.behind else f"{site.doing}, {site.behind} steps behind"
        cells = (site.name, site.standing, doing, counted, _ago(site.seen), site.why or site.detail)
        table.add_row(*(Text(cell) for cell in cells))
    out.print(table)
    if view.closed:
        last = view.closed[-1]
        loss = "" if last.loss is None else f", loss {last.loss:.4g}"
        out.print(f"last round: {last.round}, {last.clients} updates{loss}, {last.seconds:.1f} s", markup=False)
        evaluated = [c for c in view.closed if c.metrics]
        if evaluated:
            out.print(f"held-out examples after round {evaluated[-1].round}: {_metrics(evaluated[-1])}", markup=False)
    if view.privacy is not None:
        out.print(_privacy(view.privacy), markup=False, soft_wrap=True)
    for notice in view.notices[-5:]:
        out.print(f"! {notice}", markup=False, soft_wrap=True)


def server_runs(home: Path | None) -> None:
    """List a server's runs; see `atoll runs --help`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    listed: calls.RunList = ask(home_for(home, LOOKING, "runs --server"), calls.ListRuns())
    if not listed.runs:
        console().print("the server has no runs.")
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("run", "state", "rounds", "sites", "loss", "by", "title"):
        table.add_column(column, overflow="fold")
    for view in listed.runs:
        loss = view.closed[-1].loss if view.closed else None
        ready = sum(s.standing == "ready" for s in view.sites)
        done = view.closed[-1].round if view.closed else 0
        cells = (
            view.run, view.phase, f"{done} of {view.rounds}", f"{ready} of {view.least}",
            "" if loss is None else f"{loss:.4g}", view.by, view.title,
        )  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells))
    console().print(table)


def sites(home: Path | None) -> None:
    """List members; see `atoll sites --help`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    listed: calls.Members = ask(home_for(home, LOOKING, "sites"), calls.ListMembers())
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "role", "heard", "joined", "key"):
        table.add_column(column, overflow="fold")
    for member in sorted(listed.members, key=lambda m: (m.role != "site", m.name)):
        joined = time.strftime("%Y-%m-%d %H:%M", time.gmtime(member.since)) + " UTC"
        heard = "revoked" if member.revoked else _ago(member.seen)
        table.add_row(*(Text(c) for c in (member.name, member.role, heard, joined, member.fingerprint)))
    console().print(table)


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "never since the server started"
    return "now" if seconds < 40 else f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.0f} h ago"


# --- steering ---------------------------------------------------------------------------------------------------------


def steer(run: str, action: Literal["pause", "resume", "discard", "stop"], *, reason: str, home: Path | None) -> None:
    """Pause, resume or stop a run, or give up what a paused one has of its attempt at a round."""
    ask(home_for(home, STEERING, action), calls.Control(run, action, reason))
    done = {
        "pause": f"paused {run}.", "resume": f"resumed {run}.", "stop": f"stopped {run}.",
        "discard": f"the updates of {run}'s round at work are given up: `atoll resume {run}` asks for others.",
    }  # fmt: skip
    say(done[action])


def revoke(name: str, *, home: Path | None) -> None:
    """Shut a member out; see `atoll revoke --help`."""
    ask(home_for(home, ("admin",), "revoke"), calls.Revoke(name))
    say(f"{name} is shut out: its key is worth nothing any more. A new invite can let it in again, with a new key.")
