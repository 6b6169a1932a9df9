"""What sites say of a model: sums over their own held-out examples, and what follows from them.

A site answers an evaluation with the sums that a simulation makes of each client (`atoll.evaluation`), of the global
model and, where clients have models of their own, of the one it would use. No example and no output is sent; of a few
examples sums may tell as much (docs/deployment.md).

    outputs                                 int64 [1]: outputs of the model, by which metrics are sized
    validation, test                        float64 [1, 2 + ...]: loss, examples, and each metric's sums
    personal/validation, personal/test      the same of the site's own model; without examples two noughts
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from atoll.errors import NonFiniteError, RunError
from atoll.evaluation import Evaluation, summarise
from atoll.memory import ClientMemory
from atoll.messages import Task
from atoll.net.admission import Finding
from atoll.net.buffers import Buffer
from atoll.net.control import Deliver, content_hash
from atoll.net.frames import FrameError, Limits, Schema, TensorSpec, decode, encode
from atoll.net.spool import Spool
from atoll.rounds import Process

if TYPE_CHECKING:
    from atoll.data import FederatedDataset

SPLITS = ("validation", "test")
PERSONAL = "personal/"
NOTHING = (0, 0, 0)
"""Parts of an answer, in which there is no row."""

LARGEST = 2**20
"""Bytes of an answer."""

MOST_OUTPUTS = 2**20
MOST_EXAMPLES = 2.0**53


def why_not(process: Process) -> str:
    """Why sites are never asked what a model is worth; "": they may be."""
    if process.chain.protects_clients or process.chain.client_noise is not None or process.protects_examples:
        return "what sites would say of a model is not protected by the run's noise"
    if process.chain.channel.sums_only:
        return f"the channel {process.chain.channel.name} shows the server sums alone"
    return ""


def answer(
    process: Process, task: Task, data: "FederatedDataset", memory: ClientMemory, splits: Sequence[str] = SPLITS
) -> bytes:
    """The frame in which a site says what a model is worth on its own examples.

    Args:
        process: the very one of the server.
        task: from `Process.open_global`.
        data: the site's, with the site as its only client.
        memory: of the site.
        splits: of which something is said.

    Raises:
        RunError: the metrics have more sums than an answer can.
        NonFiniteError: a sum is not finite.
    """
    process.engine.prepare(process, data)
    (site,) = data.clients
    chosen = np.array([task.clients.index(site)])
    found = {"outputs": torch.ones(1, dtype=torch.int64)}
    with process.engine.threads():
        for split in SPLITS:
            part = getattr(data, split)
            found[split] = found[PERSONAL + split] = torch.zeros(1, 2, dtype=torch.float64)
            if split not in splits or part is None or not len(part):
                continue
            found["outputs"][0] = _outputs(process, task, {n: t[:1] for n, t in part.fields.items()})
            found[split], _ = process.survey(task, part)
            if process.personalised:
                _, found[PERSONAL + split], _ = process.engine.looked(process, task, data, memory, split, chosen)
    for split, sums in found.items():
        if split != "outputs" and not bool(torch.isfinite(sums).all()):
            raise NonFiniteError(f"round {task.round}: the model's loss or outputs on {split} examples are not finite.")
    frame = encode(found)
    if len(frame) > LARGEST:
        raise RunError(
            f"the sums of the model's metrics have {len(frame)} bytes, more than the {LARGEST} of an answer: take "
            "metrics that do not grow with the classes, or of fewer bins, or evaluate_every=0."
        )
    return frame


def _outputs(process: Process, task: Task, batch: Mapping[str, Tensor]) -> int:
    model, vector = process.model, process.whole(task.message.vector, task.private)
    views, held = model.layout.view(vector), model.buffer_layout.view(task.buffers)
    with torch.no_grad():
        output = model.call(views, held, batch, train=False)
    return output.shape[1] if output.ndim > 1 else 1


def schema() -> Schema:
    """What an answer is made of."""
    wide = torch.float64
    names = [*SPLITS, *(PERSONAL + s for s in SPLITS)]
    return (TensorSpec("outputs", torch.int64, (1,)), *(TensorSpec(n, wide, (1, None)) for n in names))


def examine(claim: Deliver, content: Buffer, most: float | None = None) -> Finding:
    """What an answer is: one whose numbers are finite, and whose examples can be counted.

    Args:
        claim: its message.
        content: its frame.
        most: examples of a split that count; None: any number.
    """
    if claim.size != len(content) or content_hash(content) != claim.sha256:
        return Finding("transport", "the content is not what was announced.")
    if claim.parts != NOTHING:
        return Finding("content", "it says that it has a row, and it is what a site says of a model.")
    if fault := fault_of(content, MOST_EXAMPLES if most is None else most):
        return Finding("content", fault)
    return Finding()


def fault_of(content: Buffer, most: float = MOST_EXAMPLES) -> str:
    """What speaks against the frame of an answer, about so many examples at most; "": it is one."""
    try:
        found = decode(content, schema(), Limits(bytes=LARGEST), copy=False)
    except FrameError as error:
        return str(error)
    outputs = int(found.pop("outputs")[0])
    if not 1 <= outputs <= MOST_OUTPUTS:
        return f"a model of {outputs} outputs is not evaluated."
    for name, sums in found.items():
        if sums.shape[1] < 2 or not bool(torch.isfinite(sums).all()):
            return f"{name}: what it says of the model is not finite, or is not there."
        examples = float(sums[0, 1])
        if not 0 <= examples <= most or examples != int(examples):
            return f"{name}: {examples:g} is no number of examples up to {most:g}."
    return ""


class Said(NamedTuple):
    """What sites said of a model.

    Attributes:
        splits: an evaluation of the global model by split, and of the sites' own by "personal/" and split, of those
            that have examples somewhere.
        notes: what a reader should know.
    """

    splits: dict[str, Evaluation]
    notes: tuple[str, ...]


def added(process: Process, spool: Spool, claims: Sequence[Deliver], *, personal: bool) -> Said:
    """What follows from the answers of some sites, in this order.

    Whose sums are not those of the model's metrics is left out, and named.

    Args:
        process: of the run.
        spool: where the answers are.
        claims: their messages.
        personal: whether sites could make their own models of what they were sent.

    Raises:
        OSError: an answer cannot be read.
        RunError: one is gone from the disk, or damaged.
    """
    answers: dict[str, dict[str, Tensor]] = {}
    for claim in claims:
        answers[claim.site] = decode(spool.whole(claim), schema(), Limits(bytes=LARGEST))
    # Most sites know how many outputs the model has.
    told = Counter(int(a["outputs"][0]) for a in answers.values() if _examples(a))
    if not told:
        return Said({}, ())
    outputs = min(told, key=lambda n: (-told[n], n))
    metrics: tuple[Any, ...] = process.model.metrics(torch.empty(1, outputs))
    width = 2 + sum(m.size for m in metrics)
    splits, odd = dict[str, Evaluation](), set[str]()
    for name in (*SPLITS, *(PERSONAL + s for s in SPLITS if personal)):
        rows: dict[str, Tensor] = {}
        for site, answered in answers.items():
            sums = answered[name]
            if not float(sums[0, 1]):
                continue
            if sums.shape[1] != width:
                odd.add(site)
                continue
            rows[site] = sums
        if rows:
            splits[name] = summarise(metrics, torch.cat(list(rows.values())), tuple(rows))
    notes = [note for found in splits.values() for note in found.notes]
    if odd:
        notes.append(
            f"What {', '.join(sorted(odd)[:5])} said of the model is left out: its sums are not those of its metrics."
        )
    return Said(splits, tuple(dict.fromkeys(notes)))


def _examples(answered: Mapping[str, Tensor]) -> bool:
    return any(float(sums[0, 1]) > 0 for name, sums in answered.items() if name != "outputs")
