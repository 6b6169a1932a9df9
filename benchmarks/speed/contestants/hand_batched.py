"""Hand-written torch: clients as rows of batched products, the backward written out, the step inside the product.

It knows that the model is linear layers with ReLU between them and that the loss is cross-entropy; it checks, counts
and keeps nothing. Gradients are never written: each weight takes its step in the product that would have made its
gradient. Clients are sorted by size; whole batches run over all rows that still have one, then what is left of each.
"""

from collections.abc import Sequence

import numpy as np
import torch
from harness import Race, begin, reader
from torch import Tensor
from workloads import LR, flat, initial

TILES = {"W1": (100, 100), "W2": (5, 10), "W4": (5, 10), "W4E": (5, 10), "W5": (10, 10)}
"""Clients at a time on one thread and on more, as measured best."""


class Batched:
    """A cohort's training, a tile of clients at a time."""

    def __init__(self, race: Race, tile: int) -> None:
        self.race, self.load, self.tile = race, race.load, tile
        data = race.data
        self.x = torch.from_numpy(data.x)
        self.targets = torch.zeros(len(data.y), self.load.classes)
        self.targets[torch.arange(len(data.y)), torch.from_numpy(data.y)] = 1.0
        self.start = {name: torch.from_numpy(value) for name, value in initial(self.load).items()}
        names = list(self.start)
        self.pairs = list(zip(names[::2], names[1::2], strict=True))

    def turn(self, number: int, clients: Sequence[int]) -> None:
        """One round."""
        sizes, offsets, batch = self.race.data.sizes, self.race.data.offsets, self.load.batch
        draw = np.random.default_rng((7, number))
        chosen = np.asarray(clients)
        chosen = chosen[np.argsort(-sizes[chosen], kind="stable")]
        totals = {name: torch.zeros_like(value) for name, value in self.start.items()}
        for begin_ in range(0, len(chosen), self.tile):
            tile = chosen[begin_ : begin_ + self.tile]
            count, longest = sizes[tile], int(sizes[tile[0]])
            rows = {name: value.expand(len(tile), *value.shape).clone() for name, value in self.start.items()}
            place = np.broadcast_to(np.arange(longest), (len(tile), longest))
            if not self.race.options.fixed:
                keys = draw.random((len(tile), longest), dtype=np.float32)
                keys[place >= count[:, None]] = 2.0  # what a client does not have comes last
                place = keys.argsort(axis=1)
            places = torch.from_numpy(place + offsets[tile][:, None])
            whole = count // batch
            for step in range(int(whole[0])):
                active = int((whole > step).sum())
                self.step(rows, slice(0, active), places[:active, step * batch : (step + 1) * batch])
            for row in np.flatnonzero(count % batch):
                self.step(rows, slice(row, row + 1), places[row : row + 1, int(whole[row]) * batch : int(count[row])])
            weights = torch.from_numpy(count.astype(np.float32))
            for name, total in totals.items():
                total.view(-1).addmv_(rows[name].flatten(1).T, weights)
        everything = float(sizes[chosen].sum())
        self.start = {name: total.div_(everything) for name, total in totals.items()}

    def step(self, rows: dict[str, Tensor], active: slice, places: Tensor) -> None:
        """One step of some rows, each on its own batch."""
        flat_places, shape = places.reshape(-1), places.shape
        inside = [self.x.index_select(0, flat_places).view(*shape, -1)]
        last = len(self.pairs) - 1
        weights = [(rows[w][active], rows[b][active]) for w, b in self.pairs]
        slope = torch.empty(0)
        for i, (weight, bias) in enumerate(weights):
            scores = torch.baddbmm(bias[:, None], inside[-1], weight.mT)
            if i < last:
                inside.append(scores.relu_())
            else:
                slope = torch.softmax(scores, dim=2)
        slope.sub_(self.targets.index_select(0, flat_places).view(*shape, -1))
        scale = -LR / shape[1]
        for i in range(last, -1, -1):
            weight, bias = weights[i]
            below = torch.bmm(slope, weight).mul_(inside[i] > 0) if i else slope
            weight.baddbmm_(slope.mT, inside[i], alpha=scale)
            bias.add_(slope.sum(dim=1), alpha=scale)
            slope = below


def main() -> None:
    parser = reader(__doc__)
    parser.add_argument("--tile", type=int, help="clients at a time; default what was measured best")
    options = parser.parse_args()
    if options.workload not in TILES:
        parser.error(f"written for {', '.join(TILES)} only")
    torch.set_num_threads(options.threads)
    race = begin("hand_batched", options)
    batched = Batched(race, options.tile or TILES[options.workload][options.threads > 1])
    race.play(batched.turn)
    vector = flat({name: value.numpy() for name, value in batched.start.items()}, race.load)
    race.report(vector, f"{options.threads} thread(s), tiles of {batched.tile}", ("torch", "numpy"))


if __name__ == "__main__":
    main()
