"""Of a prompt's last layer only the last token leaves the model: what no other token needs there.

Keys and values of the layer are those of all tokens; queries attend, and the MLP runs, for one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shadowkv_cli import ops
from shadowkv_cli.model.rotary import attention_modules


def last_mlp(model: nn.Module) -> nn.Module | None:
    """The MLP beside the last layer's attention; None in a family that calls it otherwise."""
    last = attention_modules(model)[-1]
    for module in model.modules():
        children: dict[str, Any] = dict(module.named_children())
        if any(child is last for child in children.values()):
            return children.get("mlp")
    return None


def attend_last(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend from the last token of a prompt, and say the same of all others.

    Args:
        q: [1, Hq, S, D].
        k, v: [1, Hk, S, D].
        scale: of the logits.

    Returns:
        [1, Hq, S, D], one token's output in every place: a view.
    """
    row = torch.zeros(1, dtype=torch.int32, device=q.device)
    out = ops.full_attention(q[:, :, -1].contiguous(), k, v, row, row + k.shape[2], scale)
    return out[:, :, None].expand_as(q)
