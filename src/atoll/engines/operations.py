"""The operations programs are made of: each has a forward on rows and a backward written out, or leaves it to autograd.

Values are [C, b, ...]. `Run` is one pass: values and gradients by slot, what forwards kept for backwards. A gradient
that was handed on is never changed in place: another operation may hold it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from atoll.engines.blocks import Part
from atoll.engines.dropout import Draw
from atoll.engines.factors import Factors
from atoll.engines.precision import LOW, widened
from atoll.engines.steps import Gradients, Sink

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for a value of a run."""

    number: int


@dataclass(frozen=True, slots=True, eq=False)
class Attribute:
    """A tensor of the module: a parameter's number in the layout, a buffer's name, or a constant."""

    source: int | str | Tensor


class Run:
    """One pass of a program over the rows of a group."""

    __slots__ = (
        "draw", "gradients", "held", "mixed", "need", "parts", "pending", "repeated", "rows", "saved", "sink", "values",
    )  # fmt: skip

    def __init__(
        self,
        parts: Sequence[Part],
        held: Mapping[str, Tensor],
        slots: int,
        operations: int,
        need: list[bool] | None,
        draw: Draw | None,
        mixed: bool = False,
    ) -> None:
        self.parts, self.held, self.need, self.draw, self.mixed = parts, held, need, draw, mixed
        self.rows = len(parts[0])
        self.values: list[Any] = [None] * slots
        self.gradients: list[Tensor | None] = [None] * slots
        self.saved: list[Any] = [None] * operations
        self.sink: Sink
        self.pending: Gradients | None = None
        self.repeated: frozenset[int] = frozenset()

    def tensor(self, attribute: Attribute) -> Tensor:
        """A parameter or buffer [C, ...]; a constant as it is."""
        source = attribute.source
        if isinstance(source, int):
            return cast(Tensor, self.parts[source])
        return self.held[source] if isinstance(source, str) else source

    def weight(self, attribute: Attribute) -> Part:
        """A parameter that may stand as factors."""
        return self.parts[attribute.source] if isinstance(attribute.source, int) else self.tensor(attribute)

    def spread(self, attribute: Attribute) -> Tensor:
        """A parameter, buffer or constant as [C, ...]."""
        found = self.tensor(attribute)
        return found.expand(self.rows, *found.shape) if isinstance(attribute.source, Tensor) else found

    def needs(self, slot: Slot) -> bool:
        """Whether a value wants a gradient."""
        return self.need is not None and self.need[slot.number]

    def give(self, slot: Slot, gradient: Tensor) -> None:
        """Add to a value's gradient."""
        if self.mixed:  # a value's gradient has the value's type
            gradient = gradient.to(cast(Tensor, self.values[slot.number]).dtype)
        before = self.gradients[slot.number]
        self.gradients[slot.number] = gradient if before is None else before + gradient

    def factor(self, tensor: Tensor) -> Tensor:
        """What goes into a product: rounded, where products are in lower precision."""
        return tensor.to(LOW) if self.mixed and tensor.is_floating_point() else tensor

    def sink_of(self, attribute: Attribute | None) -> tuple[Sink, int] | None:
        """Where a parameter's gradient goes, and its number; None: it is no parameter, or not trained."""
        number = None if attribute is None else attribute.source
        if not isinstance(number, int) or not self.sink.wants(number):
            return None
        return (self.pending if number in self.repeated and self.pending is not None else self.sink), number


def shared(weight: Tensor) -> bool:
    """Whether rows [C, ...] are one and the same tensor, as those of the examples of a batch are."""
    return len(weight) > 1 and weight.stride(0) == 0


class Operation(ABC):
    """A step of a program.

    Attributes:
        number: its place in the program.
        sources: slots it reads that may need a gradient.
        parameters: numbers of the parameters it reads.
        given: what it gives: a slot, or a nested tuple of slots.
        outs: all its slots.
        out: the first of them.
    """

    number: int = -1

    def __init__(self, given: Any, sources: Sequence[Slot], attributes: Sequence[Attribute | None] = ()) -> None:
        self.given = given
        self.outs = tuple(s.number for s in slots_of(given))
        self.out = self.outs[0]
        self.sources = tuple(s.number for s in sources)
        self.parameters = tuple(a.source for a in attributes if a is not None and isinstance(a.source, int))

    @abstractmethod
    def forward(self, run: Run) -> None:
        """Write the value."""

    def backward(self, run: Run) -> None:
        """Hand on the gradient; called where the value needs one."""
        raise AssertionError(f"{type(self).__name__} has no gradient")


