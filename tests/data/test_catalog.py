"""The catalog: official counts, known traps, and files that are not what they claim."""

import gzip
import hashlib
import os
import struct
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch

from atoll import datasets
from atoll.data import frames
from atoll.data.catalog import mnist as mnist_function
from atoll.data.catalog.fetching import locate
from atoll.data.catalog.mnist import CHECKSUMS, decode_idx
from atoll.data.catalog.signs import decode_ppm
from atoll.data.catalog.spoken import mel_bank
from atoll.errors import DataError, InvalidArgument

# --- cards -----------------------------------------------------------------------------------------------------------


def test_every_name_has_a_card_and_a_loader() -> None:
    own = {"heart_disease", "lending_club", "breast_cancer", "digits", "mnist"}
    assert set(datasets.names()) == own | {"smartwatch", "spoken_digits", "movielens", "traffic_signs"}
    for name in datasets.names():
        card = datasets.card(name)
        assert card.name == name and callable(getattr(datasets, name))
        assert all((card.title, card.source, card.licence, card.clients, card.target, card.traps, card.examples))
    with pytest.raises(InvalidArgument, match="Did you mean 'mnist'"):
        datasets.card("mnits")


def test_the_attribution_names_both_licences() -> None:
    text = files("atoll.data.catalog").joinpath("files", "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "CC BY 4.0" in text and "Janosi" in text and "modeldata authors" in text and "MIT" in text
    assert "smartwatch_exercises.npz" in text and "David M. Burns" in text and "BSD 3-Clause" in text


# --- heart disease --------------------------------------------------------------------------------------------------


def test_heart_disease_has_the_official_counts() -> None:
    frame = datasets.heart_disease_frame()
    assert frame["hospital"].value_counts().to_dict() == {
        "Cleveland": 303,
        "Hungary": 294,
        "VA Long Beach": 200,
        "Switzerland": 123,
    }
    sick = frame.groupby("hospital")["disease"].sum().to_dict()
    assert sick == {"Cleveland": 139, "Hungary": 106, "Switzerland": 115, "VA Long Beach": 149}
    assert len(frame.columns) == 15 and "id" not in frame.columns and "num" not in frame.columns


def test_heart_disease_zeros_are_missing() -> None:
    frame = datasets.heart_disease_frame()
    absent = frame["chol"].isna().groupby(frame["hospital"]).sum()
    kept = datasets.heart_disease_frame(zeros=True)
    before = kept["chol"].isna().groupby(kept["hospital"]).sum()
    assert absent["Switzerland"] == 123 and (absent - before)["VA Long Beach"] == 49
    assert (frame["chol"].dropna() > 0).all() and (frame["trestbps"].dropna() > 0).all()


def test_heart_disease_without_missing_values_has_the_published_sizes() -> None:
    frame = datasets.heart_disease_frame(zeros=True).drop(columns=["slope", "ca", "thal"]).dropna()
    assert frame["hospital"].value_counts().to_dict() == {
        "Cleveland": 303,
        "Hungary": 261,
        "VA Long Beach": 130,
        "Switzerland": 46,
    }


def test_heart_disease() -> None:
    data = datasets.heart_disease()
    assert tuple(data.clients) == ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")
    assert data.test is not None and data.test.sizes.tolist() == [103, 100, 42, 68]
    assert (data.train.sizes + data.test.sizes).tolist() == [303, 294, 123, 200]
    for name in data:
        assert set(data[name].test["y"].tolist()) == {0, 1}
    assert data.features == datasets.heart_disease(seed=5, test=0.2).features
    assert data.train.fields["x"].shape[1] == len(data.features)
    small = datasets.heart_disease(drop=["slope", "ca", "thal"], validation=0.1)
    assert not any(feature.startswith(("ca", "thal ", "slope")) for feature in small.features)
    assert small.validation is not None and data.fingerprint() == datasets.heart_disease().fingerprint()


@pytest.mark.parametrize("seed", range(4))
def test_declared_categories_cover_every_cut(seed: int) -> None:
    assert datasets.heart_disease(seed=seed, test=0.5, stratify=False).features == datasets.heart_disease().features
    assert len(datasets.lending_club(seed=seed, test=0.5).features) == 17 + 2 + 35 + 3 + 12


# --- lending club ---------------------------------------------------------------------------------------------------


def test_lending_club() -> None:
    data = datasets.lending_club()
    assert len(data) == 50 and data.test is not None and data.preprocessing.classes == ("good", "bad")
    assert len(data.train) + len(data.test) == 9857
    assert int(data.train.fields["y"].sum() + data.test.fields["y"].sum()) == 517
    sizes = (data.train.sizes + data.test.sizes).numpy()
    assert int((sizes >= 100).sum()) == 29 and sizes.min() == 16 and sizes.max() == 1324
    assert not any("addr_state" in feature for feature in data.features)


def test_states_too_small_for_a_test_keep_their_loans() -> None:
    data = datasets.lending_club(test=0.02)
    assert data["VT"].test is not None and len(data["VT"].test["y"]) == 0 and len(data["VT"].train["y"]) == 16


# --- scikit-learn ---------------------------------------------------------------------------------------------------


def test_breast_cancer() -> None:
    data = datasets.breast_cancer()
    assert len(data) == 5 and data.test is not None and data.train.fields["x"].shape[1] == 30
    assert len(data.train) + len(data.test) == 569
    assert int(data.train.fields["y"].sum() + data.test.fields["y"].sum()) == 212
    x = data.train.fields["x"].double()
    assert float(x.mean(dim=0).abs().max()) < 1e-5 and float((x.std(dim=0, unbiased=False) - 1).abs().max()) < 1e-5
    skewed = datasets.breast_cancer(3, partition="dirichlet", alpha=0.5, seed=1)
    assert len(skewed) == 3


def test_digits() -> None:
    data = datasets.digits(8, alpha=0.3)
    assert len(data) == 8 and data.test is not None and len(data.train) + len(data.test) == 1797
    x = data.train.fields["x"]
    assert x.dtype == torch.float32 and float(x.min()) == 0.0 and float(x.max()) == 1.0 and x.shape[1:] == (64,)
    assert datasets.digits(4, partition="iid", flat=False).train.fields["x"].shape[1:] == (1, 8, 8)
    assert (
        int((datasets.digits(10, partition="shards", per_client=2, test=None).class_counts()[1] > 0).sum(1).max()) <= 4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "dirichlets"}, "Did you mean 'dirichlet'"),
        ({"partition": "by_group"}, "unknown"),
        ({"partition": "iid", "alpha": 0.3}, "takes no further arguments"),
        ({"partition": "by_label"}, "given with labels="),
        ({"beta": 1}, "which takes alpha, min_size"),
    ],
)
def test_partitions_by_name_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        datasets.digits(**options)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(frames, "import_module", absent)
    with pytest.raises(DataError, match=r'scikit-learn.*pip install "atoll\[datasets\]"'):
        datasets.digits()


