"""Of a prompt's last layer only the last token leaves the model: what no other token needs there.

Keys and values of the layer are those of all tokens; queries attend, and the MLP runs, for one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shadowkv_cli import ops
from shadowkv_cli.model.rotary import decoder_layers


def last_mlp(model: nn.Module) -> nn.Module | None:
    """The MLP beside the last layer's attention; None in a family that calls it otherwise."""
    return dict(decoder_layers(model)[-1].named_children()).get("mlp")


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
