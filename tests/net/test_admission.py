"""What is looked at in an update before it may count."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from registry import MODELS
from torch import Tensor

from atoll import aggregators, transforms
from atoll.algorithms import fedavg, scaffold
from atoll.errors import AtollError
from atoll.local import local_sgd
from atoll.messages import Report, Task
from atoll.net.admission import Finding, Rules, examine
from atoll.net.control import Deliver
from atoll.net.frames import content_hash, encode
from atoll.net.packing import codes_of, pack_report, report_schema
from atoll.net.storage import Content
from atoll.rounds import Process

KIND = MODELS["perceptron"]
LOCAL = local_sgd(0.1, steps=1)
PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "median": {"aggregator": aggregators.median()},
    "quantize": {"transforms": (transforms.quantize(8),)},
    "sealed": {"channel": transforms.secure_sum(clip=1.0)},
}


def opened(**parts: Any) -> tuple[Process, Task]:
    process = Process(KIND.model(torch.float32), parts.pop("algorithm", fedavg(LOCAL)), engine="loop", **parts)
    return process, process.open(process.init(), ("a", "b", "c"), 3)


def blank(process: Process, task: Task) -> dict[str, Tensor]:
    """Tensors of a good update, to be spoilt."""
    report: Report = process.blank(task)
    report.metrics.fill_(1.0)
    codes = {n: t.clone() for n, t in codes_of(report).items()}
    return codes | {"weight": report.weight, "metrics": report.metrics}


def found(
    process: Process, task: Task, tensors: dict[str, Tensor] | bytes, rules: Rules | None = None, **more: Any
) -> Finding:
    content = tensors if isinstance(tensors, bytes) else encode(tensors)
    claim = Deliver("r", "a", 0, 1, "0" * 64, content_hash(content), len(content), process.parts, 9)
    claim = Deliver(**{n: getattr(claim, n) for n in claim.__struct_fields__} | more)
    return examine(process, task, claim, Content(content), report_schema(process, task), rules or Rules())


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_good_update(parts: dict[str, Any]) -> None:
    process, task = opened(**parts)
    assert found(process, task, blank(process, task)).fault == ""


def test_weight_and_norm_are_told() -> None:
    for parts in (PARTS["plain"], PARTS["median"]):
        process, task = opened(**parts)
        given = blank(process, task)
        given["wire"][0, :2], given["weight"] = torch.tensor([3.0, 4.0]), torch.full((1, 1), 7.0, dtype=torch.float64)
        assert found(process, task, given) == Finding("", "", 7.0, 5.0)


def test_where_nobody_is_weighed_a_claimed_weight_hides_no_norm() -> None:
    process, task = opened(aggregator=aggregators.mean(weights="uniform"))
    given = blank(process, task)
    given["wire"][0, 0], given["weight"] = 1e3, torch.full((1, 1), 1e30, dtype=torch.float64)
    assert found(process, task, given, Rules(norm_bound=1.0)).detail == "its norm 1000 is above the bound of 1."


def test_the_norm_is_that_of_the_row_in_units_of_the_model() -> None:
    process, task = opened(transforms=(transforms.rand_k(0.5), transforms.adaptive_clip(20.0)))
    given = blank(process, task)
    given["wire"][0, 0] = 0.5  # of the clip norm
    assert found(process, task, given).norm == pytest.approx(10.0)
    assert found(process, task, given, Rules(norm_bound=9.0)).detail == "its norm 10 is above the bound of 9."


def test_a_report_says_what_the_schema_expects() -> None:
    for parts in PARTS.values():
        process, task = opened(**parts)
        report = replace(process.blank(task), clients=("a",))
        assert found(process, task, pack_report(report)).fault == ""


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["wire", "weight", "metrics"])
@pytest.mark.parametrize("parts", [PARTS["plain"], PARTS["median"]], ids=["plain", "median"])
def test_numbers_that_are_not_finite(parts: dict[str, Any], name: str, bad: float) -> None:
    process, task = opened(**parts)
    given = blank(process, task)
    given[name][0, -1] = bad
    assert found(process, task, given).fault == "content"


def test_codes_that_are_not_finite() -> None:
    process, task = opened(**PARTS["quantize"])
    for name in blank(process, task):
        given = blank(process, task)
        if given[name].is_floating_point():
            given[name][0, 0] = torch.nan
            assert found(process, task, given).fault == "content", name


def test_numbers_that_overflow_by_their_weight() -> None:
    process, task = opened()
    given = blank(process, task)
    given["wire"][0, 0], given["weight"][0, 0] = 3e38, 10.0
    assert found(process, task, given).fault == "content"


@pytest.mark.parametrize(("value", "weight"), [(1e150, 1e-200), (1e100, 1e-170), (1.0, 0.0)])
def test_weights_whose_squares_are_nought(value: float, weight: float) -> None:
    process = Process(KIND.model(torch.float64), fedavg(LOCAL), engine="loop")
    task = process.open(process.init(), ("a", "b", "c"), 3)
    given = blank(process, task)
    given["wire"][0, 0], given["weight"][0, 0] = value, weight
    assert found(process, task, given).norm == pytest.approx(value if weight else 0.0)


@pytest.mark.parametrize("weight", [-1.0, 1e18])
def test_absurd_weights(weight: float) -> None:
    process, task = opened()
    given = blank(process, task)
    given["weight"][0, 0] = weight
    finding = found(process, task, given, Rules(weight_cap=1000.0))
    assert finding.fault == "content" and "weight" in finding.detail


def test_boosted_updates() -> None:
    process, task = opened()
    given = blank(process, task)
    given["wire"].fill_(1000.0)
    finding = found(process, task, given, Rules(norm_bound=10.0))
    assert finding.fault == "content" and "norm" in finding.detail
    assert found(process, task, given).fault == ""


def test_the_summed_part_is_bounded_too() -> None:
    process, task = opened(algorithm=scaffold(LOCAL))
    given = blank(process, task)
    given["wire"][0, -1], given["weight"] = 1000.0, 0 * given["weight"]
    assert found(process, task, given, Rules(norm_bound=10.0)).fault == "content"


@pytest.mark.parametrize("change", [{"parts": (1, 0, 0)}, {"parts": (0, 0, 43)}])
def test_parts_are_the_processs(change: dict[str, Any]) -> None:
    process, task = opened()
    assert found(process, task, blank(process, task), **change).fault == "content"


def test_a_claim_of_more_bytes_than_there_are() -> None:
    process, task = opened()
    assert found(process, task, blank(process, task), bytes=2**53).fault == "content"


def test_other_tensors_are_named() -> None:
    process, task = opened()
    given = blank(process, task)
    for tensors, said in (
        (given | {"more": torch.ones(1)}, "more was not asked for"),
        ({n: t for n, t in given.items() if n != "metrics"}, "metrics is missing"),
        (given | {"wire": given["wire"].double()}, "expected torch.float32"),
        (given | {"wire": given["wire"][:, 1:]}, "shape"),
        (given | {"wire": given["wire"].expand(2, -1)}, "shape"),
    ):
        finding = found(process, task, tensors)
        assert finding.fault == "content" and said in finding.detail


def test_damage_on_the_way_is_not_the_sites_fault() -> None:
    process, task = opened()
    content = encode(blank(process, task))
    assert found(process, task, content, sha256="0" * 64).fault == "transport"
    assert found(process, task, content, size=3).fault == "transport"


def test_a_malformed_frame_that_was_announced_is_the_sites_fault() -> None:
    process, task = opened()
    content = encode(blank(process, task))
    for bad in (content[:-8], (100_000).to_bytes(8, "little") + content[8:], content[:8]):
        assert found(process, task, bad).fault == "content"


@given(st.data())
def test_any_content(data: st.DataObject) -> None:
    """Whatever a frame of the right shape holds, there is a finding; what is let in can be counted."""
    process, task = opened(**PARTS[data.draw(st.sampled_from(sorted(PARTS)))])
    content = bytearray(encode(blank(process, task)))
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(header, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    finding = found(process, task, bytes(content))
    assert finding.fault in ("", "content")


def test_rules_nobody_could_enforce() -> None:
    process, _ = opened(**PARTS["sealed"])
    with pytest.raises(AtollError, match="hides each update"):
        Rules(norm_bound=1.0).check(process)
    with pytest.raises(AtollError, match="weight_cap"):
        Rules(weight_cap=-1.0)


def test_coded_payloads_that_are_damaged_or_for_another_layout() -> None:
    process, task = opened(transforms=(transforms.quantize(4), transforms.entropy_code()))
    given = blank(process, task)
    assert found(process, task, given).fault == ""
    (name,) = (n for n in given if n.startswith("wire"))
    other, odd = opened(transforms=(transforms.quantize(8), transforms.entropy_code()))
    for payload in (given[name][:, :-1], given[name].flip(1), given[name][:, :0], blank(other, odd)[name]):
        finding = found(process, task, given | {name: payload.contiguous()})
        assert finding.fault == "content" and "PayloadError" in finding.detail
    process, task = opened(transforms=(transforms.top_k(0.5),))
    given = blank(process, task)
    given["wire/0/places"].fill_(255)
    assert "PayloadError" in found(process, task, given).detail
