"""Bit packing: integers of a few bits each as bytes, lowest bit first."""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integers in [0, 2**bits) of each row [C, n] into bytes [C, ceil(n bits / 8)]."""
    if 8 % bits == 0:  # some whole numbers in a byte
        each = 8 // bits
        padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % each))
        out = padded[:, ::each].clone()
        for i in range(1, each):
            out |= padded[:, i::each] << (i * bits)
        return out
    shifts = torch.arange(bits, device=codes.device)
    stream = ((codes[:, :, None] >> shifts) & 1).reshape(len(codes), -1)
    padded = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).reshape(len(codes), -1, 8)
    return (padded << torch.arange(8, device=codes.device)).sum(dim=2).to(torch.uint8)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Undo `pack`: int64 [C, length]."""
    if 8 % bits == 0:
        each, mask = 8 // bits, 2**bits - 1
        out = packed.new_empty(len(packed), packed.shape[1], each)
        for i in range(each):
            out[:, :, i] = (packed >> (i * bits)) & mask
        return out.reshape(len(packed), packed.shape[1] * each)[:, :length].to(torch.int64)
    eight = torch.arange(8, device=packed.device)
    stream = ((packed.to(torch.int64)[:, :, None] >> eight) & 1).reshape(len(packed), -1)[:, : length * bits]
    shifts = torch.arange(bits, device=packed.device)
    return (stream.reshape(len(packed), length, bits) << shifts).sum(dim=2)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` packed integers."""
    return -(-count * bits // 8)
