"""What a site's owner sees is what would run."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.cli import owning
from atoll.errors import InvalidArgument
from atoll.net.calls import Charter
from atoll.net.keys import public_text
from atoll.net.peers import Peers
from atoll.net.policy import Approvals, experiment_hash
from atoll.net.storage import Disk

pytestmark = pytest.mark.usefixtures("unsynced")

HIDING = "\x1b\r\b\x0c\u202e\u200b\u2066"


def offered(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, **settings: str) -> str:
    """Put code before a site's owner; its hash."""
    monkeypatch.setattr(owning, "home_for", lambda *a, **k: SimpleNamespace(folder=folder))
    content = code.encode()
    charter = Charter("r", hashlib.sha256(content).hexdigest(), settings, by="someone\x1b[2J")
    Approvals(folder).ask(charter)
    (folder / "code").mkdir()
    (folder / "code" / f"{charter.code}.py").write_bytes(content)
    return experiment_hash(charter)


def test_code_cannot_hide_from_who_reviews_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = offered(tmp_path, monkeypatch, f"steal()  # {HIDING}\n\tx = 'é'\n", lr=f"1\n  code      {HIDING}")
    owning.review(None, home=None)
    owning.review(mark, home=None)
    owning.decide(mark, "approved", home=None)
    told = capsys.readouterr()
    for text in (told.out, told.err):
        assert not any(c in text for c in HIDING), "nothing reaches the screen that acts upon it"
    assert r"steal()  # \x1b\r\x08\x0c\u202e\u200b\u2066" in told.out and "é" in told.out
    assert "Careful" in told.err


def test_plain_code_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    owning.review(offered(tmp_path, monkeypatch, "x = 1\r\ny = '[b]'\r\n"), home=None)
    told = capsys.readouterr()
    assert "x = 1\ny = '[b]'\n" in told.out and "Careful" not in told.err


def test_code_that_cannot_be_read_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = offered(tmp_path, monkeypatch, "# coding: utf-7\n# +AAo-x()\n")
    with pytest.raises(InvalidArgument, match="utf-7"):
        owning.review(mark, home=None)


def test_the_keys_of_other_sites_are_shown_and_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(owning, "home_for", lambda *a, **k: SimpleNamespace(folder=tmp_path))
    owning.peers(None, None)
    assert "no secure sum yet" in capsys.readouterr().out
    keys = {name: public_text(Ed25519PrivateKey.generate().public_key()) for name in ("hospital-a", "hospital-b")}
    Peers(Disk(tmp_path)).pin(keys)
    owning.peers(None, None)
    fingerprints = {n: hashlib.sha256(k.encode()).hexdigest()[:32] for n, k in keys.items()}
    assert capsys.readouterr().out == "".join(f"{n}  {f}\n" for n, f in fingerprints.items())
    owning.peers("hospital-b", None)
    assert Peers(Disk(tmp_path)).keys == {"hospital-a": keys["hospital-a"]}
    with pytest.raises(InvalidArgument, match="hospital-a"):
        owning.peers("hospital-c", None)
