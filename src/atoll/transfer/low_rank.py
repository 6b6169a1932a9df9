"""LoRA over clients: which factors are trained, and how their averages become one model.

    W_i = W + scale * B_i A_i        a client's weight after its training
    the average wanted:  W + scale * sum_i p_i B_i A_i

- "fedit": A and B are averaged, each for itself, and (sum p_i B_i)(sum p_i A_i) is not the average of the products.
  Zhang, Vahidian, Kuo, Li, Zhang, Yu, Wang & Chen 2024, "Towards building the federated GPT: Federated instruction
  tuning". Cost in floats: r (o + i) up and down for a weight of o by i.
- "ffa": A is drawn once and never trained, so that the average of B is exact.
  Sun, Li, Li & Ding 2024, "Improving LoRA in privacy-preserving federated learning" (FFA-LoRA). Cost: r o up and down.
- "fedex": A and B are averaged, and what is missing is added to the weight:
      W <- W + scale (sum p_i B_i A_i - (sum p_i B_i)(sum p_i A_i))
  Singhal, Ponkshe & Vepakomma 2025, "FedEx-LoRA: Exact aggregation for federated and efficient fine-tuning of
  foundation models", equations 6 and 7.
- "flora": all products are added to the weight, W <- W + scale sum p_i B_i A_i, and every round begins with new factors
  (A random, B zero). Clients may have ranks of their own.
  Wang, Shen, He, Sun, Wang, Lyu & Li 2024, "FLoRA: Federated fine-tuning large language models with heterogeneous
  low-rank adaptations", equations 5 to 7, where the server stacks the factors; the product of the stacks is this sum.

The last two are exact. What the server needs for it, the average of products, is sent as the products, o i floats up
for each weight beside the factors, and the weight itself goes down with the factors: the server then needs no client's
factors, and sums alone, as of secure aggregation, give the same. The papers send factors and stack them, which is less
as long as the cohort's ranks together are below o i / (o + i), and shows every client's.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from atoll import random
from atoll.algorithms import Algorithm, fedavg
from atoll.algorithms.base import Memory, Message
from atoll.algorithms.checks import check_number, check_plan
from atoll.cohort import Cohort
from atoll.errors import CompositionError, DataError, invalid
from atoll.local import Plan
from atoll.model import Model
from atoll.server import ServerOptimizer
from atoll.spec import Spec, record
from atoll.transfer.adapters import WHOLE, Adapted, LowRank, Reweighted, adapt, check_rank, refusal
from atoll.vectors import Aggregate, Change, Layout, Update

Aggregation = Literal["fedit", "ffa", "flora", "fedex"]

EXACT = ("flora", "fedex")


class State(NamedTuple):
    """Server memory: weights and factors."""

    vector: Tensor  # [P]


class LoraModel(Model):
    """A model whose named layers have low-rank adapters; made by `atoll.lora`.

    Attributes:
        adapted: where weights and factors stand.
        aggregation: how clients' factors are averaged.
        scale: of the product.
        rank: the largest.
        ranks: of each client, where they have their own.
    """

    adapted: tuple[Adapted, ...]
    aggregation: Aggregation
    scale: float
    rank: int
    ranks: Mapping[str, int] | None
    seed: int

    def algorithm(self, plan: Plan, *, server: ServerOptimizer | None = None) -> Algorithm:
        """The aggregation as an algorithm: of "fedit" and "ffa" federated averaging, where others may do too.

        Args:
            plan: local training of the factors.
            server: optimiser of the server's step, where factors alone are averaged; default sgd with lr 1.

        Raises:
            InvalidArgument: a server optimiser for an exact aggregation, whose step is given.
        """
        check_plan(plan)
        if self.aggregation not in EXACT:
            return fedavg(plan, server=server)
        if server is not None:
            raise invalid(
                "server", server, f"left out with aggregation={self.aggregation!r}",
                "Its step is the exact average. With momentum, use aggregation=\"ffa\".",
            )  # fmt: skip
        return _exact(self, plan)

    def weights(self, vector: Tensor) -> dict[str, Tensor]:
        """The adapted weights W + scale * B A of a vector [P], by the names they have in the given module."""
        values = {**self.constants(), **self.layout.view(vector)}
        found: dict[str, Tensor] = {}
        for one in self.adapted:
            weight = values[one.weight]
            merged = weight + self.scale * one.product(values).view(weight.shape)
            found[one.given] = merged.detach()
        return found

    def merge(self, vector: Tensor, buffers: Tensor | None = None) -> nn.Module:
        """The given module with the adapters worked into its weights, in eval mode: no layer is left beside it."""
        module = self.module(vector, buffers)
        merged = self.weights(vector)
        for name, part in list(module.named_modules()):
            if isinstance(part, LowRank | Reweighted):
                parent, _, last = name.rpartition(".")
                setattr(module.get_submodule(parent), last, part.base)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in merged:
                    parameter.copy_(merged[name])
        return module

    def init(self, seed: int | None = None) -> Tensor:
        """The start vector [P]: the given module's values, with factors that were drawn at its making, or by a seed."""
        vector = super().init()
        if seed is not None:
            draw_factors(self.layout, self.adapted, vector, seed, 0)
        return vector

    @property
    def spec(self) -> Spec:
        """What the model is, with how its factors are averaged."""
        told = None if self.ranks is None else dict(self.ranks)
        return super().spec | record(
            "LoraModel", aggregation=self.aggregation, scale=self.scale, rank=self.rank, ranks=told, drawn=self.seed
        )


