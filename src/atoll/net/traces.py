"""Traces of rounds over sites, made of a run's journal and of nothing else: live, or long after.

    round 3                    from the first site it waited for to its model, and what sites said of that
      gathering, paused          nobody is asked
      attempt 1, evaluation
        opening                    the task is being made
        collecting                 sites fetch the task, train, and bring updates
          SITE                       from the task's offer to the site's update, or why there is none
        summing join, reveal...    steps of a secure sum
          SITE                       from the step's begin to the site's answer
        reducing                   updates are combined

The journal has a site's answer and not what it was at before: how long it fetched, trained and uploaded is one span.
Ids are hashes of the journal's first entry and of a span's place in it, so that whoever makes a trace again makes the
same one. Attributes are names, numbers and codes; no text that a party wrote is among them.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from atoll.net import coordinator as core
from atoll.net.coordinator import Entry, Phase, Plan, State

MOST = 2000
"""Spans of sites in a round; what is above is counted, and left out: never what others are a part of."""

AT_WORK = (Phase.OPENING, Phase.COLLECTING, Phase.SUMMING, Phase.REDUCING)
_ENDS: dict[type[Any], str] = {
    core.Reduced: "combined", core.Evaluated: "evaluated", core.Failed: "failed", core.Discard: "given up",
    core.Stop: "stopped", core.Voided: "void",
}  # fmt: skip


class Span(NamedTuple):
    """A piece of a round's time.

    Attributes:
        name: of the kind of work; of a site's, the site's.
        trace: id of the round's trace, 16 bytes.
        id: 8 bytes.
        parent: id of the span it is a part of; None: it is the round.
        begin, end: seconds since 1970, as the run's journal has them.
        attributes: numbers, names and codes.
        failed: whether the work came to nothing.
    """

    name: str
    trace: bytes
    id: bytes
    parent: bytes | None
    begin: float
    end: float
    attributes: dict[str, str | int]
    failed: bool = False


class _Attempt(NamedTuple):
    number: int
    evaluates: bool
    id: bytes
    begin: float


class _Piece(NamedTuple):
    """A stretch in one phase, or one step of a secure sum."""

    name: str
    id: bytes
    begin: float
    asked: tuple[str, ...]


class Tracing:
    """Makes spans of a journal's entries, taken one after the other.

    Args:
        run: its name.
        plan: under which the entries were recorded.
    """

    def __init__(self, run: str, plan: Plan) -> None:
        self._run, self._plan = run, plan
        self.state = State()
        self._seed = b""
        self._round, self._begin, self._told = 0, 0.0, -1
        self._spans, self._sites, self._left = list[Span](), 0, 0
        self._updates = 0
        self._attempt: _Attempt | None = None
        self._piece: _Piece | None = None
        self._answered = set[str]()

    def take(self, entry: Entry) -> list[Span]:
        """Take the next entry; the spans of a round that it ends, else none.

        Raises:
            RunError: it is not the next one, or of another plan.
        """
        before, now = self.state, entry.now
        self.state = after = core.replay(self._plan, [entry], state=before)
        if not self._seed:
            self._seed = hashlib.sha256(msgspec.json.encode([self._run, entry])).digest()
            self._begin = now
        if self._piece is None:
            self._piece = self._pieced(after, entry)
        self._heard(entry, after)
        if isinstance(entry.event, core.Reduced):
            self._updates = len(before.accepted)
        if (name := _named(after)) != self._piece.name or _attempt(after) != _attempt(before):
            self._pass(after, entry)
            self._change(after, entry)
            self._piece = self._pieced(after, entry, name)
        if _round(after) < self._round:  # the model of the round before is evaluated after all
            self._round, self._spans, self._sites, self._left = _round(after), [], 0, 0
        over = after.phase in (Phase.FINISHED, Phase.STOPPED)
        if _round(after) == self._round and not (over and self._spans):
            return []
        outcome = "done" if _round(after) > self._round else "budget spent"  # else only that ends a run before its time
        spans = self._closed(now, "stopped" if isinstance(entry.event, core.Stop) else outcome)
        self._round, self._begin = _round(after), now
        return spans

    # --- what ends ----------------------------------------------------------------------------------------------------

    def _heard(self, entry: Entry, after: State) -> None:
        """Sites' answers."""
        event = entry.event
        match event:
            case core.Submitted(site, claim):
                code = f"refused: {event.finding.fault}" if event.finding.fault else "accepted"
                self._site(site, entry.now, code, {"bytes": claim.size, "bytes.pipeline": claim.bytes})
            case core.Declined(site):
                self._site(site, entry.now, "declined")
            case core.Spoke(site, claim):
                fault = event.finding.fault
                size = claim.size or len(claim.content)
                self._site(site, entry.now, f"refused: {fault}" if fault else "answered", {"bytes": size})
            case core.Abstained(site):
                self._site(site, entry.now, "abstained")
            case core.Left(site) | core.SitePaused(site) | core.Revoked(site):
                self._site(site, entry.now, after.sites[site].status)
            case core.Voided():
                for site in event.culprits:
                    self._site(site, entry.now, "refused: content")
            case _:
                pass

    def _site(self, name: str, now: float, outcome: str, more: dict[str, int] | None = None) -> None:
        piece = self._piece
        if piece is None or name not in piece.asked or name in self._answered:
            return
        self._answered.add(name)
        given = {"site": name, "outcome": outcome, **(more or {})}
        self._add(name, piece.id, piece.begin, now, given, failed=_lost(outcome))

    def _pass(self, after: State, entry: Entry) -> None:
        """The phase is over."""
        now, why = entry.now, "no answer in time" if isinstance(entry.event, core.Ticked) else "not awaited"
        if after.phase is Phase.PAUSED:
            why = "run paused"
        piece, attempt = self._piece, self._attempt
        assert piece is not None
        for name in piece.asked:  # of those that nobody waits for any more
            if name not in self._answered:
                self._site(name, now, why)
        parent = self._id("round") if attempt is None or piece.name in ("gathering", "paused") else attempt.id
        if now > piece.begin or piece.name != "gathering":
            self._add(piece.name, parent, piece.begin, now, {"asked": len(piece.asked)}, id=piece.id)
        self._answered = set[str]()

    def _change(self, after: State, entry: Entry) -> None:
        """An attempt ends, or begins."""
        attempt, found = self._attempt, _attempt(after)
        if attempt is not None and found != (attempt.number, attempt.evaluates):
            outcome = _ENDS.get(type(entry.event), "too few in time")
            name = "evaluation" if attempt.evaluates else f"attempt {attempt.number}"
            failed = outcome not in ("combined", "evaluated")
            given: dict[str, str | int] = {"attempt": attempt.number, "outcome": outcome}
            self._add(name, self._id("round"), attempt.begin, entry.now, given, id=attempt.id, failed=failed)
            self._attempt = None
        if found is not None and self._attempt is None:
            self._attempt = _Attempt(*found, self._id("attempt", entry.number), entry.now)

    def _closed(self, now: float, outcome: str) -> list[Span]:
        """The round's spans, its own at the end; of an evaluation that came later, those alone."""
        given: dict[str, str | int] = {"outcome": outcome, "updates": self._updates}
        self._updates = 0
        if self._left:
            given["spans.left_out"] = self._left
        if self._told < self._round:
            self._told = self._round
            name = f"round {self._round + 1}"
            self._add(name, None, self._begin, now, given, id=self._id("round"), failed=outcome != "done")
        spans, self._spans, self._sites, self._left = self._spans, [], 0, 0
        return spans

    # --- spans --------------------------------------------------------------------------------------------------------

    def _pieced(self, state: State, entry: Entry, name: str = "") -> _Piece:
        asked = tuple(state.outstanding) if state.phase is Phase.COLLECTING else ()
        if state.phase is Phase.SUMMING and state.sum is not None:
            asked = tuple(state.sum.awaited)
        return _Piece(name or _named(state), self._id("phase", entry.number), entry.now, asked)

    def _add(
        self, name: str, parent: bytes | None, begin: float, end: float, attributes: dict[str, str | int], *,
        id: bytes | None = None, failed: bool = False,
    ) -> None:  # fmt: skip
        if id is None:  # of a site
            if self._sites >= MOST:
                self._left += 1
                return
            assert parent is not None
            self._sites += 1
            id = hashlib.sha256(self._seed + parent + name.encode()).digest()[:8]
        told: dict[str, str | int] = {"run": self._run, "round": self._round + 1, **attributes}
        if self._attempt is not None and "attempt" not in told and parent is not None:
            told["attempt"] = self._attempt.number
        named = {f"atoll.{n}": v for n, v in told.items()}
        self._spans.append(Span(name, self._id("trace", size=16), id, parent, begin, end, named, failed))

    def _id(self, kind: str, number: int = 0, *, size: int = 8) -> bytes:
        return hashlib.sha256(self._seed + f"{kind} {self._round} {number}".encode()).digest()[:size]


