"""The workloads every contestant trains: clients, examples, initial weights and cohorts, in numpy alone.

numpy alone, and nothing of Atoll: the environments of other frameworks import this file by its folder
(`benchmarks/speed/`). Everything is drawn from keyed generators: the same call gives the same arrays in every process
and every environment. Plain federated averaging with SGD, learning rate 0.1, one local epoch, cross-entropy, weights by
examples.

W1 to W6 are the workloads by which federated-learning frameworks are compared here, W4E is W4 with all clients equally
large, N1 to N6 are models that no tile width or fast path was chosen for.
"""

import gzip
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LR = 0.1
ARRAY = NDArray[np.float32]
WARMUP = 3
"""Rounds before those that are timed."""
MNIST_FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
MNIST_TEST_FILES = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a model that is a sequence of layers.

    Attributes:
        kind: linear, conv, norm, relu, tanh, pool, flatten, residual, embedding, positions, encoder or mean.
        sizes: linear (inputs, outputs); conv (channels in, channels out, kernel); norm (width,); embedding (words,
            width); positions (length, width); encoder (width, heads, hidden units).
        inner: the layers of a residual block.
    """

    kind: str
    sizes: tuple[int, ...] = ()
    inner: tuple["Layer", ...] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """A model and the clients that train it.

    Attributes:
        name: in the tables.
        what: the model in words.
        layers: the model.
        shape: of one example; integers below `words` where the model starts with an embedding.
        classes: labels.
        clients: the population.
        examples: of each client; the median where clients are ragged.
        cohort: clients in a round.
        batch: examples in a step.
        rounds: rounds of the whole experiment, where one is published.
        ragged: whether clients' sizes are log-normal.
        words: of the vocabulary; 0 where examples are numbers.
        mnist: whether the examples are MNIST's, where it is at hand.
    """

    name: str
    what: str
    layers: tuple[Layer, ...]
    shape: tuple[int, ...]
    classes: int
    clients: int
    examples: int
    cohort: int
    batch: int
    rounds: int = 0
    ragged: bool = False
    words: int = 0
    mnist: bool = False

    def __str__(self) -> str:
        sizes = "5 to 1,000 examples, median 60" if self.ragged else f"{equal_size(self)} examples"
        return f"{self.name}: {self.what}, {self.clients:,} clients x {sizes}, cohort {self.cohort}, batch {self.batch}"


@dataclass(frozen=True, slots=True)
class Packed:
    """Examples of all clients, one client after the other.

    Attributes:
        x: [N, ...], float32, or int64 words.
        y: labels [N].
        offsets: where each client's examples start, [clients + 1].
        source: "synthetic" or "MNIST".
        test: (x, y) that belong to no client, or None.
    """

    x: NDArray[np.generic]
    y: NDArray[np.int64]
    offsets: NDArray[np.int64]
    source: str = "synthetic"
    test: tuple[ARRAY, NDArray[np.int64]] | None = None

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Examples of each client."""
        return np.diff(self.offsets)

    def of(self, client: int) -> slice:
        """Where a client's examples are."""
        return slice(int(self.offsets[client]), int(self.offsets[client + 1]))


def _dense(*sizes: int, between: tuple[str, ...] = ("relu",)) -> tuple[Layer, ...]:
    """Linear layers with other layers between them."""
    made: list[Layer] = []
    for i, (below, above) in enumerate(pairwise(sizes)):
        made.append(Layer("linear", (below, above)))
        if i < len(sizes) - 2:
            made += [Layer(kind, (above,) if kind == "norm" else ()) for kind in between]
    return tuple(made)


_RELU, _POOL, _FLAT, _MEAN = Layer("relu"), Layer("pool"), Layer("flatten"), Layer("mean")
_BLOCK = Layer("residual", inner=_dense(64, 64, 64))
_CHARACTERS = (
    Layer("conv", (1, 32, 5)), _RELU, _POOL, Layer("conv", (32, 64, 5)), _RELU, _POOL, _FLAT, *_dense(1024, 512, 62),
)  # fmt: skip
_CIFAR = (
    Layer("conv", (3, 32, 3)), _RELU, Layer("conv", (32, 64, 3)), _RELU, _POOL, _FLAT, *_dense(12544, 128, 10),
)  # fmt: skip
_ENCODER = Layer("encoder", (32, 4, 64))
_W2 = Workload("W2", "MLP 784-200-10", _dense(784, 200, 10), (784,), 10, 1000, 60, 50, 20)
_N = Workload("N1", "", (), (64,), 10, 100, 60, 50, 20)

