"""Sums in a ring of integers: near, never wrapped, the same bits in any order, and in both grades."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import quadratics, scalar_model
from registry import MODELS

import atoll
from atoll import aggregators, random
from atoll.algorithms import fedavg, scaffold
from atoll.errors import CompositionError, InvalidArgument
from atoll.local import local_sgd
from atoll.rounds import Process
from atoll.secagg.groups import deal
from atoll.transforms import Channel, clip_norm, error_feedback, grouped, power_sgd, rand_k, rotate, secure_sum, top_k
from atoll.transforms.base import Codes, Keys
from atoll.transforms.chain import compose, keys_of
from atoll.transforms.channel import Opened, add, merge

FULL_STEP = local_sgd(1.0, steps=1, batch_size=None)


def step(count: int, bits: int) -> float:
    return 1 / ((2 ** (bits - 1) - 1) // count)


def seal(channel: Channel, rows: torch.Tensor, split: int, weights: torch.Tensor, count: int, first: int = 0) -> Codes:
    assert channel.seal is not None
    keys = Keys(0, "channel", 3, random.client_keys([f"c{first + i}" for i in range(len(rows))]))
    metrics = torch.stack((3.0 * torch.ones(len(rows)), 2 * torch.ones(len(rows))), dim=1)
    return channel.seal(rows, split, weights[:, None], metrics, count, keys)


def through(channel: Channel, rows: torch.Tensor, split: int, weights: torch.Tensor) -> Opened:
    assert channel.unseal is not None
    total = add(seal(channel, rows, split, weights, len(rows)))
    return channel.unseal(total, split, len(rows), len(rows))


@settings(max_examples=40)
@given(
    n=st.integers(1, 30),
    bits=st.sampled_from([12, 16, 24, 31, 32, 33, 40, 48]),
    clip=st.floats(1e-3, 1e3),
    cap=st.floats(0.5, 100),
)
def test_sums_are_exact_to_a_step_for_every_client(n: int, bits: int, clip: float, cap: float) -> None:
    draw = torch.Generator().manual_seed(n)
    rows = (torch.rand(n, 6, generator=draw, dtype=torch.float64) * 2 - 1) * clip
    weights = torch.rand(n, generator=draw, dtype=torch.float64) * cap
    opened = through(secure_sum(clip=clip, weight_cap=cap, bits=bits), rows, 4, weights)
    near = n * step(n, bits) * (1 + 1e-9)
    assert float((opened.weighted - (weights[:, None] * rows[:, :4]).sum(0)).abs().max()) <= near * clip * cap
    assert float((opened.sums - rows[:, 4:].sum(0)).abs().max()) <= near * clip
    assert abs(opened.weight - float(weights.sum())) <= near * cap
    assert abs(opened.loss - 1.5 * float(weights.sum())) <= near * cap * 10
    assert opened.saturated == 0


@pytest.mark.parametrize("bits", [16, 31, 32, 48])
@pytest.mark.parametrize("n", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_sum_wraps_at_the_extremes(bits: int, n: int, sign: float) -> None:
    rows = torch.full((n, 3), sign * 2.0, dtype=torch.float64)
    opened = through(
        secure_sum(clip=2.0, weight_cap=5.0, bits=bits), rows, 2, torch.full((n,), 5.0, dtype=torch.float64)
    )
    near = n * step(n, bits) * (1 + 1e-9)
    assert float((opened.weighted - sign * n * 10.0).abs().max()) <= near * 10
    assert float((opened.sums - sign * n * 2.0).abs().max()) <= near * 2
    assert abs(opened.weight - 5.0 * n) <= near * 5


@pytest.mark.parametrize("bits", [16, 32, 40])
def test_a_smaller_cohort_than_announced_opens_the_same(bits: int) -> None:
    """Clients that drop out after sealing leave a sum of the others, on the cohort's grid."""
    channel = secure_sum(clip=1.0, bits=bits)
    rows, weights = torch.full((4, 2), 0.5, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    assert channel.unseal is not None
    opened = channel.unseal(add(seal(channel, rows[:3], 2, weights[:3], 4)), 2, 4, 3)
    assert float((opened.weighted - 1.5).abs().max()) <= 3 * step(4, bits) and abs(opened.weight - 3) <= 3 * step(
        4, bits
    )


@given(order=st.permutations(range(8)), cuts=st.sets(st.integers(1, 7)))
def test_order_and_tiles_do_not_change_a_bit(order: list[int], cuts: set[int]) -> None:
    draw = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(8, 5, generator=draw), torch.rand(8, generator=draw)
    channel = secure_sum(clip=1.0)
    singles = [seal(channel, rows[i : i + 1], 3, weights[i : i + 1], 8, first=i) for i in range(8)]
    expected = add(seal(channel, rows, 3, weights, 8))
    total: Codes | None = None
    bounds = [0, *sorted(cuts), 8]
    for a, b in itertools.pairwise(bounds):
        tile = {n: torch.cat([singles[i][n] for i in order[a:b]]) for n in singles[0]}
        total = add(tile) if total is None else merge(total, add(tile))
    assert total is not None and all(torch.equal(total[n], expected[n]) for n in expected)


def test_whole_rounds_have_the_same_bits_in_any_order() -> None:
    kind = MODELS["perceptron"]
    data = kind.data((3, 5, 1, 4))
    found = []
    for cohort in (["c0", "c1", "c2", "c3"], ["c3", "c1", "c0", "c2"]):
        process = Process(
            kind.model(), scaffold(local_sgd(0.1)), channel=secure_sum(clip=5.0, weight_cap=5.0), engine="loop"
        )
        found.append(process.vector(process.next(process.init(), data, cohort)[0]))
    assert torch.equal(found[0], found[1])


def test_rounding_is_unbiased() -> None:
    channel = secure_sum(clip=1.0, bits=8)
    rows = torch.tensor([[0.3, -0.7, 0.01, 0.0]], dtype=torch.float64).expand(4000, -1)
    sealed = seal(channel, rows, 4, torch.ones(4000, dtype=torch.float64), 8)
    values = sealed["ring"].double()[:, :4] * step(8, 8)
    assert bool(((values.mean(0) - rows[0]).abs() <= 5 * step(8, 8) / 2 / 4000**0.5).all())


def test_values_beyond_the_range_are_cut_and_counted() -> None:
    rows = torch.tensor([[3.0, -0.5], [-4.0, 9.0], [0.1, 0.2]], dtype=torch.float64)
    opened = through(secure_sum(clip=1.0), rows, 1, torch.ones(3, dtype=torch.float64))
    assert opened.saturated == 3
    assert float(opened.weighted[0]) == pytest.approx(1 - 1 + 0.1, abs=1e-7)
    assert float(opened.sums[0]) == pytest.approx(-0.5 + 1 + 0.2, abs=1e-7)
    process = Process(
        scalar_model(), fedavg(local_sgd(0.5, steps=1, batch_size=None)), channel=secure_sum(clip=0.1, weight_cap=2.0)
    )
    state, metrics = process.next(process.init(), quadratics((1.0, 1.0, 1.0), (0.1, 9.0, 0.1)))
    # One value is beyond the clip, and the loss of that client beyond the largest.
    assert metrics["saturated"] == 2.0
    assert float(process.vector(state)) == pytest.approx((0.05 + 0.1 + 0.05) / 3, abs=1e-6)


def test_nothing_is_cut_behind_a_clip_norm() -> None:
    kind = MODELS["perceptron"]
    process = Process(
        kind.model(),
        fedavg(local_sgd(0.5)),
        transforms=(clip_norm(0.01),),
        channel=secure_sum(clip=0.01, weight_cap=9.0),
    )
    _, metrics = process.next(process.init(), kind.data((3, 5, 9)))
    assert metrics["saturated"] == 0.0


def test_weights_beyond_the_cap_are_refused_before_anything_is_summed() -> None:
    process = Process(scalar_model(), fedavg(local_sgd(0.1)), channel=secure_sum(clip=1.0))
    state, data = process.init(), quadratics((1.0, 1.0, 1.0), (0.0, 1.0, 2.0), sizes=(2, 6, 2))
    with pytest.raises(CompositionError, match=r"weight_cap=1(\.0)?\).* weight of 6.*weights=\"uniform\""):
        process.next(state, data)
    uniform = Process(
        scalar_model(), fedavg(local_sgd(0.1, steps=1, batch_size=None)), channel=secure_sum(clip=1.0),
        aggregator=aggregators.mean(weights="uniform"),
    )  # fmt: skip
    state, _ = uniform.next(uniform.init(), data)
    assert float(uniform.vector(state)) == pytest.approx(0.1, abs=1e-8)


def test_the_mean_is_that_of_the_plain_channel() -> None:
    kind = MODELS["batch norm, mean"]
    data = kind.data((2, 5, 8))
    found = []
    for channel in ("plain", secure_sum(clip=4.0, weight_cap=8.0, bits=48)):
        process = Process(kind.model(), scaffold(local_sgd(0.1, steps=2, batch_size=None)), channel=channel)
        state, _ = process.next(process.init(), data)
        found.append((process.vector(state), state.buffers, state.algorithm.variate))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("bits", "itemsize"), [(8, 4), (32, 4), (33, 8), (48, 8)])
