"""Numbers that torch cannot compute with, as float32: 4-bit floats, packed integers, scales that are powers of two."""

from __future__ import annotations

import torch

# E2M1: sign, two bits of exponent, one of mantissa.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def fp4_values(packed: torch.Tensor) -> torch.Tensor:
    """Return the two 4-bit floats of every byte, low half first: the last dim is twice as long.

    >>> fp4_values(torch.tensor([0x21, 0xF0], dtype=torch.uint8))
    tensor([ 0.5000,  1.0000,  0.0000, -6.0000])
    """
    table = torch.tensor(FP4_VALUES)
    halves = torch.stack([packed & 15, packed >> 4], dim=-1)
    return table[halves.int()].flatten(-2)


def packed_integers(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the unsigned integers of every 32-bit number, lowest bits first: the last dim is longer by 32 / bits.

    >>> packed_integers(torch.tensor([0x12345678], dtype=torch.int32), 4)
    tensor([8, 7, 6, 5, 4, 3, 2, 1], dtype=torch.int32)
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (packed.unsqueeze(-1) >> shifts & (2**bits - 1)).flatten(-2)


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Return scales in float32; bytes are exponents of two, with a bias of 127."""
    if scale.dtype is torch.uint8:
        return (scale.float() - 127).exp2()
    return scale.float()
