"""Blockwise 8- and 4-bit codes of a tensor, on the CPU in torch alone.

Every block of 64 consecutive numbers is divided by its largest magnitude, kept in bf16, and each quotient is replaced
by the nearest of 255 (int8) or 16 (NF4) levels. Numbers that are not finite come back not finite, never hidden.
"""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

BLOCK = 64
QuantizedDtype = Literal["int8", "nf4"]


@cache
def levels(dtype: QuantizedDtype) -> Tensor:
    """The levels between −1 and 1, ascending.

    NF4 (QLoRA, 2305.14314): quantiles of the normal distribution, 8 positive, 7 negative and an exact 0, scaled to 1.
    """
    if dtype == "int8":
        return torch.arange(-127, 128, dtype=torch.float64).div(127).float()
    tail = 1 - (1 / 32 + 1 / 30) / 2  # the outermost quantile: halfway between those of 16 and of 15 levels
    positive = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    found = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return found.div(found.max()).float()


def quantize(values: Tensor, dtype: QuantizedDtype) -> tuple[Tensor, Tensor]:
    """Codes (uint8; two NF4 codes a byte) and scales (bf16, one per block) of a tensor, flattened and zero-padded."""
    flat = values.detach().float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1).to(torch.bfloat16)
    divisors = torch.where(scales == 0, 1.0, scales.float())
    grid = levels(dtype)
    codes = torch.bucketize(blocks / divisors[:, None], (grid[1:] + grid[:-1]) / 2).to(torch.uint8)
    if dtype == "nf4":
        codes = codes[:, 0::2] * 16 + codes[:, 1::2]
    return codes.flatten(), scales


def dequantize(codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: QuantizedDtype) -> Tensor:
    """The tensor of this shape in float32. Raises ValueError on codes that are no levels."""
    if dtype == "nf4":
        codes = torch.stack([codes >> 4, codes & 15], dim=1).flatten()
    grid = levels(dtype)
    if codes.numel() and int(codes.max()) >= len(grid):
        raise ValueError(f"code {int(codes.max())} is beyond the {len(grid)} levels of {dtype}")
    values = grid[codes.long()].view(-1, BLOCK) * scales.float()[:, None]
    return values.flatten()[: torch.Size(shape).numel()].view(shape)


def stored_sizes(shape: tuple[int, ...], dtype: QuantizedDtype) -> tuple[int, int]:
    """Number of code bytes and of scales that a tensor of this shape takes."""
    blocks = -(-torch.Size(shape).numel() // BLOCK)
    return blocks * (BLOCK if dtype == "int8" else BLOCK // 2), blocks