def test_bytes_on_the_wire(bits: int, itemsize: int) -> None:
    sealed = seal(secure_sum(clip=1.0, bits=bits), torch.zeros(2, 5), 3, torch.ones(2), 2)
    assert sealed["ring"].element_size() == itemsize and set(sealed) == {"ring"}
    # The row, weight and loss, and the count of cuts in as many digits as it needs.
    assert sealed["ring"].shape == (2, 8)


def test_a_cohort_that_does_not_fit_is_refused_before_any_work() -> None:
    data = MODELS["perceptron"].data((3,) * 200)
    for bits, cohort, said in (
        (8, 200, r"secure_sum with 200 clients.*at least 9, so that no sum of 200 clients can wrap.*Use bits=32"),
        (32, 2, r"least=3\) needs 3 clients in a sum, but there are 2"),
    ):
        process = Process(MODELS["perceptron"].model(), fedavg(local_sgd(0.1)), channel=secure_sum(clip=1.0, bits=bits))
        with pytest.raises(CompositionError, match=said):
            process.next(process.init(), data, data.clients[:cohort])
    with pytest.raises(CompositionError, match=r"degree=8 and 10 of 200 clients colluding.*larger degree"):
        secure_sum(clip=1.0, degree=8).check(200)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clip": 0.0}, "clip="),
        ({"clip": float("inf")}, "clip="),
        ({"clip": 1.0, "weight_cap": -1.0}, "weight_cap="),
        ({"clip": 1.0, "bits": 7}, "bits="),
        ({"clip": 1.0, "bits": 49}, "bits="),
        ({"clip": 1.0, "bits": 32.0}, "bits="),
        ({"clip": 1.0, "loss_cap": 0.0}, "loss_cap="),
        ({"clip": 1.0, "grade": "half"}, "grade='half' is unknown"),
        ({"clip": 1.0, "least": 2}, "least=2"),
        ({"clip": 1.0, "threshold": (1, 2)}, "threshold='1/2'.*lying"),
        ({"clip": 1.0, "threshold": (1, 3), "server": "curious"}, "threshold='1/3'.*curious"),
        ({"clip": 1.0, "dropouts": {"later": 0.1}}, "dropouts='later' is unknown"),
        ({"clip": 1.0, "dropouts": {"mask": 0.7, "join": 0.7}}, "dropouts="),
    ],
)
def test_arguments_outside_their_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        secure_sum(**options)


