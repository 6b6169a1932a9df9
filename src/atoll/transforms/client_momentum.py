"""Client momentum. Karimireddy, He & Jaggi 2021, "Learning from history for Byzantine robust optimization",
algorithm 2.

    m_i <- x_i at a client's first visit, then m_i <- beta m_i + (1 - beta) x_i;  m_i is sent instead of x_i

Symbols: x_i the update of client i in a round, m_i its momentum. Honest momenta differ less from each other than honest
updates do, by up to sqrt((1 - beta) / (1 + beta)) in what is random in them, so that a push that hides in their spread
(`alie`, `ipm`) has less room, and one that goes on from round to round adds up to a row that a rule can tell. Cost in
floats: none up, none down, L kept by the client.
"""

import torch
from torch import Tensor

from atoll.errors import invalid
from atoll.spec import record
from atoll.transforms.base import Keys, Transform


def client_momentum(beta: float = 0.9) -> Transform:
    """Send an average over a client's rounds, the latest counting most, instead of each round's update.

    Put it first, before a robust rule, for clients that take part often: one that is seen once in many rounds sends
    what is long out of date. It acts on what is averaged; the summed part of a row (SCAFFOLD's variates) goes through
    as it is, because its sum must stay the sum of this round's. The momentum is the client's own memory and moves on
    only when its update was accepted.

    Args:
        beta: weight of the past, in [0, 1).
    """
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta < 1:
        raise invalid("beta", beta, "a number in [0, 1)")

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: None, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        split = rows.shape[1] if keys.split is None else keys.split
        old = memory["momentum"][:, :split]
        mixed = torch.where(memory["visited"] > 0, beta * old + (1 - beta) * rows[:, :split], rows[:, :split])
        sent = torch.cat((mixed, rows[:, split:]), dim=1)
        kept = torch.cat((mixed, torch.zeros_like(rows[:, split:])), dim=1)
        return sent, {"momentum": kept, "visited": torch.ones_like(memory["visited"])}

    return Transform(
        record("client_momentum", beta=beta),
        encode,
        memory=lambda length: {"momentum": torch.zeros(length), "visited": torch.zeros(1)},
        unbiased=False,
        contracts=False,
    )
