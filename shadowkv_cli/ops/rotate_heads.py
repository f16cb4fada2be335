"""Rotary position embedding of a layer's queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.ops import compiled
from shadowkv_cli.ops.library import check, define
from shadowkv_cli.ops.rotary import rotate


def _check(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    op = "rotate_heads"
    check(query.dim() == 4, op, f"query must be [R, Hq, T, D], got {list(query.shape)}")
    rows, _, tokens, dim = query.shape
    check(
        key.dim() == 4 and (key.shape[0], *key.shape[2:]) == (rows, tokens, dim),
        op,
        f"key must be [{rows}, *, {tokens}, {dim}], got {list(key.shape)}",
    )
    for name, table in (("cos", cos), ("sin", sin)):
        good = table.dim() == 3 and table.shape[0] in (1, rows) and table.shape[1] == tokens
        check(
            good and table.shape[2] % 2 == 0 and table.shape[2] <= dim,
            op,
            f"{name} must be [{rows} or 1, {tokens}, an even number up to {dim}], "
            f"got {list(table.shape)}",
        )
    check(cos.shape[2] == sin.shape[2], op, f"cos is {list(cos.shape)}, sin {list(sin.shape)}")


def _reference(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    _check(query, key, cos, sin)
    pairs = cos.shape[-1] // 2
    tables = (cos[:, None, :, :pairs], sin[:, None, :, :pairs])
    turned_query, turned_key = (
        rotate(x, *tables, interleaved).to(x.dtype).contiguous() for x in (query, key)
    )
    return turned_query, turned_key


def _fake(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


define(
    "rotate_heads(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved) "
    "-> (Tensor, Tensor)",
    _reference,
    _fake,
)


def _reference_in_place(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> None:
    for x, turned in zip((query, key), _reference(query, key, cos, sin, interleaved), strict=True):
        x.copy_(turned)


def _fake_in_place(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    return None


define(
    "rotate_heads_(Tensor(a!) query, Tensor(b!) key, Tensor cos, Tensor sin, bool interleaved) "
    "-> ()",
    _reference_in_place,
    _fake_in_place,
)


def rotate_heads(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions, in float32 and rounded once.

    Args:
        query: [R, Hq, T, D], usually a transposed view of a matrix product's output.
        key: [R, Hk, T, D].
        cos, sin: [R or 1, T, D'], as the rotary module of a model of transformers returns them, in
            the query's dtype. Only the first half is read, an entry a pair. The dimensions from D'
            on pass.
        interleaved: the pairing, as in `rotary.rotate`.

    Returns:
        Query and key, rotated and contiguous.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if not compiled.serves_any_size(query):
        return _reference(query, key, cos, sin, interleaved)
    return torch.ops.shadowkv.rotate_heads(query, key, cos, sin, interleaved)


def rotate_heads_(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """The same in place: query and key are changed, and may be any views of distinct elements."""
    if compiled.serves_any_size(query):
        torch.ops.shadowkv.rotate_heads_(query, key, cos, sin, interleaved)
    else:
        _reference_in_place(query, key, cos, sin, interleaved)
