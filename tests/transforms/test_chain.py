"""Composition: what may follow what, and what is known of a row behind the whole chain."""

from typing import Any

import numpy as np
import pytest
import torch
from problems import scalar_model

from atoll import aggregators, random
from atoll.algorithms import fedavg
from atoll.errors import CompositionError, InvalidArgument
from atoll.local import local_sgd
from atoll.rounds import Process
from atoll.spec import record
from atoll.transforms import Transform, clip_norm, plain, quantize, secure_sum
from atoll.transforms.chain import compose, keys_of


def build(**options: Any) -> Process:
    return Process(scalar_model(), fedavg(local_sgd(0.1)), **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"transforms": (quantize(8),), "channel": secure_sum(clip=1.0)},
            r"quantize cannot stand before the channel secure_sum.*Leave quantize out.*channel=\"plain\"",
        ),
        (
            {"transforms": (clip_norm(1.0), quantize(8)), "channel": secure_sum(clip=1.0)},
            r"quantize cannot stand before the channel secure_sum",
        ),
        (
            {"transforms": (quantize(8), clip_norm(1.0))},
            r"clip_norm cannot stand after quantize.*Put clip_norm before quantize",
        ),
        ({"transforms": (quantize(8), quantize(4))}, r"quantize cannot stand after quantize"),
        (
            {"aggregator": aggregators.median(), "channel": secure_sum(clip=1.0)},
            r"aggregator median needs every client's row.*secure_sum.*aggregators\.mean\(\)",
        ),
    ],
)
def test_illegal_compositions_are_refused_with_both_names_and_the_way_out(options: dict[str, Any], said: str) -> None:
    with pytest.raises(CompositionError, match=said):
        build(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"transforms": (clip_norm(1.0), quantize(8))},
        {"transforms": (clip_norm(1.0),), "channel": secure_sum(clip=1.0)},
        {"transforms": (quantize(8),), "aggregator": aggregators.median()},
        {"transforms": [clip_norm(2.0), clip_norm(1.0)]},
    ],
)
def test_legal_compositions_are_built(options: dict[str, Any]) -> None:
    assert build(**options).chain.stages == tuple(options["transforms"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"transforms": clip_norm(1.0)}, r"transforms='clip_norm'.*transforms=\(clip_norm\(\.\.\.\),\)"),
        ({"transforms": ("clip_norm",)}, "transforms='clip_norm'"),
        ({"channel": "secure"}, "channel='secure'"),
    ],
)
def test_what_is_no_pipeline(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        build(**options)


def test_facts_follow_from_the_stages() -> None:
    facts = compose((clip_norm(2.0), clip_norm(3.0)), plain()).facts
    assert facts.bound == 2.0 and facts.sums and not facts.unbiased and facts.fixed_size
    facts = compose((clip_norm(2.0), quantize(4)), plain()).facts
    assert facts.bound is None and not facts.sums
    facts = compose((), plain()).facts
    assert facts.bound is None and facts.sums and facts.unbiased and facts.fixed_size
    assert compose((quantize(4),), plain()).facts.unbiased


def doubled(name: str, log: list[str]) -> Transform:
    """A stage with state, memory and both server halves: it scales by 2 and counts a client's visits."""

    def encode(rows: torch.Tensor, memory: dict[str, torch.Tensor], shared: Any, keys: Any) -> Any:
        log.append(f"encode {name} {shared}")
        return rows * 2, {"visits": memory["visits"] + 1}

    def decode(total: torch.Tensor, shared: Any, length: int, keys: Any) -> torch.Tensor:
        log.append(f"decode {name} {shared}")
        return total / 2

    return Transform(
        record(name), encode, decode_sum=decode, init=lambda size: size, share=lambda state: state + 1,
        update=lambda state, aggregate: state + 10, memory=lambda size: {"visits": torch.zeros(1, dtype=torch.float64)},
    )  # fmt: skip


def test_halves_run_in_order_and_in_reverse_with_state_and_memory() -> None:
    from problems import quadratics

    log: list[str] = []
    process = build(transforms=(doubled("first", log), doubled("second", log)), engine="loop")
    data = quadratics((1.0,), (2.0,))
    state, _ = process.next(process.init(), data)
    assert log == ["encode first 2", "encode second 2", "decode second 2", "decode first 2"]
    assert state.transforms == (11, 11)
    assert float(process.vector(state)) == pytest.approx(0.2)
    state, _ = process.next(state, data)
    assert log[4] == "encode first 12"
    kept = state.memory.layout.view(state.memory.rows(["c0"], torch.zeros(2, dtype=torch.float64))[0])
    assert {n: float(t) for n, t in kept.items()} == {"transforms/0/visits": 2.0, "transforms/1/visits": 2.0}


def test_stages_draw_randomness_of_their_own() -> None:
    rows = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    clients = random.client_keys(["a"])
    one, two = compose((quantize(2),), plain()), compose((clip_norm(1e9), quantize(2)), plain())
    wires = [c.encode(rows, {}, (None,) * len(c.stages), keys_of(0, 0, clients, 50))[0] for c in (one, two)]
    assert not torch.equal(wires[0]["0/codes"], wires[1]["1/codes"])  # type: ignore[index]


def test_specs_are_told_apart() -> None:
    specs = [
        build(transforms=t, channel=c).spec
        for t in ((), (clip_norm(1.0),), (clip_norm(2.0),))
        for c in ("plain", secure_sum(clip=1.0))
    ]
    assert len({str(s) for s in specs}) == 6 and np.unique([s["name"] for s in specs]).tolist() == ["process"]
