"""A process over sites that are well, driven by hand: the shortest road from a plan to a model."""

from collections.abc import Callable, Mapping
from typing import Any

from world import Disk, World

from atoll.data import FederatedDataset
from atoll.net.agent import Trainer, Training
from atoll.net.coordinator import Plan
from atoll.rounds import Process


def alone(data: FederatedDataset, client: str) -> FederatedDataset:
    """The data as its owner has it."""
    mine = data[client].train
    return FederatedDataset.from_arrays({client: mine})


def sites(build: Callable[[], Process], data: FederatedDataset) -> dict[str, Training]:
    """A site for every client, each with a process and data of its own."""
    return {client: Trainer(build(), alone(data, client)) for client in data.clients}


def deploy(
    build: Callable[[], Process],
    data: FederatedDataset,
    rounds: int,
    training: Mapping[str, Training],
    *,
    evaluate: int = 0,
    **more: Any,
) -> World:
    """A finished run."""
    channel = build().chain.channel
    sums = 0 if channel.seal is None else channel.least
    plan = Plan("r", rounds, least=len(data.clients), keep=not sums, sums=sums, evaluate=evaluate)
    made = World(build(), plan, dict(training), **more).run()
    assert made.done, (made.server and made.server.state, made.notices)
    return made


__all__ = ["Disk", "alone", "deploy", "sites"]
