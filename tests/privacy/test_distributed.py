"""Distributed noise: the accountants against direct computation, the scheme's promises, and end to end under a ring."""

import itertools
import math

import numpy as np
import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.rdp import rdp_privacy_accountant
from problems import scalar_model
from registry import MODELS
from scipy import stats
from torch import Tensor

import atoll
from atoll import transforms
from atoll.errors import CompositionError, InvalidArgument
from atoll.privacy import distributed as d
from atoll.privacy.distributed import Kind, Scheme
from atoll.rounds import Process
from atoll.secret import Source
from atoll.transforms import discrete_gaussian, secure_sum, skellam
from atoll.transforms.chain import compose, keys_of

KINDS: tuple[Kind, ...] = ("discrete_gaussian", "skellam")
STAGES = {"discrete_gaussian": discrete_gaussian, "skellam": skellam}
kinds = pytest.mark.parametrize("kind", KINDS)


def agreed(kind: Kind, **options: float) -> Scheme:
    given = {"clip": 2.0, "noise_multiplier": 1.0, "survivors": 5, "clients": 8, "bits": 24, "length": 64, "block": 64}
    return d.scheme(kind, **{**given, **options})  # pyright: ignore[reportArgumentType]


def divergence(p: np.ndarray, q: np.ndarray, order: int) -> float:
    keep = (p > 1e-250) & (q > 1e-250)
    return float(np.log(np.exp(order * np.log(p[keep]) - (order - 1) * np.log(q[keep])).sum()) / (order - 1))


# --- accounting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 3, 8])
@pytest.mark.parametrize(("variance", "shift"), [(4.0, 1), (30.0, 1), (30.0, 3)])
def test_skellam_divergences_are_not_below_the_true_ones(order: int, variance: float, shift: int) -> None:
    x = np.arange(-400, 401)
    p, q = (stats.skellam.pmf(x - by, variance / 2, variance / 2) for by in (shift, 0))
    true = divergence(p, q, order)
    told = d.skellam_divergence(order, float(shift), 1, variance)
    assert true <= told <= 2 * true


def test_skellam_divergence_by_hand() -> None:
    """Norm 2, d = 9, so that the L1 norm is 4 at most; variance 10, order 3."""
    assert math.isclose(d.skellam_divergence(3, 2.0, 9, 10.0), 3 * 4 / 20 + min((5 * 4 + 24) / 400, 12 / 20))
    assert math.isclose(d.skellam_divergence(3, 0.5, 9, 10.0), 3 * 0.25 / 20 + min((5 * 0.25 + 1.5) / 400, 0.75 / 20))


@pytest.mark.parametrize("order", [2, 5])
@pytest.mark.parametrize(("clients", "parameter"), [(2, 0.6), (3, 1.5)])
def test_sums_of_discrete_gaussians_diverge_no_more_than_they_say(order: int, clients: int, parameter: float) -> None:
    x = np.arange(-60, 61)
    one = np.exp(-(x**2) / (2 * parameter**2))
    one /= one.sum()
    total = one
    for _ in range(clients - 1):
        total = np.convolve(total, one)
    own = Scheme("discrete_gaussian", 1.0, 1, clients, clients, 1.0, 1.0, parameter)
    assert divergence(total[1:], total[:-1], order) <= own.rdp(order) + 1e-12


def test_concentration_by_hand() -> None:
    own = Scheme("discrete_gaussian", 1.0, 100, 2, 3, 1.0, 4.0, 0.5)
    t = 10 * (math.exp(-2 * math.pi**2 * 0.25 / 2) + math.exp(-2 * math.pi**2 * 0.25 * 2 / 3))
    share = 4 / (math.sqrt(2) * 0.5)
    expected = min(math.sqrt(share**2 + t * 50), share + t * 10)
    assert math.isclose(d.gaussian_concentration(own), expected) and math.isclose(own.rdp(6), 3 * expected**2)