# --- both grades ------------------------------------------------------------------------------------------------------


def rounds_of(channel: Channel, count: int = 8, rounds: int = 2, **more: Any) -> Any:
    kind = MODELS["perceptron"]
    process = Process(kind.model(), scaffold(local_sgd(0.1)), channel=channel, **more)
    state, data = process.init(3), kind.data(tuple(1 + i % 4 for i in range(count)))
    found: list[Any] = []
    for _ in range(rounds):
        state, metrics = process.next(state, data)
        found.append((process.vector(state), metrics))
    return found


DROPOUTS = {"share": 0.06, "mask": 0.06, "confirm": 0.03, "unmask": 0.03}


@pytest.mark.parametrize("dropouts", [None, DROPOUTS])
@pytest.mark.parametrize("bits", [32, 40])
def test_full_and_exact_have_the_same_bits(dropouts: Any, bits: int) -> None:
    """Every client's machine, keys, masks and shares change nothing: the sum is the integers' sum."""
    options: dict[str, Any] = {"clip": 4.0, "weight_cap": 5.0, "bits": bits, "dropouts": dropouts}
    exact, full = (rounds_of(secure_sum(grade=g, **options)) for g in ("exact", "full"))
    for (a, told), (b, also) in zip(exact, full, strict=True):
        assert torch.equal(a, b)
        assert told.keys() == also.keys()
        for name in told.keys() - {"notes"}:
            assert told[name] == also[name] or (told[name] != told[name] and also[name] != also[name]), name
        assert bool(told["notes"]) == bool(also["notes"])


def test_full_over_two_engines() -> None:
    channel = secure_sum(clip=4.0, weight_cap=5.0, grade="full")
    a, b = (rounds_of(channel, engine=e, rounds=1) for e in ("loop", "vectorized"))
    torch.testing.assert_close(a[0][0], b[0][0], rtol=0, atol=1e-6)


