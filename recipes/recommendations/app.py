"""How many stars would you give? 943 people's ratings, and what describes their taste, stay with them.

A rating is a mean, what a film and a person add to it, and how well a film's factors fit a person's. The films' part is
shared and learnt by all; a person's part never leaves, which the framework enforces where updates leave a client.
"""

from typing import Literal

import torch
from torch import Tensor, nn

import atoll

FILMS = 1682


class Means(nn.Module):
    """mean + b_film + b_person, of one person."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([3.5]))
        self.fame = nn.Embedding(FILMS, 1)
        self.person = nn.Parameter(torch.zeros(1))
        nn.init.zeros_(self.fame.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Stars [n] for films [n, 1]."""
        return (self.fame(x).flatten(1) + self.mean + self.person).squeeze(1)


class Factors(nn.Module):
    """mean + b_film + b_person + <q_film, p_person>, of one person."""

    def __init__(self, factors: int, seed: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([3.5]))
        self.fame = nn.Embedding(FILMS, 1)
        self.films = nn.Embedding(FILMS, factors)
        self.person = nn.Linear(factors, 1)
        nn.init.zeros_(self.fame.weight)
        drawn = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.films.weight, std=0.1, generator=drawn)
        nn.init.normal_(self.person.weight, std=0.1, generator=drawn)
        nn.init.zeros_(self.person.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Stars [n] for films [n, 1]."""
        return (self.person(self.films(x).flatten(1)) + self.fame(x).flatten(1) + self.mean).squeeze(1)


def experiment(
    *,
    rounds: int = 60,
    factors: int = 16,
    lr: float = 0.1,
    server_lr: float = 0.01,
    decay: float = 2e-4,
    method: Literal["federated", "alone", "means"] = "federated",
    seed: int = 0,
) -> atoll.Experiment:
    """Matrix factorisation over 943 users.

    Args:
        rounds: in each one every user trains on their own ratings.
        factors: numbers that describe a film, and a person.
        lr: learning rate at the users.
        server_lr: learning rate of the server's Adam: a film is rated by few of the users, so that the mean of all
            updates is small, and smaller for films that few have seen.
        decay: weight decay at the users, of all they train. It acts on every film in every user's round, and must be
            much smaller than for pooled ratings.
        method: "federated" shares the films' part; "means" does so without factors (what a film and a person add);
            "alone" learns everything from a user's own ratings.
        seed: of the cut into training and test, the initial values and the order of ratings.
    """
    module = Means() if method == "means" else Factors(factors, seed)
    model = atoll.Model(module, loss="mse", metrics=("rmse", "mae"))
    plan = atoll.local_sgd(lr=lr, epochs=1, batch_size=None, weight_decay=decay)
    algorithm = (
        atoll.local_only(plan)
        if method == "alone"
        else atoll.fedper(plan, private=("person*",), server=atoll.server.adam(server_lr, tau=1e-6))
    )
    return atoll.Experiment(
        model=model,
        data=atoll.datasets.movielens(seed=seed),
        algorithm=algorithm,
        rounds=rounds,
        evaluate_every=20,
        seed=seed,
        title=f"Film ratings, {method}",
    )