def traced(run: str, plan: Plan, records: Iterable[bytes]) -> Iterator[Span]:
    """The spans of every round that is over, by the records of a run's journal.

    Raises:
        RunError: the journal is of another plan or version.
    """
    tracing = Tracing(run, plan)
    for record in records:
        yield from tracing.take(entry_of(record))


def entry_of(record: bytes) -> Entry:
    """A record of a run's journal."""
    return _entries.decode(record)


def chrome(spans: Sequence[Span]) -> bytes:
    """Spans in the Trace Event Format, which Perfetto and Chrome's tracing page show: one line for rounds, one a site.

    Google, "Trace Event Format" (2016): complete events ("X"), times in microseconds.
    """
    lines = {"": 0}
    events = list[dict[str, Any]]()
    for span in spans:
        line = lines.setdefault(str(span.attributes.get("atoll.site", "")), len(lines))
        events.append({
            "name": span.name, "cat": "failed" if span.failed else "round", "ph": "X", "pid": 1, "tid": line,
            "ts": round(span.begin * 1e6), "dur": max(0, round((span.end - span.begin) * 1e6)),
            "args": dict(span.attributes),
        })  # fmt: skip
    events += [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": line, "args": {"name": name or "rounds"}}
        for name, line in lines.items()
    ]
    return msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms"})


_entries = msgspec.json.Decoder(Entry)


def _round(state: State) -> int:
    """The round at work, from 0: what sites say of a model belongs to the round it came from."""
    return state.round - (state.kind == "evaluate")


def _attempt(state: State) -> tuple[int, bool] | None:
    """Number of the attempt at work, and whether it is an evaluation."""
    phase = state.back if state.phase is Phase.PAUSED else state.phase
    return (state.attempt, state.kind == "evaluate") if phase in AT_WORK else None


def _lost(outcome: str) -> bool:
    return outcome not in ("accepted", "answered", "not awaited", "run paused")


def _named(state: State) -> str:
    if state.phase is Phase.SUMMING and state.sum is not None:
        return f"summing {state.turn} {state.sum.step}"
    return state.phase.value
