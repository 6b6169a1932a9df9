"""A run through a proxy that ends TLS: a recorder that is written here, and nginx as the documentation sets it up."""

import asyncio
import datetime
import ipaddress
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from processes import Place, place
from test_processes import SITES, approved, deployed, simulated

from atoll.net import enrolment

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
WINDOW = 16
"""Bytes that do not come together by chance."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def certified(folder: Path) -> tuple[Path, Path, Path]:
    """An authority, and a certificate and key for this machine that it signed."""
    now = datetime.datetime.now(datetime.UTC)

    def builder(name: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    authority, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = builder("A company", "A company", authority).add_extension(x509.BasicConstraints(True, None), True)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    leaf = builder("proxy", "A company", own).add_extension(x509.SubjectAlternativeName(names), False)
    paths = folder / "company.pem", folder / "proxy.crt", folder / "proxy.key"
    pem = serialization.Encoding.PEM
    paths[0].write_bytes(root.sign(authority, hashes.SHA256()).public_bytes(pem))
    paths[1].write_bytes(leaf.sign(authority, hashes.SHA256()).public_bytes(pem))
    paths[2].write_bytes(
        own.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )  # fmt: skip
    return paths


class Recorder:
    """Ends TLS, passes on what comes both ways, and keeps it.

    Args:
        context: of TLS to the outside.
        port: of the server behind.
    """

    def __init__(self, context: ssl.SSLContext, port: int) -> None:
        self._context, self._behind = context, port
        self.port, self.up, self.down = free_port(), bytearray(), bytearray()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray) -> None:
        try:
            while part := await reader.read(2**16):
                kept += part
                writer.write(part)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort() if writer.transport.get_extra_info("sslcontext") else writer.close()

    async def _come(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner, outer = await asyncio.open_connection("127.0.0.1", self._behind)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(self._pass(reader, outer, self.up), self._pass(inner, writer, self.down))

    async def _serve(self, began: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(self._come, "127.0.0.1", self.port, ssl=self._context):
            began.set()
            await self._stop.wait()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    @contextmanager
    def at_work(self) -> Iterator["Recorder"]:
        began = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._serve(began)), daemon=True)
        thread.start()
        assert began.wait(20.0)
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join(20.0)


class Sampler:
    """Keeps every version of files that come and go."""

    def __init__(self, folder: Path, *patterns: str) -> None:
        self.found: set[bytes] = set()
        self._folder, self._patterns, self._over = folder, patterns, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(0.002):
            for pattern in self._patterns:
                for path in self._folder.glob(pattern):
                    try:
                        self.found.add(path.read_bytes())
                    except OSError:
                        continue

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def served(found: Place, mode: str, outside: int, company: Path) -> None:
    """Start a server behind a proxy, and wait until it answers."""
    found.start(
        "server", "server", "--host", "127.0.0.1", "--port", found.port, "--proxy", mode, "--ca", company,
        "--address", f"localhost:{outside}",
    )  # fmt: skip
    found.until(lambda: "fingerprint" in found.log("server"), "the server starts")


def run_through(found: Place, company: Path) -> list[str]:
    """The newcomer's way through the proxy, to the model of a run without it; the invites."""
    words = found.atoll("invite", *SITES, "--quiet").split()
    for name, word in zip(SITES, words, strict=True):
        found.start(name, "join", word, "--data", f"{name}.csv", "--ca", company)
    for name in SITES:
        found.until(lambda name=name: "takes part" in found.log(name), f"{name} joins")
    found.atoll("submit", "app.py", "--engine", "loop", "--name", "heart", "--quiet")
    approved(found)
    told = found.atoll("watch", "heart")
    assert "round 3/3: 2 updates" in told and "finished" in told
    assert torch.equal(deployed(found, "heart"), simulated(found, 3)), "the very bits of a run without a proxy"
    return words


def seen_in(content: bytes, recording: bytes) -> bool:
    """Whether some bytes of a content went by."""
    return any(content[i : i + WINDOW] in recording for i in range(0, max(1, len(content) - WINDOW), 4))


