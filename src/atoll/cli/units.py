"""`atoll unit`: a systemd unit or a container file for a server or a site, printed for whoever keeps the machine."""

import shlex
import sys
from pathlib import Path

import typer

from atoll import __version__
from atoll.errors import InvalidArgument, invalid

ROLES = ("server", "site")

UNIT = """\
[Unit]
Description=Atoll {role}, federated learning
Wants=network-online.target
After=network-online.target

[Service]
ExecStart={command}
WorkingDirectory={folder}
User={user}
UMask=0077
Restart=always
RestartSec=5
KillSignal=SIGTERM
TimeoutStopSec=60
LimitNOFILE=65536
NoNewPrivileges=true
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={folder}
PrivateTmp=true
PrivateDevices=true
ProtectKernelTunables=true
ProtectKernelModules=true
ProtectControlGroups=true
RestrictSUIDSGID=true
LockPersonality=true

[Install]
WantedBy=multi-user.target
"""

CONTAINER = """\
FROM python:3.11-slim
RUN useradd --create-home --uid 10001 atoll && mkdir /state && chown atoll /state
RUN pip install --no-cache-dir "atoll[server,postgresql]=={version}"
USER atoll
WORKDIR /state
VOLUME /state
{expose}ENTRYPOINT {command}
"""


def unit(role: str, *, folder: Path, user: str, data: str | None, container: bool) -> None:
    """Print it; see `atoll unit --help`."""
    typer.echo(text(role, folder=folder, user=user, data=data, container=container), nl=False)


def text(role: str, *, folder: Path, user: str, data: str | None, container: bool) -> str:
    """A systemd unit, or a container file.

    Args:
        role: "server" or "site".
        folder: of the server's state, or a site's own, which has joined already.
        user: who the program runs as.
        data: the table that a site's owner keeps.
        container: a container file, in which the folder is /state.

    Raises:
        InvalidArgument: a role that has no service; a table for a server; words that a unit cannot carry.
    """
    if role not in ROLES:
        raise invalid("ROLE", role, " or ".join(ROLES))
    if data is not None and role == "server":
        raise InvalidArgument("--data is for a site: a server has no data.")
    place = Path("/state") if container else folder.resolve()
    for name, word in (("--folder", str(place)), ("--user", user), ("--data", data or "")):
        if any(ord(c) < 32 or c in "%$\\\"'" for c in word):
            raise invalid(name, word, "a text without quotes, backslashes, % and $")
    words = ["server", "--state", str(place)] if role == "server" else ["join", "--home", str(place)]
    if data is not None:
        words += ["--data", str(Path(data) if container else Path(data).resolve())]
    if container:
        command = "[" + ", ".join(f'"{word}"' for word in ("atoll", *words)) + "]"
        return CONTAINER.format(
            version=__version__, command=command, expose="EXPOSE 8443\n" if role == "server" else ""
        )  # fmt: skip
    program = Path(sys.executable).parent / "atoll"
    command = " ".join(f'"{w}"' if shlex.quote(w) != w else w for w in (str(program), *words))
    return UNIT.format(role=role, command=command, folder=str(place).replace(" ", "\\x20"), user=user)
