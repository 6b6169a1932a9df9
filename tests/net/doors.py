"""A server's door without sockets, and parties who knock at it."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import httpx
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.net import calls, server, signing
from atoll.net.client import Client
from atoll.net.enrolment import Role
from atoll.net.home import Home, Identity, settle
from atoll.net.hub import Hub
from atoll.net.keys import authority_key, fingerprint, key_at, public_text
from atoll.net.server import Door

NAMES: dict[str, Role] = {"s": "site", "t": "site", "r": "researcher", "admin": "admin", "v": "viewer"}
ADDRESS = "server.example:8443"


class House:
    """A server with a member of every role."""

    def __init__(self, folder: Path, *, proxied: bool = False) -> None:
        self.folder = folder
        server.establish(folder / "server", ADDRESS)
        self.hub = Hub(folder / "server", self.fingerprint, ADDRESS, proxied=proxied)
        self.homes: dict[str, Home] = {"admin": Home(folder / "server" / "admin")}
        for name, role in NAMES.items():
            if name != "admin":
                (folder / name).mkdir()
                key = key_at(folder / name / "key", make=True)
                token = self.hub.roster.invite(name, role, hours=1, by="admin", now=0.0)
                self.hub.roster.enrol(name, public_text(key.public_key()), token, now=1.0)
                self.homes[name] = settle(
                    folder / name, Identity(name, role, ADDRESS, self.fingerprint), self.authority
                )
        self.door = Door(self.hub, folder / "server")

    @property
    def authority(self) -> bytes:
        return (self.folder / "server" / "authority.pem").read_bytes()

    @property
    def fingerprint(self) -> str:
        return fingerprint(authority_key(self.authority))

    def http(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.door.app)
        return httpx.AsyncClient(transport=transport, base_url=f"https://{ADDRESS}")

    def client(self, name: str) -> Client:
        client = Client(self.homes[name])
        client._http = self.http()
        return client

    def key(self, name: str) -> Ed25519PrivateKey:
        return self.homes[name].key

    async def send(
        self,
        name: str,
        body: bytes,
        *,
        path: str = "/v1/call",
        method: str = "POST",
        nonce: str = "",
        key: Ed25519PrivateKey | None = None,
        sent: "bytes | AsyncIterator[bytes] | None" = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """One signed request; `sent` is what really comes instead of the body that was signed."""
        async with self.http() as http:
            request = http.build_request(method, path, content=body)
            numbers = nonce or f"{self.door.fresh.epoch}.{next(LIVES)}.p.1"
            signing.sign_request(
                key or self.key(name), name, Plain(request), numbers, body if method != "GET" else None
            )
            if sent is not None:
                request = http.build_request(
                    method, path, content=sent, headers=dict(request.headers) | (headers or {})
                )
            return await http.send(request)


class Plain:
    def __init__(self, request: httpx.Request) -> None:
        self.method, self.url, self.headers = request.method, str(request.url), request.headers


def lives() -> Any:
    life = 10
    while True:
        yield (life := life + 1)


LIVES = lives()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def problem(answer: httpx.Response) -> calls.Problem:
    return msgspec.json.decode(answer.content, type=calls.Problem)
