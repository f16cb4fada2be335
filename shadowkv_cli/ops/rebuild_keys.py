"""Rebuild the post-RoPE keys of missing chunks from their low-rank form."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.ops import compiled
from shadowkv_cli.ops.chunk_rows import gather_chunks
from shadowkv_cli.ops.library import check, define
from shadowkv_cli.ops.misses import missing_places
from shadowkv_cli.ops.rotary import rotate


def _chunks(tokens: Tensor, chunk_size: int) -> Tensor:
    """View [P, S, E] as chunks [P, C, c, E]; a remainder is left out."""
    whole = tokens.shape[1] // chunk_size * chunk_size
    return tokens[:, :whole].unflatten(1, (-1, chunk_size))


def _multiply_by_head(kept: Tensor, basis: Tensor, head: Tensor, counts: Tensor) -> Tensor:
    """Multiply chunks [M, c, r], ordered by head, with their heads' bases [Hk, r, D]: [M, c, D].

    All heads in one batch, those with fewer chunks padded.
    """
    most = int(counts.max())
    starts = counts.cumsum(0) - counts
    place = head * most + torch.arange(head.numel(), device=head.device) - starts[head]
    padded = kept.new_zeros(basis.shape[0] * most, *kept.shape[1:])
    padded[place] = kept
    product = torch.bmm(padded.view(basis.shape[0], -1, kept.shape[2]), basis)
    return product.view(padded.shape[0], kept.shape[1], -1).index_select(0, place)


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
        basis.shape[2] == columns,
        "rebuild_keys",
        f"basis has {basis.shape[2]} rows, coefficients {columns} columns",
    )
    head, row, place = missing_places(misses.transpose(0, 1))
    if not row.numel():
        return
    prompt, chunk = prompt_index[row].long(), ids[row, head, place].long()
    kept = gather_chunks(_chunks(coefficients, chunk_size), prompt, chunk)  # [M, c, r]
    if not bool((rank == columns).all()):
        beyond = torch.arange(columns, device=ids.device) >= rank[row][:, None]
        kept.masked_fill_(beyond[:, None], 0)
    if basis.shape[0] == 1:
        keys = _multiply_by_head(kept, basis[0], head, miss_counts.sum(0))
    else:
        keys = torch.bmm(kept, basis[prompt, head])
    table = table_index[prompt].long()
    cosine, sine = (gather_chunks(_chunks(t, chunk_size), table, chunk) for t in (cos, sin))
    turned = rotate(keys, cosine, sine, interleaved)
    buffer[row, head, slots[row, head, place].long()] = turned.to(buffer.dtype)


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
