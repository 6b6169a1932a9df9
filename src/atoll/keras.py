"""Keras 3 models on their torch backend, as modules that `Model` takes.

A Keras layer reads its own variables whatever parameters it is handed: torch's `functional_call` would train nothing.
`Stateless` holds the variables as parameters and buffers of its own and calls the Keras model through `stateless_call`,
which takes them as arguments and returns those it has renewed.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atoll.errors import InvalidArgument, invalid
from atoll.model import Model
from atoll.spec import source_hash

SEED = "seed_generator_state"
"""Keras's name for the state that its random layers draw from."""


class _Held:
    """A Keras model that is no submodule, and is never copied: what it computes depends on its arguments alone."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __deepcopy__(self, memo: Any) -> "_Held":
        return self


class Stateless(nn.Module):
    """A Keras model whose variables are this module's parameters and buffers.

    What a layer holds that is not `trainable` is a frozen parameter: a constant of the model, which never travels.
    Names are those of Keras without the counter of the process: `dense/kernel`, `dense_1/bias`, whatever was built
    before. Masks of Keras's random layers are drawn from torch's generator, which keys them by client, round and step.

    Args:
        model: a built Keras model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        renamed = _renamed(model)
        self._held = _Held(model)
        self._trained = _names(model, model.trainable_variables, renamed)
        self._others = _names(model, model.non_trainable_variables, renamed)
        for name, variable in zip(self._trained, model.trainable_variables, strict=True):
            self.register_parameter(name, nn.Parameter(_value(variable)))
        frozen = {
            id(variable)
            for part in model._flatten_layers()  # pyright: ignore[reportPrivateUsage]
            if not part.trainable
            for variable in part.variables
        }
        self._seeds = frozenset(
            n for n, v in zip(self._others, model.non_trainable_variables, strict=True) if v.name == SEED
        )
        for name, variable in zip(self._others, model.non_trainable_variables, strict=True):
            if name in self._seeds:
                continue
            if id(variable) in frozen:
                self.register_parameter(name, nn.Parameter(_value(variable), requires_grad=False))
            else:
                self.register_buffer(name, _value(variable))
        self.config = _config(model, renamed)

    def forward(self, x: Any) -> Tensor:
        """The Keras model's output, in training or inference mode as this module is; buffers are renewed in place."""
        import keras

        if isinstance(x, torch.fx.Proxy):
            raise TypeError("a Keras model has no graph of torch's layers")
        trained = [getattr(self, n) for n in self._trained]
        others = [self._drawn() if n in self._seeds else getattr(self, n) for n in self._others]
        with keras.device(f"{trained[0].device.type}:{trained[0].device.index or 0}"):
            output, renewed = self._held.model.stateless_call(trained, others, x, training=self.training)
        for name, old, new in zip(self._others, others, renewed, strict=True):
            if name in self._buffers and new is not old:
                old.copy_(new.detach())
        return output

    def keras(self) -> Any:
        """A copy of the Keras model with this module's values."""
        import keras

        made = keras.models.clone_model(self._held.model)
        made.build(self._held.model.input_shape)
        for names, variables in (
            (self._trained, made.trainable_variables),
            (self._others, made.non_trainable_variables),
        ):
            for name, variable in zip(names, variables, strict=True):
                if name not in self._seeds:
                    variable.assign(getattr(self, name).detach())
        return made

    def _drawn(self) -> Tensor:
        """A state for Keras's generators."""
        if not self.training:
            return torch.zeros(2, dtype=torch.int32)
        return torch.randint(2**31 - 1, (2,), dtype=torch.int32)


