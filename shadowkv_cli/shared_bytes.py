"""Bytes of several cells over one prompt whose data they share."""

from __future__ import annotations

from collections.abc import Sequence

from shadowkv_cli.config import (
    CacheBytes,
    FullSpec,
    MethodSpec,
    ModelShape,
    ShadowKVSpec,
    SparseSpec,
    ValueForm,
    layer_bytes,
)
from shadowkv_cli.layout import layout


def shared_cache_bytes(
    specs: Sequence[MethodSpec],
    shape: ModelShape,
    prompt_tokens: int,
    new_tokens: int,
    *,
    merge_cells: bool = True,
) -> CacheBytes:
    """Bytes that cells hold together for one prompt, beside the model and in host memory.

    Keys, values, low-rank keys and landmarks are held once; what each cell attends beside the
    prompt's own data, and its buffers, are its own.

    Args:
        specs: the cells.
        shape: of the model.
        prompt_tokens, new_tokens: of the prompt and of the answer.
        merge_cells: cells of one layout work as one group, and each has room for the largest; those
            that are dense at this length are answered by full attention.
    """
    if merge_cells:
        active = [spec for spec in specs if not spec.is_dense(prompt_tokens)]
        specs = active if len(active) == len(specs) else [FullSpec(), *active]
    shadow = [spec for spec in specs if isinstance(spec, ShadowKVSpec)]
    width = shape.key_width
    exact = any(spec.keeps_exact for spec in specs)
    elements = width * 2 * (prompt_tokens + new_tokens) if exact else 0
    elements += max((spec.rank for spec in shadow), default=0) * (prompt_tokens + width)
    landmarks = {
        (s.chunk_size, s.landmarks_per_chunk, s.landmark_dtype): s.landmark_bytes(
            shape, prompt_tokens
        )
        for s in shadow
    }
    a_layer = elements * shape.element_bytes + sum(landmarks.values())
    groups: dict[object, list[SparseSpec]] = {}
    for spec in specs:
        if isinstance(spec, SparseSpec):
            groups.setdefault(layout(spec) if merge_cells else spec, []).append(spec)
    for group in groups.values():
        a_layer += len(group) * _own_bytes(group, shape, prompt_tokens, new_tokens)
    there = {ValueForm("device")} if exact else set()  # counted with the exact keys
    by_layer = zip(*(spec.value_forms(shape.num_layers) for spec in shadow), strict=True)
    values = [layer_bytes(set(forms) - there, shape, prompt_tokens) for forms in by_layer]
    return CacheBytes(
        shape.num_layers * a_layer + sum(held.device for held in values),
        sum(held.host for held in values),
    )


def _own_bytes(
    group: Sequence[SparseSpec], shape: ModelShape, prompt_tokens: int, new_tokens: int
) -> int:
    """What each cell of a group has for itself in a layer: what it attends, buffers, tables."""
    kept = [spec.keeps(prompt_tokens) for spec in group]
    fixed = max(k.outlier_tokens for k in kept) + max(k.local_tokens for k in kept) + new_tokens
    shadow = [spec for spec in group if isinstance(spec, ShadowKVSpec)]
    if not shadow:
        attended = fixed + max(k.selected_tokens for k in kept)
        return 2 * attended * shape.key_width * shape.element_bytes
    slots = [spec.slots(k) for spec, k in zip(shadow, kept, strict=True)]
    keys, values = (max(own[i] for own in slots) for i in (0, 1))
    one_table = all(own[0] == own[1] for own in slots)
    [first, *_] = shadow
    buffers = sum(first.buffer_bytes_of((keys, values), shape))
    tables = first.table_bytes_of([keys] if one_table else [keys, values], shape, prompt_tokens)
    return 2 * fixed * shape.key_width * shape.element_bytes + buffers + tables
