"""Bring the values of missing chunks into the buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.ops import compiled
from shadowkv_cli.ops.chunk_rows import gather_chunks
from shadowkv_cli.ops.library import check, define
from shadowkv_cli.ops.misses import missing_chunks


def _reference(
    values: Tensor,
    scales: Tensor | None,
    prompt_index: Tensor,
    ids: Tensor,
    slots: Tensor,
    misses: Tensor,
    miss_counts: Tensor,
    buffer: Tensor,
    buffer_scales: Tensor | None = None,
    turns: Tensor | None = None,
) -> None:
    _check(values, scales, buffer, buffer_scales, turns)
    row, head, chunk, slot = missing_chunks(misses, ids, slots)
    wanted = (prompt_index.long().index_select(0, row), head, chunk)
    chunks = gather_chunks(values, *(index.to(values.device) for index in wanted))
    buffer[row, head, slot] = chunks.to(buffer.device)
    if scales is not None and buffer_scales is not None:
        buffer_scales[row, head, slot] = scales[wanted]


def _check(
    values: Tensor,
    scales: Tensor | None,
    buffer: Tensor,
    buffer_scales: Tensor | None,
    turns: Tensor | None,
) -> None:
    op, chunk = "fetch_values", list(buffer.shape[-2:])
    held = list(values.shape[-2:])
    check(held == chunk, op, f"values hold chunks of {held}, buffer {chunk}")
    check(values.dtype == buffer.dtype, op, f"values must be {buffer.dtype}, not {values.dtype}")
    both = (scales is None) == (buffer_scales is None)
    check(both, op, "scales and buffer_scales come together, or neither does")
    for name, given, of in (("scales", scales, values), ("buffer_scales", buffer_scales, buffer)):
        if given is not None:
            check(given.shape == of.shape[:-2], op, f"{name} must be {list(of.shape[:-2])}")
    if turns is not None:
        found = [turns.dtype, *turns.shape]
        check(found == [torch.int32, 2], op, f"turns must be int32 [2], not {found}")


def _fake(
    values: Tensor,
    scales: Tensor | None,
    prompt_index: Tensor,
    ids: Tensor,
    slots: Tensor,
    misses: Tensor,
    miss_counts: Tensor,
    buffer: Tensor,
    buffer_scales: Tensor | None = None,
    turns: Tensor | None = None,
) -> None:
    return None


define(
    "fetch_values(Tensor values, Tensor? scales, Tensor prompt_index, Tensor ids, Tensor slots, "
    "Tensor misses, Tensor miss_counts, Tensor(a!) buffer, "
    "Tensor(b!)? buffer_scales=None, Tensor(c!)? turns=None) -> ()",
    _reference,
    _fake,
)


def fetch_values(
    values: Tensor,
    scales: Tensor | None,
    prompt_index: Tensor,
    ids: Tensor,
    slots: Tensor,
    misses: Tensor,
    miss_counts: Tensor,
    buffer: Tensor,
    buffer_scales: Tensor | None = None,
    turns: Tensor | None = None,
) -> None:
    """Copy missing chunks from the prompt's values to their slots, across the bus where need be.

    Args:
        values: [P, Hk, C, c, D] beside the model, or in pinned host memory; or packed, uint8
            [P, Hk, C, c, W].
        scales: float32 [P, Hk, C] beside the buffer, of values in fp8; or None.
        prompt_index: int32 [R].
        ids: int32 [R, Hk, N], chunk ids.
        slots: int32 [R, Hk, N], their slots.
        misses: int32 [R, Hk, N], the places in `ids` of the chunks to be copied, then -1.
        miss_counts: int32 [R, Hk], how many.
        buffer: [R, Hk, B, c, D] of the values' dtype, changed in place.
        buffer_scales: float32 [R, Hk, B], the scales of what lies there, changed in place; or None.
        turns: int32 [2], zeros at first, which calls on several streams share: together they then
            have no more under way than fills the bus, first come, first served. More would make
            all else slower that reads the GPU's memory meanwhile. None: this call is alone.
    """
    places = (ids, slots, misses, miss_counts)
    arguments = (values, scales, prompt_index, *places, buffer, buffer_scales, turns)
    if compiled.serves_copies(values, buffer):
        torch.ops.shadowkv.fetch_values(*arguments)
    else:
        _reference(*arguments)
