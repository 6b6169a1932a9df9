"""Atoll's own adapter: its methods on any of its engines."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from atoll import aggregators, algorithms
from atoll.algorithms import Algorithm
from atoll.conformance.problems import Problem
from atoll.conformance.running import Adapter, Unsupported
from atoll.data import FederatedDataset
from atoll.engines import Engine
from atoll.local import Plan, local_sgd
from atoll.model import Model
from atoll.rounds import Process
from atoll.transfer.low_rank import Aggregation, LoraModel, lora

AGGREGATIONS: dict[str, Aggregation] = {"fedit": "fedit", "ffa_lora": "ffa", "flora": "flora", "fedex_lora": "fedex"}
WEIGHT = "0.weight"


def adapter(engine: str | Engine = "auto") -> Adapter:
    """Runs problems on an engine; a name makes a new one for each."""

    def run(problem: Problem) -> Sequence[Sequence[float]]:
        plan = local_sgd(problem.lr, epochs=problem.epochs, batch_size=problem.batch)
        chosen = engine if isinstance(engine, str) else engine.fresh()
        model = _model(problem)
        algorithm = model.algorithm(plan) if isinstance(model, LoraModel) else _algorithm(problem, plan)
        weights = aggregators.mean(weights=problem.weights)
        process = Process(model, algorithm, engine=chosen, aggregator=weights)
        data, path = _data(problem), list[list[float]]()
        state = process.init(initial=_begun(problem, model))
        for number in range(problem.rounds):
            state, _ = process.next(state, data, [c.name for c in problem.cohort(number)])
            vector = process.vector(state)
            path.append((model.weights(vector)[WEIGHT] if isinstance(model, LoraModel) else vector).flatten().tolist())
        return path

    return run


def _algorithm(problem: Problem, plan: Plan) -> Algorithm:
    o = problem.options
    match problem.method:
        case "fedavg":
            return algorithms.fedavg(plan)
        case "fedprox":
            return algorithms.fedprox(plan, mu=o["mu"])
        case "fednova":
            return algorithms.fednova(plan)
        case "scaffold":
            return algorithms.scaffold(plan, option=1 if o["option"] == 1 else 2)
        case "feddyn":
            return algorithms.feddyn(plan, alpha=o["alpha"])
        case "fedavgm":
            return algorithms.fedavgm(plan, lr=o["server_lr"], momentum=o["momentum"])
        case "fedadagrad":
            return algorithms.fedadagrad(plan, lr=o["server_lr"], beta1=o["beta1"], tau=o["tau"])
        case "fedadam" | "fedyogi":
            build = algorithms.fedadam if problem.method == "fedadam" else algorithms.fedyogi
            return build(plan, lr=o["server_lr"], betas=(o["beta1"], o["beta2"]), tau=o["tau"])
        case other:
            raise Unsupported(f"no method {other}")


def _squared(output: Tensor, target: Tensor) -> Tensor:
    return (output[:, 0] - target).square()


def _logistic(output: Tensor, target: Tensor) -> Tensor:
    return functional.softplus(-target * output[:, 0])


def _model(problem: Problem) -> Model:
    layer = nn.Linear(len(problem.start), 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([problem.start], dtype=torch.float64))
    loss = _squared if problem.loss == "squared" else _logistic
    if problem.method not in AGGREGATIONS:
        return Model(layer, loss)
    assert problem.factors is not None
    aggregation, scale = AGGREGATIONS[problem.method], problem.factors.scale
    return lora(Model(nn.Sequential(layer), loss), rank=1, targets=("0",), aggregation=aggregation, alpha=scale)


def _begun(problem: Problem, model: Model) -> Tensor:
    """The parameters a run begins with."""
    vector = model.init()
    if isinstance(model, LoraModel) and problem.factors is not None:
        values = {**model.constants(), **model.layout.view(vector)}
        (one,) = model.adapted  # of ffa_lora A is a constant, which is the model's own and written in place
        values[one.a].copy_(torch.tensor([problem.factors.a], dtype=torch.float64))
        values[one.b].fill_(problem.factors.b)
    return vector


def _data(problem: Problem) -> FederatedDataset:
    return FederatedDataset.from_arrays(
        {
            c.name: (torch.tensor(c.inputs, dtype=torch.float64), torch.tensor(c.targets, dtype=torch.float64))
            for c in problem.clients
        }
    )
