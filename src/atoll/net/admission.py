"""What is looked at in an update before it may count. Pure: the same bytes always have the same finding."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch
from torch import Tensor

from atoll.errors import CompositionError, invalid
from atoll.messages import Report, Task
from atoll.net.control import Deliver
from atoll.net.frames import FrameError, Limits, Schema
from atoll.net.reading import BLOCK, Reading, in_columns
from atoll.net.storage import Content
from atoll.privacy.noise import ROUNDING
from atoll.random import client_keys
from atoll.rounds import Process
from atoll.transforms.chain import keys_of


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an update's content was found to be.

    Attributes:
        fault: "" when nothing speaks against it; "transport" when the bytes are not those that were announced;
            "content" when they are, and must not count.
        detail: the first fault, in words.
        weight: the update's weight; 0 where a channel seals it.
        norm: L2 norm of the decoded row, buffers and summed part included; 0 where a channel seals it.
    """

    fault: Literal["", "transport", "content"] = ""
    detail: str = ""
    weight: float = 0.0
    norm: float = 0.0


@dataclass(frozen=True, slots=True)
class Rules:
    """What an update may be at most.

    Attributes:
        weight_cap: largest weight, where the run's aggregator has not a smaller cap (ten million for the mean by
            examples); None: that cap.
        norm_bound: largest L2 norm of the decoded row; None: any finite one.
    """

    weight_cap: float | None = None
    norm_bound: float | None = None

    def __post_init__(self) -> None:
        for name in ("weight_cap", "norm_bound"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise invalid(name, value, "a finite number above 0, or None")

    def check(self, process: Process) -> None:
        """Refuse rules that nobody could enforce.

        Raises:
            CompositionError: a bound on what the channel seals, or on what noise is to hide.
        """
        if process.rooted and process.memory_layout(process.selection.take(process.model.init())).size:
            raise CompositionError(
                "what training on the server's own data leaves behind at the server is not kept in a deployment yet: "
                f"use a method and stages without client memory before the aggregator {process.aggregator.name}."
            )
        process.check_server()
        if process.chain.noise is not None and (self.norm_bound is not None or self.weight_cap is not None):
            raise CompositionError(
                "norm_bound and weight_cap cannot stand under noise: which site they leave out depends on the data, "
                "and everybody would see it. Leave them out: the clip norm bounds every update, and weights are 1 or "
                "clipped."
            )
        channel = process.chain.channel
        if channel.sums_only and (self.norm_bound is not None or self.weight_cap is not None):
            raise CompositionError(
                f"the channel {channel.name} hides each update from the server, which can bound neither its norm nor "
                'its weight: leave out norm_bound and weight_cap, or use channel="plain".'
            )


def examine(
    process: Process,
    task: Task,
    claim: Deliver,
    content: Content,
    schema: Schema,
    rules: Rules,
    limits: Limits | None = None,
    *,
    block: int = BLOCK,
) -> Finding:
    """What an update's content is.

    Args:
        process: what combines updates.
        task: what it answers.
        claim: its message.
        content: its frame.
        schema: from `packing.report_schema`.
        rules: bounds.
        limits: of the frame.
        block: coordinates that are looked at together, where each counts for itself.

    Raises:
        OSError: it cannot be read.
    """
    if claim.parts != process.parts:
        return Finding("content", f"the update's parts are {claim.parts}, expected {process.parts}.")
    if claim.size != content.size:
        return Finding("transport", f"{claim.size} bytes were announced, {content.size} came.")
    if content.size > (limits or Limits()).bytes:
        return Finding("content", f"it has {content.size} bytes, more than the limit of {(limits or Limits()).bytes}.")
    reading = Reading(content, claim, schema, limits or Limits())
    found = _found(process, task, reading, rules, block)
    if not reading.genuine():  # bytes that somebody else may have put there are not the sender's fault
        return Finding("transport", "the content is not what was announced: its SHA-256 differs.")
    return found


def _found(process: Process, task: Task, reading: Reading, rules: Rules, block: int) -> Finding:
    try:
        reading.locate()
    except FrameError as error:
        return Finding("content", str(error))
    weights, claim = reading.small["weight"], reading.claim
    loss, examples = reading.small["metrics"][0].tolist()
    if not math.isfinite(loss) or not 0 <= examples < math.inf:
        return Finding("content", "its loss or number of examples is not finite, or negative.")
    weight = 0.0
    if weights.numel():
        weight = float(weights)
        if not 0 <= weight < math.inf:
            return Finding("content", "its weight is not finite, or negative.")
        cap = min(process.aggregator.cap, math.inf if rules.weight_cap is None else rules.weight_cap)
        if weight > cap:
            return Finding("content", f"its weight {weight:g} is above the cap of {cap:g}.")
    if claim.bytes > claim.size:
        return Finding("content", "it claims more bytes than it has.")
    norm = added = 0.0
    try:
        if in_columns(process):
            for a in range(0, max(1, process.length), block):
                part = reading.columns(process, a, min(a + block, process.length))
                fault, more, counted = _judged(process, task, part)
                if fault:
                    return Finding("content", fault)
                norm, added = math.hypot(norm, more), math.hypot(added, counted)
        else:
            fault, norm, added = _judged(process, task, reading.report(process))
            if fault:
                return Finding("content", fault)
    except OSError:
        raise
    except FrameError as error:
        return Finding("content", str(error))
    except Exception as error:  # hostile codes may break a decoder in any way, and must break nothing else
        return Finding("content", f"it cannot be decoded ({type(error).__name__}).")
    if not math.isfinite(norm):
        return Finding("content", "its norm is not finite.")
    if rules.norm_bound is not None and norm > rules.norm_bound:
        return Finding("content", f"its norm {norm:g} is above the bound of {rules.norm_bound:g}.")
    if process.chain.noise is not None:
        bound = process.chain.facts.bound
        assert bound is not None
        # An honest row may be longer by what rounding adds, which the noise hides: the other half is the sum's.
        if not math.isfinite(added):
            return Finding("content", "it is not finite.")
        if added > bound * (1 + ROUNDING / 2):
            return Finding("content", f"it would add {added:.7g} to the sum, more than the clip norm of {bound:g}.")
    return Finding("", "", weight, norm)


def _judged(process: Process, task: Task, report: Report) -> tuple[str, float, float]:
    """What speaks against a report, or against a block of its columns; its norm, and that of what it adds to a sum
    where noise comes in.
    """
    if isinstance(report.wire, Mapping):
        for name, code in report.wire.items():
            if code.is_floating_point() and not bool(torch.isfinite(code).all()):
                return f"{name} is not finite.", 0.0, 0.0
    partial = process.combine(task, report)
    for told in partial.refused.values():
        return f"{told['reason']}.", 0.0, 0.0
    if partial.broken:
        return "it is not finite.", 0.0, 0.0
    if partial.rows is not None:
        return "", _norm(partial.rows[0]), 0.0
    row = partial.total
    if row is None:
        return "", 0.0, 0.0
    added, split = _norm(row), report.parts[0] + report.parts[1]
    if not in_columns(process):

        def measured(total: Tensor) -> Tensor:
            nonlocal added
            added = _norm(total)
            return total

        keys = keys_of(task.seed, task.round, client_keys(()), split)
        row = process.chain.decode_sum(row, task.shared, process.length, keys, release=measured)
    counted = float(partial.weight) or 1.0  # what the row was multiplied by, which need not be what the client claims
    return "", math.hypot(_norm(row[:split]) / counted, _norm(row[split:])), added


def _norm(row: Tensor) -> float:
    """The L2 norm of a row; not finite when a number in it is not."""
    return float(torch.linalg.vector_norm(row, dtype=torch.float64)) if row.numel() else 0.0
