"""Low-rank adapters: a layer whose weight W is used as W + scale * B A, with W as it was given.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang & Chen 2022, "LoRA: Low-rank adaptation of large language models",
equation 3. Every weight is seen as a matrix of rows by columns; A [rank, columns] begins random, B [rows, rank] at
zero, so that an adapted model begins as the model it adapts.

Linear, embedding and convolutional layers do it on activations, by two small layers beside the given one. Of any other
layer with matrices (attention, recurrent and transformer layers, layers of other libraries) the weights themselves are
put together before the layer is called: a product of the weight's size for every call.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportUnknownVariableType]
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from atoll.errors import InvalidArgument

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.RNNBase, nn.RNNCellBase)
"""Layers that read the weights of their parts themselves: they are adapted as a whole."""


class Adapted(NamedTuple):
    """Where an adapted weight and its factors stand, by the names of parameters.

    Attributes:
        given: name of the weight in the given module.
        weight: its name beside the adapter.
        down: one factor.
        up: the other.
        turned: whether `down` is B and `up` is A transposed (embeddings, whose rows are looked up).
    """

    given: str
    weight: str
    down: str
    up: str
    turned: bool

    @property
    def a(self) -> str:
        """Name of the factor that begins random."""
        return self.up if self.turned else self.down

    @property
    def b(self) -> str:
        """Name of the factor that begins at zero."""
        return self.down if self.turned else self.up

    def product(self, values: Mapping[str, Tensor], lead: int = 0) -> Tensor:
        """B A, without the scale: [rows, columns], or [C, rows, columns] of factors with `lead` = 1 more axis."""
        down, up = values[self.down], values[self.up]
        return down @ up.mT if self.turned else up.flatten(lead + 1) @ down.flatten(lead + 1)


class LowRank(nn.Module):
    """A linear, embedding or convolutional layer with a low-rank layer beside it."""

    def __init__(self, base: nn.Module, rank: int, scale: float) -> None:
        super().__init__()
        weight = cast(Tensor, base.weight)
        self.base, self.scale, self.rank = base, scale, rank
        if isinstance(base, nn.Embedding):
            self.down: nn.Module = nn.Embedding(base.num_embeddings, rank, padding_idx=base.padding_idx)
            self.up: nn.Module = nn.Linear(rank, base.embedding_dim, bias=False)
        elif isinstance(base, _ConvNd):
            kind: Any = type(base)
            self.down = kind(
                base.in_channels, rank, base.kernel_size, base.stride, base.padding, base.dilation, bias=False
            )
            self.up = kind(rank, base.out_channels, 1, bias=False)
        else:
            linear = cast(nn.Linear, base)
            self.down = nn.Linear(linear.in_features, rank, bias=False)
            self.up = nn.Linear(rank, linear.out_features, bias=False)
        self.to(weight)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives, and what the adapter adds."""
        return self.base(x) + self.scale * self.up(self.down(x))

    def extra_repr(self) -> str:
        """Rank and scale, which are part of what a model is."""
        return f"rank={self.rank}, scale={self.scale:g}"

    def adapted(self, name: str) -> list[Adapted]:
        """The layer's weight and factors, when the layer has this name."""
        turned = isinstance(self.base, nn.Embedding)
        factors = (f"{name}.down.weight", f"{name}.up.weight")
        return [Adapted(f"{name}.weight", f"{name}.base.weight", *factors, turned)]


class Reweighted(nn.Module):
    """Any layer with matrices, called with W + scale * B A in the place of each."""

    def __init__(self, base: nn.Module, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale, self.rank = base, scale, rank
        self.matrices = [n for n, p in base.named_parameters() if p.ndim >= 2]
        own = dict(base.named_parameters())
        self.A = nn.ParameterDict({_key(n): own[n].new_zeros(rank, own[n][0].numel()) for n in self.matrices})
        self.B = nn.ParameterDict({_key(n): own[n].new_zeros(len(own[n]), rank) for n in self.matrices})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives under its adapted weights."""
        own = dict(self.base.named_parameters())
        changed = {
            n: own[n] + self.scale * (self.B[_key(n)] @ self.A[_key(n)]).view(own[n].shape) for n in self.matrices
        }
        return functional_call(self.base, changed, args, kwargs)

    def extra_repr(self) -> str:
        """Rank and scale."""
        return f"rank={self.rank}, scale={self.scale:g}"

    def adapted(self, name: str) -> list[Adapted]:
        """The layer's weights and factors, when the layer has this name."""
        return [
            Adapted(f"{name}.{n}", f"{name}.base.{n}", f"{name}.A.{_key(n)}", f"{name}.B.{_key(n)}", turned=False)
            for n in self.matrices
        ]


def _key(name: str) -> str:
    return name.replace(".", "_")


def refusal(module: nn.Module) -> str | None:
    """Why a layer cannot be adapted, or None."""
    if isinstance(module, WHOLE):
        return None
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            return "its max_norm, sparse or scaled gradients act on the weight itself"
        return None
    if type(module) in CONVOLUTIONS:
        convolution = cast(_ConvNd, module)
        if convolution.groups != 1:
            return "each group of its channels would need factors of its own"
        if convolution.padding_mode != "zeros":
            return f"it is padded by {convolution.padding_mode!r}"
        return None
    if any(p.ndim >= 2 for p in module.parameters(recurse=False)):
        return None
    return "it holds no matrix of its own"


def adapt(module: nn.Module, rank: int, scale: float) -> "LowRank | Reweighted":
    """A layer with an adapter beside it."""
    light = type(module) in CONVOLUTIONS or isinstance(module, nn.Embedding) or type(module) is nn.Linear
    return LowRank(module, rank, scale) if light else Reweighted(module, rank, scale)


def check_rank(name: str, module: nn.Module, rank: int) -> None:
    """Refuse a rank that is no low one for a layer."""
    for n, p in module.named_parameters():
        if p.ndim >= 2 and (light := min(len(p), p[0].numel())) < rank:
            raise InvalidArgument(
                f"rank={rank} is not allowed: the weight {n!r} of {name!r} is {tuple(p.shape)}, of rank {light} at "
                "most. Lower rank, or leave this layer out of targets."
            )
