"""What a site's owner allows: which code may run on the site's data, and what may leave.

An experiment is its app file and its settings, both by content: `experiment_hash`. It runs when its owner has approved
this very hash, and not before. Files in the site's folder:

    approvals.json     hash -> what was decided, and when
    waiting/HASH.json  what waits for a decision; the code is beside it, in code/SHA256.py

What left, by names, shapes, bytes and norms, is in the journal `left` of the site's state.
"""

import fcntl
import hashlib
import io
import math
import time
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
import torch

from atoll.errors import InvalidArgument, RunError, invalid
from atoll.net.buffers import Buffer
from atoll.net.calls import Charter
from atoll.net.control import Hash, Line, Step
from atoll.net.evaluating import LARGEST, fault_of
from atoll.net.frames import FrameError, Limits, declared, decode
from atoll.net.storage import Journal, write_file

Verdict = Literal["waiting", "approved", "denied"]


def experiment_hash(charter: Charter) -> str:
    """SHA-256 of what is approved: the app file's hash and the settings."""
    said = msgspec.json.encode({"code": charter.code, "settings": dict(sorted(charter.settings.items()))})
    return hashlib.sha256(said).hexdigest()


def source(content: bytes) -> str:
    """An app file as its owner reads it, which is as Python does.

    Raises:
        InvalidArgument: Python would read it otherwise: it is no UTF-8, or names another encoding, by which a comment
            can hold code.
    """
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        text = content.decode(encoding if encoding == "utf-8-sig" else "utf-8")
    except (SyntaxError, UnicodeDecodeError) as error:
        raise InvalidArgument("the code is no UTF-8: nobody could read what would run.") from error
    if encoding not in ("utf-8", "utf-8-sig"):
        raise InvalidArgument(f"the code names the encoding {encoding!r}: what is read is not what would run.")
    return text


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an owner decided.

    Attributes:
        verdict: whether the experiment may run.
        at: seconds since 1970.
        charter: what was shown.
    """

    verdict: Literal["approved", "denied"]
    at: float
    charter: Charter


class Approvals:
    """Decisions of a site's owner, in its folder.

    Args:
        folder: of the site.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def decisions(self) -> dict[str, Decision]:
        """All of them, by hash.

        Raises:
            RunError: the file is damaged: nothing is approved then.
        """
        path = self._folder / "approvals.json"
        if not path.exists():
            return {}
        try:
            return msgspec.json.decode(path.read_bytes(), type=dict[Hash, Decision])
        except msgspec.MsgspecError as error:
            raise RunError(f"{path} is damaged, and nothing is approved: restore it, or remove it.") from error

    def verdict(self, charter: Charter) -> Verdict:
        """What was decided of an experiment."""
        found = self.decisions().get(experiment_hash(charter))
        return "waiting" if found is None else found.verdict

    def ask(self, charter: Charter) -> None:
        """Put an experiment before the owner."""
        folder = self._folder / "waiting"
        folder.mkdir(exist_ok=True)
        path = folder / f"{experiment_hash(charter)}.json"
        if not path.exists():
            write_file(path, msgspec.json.encode(charter))

    def waiting(self) -> dict[str, Charter]:
        """Experiments without a decision, by hash."""
        decided = self.decisions()
        found: dict[str, Charter] = {}
        for path in sorted((self._folder / "waiting").glob("*.json")):
            if path.stem not in decided:
                found[path.stem] = msgspec.json.decode(path.read_bytes(), type=Charter)
        return found

    def known(self) -> dict[str, Charter]:
        """Every experiment that was put before the owner, by hash."""
        return {h: d.charter for h, d in self.decisions().items()} | self.waiting()

    def find(self, start: str) -> str:
        """The hash that begins so.

        Raises:
            InvalidArgument: none begins so, or more than one, or too little of it was given.
        """
        known = self.known()
        fitting = [h for h in known if h.startswith(start)]
        if len(start) < 8 or len(fitting) != 1:
            raise invalid(
                "HASH", start, "the first eight characters or more of one that `atoll review` shows",
                f"There are: {', '.join(h[:12] for h in known) or 'none'}.",
            )  # fmt: skip
        return fitting[0]

    def settle(self, charter: Charter, verdict: Literal["approved", "denied"]) -> None:
        """Write a decision down, beside whatever another program decides at the same time."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / "approvals.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            decided = self.decisions() | {experiment_hash(charter): Decision(verdict, time.time(), charter)}
            write_file(self._folder / "approvals.json", msgspec.json.encode(decided))


# --- what leaves ------------------------------------------------------------------------------------------------------


What = Literal["update", "evaluation", "survey", "spread"] | Step
"""What leaves: an update, what is said of a model, an answer about the table, or one in a step of a secure sum."""


class Sent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor that left: L2 norm of its values, taken as numbers."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    norm: float


class Left(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of the site's own journal.

    Attributes:
        at: seconds since 1970.
        run: whose.
        what: which of `What`.
        round: from 1, of an evaluation the one whose model it is of; 0: before the first.
        attempt: at the round.
        bytes: that left.
        sha256: of them.
        tensors: what an update is made of; of the step "mask" what is under the mask.
    """

    at: float
    run: Line
    what: What
    round: int
    attempt: int
    bytes: int
    sha256: str
    tensors: list[Sent]