def from_keras(
    model: Any,
    loss: str | Callable[[Tensor, Tensor], Tensor],
    metrics: Sequence[str | Any] = (),
    *,
    buffers: Literal["mean", "local"] = "mean",
) -> Model:
    """A Keras 3 model as an `atoll.Model`; it starts from the Keras model's own weights, which stay as they are.

    Args:
        model: a built `keras.Model` on Keras's torch backend; what it was compiled with is not used.
        loss: as for `atoll.Model`.
        metrics: as for `atoll.Model`.
        buffers: what happens to moving statistics: "mean" or "local". To freeze them set `layer.trainable = False`.

    Returns:
        The model. `result.module().keras()` gives a trained Keras model back.

    Raises:
        InvalidArgument: another backend, a model that has no weights yet, regularisers or constraints (which Keras's
            own training applies), or a part whose dtype is not that of the others.
    """
    try:
        import keras
    except ImportError as error:
        raise InvalidArgument(
            f"from_keras needs Keras 3, which cannot be imported ({error}). Install it with `pip install atoll[keras]` "
            'and set os.environ["KERAS_BACKEND"] = "torch" before it is imported.'
        ) from error
    backend = str(keras.backend.backend())
    if backend != "torch":
        raise InvalidArgument(
            f"Keras runs on its backend {backend!r}, but Atoll trains torch tensors: set KERAS_BACKEND=torch in the "
            'environment, or os.environ["KERAS_BACKEND"] = "torch", before keras is first imported.'
        )
    if not isinstance(model, keras.Model):
        raise invalid("model", type(model).__name__, "a keras.Model", "A torch module goes into atoll.Model.")
    if not model.built:
        raise InvalidArgument(
            f"the Keras model {model.name!r} has no weights yet: begin it with keras.Input(shape), or call it once."
        )
    parts = model._flatten_layers()  # pyright: ignore[reportPrivateUsage]
    active = [part.name for part in parts if getattr(part, "activity_regularizer", None) is not None]
    if active:
        raise InvalidArgument(
            f"the Keras layer {active[0]!r} adds regularisation of what it gives to the loss, which would be left out: "
            "remove its activity_regularizer."
        )
    if model.losses:
        raise InvalidArgument(
            f"{len(model.losses)} of the Keras model's layers add regularisation to the loss, which would be left out: "
            "remove it, and use local_sgd(weight_decay=...)."
        )
    for variable in model.trainable_variables:
        if variable.constraint is not None:
            raise InvalidArgument(
                f"{variable.path} has a constraint, which would not be applied: remove it from the Keras layer."
            )
    if buffers not in ("mean", "local"):
        raise invalid("buffers", buffers, '"mean" or "local"', "Freeze a layer by layer.trainable = False.")
    return Model(Stateless(model), loss, metrics, buffers=buffers)


def _value(variable: Any) -> Tensor:
    return torch.as_tensor(variable.value).detach().to("cpu").clone()


def _renamed(model: Any) -> dict[str, str]:
    """Keras's name of each part of the model's paths -> the same without the counter of the process."""
    found, counts = dict[str, str](), dict[str, int]()
    for variable in model.variables:
        for part in _parts(model, variable)[:-1]:
            if part not in found:
                base = re.sub(r"_\d+$", "", part).replace(".", "_")
                found[part] = base if base not in counts else f"{base}_{counts[base]}"
                counts[base] = counts.get(base, 0) + 1
    return found


def _parts(model: Any, variable: Any) -> list[str]:
    """A variable's path, without the name of the whole model that some begin with."""
    parts = str(variable.path).split("/")
    return parts[1:] if len(parts) > 2 and parts[0] == model.name else parts


def _names(model: Any, variables: Sequence[Any], renamed: dict[str, str]) -> tuple[str, ...]:
    """Names of variables."""
    names = list[str]()
    for variable in variables:
        *parts, own = _parts(model, variable)
        names.append("/".join([*(renamed[p] for p in parts), own]))
    doubled = {n for n in names if names.count(n) > 1}
    return tuple(f"{n}/{i}" if n in doubled else n for i, n in enumerate(names))


def _config(model: Any, renamed: dict[str, str]) -> str:
    """What tells the model from others: its layers as JSON, and the source of layers that are not Keras's."""
    text = str(model.to_json())
    for old, new in renamed.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    own = {type(part) for part in model._flatten_layers() if not type(part).__module__.startswith("keras.")}
    return json.dumps([text.replace(f'"{model.name}"', '"model"'), sorted(str(source_hash(kind)) for kind in own)])