@kinds
def test_with_fine_grids_it_is_the_gaussian_mechanism(kind: Kind) -> None:
    own = agreed(kind, bits=40, noise_multiplier=2.0)
    for order in (2, 16, 64):
        assert math.isclose(own.rdp(order), order / (2 * 2.0**2), rel_tol=1e-4)
    accountant = rdp_privacy_accountant.RdpAccountant(list(d.ORDERS))
    accountant.compose(dp_event.GaussianDpEvent(2.0), 30)
    assert math.isclose(d.epsilon(own, rounds=30, delta=1e-6), accountant.get_epsilon(1e-6), rel_tol=1e-4)


@kinds
def test_epsilon_grows_with_rounds_and_falls_with_noise(kind: Kind) -> None:
    found = [d.epsilon(agreed(kind, noise_multiplier=z), rounds=10, delta=1e-5) for z in (0.5, 1.0, 2.0, 4.0)]
    assert found == sorted(found, reverse=True)
    told = [d.epsilon(agreed(kind), rounds=t, delta=1e-5) for t in (0, 1, 10, 100)]
    assert told[0] == 0 and told == sorted(told)
    for rounds, delta, name in ((-1, 1e-5, "rounds"), (1, 0.0, "delta"), (1, 1.0, "delta")):
        with pytest.raises(InvalidArgument, match=f"^{name}="):
            d.epsilon(agreed(kind), rounds=rounds, delta=delta)


# --- the scheme -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clip", "length"), [(3.0, 16), (30.0, 64), (1000.0, 1024)])
def test_rounded_rows_are_short_often_enough(clip: float, length: int) -> None:
    source, bound = Source(seed=0), d.rounded_norm(clip, length)
    row = source.normal(1.0, length)
    row *= clip / row.norm()
    rounded = torch.floor(row + source.uniform((2000, length)))
    short = float((rounded.norm(dim=1) <= bound).double().mean())
    assert short >= 1 - d.BETA and bound <= clip + math.sqrt(length)


@kinds
@pytest.mark.parametrize("bits", [16, 24, 32, 48])
def test_noise_of_the_survivors_is_what_was_asked_for(kind: Kind, bits: int) -> None:
    own = agreed(kind, bits=bits)
    assert math.isclose(own.std, own.norm * own.granularity, rel_tol=1e-12)
    assert own.norm * own.granularity >= own.clip
    assert math.log2(own.granularity).is_integer()
    drawn = torch.stack([own.encode(torch.zeros(64, dtype=torch.float64), Source(seed=i)) for i in range(200)])
    each = drawn.double() * own.granularity * math.sqrt(own.survivors)
    assert abs(float(each.square().mean()) / own.std**2 - 1) < 0.08
    if bits >= 24:
        assert stats.kstest(each.numpy().ravel() / own.std, "norm").pvalue > 1e-4


@kinds
def test_more_bits_make_the_grid_finer(kind: Kind) -> None:
    found = [agreed(kind, bits=b, length=4096, block=4096).granularity for b in (12, 16, 20, 24)]
    assert found == sorted(found, reverse=True) and found[0] > found[-1]


