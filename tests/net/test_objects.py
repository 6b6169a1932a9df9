"""Object stores: one behaviour of all kinds, and what is told of one that cannot be used."""

import secrets
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from stores import Faulty

from atoll.cli.doctor import _objects
from atoll.errors import InvalidArgument, RunError
from atoll.net import objects
from atoll.net.mirror import Mirror, read
from atoll.net.objects import Store, environment, probe, shown, store
from atoll.net.shelves import Shelves, settled
from atoll.net.storage import Disk, state_of, write_durably

KINDS = ["folder", "memory", pytest.param("s3", marks=pytest.mark.slow)]


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    match request.param:
        case "folder":
            return f"file://{tmp_path}/a store"
        case "memory":
            return f"memory://{secrets.token_hex(8)}"
        case _:
            return request.getfixturevalue("bucket")


every = pytest.mark.parametrize("url", KINDS, indirect=True)


@every
def test_what_is_put_is_there_until_it_is_deleted(url: str) -> None:
    made = store(url)
    assert made.names() == {}
    made.put("a/b-1", b"content")
    made.put("a/empty", b"")
    made.put("c", memoryview(bytes(range(256)) * 5000))
    assert made.names() == {"a/b-1": 7, "a/empty": 0, "c": 1_280_000}
    made.put("a/b-1", b"content")
    again = store(url)
    assert again.get("a/b-1", 100) == b"content" and again.get("a/b-1", 3) == b"con"
    assert again.get("c", 2**27) == bytes(range(256)) * 5000
    for name in ("no", "a/no"):
        with pytest.raises(FileNotFoundError):
            again.get(name, 10)
    again.delete(["a/b-1", "a/no"])
    again.delete(["a/b-1"])
    assert made.names() == again.names() == {"a/empty": 0, "c": 1_280_000}
    probe(made, url)
    made.delete(["c", "a/empty"])
    assert store(url).names() == {}


@every
def test_a_runs_files_in_a_store_of_every_kind(url: str, tmp_path: Path) -> None:
    files = Mirror(Disk(tmp_path / "a"), store(url), part=1000)
    content = secrets.token_bytes(2500)
    write_durably(files, "spool/00000000/x", content)
    write_durably(files, "agreed", b"")
    anew = Mirror(Disk(tmp_path / "b"), store(url))
    assert anew.read("spool/00000000/x") == content and anew.size("agreed") == 0
    anew.remove("spool/00000000/x")
    assert sorted(read(store(url).names())) == ["agreed", "life"]