@pytest.mark.slow
def test_a_run_through_a_proxy_that_records_all_has_the_same_bits_and_shows_none_of_them(tmp_path: Path) -> None:
    company, certificate, key = certified(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    files = ("atoll-*/runs/heart/reports/*", "atoll-server/runs/heart/spool/*/*", "atoll-server/runs/heart/task/*",
             "atoll-server/runs/heart/models/*")  # fmt: skip
    with place(tmp_path) as found, Recorder(context, found.port).at_work() as proxy, Sampler(tmp_path, *files) as kept:
        served(found, "plain", proxy.port, company)
        words = run_through(found, company)
        assert "by a proxy" in found.atoll("doctor", "--home", "atoll-hospital-a")
        seen = bytes(proxy.up + proxy.down)
        tensors = {c for c in kept.found if len(c) > 100}
        assert len(tensors) >= 6, "reports, tasks and models were there to be found"
        for content in (*tensors, found.folder.joinpath("app.py").read_bytes()):
            assert not seen_in(content, seen) and seen_in(content, seen + content)
        invites = [enrolment.decode(word) for word in words]
        names = [*SITES, "heart", "pressure", "wire", "Deliver", "Agenda", "keyid", "/v1/call", "/v1/message"]
        for word in (*names, *(i.token for i in invites)):
            assert word.encode() not in seen, word
        assert all(invite.proxy for invite in invites)
        assert seen.count(b"POST /v1/sealed HTTP/1.1") > 20
        assert set(re.findall(rb"(?:GET|POST|PUT) (\S+)", seen)) == {b"/v1/sealed", b"/v1/sealing", b"/v1/authority"}
        refused_without_a_word(found, company, proxy)


def refused_without_a_word(found: Place, company: Path, proxy: Recorder) -> None:
    """Who was not told of the proxy, or does not trust who signed its certificate, shows it no token."""
    word = found.atoll("invite", "third", "--quiet").strip()
    invite = enrolment.decode(word)
    before = len(proxy.up)
    plain = enrolment.encode(msgspec.structs.replace(invite, proxy=False))
    for given, folder in ((plain, "plain"), (word, "public")):
        done = subprocess.run(
            ["python", "-c", "from atoll.cli import main; main()", "join", given, "--home", folder, "--no-stay"],
            cwd=found.folder, text=True, capture_output=True, env=os.environ | {"COLUMNS": "200"}, timeout=120,
        )  # fmt: skip
        assert done.returncode != 0 and "certificate verify failed" in done.stdout + done.stderr
    assert invite.token.encode() not in proxy.up[before:]
    found.atoll("join", word, "--home", "third", "--no-stay", "--ca", company)


def blocks() -> list[str]:
    return re.findall(r"```nginx\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="nginx is not installed")
@pytest.mark.parametrize("mode", ["plain", "tls"])
def test_nginx_as_the_documentation_sets_it_up(tmp_path: Path, mode: str) -> None:
    company, certificate, key = certified(tmp_path)
    outside, (front, inside) = free_port(), blocks()
    with place(tmp_path) as found:
        if mode == "tls":
            front = front.replace("http://127.0.0.1", "https://127.0.0.1").replace(
                "proxy_buffering off;", f"proxy_buffering off;\n{inside}"
            )
        for old, new in (
            ("listen 443", f"listen 127.0.0.1:{outside}"), ("127.0.0.1:8443", f"127.0.0.1:{found.port}"),
            ("server_name atoll.example.org", "server_name localhost"),
            ("/etc/ssl/atoll.example.org.pem", str(certificate)), ("/etc/ssl/atoll.example.org.key", str(key)),
            ("/etc/ssl/authority.pem", str(tmp_path / "atoll-server" / "authority.pem")),
        ):  # fmt: skip
            front = front.replace(old, new)
        (tmp_path / "nginx.conf").write_text(
            f"daemon off;\npid {tmp_path}/nginx.pid;\nerror_log {tmp_path}/nginx.log;\nevents {{}}\n"
            f"http {{\naccess_log {tmp_path}/access.log;\nclient_body_temp_path {tmp_path}/body;\n"
            f"proxy_temp_path {tmp_path}/temp;\nfastcgi_temp_path {tmp_path}/f;\nuwsgi_temp_path {tmp_path}/u;\n"
            f"scgi_temp_path {tmp_path}/s;\n{front}\n}}\n"
        )
        served(found, mode, outside, company)
        program = subprocess.Popen(
            ["nginx", "-p", tmp_path, "-c", tmp_path / "nginx.conf"], env={"PATH": "/usr/sbin:/usr/bin"},
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            found.until(lambda: answers(outside), "nginx starts")
            run_through(found, company)
        finally:
            program.terminate()
            program.wait(20.0)
        passed = (tmp_path / "access.log").read_text()
        assert passed.count("POST /v1/sealed HTTP/1.1") > 20
        assert set(re.findall(r'"(?:GET|POST|PUT) (\S+) HTTP/1.1" 200', passed)) >= {"/v1/sealed", "/v1/sealing"}


def answers(port: int) -> bool:
    time.sleep(0.05)
    with socket.socket() as line:
        return line.connect_ex(("127.0.0.1", port)) == 0
