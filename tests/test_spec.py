"""What parts of an experiment are, as plain JSON."""

import functools
import json
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from atoll import spec
from atoll.algorithms import fedavg, scaffold
from atoll.local import local_sgd


@dataclass(frozen=True)
class Point:
    x: float
    y: Any = None


def weighted(factor: float) -> Any:
    return lambda output, target: factor * (output - target).square().mean(1)


class Scaled:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.factor * (output - target).abs().mean(1)

    def method(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self(output, target)


def with_default(factor: float) -> Any:
    def loss(output: torch.Tensor, target: torch.Tensor, factor: float = factor) -> torch.Tensor:
        return factor * (output - target).abs().mean(1)

    return loss


def by_keyword(output: torch.Tensor, target: torch.Tensor, factor: float) -> torch.Tensor:
    return factor * (output - target).abs().mean(1)


def test_a_record_is_json() -> None:
    made = spec.record("thing", a=1, b=(1, 2.5), c={"k": None}, d={"z", "y"}, e=torch.ones(2), f=Point(1.0, [True]))
    assert json.loads(json.dumps(made)) == made
    assert made["b"] == [1, 2.5] and made["d"] == ["y", "z"] and made["f"] == {"name": "Point", "x": 1.0, "y": [True]}


def test_parts_are_named_by_their_own_spec() -> None:
    assert spec.canonical(local_sgd(0.1)) == local_sgd(0.1).spec
    assert spec.canonical([fedavg(local_sgd(0.1))]) == [fedavg(local_sgd(0.1)).spec]


def test_tensors_are_known_by_content() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert spec.canonical(x) == spec.canonical(x.clone()) == spec.canonical(x.T.contiguous().T)
    others = (x + 1, x.double(), x.reshape(3, 2), x.T)
    assert all(spec.canonical(x) != spec.canonical(o) for o in others)
    assert spec.digest(x, x) != spec.digest(x) and spec.digest(torch.empty(0)) != spec.digest(torch.empty(0, 2))
    assert spec.digest(torch.ones(2, dtype=torch.bfloat16)) != spec.digest(torch.ones(2, dtype=torch.float16))


CALLABLES: dict[str, tuple[Any, Any, Any]] = {
    "closures": (weighted(1.0), weighted(1.0), weighted(2.0)),
    "default arguments": (with_default(1.0), with_default(1.0), with_default(2.0)),
    "partial functions": (
        functools.partial(by_keyword, factor=1.0), functools.partial(by_keyword, factor=1.0),
        functools.partial(by_keyword, factor=2.0),
    ),
    "objects": (Scaled(1.0), Scaled(1.0), Scaled(2.0)),
    "methods": (Scaled(1.0).method, Scaled(1.0).method, Scaled(2.0).method),
    "modules": (nn.HuberLoss(delta=1.0), nn.HuberLoss(delta=1.0), nn.HuberLoss(delta=2.0)),
    "weighted modules": (
        nn.CrossEntropyLoss(weight=torch.ones(3)), nn.CrossEntropyLoss(weight=torch.ones(3)),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 5.0])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CALLABLES)
def test_callables_are_known_by_source_and_by_what_they_hold(kind: str) -> None:
    one, same, other = (spec.canonical(c) for c in CALLABLES[kind])
    assert one == same, "two builds of one callable differ"
    assert one != other, "callables that compute different things look the same"
    json.dumps(one)


def test_callables_differ_by_source() -> None:
    one: Any = lambda x: x + 1  # noqa: E731
    two: Any = lambda x: x + 2  # noqa: E731
    assert spec.source_hash(one) != spec.source_hash(two)
    assert spec.source_hash(len) is None


SHARES: Any = {"a": 1.0, "b": 0.5}


def share(client: str, round: int) -> float:
    return SHARES.get(client, 1.0)


def shares(client: str, round: int) -> float:
    return next(SHARES[c] for c in SHARES if c == client)


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        ({"a": 1.0, "b": 0.5}, {"b": 0.5, "a": 1.0}, {"a": 1.0, "b": 0.25}),
        (types.MappingProxyType({"a": 1.0}), types.MappingProxyType({"a": 1.0}), types.MappingProxyType({"a": 0.5})),
        ({("a", 0): 1.0}, {("a", 0): 1.0}, {("a", 1): 1.0}),
        ({"a", "b"}, {"b", "a"}, {"a", "c"}),
        (frozenset("ab"), frozenset("ba"), frozenset("ac")),
        ({"f": len, "g": share}, {"g": share, "f": len}, {"f": share, "g": len}),
    ],
)
@pytest.mark.parametrize("work", [share, shares])
def test_what_a_callable_reads_is_part_of_its_identity(
    work: Any, one: Any, same: Any, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dicts and sets of a module, also when they hold the function that reads them."""
    found: list[str] = []
    for held in (one, same, other):
        monkeypatch.setitem(globals(), "SHARES", held)
        found.append(spec.identity(fedavg(local_sgd(0.1, work=work)).spec))
    assert found[0] == found[1] != found[2]


def test_an_objects_dicts_are_part_of_its_identity() -> None:
    class Table:
        def __init__(self, **shares: float) -> None:
            self.shares = {"all": shares, "self": self}

        def __call__(self, client: str, round: int) -> float:
            return 1.0

        def method(self, client: str, round: int) -> float:
            return 1.0

    for which in (lambda t: t, lambda t: t.method):  # type: ignore[reportUnknownLambdaType]
        one, same, other = (spec.canonical(which(Table(a=s))) for s in (1.0, 1.0, 0.5))
        assert one == same != other


def test_a_container_that_holds_itself_has_a_spec() -> None:
    ring: list[Any] = [1]
    ring.append({"ring": ring})
    assert spec.canonical(ring) == [1, {"ring": {"circle": "list"}}]


def test_a_function_that_calls_itself_has_a_spec() -> None:
    def outer() -> Any:
        def depth(n: int) -> int:
            return 0 if n == 0 else depth(n - 1) + 1

        return depth

    assert spec.canonical(outer()) == spec.canonical(outer())


def test_identity_does_not_depend_on_the_order_of_names() -> None:
    assert spec.identity({"a": 1, "b": 2}) == spec.identity({"b": 2, "a": 1}) != spec.identity({"a": 1, "b": 3})


def test_differences_are_named_by_place() -> None:
    old, new = scaffold(local_sgd(0.1, epochs=2)).spec, scaffold(local_sgd(0.2, epochs=2), option=1).spec
    assert spec.differences(old, new) == ["plan.lr: 0.1 != 0.2", "option: 2 != 1"]
    assert spec.differences(old, new, "algorithm")[0].startswith("algorithm.plan.lr")
    assert spec.differences(old, old) == []
    assert spec.differences({"a": 1}, {"b": {"c": 1}}) == ["a: only in the old one", "b: only in the new one"]