def test_who_drops_out_is_not_counted_and_remembers_nothing_of_the_round() -> None:
    kind = MODELS["perceptron"]
    channel = secure_sum(clip=4.0, weight_cap=5.0, dropouts={"mask": 0.2})
    process = Process(kind.model(), scaffold(local_sgd(0.1)), channel=channel)
    state, data = process.init(8), kind.data((2,) * 12)
    task = process.open(state, data.clients, 12)
    gone = process.gone(task, data.clients)
    assert 0 < len(gone) < 4
    before = process.remembered(task, data.clients, state.memory)
    after, metrics = process.next(state, data)
    assert metrics["clients"] == 12 - len(gone) and metrics["summed"] == (frozenset(data.clients) - gone,)
    now = process.remembered(process.open(after, data.clients, 12), data.clients, after.memory)
    for name, rows in now.items():
        moved = (rows != before[name]).flatten(1).any(dim=1).tolist()
        assert [c for c, m in zip(data.clients, moved, strict=True) if not m] == [c for c in data.clients if c in gone]


@pytest.mark.parametrize("phase", ["join", "share", "mask", "unmask"])
@pytest.mark.parametrize("grade", ["exact", "full"])
def test_too_few_are_left(grade: Any, phase: str) -> None:
    found = rounds_of(secure_sum(clip=4.0, weight_cap=5.0, grade=grade, dropouts={phase: 0.9}), rounds=1)
    vector, metrics = found[0]
    assert metrics["clients"] == 0 and "No update counts" in metrics["notes"][0] and metrics["refusals"] == 0
    assert torch.equal(vector, MODELS["perceptron"].model().init())


def test_loss_and_weight_are_those_of_the_plain_channel() -> None:
    plain = rounds_of(Channel({"name": "plain"}), rounds=1)[0][1]
    sealed = rounds_of(secure_sum(clip=9.0, weight_cap=5.0, bits=48), rounds=1)[0][1]
    assert sealed["loss"] == pytest.approx(plain["loss"], abs=1e-6)
    assert sealed["examples"] == pytest.approx(plain["examples"], abs=1e-6)


def test_nothing_is_reported_beside_the_sum() -> None:
    kind = MODELS["perceptron"]
    process = Process(kind.model(), fedavg(local_sgd(0.1)), channel=secure_sum(clip=4.0, weight_cap=5.0), engine="loop")
    state, data = process.init(), kind.data((1, 2, 3, 4))
    process.engine.prepare(process, data)
    task = process.open(state, data.clients, 4)
    for cohort, remembered in process.engine.tiles(process, task, data, state.memory):
        report = process.work(task, cohort, remembered)
        assert isinstance(report.wire, dict) and set(report.wire) == {"ring"}
        assert report.weight.numel() == 0 and not report.metrics.any()


