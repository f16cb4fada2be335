"""KV methods: `build_groups` makes the groups of a batch from its rows."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from shadowkv_cli.config import MethodSpec, ShadowKVSpec, SparseSpec
from shadowkv_cli.methods.base import Group, Row
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
        key += (spec.landmarks_per_chunk, spec.value_placement)
    return key


def build_groups(
    rows: Sequence[Row], store: PromptStore, new_tokens: int, *, merge_cells: bool = True
) -> list[tuple[list[int], Group]]:
    """Sort rows into groups of one layout each, or of one cell each if cells are not to be merged.

    Returns the groups, each with the places of its rows in `rows`.
    """
    places: dict[object, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(layout(row.spec) if merge_cells else row.spec, []).append(place)
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
    "build_groups",
    "layout",
]
