"""Keys stay secret, and TLS reaches the one server whose key is known."""

import ssl
from pathlib import Path

import pytest

from atoll.errors import InvalidArgument, RunError
from atoll.net import keys

pytestmark = pytest.mark.usefixtures("unsynced")


def test_a_key_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    made = keys.key_at(tmp_path / "key", make=True)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    again = keys.key_at(tmp_path / "key")
    assert made.private_bytes_raw() == again.private_bytes_raw()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    keys.key_at(tmp_path / "key", make=True)
    (tmp_path / "key").chmod(mode)
    with pytest.raises(RunError, match="chmod 600"):
        keys.key_at(tmp_path / "key")


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    keys.write_secret(tmp_path / "key", content)
    with pytest.raises(RunError, match="backup"):
        keys.key_at(tmp_path / "key")


def test_a_missing_key_is_not_made_by_accident(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not there"):
        keys.key_at(tmp_path / "key")
    assert not (tmp_path / "key").exists()


def test_a_second_certificate_beside_the_known_one_is_not_trusted(tmp_path: Path) -> None:
    """Whoever stands between may add its own to the one that fits the fingerprint."""
    first, second = (keys.authority(keys.key_at(tmp_path / n, make=True)) for n in "ab")
    assert len(keys.client_context(first + second).get_ca_certs()) == 1


def test_a_key_is_made_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("os.fsync", full)
        with pytest.raises(OSError, match="space"):
            keys.key_at(tmp_path / "key", make=True)
    assert not (tmp_path / "key").exists()
    made = keys.key_at(tmp_path / "key", make=True)
    assert [p.name for p in tmp_path.iterdir()] == ["key"]
    with pytest.raises(FileExistsError):
        keys.write_secret(tmp_path / "key", b"")
    assert keys.key_at(tmp_path / "key").private_bytes_raw() == made.private_bytes_raw()


def test_public_keys_have_one_form(tmp_path: Path) -> None:
    key = keys.key_at(tmp_path / "key", make=True).public_key()
    text = keys.public_text(key)
    assert keys.public_key(text).public_bytes_raw() == key.public_bytes_raw() and len(text) == 43
    for wrong in ("", text[:-1], text + "=", text + "A", "é" * 43, text[:-1] + "!"):
        with pytest.raises(InvalidArgument):
            keys.public_key(wrong)


def test_the_authority_has_the_servers_key_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    key = keys.key_at(tmp_path / "key", make=True)
    pem = keys.authority(key)
    assert keys.fingerprint(keys.authority_key(pem)) == keys.fingerprint(key.public_key())
    other = keys.authority(keys.key_at(tmp_path / "other", make=True))
    for wrong in (b"", b"x", pem[:-40], pem.replace(b"A", b"B", 3), pem + other, b"x\n" + pem):
        with pytest.raises(InvalidArgument):
            keys.authority_key(wrong)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> str | None:
    """The version of TLS two contexts agree on, without a socket."""
    a, b = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(a, b, server_hostname="anything.example")
    theirs = server.wrap_bio(b, a, server_side=True)
    done = [False, False]
    for _ in range(10):
        for place, side in enumerate((ours, theirs)):
            if not done[place]:
                try:
                    side.do_handshake()
                    done[place] = True
                except ssl.SSLWantReadError:
                    pass
    return ours.version() if all(done) else None


def test_tls_reaches_the_server_whose_authority_is_known(tmp_path: Path) -> None:
    key = keys.key_at(tmp_path / "key", make=True)
    server = keys.server_context(key, tmp_path)
    assert handshake(server, keys.client_context(keys.authority(key))) == "TLSv1.3"
    assert (tmp_path / "port.pem").stat().st_mode & 0o777 == 0o600
    # The port's key is new at every start, the authority's is not.
    assert handshake(keys.server_context(key, tmp_path), keys.client_context(keys.authority(key))) == "TLSv1.3"


def test_tls_reaches_no_other_server_and_no_older_tls(tmp_path: Path) -> None:
    mine, other = (keys.key_at(tmp_path / n, make=True) for n in ("mine", "other"))
    server = keys.server_context(other, tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, keys.client_context(keys.authority(mine)))
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        handshake(server, old)