@kinds
def test_integers_without_noise_stay_within_the_norm(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    own = agreed(kind, bits=13)
    monkeypatch.setattr(Source, kind, lambda self, scale, size: torch.zeros(size, dtype=torch.int64))
    row = torch.full((64,), own.clip / 8, dtype=torch.float64)
    sent = torch.stack([own.encode(row, Source(seed=i)) for i in range(100)]).double()
    assert float(sent.norm(dim=1).max()) <= own.norm
    assert float((sent.mean(dim=0) * own.granularity - row).abs().max()) < 3 * own.granularity


def test_small_rings_are_refused_with_a_larger_one() -> None:
    with pytest.raises(InvalidArgument, match=r"bits=8 is too small for 100 clients.*use bits=24"):
        agreed("skellam", bits=8, clients=100)


# --- the stages -------------------------------------------------------------------------------------------------------


def chain_of(kind: Kind, **options: object):
    given = {"clip": 1.0, "noise_multiplier": 1e-6, "survivors": 2, "clients": 6, "seed": 3}
    stage = STAGES[kind](**{**given, **options})
    return compose((stage,), transforms.secure_sum(clip=1.0, bits=32))


def total(chain, rows: Tensor, split: int, round: int = 0) -> Tensor:
    """What the server decodes from the sum of rows."""
    keys = keys_of(5, round, np.arange(len(rows), dtype=np.uint64), split)
    wire, _ = chain.encode(rows, {}, (None,), keys)
    sizes = chain.sizes(rows.shape[1], split)[-1]
    assert wire.shape == (len(rows), sizes[0]) and wire.dtype == torch.int64
    codes = chain.channel.seal(wire, sizes[1], torch.ones(len(rows), 1), torch.zeros(len(rows), 2), len(rows), keys)
    assert codes["ring"].dtype == torch.int32
    opened = chain.channel.unseal(transforms.channel.add(codes), sizes[1], len(rows), len(rows))
    assert opened.weight == len(rows) and opened.saturated == 0
    common = keys_of(5, round, np.arange(0, dtype=np.uint64), split)
    return chain.decode_sum(torch.cat((opened.weighted, opened.sums)), (None,), rows.shape[1], common)


@kinds
@pytest.mark.parametrize(("length", "split"), [(1, 1), (7, 7), (10, 7), (100, 60), (9000, 8999), (5, 0)])
def test_the_sum_comes_back(kind: Kind, length: int, split: int) -> None:
    rows = torch.randn(4, length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows *= 0.9 / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(total(chain_of(kind), rows, split), rows.sum(dim=0), atol=2e-4, rtol=0)


@kinds
def test_long_rows_are_clipped_jointly(kind: Kind) -> None:
    rows = torch.tensor([[3.0, 0.0, 4.0], [0.3, 0.0, 0.4]])
    torch.testing.assert_close(
        total(chain_of(kind), rows, 2), torch.tensor([0.9, 0.0, 1.2]).double(), atol=1e-4, rtol=0
    )


@kinds
def test_noise_on_the_sum_has_its_size_whoever_takes_part(kind: Kind) -> None:
    """With as many clients as survivors it is the noise multiplier; each more client adds a share."""
    chain = chain_of(kind, noise_multiplier=0.5, survivors=2, seed=1)
    for count in (2, 4):
        drawn = torch.cat([total(chain, torch.zeros(count, 2000), 1500, round) for round in range(5)]).numpy()
        assert stats.kstest(drawn / (0.5 * math.sqrt(count / 2)), "norm").pvalue > 1e-3


@kinds
@pytest.mark.parametrize(("count", "says"), [(3, "needs 4 clients in a sum"), (7, "does not fit a cohort of 7")])
def test_cohorts_too_small_or_too_large_are_refused_before_any_work(kind: Kind, count: int, says: str) -> None:
    stage = (discrete_gaussian if kind == "discrete_gaussian" else skellam)(
        clip=1.0, noise_multiplier=1.0, survivors=4, clients=6
    )
    run = Process(
        scalar_model(), atoll.fedavg(atoll.local_sgd(0.1)), transforms=(stage,), engine="loop",
        channel=secure_sum(clip=1.0, bits=32, least=4), aggregator=atoll.aggregators.mean(weights="uniform"),
    )  # fmt: skip
    with pytest.raises(CompositionError, match=says):
        run.open(run.init(), [str(i) for i in range(count)], 100)


@kinds
@pytest.mark.parametrize("count", [1, 7])
def test_sums_of_too_few_or_too_many_are_refused(kind: Kind, count: int) -> None:
    with pytest.raises(CompositionError, match=f"met a sum of {count} clients"):
        total(chain_of(kind), torch.zeros(count, 10), 10)


@kinds
def test_one_client_moves_the_integers_by_the_norm_at_most(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the row: without noise, what is sent is never longer than the accountant believes."""
    monkeypatch.setattr(Source, kind, lambda self, scale, size: torch.zeros(size, dtype=torch.int64))
    chain = chain_of(kind, noise_multiplier=3.0, bits=16)
    own = agreed(kind, clip=1.0, noise_multiplier=3.0, survivors=2, clients=6, bits=16, length=64, block=64)
    worst = [torch.eye(50)[0] * 1e6, torch.ones(50), -torch.ones(50) * 1e-3, torch.full((50,), torch.nan)]
    keys = keys_of(5, 0, np.arange(4, dtype=np.uint64), 50)
    sent, _ = chain.encode(torch.stack(worst), {}, (None,), keys)
    assert float(sent[:, :-1].double().norm(dim=1).max()) <= own.norm


@kinds
def test_it_stands_last_before_a_ring_that_is_large_enough(kind: Kind) -> None:
    stage = STAGES[kind](clip=1.0, noise_multiplier=1.0, survivors=2, clients=3, bits=32)
    for more, channel, says in (
        ((), transforms.plain(), "before the channel plain"),
        ((), transforms.secure_sum(clip=1.0, bits=24), "before the channel secure_sum"),
        ((transforms.rotate(),), transforms.secure_sum(clip=1.0), "rotate cannot stand after"),
    ):
        with pytest.raises(CompositionError, match=says):
            compose((stage, *more), channel)
    compose((transforms.clip_norm(1.0), stage), transforms.secure_sum(clip=1.0))


@kinds
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip", 0.0), ("clip", math.inf), ("noise_multiplier", 0.0), ("noise_multiplier", math.nan), ("survivors", 0),
        ("clients", 1.5), ("survivors", 9), ("bits", 7), ("bits", 49), ("seed", 1.5),
    ],
)  # fmt: skip
def test_impossible_arguments_are_refused_by_name(kind: Kind, name: str, value: float) -> None:
    given = {"clip": 1.0, "noise_multiplier": 1.0, "survivors": 2, "clients": 3} | {name: value}
    with pytest.raises(InvalidArgument, match=f"^{name}="):
        STAGES[kind](**given)


def run(kind: Kind, engine: str, noise_multiplier: float = 1e-5, **options: object) -> atoll.Result:
    model, data = MODELS["perceptron"].model(), MODELS["perceptron"].data((5, 3, 8, 4))
    stage = STAGES[kind](clip=0.5, noise_multiplier=noise_multiplier, survivors=3, clients=4, bits=40, seed=2)
    return atoll.simulate(
        model, data, algorithm=atoll.fedavg(atoll.local_sgd(0.1, epochs=1, batch_size=4)), rounds=3,
        transforms=(stage,), channel=transforms.secure_sum(clip=1.0, bits=40), engine=engine, progress=False,
        **{"aggregator": atoll.aggregators.mean(weights="uniform"), **options},
    )  # fmt: skip


@kinds
def test_training_under_a_ring_is_training_of_clipped_rows(kind: Kind) -> None:
    found = run(kind, "vectorized").vector
    usual = atoll.simulate(
        MODELS["perceptron"].model(), MODELS["perceptron"].data((5, 3, 8, 4)),
        algorithm=atoll.fedavg(atoll.local_sgd(0.1, epochs=1, batch_size=4)), rounds=3,
        transforms=(transforms.clip_norm(0.5),), aggregator=atoll.aggregators.mean(weights="uniform"), progress=False,
    ).vector  # fmt: skip
    torch.testing.assert_close(found, usual, atol=1e-4, rtol=0)


@kinds
def test_seeded_noise_is_the_same_on_every_engine(kind: Kind) -> None:
    found = [run(kind, engine, 1.0).vector for engine in ("vectorized", "loop")]
    torch.testing.assert_close(found[0], found[1])


def test_weights_are_refused() -> None:
    with pytest.raises(CompositionError, match="with weights"):
        run("skellam", "loop", aggregator=atoll.aggregators.mean())


def test_private_noise_differs_between_runs() -> None:
    stage = skellam(clip=1.0, noise_multiplier=1.0, survivors=2, clients=3)
    keys = keys_of(5, 0, np.arange(2, dtype=np.uint64), 40)
    drawn = [stage.encode(torch.zeros(2, 40), {}, None, keys)[0] for _ in range(2)]
    rows = [r[:-1] for pair in drawn for r in pair]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(rows, 2))
