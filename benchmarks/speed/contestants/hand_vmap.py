"""Hand-written torch: `vmap(grad(loss))` over the cohort, eager or compiled.

Rows are grouped by true batch size, as ragged clients need it. `--compile` compiles the transformed function.
"""

from collections.abc import Sequence

import numpy as np
import torch
from harness import Race, begin, reader
from modules import module, tensors
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from workloads import LR


class Mapped:
    """A cohort's training, a tile of clients at a time."""

    def __init__(self, race: Race, tile: int, *, compiled: bool) -> None:
        self.race, self.load, self.tile = race, race.load, tile
        network = module(self.load)
        self.start = {name: value.detach().clone() for name, value in network.named_parameters()}
        self.x, self.y = tensors(race.data)

        def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return functional.cross_entropy(functional_call(network, values, (x,)), y)

        gradients = vmap(grad(loss))

        def step(values: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
            slopes = gradients(values, x, y)
            return {name: value - LR * slopes[name] for name, value in values.items()}

        self.step = torch.compile(step) if compiled else step

    def turn(self, number: int, clients: Sequence[int]) -> None:
        """One round."""
        sizes, offsets, batch = self.race.data.sizes, self.race.data.offsets, self.load.batch
        draw, chosen = np.random.default_rng((7, number)), np.asarray(clients)
        chosen = chosen[np.argsort(-sizes[chosen], kind="stable")]
        totals = {name: torch.zeros_like(value) for name, value in self.start.items()}
        for begin_ in range(0, len(chosen), self.tile):
            tile = chosen[begin_ : begin_ + self.tile]
            count, longest = sizes[tile], int(sizes[tile[0]])
            place = np.broadcast_to(np.arange(longest), (len(tile), longest))
            if not self.race.options.fixed:
                keys = draw.random((len(tile), longest), dtype=np.float32)
                keys[place >= count[:, None]] = 2.0  # what a client does not have comes last
                place = keys.argsort(axis=1)
            places = torch.from_numpy(place + offsets[tile][:, None])
            rows = {name: value.expand(len(tile), *value.shape) for name, value in self.start.items()}
            steps = -(-count // batch)
            for step in range(int(steps[0])):
                # Clients that are done leave from the end; a last batch that is smaller is a row of its own.
                active = int((steps > step).sum())
                self.add(totals, rows, slice(active, None), count)
                left = np.minimum(count[:active] - step * batch, batch)
                whole = int((left == batch).sum())
                parts = [slice(0, whole)] if whole else []
                parts += [slice(row, row + 1) for row in range(whole, active)]
                taken = [places[part, step * batch : step * batch + int(left[part.start])] for part in parts]
                stepped = [
                    self.step({name: value[part] for name, value in rows.items()}, self.x[at], self.y[at])
                    for part, at in zip(parts, taken, strict=True)
                ]
                rows = stepped[0] if len(stepped) == 1 else {n: torch.cat([s[n] for s in stepped]) for n in rows}
            self.add(totals, rows, slice(0, None), count)
        everything = float(sizes[chosen].sum())
        self.start = {name: total.div_(everything) for name, total in totals.items()}

    @staticmethod
    def add(totals: dict[str, Tensor], rows: dict[str, Tensor], done: slice, count: NDArray[np.int64]) -> None:
        """Add rows that are done, times their examples, to the sums."""
        held = len(next(iter(rows.values())))
        weights = torch.from_numpy(count[:held][done].astype(np.float32))
        if len(weights):
            for name, total in totals.items():
                total.view(-1).addmv_(rows[name][done].flatten(1).T, weights)


def main() -> None:
    parser = reader(__doc__)
    parser.add_argument("--compile", action="store_true", help="compile the function")
    parser.add_argument("--tile", type=int, help="clients at a time; default the whole cohort")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    race = begin("hand_vmap", options)
    mapped = Mapped(race, options.tile or race.load.cohort, compiled=options.compile)
    race.play(mapped.turn)
    vector = torch.cat([value.flatten() for value in mapped.start.values()]).numpy()
    how = "compiled" if options.compile else "eager"
    race.report(vector, f"{how}, {options.threads} thread(s), tiles of {mapped.tile}", ("torch", "numpy"))


if __name__ == "__main__":
    main()
