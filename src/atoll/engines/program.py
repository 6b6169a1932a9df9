"""A model as a program on rows: its layers in order, each with its forward and its backward written out.

A module is traced once to the graph of the layers and operations it is made of. Each becomes one or more operations on
rows, whose values are [C, b, ...] where the module's own are [b, ...]. The backward goes through the operations in
reverse and hands every parameter's gradient to a `Sink`, which may take the local step with it on the spot; a parameter
that is used more than once is handed over when all its pieces are there. Operations whose backward is not written out
are differentiated by autograd, one by one.

A module that uses anything without a form on rows, or whose control flow depends on its input, has no program:
`Unsupported` says why, and another path runs it.
"""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from atoll.engines import forms
from atoll.engines.blocks import Part
from atoll.engines.dropout import Draw
from atoll.engines.factors import Use, most
from atoll.engines.forms import Unsupported
from atoll.engines.operations import Attribute, Linear, Operation, Run, Slot
from atoll.engines.precision import products
from atoll.engines.steps import Gradients, Sink
from atoll.model import Batch, Model


class Program:
    """The row form of a model's forward and backward.

    Attributes:
        features: number of the value that is the model's features; None: it names none, or they have no value here.
        linear: whether linear layers alone read its parameters, each once.

    Args:
        model: the model.
        train: the training forward, else the evaluating one.

    Raises:
        Unsupported: the model has no form on rows; the text says what it uses.
    """

    def __init__(self, model: Model, *, train: bool = True) -> None:
        root = model.caller(train=train)
        name = model.features_name
        tracer = _Tracer(None if name is None else root.get_submodule(f"module.{name}"))
        try:
            graph = tracer.trace(root)
        except Exception as error:
            raise Unsupported(f"it cannot be traced ({type(error).__name__})") from error
        self.count = len(model.layout.names)
        builder = _Builder(model, root)
        for node in graph.nodes:
            try:
                builder.add(node)
            except Unsupported:
                raise
            except Exception as error:  # a call of a known function in a way that its form does not know
                lines = str(error).splitlines()
                text = (
                    f"{node.target} is called in an unknown way ({type(error).__name__}: {lines[0] if lines else ''})"
                )
                raise Unsupported(text) from error
        if not isinstance(builder.output, Slot):
            raise Unsupported("it does not return a tensor")
        self._output = builder.output.number
        features = None if tracer.seen is None else builder.known(tracer.seen)
        self.features = features.number if isinstance(features, Slot) else None
        self._operations = builder.operations
        self._slots = builder.slots
        self._start = builder.start
        uses = [p for op in self._operations for p in op.parameters]
        self.repeated = frozenset(p for p in uses if uses.count(p) > 1)
        self.linear = not self.repeated and all(isinstance(op, Linear) for op in self._operations if op.parameters)
        linear = {op.weight: op for op in self._operations if isinstance(op, Linear)}
        self._weights = {p: op for p, op in linear.items() if p is not None and p not in self.repeated}
        self._needs: dict[frozenset[int] | None, list[bool]] = {}

    def forward(
        self,
        parts: Sequence[Part],
        held: Mapping[str, Tensor],
        batch: Batch,
        *,
        draw: Draw | None = None,
        trained: frozenset[int] | None = None,
        backward: bool = True,
        mixed: bool = False,
    ) -> tuple[Tensor, Run]:
        """Outputs [C, b, ...] of rows on their own batches [C, b, ...]; buffers are updated in place.

        Args:
            parts: every parameter of the layout, [C, ...]; weights of linear layers may stand as factors.
            held: buffers by name, [C, ...].
            batch: fields [C, b, ...].
            draw: keys dropout.
            trained: numbers of the parameters that get a gradient; None: all.
            backward: whether `backward` will follow; without it nothing is kept.
            mixed: whether products are in lower precision (`precision.py`); no weight may then stand as factors.
        """
        need = self._need(trained) if backward else None
        run = Run(parts, held, self._slots, len(self._operations), need, draw, mixed)
        run.values[self._start] = batch
        with torch.no_grad(), products(batch["y"].device, mixed=mixed):
            for op in self._operations:
                op.forward(run)
        return run.values[self._output], run

    def backward(self, run: Run, slope: Tensor, sink: Sink, features: Tensor | None = None) -> None:
        """Hand the gradients of sum(slope * output), and of sum(features * features' value), to the sink."""
        need = run.need
        assert need is not None
        pending = Gradients(run.parts) if self.repeated else None
        run.sink, run.pending, run.repeated = sink, pending, self.repeated
        run.give(Slot(self._output), slope)
        if features is not None:
            assert self.features is not None
            run.give(Slot(self.features), features)
        with torch.no_grad():
            for op in reversed(self._operations):
                if need[op.out]:
                    op.backward(run)
            if pending is not None:
                for number in self.repeated:
                    if (found := pending.found[number]) is not None:
                        sink.add(number, found)

    def uses(self, run: Run, examples: int) -> dict[int, Use]:
        """How examples went through the weights that nothing but one linear layer reads, where that can be told."""
        found: dict[int, Use] = {}
        for number, op in self._weights.items():
            count = run.saved[op.number].shape[1]
            if examples > 1 and count % examples == 0:  # of a single example nothing can be told
                rows, columns = run.parts[number].shape[1:]
                found[number] = Use(count // examples, most(rows, columns, below=run.needs(Slot(op.sources[0]))))
        return found

    def _need(self, trained: frozenset[int] | None) -> list[bool]:
        """Which slots lead to a trained parameter."""
        if trained not in self._needs:
            need = [False] * self._slots
            for op in self._operations:
                own = any(trained is None or p in trained for p in op.parameters)
                if own or any(need[s] for s in op.sources):
                    for slot in op.outs:
                        need[slot] = True
            self._needs[trained] = need
        return self._needs[trained]


class _Tracer(fx.Tracer):
    """A tracer that follows buffers too: what is computed from one is computed anew in every forward."""

    proxy_buffer_attributes = True

    def __init__(self, watched: nn.Module | None = None) -> None:
        super().__init__()
        self._watched = watched
        self.seen: fx.Node | None = None  # what the watched module gave when it was last called

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As of every tracer; remembers what the watched module gives."""
        given = super().call_module(m, forward, args, kwargs)
        if m is self._watched:
            self.seen = given.node if isinstance(given, fx.Proxy) else None
        return given


class _Builder:
    """Turns a traced graph into operations."""

    def __init__(self, model: Model, root: nn.Module) -> None:
        self._root = root
        self._modules = dict(root.named_modules())
        # A tied parameter has several names, and its values stand under the first.
        tensors = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
        first: dict[int, str] = {}
        self._names = {n: first.setdefault(id(t), n).removeprefix("module.") for n, t in tensors}
        self._numbers = {n: i for i, n in enumerate(model.layout.names)}
        self._held = {*model.buffer_layout.names, *model.counters()}
        self._known: dict[fx.Node, Any] = {}
        self.operations: list[Operation] = []
        self.slots = 0
        self.start = -1
        self.output: Any = None

    def known(self, node: fx.Node) -> Any:
        """What a node of the graph became."""
        return self._known.get(node)

    def slot(self) -> Slot:
        """A new place for a value."""
        self.slots += 1
        return Slot(self.slots - 1)

    def emit(self, op: Operation) -> Any:
        """Append an operation; what it gives."""
        op.number = len(self.operations)
        self.operations.append(op)
        return op.given

    def attribute(self, name: str) -> Attribute:
        """A parameter, a buffer or a constant by the traced module's name."""
        own = self._names.get(name, name)
        if own in self._numbers:
            return Attribute(self._numbers[own])
        if own in self._held:
            return Attribute(own)
        try:
            constant = operator.attrgetter(name)(self._root)
        except AttributeError:
            constant = None
        if not isinstance(constant, Tensor):
            raise Unsupported(f"the attribute {name}")
        return Attribute(constant.detach())

    def add(self, node: fx.Node) -> None:
        """Add a node's operations."""
        args = cast("tuple[Any, ...]", self._resolve(node.args))
        kwargs = dict(cast("dict[str, Any]", self._resolve(node.kwargs)))
        if node.op == "placeholder":
            if self.start >= 0:
                raise Unsupported("it takes more than a batch")
            place = self.slot()
            self.start = place.number
            self._known[node] = place
        elif node.op == "output":
            self.output = args[0]
        elif node.op == "get_attr":
            self._known[node] = self.attribute(cast(str, node.target))
        elif node.op == "call_module":
            name = cast(str, node.target)
            module = self._modules[name]
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:  # pyright: ignore[reportPrivateUsage]
                raise Unsupported(f"the layer {type(module).__name__} with hooks")
            if getattr(module, "inplace", False):
                module = copy.copy(module)
                vars(module)["inplace"] = False
            self._known[node] = forms.layer(self, module, name, args, kwargs)
        elif node.op == "call_function":
            self._known[node] = forms.function(self, cast("Callable[..., Any]", node.target), args, kwargs)
        else:
            self._known[node] = forms.method(self, cast(str, node.target), args, kwargs)

    def _resolve(self, value: Any) -> Any:
        return fx.map_arg(value, lambda node: self._known[node])
