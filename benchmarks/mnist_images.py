"""MNIST dealt out to clients, or noise of the same shape for runs of seconds; used by the scripts beside it."""

from typing import Any

import torch

import atoll

SMALL = 20
"""Images of each client where they are noise."""


def images(clients: int, *, partition: str, seed: int, synthetic: bool, **options: Any) -> atoll.FederatedDataset:
    """MNIST dealt out to the clients with the official test images as the holdout, or noise of the same shape.

    Args:
        clients: how many.
        partition: as for `atoll.datasets.mnist`.
        seed: of the partition, of the cut, and of the noise.
        synthetic: noise whose labels can be read off it, in place of MNIST.
        options: further arguments of `atoll.datasets.mnist`.
    """
    if not synthetic:
        return atoll.datasets.mnist(clients, partition=partition, seed=seed, **options)
    flat = options.pop("flat", False)
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (clients * SMALL + 200,), generator=draw)
    pixels = torch.rand(len(labels), 784, generator=draw) * 0.2
    pixels[torch.arange(len(labels)), labels * 70] += 2.0
    x = pixels if flat else pixels.view(-1, 1, 28, 28)
    known, held = slice(clients * SMALL), slice(clients * SMALL, None)
    cut = options.pop("test", None)
    dealt = getattr(atoll.partition, partition)((x[known], labels[known]), clients, seed=seed, test=cut, **options)
    return atoll.FederatedDataset(
        dealt.clients, dealt.train, validation=dealt.validation, test=dealt.test,
        holdout={"x": x[held], "y": labels[held]}, name="noise of MNIST's shape",
    )  # fmt: skip
