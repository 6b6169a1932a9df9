"""`atoll server`: what it refuses before it serves, and that it never tells a password."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from atoll.cli import app


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--database", "mysql://u:secret@h/d"], "postgresql://USER@HOST"),
        (["--database", "postgresql:secret"], "what was given is none"),
        (["--database", "postgresql://u:secret@127.0.0.1:1/d"], "postgresql://u@127.0.0.1:1/d: connection failed"),
        (["--durability", "hope"], '"process" or "power"'),
    ],
)
def test_what_cannot_be_a_state_is_refused_in_one_line(tmp_path: Path, words: list[str], told: str) -> None:
    done = CliRunner().invoke(
        app, ["server", "--state", str(tmp_path / "s"), "--host", "127.0.0.1", "--port", "0", *words]
    )
    assert done.exit_code == 2 and told in done.output.replace("\n", " ")
    assert "secret" not in done.output


def test_help_tells_the_variable_and_not_what_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_DATABASE", "postgresql://u:secret@h/d")
    done = CliRunner().invoke(app, ["server", "--help"])
    assert "ATOLL_DATABASE" in done.output and "secret" not in done.output
