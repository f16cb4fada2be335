"""Causal attention of a prompt's last tokens by kernels that align causal masks at the top left.

A token attends to all that came before these tokens, and to some of themselves. Both parts say how
much they weigh, by their log-sum-exp, so that their outputs add up to the exact one; neither a mask
of queries by keys nor a second whole output is ever held. (torch's own
`torch.nn.attention.bias.causal_lower_right` would be shorter, but reserves eight bytes of the host
for each pair of a query and a key.)
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowkv_cli.methods.tiles import tiles

LEAST_CUDNN_TOKENS = 128
"""cuDNN refuses some shorter sequences; they are no work for any kernel."""

Kernel = Literal["cpu", "cudnn", "flash", "efficient", "math"]


def attend_behind(backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend from the last T of S tokens: q [1, Hq, T, D], k and v [1, Hk, S, D], T < S.

    Args:
        backend: a part of torch, or `sdpa`.

    Returns:
        [1, Hq, T, D], laid out as q is where the kernel does so.
    """
    before, kernel = k.shape[2] - q.shape[2], _kernel_of(backend, q)
    assert before > 0, "no tokens came before: one part is enough"
    gqa = q.shape[1] != k.shape[1]
    if kernel == "math":  # holds all scores, so it may hold a mask
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(before)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    if kernel == "efficient" and gqa:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out, own_total = _part(kernel, q, k[:, :, before:], v[:, :, before:], scale, causal=True)
    for tile in tiles(q.shape[2]):
        part, own = q[:, :, tile], out[:, :, tile]  # [1, Hq, t, D]
        kernel = _kernel_of(backend, part)
        more, total = _part(kernel, part, k[:, :, :before], v[:, :, :before], scale, causal=False)
        weight = torch.sigmoid(total - own_total[:, :, tile])[..., None]  # float32 [1, Hq, t, 1]
        own.copy_(torch.lerp(own.float(), more.float(), weight))
    return out


def _kernel_of(backend: str, q: Tensor) -> Kernel:
    """Which kernel stands for a backend: the same, but for what it does not take."""
    if backend == "math":
        return "math"
    if q.device.type == "cpu":
        return "cpu"
    if q.shape[-1] % 8:  # a head must be a multiple of 16 bytes
        return "math"
    if q.dtype == torch.float32 or backend == "efficient":
        return "efficient"
    return "cudnn" if backend == "cudnn" and q.shape[2] >= LEAST_CUDNN_TOKENS else "flash"


def _part(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output [1, Hq, T, D] and log-sum-exp, float32 [1, Hq, T], of the scaled logits."""
    aten = torch.ops.aten
    if kernel == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        out, total = flash(q, k, v, 0.0, causal, scale=scale)
    elif kernel == "flash":
        flash = aten._scaled_dot_product_flash_attention
        out, total, *_ = flash(q, k, v, 0.0, causal, False, scale=scale)
    elif kernel == "cudnn":
        cudnn = aten._scaled_dot_product_cudnn_attention
        out, total, *_ = cudnn(q, k, v, None, True, 0.0, causal, False, scale=scale)
    else:
        efficient = aten._scaled_dot_product_efficient_attention
        out, total, *_ = efficient(q, k, v, None, True, 0.0, causal, scale=scale)
        total = total[:, :, : q.shape[2]]  # padded to a multiple of 32
    return out, total.reshape(q.shape[:3])  # cuDNN's has one dimension more
