"""How the gradients of a group of rows are found: three forms of one function.

`written` goes through a program (`program.py`), `batched` through torch's general batching transform, `single` runs one
client through the module itself. All hand the gradients to a sink and give the mean losses.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from atoll.cohort import Term
from atoll.engines.blocks import Part
from atoll.engines.dropout import Draw, KeyedDropout, SeededDraws
from atoll.engines.objective import means, slopes
from atoll.engines.precision import products, widened
from atoll.engines.program import Program
from atoll.engines.steps import Sink
from atoll.model import Batch, Model

Named = Mapping[str, Tensor]


def written(
    model: Model,
    program: Program,
    parts: Sequence[Part],
    held: Named,
    batch: Batch,
    draw: Draw | None,
    sink: Sink,
    trained: frozenset[int] | None,
    term: Term | None = None,
    *,
    mixed: bool = False,
) -> Tensor:
    """Mean losses [C] of rows on their batches; gradients go to the sink. A term's `given` are [C, b, ...] each."""
    output, run = program.forward(parts, held, batch, draw=draw, trained=trained, mixed=mixed)
    found, slope = slopes(model.loss, widened(output, mixed=mixed), batch["y"])
    more = None
    if term is not None:
        assert program.features is not None
        with torch.enable_grad():
            features = widened(cast(Tensor, run.values[program.features]), mixed=mixed).detach().requires_grad_()
            given = (cast(Tensor, t).flatten(0, 1) for t in term.given)
            total = term.loss(features.flatten(0, 1), *given).sum() / features.shape[1]
            (more,) = torch.autograd.grad(total, features)
    program.backward(run, slope, sink, more)
    return found


def with_term(
    model: Model,
    parts: Sequence[Tensor],
    held: Named,
    batch: Batch,
    draw: Draw | None,
    sink: Sink,
    term: Term,
    *,
    seeded: bool,
    mixed: bool = False,
) -> Tensor:
    """The same through autograd, row by row: for models whose features no program knows."""
    numbers = [i for i in range(len(parts)) if sink.wants(i)]
    losses, found = list[Tensor](), list[tuple[Tensor, ...]]()
    for i in range(len(batch["y"])):
        row, own, inputs = slice(i, i + 1), {n: t[i] for n, t in held.items()}, {n: t[i] for n, t in batch.items()}
        one = draw and Draw(draw.seed, draw.purpose, draw.round, draw.clients[row], draw.steps[row])
        leaves = [t[i].detach().requires_grad_(sink.wants(k)) for k, t in enumerate(parts)]
        with torch.enable_grad(), _keyed(one, seeded=seeded):
            with products(leaves[0].device, mixed=mixed):
                output, features = model.call_with_features(named(model, leaves), own, inputs, train=True)
            loss = model.loss.mean(widened(output, mixed=mixed), inputs["y"])
            whole = loss + term.loss(widened(features, mixed=mixed), *(t[i] for t in term.given)).mean()
            losses.append(loss.detach())
            if numbers and whole.requires_grad:
                found.append(torch.autograd.grad(whole, [leaves[k] for k in numbers], materialize_grads=True))
    if found:
        for number, gradients in zip(numbers, zip(*found, strict=True), strict=True):
            sink.add(number, torch.stack(gradients))
    return torch.stack(losses)


def by_autograd(
    model: Model,
    parts: Sequence[Tensor],
    held: Named,
    batch: Batch,
    draw: Draw | None,
    sink: Sink,
    *,
    batched: bool,
    seeded: bool,
    mixed: bool = False,
) -> Tensor:
    """The same through autograd: `batched` over rows, or for a single row."""
    with torch.enable_grad():
        leaves = {n: t.detach().requires_grad_(sink.wants(i)) for i, (n, t) in enumerate(named(model, parts).items())}
        with products(batch["y"].device, mixed=mixed):
            output = forward(model, leaves, held, batch, draw, batched=batched, seeded=seeded)
        found = means(model.loss, widened(output, mixed=mixed), batch["y"])
        wanted = [t for t in leaves.values() if t.requires_grad]
        if not wanted or not found.requires_grad:
            return found.detach()
        gradients = iter(cast("tuple[Tensor | None, ...]", torch.autograd.grad(found.sum(), wanted, allow_unused=True)))
    for number, leaf in enumerate(leaves.values()):
        if leaf.requires_grad and (gradient := next(gradients)) is not None:
            sink.add(number, gradient)
    return found.detach()


def curvature(
    model: Model, parts: Sequence[Tensor], held: Named, batch: Batch, draw: Draw, along: Tensor, *, seeded: bool
) -> Tensor:
    """The Hessian of one row's mean loss times `along` [1, P], through the module itself: [1, P]."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second backward
        leaves = {n: t.detach().requires_grad_() for n, t in named(model, parts).items()}
        found = means(model.loss, forward(model, leaves, held, batch, draw, batched=False, seeded=seeded), batch["y"])
        slopes_at = torch.autograd.grad(found.sum(), list(leaves.values()), create_graph=True, materialize_grads=True)
        ways = model.layout.view(along.detach()).values()
        product = torch.stack([(s * w).sum() for s, w in zip(slopes_at, ways, strict=True)]).sum()
        if not product.requires_grad:  # a loss that is linear has no curvature
            return torch.zeros_like(along)
        curved = torch.autograd.grad(product, list(leaves.values()), materialize_grads=True)
    return torch.cat([c.reshape(1, -1) for c in curved], dim=1)


def forward(
    model: Model, leaves: Named, held: Named, batch: Batch, draw: Draw | None, *, batched: bool, seeded: bool
) -> Tensor:
    """Training outputs [C, b, ...] of rows; buffers are updated in place. `seeded` keys torch's own generator too."""
    if batched:
        return _batched(model, leaves, held, batch, draw)
    parameters = {n: t[0] for n, t in leaves.items()}
    own, inputs = {n: t[0] for n, t in held.items()}, {n: t[0] for n, t in batch.items()}
    with _keyed(draw, seeded=seeded):
        return model.call(parameters, own, inputs, train=True)[None]


def _keyed(draw: Draw | None, *, seeded: bool) -> ExitStack:
    """What makes the random numbers that one row's forward draws those of its client and step."""
    keyed = ExitStack()
    if draw is not None:
        keyed.enter_context(KeyedDropout(draw))
        if seeded:
            keyed.enter_context(
                SeededDraws(draw.seed, draw.purpose, draw.round, int(draw.clients[0]), int(draw.steps[0]))
            )
    return keyed


def named(model: Model, parts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Parameters by name."""
    return dict(zip(model.layout.names, parts, strict=True))


def _batched(model: Model, leaves: Named, held: Named, batch: Batch, draw: Draw | None) -> Tensor:
    mode = None if draw is None else KeyedDropout(draw)

    def one(p: Named, b: Named, x: Batch, row: Tensor) -> Tensor:
        if mode is not None:
            mode.row = row
        with mode or nullcontext():
            return model.call(p, b, x, train=True)

    # The batching rules flatten statistics before they update them, and would update a copy of anything that is not
    # contiguous: they get contiguous copies, which are copied back.
    copies = {n: t.clone(memory_format=torch.contiguous_format) for n, t in held.items()}
    number = torch.arange(len(next(iter(leaves.values()))))
    output = torch.vmap(one, randomness="error")(dict(leaves), copies, dict(batch), number)
    for name, tensor in held.items():
        tensor.copy_(copies[name])
    return output
