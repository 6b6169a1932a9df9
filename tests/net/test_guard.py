"""The port itself: TLS and nothing else, and nobody may dawdle."""

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from doors import House

from atoll.net import calls, keys, server
from atoll.net.client import Client, Unreachable
from atoll.net.home import Home, Identity, settle

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[House, int]]:
    monkeypatch.setattr(server, "STALL", 1.0)
    monkeypatch.setattr(server, "STRANGERS", 8)
    house = House(tmp_path)
    served = uvicorn.Server(server.configured(house.door, tmp_path / "server"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=served.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not served.started:
        time.sleep(0.01)
    yield house, listener.getsockname()[1]
    served.should_exit = True
    thread.join(20.0)
    assert not thread.is_alive()


def dialled(house: House, port: int) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", port), timeout=20.0)
    return keys.client_context(house.authority).wrap_socket(plain)


def closed(line: socket.socket) -> bool:
    """Whether the other side hangs up within the time of the socket."""
    try:
        return line.recv(1) == b""
    except (ConnectionError, ssl.SSLError):
        return True


def member(house: House, name: str, port: int) -> Client:
    home = house.homes[name]
    who = Identity(name, home.identity.role, f"127.0.0.1:{port}", house.fingerprint)
    return Client(settle(home.folder, who, house.authority))


def listed(client: Client) -> calls.Members:
    async def once() -> calls.Members:
        try:
            return await client.call(calls.ListMembers())
        finally:
            await client.close()

    return asyncio.run(once())


def test_members_are_served_over_pinned_tls_and_only_by_their_server(port: tuple[House, int], tmp_path: Path) -> None:
    house, number = port
    assert {m.name for m in listed(member(house, "admin", number)).members} == set(house.homes)
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    (tmp_path / "lost").mkdir()
    keys.key_at(tmp_path / "lost" / "key", make=True)
    print_ = keys.fingerprint(other.public_key())
    lost: Home = settle(
        tmp_path / "lost", Identity("admin", "admin", f"127.0.0.1:{number}", print_), keys.authority(other)
    )
    with pytest.raises(Unreachable, match="cannot be reached"):
        listed(Client(lost))


def test_what_is_not_tls_gets_nothing(port: tuple[House, int]) -> None:
    _, number = port
    with socket.create_connection(("127.0.0.1", number), timeout=20.0) as line:
        line.sendall(b"GET /v1/authority HTTP/1.1\r\nhost: x\r\n\r\n")
        got = line.recv(100)
        assert b"HTTP" not in got and b"CERTIFICATE" not in got


@pytest.mark.parametrize("start", [b"", b"GET /v1/auth", b"POST /v1/call HTTP/1.1\r\nhost: x\r\nx: "])
def test_headers_that_trickle_are_cut_off_and_others_are_served(port: tuple[House, int], start: bytes) -> None:
    house, number = port
    with dialled(house, number) as line:
        line.sendall(start)
        with contextlib.suppress(OSError):
            for _ in range(5):
                time.sleep(0.1)
                line.sendall(b"a" if start else b"")
        assert listed(member(house, "admin", number)).members
        assert closed(line)


def test_headers_that_do_not_end_are_refused(port: tuple[House, int]) -> None:
    house, number = port
    with dialled(house, number) as line:
        with contextlib.suppress(OSError):
            line.sendall(b"GET / HTTP/1.1\r\nx: " + b"y" * 2**18)
        with contextlib.suppress(OSError):
            assert b" 400 " in line.recv(100) or closed(line)


def test_strangers_have_few_connections(port: tuple[House, int]) -> None:
    house, number = port
    lines = [dialled(house, number) for _ in range(8)]
    with contextlib.suppress(OSError), dialled(house, number) as one_more:
        assert closed(one_more)
    for line in lines:
        assert closed(line), "they said nothing in time"
        line.close()
    assert listed(member(house, "admin", number)).members, "others can come again"


@pytest.mark.parametrize("noise", [b"\x00" * 1000, b"\r\n\r\n\r\n", b"\x80\x04.", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
def test_noise_is_refused(port: tuple[House, int], noise: bytes) -> None:
    house, number = port
    with dialled(house, number) as line:
        line.sendall(noise)
        with contextlib.suppress(OSError):
            got = line.recv(1000)
            assert got == b"" or b" 400 " in got or b" 404 " in got
    assert listed(member(house, "admin", number)).members
