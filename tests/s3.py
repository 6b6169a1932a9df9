"""A server that speaks S3's protocol, of the tests' own, on loopback; it ends with its parent."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

SECRET = "a-secret-that-is-nowhere-written"
_PROGRAM = """
from atoll.net.children import end_with_parent
end_with_parent()
import time
from moto.server import ThreadedMotoServer
made = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
made.start()
print(made.get_host_and_port()[1], flush=True)
time.sleep(10**6)
"""
NAMES = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")


@contextmanager
def server() -> Iterator[dict[str, str]]:
    """Start it; the variables by which a client finds it."""
    with subprocess.Popen([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as made:
        try:
            assert made.stdout is not None
            port = int(made.stdout.readline())
            yield dict(zip(NAMES, (f"http://127.0.0.1:{port}", "somebody", SECRET, "us-east-1"), strict=True))
        finally:
            made.kill()


def bucket(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a new bucket, which the environment now leads to."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{time.monotonic_ns()}"
    asked = urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/{name}", method="PUT")
    with urllib.request.urlopen(asked, timeout=60.0) as answer:
        assert answer.status == 200
    return f"s3://{name}/atoll"
