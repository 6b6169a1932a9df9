"""A torch module as pure functions of one flat vector of its trainable parameters."""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportUnknownVariableType]
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.instancenorm import _InstanceNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.parameter import UninitializedParameter

from atoll import losses
from atoll import metrics as metric_registry
from atoll.errors import InvalidArgument, RunError, invalid
from atoll.random import key
from atoll.spec import Spec, attributes, canonical, digest, record, source_hash
from atoll.vectors import Layout

Batch = Mapping[str, Tensor]
"""Named tensors whose first axis is the example."""

Forward = Callable[[nn.Module, Batch], Tensor]
"""How a module is applied to a batch."""

NORMALISATION = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


INPUT_BYTES = 32 * 2**20
"""Activations of examples that go through a model at once when what flows into a layer is asked for."""


def apply_to_x(module: nn.Module, batch: Batch) -> Tensor:
    """The default forward: the module called with the field `x`."""
    return module(batch["x"])


class _Caller(nn.Module):
    """Holds the user's module so that `functional_call` can run any forward function on it."""

    def __init__(self, module: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.module = module
        self.apply_module = forward

    def forward(self, batch: Batch) -> Tensor:
        return self.apply_module(self.module, batch)


class Model:
    """A torch module, its loss and its metrics, seen as functions of one flat vector.

    Args:
        module: any module whose parameters are floating point. Parameters with `requires_grad=False` are constants.
            The module is copied; submodules that are in eval mode while the module is in train mode stay in eval mode,
            and their floating buffers are constants too (`atoll.freeze` makes such submodules).
        loss: a name (`atoll.losses.names()`), or callable(output, target) -> per-example losses [n] or their mean.
        metrics: names (`atoll.metrics.names()`) or metric objects.
        buffers: what happens to floating buffers such as BatchNorm statistics: "mean" averages them like parameters,
            "local" leaves them with the client, "frozen" never changes them (BatchNorm then normalises by them).
            Integer buffers always start from the module's values and never leave a client.
        forward: callable(module, batch) -> output, for modules that take more than the field `x`.
        features: name of the submodule whose output `features` returns.

    Raises:
        InvalidArgument: no trainable parameters, mixed or non-floating dtypes, unknown loss or metric.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: str | losses.Loss | Callable[[Tensor, Tensor], Tensor],
        metrics: Sequence[str | Any] = (),
        *,
        buffers: Literal["mean", "local", "frozen"] = "mean",
        forward: Forward | None = None,
        features: str | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise invalid("module", type(module).__name__, "a torch.nn.Module")
        if buffers not in ("mean", "local", "frozen"):
            raise invalid("buffers", buffers, '"mean", "local" or "frozen"')
        for name, tensor in module.named_parameters():
            if isinstance(tensor, UninitializedParameter):
                raise InvalidArgument(
                    f"parameter {name!r} has no shape yet: run the lazy module once on a batch first."
                )
        if isinstance(metrics, str):
            raise invalid("metrics", metrics, "a sequence of names", f"Write metrics=({metrics!r},).")
        self.loss = losses.get(loss)
        self._metrics = tuple(metrics)
        self.buffer_rule: Literal["mean", "local", "frozen"] = buffers
        self.forward_function = forward or apply_to_x
        self.features_name = features

        trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise InvalidArgument(
                "the module has no trainable parameters: pass one with parameters whose requires_grad is True."
            )
        dtypes = {p.dtype for p in trainable.values()}
        if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
            raise InvalidArgument(
                f"trainable parameters have dtypes {sorted(map(str, dtypes))}: they must share one floating dtype; "
                "convert the module with module.float() or module.double()."
            )
        self.dtype = dtypes.pop()
        self.layout = Layout.of(trainable)

        persistent = frozenset(module.state_dict(keep_vars=True))
        still = _still(module)
        floating = {
            n: b
            for n, b in module.named_buffers()
            if b.is_floating_point() and n in persistent and n not in still and buffers != "frozen"
        }
        self.buffer_layout = Layout.of(floating)
        self._counters = {
            n: b.detach().clone() for n, b in module.named_buffers() if not b.is_floating_point() and n in persistent
        }
        self._vector = self.layout.flatten(trainable)
        self._buffers = self.buffer_layout.flatten(floating).to(self.dtype).clone()

        # The training and the evaluating copy share every tensor; only their mode flags differ. What is trained is the
        # vector's alone: a model of a hundred million parameters is not kept twice.
        values = self.layout.view(self._vector)
        shared = {id(p): nn.Parameter(values[n]) for n, p in module.named_parameters() if n in values}
        training = copy.deepcopy(module, shared)
        if not module.training:
            training.train()
        if buffers == "frozen":
            for part in training.modules():
                if isinstance(part, _BatchNorm | _InstanceNorm):
                    part.eval()
        evaluating = copy.deepcopy(training, {id(t): t for t in (*training.parameters(), *training.buffers())}).eval()
        if features is not None and features not in dict(evaluating.named_modules()):
            names = [n for n, _ in evaluating.named_modules() if n]
            raise invalid("features", features, f"the name of a submodule: {', '.join(names)}")
        self.needs: str | None = None  # the one algorithm that may train it, where its vector has parts of other kinds
        self._training = _Caller(training, self.forward_function)
        self._evaluating = _Caller(evaluating, self.forward_function)
        self._activations: dict[tuple[Any, ...], int] = {}
        self._frozen_hash = _content(self.constants())

    def over(self, module: nn.Module) -> "Model":
        """Another module under this model's loss, metrics, rule for buffers and forward function."""
        return Model(module, self.loss, self._metrics, buffers=self.buffer_rule, forward=self.forward_function)

    # --- values -------------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Number of trainable parameters P."""
        return self.layout.size

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(m if isinstance(m, str) else str(m.name) for m in self._metrics)

    @property
    def given_metrics(self) -> tuple[Any, ...]:
        """The metrics as they were given: names or metric objects."""
        return self._metrics

    def metrics(self, output: Tensor) -> tuple[Any, ...]:
        """The metric objects, sized for this kind of output [n, ...]."""
        outputs = output.shape[1] if output.ndim > 1 else 1
        return tuple(metric_registry.get(m, outputs=outputs) for m in self._metrics)

    def init(self, seed: int | None = None) -> Tensor:
        """A start vector [P]: the module's own values, or values drawn anew by its layers from a seed.

        Args:
            seed: None for the module's own values (pretrained weights stay what they are).

        Raises:
            InvalidArgument: a layer holds trainable parameters but has no `reset_parameters` to draw them by.
            RunError: the values were given up (`forget`).
        """
        if self._vector.is_meta:
            raise RunError("this model has given up its values: take them from a state, or build it anew.")
        if seed is None:
            return self._vector.clone()
        module = self.module(self._vector)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key(seed, "init") & 0x7FFFFFFFFFFFFFFF)
            # From the inside out: a layer may set its parts' parameters after they have set themselves.
            for name, part in reversed(list(module.named_modules())):
                reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
                if callable(reset):
                    reset()
                elif any(p.requires_grad for p in part.parameters(recurse=False)):
                    raise InvalidArgument(
                        f"{name or 'the module'} ({type(part).__name__}) holds parameters but has no "
                        "reset_parameters(): add one, or use seed=None to start from the module's own values."
                    )
        values = {n: p for n, p in module.named_parameters() if p.requires_grad}
        return self.layout.flatten(values).clone()

    def forget(self) -> None:
        """Give up the values of what is trained, and their memory, where a state has them: `init` works no more."""
        self._vector = self._vector.to("meta")
        values, module = self.layout.view(self._vector), self._training.module
        kept = {id(t): t for t in (*module.parameters(), *module.buffers())}
        kept |= {id(p): nn.Parameter(values[n]) for n, p in module.named_parameters() if n in values}
        self._training = _Caller(copy.deepcopy(module, dict(kept)), self.forward_function)
        self._evaluating = _Caller(copy.deepcopy(self._evaluating.module, dict(kept)), self.forward_function)

    def init_buffers(self) -> Tensor:
        """The module's own floating buffers as one vector [B]."""
        return self._buffers.clone()

    def module(self, vector: Tensor, buffers: Tensor | None = None) -> nn.Module:
        """A copy of the module that holds these parameters [P] and buffers [B], in eval mode."""
        values = self.layout.view(vector.detach().to("cpu"))
        module = self._evaluating.module
        own = {id(p): nn.Parameter(values[n].clone()) for n, p in module.named_parameters() if n in values}
        out = copy.deepcopy(module, own)
        with torch.no_grad():
            if buffers is not None:
                held = self.buffer_layout.view(buffers.detach().to("cpu"))
                for name, buffer in out.named_buffers():
                    if name in held:
                        buffer.copy_(held[name])
        return out

    def norm_names(self) -> frozenset[str]:
        """Names of trainable parameters that belong to normalisation layers."""
        found: set[str] = set()
        for name, part in self._training.module.named_modules():
            if isinstance(part, NORMALISATION):
                found.update(f"{name}.{p}" if name else p for p, _ in part.named_parameters(recurse=False))
        return frozenset(found) & frozenset(self.layout.names)

    def modules(self) -> list[tuple[str, nn.Module]]:
        """Named submodules of the training copy, for rules that look at kinds of layers."""
        return list(self._training.module.named_modules())

    # --- functions ----------------------------------------------------------------------------------------------------

    def constants(self) -> dict[str, Tensor]:
        """What is neither trained nor travels: frozen parameters, and buffers outside the buffer vector."""
        module = self._training.module
        named = [*module.named_parameters(), *module.named_buffers()]
        own = {*self.layout.names, *self.buffer_layout.names, *self._counters}
        return {n: t for n, t in named if n not in own}

    @property
    def frozen_hash(self) -> str | None:
        """BLAKE2b of the constants' names and contents: part of what the model is. None: there are none."""
        return self._frozen_hash

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the constants, which a client needs once and which no round carries."""
        return sum(t.nbytes for t in self.constants().values())

    def adopt(self, constants: Mapping[str, Tensor], *, expected: str) -> None:
        """Take constants that came from elsewhere, before the model is used: a backbone that is sent once.

        Args:
            constants: all of them, by name, as `constants` gives them.
            expected: the `frozen_hash` they must have.

        Raises:
            InvalidArgument: names, shapes, dtypes or contents are not those expected; nothing is changed then.
        """
        own = self.constants()
        if constants.keys() != own.keys():
            odd = ", ".join(sorted(constants.keys() ^ own.keys())[:5])
            raise InvalidArgument(f"constants are not those of this model: {odd} are on one side only.")
        for name, tensor in own.items():
            given = constants[name]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise invalid(
                    name, f"{tuple(given.shape)} {given.dtype}", f"of shape {tuple(tensor.shape)} and {tensor.dtype}"
                )
        found = _content(constants)
        if found != expected:
            raise InvalidArgument(
                f"the constants have the hash {found}, but {expected} was expected: they were damaged, or belong to "
                "another model. Fetch them again."
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(constants[name])
        self._frozen_hash = found

    def counters(self) -> dict[str, Tensor]:
        """Fresh copies of the integer buffers."""
        return {n: b.clone() for n, b in self._counters.items()}

    def call(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Batch, *, train: bool
    ) -> Tensor:
        """Output [n, ...] for a batch; in training, `buffers` (floating and integer) are updated in place."""
        caller = self._training if train else self._evaluating
        state = {f"module.{n}": t for source in (parameters, buffers) for n, t in source.items()}
        output = cast(Tensor, functional_call(caller, state, (batch,)))
        if train:
            for name, tensor in buffers.items():
                # A module may assign a new tensor to its buffer instead of changing it in place.
                if (new := state[f"module.{name}"]) is not tensor:
                    tensor.copy_(new.detach())
        return output

    def settle(self, output: Tensor, target: Tensor) -> None:
        """Find out, on a first batch, whether a callable loss returns per-example losses or their mean."""
        if len(output) == 1:  # of one example, losses and their mean look alike
            output, target = torch.cat((output, output)), torch.cat((target, target))
        self.loss = self.loss.tried(output, target)

    def features(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Output of the submodule named by `features=`, in eval mode: [n, ...]."""
        return self.call_with_features(parameters, buffers, batch, train=False)[1]

    def call_with_features(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Batch, *, train: bool
    ) -> tuple[Tensor, Tensor]:
        """What `call` gives, and the output [n, ...] of the submodule named by `features=` on the way.

        Raises:
            InvalidArgument: no submodule is named, or its output is not one tensor with the example as first axis.
        """
        if self.features_name is None:
            raise InvalidArgument(
                'this model names no features: build it with Model(..., features="name.of.submodule").'
            )
        seen: list[object] = []

        def see(_module: nn.Module, _inputs: Any, out: object) -> None:
            seen.append(out.clone() if isinstance(out, Tensor) else out)  # the next layer may change it in place

        part = self.caller(train=train).get_submodule(f"module.{self.features_name}")
        handle = part.register_forward_hook(see)
        try:
            output = self.call(parameters, buffers, batch, train=train)
        finally:
            handle.remove()
        found = seen[-1] if seen else None
        if not isinstance(found, Tensor) or found.ndim == 0 or len(found) != len(output):
            raise invalid(
                "features", self.features_name, "a submodule that gives one tensor whose first axis is the example"
            )
        return output, found

    def inputs(
        self, layer: str, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Batch
    ) -> Tensor:
        """What flows into a named submodule, in eval mode: [n, ...]. A batch of any size; nothing is differentiated."""
        seen: list[Tensor] = []
        part = self._evaluating.module.get_submodule(layer)
        count = len(next(iter(batch.values())))
        step = max(1, INPUT_BYTES // self.activations(parameters, buffers, batch))
        handle = part.register_forward_pre_hook(lambda _module, given: seen.append(cast(Tensor, given[0])))
        try:
            with torch.no_grad():
                for begin in range(0, count, step):
                    some = {n: t[begin : begin + step] for n, t in batch.items()}
                    self.call(parameters, buffers, some, train=False)
        finally:
            handle.remove()
        return torch.cat(seen)

    def activations(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Batch) -> int:
        """Bytes that the layers give for one example of a batch, in eval mode; asked once for each shape."""
        few = {n: t[:4] for n, t in batch.items()}  # statistics of a batch need more than one
        shape = tuple((n, tuple(t.shape), t.dtype) for n, t in few.items())
        if shape not in self._activations:
            total = sum(t.nbytes for t in few.values())

            def add(_module: nn.Module, _inputs: Any, out: Any) -> None:
                nonlocal total
                total += out.nbytes if isinstance(out, Tensor) else 0

            leaves = [m for m in self._evaluating.module.modules() if next(m.children(), None) is None]
            handles = [leaf.register_forward_hook(add) for leaf in leaves]
            try:
                with torch.no_grad():
                    self.call(parameters, buffers, few, train=False)
            finally:
                for handle in handles:
                    handle.remove()
            self._activations[shape] = max(1, total // len(next(iter(few.values()))))
        return self._activations[shape]

    def caller(self, *, train: bool) -> nn.Module:
        """The copy behind the forward function, as engines trace it: the module is its child `module`."""
        return self._training if train else self._evaluating

    def to(self, device: torch.device) -> None:
        """Move the constants (frozen parameters, buffers) to a device."""
        self._training.to(device)
        self._evaluating.to(device)
        self._counters = {n: b.to(device) for n, b in self._counters.items()}

    @property
    def spec(self) -> Spec:
        """What the model is: structure, loss, metrics, rules; not the values of its trainable parameters."""
        module = self._evaluating.module
        own = sorted({type(m) for m in module.modules() if not type(m).__module__.startswith("torch.")}, key=repr)
        return record(
            "Model",
            module=repr(module),
            source={kind.__qualname__: source_hash(kind) for kind in own},
            parameters=[[n, list(s)] for n, s, _, _ in self.layout],
            dtype=str(self.dtype),
            frozen=self._frozen_hash,
            held=digest(*(b for _, b in module.named_buffers())),
            attributes={n: attributes(m, values=False) for n, m in module.named_modules() if type(m) in own},
            loss=self.loss.name if self.loss.kind != "any" else self.loss.function,
            metrics=[m if isinstance(m, str) else canonical(m) for m in self._metrics],
            buffers=self.buffer_rule,
            forward=self.forward_function,
        )

    def __repr__(self) -> str:
        kind = type(self._evaluating.module).__name__
        return f"Model({kind}, {self.size:,} parameters, loss={self.loss.name})"


def _still(module: nn.Module) -> frozenset[str]:
    """Names of buffers of submodules that stay in eval mode while the module is trained: nothing changes them."""
    if not module.training:
        return frozenset()
    return frozenset(
        f"{name}.{buffer}"
        for name, part in module.named_modules()
        if not part.training
        for buffer, _ in part.named_buffers(recurse=False)
    )


def _content(constants: Mapping[str, Tensor]) -> str | None:
    """A hash of named tensors, whatever their order."""
    if not constants:
        return None
    told = {n: digest(t) for n, t in sorted(constants.items())}
    return hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()
