"""Correlated noise on the sum: its law over all rounds, what it does not depend on, and what is refused by name."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import silent, wide
from scipy import stats
from torch import Tensor, nn

import atoll
from atoll import aggregators, privacy, releases, sampling, transforms
from atoll.errors import CompositionError, InvalidArgument
from atoll.privacy import factorization
from atoll.privacy.correlated import Correlated
from atoll.privacy.noise import deviation
from atoll.rounds import Process
from atoll.secret import Source, grid
from atoll.transforms import adaptive_clip, clip_norm, correlated_noise, gaussian_noise, rand_k, rotate

MEAN = aggregators.mean(weights="uniform", denominator="expected")
ROUNDS, APART, MULTIPLIER, CLIP = 9, 3, 1.7, 0.3
NAMES = ("buffered", "banded", "tree", "independent")


def released(folder: Path, size: int, name: str, seed: int | None) -> tuple[Tensor, Tensor, atoll.Result]:
    """What a run without updates releases [n, L], and the vectors that were drawn for it [m, L]."""
    result = atoll.simulate(
        wide(size), silent(size, 6), rounds=ROUNDS, cohort=sampling.min_separation(2, APART), aggregator=MEAN,
        algorithm=atoll.fedavg(atoll.local_sgd(1.0, steps=1, batch_size=None)), progress=False, engine="loop",
        transforms=(clip_norm(CLIP), correlated_noise(MULTIPLIER, strategy=name, seed=seed)),
        directory=folder, checkpoint_every=100,
    )  # fmt: skip
    kept = [releases._read(p)[0] for p in sorted((folder / "releases").glob("round-*"))]
    return torch.stack([k["sum"] for k in kept]), torch.cat([k["drawn"] for k in kept]), result


# --- the noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_without_updates_releases_the_strategy_s_noise(name: str, seed: int | None, tmp_path: Path) -> None:
    size = 20_000
    sums, drawn, result = released(tmp_path, size, name, seed)
    strategy = factorization.named(name, ROUNDS, APART)
    std = MULTIPLIER * strategy.sensitivity * CLIP
    # What was drawn is independent and has the stated deviation.
    assert len(drawn) == len(strategy.matrix())
    for row in drawn:
        assert stats.kstest(row.numpy(), "norm", args=(0.0, std)).pvalue > 1e-6
        assert abs(float(row.std()) / std - 1) < 6 / math.sqrt(2 * size)
    correlation = torch.corrcoef(drawn) - torch.eye(len(drawn), dtype=torch.float64)
    assert float(correlation.abs().max()) < 6 / math.sqrt(size)
    # What was released is the decoder's combination of it, up to the grid.
    torch.testing.assert_close(sums, strategy.decoder() @ drawn, rtol=0, atol=ROUNDS * ROUNDS * grid(std))
    # Every sum is a point of the grid, and the model has their sum, whose errors are those that are told.
    points = sums / grid(deviation(MULTIPLIER, CLIP, size, sensitivity=strategy.sensitivity, rounds=ROUNDS))
    assert torch.equal(points, points.round())
    prefix = sums.cumsum(dim=0)
    torch.testing.assert_close(result.vector, prefix[-1] / 2)
    errors = MULTIPLIER * CLIP * strategy.errors()
    found = prefix.square().mean(dim=1).sqrt()
    assert float((found / errors - 1).abs().max()) < 6 / math.sqrt(2 * size)


def test_noise_is_new_in_every_run(tmp_path: Path) -> None:
    found = [released(tmp_path / str(i), 50, "buffered", None)[1] for i in range(2)]
    assert len({row.numpy().tobytes() for rows in found for row in rows}) == 2 * ROUNDS
    seeded = [released(tmp_path / f"s{i}", 50, "buffered", 1)[1] for i in range(2)]
    assert torch.equal(*seeded)


@pytest.mark.parametrize("name", NAMES)
def test_noise_does_not_depend_on_the_data_in_any_bit(name: str) -> None:
    """Two runs with the same seed differ by what was sent, rounded to the grid, and by nothing else."""
    strategy = factorization.named(name, ROUNDS, APART)
    draw, length = torch.Generator().manual_seed(0), 500
    given = torch.randn(2, ROUNDS, length, generator=draw, dtype=torch.float64) * CLIP
    found = list[Tensor]()
    for data in given:
        noise = Correlated(strategy, MULTIPLIER, CLIP)
        found.append(torch.stack([noise.add(data[t], Source(seed=t))[0] for t in range(ROUNDS)]))
    spacing = grid(Correlated(strategy, MULTIPLIER, CLIP).deviation(length))
    rounded = (given / spacing).round() * spacing
    assert torch.equal(found[0] - rounded[0], found[1] - rounded[1])
    assert float((found[0] - rounded[0]).abs().min()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_given_what_was_released_a_sum_is_fresh_noise_around_what_the_strategy_encodes(name: str) -> None:
    """C (Y - X) = Z, so that what is released is a function of C X + Z, which is what the guarantee is about."""
    strategy = factorization.named(name, ROUNDS, APART)
    given = torch.randn(ROUNDS, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise, sums, drawn = Correlated(strategy, MULTIPLIER, CLIP), list[Tensor](), list[Tensor]()
    for t in range(ROUNDS):
        total, secret = noise.add(given[t], Source(seed=t))
        sums.append(total)
        drawn.append(secret)
    encoded = strategy.matrix() @ (torch.stack(sums) - given)
    std = noise.deviation(30)
    if name == "tree":  # the nodes' sums are known beside the prefix sums; here only these are to be seen
        encoded, drawn = torch.stack(sums) - given, [strategy.decoder() @ torch.cat(drawn)]
    torch.testing.assert_close(encoded, torch.cat(drawn), rtol=0, atol=1e-6 * std)


@pytest.mark.parametrize("name", NAMES)
def test_noise_goes_on_behind_a_round_that_was_kept(name: str) -> None:
    strategy = factorization.named(name, ROUNDS, APART)
    total = torch.randn(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole, resumed = Correlated(strategy, 1.0, 1.0), Correlated(strategy, 1.0, 1.0)
    for t in range(ROUNDS):
        expected, drawn = whole.add(total, Source(seed=t))
        if t % 3 == 2:
            found, _ = resumed.add(total, Source(seed=t))
            assert torch.equal(found, expected)
        else:
            resumed.redo(drawn)
        state = None if resumed.state is None else resumed.state.clone()  # what a file keeps
        resumed = Correlated(strategy, 1.0, 1.0, resumed.round, state)
    assert torch.equal(whole.state, resumed.state)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sum_that_no_noise_hides_is_refused_before_any_is_drawn(value: float) -> None:
    noise = Correlated(factorization.named("buffered", ROUNDS, APART), 1.0, 1.0)
    with pytest.raises(InvalidArgument, match="NaN or infinities"):
        noise.add(torch.tensor([0.0, value], dtype=torch.float64), Source(seed=1))
    assert noise.round == 0 and noise.state is None


def test_noise_is_sized_for_the_strategy_and_for_rounding() -> None:
    plain = deviation(1.5, 0.2, 1000)
    assert plain == pytest.approx(0.3, rel=1e-5) and plain > 0.3
    for length, rounds in ((1000, 10), (50_000_000, 1000)):
        std = deviation(1.5, 0.2, length, sensitivity=4.0, rounds=rounds)
        spacing = grid(std)
        shift = 4.0 * (0.2 + spacing * math.sqrt(length)) + 2 * spacing * math.sqrt(length * rounds)
        assert 1.5 * shift <= std <= 1.5 * 4.0 * 0.2 * 1.001
    with pytest.raises(InvalidArgument, match=r"noise_multiplier=10000.0.*less for sums of 50,000,000 numbers"):
        deviation(1e4, 1.0, 50_000_000, sensitivity=100.0, rounds=10_000)


def test_less_noise_reaches_the_model_than_fresh_noise_adds() -> None:
    errors = {n: float(factorization.named(n, 200, 50).errors().square().mean().sqrt()) for n in NAMES}
    assert errors["banded"] < errors["buffered"] < errors["tree"] < errors["independent"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"transforms": (correlated_noise(1.0),)}, r"correlated_noise needs clipped rows before it.*clip_norm\(1.0\)"),
        (
            {"transforms": (clip_norm(1.0), correlated_noise(1.0), gaussian_noise(1.0))},
            r"gaussian_noise cannot stand after correlated_noise.*noised twice",
        ),
        (
            {"transforms": (adaptive_clip(), correlated_noise(1.0))},
            r"adaptive_clip cannot stand.*same norm. Use clip_norm",
        ),
        (
            {"transforms": (clip_norm(1.0), rotate(), correlated_noise(1.0))},
            r"rotate cannot stand before correlated_noise.*Put rotate behind correlated_noise",
        ),
        ({"transforms": (clip_norm(1.0), rand_k(0.5), correlated_noise(1.0))}, r"rand_k cannot stand before"),
        ({"aggregator": aggregators.mean()}, r'correlated_noise.*weights="uniform", denominator="expected"'),
        ({"aggregator": aggregators.median()}, r"aggregator median: noise protects a sum"),
        ({"channel": transforms.secure_sum(clip=1.0)}, r'channel secure_sum.*Use channel="plain"'),
        ({"algorithm": atoll.pooled(atoll.local_sgd(0.1))}, r"pooled, which puts all their examples in one place"),
        ({"algorithm": atoll.fednova(atoll.local_sgd(0.1))}, r"fednova sends numbers of other units"),
    ],
)
def test_what_correlated_noise_cannot_protect_is_refused_by_name(options: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {
        "algorithm": atoll.fedavg(atoll.local_sgd(0.1)), "aggregator": MEAN,
        "transforms": (clip_norm(1.0), correlated_noise(1.0)),
    } | options  # fmt: skip
    with pytest.raises(CompositionError, match=said):
        Process(wide(3), given.pop("algorithm"), **given)


@pytest.mark.parametrize("behind", [rotate(), rand_k(0.5)])
def test_stages_may_stand_behind_the_noise(behind: Any) -> None:
    result = atoll.simulate(
        wide(8), silent(8, 4), rounds=3, cohort=sampling.min_separation(2, 2), aggregator=MEAN, progress=False,
        algorithm=atoll.fedavg(atoll.local_sgd(1.0)), transforms=(clip_norm(1.0), correlated_noise(1.0), behind),
    )  # fmt: skip
    assert bool((result.vector != 0).all())


def test_correlated_noise_is_not_added_round_by_round() -> None:
    run = Process(
        wide(3), atoll.fedavg(atoll.local_sgd(0.1)), aggregator=MEAN, transforms=(clip_norm(1.0), correlated_noise(1.0))
    )
    with pytest.raises(CompositionError, match=r"nobody remembers here: use atoll.simulate"):
        run.next(run.init(), silent(3, 2))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, r"noise_multiplier= or epsilon=, and not both"),
        ({"noise_multiplier": 0.0}, r"noise_multiplier=0.0"),
        ({"epsilon": 1.0, "budget": 2.0}, r"budget=2.0.*left out with epsilon"),
        ({"noise_multiplier": 1.0, "delta": 1.0}, r"delta=1.0"),
        ({"noise_multiplier": 1.0, "seed": 1.5}, r"seed=1.5"),
        ({"noise_multiplier": 1.0, "strategy": "buffer"}, r"strategy='buffer' is unknown.*Did you mean 'buffered'"),
        ({"noise_multiplier": 1.0, "strategy": factorization.tree(4)}, r"Honaker's estimate.*honaker=False"),
    ],
)
def test_arguments_outside_their_range(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        correlated_noise(**wrong)


# --- it helps ---------------------------------------------------------------------------------------------------------


def test_training_under_correlated_noise_learns_what_fresh_noise_hides() -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2000, 4, generator=draw)
    y = (x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) > 0).long()
    data = atoll.partition.iid((x, y), clients=200, seed=0)
    found = {}
    for name in ("buffered", "independent"):
        torch.manual_seed(0)
        result = atoll.simulate(
            atoll.Model(nn.Linear(4, 2), "cross_entropy"), data, rounds=30, progress=False, aggregator=MEAN,
            algorithm=atoll.fedavg(atoll.local_sgd(0.5, epochs=2)), cohort=sampling.min_separation(10, 20),
            transforms=(clip_norm(1.0), correlated_noise(epsilon=4.0, delta=1e-3, strategy=name, seed=2)),
        )  # fmt: skip
        assert result.privacy[0]["epsilon"] <= 4.0 and privacy.explain(result)
        found[name] = float((result.predict(x).argmax(dim=1) == y).float().mean())
    assert found["buffered"] > found["independent"] - 0.02 and found["buffered"] > 0.85, found