def lora(
    model: Model,
    *,
    rank: int | Mapping[str, int],
    targets: Sequence[str],
    aggregation: Aggregation = "fedit",
    alpha: float | None = None,
    train: Sequence[str] = (),
    seed: int = 0,
) -> LoraModel:
    """Adapt named layers of a model by low-rank factors, which are all that is trained.

    Args:
        model: the model; its own parameters become constants.
        rank: of the factors, at least 1. With aggregation="flora" also a mapping of clients to ranks.
        targets: names or shell-style patterns of submodules: linear, embedding and convolutional layers, and any other
            layer with matrices, among them nn.MultiheadAttention and whole transformer layers.
        aggregation: "fedit", "ffa", "flora" or "fedex": how clients' factors are averaged (see the module).
        alpha: the product is scaled by alpha / rank (the largest rank, where clients differ); default: not scaled.
        train: names or patterns of parameters that are trained as they are, for instance ("head.*",).
        seed: of the factors A.

    Returns:
        A model whose `algorithm(plan)` does the aggregation and whose `merge(vector)` gives the plain module back.

    Raises:
        InvalidArgument: a target that matches no layer, or every one; a layer that cannot be adapted, with the
            reason; a rank or another argument out of range.
    """
    if not isinstance(model, Model) or isinstance(model, LoraModel):
        raise invalid("model", model, "an atoll.Model that has no adapters yet")
    if aggregation not in ("fedit", "ffa", *EXACT):
        raise invalid("aggregation", aggregation, '"fedit", "ffa", "flora" or "fedex"')
    ranks = _ranks(rank, aggregation)
    most = max(ranks.values()) if ranks is not None else cast(int, rank)
    scale = 1.0 if alpha is None else check_number("alpha", alpha, strict=True) / most
    root = model.caller(train=True).get_submodule("module")
    names = _matching(root, targets)
    trained = _trained(model, train)
    module = copy.deepcopy(root)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)
    adapted: list[Adapted] = []
    renamed: dict[str, str] = {}
    for name in names:
        layer = module.get_submodule(name)
        check_rank(name, layer, most)
        part = adapt(layer, most, scale)
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, part)
        adapted += part.adapted(name)
        renamed |= {f"{name}.{n}": f"{name}.base.{n}" for n, _ in layer.named_parameters()}
    clash = trained & renamed.keys()
    if clash:
        raise invalid("train", sorted(clash), "parameters of layers that have no adapter", "Leave them out of targets.")
    parameters = dict(module.named_parameters())
    layout, values = Layout.of(parameters), {n: p.detach() for n, p in parameters.items()}
    whole = layout.flatten(values)
    draw_factors(layout, adapted, whole, seed, 0)
    with torch.no_grad():
        for name, value in layout.view(whole).items():
            parameters[name].copy_(value)
    for one in adapted:
        parameters[one.weight].requires_grad_(aggregation in EXACT)
        parameters[one.a].requires_grad_(aggregation != "ffa")
        parameters[one.b].requires_grad_(True)
    made = LoraModel(
        module,
        model.loss,
        model.given_metrics,
        buffers=model.buffer_rule,
        forward=model.forward_function,
        features=model.features_name,
    )
    made.adapted, made.aggregation, made.scale = tuple(adapted), aggregation, scale
    made.rank, made.ranks, made.seed = most, ranks, seed
    made.needs = f"lora, {aggregation}" if aggregation in EXACT else None
    return made


