"""Root-mean-square normalisation of a layer's input."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.ops import compiled
from shadowkv_cli.ops.library import check, define


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check(
        x.dim() > 0 and weight.shape == x.shape[-1:],
        "rms_norm",
        f"weight must be {list(x.shape[-1:])}, got {list(weight.shape)}",
    )
    check(weight.dtype == x.dtype, "rms_norm", f"weight must be {x.dtype}, got {weight.dtype}")
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * wide.to(x.dtype)).contiguous()


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _reference, _fake)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each row by its root mean square, then multiply it by the weight.

    Mean and quotient are float32; the quotient is rounded before the weight comes in, as the
    models of transformers do it.

    Args:
        x: [..., H].
        weight: [H], in x's dtype.
        eps: added to the mean of squares.

    Returns:
        [..., H], contiguous.

    Raises:
        ValueError: the weight has another length than the rows, or another dtype.
    """
    if not compiled.serves_any_size(x):
        return _reference(x, weight, eps)
    return torch.ops.shadowkv.rms_norm(x, weight, eps)
