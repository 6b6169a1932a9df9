"""`atoll trace`: where the time of a run's rounds went, by its journal."""

from contextlib import closing
from pathlib import Path

import msgspec

from atoll.cli.guard import console
from atoll.errors import RunError
from atoll.net.coordinator import Plan
from atoll.net.server import opened
from atoll.net.storage import scope, write_file
from atoll.net.traces import chrome, traced


def trace(run: str, out: Path, *, state: Path, database: str | None) -> None:
    """Write the trace of a run's rounds that are over; see `atoll trace --help`."""
    if not (state / "authority.pem").exists():
        raise RunError(f"{state} is no folder of a server: name it with --state.")
    held, _ = opened(state, database, "process")
    with closing(held):
        plan = held.documents("plan").get(run)
        if plan is None:
            known = ", ".join(held.documents("plan")) or "none"
            raise RunError(
                f"there is no plan of a run {run!r} here (there are: {known}); one that ended under an "
                "earlier version has none."
            )
        if "concurrency" in msgspec.json.decode(plan):
            raise RunError(
                f"the run {run} is asynchronous and has no rounds to show: atoll watch {run} tells its steps."
            )
        try:
            spans = list(traced(run, msgspec.json.decode(plan, type=Plan), held.records(f"{scope(run)}journal")))
        except msgspec.MsgspecError as error:
            raise RunError(f"the run {run} was written by another version of Atoll: {error}") from error
    write_file(out, chrome(spans))
    rounds = sum(span.parent is None for span in spans)
    console().print(f"{out}: {rounds} rounds, {len(spans)} spans; open it at https://ui.perfetto.dev", markup=False)