@pytest.mark.parametrize("stage", [rand_k(0.5), rotate(), clip_norm(0.5), power_sgd(2)])
def test_what_sums_may_stand_before_it(stage: Any) -> None:
    kind = MODELS["perceptron"]
    data = kind.data((2, 2, 2, 2))
    found: list[torch.Tensor] = []
    for channel in ("plain", secure_sum(clip=8.0, weight_cap=2.0, bits=48)):
        process = Process(kind.model(), fedavg(local_sgd(0.1)), transforms=(stage,), channel=channel)
        found.append(process.vector(process.next(process.init(), data)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("stages", "cut"), [((), 4 * 4), ((rotate(),), 0)])
def test_after_a_rotation_one_clip_fits_layers_of_every_scale(stages: Any, cut: int) -> None:
    length, draw = 4096, torch.Generator().manual_seed(0)
    rows = 0.01 * torch.randn(4, length, generator=draw, dtype=torch.float64)
    rows[:, :4] = 10.0
    channel, shared = secure_sum(clip=1.0), (None,) * len(stages)
    chain, keys = compose(stages, channel), keys_of(0, 0, random.client_keys(("a", "b", "c", "d")), length)
    wire, _ = chain.encode(rows, {}, shared, keys)
    assert isinstance(wire, torch.Tensor)
    opened = through(channel, wire, chain.sizes(length, length)[-1][1], torch.ones(4))
    assert opened.saturated == cut
    mean = chain.decode_sum(torch.cat((opened.weighted, opened.sums)), shared, length, keys) / opened.weight
    error = float((mean - rows.mean(dim=0)).abs().max())
    assert (error > 8.9) == bool(cut) and (error < 1e-6) != bool(cut)


def test_what_does_not_sum_may_not() -> None:
    for stage in (top_k(0.1), error_feedback(top_k(0.1))):
        with pytest.raises(CompositionError, match="does not sum"):
            Process(scalar_model(), fedavg(FULL_STEP), transforms=(stage,), channel=secure_sum(clip=1.0))


# --- groups -----------------------------------------------------------------------------------------------------------


@given(clients=st.integers(3, 200), size=st.integers(3, 30))
def test_groups_are_as_many_as_can_be_and_as_equal(clients: int, size: int) -> None:
    if clients < size:
        with pytest.raises(InvalidArgument, match="at most the cohort"):
            deal(clients, size)
        return
    groups = deal(clients, size)
    assert sorted(p for g in groups for p in g) == list(range(clients))
    assert len(groups) == clients // size
    assert size <= min(map(len, groups)) and max(map(len, groups)) <= min(map(len, groups)) + 1


def shifts(targets: tuple[float, ...], channel: Channel) -> tuple[float, dict[str, Any]]:
    """One round from 0 in which client i answers with targets[i]."""
    data = quadratics((1.0,) * len(targets), targets)
    process = Process(
        scalar_model(), fedavg(FULL_STEP), channel=channel, aggregator=aggregators.mean(weights="uniform")
    )
    state, metrics = process.next(process.init(1), data)
    return float(process.vector(state)), metrics


@pytest.mark.parametrize("grade", ["exact", "full"])
def test_the_median_of_the_groups_means(grade: Any) -> None:
    targets = tuple(0.1 * i for i in range(11))
    value, metrics = shifts(targets, grouped(secure_sum(clip=2.0, grade=grade), aggregators.median(), size=3))
    names = [f"c{i}" for i in range(11)]
    assert sorted(c for g in metrics["summed"] for c in g) == sorted(names) and len(metrics["summed"]) == 3
    means = sorted(sum(targets[names.index(c)] for c in g) / len(g) for g in metrics["summed"])
    assert value == pytest.approx(means[1], abs=1e-6)


def test_a_rule_over_groups_bears_a_client_that_a_mean_does_not() -> None:
    targets = (*(0.5,) * 14, 1000.0)
    mean, _ = shifts(targets, secure_sum(clip=50.0))
    robust, metrics = shifts(targets, grouped(secure_sum(clip=50.0), aggregators.krum(byzantine=1), size=3))
    assert mean > 3 and robust == pytest.approx(0.5, abs=1e-6)
    assert any("c14" in name for name in metrics["refused"])


def test_groups_change_from_round_to_round() -> None:
    channel = grouped(secure_sum(clip=9.0, weight_cap=5.0), aggregators.median(), size=3)
    first, second = (m["summed"] for _, m in rounds_of(channel, count=12))
    assert set(first) != set(second) and len(first) == len(second) == 4


def test_groups_that_are_refused() -> None:
    channel = secure_sum(clip=1.0)
    cases: list[tuple[Any, str]] = [
        (lambda: grouped(channel, aggregators.mean()), "use the secure_sum alone"),
        (lambda: grouped(Channel({"name": "plain"}), aggregators.median()), "a secure_sum"),
        (lambda: grouped(channel, aggregators.median(), size=2), "at least 3"),
        (lambda: grouped(grouped(channel, aggregators.median()), aggregators.median()), "grouped already"),
    ]
    for make, said in cases:
        with pytest.raises(InvalidArgument, match=said):
            make()
    with pytest.raises(CompositionError, match=r"makes 1 groups of a cohort of 15.*needs 2"):
        shifts((0.5,) * 15, grouped(channel, aggregators.median(), size=8))


def test_a_denominator_that_no_rule_divides_by_is_refused() -> None:
    given: dict[str, Any] = {"aggregator": aggregators.mean(weights="uniform", denominator="expected")}
    channel = grouped(secure_sum(clip=1.0), aggregators.median())
    with pytest.raises(CompositionError, match='denominator="expected" cannot stand beside the channel grouped'):
        Process(scalar_model(), atoll.fedavg(atoll.local_sgd(0.1)), channel=channel, **given)


def test_rounds_that_differ_by_one_client_are_noted() -> None:
    kind = MODELS["perceptron"]
    data = kind.data((2,) * 5)
    names = list(data.clients)
    result = atoll.simulate(
        kind.model(), data, algorithm=fedavg(local_sgd(0.1)), rounds=3, evaluate_every=0,
        cohort=atoll.sampling.sequence([names, names[:4], names[:4]]), channel=secure_sum(clip=4.0, weight_cap=2.0),
    )  # fmt: skip
    noted = [any("without c4" in note for note in record.notes) for record in result.history]
    assert noted == [False, True, False]
