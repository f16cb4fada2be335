"""Random arguments of every op, unequal rows included: for tests, benchmarks and users' checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shadowkv_cli.config import packed_width
from shadowkv_cli.ops import layer_cases
from shadowkv_cli.ops.await_rows import SELECT_PARTS
from shadowkv_cli.ops.fp8 import FP8, quantise
from shadowkv_cli.ops.misses import list_misses
from shadowkv_cli.ops.packed import NAN_BYTE, pack
from shadowkv_cli.ops.sizes import Arguments, Sizes


def selection(s: Sizes, g: torch.Generator, among: int) -> Tensor:
    """Ascending unique ids [R, Hk, N] below `among`, then -1; row 0 has all, the last row none."""
    order = torch.rand(s.rows, s.heads, among, generator=g, device=s.device)
    ids = order.argsort(-1)[..., : s.wanted].sort(-1).values
    counts = s.ints(g, 0, s.wanted, s.rows, s.heads)
    if s.poison:
        counts[0] = s.wanted
        counts[1:][-1:] = 0
    place = torch.arange(s.wanted, device=s.device)
    return ids.masked_fill(place >= counts[..., None], -1).to(torch.int32)


def slots_for(s: Sizes, g: torch.Generator, ids: Tensor) -> Tensor:
    """Distinct slots in any order for the ids there are, int32 [R, Hk, N]."""
    order = torch.rand(s.rows, s.heads, s.slots, generator=g, device=s.device)
    slots = order.argsort(-1)[..., : s.wanted]
    return slots.masked_fill(ids < 0, -1).to(torch.int32)


def misses_of(s: Sizes, g: torch.Generator, ids: Tensor, share: float = 0.6) -> Arguments:
    """All chunks of row 0, none of row 1 where there are more than two."""
    drawn = torch.rand(ids.shape, generator=g, device=s.device) < share
    if s.poison:
        drawn[0] = True
        if s.rows > 2:
            drawn[1] = False
    misses, counts = list_misses(drawn & (ids >= 0))
    return {"misses": misses, "miss_counts": counts}


def empty_buffer(s: Sizes) -> Tensor:
    """NaN [R, Hk, B, c, D], a view behind the fixed part of an address space."""
    size = (s.rows, s.heads, sum(s.fixed) + s.slots * s.chunk_size, s.dim)
    space = torch.full(size, math.nan, dtype=s.dtype, device=s.device)
    return space[:, :, sum(s.fixed) :].unflatten(2, (-1, s.chunk_size))


def empty_in_fp8(s: Sizes) -> tuple[Tensor, Tensor]:
    """NaN of a buffer of values in fp8 [R, Hk, B, c, D], and of its scales [R, Hk, B]."""
    scales = torch.full((s.rows, s.heads, s.slots), math.nan, device=s.device)
    chunks = scales[..., None, None].expand(-1, -1, -1, s.chunk_size, s.dim)
    return chunks.contiguous().to(FP8), scales


def empty_packed(s: Sizes) -> Tensor:
    """NaN of a buffer of packed values, uint8 [R, Hk, B, c, W]."""
    size = (s.rows, s.heads, s.slots, s.chunk_size, packed_width(s.dim))
    return torch.full(size, NAN_BYTE, dtype=torch.uint8, device=s.device)


def landmark_arguments(s: Sizes) -> Arguments:
    keys = s.normal(s.generator(), s.tokens + s.chunk_size - 1, s.heads, s.dim)
    return {
        "keys": keys.transpose(0, 1),
        "chunk_size": s.chunk_size,
        "per_chunk": s.landmarks,
    }


def select_arguments(s: Sizes) -> Arguments:
    g = s.generator()
    landmarks = s.normal(g, s.prompts, s.heads, s.chunks, s.landmarks, s.dim)
    num = s.ints(g, 0, s.chunks, s.rows)
    excluded = torch.rand(s.rows, s.heads, s.chunks, generator=g, device=s.device) < 0.2
    if s.poison:
        num[0] = s.chunks
        excluded[0, 0, : s.chunks // 2] = True
        excluded[1:][-1:] = True
        landmarks[:, :, s.chunks - 1] = math.nan
        excluded[:, :, s.chunks - 1] = True
    scales: Tensor | None = None
    if s.fp8:
        landmarks, scales = quantise(landmarks, 1)
    if s.packed:
        landmarks = pack(landmarks)
    return {
        "query": s.normal(g, s.rows, s.heads * s.group, s.dim),
        "landmarks": landmarks,
        "landmark_scales": scales,
        "prompt_index": s.prompt_index(g),
        "num_chunks": num,
        "excluded": excluded,
        "budget_chunks": s.ints(g, 0, s.wanted, s.rows),
        "max_chunks": s.wanted,
        "scale": s.dim**-0.5,
        "done": torch.zeros(s.rows, dtype=torch.int32, device=s.device),
        "begun": None,
    }


def await_arguments(s: Sizes) -> Arguments:
    parts = SELECT_PARTS * s.heads
    return {
        "done": torch.full((s.rows,), parts, dtype=torch.int32, device=s.device),
        "parts": parts,
    }


def residency_arguments(s: Sizes, step: int = 1) -> Arguments:
    g = s.generator()

    def table(size: int) -> Tensor:
        return torch.full((s.rows, s.heads, size), -1, dtype=torch.int32, device=s.device)

    return {
        "ids": selection(s, g, s.chunks),
        "step": torch.full((s.rows,), step, dtype=torch.int32, device=s.device),
        "chunk_of_slot": table(s.slots),
        "last_used": table(s.slots),
        "slot_of_chunk": table(s.chunks),
    }


def fetch_arguments(s: Sizes, *, pinned: bool = False, share: float = 0.6) -> Arguments:
    g = s.generator()
    values = s.normal(g, s.prompts, s.heads, s.tokens + 5, s.dim)
    scales: Tensor | None = None
    if s.fp8:
        rounded, scales = quantise(values[:, :, : s.tokens].unflatten(2, (-1, s.chunk_size)), 2)
        values = values.to(FP8)
        values[:, :, : s.tokens] = rounded.flatten(2, 3)
    if s.packed:
        values = pack(values)
    if pinned:
        values = values.cpu().pin_memory()
    ids = selection(s, g, s.chunks)
    empty = empty_packed if s.packed else empty_buffer
    buffer, buffer_scales = empty_in_fp8(s) if s.fp8 else (empty(s), None)
    return {
        "values": values[:, :, : s.tokens].unflatten(2, (-1, s.chunk_size)),
        "scales": scales,
        "prompt_index": s.prompt_index(g),
        "ids": ids,
        "slots": slots_for(s, g, ids),
        **misses_of(s, g, ids, share),
        "buffer": buffer,
        "buffer_scales": buffer_scales,
    }


def rebuild_arguments(s: Sizes, share: float = 0.6) -> Arguments:
    g = s.generator()
    coefficients = s.normal(g, s.prompts, s.tokens, s.rank + s.spare)
    basis = s.normal(g, s.prompts, s.heads, s.rank + s.spare, s.dim) * s.rank**-0.5
    rank = s.ints(g, 1, s.rank, s.rows)
    if s.poison:
        coefficients[..., int(rank.max()) :] = math.nan
        basis[:, :, s.rank :] = math.nan
    angle = torch.rand(2, s.tokens + 3, 2 * s.pairs, generator=g, device=s.device) * 6
    ids = selection(s, g, s.chunks)
    return {
        "coefficients": coefficients[..., : s.rank],
        "basis": basis[:, :, : s.rank],
        "prompt_index": s.prompt_index(g),
        "rank": rank,
        "ids": ids,
        "slots": slots_for(s, g, ids),
        **misses_of(s, g, ids, share),
        "cos": angle.cos().to(s.dtype)[..., : s.pairs],
        "sin": angle.sin().to(s.dtype)[..., : s.pairs],
        "table_index": s.ints(g, 0, 1, s.prompts),
        "interleaved": s.interleaved,
        "buffer": empty_buffer(s),
    }


def full_arguments(s: Sizes) -> Arguments:
    g = s.generator()
    lengths = s.ints(g, 0, s.tokens, s.rows)
    if s.poison:
        lengths[0] = s.tokens
        lengths[1:][-1:] = 0
        lengths[2:][:1] = 1
    keys, values = (s.normal(g, s.prompts, s.heads, s.tokens + 3, s.dim) for _ in range(2))
    if s.poison:
        keys[:, :, s.tokens :] = math.nan
        values[:, :, s.tokens :] = math.nan
    return {
        "query": s.normal(g, s.rows, s.heads * s.group, s.dim),
        "keys": keys,
        "values": values,
        "prompt_index": s.prompt_index(g),
        "lengths": lengths,
        "scale": s.dim**-0.5,
    }


def sparse_arguments(s: Sizes) -> Arguments:
    g = s.generator()
    fixed, size = sum(s.fixed), (s.rows, s.heads, sum(s.fixed) + s.slots * s.chunk_size, s.dim)
    ids = selection(s, g, s.chunks)
    slots = [slots_for(s, g, ids) for _ in range(2)]
    capacities = torch.tensor(s.fixed, device=s.device)
    lengths = s.ints(g, 0, 1 << 20, s.rows, len(s.fixed)) % (capacities + 1)
    if not s.poison:
        lengths = capacities.expand(s.rows, -1)
    lengths[1:][-1:] = 0
    spaces = []
    for places in slots:
        space = s.normal(g, *size)
        if s.poison:
            unused = torch.ones(size[:3], dtype=torch.bool, device=s.device)
            start = 0
            for section, capacity in enumerate(s.fixed):
                place = torch.arange(capacity, device=s.device)
                unused[:, :, start : start + capacity] = (place >= lengths[:, section, None])[
                    :, None
                ]
                start += capacity
            for r, h, n in (places >= 0).nonzero().tolist():
                first = fixed + int(places[r, h, n]) * s.chunk_size
                unused[r, h, first : first + s.chunk_size] = False
            space.masked_fill_(unused[..., None], math.nan)
        spaces.append(space)
    apart: Arguments = {"value_buffer": None, "value_scales": None}
    if s.fp8 or s.packed:
        buffer = spaces[1][:, :, fixed:].unflatten(2, (-1, s.chunk_size))
        unwritten = buffer.isnan().all(-1).all(-1)
        spaces[1] = spaces[1][:, :, :fixed]
    if s.fp8:
        rounded, scales = quantise(buffer.nan_to_num(), 2)
        rounded.view(torch.uint8)[unwritten] = 0x7F  # NaN
        apart = {"value_buffer": rounded, "value_scales": scales.masked_fill(unwritten, math.nan)}
    if s.packed:
        packed = pack(buffer.nan_to_num())
        packed[unwritten] = NAN_BYTE
        apart["value_buffer"] = packed
    return {
        "query": s.normal(g, s.rows, s.heads * s.group, s.dim),
        "keys": spaces[0],
        "values": spaces[1],
        "key_slots": slots[0],
        "value_slots": slots[1],
        "lengths": lengths.to(torch.int32).contiguous(),
        "capacities": list(s.fixed),
        "chunk_size": s.chunk_size,
        "scale": s.dim**-0.5,
        **apart,
    }


ARGUMENTS = {
    "append_tokens": layer_cases.append_arguments,
    "await_rows": await_arguments,
    "build_landmarks": landmark_arguments,
    "fetch_values": fetch_arguments,
    "full_attention": full_arguments,
    "gated_silu": layer_cases.gate_arguments,
    "rebuild_keys": rebuild_arguments,
    "rms_norm": layer_cases.norm_arguments,
    "rotate_heads": layer_cases.rotate_arguments,
    "rotate_heads_": layer_cases.rotate_arguments,
    "select_chunks": select_arguments,
    "sparse_attention": sparse_arguments,
    "update_residency": residency_arguments,
}
