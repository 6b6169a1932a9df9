"""Shared settings of the test suite."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# A busy machine must not fail a property by its clock.
settings.register_profile("atoll", deadline=None)
settings.load_profile("atoll")


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that need not outlive the machine: a busy disk makes waiting for it the longest part of a test."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
