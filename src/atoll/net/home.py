"""The folder of a party: who it is, its key, and whom it trusts.

identity.json   name, role, address and fingerprint of the server
key             the private key, which never leaves this folder
authority.pem   the certificate of the server's authority, held against the fingerprint
proxy.pem       authorities of the certificate of a proxy in front of the server, where they are not the machine's
life            how often a program started from here, for `signing.Numbers`
"""

import fcntl
import ssl
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from atoll.errors import InvalidArgument, RunError
from atoll.net.control import Hash, Name
from atoll.net.enrolment import Address, Role
from atoll.net.keys import authority_key, client_context, fingerprint, key_at, proxy_context
from atoll.net.storage import write_file

PREFIX = "atoll-"
"""Folders of parties are named `atoll-NAME`."""


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Who a party is, and whose.

    Attributes:
        name: its name.
        role: what it may do.
        address: of the server.
        fingerprint: of the server's key.
        proxy: whether TLS ends at a proxy in front of the server, so that what is sent is sealed.
    """

    name: Name
    role: Role
    address: Address
    fingerprint: Hash
    proxy: bool = False


class Home:
    """A party's folder.

    Args:
        folder: it.

    Raises:
        RunError: it is none, is damaged, or its key is not secret.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.identity = msgspec.json.decode((folder / "identity.json").read_bytes(), type=Identity)
        except FileNotFoundError:
            raise RunError(f"{folder} is not the folder of a party: `atoll join INVITE` makes one.") from None
        except msgspec.MsgspecError as error:
            raise RunError(f"{folder / 'identity.json'} is damaged: restore it from a backup.") from error
        self.key: Ed25519PrivateKey = key_at(folder / "key")
        self.authority = (folder / "authority.pem").read_bytes()
        self.server: Ed25519PublicKey = authority_key(self.authority)
        if fingerprint(self.server) != self.identity.fingerprint:
            raise RunError(f"{folder / 'authority.pem'} is not of the server this party joined: restore the folder.")

    def context(self) -> ssl.SSLContext:
        """TLS as this party trusts it: to the server alone, or to the proxy in front of it.

        Raises:
            RunError: the authorities of the proxy are damaged.
        """
        if not self.identity.proxy:
            return client_context(self.authority)
        path = self.folder / "proxy.pem"
        try:
            return proxy_context(path.read_text() if path.exists() else "")
        except (InvalidArgument, UnicodeDecodeError) as error:
            raise RunError(f"{path} is damaged: give the authorities again, `atoll join --home ... --ca`.") from error

    def live(self) -> int:
        """Count one more start; durable before it returns."""
        with open(self.folder / "life.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self.folder / "life"
            life = int(path.read_text()) + 1 if path.exists() else 1
            write_file(path, str(life).encode())
        return life


def settle(folder: Path, identity: Identity, authority: bytes, proxy: str = "") -> Home:
    """Write what makes a folder a party's; its key must be there.

    Args:
        folder: it.
        identity: who the party is.
        authority: of the server.
        proxy: authorities of a proxy in front of it, as PEM; "": those that the machine trusts.
    """
    write_file(folder / "authority.pem", authority)
    if proxy:
        write_file(folder / "proxy.pem", proxy.encode())
    else:
        (folder / "proxy.pem").unlink(missing_ok=True)
    write_file(folder / "identity.json", msgspec.json.encode(identity))
    return Home(folder)


def through(home: Home, proxy: str) -> Home:
    """The same party, from now on through a proxy that ends TLS in front of its server.

    Args:
        home: of the party.
        proxy: as of `settle`.
    """
    return settle(home.folder, msgspec.structs.replace(home.identity, proxy=True), home.authority, proxy)


def home_for(given: Path | None, roles: tuple[Role, ...], what: str, where: Path | None = None) -> Home:
    """The folder that a command acts from: the one given, or the only one there is here.

    Args:
        given: --home.
        roles: of those who can give the command.
        what: the command, for the error.
        where: default the working directory.

    Raises:
        RunError: there is none, or more than one, or the one given is of another role.
    """
    if given is not None:
        home = Home(given)
        if home.identity.role not in roles:  # the server would refuse it, and a site's own program would be fenced off
            raise RunError(
                f"`atoll {what}` acts for a party of role {' or '.join(roles)}; {given} is of a {home.identity.role}."
            )
        return home
    here = where or Path()
    found = [p.parent for way in ("*", "*/*") for p in sorted(here.glob(f"{PREFIX}{way}/identity.json"))]
    fitting = [h for h in map(Home, found) if h.identity.role in roles]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise RunError(
            f"`atoll {what}` acts for a party of role {' or '.join(roles)}, and none has its folder here: go to where "
            f"its folder {PREFIX}NAME is, or name it with --home."
        )
    names = ", ".join(str(h.folder) for h in fitting)
    raise RunError(f"`atoll {what}` could act for more than one party here: choose with --home ({names}).")
