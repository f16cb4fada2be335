"""KV methods: `build_groups` makes the groups of a batch from its rows."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from shadowkv_cli.config import SparseSpec
from shadowkv_cli.layout import layout
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


def build_groups(
    rows: Sequence[Row], store: PromptStore, new_tokens: int, *, merge_cells: bool = True
) -> list[tuple[list[int], Group]]:
    """Sort rows into groups of one layout each, or of one cell each if cells are not to be merged.

    On a CPU the rows of a group stand in the order of how many chunks they select, so that
    attention finds those beside each other which can be padded to one width.

    Returns the groups, each with the places of its rows in `rows`.
    """

    def selected(place: int) -> int:
        spec = rows[place].spec
        if not isinstance(spec, SparseSpec):
            return 0
        return spec.keeps(store.prompt_tokens).selected_chunks

    places: dict[object, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(layout(row.spec) if merge_cells else row.spec, []).append(place)
    groups = []
    for of_group in places.values():
        if store.device.type == "cpu":
            of_group.sort(key=selected)
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
]
