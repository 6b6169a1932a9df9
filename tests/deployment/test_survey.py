"""What columns mean is agreed by sites as by a simulation over the same clients, whoever comes first."""

from itertools import permutations
from typing import Any

import msgspec
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.data.preprocessing import Preprocessing
from atoll.data.table import Table, table
from atoll.deployment.survey import Agreement, agreed, first_answer, second_answer
from atoll.errors import DataError
from atoll.net.storage import Disk

pytestmark = pytest.mark.usefixtures("unsynced")

RECIPE = table(client="who", target="sick", seed=3)
PARTS = {
    "a": {"age": [30.5, 41.0, 52.25, 63.0, None], "sex": ["f", "m", "f", None, "f"], "sick": [0, 1, 0, 1, 1]},
    "b": {"age": [20.0, 1e3 / 3, 71.0, 68.0], "sex": ["m", "m", "x", "f"], "sick": [1, 0, 0, 1]},
    "c": {"age": [44.4, 45.5, 46.6, 47.7, 48.8], "sex": ["f"] * 5, "sick": [0, 0, 1, 1, 0]},
}


def frame(name: str) -> pd.DataFrame:
    return pd.DataFrame(PARTS[name]).assign(who=name)


def pooled(names: str = "abc") -> Preprocessing:
    return RECIPE.bind(pd.concat([frame(n) for n in names], ignore_index=True)).preprocessing


def cells(name: str, recipe: Table = RECIPE) -> Any:
    return recipe.training(frame(name), name)


@pytest.mark.parametrize("order", list(permutations("abc")))
def test_sites_agree_on_what_a_simulation_settles_in_any_order(tmp_path: Any, order: tuple[str, ...]) -> None:
    files = Disk(tmp_path)
    for name in order:
        assert Agreement(RECIPE, 3, files).stage == "survey"
        Agreement(RECIPE, 3, files).answered(name, "survey", first_answer(cells(name)))
    for name in reversed(order):
        made = Agreement(RECIPE, 3, files)  # the server may have been started again
        assert made.stage == "spread"
        made.answered(name, "spread", second_answer(cells(name), made.question.encode()))
    done = Agreement(RECIPE, 3, files)
    assert done.stage == "ready" and not done.fault
    assert agreed(done.question.encode()) == pooled(), "the same numbers, to the last bit"


def test_a_site_binds_its_own_rows_as_the_simulation_has_them() -> None:
    whole = RECIPE.bind(pd.concat([frame(n) for n in "abc"], ignore_index=True))
    settled = whole.preprocessing
    for source in (frame("b"), frame("b").drop(columns="who"), frame("b").assign(who="Ward 3"),
                   pd.concat([frame(n) for n in "abc"], ignore_index=True)):  # fmt: skip
        mine = RECIPE.bind(source, preprocessing=settled, client="b")
        assert tuple(mine.clients) == ("b",)
        for split in ("train", "test"):
            for field in ("x", "y"):
                assert getattr(mine["b"], split)[field].equal(getattr(whole["b"], split)[field])


def test_a_table_of_several_strangers_is_refused() -> None:
    with pytest.raises(DataError, match="names 2 owners"):
        RECIPE.bind(pd.concat([frame("a"), frame("c")]), client="b")


def test_who_comes_later_is_told_and_not_counted(tmp_path: Any) -> None:
    made = Agreement(RECIPE, 2, Disk(tmp_path))
    for name in "ab":
        made.answered(name, "survey", first_answer(cells(name)))
    question = made.question.encode()
    made.answered("c", "survey", first_answer(cells("c")))
    made.answered("c", "spread", second_answer(cells("c"), question))
    assert made.stage == "spread" and list(made.merged) == ["a", "b"]
    for name in "ab":
        made.answered(name, "spread", second_answer(cells(name), question))
        made.answered(name, "spread", second_answer(cells(name), question))
    assert agreed(made.question.encode()) == pooled("ab")


def test_tables_that_do_not_fit_are_told_and_can_be_mended(tmp_path: Any) -> None:
    made = Agreement(RECIPE, 2, Disk(tmp_path))
    made.answered("a", "survey", first_answer(cells("a")))
    odd = RECIPE.training(frame("b").drop(columns="sex"), "b")
    made.answered("b", "survey", first_answer(odd))
    assert made.stage == "survey" and "sex" in made.fault and "b" in made.fault
    made.answered("b", "survey", first_answer(cells("b")))
    assert made.stage == "spread" and not made.fault


def test_a_site_with_the_longest_name_can_answer(tmp_path: Any) -> None:
    made, name = Agreement(RECIPE, 1, Disk(tmp_path)), "a" * 200
    made.answered(name, "survey", first_answer(cells("a")))
    assert list(made.merged) == [name]
    made.answered(name, "spread", second_answer(cells("a"), made.question.encode()))
    assert made.stage == "ready"


def test_sums_that_overflow_are_told_and_can_be_mended(tmp_path: Any) -> None:
    made = Agreement(RECIPE, 2, Disk(tmp_path))
    for name in "ab":
        made.answered(name, "survey", lied(columns__age__total=1.7e308))
    assert made.stage == "survey" and "age" in made.fault
    made.answered("b", "survey", first_answer(cells("b")))
    assert made.stage == "spread" and not made.fault


def lied(**change: Any) -> bytes:
    told = msgspec.json.decode(first_answer(cells("a")))
    for path, value in change.items():
        at = told
        *way, last = path.split("__")
        for step in way:
            at = at[step]
        at[last] = value
    return msgspec.json.encode(told)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"\x80\x04.", b'{"rows":1}',
        lied(rows=0), lied(rows=-4), lied(rows=1e30), lied(rows="4"), lied(columns__age__present=-1),
        lied(columns__age__missing=10**9), lied(columns__sex__counts={"f": -3}), lied(columns__age__total=None),
        lied(columns__age__kind="secret"),
    ],
)  # fmt: skip
def test_answers_that_contradict_themselves_are_refused(tmp_path: Any, content: bytes) -> None:
    made = Agreement(RECIPE, 1, Disk(tmp_path))
    with pytest.raises(DataError):
        made.answered("a", "survey", content)
    assert made.stage == "survey" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{}", b'{"age":null}', b'{"age":1,"sex":1}', b'{"age":"1"}'])
def test_second_answers_are_about_the_columns_that_were_asked_for(tmp_path: Any, content: bytes) -> None:
    made = Agreement(RECIPE, 1, Disk(tmp_path))
    made.answered("a", "survey", first_answer(cells("a")))
    with pytest.raises(DataError):
        made.answered("a", "spread", content)
    assert made.stage == "spread"


@pytest.mark.parametrize("question", [b"", b'{"height":1.0}', b'{"age":"x"}', b"[]"])
def test_a_site_answers_no_question_about_other_columns(question: bytes) -> None:
    with pytest.raises(DataError):
        second_answer(cells("a"), question)


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_noise_is_no_agreement(content: bytes) -> None:
    with pytest.raises(DataError):
        agreed(content)