# --- mnist ----------------------------------------------------------------------------------------------------------


def idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(struct.pack(">I", size) for size in values.shape)
    return gzip.compress(header + values.astype(np.uint8).tobytes())


def test_decode_idx() -> None:
    values = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    assert np.array_equal(decode_idx(idx(values), "f"), values)
    whole = gzip.decompress(idx(values))
    for damaged, message in [
        (b"plain", "not a whole gzip"),
        (idx(values)[:-9], "not a whole gzip"),
        (gzip.compress(b""), "begins with nothing"),
        (gzip.compress(b"\0\0\x0d\3" + whole[4:]), "begins with 00000d03"),
        (gzip.compress(whole[:9]), "cut short"),
        (gzip.compress(whole[:-1]), "2 x 3 x 4 = 24 bytes, the file holds 23"),
        (gzip.compress(whole + b"x"), "holds 25"),
    ]:
        with pytest.raises(DataError, match=message):
            decode_idx(damaged, "f")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "mirror"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


def sums(**contents: bytes) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def test_a_download_is_checked_and_kept(
    tmp_path: Path, mirror: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = mirror
    monkeypatch.delenv("ATOLL_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path / "cache")
    (folder / "a").write_bytes(b"one")
    assert locate("mnist", sums(a=b"one"), url) == {"a": b"one"}
    (folder / "a").unlink()
    assert locate("mnist", sums(a=b"one"), url) == {"a": b"one"}
    (folder / "b").write_bytes(b"tampered")
    with pytest.raises(DataError, match="b is not at hand"):
        locate("mnist", sums(b=b"two"), url)


def test_no_network_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_DATA", str(tmp_path))
    monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path / "cache")
    with pytest.raises(DataError, match=r"does not hold all of it.*cannot be downloaded.*set ATOLL_DATA"):
        locate("mnist", CHECKSUMS, "http://127.0.0.1:9/")


@pytest.mark.parametrize("inner", ["", "mnist"])
def test_a_folder_is_read_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str) -> None:
    monkeypatch.setenv("ATOLL_DATA", str(tmp_path))
    (tmp_path / inner).mkdir(exist_ok=True)
    (tmp_path / inner / "a").write_bytes(b"one")
    assert locate("mnist", sums(a=b"one"), "http://127.0.0.1:9/") == {"a": b"one"}
    with pytest.raises(DataError, match=r"not the canonical file of mnist.*Fashion-MNIST"):
        locate("mnist", sums(a=b"two"), "http://127.0.0.1:9/", twin="Fashion-MNIST")


