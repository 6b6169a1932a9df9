"""What heads that are solved, not trained, have in common: clients send sums once, the server solves.

A client's statistics are sums over its examples, in double precision, and the sum over clients is that over all their
examples: however these are spread, the solution is the one of the pooled data. A client counts once: asked again, it
sends noughts. So several rounds of partial cohorts end at the same solution as one round of everybody, as soon as
everybody was asked; before, it is the solution for those who were.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.cohort import Cohort
from atoll.errors import DataError, InvalidArgument, invalid
from atoll.model import Model
from atoll.spec import Spec
from atoll.vectors import Aggregate, Change, Layout, Trained, Update

TRIAL = 4
"""Examples on which the head is tried."""


class State(NamedTuple):
    """Server memory."""

    vector: Tensor  # [D] model
    sums: Tensor  # [S] sums over the examples of all clients that were asked, float64


class Head(NamedTuple):
    """The layer that is solved for; without a name it is the whole model."""

    name: str
    width: int  # inputs d
    outputs: int  # K
    bias: bool

    def parameter(self, name: str) -> str:
        """Its weight's or bias's name in the model; the layer may be the model itself."""
        return f"{self.name}.{name}" if self.name else name

    @property
    def told(self) -> str:
        """What messages call it."""
        return repr(self.name) if self.name else "the model itself"


Statistics = Callable[[Tensor, Tensor], Tensor]
"""(inputs of the head [n, d] float64, targets [n, ...]) -> sums [S] float64."""

Solve = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Sums [S] -> weight [K, d] and bias [K] of the head, float64."""


class Method(NamedTuple):
    """A closed form for one head.

    Attributes:
        length: S.
        statistics: of one client.
        solve: the server's solution.
        targets: (targets, outputs) -> None; refuses targets it is not made for.
    """

    length: int
    statistics: Statistics
    solve: Solve
    targets: Callable[[Tensor, int], None]


def closed_form(spec: Spec, head: str | None, method: Callable[[Head], Method]) -> Algorithm:
    """An algorithm that solves for a linear head.

    Args:
        spec: name and arguments.
        head: name of the linear layer that gives the model's output; None: the only trained linear layer.
        method: the closed form for a head.
    """
    if head is not None and not (isinstance(head, str) and head):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise invalid("head", head, "the name of a linear layer, or None for the only trained one")

    def unbound(*_: Any) -> Any:
        raise InvalidArgument(f"{spec['name']} solves for a layer of a model: give it to atoll.process or simulate.")

    return Algorithm(
        spec,
        init=unbound,
        broadcast=unbound,
        local=unbound,
        step=unbound,
        additive=True,
        statistics=True,
        bind=lambda model: _bound(spec, model.layout, find_head(model, head, str(spec["name"])), method),
    )


def find_head(model: Model, name: str | None, method: str) -> Head:
    """The linear layer that is solved for.

    Raises:
        InvalidArgument: there is no such layer, or several could be meant.
    """
    known: dict[str, Head] = {}
    for at, layer in model.modules():
        if isinstance(layer, nn.Linear):
            biased = isinstance(getattr(layer, "bias", None), Tensor)
            one = Head(at, layer.in_features, layer.out_features, biased)
            if one.parameter("weight") in model.layout.names:
                known[at] = one
    told = ", ".join(known) or "none"
    if name is None and len(known) != 1:
        raise InvalidArgument(
            f"{method} solves for one linear layer, but the model trains {len(known)} ({told}): name it by head=, or "
            "freeze what stands before it (atoll.freeze)."
        )
    if name is not None and name not in known:
        raise invalid("head", name, f"the name of a linear layer that is trained: {told}")
    found = known[next(iter(known)) if name is None else name]
    if found.bias and found.parameter("bias") not in model.layout.names:
        raise InvalidArgument(
            f"{method} solves for the bias of {found.told} too, but it is frozen: train it, or drop it."
        )
    return found


def _bound(spec: Spec, layout: Layout, head: Head, method: Callable[[Head], Method]) -> Algorithm:
    form = method(head)

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start, count = cohort.rows(message.vector), len(cohort.clients)
        sums = start.new_zeros(count, form.length, dtype=torch.float64)
        fresh = memory["counted"][:, 0] == 0
        if bool(fresh.any()):
            for i, (x, y) in enumerate(zip(cohort.inputs(start, head.name), cohort.targets(), strict=True)):
                if bool(fresh[i]):
                    sums[i] = form.statistics(x.double(), y)
        nought = torch.zeros(count, 1, dtype=torch.float64)
        update = Update(
            nothing(start),
            cohort.layout,
            sums,
            cohort.weights,
            torch.cat((nought, nought), dim=1),
            Trained(start, cohort.buffers, start.new_zeros(count, 1), start.new_zeros(count, 1), nought, nought),
        )
        return update, {"counted": torch.ones_like(memory["counted"])}

    def step(state: State, aggregate: Aggregate) -> State:
        total = state.sums + aggregate.sums
        weight, bias = form.solve(total)
        vector = state.vector.clone()
        views = layout.view(vector)
        views[head.parameter("weight")].copy_(weight)
        if head.bias:
            views[head.parameter("bias")].copy_(bias)
        return State(vector, total)

    def accepts(model: Model, data: Any) -> None:
        batch = {n: t[:TRIAL] for n, t in data.train.fields.items()}
        views, held = model.layout.view(model.init()), model.buffer_layout.view(model.init_buffers())
        inputs = model.inputs(head.name, views, held, batch)
        if inputs.shape != (len(batch["y"]), head.width):
            raise InvalidArgument(
                f"{spec['name']} needs one vector for every example, but {head.told} reads {tuple(inputs.shape)}."
            )
        with torch.no_grad():
            output = model.call(views, held, batch, train=False)
        own = views[head.parameter("bias")] if head.bias else None
        found = nn.functional.linear(inputs, views[head.parameter("weight")], own)
        if output.shape != found.shape or not torch.allclose(output, found, rtol=1e-4, atol=1e-5):
            raise InvalidArgument(
                f"{spec['name']} solves for {head.told}, but the model's output is not what that layer gives: name "
                "the last layer by head=, and leave activations behind it to the loss."
            )
        form.targets(data.train.fields["y"], head.outputs)

    return Algorithm(
        spec,
        init=lambda vector: State(vector, torch.zeros(form.length, dtype=torch.float64, device=vector.device)),
        broadcast=lambda state: Message(state.vector),
        local=local,
        step=step,
        client_init=lambda vector, buffers: {"counted": vector.new_zeros(1)},
        sums=lambda size: form.length,
        additive=True,
        statistics=True,
        accepts=accepts,
    )


def nothing(start: Tensor) -> Change:
    """No change of rows [C, D], which are not written out to be added up."""
    shape = (start.shape[0], start.shape[1])
    return Change(shape, lambda: torch.zeros_like(start), lambda weight, last: weight.new_zeros(shape[1]))


def check_classes(targets: Tensor, outputs: int) -> None:
    """Refuse what are not labels of the head's classes."""
    if targets.is_floating_point() or targets.ndim != 1:
        raise DataError(f"class labels [n] are needed, but y is {targets.dtype} of shape {tuple(targets.shape)}.")
    if outputs < 2:
        raise DataError("a head for classes needs an output for each of them, at least 2.")
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < outputs:
        raise DataError(
            f"labels are from {int(targets.min())} to {int(targets.max())}, the head has {outputs} outputs."
        )
