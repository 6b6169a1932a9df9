"""Hand-written torch: one client after the other, autograd, a step in place, no optimiser objects.

What a careful person writes in a page. With `--processes 2` the cohort is dealt out, largest clients first, to forked
processes of one thread each that share the examples and the vectors; a round costs one message to each of them.
"""

import multiprocessing
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from harness import Race, begin, reader
from modules import module, tensors, vector
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from workloads import LR


class Trainer:
    """Trains clients on one thread; their weighted sum is what it gives back."""

    def __init__(self, race: Race) -> None:
        self.load, self.data, self.fixed = race.load, race.data, race.options.fixed
        self.network = module(self.load)
        self.x, self.y = tensors(self.data)
        if race.options.channels_last:
            self.x = self.x.to(memory_format=torch.channels_last)
        self.weights = list(self.network.parameters())
        self.flat = torch.empty(sum(weight.numel() for weight in self.weights))
        begin = 0
        for weight in self.weights:  # parameters become views of one vector: loading a model is one copy
            part = self.flat[begin : begin + weight.numel()]
            if race.options.channels_last and weight.dim() == 4:
                above, below, height, width = weight.shape
                view = part.view(above, height, width, below).permute(0, 3, 1, 2)
            else:
                view = part.view(weight.shape)
            view.copy_(weight.data)
            weight.data = view
            begin += weight.numel()

    def vector(self, flat: Tensor) -> NDArray[np.float32]:
        """A model in the order everybody reports it in."""
        self.flat.copy_(flat)
        return vector(self.network)

    def train(self, start: Tensor, clients: Sequence[int], number: int, total: Tensor) -> None:
        """Add the clients' models times their examples to `total`."""
        draw = torch.Generator().manual_seed(number)
        for client in clients:
            self.flat.copy_(start)
            where = self.data.of(client)
            x, y, size = self.x[where], self.y[where], where.stop - where.start
            if not self.fixed:
                order = torch.randperm(size, generator=draw)
                x, y = x[order], y[order]
            for inputs, labels in zip(x.split(self.load.batch), y.split(self.load.batch), strict=True):
                loss = functional.cross_entropy(self.network(inputs), labels)
                gradients = torch.autograd.grad(loss, self.weights)
                with torch.no_grad():
                    torch._foreach_add_(self.weights, gradients, alpha=-LR)
            total.add_(self.flat, alpha=float(size))


def shares(race: Race, clients: Sequence[int], count: int) -> list[list[int]]:
    """Deal clients out, the largest first, each to the share that has least so far."""
    sizes, made, held = race.data.sizes, [list[int]() for _ in range(count)], [0] * count
    for client in sorted(clients, key=lambda c: -int(sizes[c])):
        least = held.index(min(held))
        made[least].append(client)
        held[least] += int(sizes[client])
    return made


def serve(trainer: Trainer, start: Tensor, total: Tensor, pipe: Any) -> None:
    """A forked process: trains what it is sent, on its own copy of the trainer, until it is sent nothing."""
    torch.set_num_threads(1)
    while (task := pipe.recv()) is not None:
        total.zero_()
        trainer.train(start, *task, total)
        pipe.send(True)


def main() -> None:
    parser = reader(__doc__)
    parser.add_argument("--processes", type=int, default=1, help="forked processes")
    parser.add_argument("--channels-last", action="store_true", help="keep images and kernels channels last")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    race = begin("hand_loop", options)
    sizes, layout = race.data.sizes, ", channels last" if options.channels_last else ""
    trainer = Trainer(race)
    if options.processes == 1:
        start = trainer.flat.clone()
        total = torch.zeros_like(start)

        def turn(number: int, clients: list[int]) -> None:
            total.zero_()
            trainer.train(start, clients, number, total)
            torch.div(total, float(sizes[clients].sum()), out=start)

        race.play(turn)
        race.report(trainer.vector(start), f"{options.threads} thread(s){layout}", ("torch", "numpy"))
        return
    start = trainer.flat.clone().share_memory_()
    totals = [torch.zeros_like(start).share_memory_() for _ in range(options.processes)]
    context = multiprocessing.get_context("fork")
    pipes = []
    for total in totals:
        here, there = context.Pipe()
        context.Process(target=serve, args=(trainer, start, total, there), daemon=True).start()
        pipes.append(here)

    def turn_together(number: int, clients: list[int]) -> None:
        for pipe, share in zip(pipes, shares(race, clients, len(pipes)), strict=True):
            pipe.send((share, number))
        for pipe in pipes:
            pipe.recv()
        torch.div(torch.stack(totals).sum(dim=0), float(sizes[clients].sum()), out=start)

    race.play(turn_together)
    variant = f"{options.processes} processes of one thread{layout}"
    race.report(trainer.vector(start), variant, ("torch", "numpy"))
    for pipe in pipes:
        pipe.send(None)


if __name__ == "__main__":
    main()
