"""Attention of one decoded token over what a sparse method has at hand."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from shadowkv_cli.config import packed_width
from shadowkv_cli.ops import compiled
from shadowkv_cli.ops.chunk_rows import gather_chunks
from shadowkv_cli.ops.fp8 import FP8, dequantise
from shadowkv_cli.ops.library import check, define
from shadowkv_cli.ops.packed import unpack


@functools.lru_cache(maxsize=64)
def _sections(capacities: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """For each place of the fixed part, its section and its position there: int64 and int32 [F]."""
    section = [i for i, capacity in enumerate(capacities) for _ in range(capacity)]
    position = [place for capacity in capacities for place in range(capacity)]
    return (
        torch.tensor(section, dtype=torch.long, device=device),
        torch.tensor(position, dtype=torch.int32, device=device),
    )


def _unused(lengths: Tensor, capacities: list[int]) -> Tensor:
    """True where the fixed part of a row's address space is not filled, bool [R, F]."""
    section, position = _sections(tuple(capacities), lengths.device)
    return position >= lengths.index_select(1, section)


@functools.lru_cache(maxsize=64)
def _rows_and_heads(
    rows: int, heads: int, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Row and head of each selected chunk, int64 [R * Hk * N]."""
    row = torch.arange(rows, device=device).repeat_interleave(heads * count)
    head = torch.arange(heads, device=device).repeat_interleave(count).repeat(rows)
    return row, head


def fixed_scores(
    query: Tensor, keys: Tensor, lengths: Tensor, capacities: list[int]
) -> tuple[Tensor, Tensor]:
    """Unscaled logits over the fixed part, minus infinity where it is not in use.

    Returns:
        [R, Hk, G, F], and where it is not in use: bool [R, F].
    """
    rows, q_heads, dim = query.shape
    grouped = query.view(rows, keys.shape[1], q_heads // keys.shape[1], dim)
    scores = torch.matmul(grouped, keys[:, :, : sum(capacities)].transpose(2, 3)).float()
    unused = _unused(lengths, capacities)
    return torch.where(unused[:, None, None], float("-inf"), scores), unused


def _gather(buffer: Tensor, slots: Tensor) -> Tensor:
    """The chunks in the given slots of [R, Hk, B, c, D], in their order: [R, Hk, N, c, D]."""
    rows, heads = buffer.shape[:2]
    row, head = _rows_and_heads(rows, heads, slots.shape[-1], buffer.device)
    chunks = gather_chunks(buffer, row, head, slots.flatten().clamp_min(0).long())
    return chunks.view(rows, heads, -1, *buffer.shape[3:])


def _behind(space: Tensor, fixed: int, chunk_size: int) -> Tensor:
    """The slots behind the fixed part of an address space: [R, Hk, B, c, D]."""
    return space[:, :, fixed:].unflatten(2, (-1, chunk_size))


def _reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_slots: Tensor,
    value_slots: Tensor,
    lengths: Tensor,
    capacities: list[int],
    chunk_size: int,
    scale: float,
    value_buffer: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows, q_heads, _ = query.shape
    heads = keys.shape[1]
    check(
        q_heads % heads == 0,
        "sparse_attention",
        f"{q_heads} query heads do not share {heads} KV heads",
    )
    check(
        lengths.shape == (rows, len(capacities)),
        "sparse_attention",
        f"lengths must be [{rows}, {len(capacities)}], got {list(lengths.shape)}",
    )
    _check_buffer(value_buffer, value_scales, keys, chunk_size)
    parts = []
    for here, width in _stretches(key_slots):
        slots_here = (key_slots[here, :, :width], value_slots[here, :, :width])
        planes = (query[here], keys[here], values[here])
        apart = None
        if value_buffer is not None:
            scales = None if value_scales is None else value_scales[here]
            apart = (value_buffer[here], scales)
        parts.append(
            _attend(*planes, *slots_here, lengths[here], capacities, chunk_size, scale, apart)
        )
    if len(parts) == 1:
        return parts[0]
    out, lse = (torch.cat(part) for part in zip(*parts, strict=True))
    return out, lse


def _check_buffer(
    buffer: Tensor | None, scales: Tensor | None, keys: Tensor, chunk_size: int
) -> None:
    op, dim = "sparse_attention", keys.shape[-1]
    in_fp8 = buffer is not None and buffer.dtype == FP8
    if buffer is not None:
        packed = buffer.dtype == torch.uint8 and keys.dtype == torch.bfloat16
        wanted = f"{FP8}, or uint8 beside keys in bfloat16"
        check(in_fp8 or packed, op, f"value_buffer must be {wanted}, not {buffer.dtype}")
    check(in_fp8 == (scales is not None), op, "value_scales belong to a value_buffer in fp8")
    if buffer is None:
        return
    size = [*keys.shape[:2], buffer.shape[2], chunk_size, dim if in_fp8 else packed_width(dim)]
    check(list(buffer.shape) == size, op, f"value_buffer must be {size}, got {list(buffer.shape)}")
    if scales is not None:
        check(
            list(scales.shape) == size[:3] and scales.dtype == torch.float32,
            op,
            f"value_scales must be float32 {size[:3]}, got {scales.dtype} {list(scales.shape)}",
        )


@functools.lru_cache(maxsize=64)
def _from_one(count: int) -> Tensor:
    """1, 2, … up to it, int32 on a CPU."""
    return torch.arange(1, count + 1, dtype=torch.int32)


def _stretches(slots: Tensor) -> list[tuple[slice, int]]:
    """Neighbouring rows whose selections are of similar size (within a factor of 16), and it.

    So that none is padded to the width of a much larger one. On a GPU, where looking would wait and
    launches cost more, all rows at once.
    """
    rows, _, width = slots.shape
    if slots.is_cuda or rows == 1 or width == 0:
        return [(slice(0, rows), width)]
    ends = torch.where(slots >= 0, _from_one(width), 0)  # of a row none behind the last
    used = ends.amax((1, 2)).tolist()
    found = []
    for _, members in itertools.groupby(range(rows), lambda row: _size_class(used[row])):
        stretch = list(members)
        most = max(used[row] for row in stretch)
        found.append((slice(stretch[0], stretch[-1] + 1), most))
    return found


def _size_class(chunks: int) -> int:
    return math.ceil(math.log(max(chunks, 1), 16))


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_slots: Tensor,
    value_slots: Tensor,
    lengths: Tensor,
    capacities: list[int],
    chunk_size: int,
    scale: float,
    apart: tuple[Tensor, Tensor | None] | None,
) -> tuple[Tensor, Tensor]:
    """`apart` is a buffer of values in fp8, and its scales, or of packed ones."""
    rows, q_heads, dim = query.shape
    heads, fixed = keys.shape[1], sum(capacities)
    grouped = query.view(rows, heads, q_heads // heads, dim)
    scores, unused = fixed_scores(query, keys, lengths, capacities)
    empty = key_slots < 0  # [R, Hk, N]
    if empty.shape[-1]:
        chosen = _gather(_behind(keys, fixed, chunk_size), key_slots).flatten(2, 3)
        selected = torch.matmul(grouped, chosen.transpose(2, 3)).float()
        if empty.is_cuda or bool(empty.any()):
            by_token = empty.repeat_interleave(chunk_size, -1)  # [R, Hk, N*c]
            selected = torch.where(by_token[:, :, None], float("-inf"), selected)
        scores = torch.cat((scores, selected), -1)
    if not scores.shape[-1]:
        nothing = scores.new_full((rows, q_heads), float("-inf"))
        return torch.zeros_like(query), nothing
    scores *= scale
    # Finite where a row attends nothing: its weights are then 0.
    highest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (highest + total.log())[..., 0]
    weights = weights.div_(total.clamp_min(torch.finfo(torch.float32).tiny)).to(values.dtype)
    held = values[:, :, :fixed]
    attended = None
    if empty.shape[-1]:
        buffer, scales = apart or (_behind(values, fixed, chunk_size), None)
        attended = _gather(buffer, value_slots)
        if scales is not None:
            by_chunk = scales.gather(2, value_slots.clamp_min(0).long())
            attended = dequantise(attended, by_chunk).to(values.dtype)
        elif apart is not None:
            attended = unpack(attended)
        attended = attended.flatten(2, 3)
    out = _weighted(weights, held, attended)
    # A weight of 0 does not hide what is not finite; on a GPU looking for it would wait.
    if out.is_cuda or not math.isfinite(float(out.sum())):
        held = held.masked_fill(unused[:, None, :, None], 0)
        if attended is not None:
            attended.unflatten(2, (-1, chunk_size)).masked_fill_(empty[..., None, None], 0)
        out = _weighted(weights, held, attended)
    return out.reshape(rows, q_heads, dim), lse.reshape(rows, q_heads)


def _weighted(weights: Tensor, held: Tensor, attended: Tensor | None) -> Tensor:
    """Sum values [R, Hk, F, D], and those behind them if there are any, by their weights."""
    fixed = held.shape[2]
    out = torch.matmul(weights[..., :fixed], held)
    return out if attended is None else out + torch.matmul(weights[..., fixed:], attended)


def _fake(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_slots: Tensor,
    value_slots: Tensor,
    lengths: Tensor,
    capacities: list[int],
    chunk_size: int,
    scale: float,
    value_buffer: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)


define(
    "sparse_attention(Tensor query, Tensor keys, Tensor values, Tensor key_slots, "
    "Tensor value_slots, Tensor lengths, int[] capacities, int chunk_size, float scale, "
    "Tensor? value_buffer=None, Tensor? value_scales=None) -> (Tensor, Tensor)",
    _reference,
    _fake,
)


def sparse_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_slots: Tensor,
    value_slots: Tensor,
    lengths: Tensor,
    capacities: list[int],
    chunk_size: int,
    scale: float,
    value_buffer: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over `[outliers | local | generated]` and the selected slots behind them.

    Args:
        query: [R, Hq, D].
        keys: [R, Hk, F + Bk * c, D]: a fixed part of F = sum(capacities) tokens, then slots.
        values: [R, Hk, F + Bv * c, D]: the same with slots of its own; with a `value_buffer`
            [R, Hk, F, D] suffices.
        key_slots, value_slots: int32 [R, Hk, N], slots of the selected chunks in the order of
            their ids (so that the sum does not depend on where they lie); -1 where there is none.
        lengths: int32 [R, 3], tokens in use of each section of the fixed part.
        capacities: tokens that each section of the fixed part holds.
        chunk_size: c.
        scale: of the logits.
        value_buffer: where the value slots lie instead of behind the fixed part, in fp8
            [R, Hk, Bv, c, D] or packed, uint8 [R, Hk, Bv, c, W] (`ops.packed`; beside bfloat16);
            each becomes the dtype of `values` as it is read.
        value_scales: float32 [R, Hk, Bv], of each slot in fp8.

    Returns:
        [R, Hq, D], and the log-sum-exp of the scaled logits, float32 [R, Hq]; zeros and minus
        infinity where nothing is attended.
    """
    arguments = (
        query,
        keys,
        values,
        key_slots,
        value_slots,
        lengths,
        capacities,
        chunk_size,
        scale,
        value_buffer,
        value_scales,
    )
    group = query.shape[1] // keys.shape[1]
    if not compiled.serves(query, query.shape[-1], group=group, sections=len(capacities)):
        return _reference(*arguments)
    return torch.ops.shadowkv.sparse_attention(*arguments)
