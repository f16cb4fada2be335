"""Causal attention of a prompt's last tokens by kernels that align causal masks at the top left.

A token attends to all that came before these tokens, and to some of themselves. Both parts say how
much they weigh, by their log-sum-exp, so that their outputs add up to the exact one; no mask of
queries by keys is ever held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.methods.tiles import tiles

LEAST_CUDNN_TOKENS = 128
"""cuDNN refuses some shorter sequences; they are no work for any kernel."""


def takes_two_parts(backend: str, q: Tensor) -> bool:
    """Whether queries [1, Hq, T, D] behind other tokens are attended by such a kernel.

    All other kernels of torch can align a mask at the bottom right.
    """
    if q.device.type == "cpu":
        return backend in ("flash", "sdpa")
    return backend == "cudnn" and q.shape[2] >= LEAST_CUDNN_TOKENS


def attend_in_two_parts(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend from the last T of S tokens: q [1, Hq, T, D], k and v [1, Hk, S, D], T < S.

    Returns [1, Hq, T, D], laid out as q is where the kernel does so.
    """
    before = k.shape[2] - q.shape[2]
    assert before > 0, "no tokens came before: one part is enough"
    out, total = _part(q, k[:, :, :before], v[:, :, :before], scale, causal=False)
    own, own_total = _part(q, k[:, :, before:], v[:, :, before:], scale, causal=True)
    weight = torch.sigmoid(total - own_total)[..., None]  # float32 [1, Hq, T, 1]
    for tile in tiles(q.shape[2]):
        here = (slice(None), slice(None), tile)
        own[here] = torch.lerp(own[here].float(), out[here].float(), weight[here])
    return own


def _part(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Output [1, Hq, T, D] and log-sum-exp, float32 [1, Hq, T], of the scaled logits."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        out, total = flash(q, k, v, 0.0, causal, scale=scale)
    else:
        cudnn = aten._scaled_dot_product_cudnn_attention
        out, total, *_ = cudnn(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, total.reshape(q.shape[:3])  # cuDNN's has one dimension more
