"""Rotary position embedding by table, forwards and backwards, for the pairings that models use."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first dimensions of x by table; the others pass.

    Args:
        x: [..., D].
        cos, sin: [..., E], broadcastable to x without its last dimension; 2 * E <= D are rotated.
        interleaved: pairs are (0, 1), (2, 3), … (GLM); else (0, E), (1, E + 1), … (Llama).

    Returns:
        float32, shaped as x.
    """
    turned = 2 * cos.shape[-1]
    x, cos, sin = x.float(), cos.float(), sin.float()
    if interleaved:
        a, b = x[..., 0:turned:2], x[..., 1:turned:2]
        pair = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = x[..., : turned // 2], x[..., turned // 2 : turned]
        pair = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((pair, x[..., turned:]), -1) if turned < x.shape[-1] else pair


def unrotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Undo `rotate` exactly for the very table that rotated, whatever its scale and rounding.

    A rotation that also scales is undone by the reverse rotation divided by cos^2 + sin^2: so a
    table in bfloat16 and an attention factor (longrope) both cancel.
    """
    norm = cos.float().square() + sin.float().square()
    return rotate(x, cos.float() / norm, -sin.float() / norm, interleaved)
