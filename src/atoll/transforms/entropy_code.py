"""Entropy coding: the last stage, which loses nothing.

All that the stages before it send is coded as bytes by Zstandard (Collet & Kucherawy 2021, RFC 8878: matches, then
finite-state entropy coding and Huffman codes). Bytes of equal place in their numbers lie side by side, so that signs
and exponents of floats meet their like. It pays where symbols differ in frequency: quantised numbers, few of which are
near the largest, signs of sparse rows, floats. Codes that are as likely as each other (`eden(1)`, places of `top_k`)
grow by some 20 bytes. The size tells something of the values, so no channel that hides them can stand behind it.
Bytes: 4 for the length of a frame, and the frame, which has a checksum.
"""

from typing import Any

from torch import Tensor

from atoll.errors import InvalidArgument, invalid
from atoll.spec import record
from atoll.transforms.base import Coder, Keys, PayloadError, Transform


def entropy_code(level: int = 3) -> Transform:
    """Code the bytes of all that leaves the stages before it; what is decoded is what was sent.

    Args:
        level: how hard it tries, 1 to 19; costs time.

    Raises:
        InvalidArgument: a level out of range; `zstandard` is not installed.
    """
    if isinstance(level, bool) or not isinstance(level, int) or not 1 <= level <= 19:
        raise invalid("level", level, "an integer from 1 to 19")
    try:
        import zstandard
    except ImportError as error:
        raise InvalidArgument(
            'entropy_code needs zstandard, which is not installed. Install it: pip install "atoll[compression]".'
        ) from error

    def compress(raw: bytes) -> bytes:
        return zstandard.ZstdCompressor(level=level, write_checksum=True).compress(raw)

    def expand(payload: bytes, size: int) -> bytes:
        try:
            # The announced size comes first, so that nothing is allocated for a frame that claims more.
            claimed = zstandard.get_frame_parameters(payload).content_size
            if claimed != size:
                raise PayloadError(f"entropy_code: the payload announces {claimed} bytes, expected {size}.")
            raw = zstandard.ZstdDecompressor().decompress(payload, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise PayloadError(f"entropy_code: the payload is damaged: {error}.") from error
        if len(raw) != size:
            raise PayloadError(f"entropy_code: the payload holds {len(raw)} bytes, expected {size}.")
        return raw

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: Any, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        return rows, memory

    return Transform(
        record("entropy_code", level=level),
        encode,
        gives="codes",
        sums=False,
        lossless=True,
        fixed_size=False,
        coder=Coder(compress, expand),
    )
