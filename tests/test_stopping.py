"""Early stopping: on values worked out by hand, on validation examples and clients, across a resume, never on tests."""

import math
from pathlib import Path

import pytest
import torch
from problems import scalar_model
from registry import MODELS

import atoll
from atoll.data import FederatedDataset
from atoll.errors import InvalidArgument
from atoll.stopping import early_stopping

START, TARGET, SEEN, LR = 0.0, 4.0, 2.0, 0.05
"""A model goes from 0 towards 4; what validates lies at 2, which it passes on the way."""


def centred(centre: float, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(n, 1, dtype=torch.float64), torch.tensor([[1.0, centre]], dtype=torch.float64).repeat(n, 1)


def data() -> FederatedDataset:
    train = {f"c{i}": centred(TARGET) for i in range(3)}
    return FederatedDataset.from_arrays(train, validation={c: centred(SEEN) for c in train}, test=train)


def reached(rounds: int) -> float:
    return TARGET * (1 - (1 - LR) ** rounds)


BEST = min(range(1, 100), key=lambda t: abs(reached(t) - SEEN))


def simulate(found: FederatedDataset, **options: object) -> atoll.Result:
    plan = atoll.local_sgd(LR, steps=1, batch_size=None)
    return atoll.simulate(
        scalar_model(START), found, algorithm=atoll.fedavg(plan), progress=False, **{"rounds": 60, **options}
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "better", "least", "best"),
    [
        ([3, 2, 1, 2], -1, 0.0, 2),
        ([3, 2, 2, 2], -1, 0.0, 1),
        ([1, 2, 3], 1, 0.0, 2),
        ([1, 1.5, 2.1], 1, 1.0, 2),
        ([math.nan, 2, math.inf], 1, 0.0, 1),
        ([math.nan, math.nan], -1, 0.0, -1),
        ([], 1, 0.0, -1),
    ],
)
def test_the_best_of_some_values(values: list[float], better: int, least: float, best: int) -> None:
    rule = early_stopping(2, least=least)
    assert rule.best(values, better) == best
    assert rule.done(values, better) == (len(values) - 1 - best >= 2)


@pytest.mark.parametrize("patience", [1, 4])
def test_a_run_ends_patience_rounds_after_its_best(patience: int) -> None:
    result = simulate(data(), stop=early_stopping(patience))
    assert len(result.history) == BEST + patience
    assert float(result.vector) == pytest.approx(reached(BEST + patience), abs=1e-12)
    assert result.notes == [
        f"stopped after round {BEST + patience}: the validation loss was best after round {BEST} "
        f"({result.history[BEST - 1].validation['loss']:.6g}). rounds={BEST} without stop gives that model."
    ]
    assert float(simulate(data(), rounds=BEST).vector) == pytest.approx(reached(BEST), abs=1e-12)


def test_evaluations_count_not_rounds() -> None:
    result = simulate(data(), stop=early_stopping(2), evaluate_every=5)
    seen = [r.round for r in result.history if r.validation]
    best = min(seen, key=lambda t: (reached(t) - SEEN) ** 2)
    assert seen[-1] == len(result.history) == best + 10


def test_a_run_that_improves_to_the_end_is_not_stopped() -> None:
    result = simulate(data(), stop=early_stopping(3), rounds=BEST)
    assert len(result.history) == BEST and result.notes == []


def test_clients_that_do_not_train_may_validate() -> None:
    train = {f"c{i}": centred(TARGET) for i in range(2)}
    others = FederatedDataset.from_arrays({"v": centred(SEEN)})
    result = simulate(FederatedDataset.from_arrays(train, test=train), stop=early_stopping(2, clients=others))
    assert len(result.history) == BEST + 2
    assert result.history[0].validation["loss"] == pytest.approx((reached(1) - SEEN) ** 2 / 2)
    with pytest.raises(InvalidArgument, match=r"clients=\['c0', 'c1'\] .*do not train"):
        simulate(
            FederatedDataset.from_arrays(train), stop=early_stopping(2, clients=FederatedDataset.from_arrays(train))
        )


@pytest.mark.parametrize("personal", [False, True])
def test_personal_models_may_be_looked_at(personal: bool) -> None:
    """Alone, clients train models of their own while the global one stands still."""
    result = atoll.simulate(
        scalar_model(START), data(), algorithm=atoll.local_only(atoll.local_sgd(LR, steps=1, batch_size=None)),
        rounds=60, progress=False, stop=early_stopping(2, personal=personal),
    )  # fmt: skip
    assert len(result.history) == (BEST + 2 if personal else 3)


@pytest.mark.parametrize("rounds", [BEST - 3, BEST + 1, BEST + 2])
def test_a_resumed_run_stops_where_it_would_have(rounds: int, tmp_path: Path) -> None:
    """Also one that was killed in the round it was to stop after, or is resumed when it has stopped."""
    stop = early_stopping(2)
    whole = simulate(data(), stop=stop)
    first = simulate(data(), rounds=rounds, stop=stop, directory=tmp_path / "run", checkpoint_every=1)
    assert len(first.history) == rounds
    again = simulate(data(), stop=stop, directory=tmp_path / "run", resume=True)
    assert torch.equal(again.vector, whole.vector) and len(again.history) == len(whole.history)
    assert again.notes == whole.notes
    with pytest.raises(atoll.errors.RunError, match=r"stop\.patience"):
        simulate(data(), stop=early_stopping(9), directory=tmp_path / "run", resume=True)


def test_what_is_refused() -> None:
    train = {"c": centred(TARGET)}
    plain = FederatedDataset.from_arrays(train, test=train)
    with pytest.raises(InvalidArgument, match=r"needs validation examples.*validation=0\.2.*Test examples cannot"):
        simulate(plain, stop=early_stopping(2))
    with pytest.raises(InvalidArgument, match=r"metric='accuracy' is unknown. Known: loss"):
        simulate(data(), stop=early_stopping(2, "accuracy"))
    with pytest.raises(InvalidArgument, match=r"evaluate_every=0 .*at least 1 with stop="):
        simulate(data(), stop=early_stopping(2), evaluate_every=0)
    with pytest.raises(InvalidArgument, match="stop=3"):
        simulate(data(), stop=3)
    for options in ({"patience": 0}, {"patience": True}, {"metric": ""}, {"least": -1.0}, {"clients": ["a"]}):
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            early_stopping(**{"patience": 2, **options})  # type: ignore[arg-type]


def test_metrics_that_are_to_grow_do() -> None:
    kind = MODELS["perceptron"]
    found = kind.data((12, 12, 12)).split(test=0.0, validation=0.3)
    result = atoll.simulate(
        kind.model(metrics=("accuracy",)), found, algorithm=atoll.fedavg(atoll.local_sgd(0.2, batch_size=4)), rounds=40,
        progress=False, stop=early_stopping(5, "accuracy"),
    )  # fmt: skip
    values = [r.validation["accuracy"] for r in result.history]
    assert len(values) < 40 and max(values[:-5]) >= max(values[-5:])
