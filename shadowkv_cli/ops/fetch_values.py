"""Bring the values of missing chunks into the buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.ops import compiled
from shadowkv_cli.ops.chunk_rows import gather_chunks
from shadowkv_cli.ops.library import check, define
from shadowkv_cli.ops.misses import missing_places


def _reference(
    values: Tensor,
    prompt_index: Tensor,
    ids: Tensor,
    slots: Tensor,
    misses: Tensor,
    miss_counts: Tensor,
    buffer: Tensor,
) -> None:
    check(
        values.shape[-2:] == buffer.shape[-2:],
        "fetch_values",
        f"values hold chunks of {list(values.shape[-2:])}, buffer {list(buffer.shape[-2:])}",
    )
    row, head, place = missing_places(misses)
    wanted = (prompt_index[row].long(), head, ids[row, head, place].long())
    chunks = gather_chunks(values, *(index.to(values.device) for index in wanted))
    buffer[row, head, slots[row, head, place].long()] = chunks.to(buffer.device)


def _fake(
    values: Tensor,
    prompt_index: Tensor,
    ids: Tensor,
    slots: Tensor,
    misses: Tensor,
    miss_counts: Tensor,
    buffer: Tensor,
) -> None:
    return None


define(
    "fetch_values(Tensor values, Tensor prompt_index, Tensor ids, Tensor slots, Tensor misses, "
    "Tensor miss_counts, Tensor(a!) buffer) -> ()",
    _reference,
    _fake,
)


def fetch_values(
    values: Tensor,
    prompt_index: Tensor,
    ids: Tensor,
    slots: Tensor,
    misses: Tensor,
    miss_counts: Tensor,
    buffer: Tensor,
) -> None:
    """Copy missing chunks from the prompt's values to their slots, across the bus where need be.

    Args:
        values: [P, Hk, C, c, D] beside the model, or in pinned host memory.
        prompt_index: int32 [R].
        ids: int32 [R, Hk, N], chunk ids.
        slots: int32 [R, Hk, N], their slots.
        misses: int32 [R, Hk, N], the places in `ids` of the chunks to be copied, then -1.
        miss_counts: int32 [R, Hk], how many.
        buffer: [R, Hk, B, c, D], changed in place.
    """
    arguments = (values, prompt_index, ids, slots, misses, miss_counts, buffer)
    if compiled.serves_copies(values, buffer):
        torch.ops.shadowkv.fetch_values(*arguments)
    else:
        _reference(*arguments)
