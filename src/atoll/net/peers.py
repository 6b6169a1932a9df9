"""The public keys of other sites, pinned by a site when it first sums with them.

A secure sum hides a site among others; a server that could exchange their keys would be all of them. The first key
under a name is kept in the site's folder (`peers.json`); another one under that name is refused until the site's owner
forgets the old one (`atoll peers --forget NAME`).
"""

import msgspec

from atoll import secagg
from atoll.errors import InvalidArgument, RunError, invalid
from atoll.net.control import Name, PublicKey
from atoll.net.storage import FileSystem, write_durably
from atoll.net.sums import roster_of

PATH = "peers.json"


class Peers:
    """The keys that a site has pinned.

    Args:
        files: where the site's folder is.
    """

    def __init__(self, files: FileSystem) -> None:
        self._files = files

    @property
    def keys(self) -> dict[str, str]:
        """By name, as the file has them now: the owner may have forgotten one meanwhile.

        Raises:
            RunError: the file is damaged.
        """
        if self._files.size(PATH) < 0:
            return {}
        try:
            return msgspec.json.decode(self._files.read(PATH), type=dict[Name, PublicKey])
        except msgspec.MsgspecError as error:
            raise RunError(f"{PATH} is damaged: restore it, or remove it to pin the sites' keys anew.") from error

    def known(self, keys: dict[str, str]) -> secagg.Roster:
        """These sites, if each has the key that is pinned or none is; nothing is pinned by that.

        Raises:
            SecAggError: a site has another key than the one that is pinned, or keys that are none.
        """
        self._fitting(keys)
        try:
            return roster_of(keys)
        except InvalidArgument as error:
            raise secagg.SecAggError("roster", f"the sites' keys cannot be used: {error}") from error

    def pin(self, keys: dict[str, str]) -> None:
        """Pin the keys of sites that were not known, durably.

        Raises:
            SecAggError: a site has another key than the one that is pinned.
            OSError: they could not be kept; nothing has changed then.
        """
        pinned = self._fitting(keys)
        if keys.keys() - pinned.keys():
            self._keep(pinned | keys)

    def _fitting(self, keys: dict[str, str]) -> dict[str, str]:
        """What is pinned, which these keys do not contradict."""
        try:
            pinned = self.keys
        except RunError as error:
            raise secagg.SecAggError("roster", str(error)) from error
        for name, key in keys.items():
            if pinned.get(name, key) != key:
                raise secagg.SecAggError("roster", f"{name} has another key than the one that is pinned here.", name)
        return pinned

    def forget(self, name: str) -> None:
        """Let the next key under a name be pinned.

        Raises:
            InvalidArgument: none is pinned under it.
        """
        pinned = self.keys
        if name not in pinned:
            raise invalid("--forget", name, f"the name of a site whose key is pinned ({', '.join(pinned) or 'none'})")
        self._keep({n: k for n, k in pinned.items() if n != name})

    def _keep(self, keys: dict[str, str]) -> None:
        write_durably(self._files, PATH, msgspec.json.encode(dict(sorted(keys.items()))))