def small_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    rng = np.random.default_rng(0)
    contents = [
        idx(np.concatenate([np.full((1, 28, 28), 255), rng.integers(0, 256, (199, 28, 28))])),
        idx(np.arange(200) % 10),
        idx(rng.integers(0, 256, (20, 28, 28))),
        idx(np.arange(20) % 10),
    ]
    module = sys.modules[mnist_function.__module__]
    monkeypatch.setattr(module, "locate", lambda *_, **__: dict(zip(CHECKSUMS, contents, strict=True)))


def test_mnist_is_scaled_and_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    small_mnist(monkeypatch)
    data = datasets.mnist(10, partition="shards", validation=0.1)
    x = data.train.fields["x"]
    assert x.dtype == torch.float32 and x.shape[1:] == (1, 28, 28) and float(x.max()) == 1.0 and float(x.min()) == 0.0
    assert data.holdout is not None and data.holdout["x"].shape == (20, 1, 28, 28)
    assert data.validation is not None and len(data.train) + len(data.validation) == 200 and data.test is None
    assert datasets.mnist(5, flat=True).train.fields["x"].shape == (200, 784)
    assert datasets.mnist(5, partition="dirichlet", alpha=1.0).name == "mnist"


@pytest.mark.skipif(
    not any(
        (Path(os.environ.get("ATOLL_DATA", "/")) / part / name).is_file()
        for part in ("", "mnist")
        for name in CHECKSUMS
    ),
    reason="ATOLL_DATA does not hold the MNIST files",
)
def test_the_official_mnist() -> None:
    data = datasets.mnist(100, partition="shards")
    assert set(data.train.sizes.tolist()) == {600} and data.holdout is not None and len(data.holdout["y"]) == 10_000
    assert torch.bincount(data.train.fields["y"]).tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert abs(float(data.train.fields["x"].mean(dtype=torch.float64)) - 0.1306604) < 1e-6


# --- what people and vehicles recorded --------------------------------------------------------------------------------


def at_hand(name: str) -> None:
    """Skip where a data set that cannot be fetched is not here."""
    try:
        getattr(datasets, name)()
    except DataError as error:
        pytest.skip(str(error))


def test_smartwatch_windows_share_no_sample_with_the_test() -> None:
    data = datasets.smartwatch(window=64, step=64, seed=3)
    assert data.clients == tuple(f"wearer-{i:02d}" for i in range(1, 11))
    assert data.test is not None
    rows = [
        {row.tobytes() for row in split.fields["x"].numpy().transpose(0, 2, 1).reshape(-1, 6)}
        for split in (data.train, data.test)
    ]
    assert not rows[0] & rows[1]
    assert set(data.train.fields["y"].tolist()) == set(data.test.fields["y"].tolist()) == set(range(7))
    for client in data.clients:
        assert len(set(data[client].train["y"].tolist())) == 7, "every wearer did every exercise"
    assert (
        datasets.smartwatch().train.sizes.sum() + len(datasets.smartwatch().test)
        == datasets.card("smartwatch").examples
    )


def test_smartwatch_windows_for_validation_share_no_sample_with_training() -> None:
    data = datasets.smartwatch(window=64, step=16, seed=3).split(test=0.0, validation=0.2, seed=1)
    assert data.test is not None and data.validation is not None
    samples = [
        {row.tobytes() for row in split.fields["x"].numpy().transpose(0, 2, 1).reshape(-1, 6)}
        for split in (data.train, data.validation, data.test)
    ]
    assert not samples[0] & samples[1] and not samples[1] & samples[2] and not samples[0] & samples[2]
    assert bool((data.validation.sizes > 0).all()), "every wearer has some"
    assert 0.1 < len(data.validation) / (len(data.train) + len(data.validation)) < 0.3


def test_smartwatch_windows_lie_one_step_apart() -> None:
    one, two = datasets.smartwatch(window=50, step=25), datasets.smartwatch(window=50, step=25, seed=1)
    x = one["wearer-01"].train["x"]
    assert torch.equal(x[0, :, 25:], x[1, :, :25])
    assert one.fingerprint() != two.fingerprint(), "the seed moves the test"
    assert one.fingerprint() == datasets.smartwatch(window=50, step=25).fingerprint()


