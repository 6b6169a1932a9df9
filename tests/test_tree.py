"""States and messages as flat maps of leaves."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from atoll.errors import RunError
from atoll.tree import leaves, nbytes, rebuild


class Pair(NamedTuple):
    left: torch.Tensor
    right: Any


@dataclass(frozen=True, slots=True)
class Box:
    name: str
    inside: Any


def example() -> Box:
    pair = Pair(torch.arange(3), (torch.zeros(2, 2), None, 4))
    return Box("b", {"x": pair, "y": [1.5, True], "z": (), "w": Pair(torch.empty(0), {})})


def test_leaves_are_named_by_their_path() -> None:
    paths = dict(leaves(example()))
    assert list(paths) == [
        "name", "inside/x/left", "inside/x/right/0", "inside/x/right/1", "inside/x/right/2",
        "inside/y/0", "inside/y/1", "inside/w/left",
    ]  # fmt: skip
    assert paths["name"] == "b" and paths["inside/x/right/1"] is None and paths["inside/y/1"] is True
    assert dict(leaves(7)) == {"": 7}


def test_rebuilding_gives_the_same_kinds_with_the_new_leaves() -> None:
    values = dict(leaves(example()))
    values["inside/x/left"] = torch.tensor([7, 8, 9])
    values["inside/y/0"] = 2.5
    again = rebuild(example(), values)
    assert type(again) is Box and type(again.inside["x"]) is Pair and type(again.inside["y"]) is list
    assert again.inside["z"] == () and again.inside["w"].right == {}
    assert again.inside["x"].left.tolist() == [7, 8, 9] and again.inside["y"] == [2.5, True]
    assert [p for p, _ in leaves(again)] == [p for p, _ in leaves(example())]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("inside/x/left", torch.arange(4), r"'inside/x/left' is \(4,\) torch.int64.*needs \(3,\) torch.int64"),
        ("inside/x/left", torch.zeros(3), r"is \(3,\) torch.float32.*needs \(3,\) torch.int64"),
        ("inside/x/left", 3, r"is 3, but"),
    ],
)
def test_leaves_of_another_shape_or_kind_are_refused(name: str, value: Any, said: str) -> None:
    with pytest.raises(RunError, match=said):
        rebuild(example(), dict(leaves(example())) | {name: value})


def test_a_missing_leaf_is_refused() -> None:
    values = dict(leaves(example()))
    del values["inside/y/1"]
    with pytest.raises(RunError, match="lacks 'inside/y/1'"):
        rebuild(example(), values)


def test_other_objects_have_no_place() -> None:
    with pytest.raises(TypeError, match="set cannot be part"):
        list(leaves({"x": {1, 2}}))


def test_bytes_are_counted() -> None:
    assert nbytes(example()) == 3 * 8 + 4 * 4 + 8 + 8 + 8
    assert nbytes(torch.zeros(5, dtype=torch.float16)) == 10 and nbytes(()) == 0 and nbytes("text") == 0
