"""Services: what is printed is a unit, and starts what it says."""

import configparser
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from atoll.cli.commands import app
from atoll.cli.units import text
from atoll.errors import InvalidArgument

FOLDER = Path("/srv/atoll")


def parsed(unit: str) -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read_string(unit)
    return found


def accepted(words: list[str]) -> None:
    """The command line knows these words."""
    command = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    command.make_context(words[0], list(words[1:]))


@pytest.mark.parametrize(("role", "data"), [("server", None), ("site", "/data/heart.csv"), ("site", None)])
def test_a_unit_starts_the_program_with_words_it_knows(role: str, data: str | None) -> None:
    unit = parsed(text(role, folder=FOLDER, user="atoll", data=data, container=False))
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert Path(program).name == "atoll" and Path(program).is_absolute()
    assert str(FOLDER) in words and (data is None or data in words)
    accepted(words)
    assert unit["Service"]["ReadWritePaths"] == str(FOLDER) and unit["Service"]["User"] == "atoll"
    assert unit["Service"]["Restart"] == "always" and unit["Service"]["UMask"] == "0077"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    path = tmp_path / "atoll-server.service"
    path.write_text(text("server", folder=tmp_path, user="root", data=None, container=False))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, timeout=60)
    assert "atoll-server.service" not in done.stderr, done.stderr


@pytest.mark.parametrize("role", ["server", "site"])
def test_a_container_file_starts_the_program_with_words_it_knows(role: str) -> None:
    file = text(role, folder=FOLDER, user="atoll", data=None, container=True)
    (line,) = (line for line in file.splitlines() if line.startswith("ENTRYPOINT"))
    program, *words = json.loads(line.removeprefix("ENTRYPOINT "))
    assert program == "atoll" and "/state" in words and "USER atoll" in file
    accepted(words)
    assert ("EXPOSE 8443" in file) == (role == "server")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"role": "viewer"}, "ROLE"),
        ({"role": "server", "data": "x.csv"}, "--data is for a site"),
        ({"folder": Path("/srv/a%h")}, "--folder"),
        ({"user": "a\nExecStart=/bin/sh"}, "--user"),
        ({"data": 'x".csv'}, "--data"),
    ],
)
def test_what_a_unit_cannot_carry_is_refused(given: dict[str, object], said: str) -> None:
    words = {"role": "site", "folder": FOLDER, "user": "atoll", "data": None, "container": False} | given
    role = str(words.pop("role"))
    with pytest.raises(InvalidArgument, match=said):
        text(role, **words)  # type: ignore[arg-type]