def slots_of(given: Any) -> list[Slot]:
    """All slots of a nested structure."""
    if isinstance(given, Slot):
        return [given]
    if isinstance(given, tuple | list):
        return [s for part in cast("Sequence[Any]", given) for s in slots_of(part)]
    if isinstance(given, dict):
        return [s for part in cast("dict[Any, Any]", given).values() for s in slots_of(part)]
    if isinstance(given, slice):
        return slots_of((given.start, given.stop, given.step))
    return []


def fetched(template: Any, take: Callable[[Slot | Attribute], Any]) -> Any:
    """A template with its slots and attributes replaced by their values."""
    if isinstance(template, Slot | Attribute):
        return take(template)
    if isinstance(template, tuple | list):
        parts = [fetched(part, take) for part in cast("Sequence[Any]", template)]
        return tuple(parts) if isinstance(template, tuple) else parts
    if isinstance(template, dict):
        return {n: fetched(part, take) for n, part in cast("dict[str, Any]", template).items()}
    if isinstance(template, slice):
        return slice(*(fetched(part, take) for part in (template.start, template.stop, template.step)))
    return template


class Plain(Operation):
    """A value without a gradient: a field of the batch, a shape, a comparison."""

    def __init__(self, given: Slot, function: Callable[..., Any], args: Any) -> None:
        super().__init__(given, ())
        self._function, self._args = function, args

    def forward(self, run: Run) -> None:
        take = cast("Callable[[Any], Any]", lambda a: run.values[a.number] if isinstance(a, Slot) else run.spread(a))
        run.values[self.out] = self._function(*fetched(self._args, take))


class Read(Operation):
    """A parameter, buffer or constant as a value."""

    def __init__(self, given: Slot, attribute: Attribute) -> None:
        super().__init__(given, (), (attribute,))
        self._attribute = attribute

    def forward(self, run: Run) -> None:
        run.values[self.out] = run.spread(self._attribute)

    def backward(self, run: Run) -> None:
        gradient = run.gradients[self.out]
        if gradient is not None and (to := run.sink_of(self._attribute)) is not None:
            to[0].add(to[1], gradient)


