"""The tests of another device, in a process of their own: one in which that device is known cannot fork workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_a_device_everything_is_as_on_the_cpu(which: str) -> None:
    tests = Path(__file__).with_name("test_placing.py")
    words = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-m", which, str(tests)]
    found = subprocess.run(
        words,
        env=os.environ | {"ATOLL_STANDIN": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
    assert " passed" in found.stdout
