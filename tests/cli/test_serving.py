"""`atoll server`: what it refuses before it serves, and that it never tells a password."""

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atoll.cli import app, local
from atoll.errors import RunError
from atoll.net.server import establish, opened


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--database", "mysql://u:secret@h/d"], "postgresql://USER@HOST"),
        (["--database", "postgresql:secret"], "what was given is none"),
        (["--database", "postgresql://u:secret@127.0.0.1:1/d"], "postgresql://u@127.0.0.1:1/d: connection failed"),
        (["--durability", "hope"], '"process" or "power"'),
        (["--proxy", "http"], '"plain" (HTTP, from this machine) or "tls"'),
        (["--proxy", "plain"], "how sites reach the proxy: --address HOST:PORT"),
        (["--proxy", "plain", "--host", "0.0.0.0", "--address", "a:1"], "127.0.0.1 or ::1 with --proxy plain"),
        (["--proxy", "tls", "--address", "a:1", "--among", "127.0.0.1:1"], "cannot be given with --among"),
        (["--proxy", "tls", "--address", "a:1", "--ca", "no-such.pem"], "a file of certificates of authorities"),
        (["--ca", "public"], "--ca is of a proxy in front"),
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


def test_metrics_that_cannot_be_told_are_refused_with_the_reason(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["--state", str(tmp_path / "s"), "--host", "127.0.0.1", "--port", "0", "--metrics", str(port)]
        done = CliRunner().invoke(app, ["server", *words])
    assert done.exit_code == 2 and f"cannot listen on 127.0.0.1:{port} for metrics" in done.output.replace("\n", " ")


def test_a_server_whose_state_is_gone_does_not_begin_anew_without_a_word(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    state, note = opened(folder, None, "process")
    establish(folder, "localhost:1", state)
    note()
    state.close()
    again, _ = opened(folder, None, "process")
    again.close()
    for path in folder.glob("state.sqlite*"):
        path.unlink()
    for _ in range(2):
        with pytest.raises(RunError, match=r"state\.sqlite is gone, with members and runs: restore it"):
            opened(folder, None, "process")


def test_a_trial_on_this_machine_is_not_in_the_state_of_a_real_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOLL_DATABASE", "postgresql://u:secret@h/d")
    monkeypatch.setattr(local, "_PROGRAM", "import os; print(os.environ.get('ATOLL_DATABASE'))  # {}")
    with ExitStack() as programs:
        assert local._program(programs, tmp_path / "log").wait(60) == 0
    assert (tmp_path / "log").read_text() == "None\n"
