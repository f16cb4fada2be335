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


def tiled(forward: Forward) -> Forward:
    """Run a module that treats tokens one by one in tiles: x [rows, tokens, …]."""

    def run(x: Tensor) -> Tensor:
        if not is_long(x.shape[1]):
            return forward(x)
        out = torch.empty_like(x)
        for tile in tiles(x.shape[1]):
            out[:, tile] = forward(x[:, tile])
        return out

    return run


def tiled_in_place(forward: Forward, last: LinearInto | None = None) -> Forward:
    """The same, with the output over a long input, which nobody may read afterwards.

    Args:
        last: the linear that makes the output; it then writes it to its place by itself.
    """

    def run(x: Tensor) -> Tensor:
        if not is_long(x.shape[1]):
            return forward(x)
        for tile in tiles(x.shape[1]):
            part = x[:, tile]
            if last is not None and len(x) == 1:
                last.offer(part[0])
            out = forward(part)
            if out.data_ptr() != part.data_ptr():
                part.copy_(out)
        return x

    return run


def rotating_in_place(
    rotate: Callable[..., Any], at_once: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """Let a family's `apply_rotary_pos_emb` write over the queries and keys of a long prompt.

    They are fresh outputs of projections or norms, which nobody reads unrotated afterwards.

    Args:
        at_once: does so itself, without tiles.
    """

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not is_long(q.shape[2]):  # arguments: another layout
            return rotate(q, k, cos, sin, *args, **kwargs)
        if at_once is not None:
            at_once(q, k, cos, sin)
            return q, k
        for tile in tiles(q.shape[2]):
            turned = rotate(q[:, :, tile], k[:, :, tile], cos[:, tile], sin[:, tile])
            q[:, :, tile], k[:, :, tile] = turned
        return q, k

    return run


class LinearInto:
    """A linear that writes its next output to memory that was offered, or adds it to a stream."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self._room: Tensor | None = None
        self._sum: Tensor | None = None

    def add_to(self, stream: Tensor) -> None:
        """What the next output is to be added to in place: [rows, 1, H], contiguous.

        That sum is then the output. A linear with a bias leaves it as it is.
        """
        self._sum = stream

    def offer(self, room: Tensor) -> None:
        """Where an output [1, tokens, H] may go: [tokens, H]; it may be what the layer reads."""
        self._room = room

    def forward(self, x: Tensor) -> Tensor:
        room, self._room = self._room, None
        total, self._sum = self._sum, None
        weight, bias = self.linear.weight, self.linear.bias
        if total is not None and bias is None:
            total.view(-1, total.shape[-1]).addmm_(x.flatten(0, -2), weight.t())
            return total
        if room is None or x.shape[:-1] != (1, room.shape[0]):
            return nn.functional.linear(x, weight, bias)
        if bias is None:
            torch.mm(x[0], weight.t(), out=room)
        else:
            torch.addmm(bias, x[0], weight.t(), out=room)
        return room[None]


class OutputProjection(LinearInto):
    """Writes what a long prompt attended to, projected, over the queries, which are done with."""

    def offer_queries(self, query: Tensor) -> None:
        """Queries [1, Hq, S, D] whose memory the next output may take."""
        rows, heads, tokens, dim = query.shape
        if rows != 1 or not is_long(tokens) or heads * dim != self.linear.out_features:
            return
        by_token = query[0].transpose(0, 1)  # [S, Hq, D]
        if by_token.stride()[1:] == (dim, 1) and by_token.stride(0) >= heads * dim:
            self.offer(by_token.flatten(1))  # a view
