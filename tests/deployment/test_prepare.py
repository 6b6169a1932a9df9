"""What a run over sites is asked for, and what a site's process refuses of it."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import atoll
from atoll.algorithms import fedavg
from atoll.deployment.prepare import plan_of, process_of, splits_of, unevaluated
from atoll.deployment.worker import Worker, ready_of
from atoll.errors import InvalidArgument, RunError
from atoll.local import local_sgd
from atoll.net.calls import Charter
from atoll.net.children import Train
from atoll.net.control import Work

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "never": ({"evaluate_every": 0}, "evaluate_every=0"),
    "no split": ({"splits": ()}, "no held-out examples"),
    "nothing held out": ({"data": atoll.table(client="c", target="y", test=0.0)}, "holds no examples out"),
    "noise": (
        {
            "transforms": (atoll.transforms.clip_norm(1.0), atoll.transforms.gaussian_noise(1.0)),
            "aggregator": atoll.aggregators.mean(weights="uniform", denominator="expected"),
        },
        "run's noise",
    ),
    "a sum": ({"channel": atoll.transforms.secure_sum(clip=1.0, weight_cap=8.0)}, "sums alone"),
}


def experiment(**changes: Any) -> atoll.Experiment:
    given = {"data": atoll.table(client="c", target="y"), "rounds": 2, "evaluate_every": 2} | changes
    model = atoll.Model(nn.Linear(3, 2), "cross_entropy")
    return atoll.Experiment(model=model, algorithm=fedavg(local_sgd(0.1)), **given)


@pytest.mark.parametrize("change", CHANGES)
def test_nobody_is_asked_nor_answers_where_the_experiment_has_no_evaluations(change: str) -> None:
    """A server that asks all the same is refused: its owner approved an experiment that never tells."""
    given, why = CHANGES[change]
    made = experiment(**given)
    process = process_of(made, "loop")
    assert why in unevaluated(made, process)
    assert plan_of(made, process, Charter("r", "0" * 64, {}, least=3)).evaluate == 0
    worker: Any = object.__new__(Worker)
    worker._experiment, worker._process, worker.ready = made, process, ready_of(made, process)
    assert why in worker.ready.silent, "by which the agent refuses before it asks"
    worker._trainer = lambda *given: SimpleNamespace(parts=(0, 0, 0), sent=0, frame=b"", memory=b"")
    work = Work("r", 1, 0, "0" * 64, 1, "evaluate", 0, ("a",), 1, {}, None)
    with pytest.raises(RunError, match=rf"evaluation was asked for.*{why}"):
        worker.carry_out(Train(work, 0), memoryview(b""))


def test_only_the_splits_that_the_experiment_names_are_told_of() -> None:
    assert [splits_of(experiment(splits=s)) for s in (None, ("test",), ("validation", "test"))] == [
        ("validation", "test"), ("test",), ("validation", "test"),
    ]  # fmt: skip
    with pytest.raises(InvalidArgument, match=r"splits.*held-out examples alone"):
        process_of(experiment(splits=("train", "test")), "loop")


def test_an_experiment_with_examples_held_out_is_evaluated() -> None:
    made = experiment()
    process = process_of(made, "loop")
    assert unevaluated(made, process) == ready_of(made, process).silent == ""
    assert plan_of(made, process, Charter("r", "0" * 64, {}, least=3)).evaluate == 2