@pytest.mark.parametrize(
    ("options", "names"),
    [({"window": 0}, "window"), ({"window": 10**6}, "window"), ({"step": 0}, "step"), ({"test": 0.9}, "test")],
)
def test_smartwatch_refuses(options: dict[str, object], names: str) -> None:
    with pytest.raises(InvalidArgument, match=names):
        datasets.smartwatch(**options)


def test_mel_bands_are_triangles_that_meet() -> None:
    bank = mel_bank(20)
    assert bank.shape == (20, 129) and bool((bank >= 0).all()) and float(bank.max()) <= 1
    peaks = bank.argmax(dim=1).tolist()
    assert peaks == sorted(set(peaks)), "higher bands are higher"
    inner = bank.sum(dim=0)[peaks[0] + 1 : peaks[-1]]
    assert torch.allclose(inner, torch.ones_like(inner), atol=1e-5), "what one loses the next gains"


def test_spoken_digits() -> None:
    at_hand("spoken_digits")
    data = datasets.spoken_digits(mels=16)
    assert data.clients == ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
    assert data.test is not None
    assert data.train.sizes.tolist() == [400] * 6 and data.test.sizes.tolist() == [100] * 6
    x = data.train.fields["x"]
    assert x.shape == (2400, 1, 16, 63)
    assert float(x.mean(dim=(1, 2, 3)).abs().max()) < 1e-4
    assert torch.bincount(data["theo"].test["y"]).tolist() == [10] * 10


def test_movielens() -> None:
    at_hand("movielens")
    data = datasets.movielens()
    assert data.test is not None
    assert len(data.clients) == 943 and len(data.train) + len(data.test) == 100_000
    seen = set(zip(data["7"].train["x"][:, 0].tolist(), data["7"].train["y"].tolist(), strict=True))
    assert not {film for film, _ in seen} & set(data["7"].test["x"][:, 0].tolist()), "a film is rated once"
    assert data.train.fields["x"].min() == 0 and data.train.fields["x"].max() <= 1681
    assert set(data.train.fields["y"].tolist()) == {1.0, 2.0, 3.0, 4.0, 5.0}


def test_movielens_that_is_not_at_hand_or_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_DATA", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"grouplens.*recbole"):
        datasets.movielens()
    for text in ("1\t1\t5\t0\n2\t3\t4\t0\n", "", "1\t2\n", "a\tb\tc\n1\tx\t3\n", "a\tb\tc\n"):
        (tmp_path / "u.data").write_text(text)
        with pytest.raises(DataError, match="does not hold the 100,000 ratings"):
            datasets.movielens()


def test_traffic_signs() -> None:
    at_hand("traffic_signs")
    data = datasets.traffic_signs(12, seed=2)
    assert data.test is not None and data.holdout is not None
    assert len(data.clients) == 12 and len(data.holdout["y"]) == 4210
    assert len(data.train) + len(data.test) + 4210 == datasets.card("traffic_signs").examples
    pictures = [{p.numpy().tobytes() for p in split.fields["x"]} for split in (data.train, data.test)]
    assert not pictures[0] & pictures[1]
    cut = data.split(test=0.0, validation=0.25)
    assert cut.validation is not None and bool((cut.validation.sizes > 0).all())
    tracks = [set(split.fields["cut_group"].tolist()) for split in (cut.train, cut.validation, data.test)]
    assert not tracks[0] & tracks[1] and not tracks[1] & tracks[2] and not tracks[0] & tracks[2]
    assert len(data.train.fields["cut_group"].unique()) == len(tracks[0]) + len(tracks[1])
    for track in list(tracks[1])[:20]:
        kinds = cut.validation.fields["y"][cut.validation.fields["cut_group"] == track]
        assert len(kinds.unique()) == 1, "one sign has one kind"
    assert float(data.train.fields["x"].max()) == 1.0 and data.train.fields["x"].shape[1:] == (3, 32, 32)


def test_pictures_of_another_kind_are_refused() -> None:
    whole = b"P6\n# a comment\n32 32\n255\n" + bytes(range(256)) * 12
    assert decode_ppm(whole, "a")[:, 0, 0].tolist() == [0, 1, 2]
    for broken in (whole[:-1], whole + b"0", whole.replace(b"32 32", b"31 32"), b"P5" + whole[2:]):
        with pytest.raises(DataError, match="a is not a PPM picture"):
            decode_ppm(broken, "a")


def test_what_cannot_be_fetched_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"free-spoken-digit-dataset\.zip is not at hand.*doi\.org"):
        datasets.spoken_digits()
