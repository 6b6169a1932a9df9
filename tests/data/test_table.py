"""Tables: the cut comes first, statistics are federated and equal the pooled ones, and errors are clear."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from atoll.data import FederatedDataset, Preprocessing, table
from atoll.data.cells import raw
from atoll.data.preprocessing import spread, survey
from atoll.errors import DataError, InvalidArgument


def people(n: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "site": rng.choice(["north", "south", "east"], n),
            "age": rng.normal(50, 12, n),
            "income": rng.lognormal(10, 1, n),
            "visits": rng.integers(0, 9, n),
            "town": rng.choice(["a", "b", "c"], n),
            "smoker": rng.random(n) < 0.3,
            "ill": rng.integers(0, 2, n),
        }
    )
    frame.loc[rng.random(n) < 0.2, "age"] = np.nan
    frame["town"] = frame["town"].where(rng.random(n) > 0.1)
    return frame


def bind(frame: Any, **options: Any) -> FederatedDataset:
    return table(client="site", target="ill", **options).bind(frame)


def training_rows(frame: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """The rows that were cut for training, found by a marker the recipe carries along unscaled."""
    marked = frame.assign(row=np.arange(len(frame), dtype=np.int64))
    data = bind(marked, features=["row"], standardise=False, **options)
    return frame.iloc[data.train.fields["x"][:, 0].long().numpy()]


# --- against scikit-learn on the pooled training rows ---------------------------------------------------------------


def test_numbers_equal_an_imputer_and_a_scaler_on_pooled_rows() -> None:
    frame = people()
    columns = ["age", "income", "visits"]
    data = bind(frame, features=columns)
    pooled = training_rows(frame)[columns]
    assert list(data.features) == ["age", "age missing", "income", "visits"]
    oracle = make_pipeline(SimpleImputer(), StandardScaler()).fit(pooled)
    expected = oracle.transform(pooled)
    x = data.train.fields["x"].numpy()
    np.testing.assert_allclose(x[:, [0, 2, 3]], expected, atol=1e-6)
    np.testing.assert_array_equal(x[:, 1], pooled["age"].isna())
    scales = [column.scale for column in data.preprocessing.columns]
    np.testing.assert_allclose(scales, oracle[1].scale_, rtol=1e-12)
    np.testing.assert_allclose([c.mean for c in data.preprocessing.columns], oracle[0].statistics_, rtol=1e-12)


def test_categories_equal_a_one_hot_encoder_on_pooled_rows() -> None:
    frame = people()
    data = bind(frame, features=["town", "smoker"])
    pooled = training_rows(frame)[["town", "smoker"]].astype(object)
    assert list(data.features) == ["town=a", "town=b", "town=c", "town missing", "smoker=False", "smoker=True"]
    expected = OneHotEncoder(sparse_output=False).fit_transform(pooled.where(pooled.notna(), "~").astype(str))
    np.testing.assert_array_equal(data.train.fields["x"].numpy(), expected)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6) | st.none(), min_size=4, max_size=40),
    offset=st.sampled_from([0.0, 1e8]),
    cut=st.integers(1, 3),
)
def test_merged_sums_equal_pooled_ones(values: list[float | None], offset: float, cut: int) -> None:
    column = np.asarray([np.nan if v is None else v + offset for v in values])
    frame = pd.DataFrame({"x": column, "y": 0})
    parts = [raw(frame.iloc[i :: cut + 1], ["x"], "y", where="part") for i in range(cut + 1)]
    found = survey().over(parts)
    sums = found.columns["x"]
    assert sums.present == int(np.isfinite(column).sum()) and sums.missing == int(np.isnan(column).sum())
    if sums.present == 0:
        assert sums.kind == "empty"
        return
    mean = sums.total / sums.present
    np.testing.assert_allclose(mean, np.nanmean(column), rtol=1e-9, atol=1e-6)
    squares = spread({"x": mean}).over(parts)["x"]
    np.testing.assert_allclose(squares, np.nansum((column - np.nanmean(column)) ** 2), rtol=1e-6, atol=1e-3)


def test_only_counts_and_sums_leave_a_client() -> None:
    local = survey().local(raw(people(50), ["age", "town"], "ill", where="a"))
    age, town = local.columns["age"], local.columns["town"]
    assert (age.kind, age.counts, isinstance(age.total, float)) == ("numeric", {}, True)
    assert set(town.counts) == {"a", "b", "c"} and sum(town.counts.values()) + town.missing == 50


# --- the cut comes first --------------------------------------------------------------------------------------------


def test_an_extreme_test_row_moves_nothing() -> None:
    frame = people()
    before = bind(frame, drop=["town"], validation=0.1)
    trained = training_rows(frame, validation=0.1)
    spoiled = frame.copy()
    outside = ~frame.index.isin(trained.index)
    spoiled.loc[outside, "income"] = 1e15
    spoiled.loc[outside, "smoker"] = True
    after = bind(spoiled, drop=["town"], validation=0.1)
    assert after.preprocessing == before.preprocessing
    assert torch.equal(after.train.fields["x"], before.train.fields["x"])
    assert float(after.test.fields["x"].max()) > 1e6


def test_a_category_met_only_in_test_is_all_zeros() -> None:
    frame = people()
    trained = training_rows(frame)
    row = frame.index[~frame.index.isin(trained.index)][0]
    frame.loc[row, "town"] = "elsewhere"
    data = bind(frame, features=["town"])
    assert "town=elsewhere" not in data.features
    assert int((data.test.fields["x"].sum(dim=1) == 0).sum()) == 1


def test_a_site_alone_gets_the_same_rows_with_the_federations_preprocessing() -> None:
    frame = people()
    recipe = table(client="site", target="ill", stratify=True)
    whole = recipe.bind(frame)
    alone = recipe.bind(frame[frame["site"] == "south"], preprocessing=whole.preprocessing)
    for label in ("train", "test"):
        assert torch.equal(getattr(alone["south"], label)["x"], getattr(whole["south"], label)["x"])
    other = table(client="site", target="ill", drop=["age"])
    with pytest.raises(InvalidArgument, match="recipe it was made with"):
        other.bind(frame, preprocessing=whole.preprocessing)


def test_every_row_is_used_once() -> None:
    frame = people().assign(row=np.arange(200))
    data = table(client="site", target="ill", features=["row"], standardise=False, validation=0.2).bind(frame)
    ids = torch.cat([s.fields["x"][:, 0] for s in (data.train, data.validation, data.test)])
    assert sorted(ids.tolist()) == list(range(200))
    assert tuple(data.clients) == ("east", "north", "south")
    for name in data:
        rows = data[name].train["x"][:, 0].long().numpy()
        assert set(frame.iloc[rows]["site"]) == {name}
        assert data[name].train["y"].tolist() == frame.iloc[rows]["ill"].tolist()


# --- columns --------------------------------------------------------------------------------------------------------


def test_constant_columns_have_scale_one() -> None:
    frame = people().assign(always=0.1, gap=np.where(np.arange(200) % 3 == 0, np.nan, 7.3))
    data = bind(frame, features=["always", "gap"])
    assert [column.scale for column in data.preprocessing.columns] == [1.0, 1.0]
    assert float(data.train.fields["x"][:, 0].abs().max()) < 1e-6


def test_a_column_that_one_client_never_recorded() -> None:
    frame = people()
    frame.loc[frame["site"] == "east", ["age", "town"]] = np.nan
    data = bind(frame, features=["age", "town"])
    east = data["east"].train["x"]
    assert float(east[:, 0].abs().max()) < 1e-6 and bool((east[:, 1] == 1).all()) and bool((east[:, -1] == 1).all())


def test_coded_categories_and_declared_ones() -> None:
    frame = people()
    coded = bind(frame, features=["visits"], categorical=["visits"])
    assert coded.features == tuple(f"visits={k}" for k in range(9))
    frame["level"] = np.where(np.arange(200) % 2 == 0, 1.0, np.nan)
    assert bind(frame, features=["level"], categorical=["level"]).features == ("level=1", "level missing")
    declared = bind(frame, features=["town"], categories={"town": ["c", "b", "a", "z"]}, indicators=[])
    assert declared.features == ("town=c", "town=b", "town=a", "town=z")
    with pytest.raises(DataError, match=r"category 'c' .* is not among"):
        bind(frame, features=["town"], categories={"town": ["a", "b"]})
    assert bind(frame, features=["income"], indicators=["income"]).features == ("income", "income missing")


def test_kinds_of_storage_agree() -> None:
    frame = people()
    base = bind(frame)
    nullable = frame.convert_dtypes()
    listed = frame.assign(town=frame["town"].astype("category"))
    objects = frame.astype(object)
    for other in (nullable, listed, objects):
        assert bind(other).fingerprint() == base.fingerprint()


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_files(tmp_path: Path, suffix: str) -> None:
    frame = people()
    path = tmp_path / f"people{suffix}"
    frame.to_parquet(path) if suffix == ".parquet" else frame.to_csv(path, index=False)
    data = FederatedDataset.from_frame(path, client="site", target="ill", seed=3)
    assert data.fingerprint() == FederatedDataset.from_frame(frame, client="site", target="ill", seed=3).fingerprint()


def test_numbered_clients_are_sorted_as_numbers() -> None:
    frame = people(40).assign(site=np.arange(40) % 11)
    assert tuple(bind(frame).clients) == tuple(str(i) for i in range(11))
    assert tuple(bind(frame.assign(site=frame["site"].astype(float))).clients)[10] == "10"


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "options", "classes"),
    [
        (["yes", "no"], {}, ("no", "yes")),
        (["yes", "no"], {"positive": "no"}, ("yes", "no")),
        ([True, False], {}, (False, True)),
        ([True, False], {"positive": False}, (True, False)),
        ([3, 1, 2], {}, (1, 2, 3)),
        ([10, 9], {"positive": 9}, (10, 9)),
        (["u", "v"], {"classes": ["w", "v", "u"]}, ("w", "v", "u")),
        ([0.5, 1.5], {}, None),
        (list(range(21)), {}, None),
        (list(range(20)), {}, tuple(range(20))),
        ([0, 1], {"task": "regression"}, None),
        (list(range(30)), {"classes": list(range(30))}, tuple(range(30))),
    ],
)
def test_targets(values: list[Any], options: dict[str, Any], classes: tuple[Any, ...] | None) -> None:
    frame = people(210)
    frame["ill"] = (values * 210)[:210]
    data = bind(frame, features=["visits"], stratify=True, **options)
    assert data.preprocessing.classes == classes
    written = pd.Series((values * 210)[:210])
    if classes is None:
        assert data.train.fields["y"].dtype == torch.float32
        assert sorted(torch.cat([data.train.fields["y"], data.test.fields["y"]]).tolist()) == sorted(
            map(float, written)
        )
    else:
        back = [classes[k] for k in torch.cat([data.train.fields["y"], data.test.fields["y"]]).tolist()]
        assert sorted(back) == sorted(written)
        if len(classes) == 2:
            assert list(data.describe().columns[-2:]) == [f"class {label}" for label in classes]


# --- the record -----------------------------------------------------------------------------------------------------


def test_the_record_survives_json_and_transforms_alike() -> None:
    frame = people()
    data = bind(frame)
    again = Preprocessing.from_dict(json.loads(json.dumps(data.preprocessing.to_dict())))
    assert again == data.preprocessing and again.features == data.features
    x, y = again.transform(frame)
    assert x.dtype == torch.float32 and x.shape == (200, len(data.features)) and y is not None
    rows = training_rows(frame).index.tolist()
    assert torch.equal(x[rows], data.train.fields["x"]) and torch.equal(y[rows], data.train.fields["y"])
    assert again.transform(frame.drop(columns="ill"))[1] is None


@pytest.mark.parametrize(
    "damage", [{"version": 2}, {"columns": [{"name": "a"}]}, {"classes": [[1]]}, {"missing": "guess"}]
)
def test_a_damaged_record_is_refused(damage: dict[str, Any]) -> None:
    record = bind(people()).preprocessing.to_dict() | damage
    with pytest.raises(DataError, match="again from the data"):
        Preprocessing.from_dict(record)


# --- errors ---------------------------------------------------------------------------------------------------------


def without(column: str) -> pd.DataFrame:
    frame = people()
    frame.loc[[3, 5], column] = None
    return frame


def having(column: str, values: Any) -> pd.DataFrame:
    return people().assign(**{column: values})


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (
            lambda: table(client="sites", target="ill").bind(people()),
            ["client='sites'", "Did you mean 'site'", "'age'"],
        ),
        (lambda: table(client="site", target="sick").bind(people()), ["target='sick'"]),
        (lambda: bind(people(), features=["ages"]), ["features='ages'", "Did you mean 'age'"]),
        (lambda: bind(people(), drop=["ages"]), ["drop='ages'"]),
        (lambda: bind(people(), features=["ill"]), ["features=['ill']", "without the client and target"]),
        (lambda: bind(people(), features="age"), ["features='age'", "Pass ['age']"]),
        (lambda: bind(people(), missing="median"), ["missing='median'", "'mean', 'error'"]),
        (lambda: bind(people(), task="guess"), ["task='guess'"]),
        (lambda: bind(people(), test=1.0), ["test=1.0"]),
        (lambda: table(client="a", target="a"), ["another column"]),
        (lambda: bind(without("site")), ["2 of 200 rows have no client", "'site'"]),
        (lambda: bind(without("ill")), ["2 of 200 rows have no target", "'ill'"]),
        (lambda: bind(without("ill"), stratify=True), ["2 of 200 rows have no target"]),
        (lambda: bind(having("ill", np.nan)), ["200 of 200 rows have no target"]),
        (lambda: bind(having("age", np.inf)), ["'age'", "200 infinite", "'east'"]),
        (lambda: bind(having("age", np.nan)), ["'age' has no value", "drop=['age']"]),
        (lambda: bind(people(), missing="error"), ["'age'", "missing", 'missing="mean"']),
        (lambda: bind(having("age", ["3"] * 199 + ["?"])), ["'age'", "199 numbers", "'?'", "categorical=['age']"]),
        (lambda: bind(having("age", pd.Timestamp("2020-01-01"))), ["'age'", "datetime", "drop=['age']"]),
        (lambda: bind(having("age", [[1]] * 200)), ["'age'", "list"]),
        (lambda: bind(having("age", np.arange(200) * 1e305)), ["'age'", "overflows"]),
        (
            lambda: bind(people(6000).assign(town=np.arange(6000).astype(str))),
            ["'town'", "4800 categories", "drop=['town']"],
        ),
        (lambda: bind(people(), positive=2), ["positive=2", "0, 1"]),
        (lambda: bind(having("ill", np.arange(200) % 3), positive=1), ["positive=1", "3 classes"]),
        (
            lambda: bind(having("ill", np.arange(200) / 7), task="classification"),
            ["task='classification'", "real numbers"],
        ),
        (lambda: bind(having("ill", np.arange(200)), task="classification"), ["task='classification'", "more than 20"]),
        (lambda: bind(having("ill", ["a", "b"] * 100), task="regression"), ["task='regression'", "text"]),
        (lambda: bind(people(), classes=[0]), ["classes=[0]", "'1'"]),
        (lambda: bind(people().iloc[:0]), ["no rows"]),
        (lambda: bind(people()[["site", "ill"]]), ["no feature columns"]),
        (lambda: bind(pd.concat([people(), people()[["age"]]], axis=1)), ["2 columns named 'age'"]),
        (lambda: bind("nowhere.csv"), ["nowhere.csv", "Check the path"]),
        (lambda: bind("people.xlsx"), ["people.xlsx", ".parquet"]),
        (lambda: bind(3), ["source='int'"]),
        (lambda: bind(people()).preprocessing.transform(people().drop(columns="age")), ["'age'"]),
        (lambda: bind(people()).preprocessing.transform(having("age", "old")), ["'age'", "categorical", "numeric"]),
        (lambda: bind(people()).preprocessing.transform(having("ill", 7)), ["'ill'", "'7'", "0, 1"]),
    ],
)
def test_bad_input_is_named(build: Any, parts: list[str]) -> None:
    with pytest.raises((DataError, InvalidArgument)) as caught:
        build()
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_a_missing_column_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    people().to_csv(path, index=False)
    with pytest.raises(DataError, match=r"people\.csv.*no such column.*'site'.*'age'"):
        FederatedDataset.from_frame(path, client="hospital", target="ill")
    path.write_text("")
    with pytest.raises(DataError, match=r"people\.csv.*cannot be read"):
        FederatedDataset.from_frame(path, client="site", target="ill")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"bad\.parquet.*cannot be read"):
        FederatedDataset.from_frame(tmp_path / "bad.parquet", client="site", target="ill")


def test_clients_that_write_a_column_differently_are_told() -> None:
    numbers = raw(pd.DataFrame({"x": [1.0, 2.0], "y": [0, 1]}), ["x"], "y", where="a")
    words = raw(pd.DataFrame({"x": ["low", "high"], "y": [0, 1]}), ["x"], "y", where="b")
    with pytest.raises(DataError, match="'x' holds numbers at some clients and text at others"):
        survey().over([numbers, words])
    real = raw(pd.DataFrame({"x": [1.0, 2.0], "y": [0.5, 1]}), ["x"], "y", where="c")
    with pytest.raises(DataError, match="one way everywhere"):
        survey().over([numbers, real])
