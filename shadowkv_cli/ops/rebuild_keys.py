"""Rebuild the post-RoPE keys of missing chunks from their low-rank form."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.ops.library import check, define
from shadowkv_cli.ops.rotary import rotate


def _chunks(tokens: Tensor, chunk_size: int) -> Tensor:
    """View [P, S, E] as chunks [P, C, c, E]; a remainder is left out."""
    whole = tokens.shape[1] // chunk_size * chunk_size
    return tokens[:, :whole].unflatten(1, (-1, chunk_size))


def _reference(
    coefficients: Tensor,
    basis: Tensor,
    prompt_index: Tensor,
    rank: Tensor,
    ids: Tensor,
    slots: Tensor,
    misses: Tensor,
    cos: Tensor,
    sin: Tensor,
    table_index: Tensor,
    interleaved: bool,
    buffer: Tensor,
) -> None:
    chunk_size, columns = buffer.shape[3], coefficients.shape[-1]
    check(
        basis.shape[2] == columns,
        "rebuild_keys",
        f"basis has {basis.shape[2]} rows, coefficients {columns} columns",
    )
    # By head, so that each head's basis is multiplied once.
    head, row, place = misses.transpose(0, 1).nonzero(as_tuple=True)
    prompt, chunk = prompt_index[row].long(), ids[row, head, place].long()
    kept = _chunks(coefficients, chunk_size)[prompt, chunk]  # [M, c, r]
    if not bool((rank == columns).all()):
        beyond = torch.arange(columns, device=ids.device) >= rank[row][:, None]
        kept = kept.masked_fill(beyond[:, None], 0)
    keys = kept.new_empty(*kept.shape[:2], basis.shape[-1])
    start = 0
    for h, count in enumerate(misses.sum((0, 2)).tolist()):
        part = slice(start, start + count)
        if basis.shape[0] == 1:
            keys[part] = kept[part] @ basis[0, h]
        else:
            keys[part] = torch.bmm(kept[part], basis[prompt[part], h])
        start += count
    table = table_index[prompt].long()
    turned = rotate(
        keys,
        _chunks(cos, chunk_size)[table, chunk],
        _chunks(sin, chunk_size)[table, chunk],
        interleaved,
    )
    buffer[row, head, slots[row, head, place].long()] = turned.to(buffer.dtype)


def _fake(
    coefficients: Tensor,
    basis: Tensor,
    prompt_index: Tensor,
    rank: Tensor,
    ids: Tensor,
    slots: Tensor,
    misses: Tensor,
    cos: Tensor,
    sin: Tensor,
    table_index: Tensor,
    interleaved: bool,
    buffer: Tensor,
) -> None:
    return None


define(
    "rebuild_keys(Tensor coefficients, Tensor basis, Tensor prompt_index, Tensor rank, Tensor ids, "
    "Tensor slots, Tensor misses, Tensor cos, Tensor sin, Tensor table_index, bool interleaved, "
    "Tensor(a!) buffer) -> ()",
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
        ids, slots, misses: [R, Hk, N] as in `fetch_values`.
        cos, sin: [T, S', D' / 2], rotary tables; D' dimensions of D are rotated.
        table_index: int32 [P], the table of each prompt.
        interleaved: the pairing, as in `rotary.rotate`.
        buffer: [R, Hk, B, c, D], changed in place.
    """
    torch.ops.shadowkv.rebuild_keys(
        coefficients,
        basis,
        prompt_index,
        rank,
        ids,
        slots,
        misses,
        cos,
        sin,
        table_index,
        interleaved,
        buffer,
    )
