"""Reading a run directory for looking at: finished or not, without its model."""

import fcntl
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from atoll.errors import RunError
from atoll.history import Record
from atoll.privacy import client_noise
from atoll.privacy.terms import statements

if TYPE_CHECKING:
    from atoll.journal import Event
    from atoll.result import Result

State = Literal["", "finished", "running", "interrupted", "failed", "unfinished"]

ClientMetrics = dict[str, dict[str, dict[str, float]]]
"""Which models ("global", "personal") -> client -> metric -> value."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run as its directory, or a result, tells it.

    Attributes:
        name: what to call it.
        directory: where it is kept, if anywhere.
        state: "unfinished" is a run whose process ended without a word, for instance because it was killed; empty for a
            result without a run directory.
        history: one record per round.
        spec: everything that decides the result.
        engine: which path ran, and why; empty while that is not known.
        privacy: statements; empty without differential privacy.
        clients: final test metrics of every client.
        notes: what a reader should know.
        versions: of what it ran with.
        began: seconds since 1970; None when not known.
        latest: of its newest event, likewise.
        error: what stopped a failed run.
        planned: rounds it was last asked for; None when not known.
    """

    name: str
    directory: Path | None
    state: State
    history: list[Record]
    spec: dict[str, Any]
    engine: dict[str, Any]
    privacy: list[dict[str, Any]]
    clients: ClientMetrics
    notes: list[str]
    versions: dict[str, str]
    began: float | None = None
    latest: float | None = None
    error: str = ""
    planned: int | None = None


def run_of(result: "Result") -> Run:
    """A result as a run; what only the journal knows is read from the result's directory, if it has one."""
    versions: dict[str, str] = {}
    began = latest = None
    state: State = ""
    if result.directory is not None and (result.directory / "journal.sqlite").exists():
        kept = read_run(result.directory)
        versions, began, latest, state = kept.versions, kept.began, kept.latest, kept.state
    title = str(result.spec.get("title") or "")
    name = title or (result.directory.name if result.directory is not None else "")
    return Run(
        name, result.directory, state, list(result.history), result.spec,
        result.engine, list(result.privacy), result.clients, list(result.notes), versions, began, latest,
    )  # fmt: skip


def read_run(directory: str | Path) -> Run:
    """Read a run directory, or the directory of a saved result.

    Args:
        directory: of a run in any state.

    Raises:
        RunError: it holds neither a journal nor a result, or they are damaged.
    """
    folder = Path(directory)
    if not (folder / "journal.sqlite").exists():
        if (folder / "result.json").exists():
            return _saved(folder)
        what = "is not a run directory: it has no journal.sqlite" if folder.is_dir() else "does not exist"
        raise RunError(f"{folder} {what}. Name a directory that a run was given, such as one that `atoll runs` lists.")
    from atoll.journal import read_journal

    journal = read_journal(folder)
    try:
        events = list(journal.events())
        history = journal.history()
    finally:
        journal.close()
    begun = next((e for e in events if e.kind == "run"), None)
    if begun is None:
        raise RunError(f"{folder} holds a journal without a run: it was stopped before it began. Start it again.")
    ends = [e for e in events if e.kind in ("finished", "interrupted", "failed", "resumed")]
    last = ends[-1].kind if ends else ""
    state: State = "unfinished"
    if last in ("finished", "interrupted", "failed"):
        state = last  # pyright: ignore[reportAssignmentType]
    elif _held(folder):
        state = "running"
    saved = _saved(folder) if state == "finished" and (folder / "result.json").exists() else None
    spec = begun.body["spec"]
    notes = [n for e in events if e.kind == "resumed" for n in e.body.get("notes", ())]
    return Run(
        name=str(spec.get("title") or folder.resolve().name),
        directory=folder,
        state=state,
        history=history,
        spec=spec,
        engine=saved.engine if saved is not None else {},
        privacy=saved.privacy if saved is not None else _privacy(events),
        clients=saved.clients if saved is not None else {},
        notes=list(dict.fromkeys([*notes, *(saved.notes if saved is not None else ())])),
        versions=begun.body.get("versions", {}),
        began=begun.time,
        latest=events[-1].time,
        error=str(ends[-1].body.get("error", "")) if last == "failed" else "",
        planned=next((e.body["rounds"] for e in reversed(events) if "rounds" in e.body), None),
    )


def _privacy(events: "Sequence[Event]") -> list[dict[str, Any]]:
    """What an unfinished run with noise has spent."""

    def bodies(kind: str) -> list[dict[str, Any]]:
        return [e.body for e in events if e.kind == kind]

    at_server = statements(bodies("privacy"), bodies("release"))
    return at_server + client_noise.statements(bodies("client_noise"), bodies("client_release"))


def _saved(folder: Path) -> Run:
    try:
        body = json.loads((folder / "result.json").read_text())
        clients: ClientMetrics = {
            kind: {c: {m: math.nan if v is None else float(v) for m, v in of.items()} for c, of in every.items()}
            for kind, every in body["clients"].items()
        }
        history = [Record.from_dict(r) for r in body["history"]]
        return Run(
            str(body["spec"].get("title") or folder.resolve().name), folder, "finished", history, body["spec"],
            body["engine"], body["privacy"], clients, body["notes"], {}, None, (folder / "result.json").stat().st_mtime,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / 'result.json'} is damaged ({error!r}): resume the run to write it again.") from error


def _held(folder: Path) -> bool:
    if not (folder / "lock").exists():
        return False
    with open(folder / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