WORKLOADS: Mapping[str, Workload] = {
    load.name: load
    for load in (
        Workload("W1", "MLP 30-64-2", _dense(30, 64, 2), (30,), 2, 1000, 100, 100, 10),
        _W2,
        Workload("W3", "CNN of two 5x5 convolutions, 1024-512-62", _CHARACTERS, (1, 28, 28), 62, 200, 100, 10, 20),
        replace(_W2, name="W4", ragged=True),
        Workload("W5", "logistic regression 784-10", _dense(784, 10), (784,), 10, 1000, 60, 10, 10, 100, mnist=True),
        Workload("W6", "CNN of 1.63 M parameters", _CIFAR, (3, 32, 32), 10, 1000, 50, 50, 10, 1500),
        replace(_W2, name="W4E"),
        replace(_N, what="MLP 64-128-128-128-10", layers=_dense(64, 128, 128, 128, 10)),
        replace(
            _N,
            name="N2",
            what="MLP 64-128-128-10 with LayerNorm",
            layers=_dense(64, 128, 128, 10, between=("norm", "relu")),
        ),
        replace(_N, name="N3", what="MLP 64-128-128-10 with tanh", layers=_dense(64, 128, 128, 10, between=("tanh",))),
        replace(
            _N,
            name="N4",
            what="two residual blocks of width 64",
            layers=(Layer("linear", (64, 64)), _BLOCK, _BLOCK, Layer("linear", (64, 10))),
        ),
        replace(
            _N,
            name="N5",
            what="1,000 words embedded in 32, averaged over 20, 64-10",
            layers=(Layer("embedding", (1000, 32)), _MEAN, *_dense(32, 64, 10)),
            shape=(20,),
            words=1000,
        ),
        replace(
            _N,
            name="N6",
            what="two transformer encoder layers, width 32, 4 heads, 16 words of 100",
            layers=(
                Layer("embedding", (100, 32)),
                Layer("positions", (16, 32)),
                _ENCODER,
                _ENCODER,
                _MEAN,
                Layer("linear", (32, 10)),
            ),
            shape=(16,),
            words=100,
        ),
    )
}


ROUNDS: Mapping[str, int] = {
    "W1": 40, "W2": 20, "W3": 5, "W4": 15, "W4E": 15, "W5": 100, "W6": 1,
    **dict.fromkeys(("N1", "N2", "N3", "N4", "N5", "N6"), 20),
}  # fmt: skip
"""Rounds that are timed in one run; W5's are its whole experiment, without a warm-up."""


def smaller(load: Workload) -> Workload:
    """A workload to try things out with: few clients, the same model."""
    return replace(load, clients=min(load.clients, 20), cohort=min(load.cohort, 5), examples=min(load.examples, 40))


def generator(load: Workload, purpose: int, number: int = 0) -> np.random.Generator:
    """Draws of a workload for one purpose (sizes 0, examples 1, cohorts 2, orders 3, weights 4, digest 5, MNIST 6)."""
    return np.random.default_rng((2026, *load.name.encode(), purpose, number))


def equal_size(load: Workload) -> int:
    """Examples of each client where all have as many; W4E's have as many as W4's in the mean."""
    if load.name == "W4E":
        return round(float(sizes(replace(load, name="W4", ragged=True)).mean()))
    return load.examples


def sizes(load: Workload) -> NDArray[np.int64]:
    """Examples of each client."""
    if not load.ragged:
        return np.full(load.clients, equal_size(load), dtype=np.int64)
    drawn = load.examples * np.exp(generator(load, 0).standard_normal(load.clients))
    return np.clip(np.rint(drawn), 5, 1000).astype(np.int64)


def examples(load: Workload, folder: str | None = None) -> Packed:
    """The clients' examples.

    Args:
        load: the workload.
        folder: where MNIST is; default what ATOLL_DATA names. Without it W5's examples are synthetic, and say so.
    """
    offsets = np.concatenate(([0], np.cumsum(sizes(load))))
    if load.mnist:
        place = _mnist_folder(folder)
        if place is not None:
            return _mnist(load, place, offsets)
    draw, count = generator(load, 1), int(offsets[-1])
    if load.words:
        x = draw.integers(0, load.words, (count, *load.shape))
        scores = draw.standard_normal((load.words, load.classes), dtype=np.float32)[x].mean(axis=1)
        return Packed(x, scores.argmax(axis=1), offsets)
    values = draw.standard_normal((count, *load.shape), dtype=np.float32)
    truth = draw.standard_normal((int(np.prod(load.shape)), load.classes), dtype=np.float32)
    return Packed(values, (values.reshape(count, -1) @ truth).argmax(axis=1), offsets)


