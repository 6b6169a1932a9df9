"""A task and a report as a message and a frame. Whoever unpacks knows from its own `Process` what must be in it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import torch
from torch import Tensor

from atoll.errors import RunError
from atoll.messages import Clear, Report, Scaled, Task
from atoll.net.buffers import Buffer
from atoll.net.control import LONGEST_TEXT, Deliver, Value, Work
from atoll.net.frames import (
    ALIGNMENT,
    FrameError,
    Limits,
    Schema,
    TensorSpec,
    bytes_of,
    decode,
    encode,
    pieces,
    schema_of,
)
from atoll.rounds import Process, State
from atoll.tree import leaves, rebuild
from atoll.vectors import Change

NAMES = ("message", "buffers", "private", "shared")


def pack_task(task: Task) -> tuple[dict[str, Value], list[Buffer]]:
    """The leaves of a task that are no tensors, by path, and the frame of those that are, in pieces.

    Raises:
        RunError: a value that cannot travel as it is.
    """
    tensors, values = _split(task)
    for name, value in values.items():
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise RunError(
                f"the task's {name} has {len(value)} characters, more than the {LONGEST_TEXT} that can travel."
            )
    return _held(values, "task"), pieces(tensors)


def _held(values: dict[str, Value], what: str) -> dict[str, Value]:
    """The same values, all of which JSON can hold.

    Raises:
        RunError: one is not finite.
    """
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RunError(f"the {what}'s {name} is {value}, which is no number to go on with.")
    return values


def unpack_task(template: Task, work: Work, content: Buffer, limits: Limits | None = None) -> Task:
    """The task of a message and its frame.

    Args:
        template: any task of the same process: what it is made of.
        work: the message.
        content: the frame, in which the tensors stay where it can be written to.
        limits: of the frame.

    Raises:
        FrameError: the frame or the values are not those of such a task.
    """
    tensors, values = _split(template)
    found: dict[str, Any] = dict(decode(content, schema_of(tensors), limits, sha256=work.base, copy=False))
    if work.values.keys() != values.keys():
        odd = ", ".join(sorted(work.values.keys() ^ values.keys())[:5])
        raise FrameError("schema", f"the task's values are not those of this experiment: {odd}.")
    for name, own in values.items():
        given = work.values[name]
        if type(given) is not type(own):
            raise FrameError("schema", f"{name} is a {type(given).__name__}, expected a {type(own).__name__}.")
        found[name] = given
    try:
        tree = rebuild({n: getattr(template, n) for n in NAMES}, found)
    except RunError as error:
        raise FrameError("schema", str(error)) from error
    return replace(
        template,
        **tree,
        kind=work.kind,
        seed=work.seed,
        round=work.round,
        clients=work.clients,
        population=work.population,
    )


def pack_report(report: Report) -> bytes:
    """The frame of one client's report: what it keeps for itself stays out."""
    return encode(_sent(report))


def report_length(report: Report) -> int:
    """Bytes of that frame, which is not made."""
    return bytes_of(_sent(report))


def _sent(report: Report) -> dict[str, Tensor]:
    return codes_of(report) | {"weight": report.weight.double(), "metrics": report.metrics.double()}


def codes_of(report: Report) -> dict[str, Tensor]:
    """What the server is sent of a report's rows, by the names it has in a frame."""
    wire = report.wire.rows if isinstance(report.wire, Clear | Scaled) else report.wire
    return {"wire": wire} if isinstance(wire, Tensor) else {f"wire/{n}": t for n, t in wire.items()}


def report_schema(process: Process, task: Task) -> Schema:
    """What a single client's report on a task of this process is made of."""
    blank = process.blank(task)
    free = not process.chain.facts.fixed_size
    specs = [
        TensorSpec(n, t.dtype, (1, *((None,) * (t.ndim - 1) if free else t.shape[1:])))
        for n, t in codes_of(blank).items()
    ]
    wide = torch.float64
    return (
        *specs,
        TensorSpec("weight", wide, tuple(blank.weight.shape)),
        TensorSpec("metrics", wide, (1, 2)),
    )


def report_of(process: Process, claim: Deliver, tensors: Mapping[str, Tensor]) -> Report:
    """A report of one client from its decoded tensors."""
    wire: Tensor | dict[str, Tensor] | Clear
    if "wire" in tensors:
        rows = tensors["wire"]
        wire = clear(rows, claim.parts[0]) if process.adds_rows else rows
    else:
        wire = {n.removeprefix("wire/"): t for n, t in tensors.items() if n.startswith("wire/")}
    return Report(
        (claim.site,),
        wire,
        claim.parts,
        tensors["weight"],
        tensors["metrics"],
        torch.ones(1, dtype=torch.bool),
        torch.empty(1, 0, dtype=process.model.dtype),
        claim.bytes,
    )


def clear(rows: Tensor, width: int) -> Clear:
    """Rows [C, L] in the clear, of which the first `width` columns are averaged parameters."""
    return Clear(Change((len(rows), width), rows[:, :width]), rows[:, width:])


def _split(task: Task) -> tuple[dict[str, Tensor], dict[str, Value]]:
    every = dict(leaves({n: getattr(task, n) for n in NAMES}))
    tensors = {n: v for n, v in every.items() if isinstance(v, Tensor)}
    return tensors, {n: v for n, v in every.items() if not isinstance(v, Tensor)}


# --- the server's state between two rounds ----------------------------------------------------------------------------

PARTS = ("algorithm", "buffers", "transforms", "aggregator", "private", "downlink")


def pack_state(state: State) -> list[Buffer]:
    """A checkpoint in pieces: the values as JSON behind their length; the frame of the tensors.

    Raises:
        RunError: a value that is not finite, and would not come back as it was.
    """
    every = dict(leaves({n: getattr(state, n) for n in PARTS}))
    plain = _held({n: v for n, v in every.items() if not isinstance(v, Tensor)}, "state")
    own = {"seed": state.seed, "round": state.round, "served": state.served}
    values = msgspec.json.encode(own | {f"/{n}": v for n, v in plain.items()})
    values += b" " * (-len(values) % ALIGNMENT)
    frame = pieces({n: v for n, v in every.items() if isinstance(v, Tensor)})
    return [len(values).to_bytes(8, "little") + values, *frame]


def unpack_state(template: State, content: Buffer) -> State:
    """The state of a checkpoint of the same process; its hash was checked by whoever read it.

    Args:
        template: any state of the process.
        content: of the checkpoint; its tensors stay in it, where it can be written to.

    Raises:
        RunError: it belongs to another experiment.
    """
    length = int.from_bytes(content[:8], "little")
    every = dict(leaves({n: getattr(template, n) for n in PARTS}))
    tensors = {n: v for n, v in every.items() if isinstance(v, Tensor)}
    try:
        values: dict[str, Any] = msgspec.json.decode(content[8 : 8 + length])
        frame = memoryview(content)[8 + length :]
        found: dict[str, Any] = dict(decode(frame, schema_of(tensors), copy=False))
        found |= {n[1:]: v for n, v in values.items() if n.startswith("/")}
        tree = rebuild({n: getattr(template, n) for n in PARTS}, found)
        return replace(template, **tree, seed=values["seed"], round=values["round"], served=values["served"])
    except (FrameError, RunError, msgspec.MsgspecError, KeyError) as error:
        raise RunError(f"the checkpoint belongs to another experiment or version: {error}") from error
