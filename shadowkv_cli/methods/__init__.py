"""KV methods: `build_groups` makes the groups of a batch from its rows."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence

from shadowkv_cli.config import MethodSpec, ShadowKVSpec, SparseSpec
from shadowkv_cli.methods.base import Group, Row, as_index
from shadowkv_cli.methods.store import Prompt, PromptStore, RotaryTables

GROUPS: dict[str, tuple[str, str]] = {
    "full": ("full", "FullGroup"),
    "shadowkv": ("shadowkv", "ShadowKVGroup"),
    "oracle": ("oracle", "OracleGroup"),
    "random": ("random", "RandomGroup"),
    "streaming": ("streaming", "StreamingGroup"),
}
"""Module and class of each method, imported when it is first used."""


def layout(spec: MethodSpec) -> tuple[object, ...]:
    """What rows of one group must have in common."""
    key: tuple[object, ...] = (spec.name,)
    if isinstance(spec, SparseSpec):
        key += (spec.chunk_size,)
    if isinstance(spec, ShadowKVSpec):
        key += (spec.landmarks_per_chunk, spec.landmark_dtype)
        key += (spec.value_dtype, spec.value_placement, spec.resident_layers)
    return key


def build_groups(
    rows: Sequence[Row], store: PromptStore, new_tokens: int, *, merge_cells: bool = True
) -> list[tuple[list[int], Group]]:
    """Sort rows into groups of one layout each, or of one cell each if cells are not to be merged.

    On a CPU a group's cells also select a similar number of chunks (within a factor of 16), since
    all are padded to the largest; on a GPU the launches of one more group cost more than that.

    Returns the groups, each with the places of its rows in `rows`.
    """

    def key(spec: MethodSpec) -> object:
        if not merge_cells:
            return spec
        if isinstance(spec, SparseSpec) and store.device.type == "cpu":
            chunks = spec.keeps(store.prompt_tokens).selected_chunks
            return (*layout(spec), math.ceil(math.log(max(chunks, 1), 16)))
        return layout(spec)

    places: dict[object, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(key(row.spec), []).append(place)
    groups = []
    for of_group in places.values():
        module, name = GROUPS[rows[of_group[0]].spec.name]
        group = getattr(importlib.import_module(f"shadowkv_cli.methods.{module}"), name)
        groups.append((of_group, group([rows[i] for i in of_group], store, new_tokens)))
    return groups


__all__ = [
    "GROUPS",
    "Group",
    "Prompt",
    "PromptStore",
    "RotaryTables",
    "Row",
    "as_index",
    "build_groups",
    "layout",
]
