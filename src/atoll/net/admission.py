"""What is looked at in an update before it may count. Pure: the same bytes always have the same finding."""

import math
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch
from torch import Tensor

from atoll.errors import CompositionError, invalid
from atoll.messages import Task
from atoll.net.control import Deliver
from atoll.net.frames import FrameError, Limits, Schema
from atoll.net.packing import unpack_report
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
            CompositionError: a bound on what the channel seals.
        """
        if process.rooted and process.memory_layout(process.selection.take(process.model.init())).size:
            raise CompositionError(
                "what training on the server's own data leaves behind at the server is not kept in a deployment yet: "
                f"use a method and stages without client memory before the aggregator {process.aggregator.name}."
            )
        process.check_server()
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
    content: bytes,
    schema: Schema,
    rules: Rules,
    limits: Limits | None = None,
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
    """
    try:
        report = unpack_report(process, schema, claim, content, limits)
    except FrameError as error:
        announced = len(content) == claim.size and error.reason != "hash"
        return Finding("content" if announced else "transport", str(error))
    loss, examples = report.metrics[0].tolist()
    if not math.isfinite(loss) or not 0 <= examples < math.inf:
        return Finding("content", "its loss or number of examples is not finite, or negative.")
    weight = 0.0
    if report.weight.numel():
        weight = float(report.weight)
        if not 0 <= weight < math.inf:
            return Finding("content", "its weight is not finite, or negative.")
        cap = min(process.aggregator.cap, math.inf if rules.weight_cap is None else rules.weight_cap)
        if weight > cap:
            return Finding("content", f"its weight {weight:g} is above the cap of {cap:g}.")
    if isinstance(report.wire, dict):
        for name, code in report.wire.items():
            if code.is_floating_point() and not bool(torch.isfinite(code).all()):
                return Finding("content", f"{name} is not finite.")
    if claim.bytes > claim.size:
        return Finding("content", "it claims more bytes than it has.")
    try:
        partial = process.combine(task, report)
        row = partial.total
        if row is not None:
            keys = keys_of(task.seed, task.round, client_keys(()), process.split)
            row = process.chain.decode_sum(row, task.shared, process.length, keys)
    except Exception as error:  # hostile codes may break a decoder in any way, and must break nothing else
        return Finding("content", f"it cannot be decoded ({type(error).__name__}).")
    for told in partial.refused.values():
        return Finding("content", f"{told['reason']}.")
    if partial.broken:
        return Finding("content", "it is not finite.")
    norm = 0.0
    if partial.rows is not None:
        norm = _norm(partial.rows[0])
    elif row is not None:
        split = process.split
        counted = float(partial.weight)  # what the row was multiplied by, which need not be what the client claims
        norm = math.hypot(_norm(row[:split]) / (counted or 1.0), _norm(row[split:]))
    if not math.isfinite(norm):
        return Finding("content", "its norm is not finite.")
    if rules.norm_bound is not None and norm > rules.norm_bound:
        return Finding("content", f"its norm {norm:g} is above the bound of {rules.norm_bound:g}.")
    return Finding("", "", weight, norm)


def _norm(row: Tensor) -> float:
    """The L2 norm of a row; not finite when a number in it is not."""
    return float(torch.linalg.vector_norm(row, dtype=torch.float64)) if row.numel() else 0.0
