"""Attention of one decoded token over everything: the baseline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowkv_cli.ops import compiled
from shadowkv_cli.ops.library import check, define


def _reference(
    query: Tensor, keys: Tensor, values: Tensor, prompt_index: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    rows, q_heads, dim = query.shape
    heads = keys.shape[1]
    check(
        q_heads % heads == 0,
        "full_attention",
        f"{q_heads} query heads do not share {heads} KV heads",
    )
    # The query heads of a KV head stand in for a sequence: keys and values are read once, uncopied.
    grouped = query.view(rows, heads, q_heads // heads, dim)
    out = torch.empty_like(query)
    for row, (prompt, length) in enumerate(
        zip(prompt_index.tolist(), lengths.tolist(), strict=True)
    ):
        attended = F.scaled_dot_product_attention(
            grouped[row, None],
            keys[prompt, None, :, :length],
            values[prompt, None, :, :length],
            scale=scale,
        )
        out[row] = attended.reshape(q_heads, dim)
    return out


def _fake(
    query: Tensor, keys: Tensor, values: Tensor, prompt_index: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    return torch.empty_like(query)


define(
    "full_attention(Tensor query, Tensor keys, Tensor values, Tensor prompt_index, Tensor lengths, "
    "float scale) -> Tensor",
    _reference,
    _fake,
)


def full_attention(
    query: Tensor, keys: Tensor, values: Tensor, prompt_index: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Attend over the first tokens of each row's keys and values.

    Args:
        query: [R, Hq, D].
        keys, values: [P, Hk, S, D], prompt and generated tokens.
        prompt_index: int32 [R].
        lengths: int32 [R], tokens in use.
        scale: of the logits.

    Returns:
        [R, Hq, D].
    """
    arguments = (query, keys, values, prompt_index, lengths, scale)
    if not compiled.serves(query, query.shape[-1], group=query.shape[1] // keys.shape[1]):
        return _reference(*arguments)
    return torch.ops.shadowkv.full_attention(*arguments)
