"""Hand-written torch: rows as leaves, each model's forward as batched products, one backward of the summed loss.

The leaves are views of one matrix [clients, P]. The gradient of the sum of the clients' losses with respect to the rows
is the matrix of the clients' gradients; the step is taken in place. Every forward below is written for its model and
knows that all clients are equally large. The tile of each model is what was measured best.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from harness import Race, begin, reader
from torch import Tensor
from torch.nn import functional
from workloads import LR, flat, initial, shapes

Forward = Callable[[Sequence[Tensor], Tensor], Tensor]
"""(parameters [C, ...], batches [C, b, ...]) -> outputs [C, b, classes]."""


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[C, n, inputs] -> [C, n, outputs]."""
    return torch.baddbmm(bias[:, None], x, weight.mT)


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm of [C, n, width], each row of clients with its own scale and shift."""
    return torch.addcmul(bias[:, None], functional.layer_norm(x, x.shape[-1:]), weight[:, None])


def words(table: Tensor, x: Tensor) -> Tensor:
    """Rows of each client's own table [C, words, width] at x [C, n]."""
    return table.gather(1, x[..., None].expand(*x.shape, table.shape[2]))


def perceptron(p: Sequence[Tensor], x: Tensor) -> Tensor:
    """Linear layers with ReLU between them: W1, W2, W5, N1."""
    for i in range(0, len(p) - 2, 2):
        x = linear(x, p[i], p[i + 1]).relu()
    return linear(x, p[-2], p[-1])


def normalised(p: Sequence[Tensor], x: Tensor) -> Tensor:
    """N2: linear, LayerNorm, ReLU, twice, and a linear layer."""
    x = norm(linear(x, p[0], p[1]), p[2], p[3]).relu()
    x = norm(linear(x, p[4], p[5]), p[6], p[7]).relu()
    return linear(x, p[8], p[9])


def hyperbolic(p: Sequence[Tensor], x: Tensor) -> Tensor:
    """N3: linear layers with tanh between them."""
    return linear(linear(linear(x, p[0], p[1]).tanh(), p[2], p[3]).tanh(), p[4], p[5])


def residual(p: Sequence[Tensor], x: Tensor) -> Tensor:
    """N4: a linear layer, two residual blocks, a linear layer."""
    x = linear(x, p[0], p[1])
    x = x + linear(linear(x, p[2], p[3]).relu(), p[4], p[5])
    x = x + linear(linear(x, p[6], p[7]).relu(), p[8], p[9])
    return linear(x, p[10], p[11])


def embedded(p: Sequence[Tensor], x: Tensor) -> Tensor:
    """N5: the mean of the words' vectors, a hidden layer."""
    means = words(p[0], x.flatten(1)).unflatten(1, x.shape[1:]).mean(dim=2)
    return linear(linear(means, p[1], p[2]).relu(), p[3], p[4])


def transformer(p: Sequence[Tensor], x: Tensor) -> Tensor:
    """N6: words and places, two encoder layers of four heads, the mean, a linear layer."""
    clients, batch, length = x.shape
    width, heads = p[0].shape[2], 4
    h = words(p[0], x.flatten(1)).view(clients, batch, length, width) + p[1][:, None]
    h = h.flatten(1, 2)  # [C, b * length, width]
    for i in (2, 14):
        both = linear(h, p[i], p[i + 1]).view(clients * batch, length, 3, heads, width // heads)
        q, k, v = both.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        h = norm(h + linear(mixed.reshape(h.shape), p[i + 2], p[i + 3]), p[i + 8], p[i + 9])
        inside = linear(h, p[i + 4], p[i + 5]).relu()
        h = norm(h + linear(inside, p[i + 6], p[i + 7]), p[i + 10], p[i + 11])
    return linear(h.view(clients, batch, length, width).mean(dim=2), p[26], p[27])


MODELS: dict[str, tuple[Forward, int]] = {
    "W1": (perceptron, 100),
    "W2": (perceptron, 5),
    "W5": (perceptron, 10),
    "N1": (perceptron, 25),
    "N2": (normalised, 50),
    "N3": (hyperbolic, 25),
    "N4": (residual, 50),
    "N5": (embedded, 10),
    "N6": (transformer, 25),
}


class Rows:
    """A cohort's training, a tile of clients at a time."""

    def __init__(self, race: Race, tile: int) -> None:
        self.race, self.load, self.tile = race, race.load, tile
        self.forward = MODELS[race.options.workload][0]
        self.x = torch.from_numpy(race.data.x)
        self.y = torch.from_numpy(race.data.y)
        self.vector = torch.from_numpy(flat(initial(self.load), self.load))
        self.shapes = list(shapes(self.load).values())

    def turn(self, number: int, clients: Sequence[int]) -> None:
        """One round; all clients are equally large."""
        draw, batch, size = np.random.default_rng((7, number)), self.load.batch, self.load.examples
        total = torch.zeros_like(self.vector)
        for begin_ in range(0, len(clients), self.tile):
            tile = np.asarray(clients[begin_ : begin_ + self.tile])
            place = np.broadcast_to(np.arange(size), (len(tile), size))
            if not self.race.options.fixed:
                place = draw.random((len(tile), size), dtype=np.float32).argsort(axis=1)
            places = torch.from_numpy(place + tile[:, None] * size)
            rows = self.vector.repeat(len(tile), 1)
            leaves = self.leaves(rows)
            for taken in places.split(batch, dim=1):
                where = taken.reshape(-1)
                x = self.x.index_select(0, where).view(*taken.shape, *self.load.shape)
                scores = self.forward(leaves, x).flatten(0, 1)
                # The mean over a client's batch, summed over clients.
                loss = functional.cross_entropy(scores, self.y.index_select(0, where), reduction="sum")
                gradients = torch.autograd.grad(loss, leaves)
                with torch.no_grad():
                    torch._foreach_add_(leaves, gradients, alpha=-LR / taken.shape[1])
            total += rows.sum(dim=0)
        self.vector = total / len(clients)

    def leaves(self, rows: Tensor) -> list[Tensor]:
        """Views of the rows, one for each parameter, that gradients are taken of."""
        made, begin_ = list[Tensor](), 0
        for shape in self.shapes:
            length = int(np.prod(shape))
            made.append(rows[:, begin_ : begin_ + length].unflatten(1, shape).requires_grad_())
            begin_ += length
        return made


def main() -> None:
    parser = reader(__doc__)
    parser.add_argument("--tile", type=int, help="clients at a time; default what was measured best")
    options = parser.parse_args()
    if options.workload not in MODELS:
        parser.error(f"written for {', '.join(MODELS)} only")
    torch.set_num_threads(options.threads)
    race = begin("hand_rows", options)
    rows = Rows(race, options.tile or MODELS[options.workload][1])
    race.play(rows.turn)
    race.report(rows.vector.numpy(), f"{options.threads} thread(s), tiles of {rows.tile}", ("torch", "numpy"))


if __name__ == "__main__":
    main()
