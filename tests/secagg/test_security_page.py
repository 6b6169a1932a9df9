"""The page on security names tests: they exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text()))
    written = "".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    found = set(re.findall(r"def (test_\w+)\(", written))
    assert len(named) > 40 and not named - found
