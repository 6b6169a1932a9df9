"""What the common suites run over: every algorithm, every engine, every kind of model. List a new one here."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from atoll import aggregators, transforms
from atoll.algorithms import (
    Algorithm,
    apfl,
    cyclic,
    ditto,
    fedadagrad,
    fedadam,
    fedala,
    fedavg,
    fedavgm,
    fedbabu,
    fedbn,
    feddyn,
    fedexp,
    fednova,
    fedper,
    fedprox,
    fedrep,
    fedsgd,
    fedyogi,
    fine_tune,
    ifca,
    lg_fedavg,
    local_only,
    moon,
    per_fedavg,
    pfedme,
    pooled,
    qfedavg,
    scaffold,
)
from atoll.data import FederatedDataset
from atoll.engines import Engine, Loop, Vectorized
from atoll.local import Plan, local_sgd
from atoll.model import Model
from atoll.rounds import Process
from atoll.transforms import Transform

# --- engines ----------------------------------------------------------------------------------------------------------


class Factored(Vectorized):
    """Every weight that can stand as factors does, however small."""

    def _choose(self, process: Process, data: FederatedDataset) -> None:
        super()._choose(process, data)
        assert self._paths is not None
        uses = {n: use._replace(most=10**9) for n, use in self._paths.uses.items()}
        self._paths = replace(self._paths, uses=uses)


ENGINES: dict[str, Callable[[], Engine]] = {
    "loop": Loop,
    "rows": lambda: Vectorized("rows"),
    "rows, tile of 1": lambda: Vectorized("rows", tile=1),
    "rows, tile of 3": lambda: Vectorized("rows", tile=3),
    "factors": Factored,
    "factors, tile of 3": lambda: Factored(tile=3),
    "single": lambda: Vectorized("single"),
    "auto": lambda: Vectorized(),
}


def on(*names: str, long: bool = False) -> pytest.MarkDecorator:
    """Run a test on engines; where it takes long, in the quick suite on the first alone."""
    slow = [[] if i == 0 or not long else [pytest.mark.slow] for i in range(len(names))]
    cases = [pytest.param(ENGINES[n], id=n, marks=m) for n, m in zip(names, slow, strict=True)]
    return pytest.mark.parametrize("engine", cases)


# --- algorithms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """An algorithm as the common suites build it.

    Attributes:
        build: (plan) -> algorithm.
        plain: only plain sgd plans are allowed.
        whole: only one step on all examples is allowed.
        norms: the model needs normalisation layers.
        optimum: it reaches the optimum of the clients' unweighted mean loss whatever the number of local steps.
        averages: one local step on everybody is gradient descent on the mean loss.
        rates: only local sgd is allowed, with or without momentum.
        private: some parameters, named head or body, stay with the client.
        several: it keeps several global models.
    """

    build: Callable[[Plan], Algorithm]
    plain: bool = False
    whole: bool = False
    norms: bool = False
    optimum: bool = False
    averages: bool = True
    rates: bool = False
    private: bool = False
    several: bool = False

    def plan(self, lr: float = 0.05, **options: Any) -> Plan:
        """A local plan this algorithm accepts."""
        if self.whole:
            return local_sgd(lr, steps=1, batch_size=None)
        return local_sgd(lr, **options)


ALGORITHMS: dict[str, Method] = {
    "fedavg": Method(fedavg),
    "fedavgm": Method(lambda p: fedavgm(p, lr=0.7, momentum=0.5), averages=False),
    "fedadam": Method(lambda p: fedadam(p, lr=0.1), averages=False),
    "fedyogi": Method(lambda p: fedyogi(p, lr=0.1), averages=False),
    "fedadagrad": Method(lambda p: fedadagrad(p, lr=0.1), averages=False),
    "fedsgd": Method(fedsgd, plain=True, whole=True),
    "scaffold option 1": Method(lambda p: scaffold(p, option=1), plain=True, optimum=True),
    "scaffold option 2": Method(lambda p: scaffold(p, option=2), plain=True, optimum=True),
    "fedprox": Method(lambda p: fedprox(p, mu=0.3)),
    "fednova": Method(lambda p: fednova(p, mu=0.2), rates=True),
    "feddyn": Method(lambda p: feddyn(p, alpha=0.5), plain=True, averages=False),
    "fedexp": Method(fedexp, averages=False),
    "qfedavg": Method(lambda p: qfedavg(p, q=0.5), plain=True, averages=False),
    "fedper": Method(lambda p: fedper(p, private=("head.*",)), averages=False, private=True),
    "lg_fedavg": Method(lambda p: lg_fedavg(p, private=("body.*",)), averages=False, private=True),
    "fedrep": Method(lambda p: fedrep(p, private=("head.*",)), averages=False, private=True),
    "fedbabu": Method(lambda p: fedbabu(p, private=("head.*",), tuned="private"), averages=False, private=True),
    "fedbn": Method(fedbn, norms=True, averages=False),
    "fine_tune": Method(fine_tune),
    "ditto": Method(lambda p: ditto(p, lam=0.4)),
    "apfl": Method(lambda p: apfl(p, alpha=0.3), plain=True),
    "apfl, fixed share": Method(lambda p: apfl(p, alpha=0.3, adaptive=False), plain=True),
    "pfedme": Method(lambda p: pfedme(p, lam=2.0, eta=0.1, inner=3), plain=True, averages=False),
    "per_fedavg": Method(lambda p: per_fedavg(p, alpha=0.1), plain=True, averages=False),
    "per_fedavg, first order": Method(lambda p: per_fedavg(p, alpha=0.1, first_order=True), plain=True, averages=False),
    "moon": Method(lambda p: moon(p, mu=0.8, temperature=0.3)),
    "fedala": Method(lambda p: fedala(p, eta=2.0, first=12, settled=0.01), averages=False),
    "fedala, the head": Method(lambda p: fedala(p, adapt=("[hx]*",), sample=0.5, first=2), averages=False),
    "ifca": Method(lambda p: ifca(p, clusters=3), averages=False, several=True),
    "local_only": Method(local_only, averages=False),
    "pooled": Method(pooled),
    "cyclic": Method(cyclic),
}

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "clip_norm": lambda: transforms.clip_norm(0.05),
    "client_momentum": transforms.client_momentum,
    "norm_bound": lambda: transforms.norm_bound(50.0),
    "reject_nonfinite": transforms.reject_nonfinite,
    "quantize": lambda: transforms.quantize(8),
    "half": transforms.half,
    "half, bfloat16": lambda: transforms.half("bfloat16"),
    "sign": transforms.sign,
    "top_k": lambda: transforms.top_k(0.3),
    "rand_k": lambda: transforms.rand_k(0.4),
    "rotate": transforms.rotate,
    "rotate, small blocks": lambda: transforms.rotate(block=8),
    "eden": lambda: transforms.eden(3),
    "local_noise": lambda: transforms.local_noise(9.0, clip=0.05, seed=1),
    "power_sgd": lambda: transforms.power_sgd(1),
    "entropy_code": transforms.entropy_code,
    "error_feedback": lambda: transforms.error_feedback(transforms.top_k(0.3)),
    "error_feedback of power_sgd": lambda: transforms.error_feedback(transforms.power_sgd(2)),
    "error_feedback of codes": lambda: transforms.error_feedback(transforms.top_k(0.5), transforms.quantize(6)),
}

AGGREGATORS: dict[str, Callable[[], aggregators.Aggregator]] = {
    "mean": aggregators.mean,
    "uniform mean": lambda: aggregators.mean(weights="uniform"),
    "median": aggregators.median,
    "trimmed mean": lambda: aggregators.trimmed_mean(drop=1),
    "trimmed mean, a fraction": lambda: aggregators.trimmed_mean(drop=0.2),
    "meamed": lambda: aggregators.meamed(byzantine=1),
    "krum": lambda: aggregators.krum(byzantine=1),
    "multi-krum": lambda: aggregators.multi_krum(byzantine=1),
    "multi-krum of two": lambda: aggregators.multi_krum(byzantine=1, keep=2),
    "bulyan": lambda: aggregators.bulyan(byzantine=1),
    "mda": lambda: aggregators.mda(byzantine=1),
    "geometric median": aggregators.geometric_median,
    "centred clipping": lambda: aggregators.centered_clipping(radius=3.0, iterations=2),
    "norm bound": aggregators.norm_bound,
    "norm bound, given": lambda: aggregators.norm_bound(0.5, then=aggregators.median()),
    "nnm, trimmed mean": lambda: aggregators.nnm(byzantine=1, then=aggregators.trimmed_mean(drop=1)),
    "nnm, krum": lambda: aggregators.nnm(byzantine=1, then=aggregators.krum(byzantine=1)),
    "buckets, median": lambda: aggregators.bucketing(size=2, then=aggregators.median()),
    "buckets, nnm, geometric median": lambda: aggregators.bucketing(
        size=2, then=aggregators.nnm(byzantine=1, then=aggregators.geometric_median())
    ),
}

# --- models -----------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """An LSTM that classifies a sequence by its last state."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.LSTM(3, 4, num_layers=2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Attention(nn.Module):
    """One attention layer over a sequence."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x, x, x, need_weights=False)[0].mean(dim=1))


class Encoder(nn.Module):
    """A transformer's encoder layer over a sequence."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(dim=1))