def draw_factors(layout: Layout, adapted: Sequence[Adapted], vector: Tensor, seed: int, round: int) -> None:
    """Draw A anew in a vector [P], in place, from a normal distribution of variance 1 / columns; B becomes zero."""
    views = layout.view(vector)
    for one in adapted:
        if one.a in views:
            a = views[one.a]
            columns = a.shape[0] if one.turned else a[0].numel()
            noise = torch.randn(a.shape, generator=random.generator(seed, "lora", one.a, round), dtype=torch.float64)
            a.copy_(noise / math.sqrt(columns))
        views[one.b].zero_()


def _exact(model: LoraModel, plan: Plan) -> Algorithm:
    """FLoRA and FedEx-LoRA: the average of the products, exactly."""
    layout, adapted, scale, stacking = model.layout, model.adapted, model.scale, model.aggregation == "flora"
    weights = frozenset(one.weight for one in adapted)
    moving = ~layout.mask(weights)

    def init(vector: Tensor) -> State:
        if not stacking:
            return State(vector)
        vector = vector.clone()  # what the factors of a given start say goes to the weights: rounds begin with B = 0
        views = layout.view(vector)
        for one in adapted:
            weight = views[one.weight]
            weight += scale * one.product(views).view(weight.shape)
            views[one.b].zero_()
        return State(vector)

    def begun(message: Message, cohort: Cohort) -> Tensor:
        """Rows [C, P] clients begin with: of lower ranks the last places of both factors are zero, and stay so."""
        start = cohort.rows(message.vector)
        if model.ranks is None:
            return start
        start = start.clone()
        for i, client in enumerate(cohort.clients):
            if client not in model.ranks:
                raise DataError(f"rank names no rank for client {client!r}: give every client one.")
            views = layout.view(start[i])
            for one in adapted:  # B is zero already, so that the factors' product and both gradients are too
                a = views[one.a]
                (a[:, model.ranks[client] :] if one.turned else a[model.ranks[client] :]).zero_()
        return start

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start = begun(message, cohort)
        trained = cohort.sgd(start, plan, train=moving)
        update = cohort.update(trained, start)

        def rows() -> Tensor:
            found = trained.minus(start).clone()
            made, before, after = layout.view(found), layout.view(start), layout.view(trained.rows)
            for one in adapted:
                change = scale * (one.product(after, 1) - one.product(before, 1))
                made[one.weight].copy_(change.view(made[one.weight].shape))
            return found

        return update.replace(mean=Change((len(start), layout.size), rows)), memory

    def step(state: State, aggregate: Aggregate) -> State:
        vector = state.vector + aggregate.mean
        before, after = layout.view(state.vector), layout.view(vector)
        for one in adapted:
            weight = after[one.weight]  # W and the mean change of scale * B A
            weight += scale * one.product(before).view(weight.shape)
            if not stacking:
                weight -= scale * one.product(after).view(weight.shape)
        if stacking:
            draw_factors(layout, adapted, vector, model.seed, aggregate.round + 1)
        return State(vector)

    def bind(given: Model) -> Algorithm:
        if not isinstance(given, LoraModel) or given.layout != layout or given.aggregation != model.aggregation:
            raise CompositionError(
                "this algorithm averages the adapters of another model: take it from the model that is trained, "
                "model.algorithm(plan)."
            )
        return algorithm

    algorithm = Algorithm(
        record(f"lora, {model.aggregation}", plan=plan, scale=scale, ranks=model.ranks and dict(model.ranks)),
        init=init,
        broadcast=lambda state: Message(state.vector),
        local=local,
        step=step,
        plans=(plan,),
        bind=bind,
    )
    return algorithm


