"""Which layers, functions and methods have a form on rows, and which operations each becomes.

An axis of the module's own [b, ...] is the next axis of rows [C, b, ...]. What is not listed here is `Unsupported`.
"""

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from atoll.engines.operations import (
    Add,
    Attribute,
    Convolution,
    Dropout,
    Elementwise,
    Embedding,
    LayerNorm,
    Linear,
    Local,
    Plain,
    Read,
    Reshape,
    Slot,
    aligned,
    aten,
)

if TYPE_CHECKING:
    from atoll.engines.program import _Builder as Builder  # pyright: ignore[reportPrivateUsage]


class Unsupported(Exception):
    """A module has no form on rows; the text says what it uses."""


ELEMENTWISE_LAYERS = (
    nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh,
    nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
MERGED_LAYERS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.LocalResponseNorm,
)  # fmt: skip
"""Layers without parameters that treat every example alike: rows and batch are one axis to them."""

DROPOUTS = {nn.Dropout: None, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}
"""Each dropout layer with the axes of an example that share a draw."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Derivative = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]
RELU: Derivative = (torch.relu, lambda g, x, out: aten.threshold_backward(g, out, 0))
TANH: Derivative = (torch.tanh, lambda g, x, out: aten.tanh_backward(g, out))
SIGMOID: Derivative = (torch.sigmoid, lambda g, x, out: aten.sigmoid_backward(g, out))
SILU: Derivative = (functional.silu, lambda g, x, out: aten.silu_backward(g, x))
GELU: Derivative = (functional.gelu, lambda g, x, out: aten.gelu_backward(g, x))
WRITTEN: dict[Any, Derivative] = {
    nn.ReLU: RELU, torch.relu: RELU, functional.relu: RELU, "relu": RELU,
    nn.Tanh: TANH, torch.tanh: TANH, functional.tanh: TANH, "tanh": TANH,
    nn.Sigmoid: SIGMOID, torch.sigmoid: SIGMOID, functional.sigmoid: SIGMOID, "sigmoid": SIGMOID,
    nn.SiLU: SILU, functional.silu: SILU, functional.gelu: GELU,
}  # fmt: skip

ELEMENTWISE: frozenset[Any] = frozenset({
    torch.exp, torch.log, torch.log1p, torch.abs, torch.sqrt, torch.rsqrt, torch.square, torch.sin, torch.cos,
    torch.clamp, torch.neg, functional.leaky_relu, functional.elu, functional.softplus, functional.mish,
    functional.hardtanh, functional.logsigmoid, functional.relu6, functional.hardswish, functional.hardsigmoid,
    operator.neg,
})  # fmt: skip
BINARY: dict[Any, Callable[..., Any]] = {
    operator.sub: operator.sub, operator.isub: operator.sub, torch.sub: torch.sub,
    operator.mul: operator.mul, operator.imul: operator.mul, torch.mul: torch.mul,
    operator.truediv: operator.truediv, operator.itruediv: operator.truediv, torch.div: torch.div,
    operator.pow: operator.pow, torch.pow: torch.pow, torch.maximum: torch.maximum, torch.minimum: torch.minimum,
    operator.floordiv: operator.floordiv, operator.mod: operator.mod,
}  # fmt: skip
ADDITIONS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add})
METHODS = frozenset({"exp", "log", "abs", "sqrt", "rsqrt", "square", "clamp", "contiguous", "float", "neg"})
BINARY_METHODS = {"sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow}


def layer(build: "Builder", module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A layer's operations; what they give."""
    kind = type(module)
    if kind in RECURRENT:
        return recurrent(build, cast(nn.RNNBase, module), name, args, kwargs)
    if kind is nn.MultiheadAttention:
        return attention(build, module, name, args, kwargs)
    if kind in (nn.TransformerEncoderLayer, nn.TransformerEncoder):
        return transformer(build, module, name, args, kwargs)
    if len(args) != 1 or kwargs or not isinstance(args[0], Slot | Attribute):
        raise Unsupported(f"the layer {kind.__name__} called with more than one input")
    x = value(build, args[0])
    if kind is nn.Identity:
        return x
    if kind is nn.Linear:
        return linear(build, x, name, module)
    if kind in WRITTEN:
        return elementwise(build, x, WRITTEN[kind])
    if kind is nn.GELU:
        approximate = cast(nn.GELU, module).approximate
        gelu: Derivative = (module, lambda g, x, out: aten.gelu_backward(g, x, approximate=approximate))
        return elementwise(build, x, gelu)
    if kind in ELEMENTWISE_LAYERS:
        return build.emit(Local(build.slot(), module, (x,)))
    if kind in DROPOUTS:
        return dropout(build, x, cast(nn.Dropout, module).p, DROPOUTS[kind], module.training)
    if kind in CONVOLUTIONS:
        return convolution(build, x, cast(_ConvNd, module), name)
    if kind in MERGED_LAYERS:
        return merged(build, x, module)
    if kind is nn.Flatten:
        flat = cast(nn.Flatten, module)
        return flatten(build, x, flat.start_dim, flat.end_dim)
    if kind is nn.Unflatten:
        shape = cast(nn.Unflatten, module)
        return build.emit(
            Local(build.slot(), torch.Tensor.unflatten, (x, shift(int(shape.dim)), shape.unflattened_size))
        )
    if kind is nn.LayerNorm:
        norm = cast(nn.LayerNorm, module)
        weight, bias = (
            build.attribute(f"{name}.{p}") if getattr(norm, p) is not None else None for p in ("weight", "bias")
        )
        return build.emit(LayerNorm(build.slot(), x, norm.normalized_shape, norm.eps, weight, bias))
    if kind is nn.RMSNorm:
        return rms_norm(build, x, cast(nn.RMSNorm, module), name)
    if kind is nn.GroupNorm:
        return group_norm(build, x, cast(nn.GroupNorm, module), name)
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return batch_norm(build, x, cast(_BatchNorm, module), name)
    if kind is nn.Embedding:
        table = cast(nn.Embedding, module)
        if table.padding_idx is not None or table.max_norm is not None or table.sparse or table.scale_grad_by_freq:
            raise Unsupported("an Embedding with padding, max_norm, sparse or scaled gradients")
        return build.emit(Embedding(build.slot(), x, build.attribute(f"{name}.weight"), name))
    if kind in (nn.Softmax, nn.LogSoftmax):
        dim = cast(nn.Softmax, module).dim
        if dim is None:
            raise Unsupported("a softmax without dim")
        return build.emit(
            Local(build.slot(), torch.softmax if kind is nn.Softmax else torch.log_softmax, (x, shift(dim)))
        )
    raise Unsupported(f"the layer {kind.__name__}")