class Words(nn.Module):
    """Embedded words, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(dim=1))


class Operations(nn.Module):
    """Operations between layers: parameters of its own, broadcasts, a residual, views, slices and means."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.position = nn.Parameter(torch.randn(2, 3))
        self.scale = nn.Parameter(torch.ones(1, 3))
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 3)
        self.register_buffer("offset", torch.tensor([0.1, 0.2, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).view(x.shape[0], 2, 3) + self.position
        h = h + self.scale * torch.tanh(self.norm(h)) - self.offset
        return self.head(h.mean(1) + 0.5 * h[:, -1])

    def reset_parameters(self) -> None:
        nn.init.normal_(self.position)
        nn.init.ones_(self.scale)


class Last(nn.Module):
    """A recurrent layer of any kind that classifies a sequence by its last states."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.body = kind(3, 4, batch_first=True, **options)
        self.head = nn.Linear(8 if self.body.bidirectional else 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        last = self.body(x)[1]
        if isinstance(self.body, nn.LSTM):
            last = last[0]
        return self.head(torch.cat((last[0], last[1]), 1) if self.body.bidirectional else last[-1])


class Projected(nn.Module):
    """An LSTM with projections, which has no form on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(3, 4, proj_size=2, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Hidden(nn.Module):
    """A linear layer that hides from traces behind a decision about its input."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim > 2:
            raise ValueError("one axis too many")
        return self.inner(x) if float(x.shape[0]) > 0 else x


class TimeFirst(nn.Module):
    """A GRU and attention that want time as the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.GRU(3, 4)
        self.look = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.transpose(0, 1))[0]
        return self.head((h + self.look(h, h, h)[0]).mean(0))


class ByHand(nn.Module):
    """Attention written with matrix products, chunks and transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 12, bias=False)
        self.norm = nn.RMSNorm(4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.body(self.norm(x)).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.transpose(-2, -1) / 2.0, dim=-1)
        h = torch.cat((x, weights @ v), dim=-1).permute(0, 2, 1)
        return self.head(1.0 - h.unsqueeze(1).squeeze(1).sum(dim=2))


class Wild(nn.Module):
    """Convolutions of many kinds: strides, dilation, groups, padding, transposed, one axis; pools in between."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=2, bias=False)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, padding="same")
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.line = nn.Conv1d(3, 2, 3, padding=1)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.max_pool2d(functional.gelu(self.grouped(self.body(x))), 2)
        h = functional.avg_pool2d(self.up(h), 2, stride=1)
        return self.head(functional.adaptive_avg_pool1d(self.line(h.flatten(2)), 5).flatten(1))


class Frozen(nn.Module):
    """A body of frozen layers of many kinds under a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv2d(1, 2, 2)
        self.back = nn.Linear(18, 5)
        self.middle = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)
        for part in (self.conv, self.back):
            part.requires_grad_(False)
        self.middle.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(torch.relu(self.back(self.conv(self.norm(x)).flatten(1))))))


class Tied(nn.Module):
    """Embeds and scores words by one and the same matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.body.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.body(x).mean(dim=1)).tanh())


