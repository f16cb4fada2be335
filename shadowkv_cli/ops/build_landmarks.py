"""Landmarks of a prompt's chunks, and how well each chunk is described by its mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowkv_cli.ops import compiled
from shadowkv_cli.ops.library import check, define


def _reference(keys: Tensor, chunk_size: int, per_chunk: int) -> tuple[Tensor, Tensor]:
    op = "build_landmarks"
    check(keys.dim() == 3, op, f"keys must be [Hk, S, D], got {list(keys.shape)}")
    check(chunk_size % per_chunk == 0, op, f"{per_chunk} landmarks do not divide {chunk_size}")
    heads, tokens, dim = keys.shape
    chunks = tokens // chunk_size
    whole = keys[:, : chunks * chunk_size].float()
    parts = whole.reshape(heads, chunks, per_chunk, chunk_size // per_chunk, dim)
    landmarks = parts.mean(3)  # [Hk, C, L, D]
    similarity = keys.new_empty(heads, chunks, dtype=torch.float32)
    for head in range(heads):
        members = whole[head].reshape(chunks, chunk_size, dim)
        center = landmarks[head].mean(1, keepdim=True)
        similarity[head] = F.cosine_similarity(members, center, dim=-1).amin(-1)
    return landmarks.to(keys.dtype), similarity


def _fake(keys: Tensor, chunk_size: int, per_chunk: int) -> tuple[Tensor, Tensor]:
    heads, tokens, dim = keys.shape
    chunks = tokens // chunk_size
    return (
        keys.new_empty(heads, chunks, per_chunk, dim),
        keys.new_empty(heads, chunks, dtype=torch.float32),
    )


define(
    "build_landmarks(Tensor keys, int chunk_size, int per_chunk) -> (Tensor, Tensor)",
    _reference,
    _fake,
)


def build_landmarks(keys: Tensor, chunk_size: int, per_chunk: int = 1) -> tuple[Tensor, Tensor]:
    """Average the keys of each chunk's parts (paper, Algorithm 1).

    Args:
        keys: post-RoPE keys [Hk, S, D]; a remainder that fills no chunk is left out.
        chunk_size: tokens a chunk, c.
        per_chunk: L equal parts of a chunk that get a landmark each; must divide c.

    Returns:
        Landmarks [Hk, S // c, L, D] in the keys' dtype, and the smallest cosine similarity between
        a key and the mean of its chunk, float32 [Hk, S // c].
    """
    if not compiled.serves(keys, keys.shape[-1]):
        return _reference(keys, chunk_size, per_chunk)
    return torch.ops.shadowkv.build_landmarks(keys, chunk_size, per_chunk)
