"""Adaptive clipping: where the norm goes, and what update and bit cost together."""

import math
from typing import Any

import pytest
import torch
from problems import points, quadratics, scalar_model
from torch import Tensor

import atoll
from atoll import aggregators
from atoll.errors import CompositionError, InvalidArgument
from atoll.privacy.noise import deviation
from atoll.rounds import Process
from atoll.transforms import adaptive_clip, clip_norm, gaussian_noise, rand_k, rotate

MEAN = aggregators.mean(weights="uniform", denominator="expected")


def process(*stages: Any, **options: Any) -> Process:
    given: dict[str, Any] = {"aggregator": MEAN, "engine": "loop"} | options
    plan = atoll.local_sgd(1e-3, steps=1, batch_size=None)
    return Process(scalar_model(), atoll.fedavg(plan), transforms=stages, **given)


def norms(*lengths: float) -> Any:
    """Clients whose first update has these lengths: a step of 1e-3 on b / 2 (x - 1)^2 times 1000."""
    return quadratics([1e3 * n for n in lengths], [1.0] * len(lengths))


def test_the_norm_follows_the_formula_exactly_without_noise() -> None:
    run = process(adaptive_clip(0.5, quantile=0.25, rate=0.3))
    state, _ = run.next(run.init(), norms(0.1, 0.4, 0.5, 3.0))
    assert float(state.transforms[0]) == pytest.approx(0.5 * math.exp(-0.3 * (0.75 - 0.25)), rel=1e-9)
    assert float(run.vector(state)) == pytest.approx((0.1 + 0.4 + 0.5 + 0.5) / 4, rel=1e-9)


@pytest.mark.parametrize("aggregator", [MEAN, aggregators.mean()])
def test_behind_a_stage_that_shortens_rows_the_bits_are_still_not_weighted(aggregator: Any) -> None:
    data = points([1.0] * 4, [0.1, 0.2, 0.3, 3e4], [2, 2, 2, 40])
    model = atoll.Model(torch.nn.Linear(1, 4).double(), loss=lambda output, target: output.sum(dim=1) * target[:, 1])
    plan = atoll.local_sgd(1e-3, steps=1, batch_size=None)
    given: dict[str, Any] = {"aggregator": aggregator, "engine": "loop"}
    run = Process(model, atoll.fedavg(plan), transforms=(rand_k(0.5), adaptive_clip(0.5, quantile=0.25)), **given)
    state, _ = run.next(run.init(), data, expected=4.0)
    assert float(state.transforms[1]) == pytest.approx(0.5 * math.exp(-0.2 * (0.75 - 0.25)), rel=1e-9)


@pytest.mark.parametrize("start", [1e-3, 50.0])
def test_the_norm_moves_to_the_quantile(start: float) -> None:
    lengths = [float(i) for i in range(1, 10)]
    stage = adaptive_clip(start, quantile=0.5, rate=0.5)
    state = stage.init(1)
    rows = torch.tensor(lengths, dtype=torch.float64)[:, None]
    for _ in range(200):
        wire, _ = stage.encode(rows, {}, state, None)  # type: ignore[arg-type]
        assert stage.learn is not None
        state = stage.learn(state, wire.sum(dim=0), 9.0)  # type: ignore[union-attr]
    assert 4.0 <= float(state) < 6.0


def test_update_and_bit_cost_together_what_the_multiplier_says() -> None:
    share, z, clip, size = 0.2, 1.5, 0.7, 5000
    stage = adaptive_clip(clip, share=share)
    bound = stage.bound(None)
    assert bound is not None
    rows = torch.randn(64, size, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 64)[:, None]
    wire, _ = stage.encode(rows, {}, stage.init(size), None)  # type: ignore[arg-type]
    assert isinstance(wire, Tensor) and wire.shape == (64, size + 1)
    lengths = torch.linalg.vector_norm(wire.double(), dim=1)
    assert 0.999 * bound < float(lengths.max()) <= bound
    scale = 2 * math.sqrt(share / (1 - share))
    std = deviation(z, bound, size + 1)  # of every coordinate, in units of the clip norm
    on_update, on_bits = std, std / scale
    assert on_bits == pytest.approx(z / (2 * math.sqrt(share)), rel=1e-4)
    assert on_update**-2 + (2 * on_bits) ** -2 == pytest.approx(z**-2, rel=1e-4)


def test_noise_is_added_to_the_bit_sum_and_follows_the_clip_norm() -> None:
    stages = (adaptive_clip(0.5, share=0.1), rotate(), gaussian_noise(1e-5, seed=0))
    run = process(*stages)
    state, shown = run.init(), list[Tensor]()
    for _ in range(3):
        state, _ = run.next(state, norms(0.1, 0.4, 3.0, 5.0))
    quiet = process(*stages)
    other = quiet.init()

    def show(total: Tensor, bound: float) -> Tensor:
        shown.append(total)
        return total

    for _ in range(3):
        other, _ = quiet.next(
            other, norms(0.1, 0.4, 3.0, 5.0), release=lambda total, bound: shown.append(total) or total
        )
    assert shown[0].shape == (2,)
    assert float(state.transforms[0]) == pytest.approx(float(other.transforms[0]), rel=1e-3)
    assert float(state.transforms[0]) != float(other.transforms[0])
    empty, _ = run.next(run.init(), norms(0.1), [], expected=1.0, release=lambda total, bound: total)
    assert float(empty.transforms[0]) == 0.5, "nobody says anything: half inside is the quantile"


def test_a_state_that_is_kept_goes_on_after_a_resume(tmp_path: Any) -> None:
    given: dict[str, Any] = {
        "algorithm": atoll.fedavg(atoll.local_sgd(1e-3, steps=1, batch_size=None)), "aggregator": MEAN,
        "transforms": (adaptive_clip(0.5), gaussian_noise(1.0, seed=1, accountant="rdp")), "progress": False,
    }  # fmt: skip
    whole = atoll.simulate(scalar_model(), norms(0.1, 0.4, 3.0, 5.0), rounds=4, **given)
    for rounds in (2, 4):
        result = atoll.simulate(
            scalar_model(), norms(0.1, 0.4, 3.0, 5.0), rounds=rounds, directory=tmp_path, resume=rounds == 4, **given
        )
    assert torch.equal(result.vector, whole.vector) and result.privacy[0]["releases"] == 4


def test_what_does_not_fit() -> None:
    with pytest.raises(CompositionError, match=r"adaptive_clip cannot stand before the aggregator median"):
        process(adaptive_clip(), aggregator=aggregators.median())
    assert process(clip_norm(3.0), adaptive_clip(), gaussian_noise(1.0)).chain.noise is not None
    for before in (clip_norm(3.0), adaptive_clip()):  # its bits would be undone, and learnt from, before the noise
        with pytest.raises(CompositionError, match=r"adaptive_clip cannot stand after gaussian_noise: what it learns"):
            process(before, gaussian_noise(1.0), adaptive_clip())
    for wrong in ({"initial": 0.0}, {"quantile": 1.5}, {"rate": -1.0}, {"share": 1.0}, {"share": 0.0}):
        with pytest.raises(InvalidArgument, match=f"{next(iter(wrong))}="):
            adaptive_clip(**wrong)
