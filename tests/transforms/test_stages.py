"""What all stages must do; and every pair of them, and each with every channel: legal, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import quadratics, scalar_model
from registry import MODELS, TRANSFORMS
from torch import Tensor

import atoll
from atoll import attacks, random, transforms
from atoll.aggregators import krum, mean, median
from atoll.aggregators import norm_bound as bounded
from atoll.algorithms import fedavg, scaffold
from atoll.errors import CompositionError, InvalidArgument, NonFiniteError
from atoll.local import local_sgd
from atoll.rounds import Process
from atoll.transforms import (
    Transform,
    client_momentum,
    clip_norm,
    eden,
    ef21,
    entropy_code,
    error_feedback,
    grouped,
    half,
    local_noise,
    norm_bound,
    plain,
    power_sgd,
    quantize,
    rand_k,
    reject_nonfinite,
    rotate,
    secure_sum,
    sign,
    top_k,
)
from atoll.transforms.base import Keys
from atoll.transforms.chain import Chain, compose, keys_of, sent
from atoll.transforms.top_k import kept_of
from atoll.vectors import Layout, lengths

stages = pytest.mark.parametrize("name", TRANSFORMS)
LENGTH, SPLIT = 333, 300


def rows(count: int, length: int = LENGTH, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def keys(count: int, *, first: int = 0, round: int = 0, seed: int = 0, split: int = SPLIT) -> Keys:
    return keys_of(seed, round, random.client_keys([f"c{first + i}" for i in range(count)]), split)


def laid_out(split: int) -> Layout:
    """A layout of so many parameters with matrices in it, where there is room for any."""
    cube, rest = (4, 5, 6), split - 120 - 8 * 9
    if rest >= 0:
        return Layout(("bias", "cube", "matrix"), ((rest,), cube, (8, 9)))
    if split > 20:
        return Layout(("bias", "matrix"), ((split - 20,), (4, 5)))
    return Layout(("bias",), ((split,),))


def send(chain: Chain, given: Tensor, own: Keys, memory: dict[str, Tensor] | None = None) -> tuple[Tensor, Any, Any]:
    length, split = given.shape[1], given.shape[1] if own.split is None else own.split
    chain = chain.bind(laid_out(split))
    shared = chain.share(chain.init(length, split))
    if memory is None:
        memory = {n: t.to(given).expand(len(given), -1) for n, t in chain.memory(length, split).items()}
    wire, kept = chain.encode(given, memory, shared, own)
    return chain.decode_each(wire, shared, length, own, given.dtype), wire, kept


def one(stage: Transform) -> Chain:
    return compose((stage,), plain())


def size(wire: Any) -> int:
    tensors = [wire] if isinstance(wire, Tensor) else list(wire.values())
    return sum(t[0].numel() * t.element_size() for t in tensors)


# --- every stage ------------------------------------------------------------------------------------------------------


@stages
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("length", "split"), [(333, 300), (1, 1), (5000, 4097), (64, 0)])
def test_bytes_are_those_of_the_wire(name: str, dtype: torch.dtype, length: int, split: int) -> None:
    chain = one(TRANSFORMS[name]())
    chain = chain.bind(laid_out(split))
    decoded, wire, _ = send(chain, rows(2, length, dtype=dtype), keys(2, split=split))
    if chain.coder is None:
        assert size(wire) == chain.bytes(length, split, dtype)
    else:
        assert sent(wire) != 2 * chain.bytes(length, split, dtype) and not chain.facts.fixed_size
    assert decoded.shape == (2, length) and decoded.dtype == dtype


@stages
def test_a_run_counts_these_bytes(name: str) -> None:
    kind = MODELS["perceptron"]
    uniform = mean(weights="uniform")
    process = Process(kind.model(), scaffold(local_sgd(0.1)), transforms=(TRANSFORMS[name](),), aggregator=uniform)
    _, metrics = process.next(process.init(), kind.data((2, 3)))
    counted = metrics["bytes_up"] / 2 - (8 + 16)
    if process.chain.coder is None:
        assert counted == process.chain.bytes(process.length, process.split, torch.float64)
    else:
        assert 0 < counted <= process.chain.bytes(process.length, process.split, torch.float64) + 30


@stages
@pytest.mark.parametrize("length", [LENGTH, 9000])
def test_a_tile_is_its_clients_one_at_a_time(name: str, length: int) -> None:
    chain, given = one(TRANSFORMS[name]()).bind(laid_out(SPLIT)), rows(4, length, dtype=torch.float32)
    memory = {n: 0.1 * rows(4, t.numel(), 7, torch.float32) for n, t in chain.memory(length, SPLIT).items()}
    together, wire, kept = send(chain, given, keys(4), memory)
    for i in range(4):
        alone, piece, left = send(
            chain, given[i : i + 1], keys(1, first=i), {n: t[i : i + 1] for n, t in memory.items()}
        )
        assert torch.equal(alone[0], together[i])
        assert all(torch.equal(t[0], kept[n][i]) for n, t in left.items())
        if isinstance(wire, Tensor):
            assert torch.equal(piece[0], wire[i])
        elif chain.coder is not None:
            assert torch.equal(piece["payload"][0], wire["payload"][i, : piece["payload"].shape[1]])
        else:
            assert all(torch.equal(piece[n][0], wire[n][i]) for n in wire)


@stages
def test_nothing_is_sent_for_nothing_and_noughts_stay_noughts(name: str) -> None:
    chain = one(TRANSFORMS[name]())
    stay = torch.equal(send(chain, torch.zeros(2, LENGTH), keys(2))[0].abs(), torch.zeros(2, LENGTH))
    assert stay == (chain.client_noise is None), "noise hides that there is nothing"
    assert send(chain, torch.zeros(2, 0), keys(2, split=0))[0].shape == (2, 0)


@pytest.mark.parametrize("name", [n for n, make in TRANSFORMS.items() if make().scale is not None])
def test_a_factor_that_is_told_is_the_one_rows_are_multiplied_by(name: str) -> None:
    stage, given = TRANSFORMS[name](), torch.logspace(-4, 4, 9, dtype=torch.float64)[:, None] * rows(9)
    wire, memory = stage.encode(given, {}, stage.share(stage.init(LENGTH)), keys(9))
    assert stage.scale is not None and not memory and not stage.remembers
    assert stage.decode_each is None and stage.decode_sum is None and stage.size(LENGTH, SPLIT) == (LENGTH, SPLIT)
    torch.testing.assert_close(wire, given * stage.scale(lengths(given)), rtol=1e-15, atol=0)


@stages
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_tiny_and_huge_rows_in_single_precision(name: str, scale: float) -> None:
    """Relative to its length, a row comes through as one of ordinary size does: scales neither overflow nor vanish."""
    if name == "clip_norm" or TRANSFORMS[name]().client_noise is not None:
        return
    given = rows(2, dtype=torch.float32)
    usual, scaled = (send(one(TRANSFORMS[name]()), given * s, keys(2))[0].double() / s for s in (1.0, scale))
    assert bool(torch.isfinite(scaled).all())
    assert float((scaled - usual).norm()) <= 1e-3 * float(usual.norm())


@stages
def test_what_is_not_finite_does_not_stop_the_others(name: str) -> None:
    given = rows(3, dtype=torch.float32)
    given[1, 5], given[1, 7] = torch.nan, torch.inf
    decoded, _, _ = send(one(TRANSFORMS[name]()), given, keys(3))
    good = given[[0, 2]]
    assert bool(torch.isfinite(decoded[[0, 2]]).all()) and decoded.shape == given.shape
    assert torch.equal(send(one(TRANSFORMS[name]()), good[:1], keys(1))[0], decoded[:1])


@stages
def test_stages_that_say_they_keep_sums_do(name: str) -> None:
    stage = TRANSFORMS[name]()
    if not stage.sums or name == "clip_norm" or stage.remembers or stage.judge is not None:
        return
    chain = compose((stage,), secure_sum(clip=1.0)).bind(laid_out(SPLIT))
    given, own, weights = rows(3), keys(3), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    shared = chain.share(chain.init(LENGTH, SPLIT))
    memory = {n: t.to(given).expand(3, -1) for n, t in chain.memory(LENGTH, SPLIT).items()}
    wire, _ = chain.encode(given, memory, shared, own)
    _, split = chain.sizes(LENGTH, SPLIT)[-1]
    assert isinstance(wire, Tensor)
    total = torch.cat(((weights[:, None] * wire[:, :split]).sum(0), wire[:, split:].sum(0)))
    each = chain.decode_each(wire, shared, LENGTH, own, torch.float64)
    expected = torch.cat(((weights[:, None] * each[:, :SPLIT]).sum(0), each[:, SPLIT:].sum(0)))
    found = chain.decode_sum(total, shared, LENGTH, keys(0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@stages
def test_stages_that_say_they_lose_nothing_lose_nothing(name: str) -> None:
    given = rows(3)
    decoded, _, _ = send(one(TRANSFORMS[name]()), given, keys(3))
    close = float((decoded - given).abs().max()) < 1e-12
    # A first update is its own momentum.
    assert close == TRANSFORMS[name]().lossless or name == "client_momentum"


@stages
def test_stages_that_say_they_contract_do(name: str) -> None:
    stage = TRANSFORMS[name]()
    if name in ("clip_norm",) or stage.remembers:
        return
    given = torch.cat((rows(2), torch.eye(LENGTH, dtype=torch.float64)[:2], torch.ones(1, LENGTH, dtype=torch.float64)))
    decoded, _, _ = send(one(stage), given, keys(5))
    shorter = bool(((decoded - given).norm(dim=1) <= given.norm(dim=1)).all())
    assert shorter == stage.contracts


@stages
def test_bounds_hold(name: str) -> None:
    bound = TRANSFORMS[name]().bound(2.0)
    if bound is None:
        return
    given = rows(6, dtype=torch.float64)
    given = 2 * given / given.norm(dim=1, keepdim=True)
    given[0] = 2 * torch.eye(LENGTH, dtype=torch.float64)[3]
    for round in range(20):
        decoded, _, _ = send(one(TRANSFORMS[name]()), given, keys(6, round=round))
        assert float(decoded.norm(dim=1).max()) <= bound * (1 + 1e-6)


@stages
def test_the_mean_over_rounds_is_the_row_where_a_stage_says_so(name: str) -> None:
    """One row, sent by 3,000 clients in rounds of their own: the mean is off by less than five deviations."""
    stage, length, draws = TRANSFORMS[name](), 40, 3000
    if stage.remembers:
        return
    row = rows(1, length, 3)[0]
    row[3], row[4:8] = 6.0, 0.0
    many = [send(one(stage), row[None].expand(30, -1), keys(30, round=r, split=31))[0] for r in range(draws // 30)]
    if stage.randomness == "shared" and not stage.lossless and name != "eden":
        many = [m[:1] for m in many]  # all clients of a round sent the same
    decoded = torch.cat(many)
    off = (decoded.mean(0) - row).abs()
    noise = decoded.std(0) / len(decoded) ** 0.5
    # The rotation of eden lacks a little of a uniform one.
    assert bool((off <= 5 * noise + (0.02 if name == "eden" else 1e-9)).all()) == stage.unbiased, off / noise


@stages
def test_seeds_rounds_and_clients_decide(name: str) -> None:
    stage, given = TRANSFORMS[name](), rows(1)
    wires = [
        str(send(one(stage), given, keys(1, **options))[1])
        for options in ({}, {}, {"seed": 1}, {"round": 1}, {"first": 1})
    ]
    assert wires[0] == wires[1]
    drawn = stage.randomness != "none" and not (stage.remembers and name == "error_feedback")
    assert (wires[2] != wires[0]) == (wires[3] != wires[0]) == drawn


@stages
def test_a_resumed_run_has_the_bits_of_one(name: str, tmp_path: Path) -> None:
    kind = MODELS["perceptron"]

    def run(rounds: int, **options: Any) -> atoll.Result:
        return atoll.simulate(
            kind.model(), kind.data((4, 3, 5)), algorithm=scaffold(local_sgd(0.1, epochs=1, batch_size=2)), cohort=2,
            rounds=rounds, transforms=(TRANSFORMS[name](),), aggregator=mean(weights="uniform"), progress=False,
            **options,
        )  # fmt: skip

    whole = run(5)
    run(3, directory=tmp_path)
    assert torch.equal(run(5, directory=tmp_path, resume=True).vector, whole.vector)


# --- every pair -------------------------------------------------------------------------------------------------------

STAGES: dict[str, Transform] = {
    "clip_norm": clip_norm(1.0), "client_momentum": client_momentum(), "norm_bound": norm_bound(9.0),
    "reject_nonfinite": reject_nonfinite(), "half": half(), "quantize": quantize(4), "sign": sign(),
    "top_k": top_k(0.1), "rand_k": rand_k(0.1), "rotate": rotate(), "eden": eden(2),
    "error_feedback": error_feedback(top_k(0.1)), "error_feedback of codes": error_feedback(top_k(0.1), quantize(4)),
    "ef21": ef21(top_k(0.1)), "power_sgd": power_sgd(2), "entropy_code": entropy_code(),
    "error_feedback of power_sgd": error_feedback(power_sgd(2)), "local_noise": local_noise(0.1, clip=1.0, seed=1),
}  # fmt: skip
CODED = ("half", "quantize", "sign", "eden", "error_feedback of codes", "entropy_code")
"""Nothing but entropy_code can stand behind these: only their server half can read what leaves them."""
FEEDBACK = ("error_feedback", "ef21", "error_feedback of power_sgd")
"""They must see whatever is lost."""
MOVING = ("top_k", "rand_k", "rotate", "power_sgd")
"""Memory, and a look for matrices, behind these would meet other numbers."""
CHANNELS = {
    "plain": plain(),
    "secure_sum": secure_sum(clip=1.0),
    "grouped": grouped(secure_sum(clip=1.0), median()),
}
ADDING = (
    "clip_norm", "client_momentum", "rand_k", "rotate", "power_sgd", "error_feedback of power_sgd", "local_noise",
)  # fmt: skip
"""What a channel that only adds can stand behind."""


def test_the_table_lists_every_stage() -> None:
    # What needs a ring, or noise behind it, has suites of its own.
    rings = ("discrete_gaussian", "skellam", "gaussian_noise", "correlated_noise", "adaptive_clip")
    others = ("Channel", "Downlink", "PayloadError", "Transform", "delta", *CHANNELS, *rings)
    made = {n for n in transforms.__all__ if n not in others}
    assert made == {s.name for s in STAGES.values()}


@pytest.mark.parametrize("second", STAGES)
@pytest.mark.parametrize("first", STAGES)
def test_every_pair_of_stages(first: str, second: str) -> None:
    before, after = STAGES[first], STAGES[second]
    said = None
    if first in CODED and (first == "entropy_code" or second != "entropy_code"):
        said = rf"^{after.name} cannot stand after {before.name}: .*codes.*Put {after.name} before {before.name}\.$"
    elif first in FEEDBACK and second not in ("rotate", "norm_bound", "reject_nonfinite", "entropy_code"):
        said = (
            rf"^{after.name} cannot stand after {before.name}: .*would not see.*Put {after.name} before.*or inside it"
        )
    elif first in MOVING and after.remembers:
        said = (
            rf"^{after.name} cannot stand after {first}: .*other numbers.*Put {first} inside {after.name}, or leave it"
        )
    elif first in MOVING and second == "power_sgd":
        said = rf"^power_sgd cannot stand after {first}: .*model's matrices. Put power_sgd before {first}, or leave one"
    elif second == "local_noise" and first == "top_k":
        said = r"^local_noise cannot stand after top_k: .*no noise hides it. Put top_k after local_noise, or leave it"
    elif first == second == "local_noise":
        said = r"^local_noise cannot stand in one pipeline with local_noise: .*one ledger.*Keep one"
    if said is not None:
        with pytest.raises(CompositionError, match=said):
            compose((before, after), plain())
        return
    chain = compose((before, after), plain())
    given = 0.1 * rows(3, dtype=torch.float32)
    decoded, wire, _ = send(chain, given, keys(3))
    assert decoded.shape == given.shape
    if chain.coder is None:
        assert size(wire) == chain.bind(laid_out(SPLIT)).bytes(LENGTH, SPLIT, torch.float32)
    for i in range(3):
        assert torch.equal(send(chain, given[i : i + 1], keys(1, first=i))[0][0], decoded[i])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("channel", CHANNELS)
def test_every_stage_with_every_channel(stage: str, channel: str) -> None:
    if channel == "plain" or stage in ADDING:
        assert compose((STAGES[stage],), CHANNELS[channel]).stages == (STAGES[stage],)
        return
    said = rf"^{STAGES[stage].name} cannot stand before the channel {channel}.*Leave .* out.*channel=\"plain\""
    with pytest.raises(CompositionError, match=said):
        compose((STAGES[stage],), CHANNELS[channel])


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_inside_error_feedback(stage: str) -> None:
    for around in (error_feedback, ef21):
        refused = {
            "rand_k": f"rand_k cannot stand inside {around.__name__}: what it loses.*Use rand_k without",
            "client_momentum": f"client_momentum cannot stand inside {around.__name__}.*into one",
            "norm_bound": f"norm_bound cannot stand inside {around.__name__}: it judges.*before {around.__name__}",
            "reject_nonfinite": f"reject_nonfinite cannot stand inside {around.__name__}: it judges",
            "clip_norm": f"clip_norm cannot stand inside {around.__name__}: what it loses.*Use clip_norm without",
            "error_feedback": f"error_feedback cannot stand inside {around.__name__}.*into one",
            "ef21": f"ef21 cannot stand inside {around.__name__}.*into one",
            "local_noise": f"local_noise cannot stand inside {around.__name__}: what it loses.*Use local_noise without",
            "entropy_code": f"entropy_code cannot stand inside {around.__name__}.*Put entropy_code behind",
        }
        said = refused.get(STAGES[stage].name)
        if said is None:
            assert around(STAGES[stage]).gives == STAGES[stage].gives
            continue
        with pytest.raises(CompositionError, match=said):
            around(STAGES[stage])


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_few_bits_and_error_feedback(bits: int) -> None:
    with pytest.raises(CompositionError, match=r"quantize cannot stand inside error_feedback.*4 bits or more"):
        error_feedback(quantize(bits))


@pytest.mark.parametrize("bits", [4, 6])
def test_what_quantizing_loses_does_not_grow_in_error_feedback(bits: int) -> None:
    chain, given, memory = one(error_feedback(quantize(bits))), rows(2), None
    for round in range(60):
        _, _, memory = send(chain, given, keys(2, round=round), memory)
    assert bool((memory["0/error"].norm(dim=1) < given.norm(dim=1)).all())  # type: ignore[index]


def test_a_stage_that_is_undone_on_the_sum_cannot_hide_one_that_is_not() -> None:
    from atoll.spec import record

    scaled = Transform(
        record("scaled"), lambda r, m, s, k: (2 * r, m), decode_sum=lambda total, shared, length, keys: total / 2
    )
    with pytest.raises(CompositionError, match=r"scaled cannot stand after top_k.*Put scaled before top_k"):
        compose((top_k(0.5), scaled), plain())
    chain = compose((rotate(), scaled, top_k(1.0)), plain())
    given, own = rows(1), keys(1)
    each, _, _ = send(chain, given, own)
    assert not torch.allclose(each, given), "rotate stands before scaled, so it is undone on the sum, after it"
    torch.testing.assert_close(chain.decode_sum(each[0], (None,) * 3, LENGTH, own), given[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ((), (True, True, None, True, False, False)),
        ((clip_norm(2.0), rotate()), (True, False, 2.0, True, False, True)),
        ((clip_norm(2.0), rand_k(0.25)), (True, False, 8.0, True, False, True)),
        ((rotate(), quantize(2)), (False, True, None, True, False, True)),
        ((eden(1),), (False, True, None, True, False, True)),
        ((clip_norm(2.0), top_k(0.1)), (False, False, 2.0, True, False, False)),
        ((error_feedback(top_k(0.1), quantize(4)),), (False, False, None, True, True, False)),
        ((error_feedback(rotate(), sign()),), (False, False, None, True, True, True)),
    ],
    ids=lambda c: "-".join(s.name for s in c) if isinstance(c, tuple) and c and isinstance(c[0], Transform) else None,
)
def test_facts_follow_from_the_stages(chosen: tuple[Transform, ...], expected: tuple[Any, ...]) -> None:
    f = compose(chosen, plain()).facts
    assert (f.sums, f.unbiased, f.bound, f.fixed_size, f.memory, f.shared) == expected


# --- single stages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 11), ("bfloat16", 8)])
def test_half_rounds_to_its_digits(dtype: Any, digits: int) -> None:
    given = rows(3) * 1e9
    given = torch.where(given.abs() < 1e6, 1e6, given)
    decoded, wire, _ = send(one(half(dtype)), given, keys(3))
    assert float(((decoded - given) / given).abs().max()) <= 2.0**-digits
    assert wire["0/rounded"].dtype == getattr(torch, dtype) and float((decoded - given).abs().max()) > 0


def test_sign_by_hand() -> None:
    decoded, wire, _ = send(one(sign()), torch.tensor([[1.0, -2.0, 0.0, 5.0]]), keys(1, split=4))
    assert decoded.tolist() == [[2.0, -2.0, 2.0, 2.0]] and wire["0/signs"].tolist() == [[0b1101]]


def test_top_k_by_hand() -> None:
    given = torch.tensor([[1.0, -3.0, 0.5, 3.0, -3.0]])
    assert send(one(top_k(0.4)), given, keys(1, split=5))[0].tolist() == [[0.0, -3.0, 0.0, 3.0, 0.0]]
    assert send(one(top_k(0.6)), given, keys(1, split=5))[0].tolist() == [[0.0, -3.0, 0.0, 3.0, -3.0]]
    assert send(one(top_k(0.2)), torch.zeros(1, 5), keys(1, split=5))[0].tolist() == [[0.0] * 5]


def test_top_k_sends_its_places_in_as_many_bits_as_they_need() -> None:
    _, wire, _ = send(one(top_k(0.01)), rows(1, 1000), keys(1, split=1000))
    assert wire["rows"].shape == (1, 10) and wire["0/places"].shape == (1, 13)  # 10 places of 10 bits
    coded = compose((top_k(0.01), quantize(4)), plain())
    _, wire, _ = send(coded, rows(1, 1000), keys(1, split=1000))
    assert size(wire) == 13 + 5 + 4 == coded.bytes(1000, 1000, torch.float64)


def test_some_number_is_sent_however_small_the_fraction() -> None:
    assert [kept_of(n, 1e-12) for n in (0, 1, 100)] == [0, 1, 1] and kept_of(100, 0.07) == 7


def test_the_randomness_of_feedback_is_that_of_what_it_holds() -> None:
    for around in (error_feedback, ef21):
        for inner, expected in ((top_k(0.1), "none"), (quantize(4), "private"), (rotate(), "shared")):
            assert around(inner).randomness == expected


def test_rand_k_thins_out_both_parts_at_the_same_places_for_everybody() -> None:
    given = rows(3)
    decoded, wire, _ = send(one(rand_k(0.1)), given, keys(3))
    assert isinstance(wire, Tensor) and wire.shape == (3, 34)
    there = decoded != 0
    assert torch.equal(there[0], there[1]) and there[0, :SPLIT].sum() == 30 and there[0, SPLIT:].sum() == 4
    torch.testing.assert_close(decoded[:, :SPLIT][there[:, :SPLIT]], (10 * given[:, :SPLIT])[there[:, :SPLIT]])
    torch.testing.assert_close(decoded[:, SPLIT:][there[:, SPLIT:]], (33 / 4 * given[:, SPLIT:])[there[:, SPLIT:]])


def test_rotation_keeps_lengths_and_parts_and_spreads_what_stands_out() -> None:
    given = torch.zeros(1, 4096 + 512, dtype=torch.float64)
    given[0, 17], given[0, 4100] = 1.0, 3.0
    wire = send(one(rotate()), given, keys(1, split=4096))[1]
    assert wire[0, :4096].abs().tolist() == pytest.approx([1 / 64] * 4096)
    assert wire[0, 4096:].abs().tolist() == pytest.approx([3 / 512**0.5] * 512)


def test_hadamard_is_sylvesters_matrix() -> None:
    from atoll.transforms.rotate import hadamard

    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(5):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
        size = len(matrix)
        torch.testing.assert_close(hadamard(torch.eye(size, dtype=torch.float64)), matrix / size**0.5)


@pytest.mark.parametrize(
    ("bits", "distortion"), [(1, 0.36338), (2, 0.11748), (3, 0.034548), (4, 0.0094977), (5, 0.0024990)]
)
def test_the_quantiser_is_max_s_and_the_error_is_the_theorys(bits: int, distortion: float) -> None:
    """Distortions are those of Max's table of 1960."""
    from atoll.transforms.eden import lloyd_max

    levels, edges = lloyd_max(bits)
    values = torch.special.ndtri((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000)
    assert float((values - levels[torch.bucketize(values, edges)]).square().mean()) == pytest.approx(
        distortion, rel=5e-3
    )
    if bits < 3:
        given = {1: [-0.7979, 0.7979], 2: [-1.5104, -0.4528, 0.4528, 1.5104]}[bits]
        assert levels.tolist() == pytest.approx(given, abs=1e-4)
    for sample in (
        rows(40, 4096),
        torch.eye(4096, dtype=torch.float64)[:40] + 0.5 * torch.eye(4096, dtype=torch.float64)[1:41],
    ):
        decoded, _, _ = send(one(eden(bits)), sample, keys(40, split=4096))
        error = (decoded - sample).square().sum() / sample.square().sum()
        assert float(error) == pytest.approx(1 / (1 - distortion) - 1, rel=0.06)


def test_edens_errors_average_out_over_clients() -> None:
    given = rows(1, 2048).expand(64, -1)
    decoded, _, _ = send(one(eden(1)), given, keys(64, split=2048))
    error = (decoded.mean(0) - given[0]).square().sum() / given[0].square().sum()
    assert float(error) == pytest.approx(0.571 / 64, rel=0.1)


def test_one_bit_of_a_large_network_is_a_thirtieth() -> None:
    length = 1_663_370
    assert one(eden(1)).bytes(length, length, torch.float32) <= 4 * length / 30


def test_error_feedback_loses_nothing_over_time() -> None:
    """What was sent in all rounds, and what is still remembered, is what was to be sent."""
    chain = one(error_feedback(top_k(0.1), quantize(4)))
    memory, sent, wanted = {"0/error": torch.zeros(2, LENGTH, dtype=torch.float64)}, 0, 0
    for round in range(20):
        given = rows(2, seed=round)
        decoded, _, memory = send(chain, given, keys(2, round=round), memory)
        sent, wanted = sent + decoded, wanted + given
    torch.testing.assert_close(sent + memory["0/error"], wanted, rtol=0, atol=1e-9)
    assert float(memory["0/error"].norm()) > 1


def test_error_feedback_by_hand() -> None:
    chain = one(error_feedback(top_k(0.5)))
    memory = {"0/error": torch.zeros(1, 2)}
    for given, expected, left in (([3.0, 2.0], [3.0, 0.0], [0.0, 2.0]), ([3.0, 2.0], [0.0, 4.0], [3.0, 0.0])):
        decoded, _, memory = send(chain, torch.tensor([given]), keys(1, split=2), memory)
        assert decoded.tolist() == [expected] and memory["0/error"].tolist() == [left]


def test_ef21_by_hand() -> None:
    """One number a round: what is known creeps up on the update, and the server knows the mean of what is known."""
    chain = one(ef21(top_k(0.5)))
    memory, state = {"0/known": torch.zeros(2, 2)}, chain.init(2, 2)
    given = torch.tensor([[3.0, 2.0], [0.0, -4.0]])
    for expected in ([[3.0, 0.0], [0.0, -4.0]], [[3.0, 2.0], [0.0, -4.0]]):
        decoded, _, memory = send(chain, given, keys(2, split=2), memory)
        assert memory["0/known"].tolist() == expected
        row, state = chain.settle(state, decoded.mean(0), 0.5)  # two of four clients
        torch.testing.assert_close(row, memory["0/known"].sum(0) / 4)


@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_ef21s_server_knows_the_mean_of_what_its_clients_know(engine: str) -> None:
    kind = MODELS["batch norm, mean"]
    data = kind.data((6, 4, 8, 4))
    process = Process(kind.model(), fedavg(local_sgd(0.1, epochs=1, batch_size=4)), engine=engine,
                      transforms=(ef21(top_k(0.1), quantize(6)),), aggregator=mean(weights="uniform"))  # fmt: skip
    state = process.init()
    for cohort in (["c0", "c1"], ["c3"], ["c0", "c2", "c3"]):
        before = process.vector(state)
        state, _ = process.next(state, data, cohort)
        size = state.memory.layout.size
        known = state.memory.rows(list(data.clients), torch.zeros(size, dtype=torch.float64)).mean(0)
        torch.testing.assert_close(state.transforms[0].mean, known, rtol=0, atol=1e-12)
        torch.testing.assert_close(process.vector(state) - before, known[: process.model.size], rtol=0, atol=1e-12)


def test_ef21_refuses_weights_and_summed_parts() -> None:
    with pytest.raises(CompositionError, match=r"ef21 cannot stand before the aggregator mean with weights.*uniform"):
        Process(scalar_model(), fedavg(local_sgd(0.1)), transforms=(ef21(sign()),))
    with pytest.raises(CompositionError, match=r"ef21 cannot carry the summed part of scaffold.*error_feedback"):
        Process(
            scalar_model(), scaffold(local_sgd(0.1)), transforms=(ef21(sign()),), aggregator=mean(weights="uniform")
        )


def test_ef21_refuses_rules_and_expected_denominators() -> None:
    plan = fedavg(local_sgd(0.1))
    for rule in (median(), krum(byzantine=1), bounded()):
        with pytest.raises(CompositionError, match=rf"ef21 cannot stand before the aggregator {rule.name}.*error_feed"):
            Process(scalar_model(), plan, transforms=(ef21(sign()),), aggregator=rule)
    with pytest.raises(CompositionError, match=r"ef21 cannot stand before the aggregator mean with denominator"):
        Process(scalar_model(), plan, transforms=(ef21(sign()),),
                aggregator=mean(weights="uniform", denominator="expected"))  # fmt: skip
    attacked = attacks.apply(mean(weights="uniform"), attacks.sign_flip(), fraction=0.2)
    Process(scalar_model(), plan, transforms=(ef21(sign()),), aggregator=attacked)


def test_ef21_is_resumed_with_the_same_bits(tmp_path: Path) -> None:
    kind = MODELS["perceptron"]

    def run(rounds: int, **options: Any) -> atoll.Result:
        return atoll.simulate(
            kind.model(), kind.data((4, 3, 5)), algorithm=fedavg(local_sgd(0.1, epochs=1, batch_size=2)), cohort=2,
            rounds=rounds, transforms=(ef21(top_k(0.2)),), aggregator=mean(weights="uniform"), progress=False,
            **options,
        )  # fmt: skip

    whole = run(5)
    run(3, directory=tmp_path)
    assert torch.equal(run(5, directory=tmp_path, resume=True).vector, whole.vector)


def test_error_feedback_reaches_the_optimum_where_sparse_updates_alone_do_not() -> None:
    """Two coordinates, one number sent a round: alone, the one with the smaller change never moves."""
    kind = MODELS["perceptron"]
    losses = {}
    for name, chosen in (("alone", top_k(0.02)), ("fed back", error_feedback(top_k(0.02)))):
        result = atoll.simulate(
            kind.model(), kind.data((30, 30)), algorithm=fedavg(local_sgd(0.3, steps=1, batch_size=None)), rounds=150,
            transforms=(chosen,), progress=False,
        )  # fmt: skip
        losses[name] = result.history[-1].train["loss"]
    assert losses["fed back"] < losses["alone"] - 0.01


def test_what_a_client_still_owes_stays_with_it_when_a_round_fails() -> None:
    data = quadratics((1.0, 1.0), (4.0, 8.0))
    process = Process(scalar_model(), fedavg(local_sgd(0.5, steps=1, batch_size=None)),
                      transforms=(error_feedback(half("bfloat16")),))  # fmt: skip
    assert process.memory_layout(process.model.init()).names == ("transforms/0/error",)
    state, _ = process.next(process.init(), data)
    before = state.memory.rows(["c0", "c1"], torch.full((1,), torch.nan, dtype=torch.float64))
    assert bool(torch.isfinite(before).all()), "both have been seen"
    with pytest.raises(NonFiniteError):
        process.next(state, quadratics((1.0, 1.0), (4.0, 1e200)))
    assert torch.equal(state.memory.rows(["c0", "c1"], torch.zeros(1, dtype=torch.float64)), before)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: half("float32"), "dtype='float32'"),  # type: ignore[arg-type]
        (lambda: top_k(0.0), "fraction=0.0"),
        (lambda: top_k(1.5), "fraction=1.5"),
        (lambda: rand_k(True), "fraction=True"),
        (lambda: eden(9), "bits=9"),
        (lambda: eden(0), "bits=0"),
        (lambda: rotate(block=100), "block=100"),
        (lambda: error_feedback(), "stages="),
    ],
)
def test_wrong_arguments(build: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        build()


def fact_line(name: str, stage: Transform) -> str:
    answers = (
        stage.unbiased, stage.sums and stage.gives == "rows", stage.remembers, stage.randomness, stage.fixed_size,
        stage.contracts and not stage.remembers and stage.coder is None,
    )  # fmt: skip
    return " | ".join([f"| `{name}`", *(("no", "yes")[a] if isinstance(a, bool) else a for a in answers)]) + " |"


FACTS = {
    "clip_norm(norm)": clip_norm(1.0), "half(dtype)": half(), "quantize(bits), 1 to 3": quantize(2),
    "quantize(bits), 4 to 16": quantize(4), "eden(bits)": eden(1), "sign()": sign(), "top_k(fraction)": top_k(0.1),
    "rand_k(fraction)": rand_k(0.1), "rotate()": rotate(), "power_sgd(rank)": power_sgd(1),
    "entropy_code()": entropy_code(), "error_feedback(top_k(...))": error_feedback(top_k(0.1)),
    "error_feedback(power_sgd(...))": error_feedback(power_sgd(1)), "ef21(top_k(...))": ef21(top_k(0.1)),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_the_documents_table_tells_the_stages_own_facts(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "compression.md").read_text()
    assert fact_line(name, FACTS[name]) in page.splitlines()


def theory(name: str, row: Tensor) -> tuple[Transform, float]:
    """A stage, and the squared error that its paper gives for a row [n]."""
    n, square = len(row), float(row.square().sum())
    if name == "quantize":
        step = 2 * float(row.abs().max().float()) / 7
        up = torch.frac((row + row.abs().max()) / step)
        return quantize(3), float((up * (1 - up)).sum()) * step**2
    if name == "rand_k":
        return rand_k(0.25), (1 / 0.25 - 1) * square
    if name == "eden":
        return eden(2), (1 / (1 - 0.11748) - 1) * square
    if name == "sign":
        return sign(), square - float(row.abs().sum()) ** 2 / n
    if name == "top_k":
        return top_k(0.25), float(row.abs().sort().values[: n - n // 4].square().sum())
    raise ValueError(name)


@pytest.mark.parametrize("name", ["quantize", "rand_k", "eden", "sign", "top_k"])
def test_the_squared_error_is_the_theorys(name: str) -> None:
    row = rows(1, 4096, 5)[0]
    stage, expected = theory(name, row)
    many = [send(one(stage), row[None], keys(1, round=r, split=4096))[0][0] for r in range(60)]
    found = torch.stack([(m - row).square().sum() for m in many])
    assert float(found.mean()) == pytest.approx(expected, rel=0.02)
    if stage.randomness == "none":
        assert float(found.std()) == pytest.approx(0, abs=1e-9)
