"""What lies between the matrix products of a gated feed-forward layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowkv_cli.ops import compiled
from shadowkv_cli.ops.library import check, define


def _reference(gate: Tensor, up: Tensor) -> Tensor:
    check(
        up.shape == gate.shape,
        "gated_silu",
        f"up must be {list(gate.shape)}, got {list(up.shape)}",
    )
    return (F.silu(gate) * up).contiguous()  # silu is worked out in float32 and rounded


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


define("gated_silu(Tensor gate, Tensor up) -> Tensor", _reference, _fake)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Multiply up by silu of the gate, each of the two rounded to the dtype.

    Args:
        gate, up: [..., F]; usually the halves of one matrix product's output.

    Returns:
        [..., F], contiguous.

    Raises:
        ValueError: the two differ in shape.
    """
    if not compiled.serves_any_size(gate):
        return _reference(gate, up)
    return torch.ops.shadowkv.gated_silu(gate, up)