def cohort(load: Workload, number: int) -> NDArray[np.int64]:
    """The clients of a round, in ascending order."""
    return np.sort(generator(load, 2, number).choice(load.clients, load.cohort, replace=False))


def order(load: Workload, number: int, client: int, size: int) -> NDArray[np.int64]:
    """A client's order of examples in a round, for contestants that shuffle by numpy."""
    return generator(load, 3, number * load.clients + client).permutation(size)


def shapes(load: Workload) -> dict[str, tuple[int, ...]]:
    """Parameters' names and shapes, as the torch module built of these layers has them."""
    return dict(_shapes(load.layers, ""))


def _shapes(layers: tuple[Layer, ...], prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for i, layer in enumerate(layers):
        name, s = f"{prefix}{i}.", layer.sizes
        if layer.kind == "linear":
            yield from ((f"{name}weight", (s[1], s[0])), (f"{name}bias", (s[1],)))
        elif layer.kind == "conv":
            yield from ((f"{name}weight", (s[1], s[0], s[2], s[2])), (f"{name}bias", (s[1],)))
        elif layer.kind == "norm":
            yield from ((f"{name}weight", s), (f"{name}bias", s))
        elif layer.kind == "embedding":
            yield f"{name}weight", s
        elif layer.kind == "positions":
            yield f"{name}place", s
        elif layer.kind == "residual":
            yield from _shapes(layer.inner, f"{name}inner.")
        elif layer.kind == "encoder":
            width, _, hidden = s
            yield from (
                (f"{name}self_attn.in_proj_weight", (3 * width, width)),
                (f"{name}self_attn.in_proj_bias", (3 * width,)),
                (f"{name}self_attn.out_proj.weight", (width, width)),
                (f"{name}self_attn.out_proj.bias", (width,)),
                (f"{name}linear1.weight", (hidden, width)),
                (f"{name}linear1.bias", (hidden,)),
                (f"{name}linear2.weight", (width, hidden)),
                (f"{name}linear2.bias", (width,)),
                (f"{name}norm1.weight", (width,)),
                (f"{name}norm1.bias", (width,)),
                (f"{name}norm2.weight", (width,)),
                (f"{name}norm2.bias", (width,)),
            )


def initial(load: Workload) -> dict[str, ARRAY]:
    """The weights everybody starts from: normal by the number of inputs, biases nought, scales of norms one."""
    draw, made = generator(load, 4), dict[str, ARRAY]()
    for name, shape in shapes(load).items():
        if len(shape) == 1:
            made[name] = np.full(shape, float(not name.endswith("bias")), dtype=np.float32)
        else:
            scale = float(np.prod(shape[1:])) ** -0.5
            made[name] = draw.standard_normal(shape, dtype=np.float32) * np.float32(scale)
    return made


def flat(values: Mapping[str, NDArray[np.generic]], load: Workload) -> ARRAY:
    """Parameters as one vector [P], in the order of `shapes`."""
    return np.concatenate([np.asarray(values[name], dtype=np.float32).ravel() for name in shapes(load)])


def _mnist_folder(folder: str | None) -> Path | None:
    given = folder or os.environ.get("ATOLL_DATA")
    for place in (Path(given), Path(given) / "mnist") if given else ():
        if all((place / file).exists() for file in (*MNIST_FILES, *MNIST_TEST_FILES)):
            return place
    return None


def _mnist(load: Workload, folder: Path, offsets: NDArray[np.int64]) -> Packed:
    images, labels = (_idx(folder / file) for file in MNIST_FILES)
    taken = generator(load, 6).permutation(len(labels))[: offsets[-1]]
    test_images, test_labels = (_idx(folder / file) for file in MNIST_TEST_FILES)
    return Packed(
        _pixels(images[taken]),
        labels[taken].astype(np.int64),
        offsets,
        "MNIST",
        (_pixels(test_images), test_labels.astype(np.int64)),
    )


def _pixels(images: NDArray[np.uint8]) -> ARRAY:
    """Images as rows of numbers between 0 and 1."""
    return np.multiply(images.reshape(len(images), -1), np.float32(1 / 255), dtype=np.float32)


def _idx(path: Path) -> NDArray[np.uint8]:
    """An array of a gzipped idx file: two zero bytes, type 8, axes, sizes as big-endian integers, values."""
    raw = gzip.decompress(path.read_bytes())
    axes = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3]))
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(axes)