def _ranks(rank: Any, aggregation: str) -> dict[str, int] | None:
    if not isinstance(rank, Mapping):
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise invalid("rank", rank, "an integer of at least 1, or with flora a mapping of clients to ranks")
        return None
    given = cast("Mapping[str, Any]", rank)
    if aggregation != "flora":
        raise invalid("rank", given, f'one number with aggregation="{aggregation}"', 'Only "flora" mixes ranks.')
    for client, own in given.items():
        if isinstance(own, bool) or not isinstance(own, int) or own < 1:
            raise invalid("rank", f"{client}: {own}", "a mapping of clients to integers of at least 1")
    if not given:
        raise invalid("rank", given, "a mapping that names a rank for every client")
    return dict(given)


def _matching(root: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the layers to adapt, in the module's order; a layer that is adapted as a whole stands for its parts."""
    if isinstance(targets, str) or not targets:
        raise invalid("targets", targets, "a non-empty sequence of names or patterns", 'Write targets=("fc*",).')
    known = {n: m for n, m in root.named_modules() if n}
    inside = {f"{n}.{i}": n for n, m in known.items() if isinstance(m, WHOLE) for i, _ in m.named_modules() if i}
    fitting = [n for n, m in known.items() if n not in inside and refusal(m) is None]
    told = ", ".join(fitting) or "none"
    chosen: set[str] = set()
    for pattern in targets:
        matched = [n for n in known if fnmatchcase(n, pattern)]
        if not matched:
            raise invalid("targets", pattern, f"a pattern that matches layers of the model: {told}")
        if len(matched) == len(known) and pattern not in known:
            raise invalid("targets", pattern, f"patterns that leave layers out: the model has {told}")
        found = [n for n in matched if n in fitting]
        if not found:
            name = matched[0]
            why = (
                f"{inside[name]!r} reads its weights itself: name that layer as a whole"
                if name in inside
                else refusal(known[name])
            )
            raise invalid("targets", pattern, f"a pattern that matches layers of the model: {told}", f"{name}: {why}.")
        chosen |= set(found)
    places: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    for name in sorted(chosen):
        for parameter in known[name].parameters():
            others = [n for n in places[id(parameter)] if not n.startswith(f"{name}.")]
            if others:
                raise invalid("targets", name, f"a layer that shares no weight; {others[0]} is the same parameter")
    return [n for n in fitting if n in chosen and not any(n.startswith(f"{other}.") for other in chosen)]


def _trained(model: Model, patterns: Sequence[str]) -> frozenset[str]:
    if isinstance(patterns, str):
        raise invalid("train", patterns, "a sequence of names or patterns", f"Write train=({patterns!r},).")
    for pattern in patterns:
        if not model.layout.matching([pattern]):
            known = ", ".join(model.layout.names)
            raise invalid("train", pattern, f"a pattern that matches trained parameters of the model: {known}")
    return model.layout.matching(patterns)
