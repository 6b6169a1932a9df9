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


def adapter(engine: str | Engine = "auto") -> Adapter:
    """Runs problems on an engine; a name makes a new one for each."""

    def run(problem: Problem) -> Sequence[Sequence[float]]:
        plan = local_sgd(problem.lr, epochs=problem.epochs, batch_size=problem.batch)
        chosen = engine if isinstance(engine, str) else engine.fresh()
        process = Process(
            _model(problem), _algorithm(problem, plan), engine=chosen,
            aggregator=aggregators.mean(weights=problem.weights),
        )  # fmt: skip
        data, path = _data(problem), list[list[float]]()
        state = process.init()
        for number in range(problem.rounds):
            state, _ = process.next(state, data, [c.name for c in problem.cohort(number)])
            path.append(process.vector(state).tolist())
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
        layer.weight.copy_(torch.tensor([problem.start]))
    return Model(layer, _squared if problem.loss == "squared" else _logistic)


def _data(problem: Problem) -> FederatedDataset:
    return FederatedDataset.from_arrays(
        {
            c.name: (torch.tensor(c.inputs, dtype=torch.float64), torch.tensor(c.targets, dtype=torch.float64))
            for c in problem.clients
        }
    )
