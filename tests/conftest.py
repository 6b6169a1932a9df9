"""Shared settings of the test suite."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from postgres import Cluster, cluster, programs

from atoll.database import SYNCHRONOUS

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
