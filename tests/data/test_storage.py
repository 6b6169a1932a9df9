"""Data on disk: the same data come back, mapped; damage and changes are found."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import atoll
from atoll.data import FederatedDataset, Split
from atoll.data.names import Numbered, PackedNames
from atoll.errors import DataError, InvalidArgument


def example(clients: object = None, **options: object) -> FederatedDataset:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([3, 1, 5, 2])
    n = int(sizes.sum())
    fields = {
        "x": torch.randn(n, 2, 3, generator=generator),
        "y": torch.arange(n) % 3,
        "half": torch.randn(n, generator=generator).bfloat16(),
        "seen": torch.arange(n) % 2 == 0,
        "pixels": torch.arange(n, dtype=torch.uint8),
        "double": torch.randn(n, 1, generator=generator, dtype=torch.float64),
    }
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return FederatedDataset.from_packed(fields, offsets, clients, **options)  # type: ignore[arg-type]


def same(a: FederatedDataset, b: FederatedDataset) -> None:
    assert (a.name, a.features, tuple(a.clients)) == (b.name, b.features, tuple(b.clients))
    for label in ("train", "validation", "test"):
        mine, other = getattr(a, label), getattr(b, label)
        assert (mine is None) == (other is None)
        if mine is not None:
            assert torch.equal(mine.offsets, other.offsets) and list(mine.fields) == list(other.fields)
            for name, tensor in mine.fields.items():
                assert tensor.dtype == other.fields[name].dtype and torch.equal(tensor, other.fields[name])
    assert (a.holdout is None) == (b.holdout is None)
    if a.holdout is not None and b.holdout is not None:
        assert all(torch.equal(tensor, b.holdout[name]) for name, tensor in a.holdout.items())


@pytest.mark.parametrize("clients", [None, ("ä", "b", "c d", "e")])
@pytest.mark.parametrize("cut", [{}, {"test": 0.4}, {"test": 0.4, "validation": 0.2}])
def test_what_is_saved_is_opened(tmp_path: Path, clients: object, cut: dict[str, float]) -> None:
    whole = example()
    holdout = {name: tensor[:2] for name, tensor in whole.train.fields.items()}
    data = example(clients, name="all dtypes", features=("a", "b"), holdout=holdout, **cut)
    data.save(tmp_path / "data")
    opened = FederatedDataset.open(str(tmp_path / "data"))
    same(data, opened)
    assert isinstance(opened.clients, Numbered) == (clients is None)
    assert opened.fingerprint() == data.fingerprint()
    opened.verify()
    data.verify()
    assert opened.directory == tmp_path / "data" and data.directory is None and opened.pooled().directory is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"], "nothing is left over"


def test_many_names_stay_packed(tmp_path: Path) -> None:
    names = [f"client-{i * 7 % 20_011}" for i in range(20_000)]
    n = len(names)
    fields = {"x": torch.zeros(n, 1), "y": torch.zeros(n, dtype=torch.int64)}
    data = FederatedDataset.from_packed(fields, torch.arange(n + 1), names)
    data.save(tmp_path / "data")
    opened = FederatedDataset.open(tmp_path / "data")
    assert isinstance(opened.clients, PackedNames) and opened.clients == names
    assert opened.index(names[777]) == 777 and opened.places(names[5:8]).tolist() == [5, 6, 7]
    assert opened.select(names[3:1:-1]).clients == (names[3], names[2])
    opened.verify()


def test_a_table_keeps_its_preprocessing(tmp_path: Path) -> None:
    data = atoll.datasets.heart_disease()
    data.save(tmp_path / "heart")
    opened = FederatedDataset.open(tmp_path / "heart")
    same(data, opened)
    assert opened.preprocessing == data.preprocessing and opened.preprocessing is not data.preprocessing


def test_tensors_are_mapped_and_what_is_written_to_them_stays_here(tmp_path: Path) -> None:
    data = example()
    data.save(tmp_path / "data")
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    opened = FederatedDataset.open(tmp_path / "data")
    if os.path.exists("/proc/self/maps"):
        assert str(tmp_path / "data" / "train.0.bin") in Path("/proc/self/maps").read_text()
    opened.train.fields["x"].zero_()
    with pytest.raises(DataError, match="wrote to the tensors"):
        opened.verify()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    opened.check_unchanged()
    FederatedDataset.open(tmp_path / "data").verify()


def test_a_directory_that_holds_something_is_refused(tmp_path: Path) -> None:
    data = example()
    (tmp_path / "empty").mkdir()
    data.save(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for place in ("empty", "file"):
        with pytest.raises(InvalidArgument, match=r"directory=.*does not exist or is empty"):
            data.save(tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_cannot_be_stored_leaves_nothing_behind(tmp_path: Path) -> None:
    data = example()
    bad = FederatedDataset(data.clients, data.train, preprocessing=object())
    with pytest.raises(InvalidArgument, match="preprocessing='object'"):
        bad.save(tmp_path / "data")
    hollow = Split({"x": torch.zeros(1, 0), "y": torch.zeros(1)}, torch.tensor([0, 1]))
    with pytest.raises(DataError, match=r"'x'.*no values"):
        FederatedDataset(["a"], hollow).save(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_is_not_computed_again(tmp_path: Path) -> None:
    data = example(("a", "b", "c", "d"))
    data.save(tmp_path / "data")
    header = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert header["fingerprint"] == data.fingerprint()
    header["fingerprint"] = "stored"
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(header))
    opened = FederatedDataset.open(tmp_path / "data")
    assert opened.fingerprint() == "stored"
    with pytest.raises(DataError, match="header was changed"):
        opened.verify()


def test_fingerprints_are_those_of_version_0_1() -> None:
    # Runs are resumed by it. Computed with the code before names were hashed in batches.
    data = FederatedDataset.from_packed({"x": torch.arange(6.0).reshape(3, 2), "y": torch.tensor([0, 1, 1])}, [0, 1, 3])
    assert data.fingerprint() == "d336a80dd7fe94191549fcfa05bce5b73785438a7a3c94cd81118455920b1acd"
    named = FederatedDataset.from_packed(data.train.fields, [0, 1, 3], ["Zürich", "b"], test=0.5)
    assert named.fingerprint() == "1ce5246ff08ac601ff9791c35b7bd1c8db48f93eb7195e666fe6fac8fe222a9c"


# --- damage ---------------------------------------------------------------------------------------------------------


def flip(path: Path, place: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_verify_names_the_damaged_file(tmp_path: Path) -> None:
    example(("a", "b", "c", "d")).save(tmp_path / "data")
    for name in ("train.1.bin", "names.bin"):
        copy = tmp_path / name
        shutil.copytree(tmp_path / "data", copy)
        flip(copy / name)
        with pytest.raises(DataError, match=rf"{name}.*not those that were saved"):
            FederatedDataset.open(copy).verify()


@pytest.mark.parametrize("name", ["train.0.bin", "train.offsets.bin", "names.bin"])
@pytest.mark.parametrize("how", ["cut", "longer", "gone"])
def test_files_of_another_size_are_refused(tmp_path: Path, name: str, how: str) -> None:
    example(("a", "b", "c", "d")).save(tmp_path / "data")
    path = tmp_path / "data" / name
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if how == "cut" else path.read_bytes() + b"x")
    with pytest.raises(DataError, match=name):
        FederatedDataset.open(tmp_path / "data")


def change(header: dict[str, object], path: str, value: object) -> None:
    *parents, last = path.split("/")
    for key in parents:
        header = header[int(key) if key.isdigit() else key]  # type: ignore[index,assignment]
    if value is None:
        del header[last]
    else:
        header[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "other", "does not describe an Atoll dataset"),
        ("version", 2, "version 2"),
        ("clients", 5, "5 clients"),
        ("clients", "4", "no clients"),
        ("names", None, "no names"),
        ("fingerprint", 3, "no fingerprint"),
        ("splits", [], "no splits"),
        ("splits/train", None, "splits"),
        ("splits/train/0/dtype", "object", "fields of train"),
        ("splits/train/0/shape", [-2, -3], "fields of train"),
        ("splits/train/0/shape", [7, 1 << 40], "rows of"),
        ("splits/train/1/dtype", "int32", "dataset.json.*y has 22"),
        ("splits/train", [], "no fields"),
        ("splits/extra", [], "splits"),
        ("files/train.0.bin", None, "train.0.bin"),
        ("files/train.0.bin/blake2b", None, "train.0.bin"),
        ("files/train.0.bin/bytes", True, "train.0.bin"),
        ("features", "abc", "lacks features"),
        ("preprocessing", {"version": 99}, "version 99"),
        ("preprocessing", [1], "lacks features or preprocessing"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, path: str, value: object, message: str) -> None:
    example().save(tmp_path / "data")
    file = tmp_path / "data" / "dataset.json"
    header = json.loads(file.read_text())
    change(header, path, value)
    file.write_text(json.dumps(header))
    with pytest.raises(DataError, match=message):
        FederatedDataset.open(tmp_path / "data")


def test_a_header_cannot_lead_out_of_its_directory(tmp_path: Path) -> None:
    example().save(tmp_path / "data")
    (tmp_path / "secret").write_bytes(b"12345678")
    file = tmp_path / "data" / "dataset.json"
    header = json.loads(file.read_text())
    header["files"]["../secret"] = {"bytes": 8, "blake2b": ""}
    file.write_text(json.dumps(header))
    with pytest.raises(DataError, match="outside the directory"):
        FederatedDataset.open(tmp_path / "data")


def test_offsets_are_checked(tmp_path: Path) -> None:
    example().save(tmp_path / "data")
    np.array([0, 3, 3, 9, 11], dtype=np.int64).tofile(tmp_path / "data" / "train.offsets.bin")
    with pytest.raises(DataError, match="without training examples"):
        FederatedDataset.open(tmp_path / "data")
    np.array([0, 4, 3, 9, 11], dtype=np.int64).tofile(tmp_path / "data" / "train.offsets.bin")
    with pytest.raises(DataError, match="never decreasing"):
        FederatedDataset.open(tmp_path / "data")


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_no_header(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="No dataset in"):
        FederatedDataset.open(tmp_path)
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=r"dataset.json"):
        FederatedDataset.open(tmp_path)


# --- changes under a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("write", "it was written to"),
        ("append", "its size from 264 to 265 bytes"),
        ("replace", "replaced by another file"),
        ("remove", "is gone"),
    ],
)
@pytest.mark.parametrize("derive", ["open", "pooled", "split", "select", "to"])
def test_a_file_that_changes_is_found(tmp_path: Path, how: str, message: str, derive: str) -> None:
    example().save(tmp_path / "data")
    data = FederatedDataset.open(tmp_path / "data")
    derived = {
        "open": lambda: data,
        "pooled": data.pooled,
        "split": lambda: data.split(test=0.2),
        "select": lambda: data.select(["1"]),
        "to": lambda: data.to("cpu"),
    }[derive]()
    derived.check_unchanged()
    path = tmp_path / "data" / "train.0.bin"
    if how == "write":
        with path.open("r+b") as file:
            file.write(b"x")
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif how == "append":
        path.write_bytes(path.read_bytes() + b"x")
    elif how == "replace":
        other = tmp_path / "other"
        other.write_bytes(path.read_bytes())
        os.replace(other, path)
    else:
        path.unlink()
    with pytest.raises(DataError, match=rf"train\.0\.bin'.*{message}.*begin a new run"):
        derived.check_unchanged()


def test_data_in_memory_never_change() -> None:
    data = example()
    data.check_unchanged()
    assert data.draw(["0"]) is data and data.sample() is data
    assert data.has("train") and not data.has("test")
    (pieces,) = data.chunks("train")
    assert pieces == (data.clients, data.train)
    with pytest.raises(InvalidArgument, match="split='test'"):
        next(data.chunks("test"))