def function(build: "Builder", target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function's operations; what they give."""
    if target is getattr:
        if args[1] == "T" or args[1] not in ("shape", "ndim", "dtype", "device"):
            raise Unsupported(f"the attribute {args[1]}")
        return plain(build, ATTRIBUTES[args[1]], (args[0],))
    if target is operator.getitem:
        return getitem(build, *args)
    if target in ADDITIONS and not kwargs and all(isinstance(a, Slot | Attribute) for a in args):
        return build.emit(Add(build.slot(), value(build, args[0]), value(build, args[1])))
    if target in ADDITIONS:
        return binary(build, torch.add if kwargs else operator.add, args, kwargs)
    if target in BINARY:
        return binary(build, BINARY[target], args, kwargs)
    if target in WRITTEN and set(kwargs) <= {"inplace"} and len(list(args)) == 1:
        return elementwise(build, value(build, args[0]), WRITTEN[target])
    if target is functional.linear:
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        weight, bias = named.get("weight"), named.get("bias")
        if not isinstance(weight, Attribute) or not (bias is None or isinstance(bias, Attribute)):
            raise Unsupported("the function linear with a computed weight")
        return build.emit(Linear(build.slot(), value(build, named["input"]), weight, bias))
    if target in DROPOUT_FUNCTIONS:
        named = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
        training = named.get("training", True)
        return dropout(build, value(build, named["input"]), named.get("p", 0.5), DROPOUT_FUNCTIONS[target], training)
    if target in MERGED_FUNCTIONS:
        return merged(build, value(build, args[0]), target, *args[1:], **kwargs)
    if target is operator.matmul:
        return method(build, "matmul", args, kwargs)
    if target in ELEMENTWISE:
        if kwargs.pop("inplace", False):
            raise Unsupported(f"the function {named_of(target)} in place")
        return of_numbers(build, target, args, kwargs)
    if target is functional.scaled_dot_product_attention:
        return sdpa(build, args, kwargs)
    name = named_of(target)
    if name in SHIFTED and target in (getattr(torch, name, None), getattr(functional, name, None)):
        return method(build, name, args, kwargs)
    raise Unsupported(f"the function {name}")


def method(build: "Builder", name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A tensor method's operations; what they give."""
    if name in ("view", "reshape"):
        shape = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
        return build.emit(Reshape(build.slot(), value(build, args[0]), _reshape, (tuple(shape),)))
    if name == "flatten":
        return flatten(build, value(build, args[0]), *args[1:], **kwargs)
    if name == "size":
        return plain(build, _size, args)
    if name == "dim":
        return plain(build, _ndim, args)
    if name in ("relu", "tanh", "sigmoid"):
        return elementwise(build, value(build, args[0]), WRITTEN[name])
    if name == "add" and len(args) == 2 and not kwargs:
        return function(build, operator.add, args, kwargs)
    if name in BINARY_METHODS:
        return binary(build, BINARY_METHODS[name], args, kwargs)
    if name in METHODS:
        return of_numbers(build, getattr(torch.Tensor, name), args, kwargs)
    if name in SHIFTED:
        return SHIFTED[name](build, args, kwargs)
    raise Unsupported(f"the method {name}")


# --- pieces -----------------------------------------------------------------------------------------------------------


def value(build: "Builder", given: Any) -> Slot:
    """A slot for what a node gave: itself, or an attribute read as a value."""
    if isinstance(given, Attribute):
        return build.emit(Read(build.slot(), given))
    if not isinstance(given, Slot):
        raise Unsupported(f"an operation on {type(given).__name__} where a tensor was expected")
    return given


def shift(dim: Any) -> int:
    """An axis of [b, ...] as an axis of [C, b, ...]."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise Unsupported("an axis that is computed")
    return dim + 1 if dim >= 0 else dim


def _shifted(dim: Any) -> Any:
    return [shift(d) for d in cast("Sequence[int]", dim)] if isinstance(dim, list | tuple) else shift(cast(int, dim))


def named_of(target: Any) -> str:
    """A function's name."""
    return str(getattr(target, "__name__", target))


def plain(build: "Builder", what: Callable[..., Any], args: tuple[Any, ...]) -> Slot:
    """A value without a gradient."""
    return build.emit(Plain(build.slot(), what, args))


def elementwise(build: "Builder", x: Slot, how: Derivative) -> Slot:
    """A function of each number."""
    return build.emit(Elementwise(build.slot(), x, *how))


def of_numbers(build: "Builder", what: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Slot:
    """A function of each number of a tensor, whose further arguments are no tensors."""
    if any(isinstance(a, Slot | Attribute) for a in (*args[1:], *kwargs.values())):
        raise Unsupported(f"the function {named_of(what)} of several tensors")
    return build.emit(Local(build.slot(), what, (value(build, args[0]), *args[1:]), kwargs))


def linear(build: "Builder", x: Slot, name: str, module: nn.Module) -> Slot:
    """A linear layer by its name."""
    bias = build.attribute(f"{name}.bias") if isinstance(getattr(module, "bias", None), Tensor) else None
    return build.emit(Linear(build.slot(), x, build.attribute(f"{name}.weight"), bias))


def dropout(build: "Builder", x: Slot, p: Any, spatial: int | None, training: Any) -> Slot:
    """Keyed dropout; in eval mode nothing."""
    if not isinstance(training, bool) or not isinstance(p, int | float):
        raise Unsupported("dropout whose rate or mode is computed")
    return build.emit(Dropout(build.slot(), x, float(p), spatial)) if training and p else x


def flatten(build: "Builder", x: Slot, start_dim: int = 0, end_dim: int = -1) -> Slot:
    """Some axes as one."""
    return build.emit(Reshape(build.slot(), x, torch.Tensor.flatten, (shift(start_dim), shift(end_dim))))


def merged(build: "Builder", x: Slot, what: Callable[..., Any], *args: Any, **kwargs: Any) -> Slot:
    """A function that treats every example alike, on rows and batch as one axis."""

    def together(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        flat = x.flatten(0, 1)
        if flat.ndim == 4 and flat.device.type == "cpu" and flat.shape[1] > 3:
            # Torch's pooling goes many times faster through channels that lie side by side.
            flat = flat.contiguous(memory_format=torch.channels_last)
        return what(flat, *args, **kwargs).unflatten(0, x.shape[:2])

    return build.emit(Local(build.slot(), together, (x, *args), kwargs))


def convolution(build: "Builder", x: Slot, module: _ConvNd, name: str) -> Slot:
    """A convolution of any kind with constant padding of zeros."""
    axes, transposed = len(module.kernel_size), module.transposed
    padding = module.padding
    if module.padding_mode != "zeros":
        raise Unsupported(f"a convolution padded by {module.padding_mode!r}")
    if isinstance(padding, str):
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if padding == "same" and any(span % 2 for span in spans):
            raise Unsupported("a convolution padded unevenly")
        padding = [span // 2 if padding == "same" else 0 for span in spans]
    bias = build.attribute(f"{name}.bias") if module.bias is not None else None
    return build.emit(
        Convolution(
            build.slot(), x, build.attribute(f"{name}.weight"), bias,
            kernel=module.kernel_size, stride=module.stride, padding=padding, dilation=module.dilation,
            transposed=transposed, output_padding=module.output_padding if transposed else [0] * axes,
            groups=module.groups,
        )
    )  # fmt: skip


def affine(out: Tensor, *own: Tensor | None, lead: int, trail: int = 0) -> Tensor:
    """Scale and shift a normalised [C, b, ...] by parameters [C, ...], `lead` axes after the rows."""
    for part, function in zip(own, (torch.mul, torch.add), strict=False):
        if part is not None:
            out = function(out, part.view(len(part), *(1,) * lead, *part.shape[1:], *(1,) * trail))
    return out


def _parts(build: "Builder", module: nn.Module, name: str, *parts: str) -> list[Attribute | None]:
    return [build.attribute(f"{name}.{p}") if getattr(module, p, None) is not None else None for p in parts]


def rms_norm(build: "Builder", x: Slot, module: nn.RMSNorm, name: str) -> Slot:
    """RMSNorm over the last axes."""
    shape, eps = module.normalized_shape, module.eps

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        return affine(functional.rms_norm(x, shape, eps=eps), weight, lead=x.ndim - 1 - len(shape))

    return build.emit(Local(build.slot(), norm, (x, *_parts(build, module, name, "weight"))))


def group_norm(build: "Builder", x: Slot, module: nn.GroupNorm, name: str) -> Slot:
    """GroupNorm: rows and batch are one axis."""
    groups, eps = module.num_groups, module.eps

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        out = functional.group_norm(x.flatten(0, 1), groups, eps=eps).view_as(x)
        return affine(out, weight, bias, lead=1, trail=x.ndim - 3)

    return build.emit(Local(build.slot(), norm, (x, *_parts(build, module, name, "weight", "bias"))))


def batch_norm(build: "Builder", x: Slot, module: _BatchNorm, name: str) -> Slot:
    """Rows become channels: every row's features are normalised over its own batch."""
    if module.momentum is None:
        raise Unsupported("BatchNorm with a cumulative average")
    tracked, momentum, eps = module.running_mean is not None, module.momentum, module.eps
    training = module.training or not tracked
    renewed = tracked and module.training

    def norm(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        seen: Tensor | None,
    ) -> Tensor:
        rows, size = x.shape[:2]
        channels = x.transpose(0, 1).reshape(size, rows * x.shape[2], *x.shape[3:])
        flat = [None if t is None else t.reshape(-1).clone() for t in (mean, var)]
        own = [None if t is None else t.reshape(-1) for t in (weight, bias)]
        out = functional.batch_norm(channels, flat[0], flat[1], own[0], own[1], training, momentum, eps)
        if renewed:
            for held, new in ((mean, flat[0]), (var, flat[1])):
                assert held is not None and new is not None
                held.copy_(new.view_as(held))
            assert seen is not None
            seen.add_(1)
        return out.view(size, rows, *x.shape[2:]).transpose(0, 1)

    parts = _parts(build, module, name, "weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return build.emit(Local(build.slot(), norm, (x, *parts)))


def binary(build: "Builder", target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Slot:
    """A function of two operands, one of which may be a number."""

    def both(left: Any, right: Any, *rest: Any, **options: Any) -> Any:
        return target(*aligned(left, right), *rest, **options)

    return build.emit(Local(build.slot(), both, args, kwargs))


def getitem(build: "Builder", held: Any, index: Any) -> Any:
    """A field of the batch, a part of a tuple, or a part of each row's tensor."""
    if isinstance(held, tuple | list):
        if not isinstance(index, int | slice):
            raise Unsupported("an index that is computed")
        return cast("Sequence[Any]", held)[index]
    if isinstance(held, Slot) and held.number == build.start:
        return plain(build, operator.getitem, (held, index))

    def part(held: Any, index: Any) -> Any:
        if not isinstance(held, Tensor):
            return held[index]
        places = index if isinstance(index, tuple) else (index,)
        if any(isinstance(p, Tensor | list) for p in places):
            raise Unsupported("an index that is a tensor")
        return held[(slice(None), *places)]

    return build.emit(Local(build.slot(), part, (held, index)))


def _reshape(x: Tensor, shape: Sequence[Any]) -> Tensor:
    own = shape[0] if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape  # view(other.shape)
    return x.reshape(len(x), *cast("Sequence[int]", own))


def _size(x: Any, dim: int | None = None) -> Any:
    return x.shape[1:] if dim is None else x.shape[1:][dim]


def _ndim(x: Any) -> int:
    return x.ndim - 1


ATTRIBUTES: dict[str, Callable[[Any], Any]] = {
    "shape": _size, "ndim": _ndim, "dtype": lambda x: x.dtype, "device": lambda x: x.device,
}  # fmt: skip
DROPOUT_FUNCTIONS = {
    functional.dropout: None, functional.dropout1d: 1, functional.dropout2d: 2, functional.dropout3d: 3,
}  # fmt: skip
# Torch chooses between two forms of max pooling when it is called, and a trace sees the one that was chosen.
MERGED_FUNCTIONS: frozenset[Any] = frozenset({
    functional.max_pool1d, functional.max_pool2d, functional.max_pool3d, functional.avg_pool1d, functional.avg_pool2d,
    functional.avg_pool3d, functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d,
    functional.adaptive_avg_pool3d, functional.interpolate, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
})  # fmt: skip


# --- functions with axes ----------------------------------------------------------------------------------------------

Form = Callable[["Builder", tuple[Any, ...], dict[str, Any]], Any]


def _named(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    """Arguments by name; refused where one is computed or unknown."""
    given = dict(zip(names, args, strict=False)) | {("input" if n == "self" else n): v for n, v in kwargs.items()}
    if "axis" in given:
        given["dim"] = given.pop("axis")
    if set(given) - set(names) or len(args) > len(names):
        raise Unsupported(f"arguments {', '.join(sorted(given))}")
    return given


def _reduction(function: Callable[..., Any]) -> Form:
    def form(build: "Builder", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 2 and isinstance(args[2], int) and not isinstance(args[2], bool):  # x.mean(1, 2)
            args = (args[0], args[1:])
        given = _named(args, kwargs, "input", "dim", "keepdim")
        if given.get("dim") is None or isinstance(given["dim"], Slot):
            raise Unsupported(f"a {function.__name__} over the whole batch")
        dims = given["dim"] if isinstance(given["dim"], list | tuple) else [given["dim"]]
        if any(not isinstance(d, int) for d in dims):
            raise Unsupported(f"a {function.__name__} over a computed axis")
        options = {"keepdim": given.get("keepdim", False)}
        return build.emit(
            Local(build.slot(), function, (value(build, given["input"]), _shifted(given["dim"])), options)
        )

    return form


def _one_axis(function: Callable[..., Any], default: int | None = None) -> Form:
    def form(build: "Builder", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _named(args, {n: v for n, v in kwargs.items() if n not in ("dtype", "_stacklevel")}, "input", "dim")
        dim = given.get("dim", default)
        if not isinstance(dim, int):
            raise Unsupported(f"the function {function.__name__} without dim")
        return build.emit(Local(build.slot(), function, (value(build, given["input"]), shift(dim))))

    return form


def _unsqueeze(build: "Builder", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = _named(args, kwargs, "input", "dim")
    return build.emit(Reshape(build.slot(), value(build, given["input"]), torch.unsqueeze, (shift(given["dim"]),)))


def _squeeze(build: "Builder", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = _named(args, kwargs, "input", "dim")
    if not isinstance(given.get("dim"), int):
        raise Unsupported("a squeeze of all axes")
    return build.emit(Reshape(build.slot(), value(build, given["input"]), torch.squeeze, (shift(given["dim"]),)))


def _transpose(build: "Builder", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = _named(args, kwargs, "input", "dim0", "dim1")
    dims = (shift(given["dim0"]), shift(given["dim1"]))
    return build.emit(Local(build.slot(), torch.transpose, (value(build, given["input"]), *dims)))


def _permute(build: "Builder", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dims = kwargs.get("dims", args[1:])
    if len(dims) == 1 and isinstance(dims[0], list | tuple):
        dims = dims[0]
    if any(not isinstance(d, int) for d in dims):
        raise Unsupported("a permute whose axes are computed")
    own = (0, *(d % len(dims) + 1 for d in dims))
    return build.emit(Local(build.slot(), torch.permute, (value(build, args[0]), own)))


def _joined(function: Callable[..., Any]) -> Form:
    def form(build: "Builder", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _named(args, kwargs, "tensors", "dim")
        dim = given.get("dim", 0)
        if not isinstance(dim, int) or not isinstance(given["tensors"], list | tuple):
            raise Unsupported(f"the function {function.__name__} of computed tensors")
        parts = [value(build, t) for t in cast("Sequence[Any]", given["tensors"])]
        return build.emit(Local(build.slot(), lambda *parts: function(parts, shift(dim)), tuple(parts)))

    return form


def _pieces(function: Callable[..., Any]) -> Form:
    def form(build: "Builder", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _named(args, kwargs, "input", "count", "dim") if "chunks" not in kwargs else {}
        dim, count = given.get("dim", 0), given.get("count")
        if not isinstance(dim, int) or function is not torch.chunk or not isinstance(count, int):
            raise Unsupported(f"the function {function.__name__}")
        outs = tuple(build.slot() for _ in range(count))
        return build.emit(Local(outs, torch.chunk, (value(build, given["input"]), count, shift(dim))))

    return form


def _matmul(build: "Builder", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    left, right = (value(build, a) for a in args)

    def product(left: Tensor, right: Tensor) -> Tensor:
        if left.ndim < 3 or right.ndim < 3:
            raise Unsupported("a product with a vector")
        return torch.matmul(*aligned(left, right))

    return build.emit(Local(build.slot(), product, (left, right)))


SHIFTED: dict[str, Form] = {
    "mean": _reduction(torch.mean), "sum": _reduction(torch.sum), "amax": _reduction(torch.amax),
    "softmax": _one_axis(torch.softmax), "log_softmax": _one_axis(torch.log_softmax),
    "unsqueeze": _unsqueeze, "squeeze": _squeeze, "transpose": _transpose, "permute": _permute,
    "cat": _joined(torch.cat), "concat": _joined(torch.cat), "stack": _joined(torch.stack),
    "chunk": _pieces(torch.chunk), "matmul": _matmul, "bmm": _matmul,
    "flatten": lambda build, args, kwargs: method(build, "flatten", args, kwargs),
    "reshape": lambda build, args, kwargs: method(build, "reshape", args, kwargs),
}  # fmt: skip


def sdpa(build: "Builder", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Slot:
    """Scaled dot-product attention without dropout."""
    given = _named(args, kwargs, "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    if given.get("dropout_p", 0.0) or given.get("attn_mask") is not None:
        raise Unsupported("attention with dropout or a mask")
    causal, scale = bool(given.get("is_causal", False)), given.get("scale")

    def attend(*parts: Tensor) -> Tensor:
        q, k, v = (p.flatten(0, 1) for p in parts)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        return out.unflatten(0, parts[0].shape[:2])

    return build.emit(Local(build.slot(), attend, tuple(value(build, given[n]) for n in ("query", "key", "value"))))


# --- attention --------------------------------------------------------------------------------------------------------


def attention(build: "Builder", module: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Self-attention over one sequence: projections as batched products, heads as one more axis."""
    names = (
        "query",
        "key",
        "value",
        "key_padding_mask",
        "need_weights",
        "attn_mask",
        "average_attn_weights",
        "is_causal",
    )
    given = _named(args, kwargs, *names)
    if given["key"] is not given["query"] or given["value"] is not given["query"]:
        raise Unsupported("attention over more than one sequence")
    if given.get("key_padding_mask") is not None or given.get("attn_mask") is not None:
        raise Unsupported("attention with a mask")
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        raise Unsupported("attention with keys or values of its own")
    if module.dropout and module.training:
        raise Unsupported("attention with dropout")
    x, heads, first = value(build, given["query"]), module.num_heads, module.batch_first
    weight, bias = _parts(build, module, name, "in_proj_weight", "in_proj_bias")
    assert weight is not None
    together = build.emit(Linear(build.slot(), x, weight, bias))

    def attend(together: Tensor) -> Tensor:
        wide = together if first else together.transpose(1, 2)
        q, k, v = wide.flatten(0, 1).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = out.unflatten(0, wide.shape[:2])
        return out if first else out.transpose(1, 2)

    inner = build.emit(Local(build.slot(), attend, (together,)))
    # The weights themselves, the second thing it gives, have no form here: using them is refused.
    return (linear(build, inner, f"{name}.out_proj", module.out_proj), None)


def transformer(build: "Builder", module: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Slot:
    """An encoder, or one of its layers."""
    if len(args) != 1 or any(v not in (None, False) for v in kwargs.values()):
        raise Unsupported(f"the layer {type(module).__name__} with a mask")
    x = value(build, args[0])
    if isinstance(module, nn.TransformerEncoder):
        for i, part in enumerate(module.layers):
            x = transformer(build, part, f"{name}.layers.{i}", (x,), {})
        return x if module.norm is None else layer(build, module.norm, f"{name}.norm", (x,), {})

    def attend(x: Slot) -> Slot:
        own = attention(build, module.self_attn, f"{name}.self_attn", (x, x, x), {})[0]
        return layer(build, module.dropout1, f"{name}.dropout1", (own,), {})

    def feed(x: Slot) -> Slot:
        wide = linear(build, x, f"{name}.linear1", module.linear1)
        if isinstance(module.activation, nn.Module):
            wide = layer(build, module.activation, f"{name}.activation", (wide,), {})
        else:
            wide = function(build, module.activation, (wide,), {})
        wide = layer(build, module.dropout, f"{name}.dropout", (wide,), {})
        return layer(
            build, module.dropout2, f"{name}.dropout2", (linear(build, wide, f"{name}.linear2", module.linear2),), {}
        )

    def normed(x: Slot, which: str) -> Slot:
        return layer(build, getattr(module, which), f"{name}.{which}", (x,), {})

    def plus(left: Slot, right: Slot) -> Slot:
        return build.emit(Add(build.slot(), left, right))

    if module.norm_first:
        x = plus(x, attend(normed(x, "norm1")))
        return plus(x, feed(normed(x, "norm2")))
    x = normed(plus(x, attend(x)), "norm1")
    return normed(plus(x, feed(x)), "norm2")


# --- recurrence -------------------------------------------------------------------------------------------------------

RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


def recurrent(build: "Builder", module: nn.RNNBase, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """LSTM, GRU or RNN from a state of zeros: inputs of all times as one product, then one time after the other."""
    if kwargs or len(args) != 1:
        raise Unsupported(f"the layer {type(module).__name__} with a given state")
    if module.proj_size:
        raise Unsupported("an LSTM with projections")
    if module.dropout and module.num_layers > 1 and module.training:
        raise Unsupported("a recurrent layer with dropout")
    x, first, gates = value(build, args[0]), module.batch_first, _gates(module)
    lasts: list[tuple[Slot, ...]] = []
    for number in range(module.num_layers):
        outs: list[Slot] = []
        for end in ("", "_reverse") if module.bidirectional else ("",):
            suffix = f"_l{number}{end}"
            given, own = (f"{p}{suffix}" for p in ("weight_ih", "weight_hh"))
            biases = [f"bias_{p}{suffix}" if module.bias else None for p in ("ih", "hh")]
            named = [None if b is None else build.attribute(f"{name}.{b}") for b in biases]
            inputs = build.emit(Linear(build.slot(), x, build.attribute(f"{name}.{given}"), named[0]))
            count = 3 if isinstance(module, nn.LSTM) else 2
            places = tuple(build.slot() for _ in range(count))
            scan = _scan(gates, first, bool(end))
            build.emit(Local(places, scan, (inputs, build.attribute(f"{name}.{own}"), named[1])))
            outs.append(places[0])
            lasts.append(places[1:])
        x = outs[0] if len(outs) == 1 else build.emit(Local(build.slot(), lambda *p: torch.cat(p, -1), tuple(outs)))
    ends = [
        build.emit(Local(build.slot(), lambda *parts: torch.stack(parts, 1), tuple(last[i] for last in lasts)))
        for i in range(len(lasts[0]))
    ]
    return (x, tuple(ends) if len(ends) > 1 else ends[0])


Gates = Callable[[Tensor, tuple[Tensor, ...], Tensor, Tensor | None], tuple[Tensor, ...]]


def _gates(module: nn.RNNBase) -> Gates:
    """One time step: (inputs [C, b, g], state, W_hh, b_hh) -> state, whose first part is the output."""

    def inner(state: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.bmm(state, weight.mT) if bias is None else torch.baddbmm(bias[:, None], state, weight.mT)

    def lstm(x: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        i, f, g, o = (x + inner(state[0], weight, bias)).chunk(4, -1)
        cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell

    def gru(x: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), inner(state[0], weight, bias).chunk(3, -1)
        reset, update = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        new = torch.tanh(xn + reset * hn)
        return (new + update * (state[0] - new),)

    squash = torch.relu if getattr(module, "nonlinearity", "tanh") == "relu" else torch.tanh

    def rnn(x: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        return (squash(x + inner(state[0], weight, bias)),)

    return lstm if isinstance(module, nn.LSTM) else gru if isinstance(module, nn.GRU) else rnn


def _scan(gates: Gates, batch_first: bool, backwards: bool) -> Callable[..., tuple[Tensor, ...]]:
    """All times: (inputs [C, b, T, g] or [C, T, b, g], W_hh, b_hh) -> outputs and last states."""

    def scan(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        axis = 2 if batch_first else 1
        times = list(inputs.unbind(axis))
        zero = inputs.new_zeros(*times[0].shape[:2], weight.shape[-1])
        state: tuple[Tensor, ...] = (zero, zero)
        outs: list[Tensor] = []
        for x in reversed(times) if backwards else times:
            state = gates(x, state, weight, bias)
            outs.append(state[0])
        return (torch.stack(outs[::-1] if backwards else outs, axis), *state)

    return scan
