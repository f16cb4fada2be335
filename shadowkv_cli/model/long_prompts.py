"""What keeps the memory of a long prompt's layer small: tiles of the sequence, buffers used twice.

A layer of S tokens and width H then takes, beside its keys and values, at most five tensors of
[S, H] at a time, and of a tile of its MLP the inner tensors: the embeddings (which transformers
holds to the end), what came into the layer, its norm, the queries and what they attended to; then
what came into the layer, the residual stream and its norm, which the MLP's output replaces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shadowkv_cli.methods.tiles import is_long, tiles

Forward = Callable[[Tensor], Tensor]


def tiled(forward: Forward, *, in_place: bool = False) -> Forward:
    """Run a module that treats tokens one by one in tiles: x [rows, tokens, …].

    Args:
        in_place: write the output over a long input, which nobody may read afterwards.
    """

    def run(x: Tensor) -> Tensor:
        if not is_long(x.shape[1]):
            return forward(x)
        out = x if in_place else torch.empty_like(x)
        for tile in tiles(x.shape[1]):
            out[:, tile] = forward(x[:, tile])
        return out

    return run


def rotating_in_place(rotate: Callable[..., Any]) -> Callable[..., Any]:
    """Let a family's `apply_rotary_pos_emb` write over the queries and keys of a long prompt.

    They are fresh outputs of projections or norms, which nobody reads unrotated afterwards.
    """

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not is_long(q.shape[2]):  # arguments: another layout
            return rotate(q, k, cos, sin, *args, **kwargs)
        for tile in tiles(q.shape[2]):
            turned = rotate(q[:, :, tile], k[:, :, tile], cos[:, tile], sin[:, tile])
            q[:, :, tile], k[:, :, tile] = turned
        return q, k

    return run


class OutputProjection:
    """Writes what a long prompt attended to, projected, over the queries, which are done with."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self._room: Tensor | None = None

    def offer(self, query: Tensor) -> None:
        """Queries [1, Hq, S, D] whose memory the next output may take, if it fits."""
        rows, heads, tokens, dim = query.shape
        if rows != 1 or not is_long(tokens) or heads * dim != self.linear.out_features:
            return
        by_token = query[0].transpose(0, 1)  # [S, Hq, D]
        if by_token.stride()[1:] == (dim, 1) and by_token.stride(0) >= heads * dim:
            self._room = by_token.flatten(1)  # a view

    def forward(self, x: Tensor) -> Tensor:
        room, self._room = self._room, None
        weight, bias = self.linear.weight, self.linear.bias
        if room is None or x.shape[:-1] != (1, room.shape[0]):
            return nn.functional.linear(x, weight, bias)
        if bias is None:
            torch.mm(x[0], weight.t(), out=room)
        else:
            torch.addmm(bias, x[0], weight.t(), out=room)
        return room[None]
