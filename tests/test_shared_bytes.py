"""What cells hold together is what their tensors take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass

import pytest
import torch

from shadowkv_cli.cells import build_specs
from shadowkv_cli.config import CacheBytes, MethodSpec, ModelShape, ShadowKVSpec
from shadowkv_cli.methods import PromptStore, Row, build_groups
from shadowkv_cli.methods.shadowkv import ShadowKVGroup
from shadowkv_cli.shared_bytes import _own_bytes, shared_cache_bytes

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
    "in 8 bits on the host": [
        f"shadowkv:sparse_budget={budget},value_dtype=fp8,landmark_dtype=fp8,value_placement=host"
        for budget in (64, 512)
    ],
    "packed": [
        f"shadowkv:sparse_budget={budget},value_dtype=packed,value_placement={place},value_buffer=2"
        for budget, place in ((64, "host"), (512, "host"), (512, "device"))
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


def own_bytes(group: ShadowKVGroup) -> int:
    """Of slot tables and buffers behind the fixed part, a layer."""
    tables = storages([group.key_tables[0], group.value_tables[0]])
    buffers = [group.keys[0], group.values[0], *group.value_buffers[:1], *group.value_scales[:1]]
    fixed = 2 * len(group.rows) * group.fixed * SHAPE.key_width * SHAPE.element_bytes
    return sum(tables.values()) + sum(tensor.nbytes for tensor in buffers) - fixed


def counted_of(specs: Sequence[MethodSpec]) -> int:
    """The same as it is counted, a cell: without which chunks are never selected."""
    shadow = [spec for spec in specs if isinstance(spec, ShadowKVSpec)]
    fixed = max(spec.keeps(TOKENS).outlier_tokens for spec in shadow)
    fixed += max(spec.keeps(TOKENS).local_tokens for spec in shadow) + NEW
    own = _own_bytes(shadow, SHAPE, TOKENS, NEW)
    own -= SHAPE.num_kv_heads * TOKENS // shadow[0].chunk_size
    return own - 2 * fixed * SHAPE.key_width * SHAPE.element_bytes


def test_full_attention_answers_for_cells_that_are_dense() -> None:
    full, sparse, dense = build_specs(
        ["full", "shadowkv:sparse_budget=512", f"shadowkv:sparse_budget={TOKENS}"], {}
    )
    assert dense.is_dense(TOKENS)
    assert not sparse.is_dense(TOKENS)

    def counted(*specs: MethodSpec) -> CacheBytes:
        return shared_cache_bytes(specs, SHAPE, TOKENS, NEW)

    assert counted(sparse, dense) == counted(full, sparse) == counted(full, sparse, dense)
    assert counted(dense) == counted(full)


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
    for _, group in groups:
        if isinstance(group, ShadowKVGroup):
            of_group = [row.spec for row in group.rows]
            assert own_bytes(group) == len(of_group) * counted_of(of_group)
    # Not counted: what is left of a chunk behind the last whole one, counters, and the slot tables
    # of methods that are only compared with.
    assert 0.975 < (counted.device + counted.host) / sum(found.values()) <= 1
