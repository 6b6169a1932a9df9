"""Shared settings of the test suite."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from postgres import Cluster, cluster, programs

from atoll.database import SYNCHRONOUS

# A process in which the tests' own device is known cannot fork: test_another_device.py starts one for it.
collect_ignore = [] if os.environ.get("ATOLL_STANDIN") else ["engines/test_placing.py"]

torch.set_num_threads(1)

# A busy machine must not fail a property by its clock.
settings.register_profile("atoll", deadline=None)
settings.load_profile("atoll")


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that need not outlive the machine: a busy disk makes waiting for it the longest part of a test."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setitem(SYNCHRONOUS, "power", "OFF")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A PostgreSQL at work."""
    where = programs()
    if where is None:
        pytest.skip("no PostgreSQL is installed here (Debian: apt install postgresql)")
    with cluster(where) as made:
        yield made


@pytest.fixture
def postgresql(postgres: Cluster) -> str:
    """The address of a new database of PostgreSQL."""
    return postgres.database()


@pytest.fixture(scope="session")
def s3() -> Iterator[dict[str, str]]:
    """A server that speaks S3's protocol: the variables by which it is found."""
    pytest.importorskip("s3fs", reason="pip install 'atoll[objects]'")
    pytest.importorskip("moto", reason="pip install 'moto[s3]' flask flask-cors")
    import s3 as server

    with server.server() as made:
        yield made


@pytest.fixture
def bucket(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a new bucket, which the environment leads to."""
    import s3 as server

    return server.bucket(s3, monkeypatch)
