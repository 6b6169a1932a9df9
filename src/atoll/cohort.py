"""What an algorithm sees of the clients it works on: a tile of rows and the work that can be done on them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.errors import CompositionError
from atoll.local import Plan
from atoll.model import Batch, Model
from atoll.vectors import Layout, Selection, Trained, Update

if TYPE_CHECKING:
    from atoll.data import Split


class Minibatch(NamedTuple):
    """What a minibatch of each client says at given rows; all nought for a client that has no such step."""

    gradient: Tensor  # [C, P] of the mean loss
    buffers: Tensor  # [C, B] after the forward
    loss: Tensor  # [C, 1] mean loss, float64
    examples: Tensor  # [C, 1] examples in it, float64


@dataclass(frozen=True, slots=True)
class Term:
    """A term of the training loss through the features of the model that is trained (MOON).

    Attributes:
        loss: (features [n, ...], *given [n, ...]) -> [n], added to the losses of the examples.
        given: what does not change while a client trains, for each of its training examples: for each argument of
            `loss` after the first, one tensor [n_i, ...] per client.
    """

    loss: Callable[..., Tensor]
    given: tuple[Sequence[Tensor] | Tensor, ...]


class Cohort(ABC):
    """A tile of C clients in one round; engines supply the work, algorithms call it.

    Attributes:
        clients: their names.
        round: the round, from 0.
        population: clients there are in all.
        examples: training examples of each, [C, 1], float64.
        weights: weight of each in the average by the aggregator's rule, [C, 1], float64.
        model: the model.
        selection: which parameters are shared with the server.
        buffers: floating buffers each client starts from, [C, B].
        own: rows [C, P] that hold each client's private parameters, or None when nothing is private.
        noise_multiplier: of example-level privacy, where it was calibrated for the run.
        protected: whether what is worked out here leaves the clients under example-level privacy, so that only
            training under noise may look at their examples.
        counted: training under noise that is counted for this visit and has not been done yet; None: outside a round.
    """

    def __init__(
        self,
        model: Model,
        selection: Selection,
        *,
        clients: Sequence[str],
        round: int,
        population: int,
        examples: Tensor,
        weights: Tensor,
        buffers: Tensor,
        own: Tensor | None,
    ) -> None:
        self.model = model
        self.selection = selection
        self.clients = tuple(clients)
        self.round = round
        self.population = population
        self.examples = examples
        self.weights = weights
        self.buffers = buffers
        self.own = own
        self.noise_multiplier: float | None = None
        self.protected = False
        self.counted: list[Plan] | None = None

    def expose(self, what: str) -> None:
        """Refuse a look at the examples that no noise protects.

        Raises:
            CompositionError: the examples are protected.
        """
        if self.protected:
            raise CompositionError(
                f"{what} looks at examples without noise, and the local training asks for example-level privacy: use a "
                "method that learns from training alone, such as fedavg, fedprox, scaffold(option=2) or ditto, with "
                "privacy= in all of its plans."
            )

    def steps(self, plan: Plan) -> Tensor:
        """Local steps each client does under a plan in this round, int64 [C, 1]."""
        sizes = self.examples[:, 0].long().cpu().numpy()
        return torch.from_numpy(plan.steps_of(sizes, self.clients, self.round))[:, None]

    @property
    def layout(self) -> Layout:
        """Layout of the parameters that are shared with the server, of size D."""
        return self.selection.layout

    def rows(self, vector: Tensor) -> Tensor:
        """The received shared vector [D] as one model per client [C, P], each with its own private parameters."""
        if self.own is None:
            return vector.expand(len(self.clients), -1)
        return self.selection.put(vector, self.own.clone())

    def shared(self, rows: Tensor) -> Tensor:
        """The part [C, D] of rows [C, P] that may leave the clients."""
        return self.selection.take(rows)

    def update(
        self, trained: Trained, start: Tensor, *, sums: Tensor | None = None, weight: Tensor | None = None
    ) -> Update:
        """The usual update: what training changed in the shared parameters, weighted by the aggregator's rule.

        Args:
            trained: result of `sgd`.
            start: rows [C, P] that training began from.
            sums: summed part [C, S], none by default.
            weight: [C, 1] instead of the aggregator's weights.
        """
        return Update(
            mean=trained.change(start).take(self.selection),
            layout=self.layout,
            sums=start.new_empty(len(self.clients), 0) if sums is None else sums,
            weight=self.weights if weight is None else weight,
            metrics=torch.cat((trained.loss, trained.examples), dim=1),
            trained=trained,
        )

    @abstractmethod
    def sgd(
        self,
        rows: Tensor,
        plan: Plan,
        *,
        anchor: Tensor | None = None,
        pull: float = 0.0,
        shift: Tensor | None = None,
        train: Tensor | None = None,
        buffers: Tensor | None = None,
        term: Term | None = None,
        purpose: str = "train",
    ) -> Trained:
        """Train every row on its client's examples: `y <- y - rate * (gradient + pull * (y - anchor) + shift)`.

        Args:
            rows: start, [C, P]; not changed.
            plan: how to train. Momentum, weight decay and Adam act on the corrected gradient.
            anchor: rows [C, P] or a vector [P] the pull is towards; needed when pull is not 0.
            pull: strength of the pull (FedProx's mu, Ditto's lambda).
            shift: rows [C, P] or a vector [P] added to every gradient (SCAFFOLD's c - c_i).
            train: boolean mask [P] of the parameters that change; default all.
            buffers: floating buffers to start from, [C, B]; default those the clients received or keep.
            term: a term through the model's features, added to the loss; what `Trained.loss` tells is without it.
            purpose: names the keyed randomness, for algorithms that train more than once in a round.
        """

    @abstractmethod
    def gradient(self, rows: Tensor, batch: Batch | None = None) -> Tensor:
        """Gradient [C, P] of the mean loss at rows [C, P], in training mode, buffers left alone.

        Args:
            rows: where, [C, P].
            batch: fields [C, n, ...], n examples for each client; default all training examples of each client.
        """

    @abstractmethod
    def minibatch(
        self, rows: Tensor, plan: Plan, step: int, *, buffers: Tensor | None = None, purpose: str = "train"
    ) -> Minibatch:
        """Gradients at rows [C, P] on the very minibatch that `sgd` would use in a step: the slow general path.

        For methods whose steps are not `sgd`'s: several gradients on one batch, or at points that move together.
        Integer buffers begin anew at every call.

        Args:
            rows: where, [C, P].
            plan: whose minibatches.
            step: the local step, from 0.
            buffers: floating buffers to start from, [C, B]; default those the clients received or keep.
            purpose: names the keyed randomness; other purposes give independent minibatches.
        """

    @abstractmethod
    def curvature(self, rows: Tensor, along: Tensor, plan: Plan, step: int, *, purpose: str = "train") -> Tensor:
        """The Hessian of a minibatch's mean loss at rows [C, P] times `along` [C, P]: [C, P], by two backwards.

        Arguments are those of `minibatch`; 0 for a client that has no such step.
        """

    @abstractmethod
    def loss(self, rows: Tensor) -> Tensor:
        """Mean loss [C, 1] of each row on its client's training examples, in eval mode."""

    @abstractmethod
    def predict(self, rows: Tensor) -> list[Tensor]:
        """Outputs [n_i, ...] of each row on its client's training examples, in eval mode."""

    @abstractmethod
    def forward(self, rows: Tensor, buffers: Tensor, split: "Split", places: NDArray[np.int64]) -> list[Tensor]:
        """Outputs [n_i, ...] of each row on some client's examples, in eval mode.

        Args:
            rows: parameters [C, P].
            buffers: floating buffers [C, B].
            split: examples of clients.
            places: whose examples each row sees, [C].
        """

    @abstractmethod
    def inputs(self, rows: Tensor, layer: str) -> list[Tensor]:
        """What flows into a named submodule, [n_i, ...] on its client's training examples, in eval mode."""

    @abstractmethod
    def targets(self) -> list[Tensor]:
        """Targets [n_i, ...] of each client's training examples."""

    @abstractmethod
    def features(self, rows: Tensor, *, buffers: Tensor | None = None) -> list[Tensor]:
        """Features [n_i, ...] of each row on its client's training examples, in eval mode.

        Args:
            rows: parameters [C, P].
            buffers: floating buffers [C, B]; default those the clients received or keep.

        Raises:
            InvalidArgument: the model names no submodule whose output they are.
        """
