"""Rebuild the post-RoPE keys of missing chunks from their low-rank form."""

from __future__ import annotations

import itertools
import operator

import torch
from torch import Tensor

from shadowkv_cli.ops import compiled
from shadowkv_cli.ops.chunk_rows import gather_chunks
from shadowkv_cli.ops.library import check, define
from shadowkv_cli.ops.misses import missing_chunks
from shadowkv_cli.ops.rotary import rotate

Factor = tuple[int, int]
"""Prompt and rank of a row: which basis its coefficients are multiplied with, and how far."""


def _chunks(tokens: Tensor, chunk_size: int) -> Tensor:
    """View [P, S, E] as chunks [P, C, c, E]; a remainder is left out."""
    whole = tokens.shape[1] // chunk_size * chunk_size
    return tokens[:, :whole].unflatten(1, (-1, chunk_size))


def _factors(prompt_index: Tensor, rank: Tensor, columns: int) -> list[Factor]:
    """What each row multiplies."""
    pairs = zip(prompt_index.tolist(), rank.tolist(), strict=True)
    return [(prompt, min(wanted, columns)) for prompt, wanted in pairs]


def _multiply(kept: Tensor, basis: Tensor, factors: list[Factor], counts: list[int]) -> Tensor:
    """Multiply chunks [M, c, r] with their bases: [M, c, D]; one product a prompt, rank and head.

    Args:
        kept: the chunks, ordered by head, and under it by row.
        factors: of each row, in the same order.
        counts: chunks of every head and, under it, every row.
    """
    heads, dim = basis.shape[1], basis.shape[-1]
    keys = kept.new_empty(*kept.shape[:2], dim)
    flat, out = kept.flatten(0, 1), keys.flatten(0, 1)
    each = zip(itertools.product(range(heads), factors), counts, strict=True)
    start = 0
    for (head, (prompt, rank)), group in itertools.groupby(each, key=operator.itemgetter(0)):
        end = start + sum(count for _, count in group) * kept.shape[1]
        if end > start:
            torch.mm(flat[start:end, :rank], basis[prompt, head, :rank], out=out[start:end])
        start = end
    return keys


def _reference(
    coefficients: Tensor,
    basis: Tensor,
    prompt_index: Tensor,
    rank: Tensor,
    ids: Tensor,
    slots: Tensor,
    misses: Tensor,
    miss_counts: Tensor,
    cos: Tensor,
    sin: Tensor,
    table_index: Tensor,
    interleaved: bool,
    buffer: Tensor,
) -> None:
    chunk_size, columns = buffer.shape[3], coefficients.shape[-1]
    check(
        coefficients.dtype == buffer.dtype,
        "rebuild_keys",
        f"coefficients must be {buffer.dtype}, not {coefficients.dtype}",
    )
    check(
        basis.shape[2] == columns,
        "rebuild_keys",
        f"basis has {basis.shape[2]} rows, coefficients {columns} columns",
    )
    factors = _factors(prompt_index, rank, columns)
    lists = [x.transpose(0, 1) for x in (misses, ids, slots, miss_counts)]
    order = sorted(range(len(factors)), key=factors.__getitem__)
    rows = torch.tensor(order, device=ids.device)
    if factors != (factors := [factors[row] for row in order]):
        lists = [x.index_select(1, rows) for x in lists]
    head, row, chunk, slot = missing_chunks(*lists[:3])
    if not head.numel():
        return
    row = rows.index_select(0, row)
    prompt = prompt_index.long().index_select(0, row)
    kept = gather_chunks(_chunks(coefficients, chunk_size), prompt, chunk)  # [M, c, r]
    keys = _multiply(kept, basis, factors, lists[3].flatten().tolist())
    table = table_index.long().index_select(0, prompt)
    cosine, sine = (gather_chunks(_chunks(t, chunk_size), table, chunk) for t in (cos, sin))
    turned = rotate(keys, cosine, sine, interleaved)
    buffer[row, head, slot] = turned.to(buffer.dtype)


def _fake(
    coefficients: Tensor,
    basis: Tensor,
    prompt_index: Tensor,
    rank: Tensor,
    ids: Tensor,
    slots: Tensor,
    misses: Tensor,
    miss_counts: Tensor,
    cos: Tensor,
    sin: Tensor,
    table_index: Tensor,
    interleaved: bool,
    buffer: Tensor,
) -> None:
    return None


define(
    "rebuild_keys(Tensor coefficients, Tensor basis, Tensor prompt_index, Tensor rank, Tensor ids, "
    "Tensor slots, Tensor misses, Tensor miss_counts, Tensor cos, Tensor sin, Tensor table_index, "
    "bool interleaved, Tensor(a!) buffer) -> ()",
    _reference,
    _fake,
)


def rebuild_keys(
    coefficients: Tensor,
    basis: Tensor,
    prompt_index: Tensor,
    rank: Tensor,
    ids: Tensor,
    slots: Tensor,
    misses: Tensor,
    miss_counts: Tensor,
    cos: Tensor,
    sin: Tensor,
    table_index: Tensor,
    interleaved: bool,
    buffer: Tensor,
) -> None:
    """Multiply coefficients and basis, rotate, and put the keys of missing chunks into their slots.

    Args:
        coefficients: [P, S, r], A of the factorisation A B of the pre-RoPE keys (paper, section 4).
        basis: [P, Hk, r, D], B.
        prompt_index: int32 [R].
        rank: int32 [R], columns that a row uses; the first so many of r.
        ids, slots, misses, miss_counts: as in `fetch_values`.
        cos, sin: [T, S', D' / 2], rotary tables; D' dimensions of D are rotated.
        table_index: int32 [P], the table of each prompt.
        interleaved: the pairing, as in `rotary.rotate`.
        buffer: [R, Hk, B, c, D], changed in place.
    """
    arguments = (
        coefficients,
        basis,
        prompt_index,
        rank,
        ids,
        slots,
        misses,
        miss_counts,
        cos,
        sin,
        table_index,
        interleaved,
        buffer,
    )
    if compiled.serves(buffer, buffer.shape[-1]):
        torch.ops.shadowkv.rebuild_keys(*arguments)
    else:
        _reference(*arguments)
