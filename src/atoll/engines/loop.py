"""The specification: one client after the other, one batch after the other, nothing clever.

Every other engine is tested against this one.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from atoll import random
from atoll.cohort import Cohort, Minibatch, Term
from atoll.engines.acceptance import Traits
from atoll.engines.arena import Arena
from atoll.engines.base import Chosen, Engine, Remembering, Tile, orders
from atoll.engines.dropout import Draw, KeyedDropout, SeededDraws
from atoll.engines.precision import products, widened
from atoll.engines.private import Sums, example_keys, train_privately
from atoll.local import CLIP_EPS, Plan
from atoll.messages import Task
from atoll.model import Batch
from atoll.vectors import Trained

if TYPE_CHECKING:
    from atoll.data import FederatedDataset, Split
    from atoll.rounds import Process


class Loop(Engine):
    """Runs one client at a time with plain autograd."""

    name = "loop"

    def split(self, task: Task, data: "FederatedDataset") -> list[Chosen]:
        """One client after the other."""
        return [np.array([i]) for i in range(len(task.clients))]

    def tile(
        self, process: "Process", task: Task, data: "FederatedDataset", memory: Remembering, chosen: Chosen
    ) -> Tile:
        """A single client."""
        client = task.clients[int(chosen[0])]
        remembered = process.remembered(task, [client], memory)
        buffers, own = process.start(task, remembered, 1)
        train = data.train.client(data.index(client))
        examples = torch.full((1, 1), float(len(train["y"])), dtype=torch.float64)
        weights = process.aggregator.weigh(examples, [client])
        cohort = _Client(
            process.model,
            process.selection,
            clients=[client],
            round=task.round,
            population=task.population,
            examples=examples,
            weights=weights,
            buffers=buffers,
            own=own,
        )
        cohort.attach(train, task.seed, self.traits, mixed=self._mixed)
        cohort.noise_multiplier = process.example_multiplier
        return cohort, remembered

    def describe(self) -> dict[str, Any]:
        """Which path ran."""
        return {"engine": self.name, "strategy": "one client at a time", "reason": "chosen by hand", **self.told}


class _Client(Cohort):
    """A cohort of one."""

    def attach(self, train: Batch, seed: int, traits: Traits, *, mixed: bool) -> None:
        self._train, self._seed, self._traits, self._mixed = train, seed, traits, mixed
        self._key = random.client_keys(self.clients)

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
        if plan.privacy is not None:
            if term is not None:
                self.expose("the features of a term of the loss")
            return train_privately(
                self, self._clipped_sums(purpose, train), rows, plan, anchor=anchor, pull=pull, shift=shift,
                train=train, buffers=buffers, purpose=purpose, arena=Arena(),
            )  # fmt: skip
        self.expose("training without privacy=")
        y = rows[0].detach().clone()
        held = (self.buffers if buffers is None else buffers)[0].detach().clone()
        counters = self.model.counters()
        sizes = np.array([len(self._train["y"])])
        n, total = int(sizes[0]), int(plan.steps_of(sizes, self.clients, self.round)[0])
        size = n if plan.batch_size is None else plan.batch_size
        velocity, first, second = torch.zeros_like(y), torch.zeros_like(y), torch.zeros_like(y)
        step, number, rates, loss_sum, seen = 0, 0, 0.0, 0.0, 0
        while step < total:
            order = torch.from_numpy(orders(plan, self._seed, purpose, self.round, number, self._key, sizes)[0].copy())
            for begin in range(0, n, size):
                if step == total:
                    break
                chosen = order[begin : begin + size]
                batch = {name: t[chosen] for name, t in self._train.items()}
                own = None if term is None else Term(term.loss, tuple([t[0][chosen]] for t in term.given))
                gradient, loss = self._gradient(y, held, counters, batch, purpose, step, own)
                if pull:
                    assert anchor is not None
                    gradient = gradient + pull * (y - (anchor if anchor.ndim == 1 else anchor[0]))
                if shift is not None:
                    gradient = gradient + (shift if shift.ndim == 1 else shift[0])
                if plan.clip is not None:
                    # What is not trained has no gradient.
                    gradient = gradient if train is None else torch.where(train, gradient, 0.0)
                    gradient = gradient * min(1.0, plan.clip / (float(gradient.norm()) + CLIP_EPS))
                rate = float(plan.rate(self.round, np.array([step]))[0])
                if plan.optimizer == "sgd":
                    if plan.weight_decay:
                        gradient = gradient + plan.weight_decay * y
                    if plan.momentum:
                        velocity = plan.momentum * velocity + gradient
                        gradient = velocity
                    change = -rate * gradient
                else:
                    change = torch.zeros_like(y)
                    if plan.optimizer == "adam":
                        gradient = gradient + plan.weight_decay * y
                    else:
                        change = change - rate * plan.weight_decay * y
                    beta1, beta2 = plan.betas
                    first = beta1 * first + (1 - beta1) * gradient
                    second = beta2 * second + (1 - beta2) * gradient**2
                    corrected = first / (1 - beta1 ** (step + 1))
                    spread = (second / (1 - beta2 ** (step + 1))).sqrt() + plan.eps
                    change = change - rate * corrected / spread
                y = y + (change if train is None else torch.where(train, change, 0.0))
                loss_sum += float(loss) * len(batch["y"])
                seen += len(batch["y"])
                rates += rate
                step += 1
            number += 1
        one = y.new_ones(1, 1)
        wide = torch.ones(1, 1, dtype=torch.float64)
        return Trained(y[None], held[None], one * total, one * rates, wide * loss_sum, wide * seen)

    def _clipped_sums(self, purpose: str, train: Tensor | None) -> Sums:
        """One example after the other."""

        def summed(
            clients: Sequence[int], rows: Tensor, held: Tensor, places: Sequence[Tensor], step: int, clip: float
        ) -> list[Tensor]:
            total = torch.zeros(rows.shape[1], dtype=torch.float64)
            for place, key in zip(places[0].tolist(), example_keys(self._key[0], places[0]), strict=True):
                batch = {n: t[place : place + 1] for n, t in self._train.items()}
                own, counters = held[0].clone(), self.model.counters()
                gradient, _ = self._gradient(rows[0], own, counters, batch, purpose, step, key=np.array([key]))
                gradient = gradient if train is None else torch.where(train, gradient, 0.0)
                norm = float(torch.linalg.vector_norm(gradient.double()))
                if np.isfinite(norm):
                    total += gradient.double() * min(1.0, clip * (1 - 1e-5) / norm if norm else 1.0)
            return [total]

        return summed

    def gradient(self, rows: Tensor, batch: Batch | None = None) -> Tensor:
        self.expose("gradient")
        given = self._train if batch is None else {n: t[0] for n, t in batch.items()}
        held, counters = self.buffers[0].detach().clone(), self.model.counters()
        return self._gradient(rows[0].detach(), held, counters, given, "gradient", 0)[0][None]

    def minibatch(
        self, rows: Tensor, plan: Plan, step: int, *, buffers: Tensor | None = None, purpose: str = "train"
    ) -> Minibatch:
        self.expose("minibatch")
        held = (self.buffers if buffers is None else buffers)[0].detach().clone()
        wide = torch.ones(1, 1, dtype=torch.float64)
        batch = self._batch(plan, step, purpose)
        if batch is None:
            return Minibatch(torch.zeros_like(rows), held[None], 0.0 * wide, 0.0 * wide)
        gradient, loss = self._gradient(rows[0].detach(), held, self.model.counters(), batch, purpose, step)
        return Minibatch(gradient[None], held[None], float(loss) * wide, len(batch["y"]) * wide)

    def curvature(self, rows: Tensor, along: Tensor, plan: Plan, step: int, *, purpose: str = "train") -> Tensor:
        self.expose("curvature")
        batch = self._batch(plan, step, purpose)
        if batch is None:
            return torch.zeros_like(rows)
        held = self.buffers[0].detach().clone()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second backward
            leaf = rows[0].detach().clone().requires_grad_()
            loss = self._training_loss(leaf, held, self.model.counters(), batch, purpose, step)
            (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
            product = (slope * along[0].detach()).sum()
            if not product.requires_grad:  # a loss that is linear has no curvature
                return torch.zeros_like(rows)
            (found,) = torch.autograd.grad(product, leaf)
        return found[None]

    def _batch(self, plan: Plan, step: int, purpose: str) -> Batch | None:
        """The examples of a local step; None where the client has no such step."""
        sizes = np.array([len(self._train["y"])])
        if step >= int(plan.steps_of(sizes, self.clients, self.round)[0]):
            return None
        n = int(sizes[0])
        size = n if plan.batch_size is None else plan.batch_size
        number, place = divmod(step, int(plan.steps_per_pass(sizes)[0]))
        order = torch.from_numpy(orders(plan, self._seed, purpose, self.round, number, self._key, sizes)[0].copy())
        return {name: t[order[place * size : place * size + size]] for name, t in self._train.items()}

    def loss(self, rows: Tensor) -> Tensor:
        self.expose("loss")
        return self.model.loss.mean(self.predict(rows)[0], self._train["y"]).reshape(1, 1)

    def predict(self, rows: Tensor) -> list[Tensor]:
        self.expose("predict")
        return [self._output(rows[0], self.buffers[0], self._train)]

    def forward(self, rows: Tensor, buffers: Tensor, split: "Split", places: NDArray[np.int64]) -> list[Tensor]:
        return [self._output(rows[0], buffers[0], split.client(int(places[0])))]

    def _output(self, row: Tensor, buffers: Tensor, batch: Batch) -> Tensor:
        held = self.model.buffer_layout.view(buffers)
        with torch.no_grad():
            return self.model.call(self.model.layout.view(row), held, batch, train=False)

    def inputs(self, rows: Tensor, layer: str) -> list[Tensor]:
        self.expose("what flows into a layer")
        held = self.model.buffer_layout.view(self.buffers[0])
        return [self.model.inputs(layer, self.model.layout.view(rows[0]), held, self._train)]

    def targets(self) -> list[Tensor]:
        self.expose("targets")
        return [self._train["y"]]

    def features(self, rows: Tensor, *, buffers: Tensor | None = None) -> list[Tensor]:
        self.expose("features")
        held = self.model.buffer_layout.view((self.buffers if buffers is None else buffers)[0])
        with torch.no_grad():
            return [self.model.features(self.model.layout.view(rows[0]), held, self._train)]

    def _gradient(
        self,
        y: Tensor,
        held: Tensor,
        counters: dict[str, Tensor],
        batch: Batch,
        purpose: str,
        step: int,
        term: Term | None = None,
        key: NDArray[np.uint64] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gradient [P] and loss at y; buffers are updated in place. The loss is told without the term."""
        with torch.enable_grad():
            leaf = y.clone().requires_grad_()
            if term is None:
                loss = whole = self._training_loss(leaf, held, counters, batch, purpose, step, key, mixed=self._mixed)
            else:
                loss, more = self._with_term(leaf, held, counters, batch, purpose, step, term)
                whole = loss + more
            (gradient,) = torch.autograd.grad(whole, leaf)
        return gradient, loss.detach()

    def _training_loss(
        self,
        leaf: Tensor,
        held: Tensor,
        counters: dict[str, Tensor],
        batch: Batch,
        purpose: str,
        step: int,
        key: NDArray[np.uint64] | None = None,
        *,
        mixed: bool = False,
    ) -> Tensor:
        """Mean loss at a leaf [P]; buffers are updated in place."""
        buffers = self.model.buffer_layout.view(held) | counters
        with self._keyed(purpose, step, key), products(leaf.device, mixed=mixed):
            output = self.model.call(self.model.layout.view(leaf), buffers, batch, train=True)
        return self.model.loss.mean(widened(output, mixed=mixed), batch["y"])

    def _with_term(
        self, leaf: Tensor, held: Tensor, counters: dict[str, Tensor], batch: Batch, purpose: str, step: int, term: Term
    ) -> tuple[Tensor, Tensor]:
        """The same, and the mean of a term through the features."""
        buffers = self.model.buffer_layout.view(held) | counters
        with self._keyed(purpose, step), products(leaf.device, mixed=self._mixed):
            output, features = self.model.call_with_features(self.model.layout.view(leaf), buffers, batch, train=True)
        more = term.loss(widened(features, mixed=self._mixed), *(t[0] for t in term.given)).mean()
        return self.model.loss.mean(widened(output, mixed=self._mixed), batch["y"]), more

    def _keyed(self, purpose: str, step: int, key: NDArray[np.uint64] | None = None) -> ExitStack:
        """What makes the random numbers a forward draws those of this client, or key, and step."""
        keyed = ExitStack()
        if self._traits.dropout or self._traits.draws:
            own = self._key if key is None else key
            keyed.enter_context(KeyedDropout(Draw(self._seed, purpose, self.round, own, np.array([step]))))
            keyed.enter_context(SeededDraws(self._seed, purpose, self.round, int(own[0]), step))
        return keyed
