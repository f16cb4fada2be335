"""What cells hold together is what their tensors take."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import pytest
import torch

from shadowkv_cli.cells import build_specs
from shadowkv_cli.config import ModelShape
from shadowkv_cli.methods import PromptStore, Row, build_groups
from shadowkv_cli.shared_bytes import shared_cache_bytes

SHAPE = ModelShape(2, 4, 2, 64, 4)
TOKENS, NEW = 4096, 8
CELLS = {
    "one": ["shadowkv:sparse_budget=512"],
    "two budgets": ["shadowkv:sparse_budget=64", "shadowkv:sparse_budget=1024"],
    "two buffers": [
        "shadowkv:sparse_budget=512",
        "shadowkv:sparse_budget=512,value_buffer=2,key_buffer=2",
        "shadowkv:sparse_budget=512,value_buffer=2,key_buffer=1",
    ],
    "other methods": ["full", "oracle:sparse_budget=64", "oracle:sparse_budget=1024", "shadowkv"],
}


def storages(held: object) -> dict[int, int]:
    """Bytes of all tensors that something holds, by address."""
    if isinstance(held, torch.Tensor):
        storage = held.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    parts: list[object] = []
    if isinstance(held, dict):
        parts = list(held.values())
    elif isinstance(held, list | tuple):
        parts = list(held)
    elif is_dataclass(held):
        parts = [getattr(held, field.name) for field in fields(held)]
    return {address: size for part in parts for address, size in storages(part).items()}


@pytest.mark.parametrize("cells", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("merge_cells", [True, False])
def test_cells_hold_what_was_counted(cells: list[str], merge_cells: bool) -> None:
    specs = build_specs(cells, {"outlier_chunks": "4"})
    store = PromptStore(
        SHAPE, specs, num_prompts=1, prompt_tokens=TOKENS, new_tokens=NEW,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    rows = [Row(spec, 0) for spec in specs]
    groups = build_groups(rows, store, NEW, merge_cells=merge_cells)
    found = storages([vars(store), vars(store.value_store)])
    for _, group in groups:
        found |= storages(vars(group))
    counted = shared_cache_bytes(specs, SHAPE, TOKENS, NEW, merge_cells=merge_cells)
    # Not counted: what is left of a chunk behind the last whole one, counters, and the slot tables
    # of methods that are only compared with.
    assert 0.975 < (counted.device + counted.host) / sum(found.values()) <= 1
