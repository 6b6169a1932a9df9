"""Clients in Parquet files: the rows a cohort needs and no others, whoever wrote them in whatever order."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.data import FederatedDataset, LazyDataset
from atoll.data.names import Numbered, PackedNames
from atoll.data.parquet import Parquet
from atoll.errors import DataError, InvalidArgument


def frame(owners: list[Any], seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    n = len(owners)
    return pd.DataFrame(
        {
            "who": owners,
            "a": rng.normal(size=n),
            "b": rng.integers(0, 9, n),
            "c": rng.random(n) < 0.5,
            "y": np.arange(n) % 4,
        }
    )


def expected(table: pd.DataFrame, client: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows = table[table["who"] == client]
    return torch.tensor(rows[["a", "b", "c"]].to_numpy(dtype=np.float32)), torch.tensor(rows["y"].to_numpy())


def read(path: Path, **options: Any) -> LazyDataset:
    return FederatedDataset.from_parquet(path, client="who", **({"target": "y"} | options))


def agrees(data: LazyDataset, table: pd.DataFrame) -> None:
    names = list(dict.fromkeys(str(value) for value in table["who"]))
    values = list(dict.fromkeys(table["who"]))
    assert list(data.clients) == names
    cohort = names[::-2]
    drawn = data.draw(cohort)
    for name in cohort:
        x, y = expected(table, values[names.index(name)])
        assert torch.equal(drawn[name].train["x"], x) and torch.equal(drawn[name].train["y"], y)
    assert data.sizes.tolist() == [int((table["who"] == value).sum()) for value in values]


@pytest.mark.parametrize(
    "owners",
    [
        [f"h{i}" for i in (3, 1, 2) for _ in range(i + 1)],
        ["b", "a", "b", "c", "a", "b", "b"],
        [0, 0, 1, 2, 2, 2, 3],
        [7, 7, 4, -1, 7],
        ["é", "é", "一"],
        ["only"],
    ],
)
@pytest.mark.parametrize("rows", [1, 2, 1000])
def test_a_draw_is_the_rows_of_its_clients(tmp_path: Path, owners: list[Any], rows: int) -> None:
    table = frame(owners)
    table.to_parquet(tmp_path / "t.parquet", row_group_size=rows, index=False)
    data = read(tmp_path / "t.parquet")
    assert data.features == ("a", "b", "c")
    agrees(data, table)
    assert isinstance(data.clients, Numbered) == (owners[:2] == [0, 0])


@settings(max_examples=25, deadline=None)
@given(
    owners=st.lists(st.integers(0, 6), min_size=1, max_size=40),
    rows=st.integers(1, 9),
    cut=st.integers(0, 40),
    sort=st.booleans(),
)
def test_any_order_of_rows_over_files(
    tmp_path_factory: pytest.TempPathFactory, owners: list[int], rows: int, cut: int, sort: bool
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    table = frame(sorted(owners) if sort else owners)
    for place, part in enumerate((table[:cut], table[cut:])):
        part.to_parquet(folder / f"{place}.parquet", row_group_size=rows, index=False)
    agrees(read(folder), table)


def test_many_names_stay_packed_and_cuts_follow_them(tmp_path: Path) -> None:
    owners = [f"client {i}" for i in range(12_000) for _ in range(2)]
    frame(owners).to_parquet(tmp_path / "t.parquet", row_group_size=5000, index=False)
    data = read(tmp_path / "t.parquet", test=0.5)
    assert isinstance(data.clients, PackedNames) and data.clients[11_999] == "client 11999"
    drawn = data.draw(data.clients[5:8])
    assert drawn.test is not None and drawn.test.sizes.tolist() == [1, 1, 1] == drawn.train.sizes.tolist()
    data.save(tmp_path / "packed")
    opened = FederatedDataset.open(tmp_path / "packed")
    assert torch.equal(opened["client 6"].test["x"], drawn["client 6"].test["x"])  # type: ignore[index]
    assert opened.clients == data.clients


def test_only_the_groups_of_the_cohort_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame([i // 2 for i in range(40)]).to_parquet(tmp_path / "t.parquet", row_group_size=4, index=False)
    data = read(tmp_path / "t.parquet")
    asked: list[tuple[int, list[str]]] = []
    original = pq.ParquetFile.read_row_group

    def watched(self: Any, i: int, columns: Any = None, **options: Any) -> Any:
        asked.append((i, columns))
        return original(self, i, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    data.draw(["19", "0", "1"])
    assert asked == [(0, ["a", "b", "c", "y"]), (9, ["a", "b", "c", "y"])]


def test_named_fields_lists_and_dtypes(tmp_path: Path) -> None:
    table = pa.table(
        {
            "who": pa.array(["a", "a", "b"]).dictionary_encode(),
            "user": pa.array([1, 2, 3], pa.int32()),
            "item": pa.array([4, 5, 6], pa.uint8()),
            "pixels": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.uint8())),
            "fixed": pa.array([[1.0, 2.0, 3.0]] * 3, pa.list_(pa.float64(), 3)),
            "rating": pa.array([0.5, 1.5, 2.5], pa.float64()),
            "note": pa.array(["x", "y", "z"]),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    fields = {"user": "user", "item": "item", "x": "pixels", "f": "fixed", "both": ["user", "rating"], "y": "rating"}
    data = read(tmp_path / "t.parquet", target=None, fields=fields)
    b, a = (data.draw(["b", "a"])[name].train for name in ("b", "a"))
    assert a["user"].tolist() == [1, 2] and a["user"].dtype == torch.int64 and a["item"].dtype == torch.uint8
    assert a["x"].tolist() == [[1, 2], [3, 4]] and a["x"].dtype == torch.uint8
    assert b["f"].tolist() == [[1.0, 2.0, 3.0]] and b["f"].dtype == torch.float32
    assert a["both"].tolist() == [[1.0, 0.5], [2.0, 1.5]] and b["y"].tolist() == [2.5]
    alone = read(tmp_path / "t.parquet", target="rating", features=["pixels"])
    assert alone["b"].train["x"].tolist() == [[5, 6]] and alone.features == ()


def test_the_fingerprint_knows_the_files(tmp_path: Path) -> None:
    table = frame([i // 3 for i in range(300)])
    table.to_parquet(tmp_path / "t.parquet", index=False)
    before = read(tmp_path / "t.parquet").fingerprint()
    (tmp_path / "elsewhere").mkdir()
    table.to_parquet(tmp_path / "elsewhere" / "u.parquet", index=False)
    assert read(tmp_path / "elsewhere").fingerprint() == before, "a copy is the same data"
    assert read(tmp_path / "t.parquet", features=["a", "b"]).fingerprint() != before
    table.loc[150, "a"] = 100.0
    table.to_parquet(tmp_path / "t.parquet", index=False)
    assert read(tmp_path / "t.parquet").fingerprint() != before


def test_a_file_that_changes_is_found(tmp_path: Path) -> None:
    table = frame([i // 2 for i in range(40)])
    for part in range(2):
        table[20 * part : 20 * part + 20].to_parquet(tmp_path / f"{part}.parquet", index=False)
    data = read(tmp_path)
    data.check_unchanged()
    path = tmp_path / "1.parquet"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    for use in (data.check_unchanged, lambda: data.draw(["1"])):
        with pytest.raises(DataError, match=r"1\.parquet' changed while its data are in use: it was written to"):
            use()


# --- bad input ------------------------------------------------------------------------------------------------------


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table({"who": ["a", "b"], "a": [1.0, 2.0], "y": [0, 1]} | columns), path / "t.parquet")
    return path / "t.parquet"


@pytest.mark.parametrize(
    ("columns", "options", "parts"),
    [
        ({"who": pa.array(["a", None])}, {}, ["1 rows have no client in column 'who'"]),
        ({"who": ["a", ""]}, {}, ["empty client in column 'who'"]),
        ({"who": [0.5, 1.0]}, {}, ["column 'who'", "double", "text or whole numbers"]),
        ({"a": pa.array([1.0, None])}, {}, ["column 'a': 1 missing values", "from_frame"]),
        ({"y": pa.array([None, 1])}, {}, ["column 'y': 1 missing values"]),
        ({"a": ["u", "v"]}, {}, ["column 'a'", "string", "not numbers", "from_frame"]),
        ({"a": [[1.0], [2.0]]}, {"features": ["a", "y"], "target": "a"}, ["column 'a'", "not numbers"]),
        ({}, {"target": "z"}, ["target='z'", "'a'"]),
        ({}, {"features": ["aa"]}, ["features='aa'", "Did you mean 'a'?"]),
        ({}, {"features": "a"}, ["features='a'", "Pass ['a']"]),
        ({}, {"features": ["who"]}, ["features='who'", "another column than client"]),
        ({}, {"features": []}, ["features", "Name some"]),
        ({}, {"target": None}, ["target=None"]),
        ({}, {"fields": {"x": "a"}}, ["fields=", "without target"]),
        ({}, {"target": None, "fields": {"x": "q"}}, ["fields['x']='q'"]),
        ({}, {"test": 2.0}, ["test=2.0"]),
        ({}, {"holdout": (np.zeros((2, 2)), [0, 1])}, ["holdout, field 'x'"]),
    ],
)
def test_bad_input_is_named(tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], parts: list[str]) -> None:
    path = write(tmp_path, **columns)
    with pytest.raises((DataError, InvalidArgument)) as caught:
        read(path, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("lists", "message"),
    [([[1.0], [1.0, 2.0]], "different lengths"), ([[1.0], [None]], "1 missing"), ([[1.0], None], "1 missing")],
)
def test_lists_that_make_no_tensor(tmp_path: Path, lists: Any, message: str) -> None:
    path = write(tmp_path, a=pa.array(lists, pa.list_(pa.float64())))
    with pytest.raises(DataError, match=f"column 'a'.*{message}"):
        read(path).draw(["a", "b"])


def test_missing_values_without_statistics_are_found_when_drawn(tmp_path: Path) -> None:
    table = pa.table({"who": ["a", "b"], "a": pa.array([1.0, None]), "y": [0, 1]})
    pq.write_table(table, tmp_path / "t.parquet", write_statistics=False)
    with pytest.raises(DataError, match="column 'a': 1 missing"):
        read(tmp_path / "t.parquet").draw(["b"])


def test_non_finite_values_are_found_when_drawn(tmp_path: Path) -> None:
    data = read(write(tmp_path, a=[1.0, np.inf]))
    data.draw(["a"])
    with pytest.raises(DataError, match=r"client 'b', train field 'x', feature column 0 \('a'\)"):
        data.draw(["a", "b"])


def test_files_that_are_no_parquet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.parquet files"):
        read(tmp_path)
    with pytest.raises(DataError, match="No file"):
        read(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_text("who,a,y\n")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(tmp_path / "t.parquet")
    with pytest.raises(InvalidArgument, match="source='list'"):
        read([])  # type: ignore[arg-type]
    pq.write_table(
        pa.table({"who": pa.array([], pa.string()), "a": pa.array([], pa.float32()), "y": pa.array([], pa.int64())}),
        tmp_path / "t.parquet",
    )
    with pytest.raises(DataError, match="has no rows"):
        read(tmp_path / "t.parquet")


def test_files_of_different_columns(tmp_path: Path) -> None:
    write(tmp_path)
    pq.write_table(pa.table({"who": ["c"], "a": [1], "y": [0]}), tmp_path / "u.parquet")
    with pytest.raises(DataError, match=r"u\.parquet' has other columns or types than"):
        read(tmp_path)


def test_the_index_does_not_hold_an_entry_per_row(tmp_path: Path) -> None:
    frame([i // 5 for i in range(1000)]).to_parquet(tmp_path / "t.parquet", index=False)
    source = read(tmp_path / "t.parquet")._source  # pyright: ignore[reportPrivateUsage]
    assert isinstance(source, Parquet) and source.order is None
