"""8-bit floats (e4m3) with float32 scales: how a prompt's values and landmarks may be stored."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""So that no scale is zero or loses bits, and zeros stay zeros."""


def quantise(x: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Round to fp8 with one scale for all elements of the last `dims` dimensions.

    The error of an element is at most a sixteenth of it or, where that is less, 2^-10 of its scale.

    Args:
        x: finite, of any float dtype.
        dims: how many dimensions share a scale.

    Returns:
        fp8 of the same shape, and float32 scales of the shape that the other dimensions have.
    """
    largest = x.abs().amax(tuple(range(-dims, 0))).float()
    scales = (largest / LARGEST).clamp_min(SMALLEST_SCALE)
    return (x.float() / _beside(scales, dims)).to(FP8), scales


def dequantise(x: Tensor, scales: Tensor) -> Tensor:
    """float32 of what `quantise` gave."""
    return x.float() * _beside(scales, x.dim() - scales.dim())


def _beside(scales: Tensor, dims: int) -> Tensor:
    return scales[(..., *(None,) * dims)]