class Local(Operation):
    """Any function of values and attributes, differentiated by autograd.

    Args:
        given: a slot, or a nested tuple of slots for a function that gives one.
        function: of `args` and `kwargs`, with values [C, b, ...] and attributes [C, ...].
        args: a template with slots and attributes.
        kwargs: the same.
    """

    def __init__(
        self, given: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        attributes: list[Attribute] = []
        fetched((args, kwargs), lambda a: attributes.append(a) if isinstance(a, Attribute) else None)
        super().__init__(given, slots_of((args, kwargs or {})), attributes)
        self._function, self._args, self._kwargs = function, args, kwargs or {}

    def forward(self, run: Run) -> None:
        leaves: dict[int | Slot, Tensor] = {}
        wanted = run.need is not None and run.need[self.out]

        def take(asked: Slot | Attribute) -> Any:
            value = run.values[asked.number] if isinstance(asked, Slot) else run.spread(asked)
            if not wanted or not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            key = asked if isinstance(asked, Slot) else asked.source
            if isinstance(key, str | Tensor) or (isinstance(key, Slot) and not run.needs(key)):
                return value
            if key not in leaves:
                # `data` and not `detach`: a step of another parameter in the same storage must not look like a change.
                leaves[key] = value.data.requires_grad_()
            return leaves[key]

        args, kwargs = fetched(self._args, take), fetched(self._kwargs, take)
        with torch.set_grad_enabled(wanted):
            found = self._function(*args, **kwargs)
        self._spread(run, self.given, found, outputs := {})
        if wanted:
            run.saved[self.number] = (leaves, outputs)

    def backward(self, run: Run) -> None:
        leaves, outputs = cast("tuple[dict[int | Slot, Tensor], dict[int, Tensor]]", run.saved[self.number])
        at = [s for s in outputs if run.gradients[s] is not None and outputs[s].requires_grad]
        if not at or not leaves:
            return
        run.saved[self.number] = None
        gradients = torch.autograd.grad(
            [outputs[s] for s in at], list(leaves.values()), [run.gradients[s] for s in at], allow_unused=True
        )
        for key, gradient in zip(leaves, cast("tuple[Tensor | None, ...]", gradients), strict=True):
            if gradient is None:
                continue
            if isinstance(key, Slot):
                run.give(key, gradient)
            elif (to := run.sink_of(Attribute(key))) is not None:
                to[0].add(key, gradient)

    def _spread(self, run: Run, given: Any, found: Any, outputs: dict[int, Tensor]) -> None:
        if isinstance(given, Slot):
            run.values[given.number] = found.detach() if isinstance(found, Tensor) else found
            outputs[given.number] = found
            return
        for part, value in zip(cast("Sequence[Any]", given), found, strict=True):
            self._spread(run, part, value, outputs)


class Linear(Operation):
    """y = x W^T + b as one batched product; of a W all rows share, as one product for all; of factors, by these."""

    def __init__(self, given: Slot, x: Slot, weight: Attribute, bias: Attribute | None) -> None:
        super().__init__(given, (x,), (weight, bias))
        self._x, self._weight, self._bias = x, weight, bias

    @property
    def weight(self) -> int | None:
        """Number of the weight; None: it is a constant."""
        return self._weight.source if isinstance(self._weight.source, int) else None

    def forward(self, run: Run) -> None:
        x = run.factor(run.values[self._x.number])
        flat = x if x.ndim == 3 else x.reshape(len(x), -1, x.shape[-1])
        weight, bias = self._read(run), None if self._bias is None else run.factor(run.tensor(self._bias))
        if isinstance(weight, Factors) or weight.ndim == 2:
            out = weight.forward(flat) if isinstance(weight, Factors) else torch.matmul(flat, weight.t())
            if bias is not None:
                out += bias if bias.ndim == 1 else bias[:, None]
        elif bias is None:
            out = torch.bmm(flat, weight.mT)
        else:
            out = torch.baddbmm(bias if bias.ndim == 1 else bias[:, None], flat, weight.mT)
        run.saved[self.number] = flat
        run.values[self.out] = out if x.ndim == 3 else out.view(*x.shape[:-1], -1)

    def backward(self, run: Run) -> None:
        gradient = run.gradients[self.out]
        if gradient is None:
            return
        flat: Tensor = run.saved[self.number]
        slope = gradient if gradient.ndim == 3 else gradient.reshape(len(gradient), -1, gradient.shape[-1])
        weight = self._read(run)
        if run.needs(self._x):
            if isinstance(weight, Factors):
                below = weight.backward(slope)
            else:
                below = torch.bmm(slope, weight) if weight.ndim == 3 else torch.matmul(slope, weight)
            shape = run.values[self._x.number].shape
            run.give(self._x, below if below.shape == shape else below.view(shape))
        if (to := run.sink_of(self._weight)) is not None:
            to[0].product(to[1], slope.mT, flat)
        if (to := run.sink_of(self._bias)) is not None:
            to[0].sum(to[1], slope)

    def _read(self, run: Run) -> Part:
        """The weights [C, m, n], or one matrix [m, n] for all rows."""
        weight = run.weight(self._weight)
        if isinstance(weight, Factors):
            return weight
        return run.factor(weight[0] if weight.ndim == 3 and shared(weight) else weight)


class Elementwise(Operation):
    """A function of each number whose derivative follows from its input or its output."""

    def __init__(
        self,
        given: Slot,
        x: Slot,
        function: Callable[[Tensor], Tensor],
        derive: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__(given, (x,))
        self._x, self._function, self._derive = x, function, derive

    def forward(self, run: Run) -> None:
        run.values[self.out] = self._function(run.values[self._x.number])

    def backward(self, run: Run) -> None:
        gradient = run.gradients[self.out]
        if gradient is not None:
            run.give(self._x, self._derive(gradient, run.values[self._x.number], run.values[self.out]))


class Reshape(Operation):
    """The same numbers in another shape."""

    def __init__(self, given: Slot, x: Slot, function: Callable[..., Tensor], args: tuple[Any, ...] = ()) -> None:
        super().__init__(given, (x,))
        self._x, self._function, self._args = x, function, args

    def forward(self, run: Run) -> None:
        args = fetched(self._args, lambda a: run.values[cast(Slot, a).number])
        run.values[self.out] = self._function(run.values[self._x.number], *args)

    def backward(self, run: Run) -> None:
        gradient = run.gradients[self.out]
        if gradient is not None:
            run.give(self._x, gradient.reshape(run.values[self._x.number].shape))


class Add(Operation):
    """x + y, aligned from the last axis as torch aligns the module's own."""

    def __init__(self, given: Slot, left: Slot, right: Slot) -> None:
        super().__init__(given, (left, right))
        self._sides = (left, right)

    def forward(self, run: Run) -> None:
        left, right = aligned(*(run.values[s.number] for s in self._sides))
        run.values[self.out] = left + right

    def backward(self, run: Run) -> None:
        gradient = run.gradients[self.out]
        if gradient is None:
            return
        for side in self._sides:
            if run.needs(side):
                value: Tensor = run.values[side.number]
                wide = value.view(len(value), *(1,) * (gradient.ndim - value.ndim), *value.shape[1:])
                run.give(side, gradient.sum_to_size(wide.shape).view(value.shape))


class Dropout(Operation):
    """Multiplication by a keyed mask."""

    def __init__(self, given: Slot, x: Slot, p: float, spatial: int | None) -> None:
        super().__init__(given, (x,))
        self._x, self._p, self._spatial = x, p, spatial

    def forward(self, run: Run) -> None:
        x: Tensor = run.values[self._x.number]
        assert run.draw is not None, "dropout without a draw"
        mask = run.draw.masks(x.shape[1:], self._p, self._spatial, x)
        run.saved[self.number] = mask
        run.values[self.out] = (x * mask).to(x.dtype)

    def backward(self, run: Run) -> None:
        gradient = run.gradients[self.out]
        if gradient is not None:
            run.give(self._x, (gradient * run.saved[self.number]).to(gradient.dtype))


class Embedding(Operation):
    """Rows of a table; the rows' tables stand one after the other."""

    def __init__(self, given: Slot, x: Slot, table: Attribute, name: str) -> None:
        super().__init__(given, (x,), (table,))
        self._x, self._table, self._name = x, table, name

    def forward(self, run: Run) -> None:
        x, table = cast(Tensor, run.values[self._x.number]), run.tensor(self._table)
        size = table.shape[-2]
        # An index out of range would read another client's table.
        if x.numel() and (int(x.min()) < 0 or int(x.max()) >= size):
            raise IndexError(f"index out of range in {self._name}: {int(x.min())}..{int(x.max())} of {size}")
        if table.ndim == 2 or shared(table):
            run.values[self.out] = functional.embedding(x, table if table.ndim == 2 else table[0])
            return
        start = torch.arange(run.rows, device=x.device).view(-1, *(1,) * (x.ndim - 1)) * size
        run.values[self.out] = functional.embedding(x + start, table.reshape(-1, table.shape[-1]))

    def backward(self, run: Run) -> None:
        gradient = run.gradients[self.out]
        if gradient is not None and (to := run.sink_of(self._table)) is not None:
            x: Tensor = run.values[self._x.number]
            to[0].scatter(to[1], x.reshape(run.rows, -1), gradient.reshape(run.rows, -1, gradient.shape[-1]))


class LayerNorm(Operation):
    """Normalisation over the last axes, then scale and shift by every row's own parameters."""

    def __init__(
        self, given: Slot, x: Slot, shape: Sequence[int], eps: float, weight: Attribute | None, bias: Attribute | None
    ) -> None:
        super().__init__(given, (x,), (weight, bias))
        self._x, self._shape, self._eps, self._weight, self._bias = x, list(shape), eps, weight, bias

    def forward(self, run: Run) -> None:
        x = widened(run.values[self._x.number], mixed=run.mixed)
        normal, mean, scale = aten.native_layer_norm(x, self._shape, None, None, self._eps)
        run.saved[self.number] = (normal, mean, scale)
        out = normal
        if self._weight is not None:
            out = out * self._wide(run.spread(self._weight), x)
        if self._bias is not None:
            out = out + self._wide(run.spread(self._bias), x)
        run.values[self.out] = out

    def backward(self, run: Run) -> None:
        gradient = run.gradients[self.out]
        if gradient is None:
            return
        x = widened(run.values[self._x.number], mixed=run.mixed)
        normal, mean, scale = run.saved[self.number]
        over = tuple(range(1, x.ndim - len(self._shape)))
        if run.needs(self._x):
            inner = gradient
            if self._weight is not None:
                inner = gradient * self._wide(run.spread(self._weight), x)
            mask = [True, False, False]
            run.give(
                self._x,
                aten.native_layer_norm_backward(inner, x, self._shape, mean, scale, None, None, mask)[0],
            )
        if (to := run.sink_of(self._weight)) is not None:
            to[0].add(to[1], (gradient * normal).sum(over))
        if (to := run.sink_of(self._bias)) is not None:
            to[0].add(to[1], gradient.sum(over))

    def _wide(self, own: Tensor, x: Tensor) -> Tensor:
        return own.view(len(own), *(1,) * (x.ndim - 1 - len(self._shape)), *own.shape[1:])


PATCH_VALUES = 64
"""Convolutions that read at most so many numbers for each output run as products of patches."""

PATCH_WORK = 2_000_000
"""So do those of at most so many multiplications for a row's batch, where the call costs more than the work."""


class Convolution(Operation):
    """A convolution with each row's own kernel.

    Two forms, found by measurement on CPUs: one product of patches for all rows where a kernel reads few numbers (a
    first layer) or the work is small; else the library's kernel, row by row, in channels-last order. Where all rows
    share a kernel, one call of the library for all of them.
    """

    def __init__(
        self,
        given: Slot,
        x: Slot,
        weight: Attribute,
        bias: Attribute | None,
        *,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
    ) -> None:
        super().__init__(given, (x,), (weight, bias))
        self._x, self._weight, self._bias, self._kernel = x, weight, bias, tuple(kernel)
        self._how: tuple[Any, ...] = (
            list(stride), list(padding), list(dilation), transposed, list(output_padding), groups,
        )  # fmt: skip

    def forward(self, run: Run) -> None:
        x, weight = run.factor(run.values[self._x.number]), run.factor(run.tensor(self._weight))
        bias = None if self._bias is None else run.factor(run.tensor(self._bias))
        if isinstance(self._weight.source, Tensor):
            frozen = self._bias is None or isinstance(self._bias.source, Tensor)
            out = aten.convolution(x.flatten(0, 1), weight, bias if frozen else None, *self._how)
            out = out.unflatten(0, x.shape[:2])
            if bias is not None and not frozen:
                out = out + bias.view(len(bias), 1, -1, *(1,) * (out.ndim - 3))
            run.values[self.out] = out
            return
        if self._by_patches(x, weight):
            run.values[self.out] = self._patched(run, x, weight, bias)
            return
        if shared(weight):
            out = aten.convolution(x.flatten(0, 1), weight[0], None, *self._how).unflatten(0, x.shape[:2])
            run.values[self.out] = out if bias is None else out + bias.view(len(bias), 1, -1, *(1,) * (out.ndim - 3))
            return
        outs = [
            aten.convolution(
                _channels_last(x[r]), weight[r], None if bias is None else bias.expand(run.rows, -1)[r], *self._how
            )
            for r in range(run.rows)
        ]
        run.values[self.out] = outs[0][None] if run.rows == 1 else torch.stack(outs)

    def backward(self, run: Run) -> None:
        gradient = run.gradients[self.out]
        if gradient is None:
            return
        x, weight = run.factor(run.values[self._x.number]), run.factor(run.tensor(self._weight))
        wanted = run.needs(self._x)
        if (to := run.sink_of(self._bias)) is not None:
            to[0].add(to[1], gradient.sum((1, *range(3, gradient.ndim))))
        if isinstance(self._weight.source, Tensor):
            if wanted:
                mask = [True, False, False]
                below = aten.convolution_backward(
                    gradient.flatten(0, 1), x.flatten(0, 1), weight, None, *self._how, mask
                )[0]
                run.give(self._x, below.view(x.shape))
            return
        to = run.sink_of(self._weight)
        columns = run.saved[self.number]
        if columns is not None:
            slope = gradient.movedim(2, -1).reshape(run.rows, -1, gradient.shape[2])
            if wanted:
                flat = weight.flatten(2)
                below = torch.matmul(slope, flat[0]) if shared(weight) else torch.bmm(slope, flat)
                run.give(self._x, self._folded(below, x))
            if to is not None:
                to[0].product(to[1], slope.mT, columns)
            return
        if wanted and shared(weight):
            whole = gradient.flatten(0, 1), x.flatten(0, 1), weight[0], None, *self._how, [True, False, False]
            run.give(self._x, aten.convolution_backward(*whole)[0].view(x.shape))
            wanted = False
        mask, belows, gradients = [wanted, to is not None, False], [], []
        for r in range(run.rows):
            slope = _channels_last(gradient[r])
            below, own, _ = aten.convolution_backward(slope, _channels_last(x[r]), weight[r], None, *self._how, mask)
            belows.append(below)
            gradients.append(own)
        if wanted:
            run.give(self._x, belows[0][None] if run.rows == 1 else torch.stack(belows))
        if to is not None:
            to[0].add(to[1], gradients[0][None] if run.rows == 1 else torch.stack(gradients))

    def _by_patches(self, x: Tensor, weight: Tensor) -> bool:
        stride, padding, dilation, transposed, _, groups = self._how
        if transposed or groups != 1 or x.ndim != 5 or x.device.type != "cpu":
            return False
        values = weight[0, 0].numel()
        if values <= PATCH_VALUES:
            return True
        sizes = (_output(x.shape[3 + i], weight.shape[3 + i], stride[i], padding[i], dilation[i]) for i in (0, 1))
        outputs = 1
        for size in sizes:
            outputs *= size
        return x.shape[1] * outputs * values * weight.shape[1] <= PATCH_WORK

    def _patched(self, run: Run, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding, dilation, *_ = self._how
        if any(padding):
            x = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        high, wide = (_output(x.shape[3 + i], weight.shape[3 + i], stride[i], 0, dilation[i]) for i in (0, 1))
        kernel = weight.shape[3:]
        rows, count, channels = x.shape[:3]
        s = x.stride()
        patches = x.as_strided(
            (rows, count, high, wide, channels, *kernel),
            (s[0], s[1], s[3] * stride[0], s[4] * stride[1], s[2], s[3] * dilation[0], s[4] * dilation[1]),
            x.storage_offset(),
        )
        columns = patches.reshape(rows, count * high * wide, -1)
        flat = weight.flatten(2).mT
        if shared(weight):
            out = torch.matmul(columns, flat[0])
            out = out if bias is None else out.add_(bias.expand(rows, -1)[:, None])
        else:
            out = (
                torch.bmm(columns, flat)
                if bias is None
                else torch.baddbmm(bias.expand(rows, -1)[:, None], columns, flat)
            )
        if run.need is not None and run.need[self.out]:
            run.saved[self.number] = columns
        return out.view(rows, count, high, wide, -1).movedim(-1, 2)

    def _folded(self, columns: Tensor, x: Tensor) -> Tensor:
        """The gradient of the input from that of the patches [C, b * h * w, channels * kernel]."""
        stride, padding, dilation, *_ = self._how
        wide = columns.view(x.shape[0] * x.shape[1], -1, columns.shape[-1]).mT
        return functional.fold(wide, x.shape[3:], self._kernel, dilation, padding, stride).view(x.shape)


def _output(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 and x.device.type == "cpu" else x


def aligned(left: Any, right: Any) -> tuple[Any, Any]:
    """Two operands aligned from their last axis, with the rows left in front."""
    if isinstance(left, Tensor) and isinstance(right, Tensor) and left.ndim != right.ndim:
        ndim = max(left.ndim, right.ndim)
        left, right = (t.reshape(len(t), *(1,) * (ndim - t.ndim), *t.shape[1:]) for t in (left, right))
    return left, right
