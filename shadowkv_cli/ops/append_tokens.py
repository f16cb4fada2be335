"""Put the keys and values of a step's tokens where attention reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.ops.library import check, define


def _check(name: str, vectors: Tensor, planes: Tensor, plane: Tensor, place: Tensor) -> None:
    op, wanted = "append_tokens", [*vectors.shape[1:]]
    check(
        vectors.dim() == 3 and planes.dim() == 4 and [*planes.shape[1::2]] == wanted,
        op,
        f"{name}s must be [P, Hk, S, D] for a {name} of {list(vectors.shape)}, "
        f"got {list(planes.shape)}",
    )
    for index, table in (("plane", plane), ("place", place)):
        check(
            table.shape == vectors.shape[:1],
            op,
            f"{index} must be [{vectors.shape[0]}], got {list(table.shape)}",
        )


def _reference(
    key: Tensor, value: Tensor, plane: Tensor, place: Tensor, keys: Tensor, values: Tensor
) -> None:
    _check("key", key, keys, plane, place)
    _check("value", value, values, plane, place)
    keys[plane.long(), :, place.long()] = key
    values[plane.long(), :, place.long()] = value


def _fake(
    key: Tensor, value: Tensor, plane: Tensor, place: Tensor, keys: Tensor, values: Tensor
) -> None:
    return None


define(
    "append_tokens(Tensor key, Tensor value, Tensor plane, Tensor place, Tensor(a!) keys, "
    "Tensor(b!) values) -> ()",
    _reference,
    _fake,
)


def append_tokens(
    key: Tensor, value: Tensor, plane: Tensor, place: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Copy one token a row to its place in its plane: keys[plane[r], :, place[r]] = key[r].

    Args:
        key, value: [R, Hk, D].
        plane: int32 [R], of P.
        place: int32 [R], of S; no two rows share a place of a plane.
        keys, values: [P, Hk, S, D], changed in place; S may differ.

    Raises:
        ValueError: shapes that do not belong together.
        IndexError: a plane or place beyond the last; the compiled kernel passes over such a row.
    """
    torch.ops.shadowkv.append_tokens(key, value, plane, place, keys, values)
