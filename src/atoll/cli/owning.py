"""`atoll review`, `approve`, `deny`, `audit`, `peers`: what a site's owner decides, and what has left."""

import time
from contextlib import closing
from pathlib import Path
from typing import Literal

from atoll.cli.guard import console, say
from atoll.errors import RunError
from atoll.net.calls import Charter
from atoll.net.home import Home, home_for
from atoll.net.policy import Approvals, departed, source
from atoll.net.storage import state_of


def review(mark: str | None, *, home: Path | None) -> None:
    """Show what waits for a decision, or one experiment's code; see `atoll review --help`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    mine = home_for(home, ("site",), "review")
    approvals = Approvals(mine.folder)
    decided, waiting = approvals.decisions(), approvals.waiting()
    every = {h: ("waiting", c) for h, c in waiting.items()} | {h: (d.verdict, d.charter) for h, d in decided.items()}
    out = console()
    if mark is not None:
        found = approvals.find(mark)
        state, charter = every[found]
        for line in _told(found, state, charter):
            out.print(line, markup=False, soft_wrap=True)
        out.print()
        code = mine.folder / "code" / f"{charter.code}.py"
        if not code.exists():
            raise RunError(f"{code} is not there: the site fetches it when the run is offered to it.")
        text = source(code.read_bytes()).replace("\r\n", "\n")
        seen = visible(text, keep="\n\t")
        out.print(seen, markup=False, soft_wrap=True)
        if seen != text:
            say("Careful: the code holds characters that a screen hides or acts upon; here they are written as \\x1b.")
        return
    if not every:
        out.print("nothing was asked of this site yet.")
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("hash", "decision", "run", "by", "settings"):
        table.add_column(column, overflow="fold")
    for found, (state, charter) in every.items():
        settings = " ".join(f"{n}={v}" for n, v in charter.settings.items())
        table.add_row(*(Text(visible(c)) for c in (found[:12], state, charter.run, charter.by, settings)))
    out.print(table)
    if waiting:
        say("Read the code with `atoll review HASH`; then `atoll approve HASH` or `atoll deny HASH`.")


def decide(mark: str, verdict: Literal["approved", "denied"], *, home: Path | None) -> None:
    """Approve or deny an experiment."""
    mine = home_for(home, ("site",), "approve" if verdict == "approved" else "deny")
    approvals = Approvals(mine.folder)
    found = approvals.find(mark)
    charter = approvals.known()[found]
    if verdict == "approved":
        code = mine.folder / "code" / f"{charter.code}.py"
        if not code.exists():
            raise RunError(
                f"{code} is not there: nobody can have read it. The site fetches it when the run is offered."
            )
    approvals.settle(charter, verdict)
    for line in _told(found, verdict, charter):
        say(line)


def audit(home: Path | None) -> None:
    """Show what left a site, or who was let in at a server; see `atoll audit --help`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    mine: Home = home_for(home, ("site",), "audit")
    with closing(state_of(mine.folder)) as state:
        records = state.records("left")
        sent = list(departed(records))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("when (UTC)", "run", "what", "round", "bytes", "tensors: shape, L2 norm"):
        table.add_column(column, overflow="fold")
    for left in sent:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(left.at))
        tensors = "; ".join(f"{t.name} {t.dtype} {list(t.shape)} {t.norm:.3g}" for t in left.tensors)
        cells = (when, left.run, left.what, str(left.round or ""), f"{left.bytes:,}", tensors)
        table.add_row(*(Text(c) for c in cells))
    console().print(table)
    say(f"the journal's records fit together; its head is {records.head}")


def peers(forget: str | None, home: Path | None) -> None:
    """Show or forget the keys of other sites; see `atoll peers --help`."""
    import hashlib

    from atoll.net.peers import Peers
    from atoll.net.storage import Disk

    known = Peers(Disk(home_for(home, ("site",), "peers").folder))
    if forget is not None:
        known.forget(forget)
        say(f"the next key that {forget} shows is pinned.")
        return
    if not known.keys:
        console().print("this site took part in no secure sum yet.")
    for name, key in known.keys.items():
        line = f"{visible(name)}  {hashlib.sha256(key.encode()).hexdigest()[:32]}"
        console().print(line, markup=False, highlight=False, soft_wrap=True)


def _told(found: str, state: str, charter: Charter) -> list[str]:
    settings = " ".join(f"{n}={v}" for n, v in charter.settings.items()) or "none: the code's own defaults"
    lines = (
        f"{state}: {found}",
        f"  run       {charter.run}, submitted by {charter.by}",
        f"  settings  {settings}",
        f"  code      SHA-256 {charter.code}",
    )
    return [visible(line) for line in lines]


def visible(text: str, keep: str = "") -> str:
    """Text of strangers for a screen: what would move the cursor, hide or turn text around is written out.

    Args:
        text: any.
        keep: characters that may stay.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)