def stack(**parts: nn.Module) -> nn.Sequential:
    """Layers in a row, with names; the last is called head."""
    module = nn.Sequential()
    for name, part in parts.items():
        module.add_module(name, part)
    return module


def frozen_body() -> nn.Module:
    """A perceptron whose first layer is not trained."""
    module = stack(body=nn.Linear(4, 5), act=nn.Tanh(), head=nn.Linear(5, 3))
    module.get_submodule("body").requires_grad_(False)
    return module


def squares(output: Tensor, target: Tensor) -> Tensor:
    """A loss per example, [n]."""
    return (output - nn.functional.one_hot(target, output.shape[1]).to(output)).square().sum(dim=1)


def mean_squares(output: Tensor, target: Tensor) -> Tensor:
    """The mean of `squares`."""
    return squares(output, target).mean()


@dataclass(frozen=True)
class Kind:
    """A kind of model with the data it takes.

    Attributes:
        module: builds it.
        inputs: shape of one example.
        words: inputs are word numbers.
        classes: of the targets.
        loss: name or callable.
        buffers: the model's rule.
        single: part of the reason why the fast path runs it one client at a time; None where it runs rows.
        rows: whether `Vectorized("rows")` can run it.
        written: whether it has a program; else rows go through the batching transform.
        pairs: needs batches of at least two examples.
    """

    module: Callable[[], nn.Module]
    inputs: tuple[int, ...] = (4,)
    words: bool = False
    classes: int = 3
    loss: Any = "cross_entropy"
    buffers: Any = "mean"
    single: str | None = None
    rows: bool = True
    written: bool = True
    pairs: bool = False
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def model(self, dtype: torch.dtype = torch.float64, metrics: tuple[str, ...] = ()) -> Model:
        """The model, with the same start values at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            module = self.module().to(dtype)
        features = {"features": "head"} if any(n == "head" for n, _ in module.named_children()) else {}
        return Model(module, self.loss, metrics, buffers=self.buffers, **{**features, **self.options})

    def data(self, sizes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> FederatedDataset:
        """Clients c0, c1, ... with these numbers of random examples; each has a shift of its own."""
        draw = torch.Generator().manual_seed(seed)
        clients: dict[str, tuple[Tensor, Tensor]] = {}
        for i, n in enumerate(sizes):
            if self.words:
                x = torch.randint(0, 7, (n, *self.inputs), generator=draw)
            else:
                x = torch.randn(n, *self.inputs, generator=draw, dtype=torch.float64).to(dtype) + 0.3 * i
            clients[f"c{i}"] = (x, torch.randint(0, self.classes, (n,), generator=draw))
        return FederatedDataset.from_arrays(clients, test=clients)


def _mlp(**between: nn.Module) -> Callable[[], nn.Module]:
    return lambda: stack(body=nn.Linear(4, 5), act=nn.Tanh(), **between, head=nn.Linear(5, 3))


def _normed(norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: stack(body=nn.Linear(4, 6), norm=norm(), act=nn.Tanh(), head=nn.Linear(6, 3))


def _images(**between: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: stack(
        body=nn.Conv2d(2, 4, 3),
        **{name: part() for name, part in between.items()},
        act=nn.ReLU(),
        flat=nn.Flatten(),
        head=nn.Linear(16, 3),
    )


_DRAWS = "random numbers"
_CONVOLUTION = "convolution"

MODELS: dict[str, Kind] = {
    "perceptron": Kind(_mlp()),
    "perceptron, loss per example": Kind(_mlp(), loss=squares),
    "perceptron, mean loss": Kind(_mlp(), loss=mean_squares),
    "dropout": Kind(_mlp(drop=nn.Dropout(0.4))),
    "dropout in place": Kind(
        lambda: stack(body=nn.Linear(4, 5), drop=nn.Dropout(0.4, inplace=True), act=nn.Tanh(), head=nn.Linear(5, 3))
    ),
    "random leaks": Kind(_mlp(leak=nn.RReLU()), single=_DRAWS, rows=False),
    "frozen body": Kind(frozen_body),
    "operations": Kind(Operations),
    "layer norm": Kind(_normed(lambda: nn.LayerNorm(6))),
    "group norm": Kind(_normed(lambda: nn.GroupNorm(2, 6))),
    "batch norm, mean": Kind(_normed(lambda: nn.BatchNorm1d(6)), pairs=True),
    "batch norm of sequences": Kind(
        lambda: stack(body=nn.Linear(4, 4), norm=nn.BatchNorm1d(5), flat=nn.Flatten(), head=nn.Linear(20, 3)), (5, 4)
    ),
    "attention, batch norm": Kind(
        lambda: stack(body=Attention(), norm=nn.BatchNorm1d(3), head=nn.Linear(3, 3)), (5, 4), pairs=True
    ),
    "batch norm, local": Kind(_normed(lambda: nn.BatchNorm1d(6)), buffers="local", pairs=True),
    "batch norm, frozen": Kind(_normed(lambda: nn.BatchNorm1d(6)), buffers="frozen"),
    "batch norm, cumulative": Kind(
        _normed(lambda: nn.BatchNorm1d(6, momentum=None)), single="batched forward fails", rows=False, pairs=True
    ),
    "convolution": Kind(_images(), (2, 4, 4)),
    "convolution, batch norm": Kind(_images(norm=lambda: nn.BatchNorm2d(4)), (2, 4, 4)),
    "convolution, group norm": Kind(_images(norm=lambda: nn.GroupNorm(2, 4)), (2, 4, 4)),
    "convolution, dropout of channels": Kind(_images(drop=lambda: nn.Dropout2d(0.5)), (2, 4, 4)),
    "convolutions of many kinds": Kind(Wild, (2, 9, 9)),
    "convolutions in a row": Kind(
        lambda: stack(
            body=nn.Conv2d(2, 5, 3, padding=1), act=nn.ReLU(inplace=True), pool=nn.MaxPool2d(2),
            more=nn.Conv2d(5, 4, 2, stride=2), silu=nn.SiLU(), flat=nn.Flatten(), head=nn.Linear(16, 3),
        ),
        (2, 8, 8),
    ),
    "convolution in space": Kind(
        lambda: stack(body=nn.Conv3d(1, 2, 2), pool=nn.MaxPool3d(2), flat=nn.Flatten(), head=nn.Linear(2, 3)),
        (1, 3, 3, 3),
    ),
    "frozen layers": Kind(Frozen, (1, 4, 4)),
    "convolution, instance norm": Kind(
        _images(norm=lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), (2, 4, 4),
        single=_CONVOLUTION, written=False,
    ),
    "recurrent": Kind(Recurrent, (5, 3)),
    "recurrent, gru": Kind(lambda: Last(nn.GRU, num_layers=2), (5, 3)),
    "recurrent, relu": Kind(lambda: Last(nn.RNN, nonlinearity="relu", bias=False), (5, 3)),
    "recurrent, both ways": Kind(lambda: Last(nn.LSTM, bidirectional=True), (5, 3)),
    "recurrent, with projections": Kind(lambda: Projected(), (5, 3), single="recurrent", rows=False),
    "time first": Kind(TimeFirst, (5, 3)),
    "attention by hand": Kind(ByHand, (5, 4)),
    "recurrent, dropout": Kind(lambda: Recurrent(0.3), (5, 3), single="recurrent", rows=False),
    "attention": Kind(Attention, (5, 4)),
    "attention, dropout": Kind(lambda: Attention(0.3), (5, 4), single=_DRAWS, rows=False),
    "transformer": Kind(Encoder, (5, 4)),
    "transformer, dropout": Kind(lambda: Encoder(0.3), (5, 4), single=_DRAWS, rows=False),
    "embedding": Kind(Words, (5,), words=True),
    "tied weights": Kind(Tied, (5,), words=True, classes=7),
}  # fmt: skip