@every
def test_what_stays_of_a_run_that_is_over_comes_back(url: str, tmp_path: Path) -> None:
    shelves, here = Shelves(url, "f" * 64), tmp_path / "a"
    shelves.probe()
    shelves.begin("a run", here, "objects/abc", b"code")
    files = Mirror(Disk(here), store(shelves.url("a run")))
    for name in ("models/1", "spool/1/x", "result.json", "result.safetensors", "journal.sqlite"):
        write_durably(files, name, name.encode())
    assert not list(Path(here).rglob("*.part"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "journal.sqlite-wal").write_text("of another")
    shelves.settle("a run", tmp_path / "b")
    there = {p.relative_to(tmp_path / "b").as_posix() for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert there == {"objects/abc", "result.json", "result.safetensors", "journal.sqlite"}
    assert set(read(store(shelves.url("a run")).names())) == {*there}
    assert store(shelves.url("another run")).names() == {}
    shelves.sweep("a run", ())
    assert store(url).names() == {}


def test_where_the_objects_are_is_noted(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    here, other = (Shelves(f"file://{tmp_path}/{n}", "f" * 64) for n in ("a", "b"))
    settled(None, state)
    settled(here, state)
    state.put("charter", "r", b"{}")
    settled(here, state)
    for elsewhere in (None, other):
        with pytest.raises(RunError, match=r"objects are in file:///.*/a: name it with --objects"):
            settled(elsewhere, state)
    state.put("final", "r", b"{}")
    settled(None, state)
    state.put("charter", "s", b"{}")
    with pytest.raises(RunError, match="objects are in the server's folder alone"):
        settled(here, state)
    state.close()


@pytest.mark.parametrize(
    "given",
    [
        "bucket/prefix",
        "s3://",
        "file://",
        "s3://who:secret@bucket/x",
        "s3://bucket/x?key=secret",
        "s3:bucket",
        "//[secret",
    ],
)
def test_what_is_no_address_of_a_store_is_refused_and_not_repeated(given: str) -> None:
    with pytest.raises(InvalidArgument, match="s3://BUCKET/PREFIX or file:///PATH") as refusal:
        store(given)
    assert "secret" not in str(refusal.value)


def test_a_path_must_be_whole_and_a_scheme_known() -> None:
    with pytest.raises(InvalidArgument, match="with the whole path"):
        store("file://relative/path")
    with pytest.raises((RunError, OSError), match="nosuch"):
        store("nosuch://bucket/prefix")
    assert shown("s3://bucket/prefix/") == "s3://bucket/prefix"


@pytest.mark.parametrize("cannot", ["put", "get", "delete"])
def test_a_probe_says_what_cannot_be_done(cannot: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = Faulty(0)

    def refused(*words: object) -> None:
        raise OSError(28, "the object store x: it is full")

    monkeypatch.setattr(made, cannot, refused)
    done = {"put": "written", "get": "read", "delete": "deleted"}[cannot]
    with pytest.raises(OSError, match=f"objects cannot be {done}: the object store x: it is full"):
        probe(made, "x")
    assert not made.there or cannot == "delete"


def test_doctor_looks_at_the_store(tmp_path: Path) -> None:
    assert _objects(f"file://{tmp_path}/x") == (
        True,
        "objects",
        f"file://{tmp_path}/x can be written, read and deleted from",
    )
    (tmp_path / "file").write_text("no folder")
    fine, _, found = _objects(f"file://{tmp_path}/file/x")
    assert not fine and "Not a directory" in found
    assert _objects("s3:no")[0] is False


def test_a_process_of_a_run_is_told_how_the_store_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "x")
    monkeypatch.setenv("SOMETHING_ELSE", "y")
    assert environment()["AWS_PROFILE"] == "x" and "SOMETHING_ELSE" not in environment()


@pytest.mark.parametrize(
    "said",
    [
        "x" * 270 + f" https://user:a-secret-{'y' * 40}@host/",
        "cannot reach https://user:with@a-secret@host/x",
        "https://host/x?sv=1&sig=a-secret refuses",
    ],
)
def test_an_error_tells_no_credentials(said: str) -> None:
    with pytest.raises(OSError, match="the object store s3://bucket: ") as refusal, objects.refusals("s3://bucket"):
        raise ValueError(said)
    assert "a-sec" not in str(refusal.value)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], None]]:
    """Something that answers every request of S3 with one error; or, with 0, never."""
    told, over = [500, ""], threading.Event()

    class Refusing(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            if not told[0]:
                over.wait(60.0)
                return
            body = f"<Error><Code>{told[1]}</Code><Message>{told[1]} it is</Message></Error>".encode()
            self.send_response(int(told[0]))
            self.send_header("content-length", str(len(body)))
            self.send_header("connection", "close")
            self.end_headers()
            self.wfile.write(body)

        do_PUT = do_GET = do_HEAD = do_DELETE = do_POST = _answer

        def log_message(self, *words: object) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{served.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield lambda status, code: told.__setitem__(slice(None), [status, code])
    over.set()
    served.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (507, "QuotaExceeded"), (404, "NoSuchBucket"), (0, "never")]
)
def test_a_store_of_s3_that_refuses_is_told_of_in_a_sentence(
    refusing: Callable[[int, str], None], status: int, code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setattr(objects, "PATIENCE", 20.0 if status else 1.0)
    refusing(status, code)
    made: Store = store("s3://bucket/prefix")
    with pytest.raises(OSError, match="the object store s3://bucket/prefix: ") as refusal:
        made.put("x", b"content")
    assert "secret" not in str(refusal.value) and "\n" not in str(refusal.value)
    if status != 404:
        with pytest.raises(OSError, match="the object store s3://bucket/prefix: "):
            Mirror(Disk(tmp_path), made)
    fine, _, found = _objects("s3://bucket/prefix")
    assert not fine and found.startswith("objects cannot be written: the object store s3://bucket/prefix: ")
