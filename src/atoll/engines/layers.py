"""A forward of many rows made of batched layers: linear layers as batched products, the rest on one more axis.

A module is traced once to the graph of the layers and operations it is made of. Each has a form on rows, whose tensors
are [C, b, ...] where the module's own are [b, ...]. A module that uses anything else, or whose control flow depends
on its input, has no such form: `trace` says why, and the general batching transform runs it instead.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from atoll.model import Batch, Model

ELEMENTWISE_LAYERS = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Tanhshrink,
)  # fmt: skip
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
ELEMENTWISE: frozenset[Any] = frozenset({
    torch.relu, torch.tanh, torch.sigmoid, torch.exp, torch.abs, torch.sqrt, torch.square, torch.sin, torch.cos,
    functional.relu, functional.gelu, functional.silu, functional.leaky_relu, functional.elu, functional.softplus,
    functional.mish, functional.tanh, functional.sigmoid, functional.hardtanh, functional.logsigmoid, operator.neg,
})  # fmt: skip
BINARY: frozenset[Any] = frozenset({
    operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.iadd, operator.imul,
    torch.add, torch.sub, torch.mul, torch.div,
})  # fmt: skip
METHODS = frozenset({"relu", "tanh", "sigmoid", "exp", "abs", "sqrt", "square", "contiguous", "float"})


class Unsupported(Exception):
    """A module has no form on rows; the text says what it uses."""


class Layers:
    """The row form of a model's training forward."""

    def __init__(self, model: Model) -> None:
        self._root = model.caller
        try:
            self._graph = fx.Tracer().trace(self._root)
        except Exception as error:
            raise Unsupported(f"it cannot be traced ({type(error).__name__})") from error
        self._modules = dict(self._root.named_modules())
        # A tied parameter has several names, and its values stand under the first.
        tensors = [
            *self._root.named_parameters(remove_duplicate=False),
            *self._root.named_buffers(remove_duplicate=False),
        ]
        first: dict[int, str] = {}
        self._names = {n: first.setdefault(id(t), n).removeprefix("module.") for n, t in tensors}
        for node in self._graph.nodes:
            self._check(node)

    def __call__(self, leaves: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Batch, rows: int) -> Tensor:
        """Outputs [C, b, ...] of rows on their own batches [C, b, ...]; buffers are updated in place."""
        values: dict[fx.Node, Any] = {}
        tensors = _Tensors(self._root, self._names, leaves, buffers, rows)
        for node in self._graph.nodes:
            args = fx.map_arg(node.args, lambda n: values[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
            if node.op == "placeholder":
                values[node] = batch
            elif node.op == "output":
                return cast(Tensor, cast(tuple[Any, ...], args)[0])
            elif node.op == "get_attr":
                values[node] = tensors(cast(str, node.target))
            elif node.op == "call_module":
                name = cast(str, node.target)
                values[node] = _layer(self._modules[name], name, tensors, cast(tuple[Any, ...], args)[0])
            elif node.op == "call_function":
                values[node] = _function(node.target, args, kwargs)
            else:
                values[node] = _method(cast(str, node.target), args, kwargs)
        raise Unsupported("it returns nothing")

    def _check(self, node: fx.Node) -> None:
        if node.op == "call_module":
            module = self._modules[cast(str, node.target)]
            reason = _refuse_layer(module)
            if reason or len(node.args) != 1 or node.kwargs:
                raise Unsupported(reason or f"the layer {type(module).__name__} takes more than one input")
        elif node.op == "call_function":
            known = node.target in ELEMENTWISE or node.target in BINARY
            if not known and node.target not in (operator.getitem, torch.flatten, getattr):
                raise Unsupported(f"the function {getattr(node.target, '__name__', node.target)}")
        elif node.op == "call_method" and node.target not in METHODS | {"flatten", "view", "reshape", "size", "mean"}:
            raise Unsupported(f"the method {node.target}")


class _Tensors:
    """Parameters and buffers by the traced module's names, one per row [C, ...]."""

    def __init__(
        self,
        root: nn.Module,
        names: Mapping[str, str],
        leaves: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        rows: int,
    ) -> None:
        self._root, self._names, self._given, self.rows = root, names, (leaves, buffers), rows

    def __call__(self, name: str) -> Tensor:
        own = self._names.get(name, name)
        for given in self._given:
            if own in given:
                return given[own]
        constant = operator.attrgetter(name)(self._root)
        if not isinstance(constant, Tensor):
            raise Unsupported(f"the attribute {name}")
        return constant.expand(self.rows, *constant.shape)


def _refuse_layer(module: nn.Module) -> str | None:
    """Why a layer has no form on rows, or None."""
    kind = type(module)
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:  # pyright: ignore[reportPrivateUsage]
        return f"the layer {kind.__name__} with hooks"
    if kind in (*ELEMENTWISE_LAYERS, *DROPOUTS, nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.Flatten):
        return None
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        norm = cast(_BatchNorm, module)
        return "BatchNorm with a cumulative average" if norm.momentum is None else None
    if kind is nn.Embedding:
        table = cast(nn.Embedding, module)
        odd = table.padding_idx is not None or table.max_norm is not None or table.sparse or table.scale_grad_by_freq
        return "an Embedding with padding, max_norm, sparse or scaled gradients" if odd else None
    if kind in (nn.Softmax, nn.LogSoftmax):
        return "a softmax without dim" if cast(nn.Softmax, module).dim is None else None
    return f"the layer {kind.__name__}"


def _layer(module: nn.Module, name: str, tensors: _Tensors, x: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        bias = tensors(f"{name}.bias") if isinstance(getattr(module, "bias", None), Tensor) else None
        return _linear(x, tensors(f"{name}.weight"), bias)
    if isinstance(module, nn.LayerNorm):
        out = functional.layer_norm(x, module.normalized_shape, eps=module.eps)
        return _affine(out, module, name, tensors, lead=x.ndim - 1 - len(module.normalized_shape))
    if isinstance(module, nn.GroupNorm):
        out = functional.group_norm(x.flatten(0, 1), module.num_groups, eps=module.eps).view_as(x)
        return _affine(out, module, name, tensors, lead=1, trail=x.ndim - 3)
    if isinstance(module, _BatchNorm):
        return _batch_norm(module, name, tensors, x)
    if isinstance(module, nn.Embedding):
        weight = tensors(f"{name}.weight")
        # The rows' tables stand one after the other: an index out of range would read another client's.
        if x.numel() and (int(x.min()) < 0 or int(x.max()) >= module.num_embeddings):
            raise IndexError(f"index out of range in {name}: {int(x.min())}..{int(x.max())} of {module.num_embeddings}")
        start = torch.arange(tensors.rows, device=x.device).view(-1, *(1,) * (x.ndim - 1)) * module.num_embeddings
        return functional.embedding(x + start, weight.reshape(-1, module.embedding_dim))
    if isinstance(module, nn.Flatten):
        return x.flatten(_shift(module.start_dim), _shift(module.end_dim))
    if isinstance(module, nn.Softmax | nn.LogSoftmax):
        assert module.dim is not None
        function = functional.softmax if isinstance(module, nn.Softmax) else functional.log_softmax
        return function(x, dim=_shift(module.dim))
    # Elementwise layers and dropout, whose masks the keyed mode draws for all rows, take any shape.
    return module(x)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(len(x), -1, x.shape[-1])
    wide = weight.transpose(1, 2)
    out = torch.bmm(flat, wide) if bias is None else torch.baddbmm(bias[:, None], flat, wide)
    return out.view(*x.shape[:-1], -1)


def _affine(out: Tensor, module: nn.Module, name: str, tensors: _Tensors, *, lead: int, trail: int = 0) -> Tensor:
    """Scale and shift a normalised [C, b, ...] by parameters [C, ...], `lead` axes after the rows."""
    for part, function in (("weight", torch.mul), ("bias", torch.add)):
        if getattr(module, part, None) is not None:
            own = tensors(f"{name}.{part}")
            out = function(out, own.view(len(own), *(1,) * lead, *own.shape[1:], *(1,) * trail))
    return out


def _batch_norm(module: _BatchNorm, name: str, tensors: _Tensors, x: Tensor) -> Tensor:
    """Rows become channels: every row's features are normalised over its own batch."""
    rows, size = x.shape[:2]
    channels = x.transpose(0, 1).reshape(size, rows * x.shape[2], *x.shape[3:])
    tracked = module.running_mean is not None
    held = [tensors(f"{name}.{part}") for part in ("running_mean", "running_var")] if tracked else []
    flat = [t.reshape(-1).clone() for t in held] or [None, None]
    affine = [tensors(f"{name}.{part}").reshape(-1) if module.affine else None for part in ("weight", "bias")]
    training = module.training or not tracked
    assert module.momentum is not None
    out = functional.batch_norm(channels, flat[0], flat[1], affine[0], affine[1], training, module.momentum, module.eps)
    if tracked and module.training:
        for own, new in zip(held, flat, strict=True):
            assert new is not None
            own.copy_(new.view_as(own))
        tensors(f"{name}.num_batches_tracked").add_(1)
    return out.view(size, rows, *x.shape[2:]).transpose(0, 1)


def _function(target: Any, args: Any, kwargs: Any) -> Any:
    if target is getattr:
        if args[1] != "shape":
            raise Unsupported(f"the attribute {args[1]}")
        return args[0].shape[1:]
    if target is operator.getitem:
        held, index = args
        if not isinstance(held, Tensor):
            return held[index]
        return held[(slice(None), *(index if isinstance(index, tuple) else (index,)))]
    if target is torch.flatten:
        return _method("flatten", args, kwargs)
    if target in BINARY:
        left, right = _aligned(args[0], args[1])
        return target(left, right, *args[2:], **kwargs)
    return target(*args, **kwargs)


def _method(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, rest = cast(Tensor, args[0]), list(args[1:])
    if name == "size":
        return x.shape[1:][rest[0]] if rest else x.shape[1:]
    if name == "flatten":
        start = rest[0] if rest else kwargs.get("start_dim", 0)
        end = rest[1] if len(rest) > 1 else kwargs.get("end_dim", -1)
        return x.flatten(_shift(start), _shift(end))
    if name in ("view", "reshape"):
        shape = rest[0] if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
        return x.reshape(len(x), *cast(Sequence[int], shape))
    if name == "mean":
        dim = rest[0] if rest else kwargs.get("dim")
        if dim is None:
            raise Unsupported("a mean over the whole batch")
        dims = [_shift(d) for d in dim] if isinstance(dim, list | tuple) else _shift(cast(int, dim))
        return x.mean(dims, keepdim=bool(kwargs.get("keepdim", rest[1] if len(rest) > 1 else False)))
    function = cast(Callable[..., Tensor], getattr(x, name))
    return function(*rest, **kwargs)


def _shift(dim: int) -> int:
    """An axis of [b, ...] as an axis of [C, b, ...]."""
    return dim + 1 if dim >= 0 else dim


def _aligned(left: Any, right: Any) -> tuple[Any, Any]:
    """Two operands aligned from their last axis, as torch aligns the module's own, with the rows left in front."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        ndim = max(left.ndim, right.ndim)
        left, right = (t.view(len(t), *(1,) * (ndim - t.ndim), *t.shape[1:]) for t in (left, right))
    return left, right