class Outgoing:
    """Writes everything down that is to leave, first.

    Args:
        journal: of the site.
    """

    def __init__(self, journal: Journal) -> None:
        self._log = journal

    def write(self, left: Left) -> None:
        """Enter what leaves; durable before it does."""
        self._log.append(msgspec.json.encode(left))


def departed(records: Iterable[bytes]) -> Iterator[Left]:
    """What left a site, by its journal's records."""
    return (msgspec.json.decode(record, type=Left) for record in records)


PIECE = 2**18
"""Numbers that are looked at together: a wide copy of all of a model would not stay in the cache."""


def inspect(frame: Buffer, largest: int) -> list[Sent]:
    """What a report is made of, when it is one: nothing but a client's codes, its weight and two sums, all finite.

    Args:
        frame: as the process that ran the author's code gave it.
        largest: bytes it may have.

    Raises:
        InvalidArgument: it is something else, and may not leave.
    """
    tensors = _opened(frame, largest)
    names = [n for n in tensors if n not in ("weight", "metrics")]
    codes = names == ["wire"] or all(n.startswith("wire/") for n in names)
    metrics, weight = tensors.get("metrics"), tensors.get("weight")
    if not names or not codes or metrics is None or weight is None:
        raise InvalidArgument("the report holds other things than codes, a weight and two sums.")
    if metrics.dtype != torch.float64 or tuple(metrics.shape) != (1, 2) or weight.numel() > 1:
        raise InvalidArgument("the report's weight and sums are not one number and two.")
    return _made_of(tensors)


def inspect_evaluation(frame: Buffer) -> list[Sent]:
    """What an answer to an evaluation is made of, when it is one: nothing but sums over held-out examples, all finite.

    Args:
        frame: as the process that ran the author's code gave it.

    Raises:
        InvalidArgument: it is something else, and may not leave.
    """
    if finding := fault_of(frame):
        raise InvalidArgument(f"what is said of the model is not sums: {finding}")
    return _made_of(_opened(frame, LARGEST))


def _opened(frame: Buffer, largest: int) -> dict[str, torch.Tensor]:
    limits = Limits(bytes=largest)
    try:
        return decode(frame, declared(frame, limits), limits, copy=False)
    except FrameError as error:
        raise InvalidArgument(f"the report is no frame: {error}") from error


def _made_of(tensors: dict[str, torch.Tensor]) -> list[Sent]:
    sent: list[Sent] = []
    for name, tensor in tensors.items():
        norm = math.hypot(*(float(torch.linalg.vector_norm(p.double())) for p in tensor.reshape(-1).split(PIECE)))
        if not math.isfinite(norm):
            raise InvalidArgument(f"{name} is not finite.")
        sent.append(Sent(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), norm))
    return sent
