"""Constants of a model as they reach a site: once, held to their hash, and never again.

A round carries what is trained. What is frozen is part of the model's identity by its hash (`Model.frozen_hash`): a
site that holds contents of that hash needs nothing, and one that does not asks for them once.
"""

from pathlib import Path

from atoll.errors import InvalidArgument
from atoll.journal import write_atomically
from atoll.model import Model
from atoll.net.frames import FrameError, Limits, decode, encode, schema_of


def pack_constants(model: Model) -> bytes:
    """The frame of a model's constants."""
    return encode(model.constants())


def unpack_constants(model: Model, content: bytes, expected: str, limits: Limits | None = None) -> None:
    """Put the constants of a frame into a model.

    Args:
        model: of the same structure; whatever its constants were, they are replaced.
        content: the frame.
        expected: the `frozen_hash` of the experiment's model.
        limits: of the frame.

    Raises:
        FrameError: the frame holds other tensors, or contents of another hash; the model is left as it was.
    """
    tensors = decode(content, schema_of(model.constants()), limits)
    try:
        model.adopt(tensors, expected=expected)
    except InvalidArgument as error:
        raise FrameError("hash", str(error)) from error


class Backbones:
    """Constants a site holds on its disk, by hash.

    Args:
        directory: where; it is made when it is first needed.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)

    def provide(self, model: Model, expected: str | None) -> bool:
        """Give a model the constants of this hash, if they are here; False: they have to be fetched.

        A file that is damaged counts as not here, and is removed.
        """
        if model.frozen_hash == expected:
            return True
        if expected is None:
            raise InvalidArgument("the experiment's model has no constants, but this site's model has some.")
        path = self._path(expected)
        if not path.is_file():
            return False
        try:
            unpack_constants(model, path.read_bytes(), expected)
        except FrameError:
            path.unlink()
            return False
        return True

    def receive(self, model: Model, content: bytes, expected: str, limits: Limits | None = None) -> None:
        """Take fetched constants: checked first, then kept, durably.

        Raises:
            FrameError: they are not those of this hash; nothing is kept.
        """
        unpack_constants(model, content, expected, limits)
        write_atomically(self._path(expected), content)

    def _path(self, expected: str) -> Path:
        if len(expected) != 32 or not set(expected) <= set("0123456789abcdef"):
            raise FrameError("hash", f"{expected!r} is not a hash of 32 hexadecimal digits.")
        return self._directory / f"{expected}.safetensors"
