"""What the stages `discrete_gaussian` and `skellam` share: clip, rotate, round, add noise; and the way back.

    z_i = round(H S clip(x_i, c) / g) + noise_i  (mod 2^bits),      sum_i x_i ~ g S H (sum_i z_i)

H: the Hadamard matrix in blocks, S: signs that are the same for everybody in a round. `atoll.privacy.distributed` has
the equations, their sources and the accounting. One more integer counts the clients of the sum. Cost: d + 1 integers of
`bits` bits up, d the row's length padded to whole blocks.
"""

from dataclasses import replace

import torch
from torch import Tensor

from atoll.errors import CompositionError, invalid
from atoll.privacy.client_noise import ClientNoise, clipped
from atoll.privacy.distributed import Kind, Scheme, scheme
from atoll.privacy.noise import Noise
from atoll.secret import Source
from atoll.spec import record
from atoll.transforms.base import Keys, Transform
from atoll.transforms.rotate import hadamard

BLOCK = 1 << 12


def distributed(kind: Kind, clip: float, told: Noise, survivors: int, clients: int, bits: int) -> Transform:
    """The stage for a kind of noise; see `discrete_gaussian`."""
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not 0 < clip < float("inf"):
        raise invalid("clip", clip, "a finite number above 0")
    for name, value in (("survivors", survivors), ("clients", clients)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise invalid(name, value, "an integer of at least 1")
    if survivors > clients:
        raise invalid("survivors", survivors, f"at most clients={clients}, the largest cohort")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 8 <= bits <= 48:
        raise invalid("bits", bits, "an integer from 8 to 48")

    def scheme_of(length: int, split: int, multiplier: float) -> Scheme:
        if not length:
            raise CompositionError(
                f"{kind} has no numbers to add noise to: clients send nothing under this algorithm. Leave {kind} out."
            )
        block = min(block_of(part) for part in (split, length - split) if part)
        return scheme(
            kind, clip=float(clip), noise_multiplier=multiplier, survivors=survivors, clients=clients, bits=bits,
            length=padded(split) + padded(length - split), block=block,
        )  # fmt: skip

    def agreed(length: int, split: int) -> Scheme:
        return scheme_of(length, split, told.calibrated(kind))

    def sizes(length: int, split: int) -> tuple[int, int]:
        wide = padded(split)
        return wide + padded(length - split) + 1, wide

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: None, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        length = rows.shape[1]
        split = length if keys.split is None else keys.split
        whole, wide = sizes(length, split)
        own, source = agreed(length, split), Source(seed=told.seed)
        signs = keys.common.signs("rotation", whole - 1)[0].double()
        out = torch.ones(len(rows), whole, dtype=torch.int64)
        for row, client, sent in zip(rows, keys.clients.tolist(), out, strict=True):
            exact = clipped(row, clip)
            spread = torch.zeros(whole - 1, dtype=torch.float64)
            spread[:split], spread[wide : wide + length - split] = exact[:split], exact[split:]
            noisy = source.derive(kind, keys.stage, keys.round, client)
            sent[:-1] = own.encode(turn(spread * signs, wide), noisy)
        return out, memory

    def check(count: int) -> None:
        if not survivors <= count <= clients:
            raise CompositionError(
                f"{kind}(survivors={survivors}, clients={clients}) does not fit a cohort of {count}: its noise is "
                "sized for at least survivors and its numbers for at most clients. Choose cohorts of a fixed size "
                "between the two."
            )

    def decode(total: Tensor, shared: None, length: int, keys: Keys) -> Tensor:
        split = length if keys.split is None else keys.split
        whole, wide = sizes(length, split)
        count = int(total[-1])
        if not survivors <= count <= clients:
            raise CompositionError(
                f"{kind}(survivors={survivors}, clients={clients}) met a sum of {count} clients: its noise is sized "
                "for at least survivors and its numbers for at most clients, so this sum must not be used. Choose "
                "cohorts of a fixed size between the two."
            )
        signs = keys.common.signs("rotation", whole - 1)[0].double()
        back = turn(total[:-1].double() * agreed(length, split).granularity, wide) * signs
        return torch.cat((back[:split], back[wide : wide + length - split]))

    def calibrate(multiplier: float) -> Transform:
        other = distributed(kind, clip, replace(told, noise_multiplier=multiplier), survivors, clients, bits)
        return replace(other, spec=stage.spec)  # the experiment is the one that asked for an epsilon

    stage = Transform(
        record(
            kind, clip=clip, noise_multiplier=told.noise_multiplier, epsilon=told.epsilon, delta=told.delta,
            budget=told.budget, survivors=survivors, clients=clients, bits=bits, seed=told.seed,
        ),
        encode,
        decode_sum=decode,
        size=sizes,
        unbiased=False,
        aligned=False,
        contracts=False,
        bound=lambda before: None,
        randomness="shared",
        integers=bits,
        check=check,
        client_noise=ClientNoise(told, kind, float(clip), survivors, scheme_of),
        calibrate=calibrate,
    )  # fmt: skip
    return stage


def block_of(length: int) -> int:
    """Numbers in a block of the rotation of a part of this length, at least 1."""
    return min(BLOCK, 1 << (length - 1).bit_length())


def padded(length: int) -> int:
    """A part's length, filled up to whole blocks."""
    return -(-length // block_of(length)) * block_of(length) if length else 0


def turn(row: Tensor, wide: int) -> Tensor:
    """Both parts of a padded row, rotated in blocks; its own inverse."""
    out = torch.empty_like(row)
    for begin, end in ((0, wide), (wide, len(row))):
        if end > begin:
            block = min(BLOCK, end - begin)
            out[begin:end] = hadamard(row[begin:end].view(-1, block)).view(-1)
    return out
