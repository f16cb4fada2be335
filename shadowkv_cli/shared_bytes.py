"""Bytes of several cells over one prompt whose data they share."""

from __future__ import annotations

from collections.abc import Sequence

from shadowkv_cli.config import (
    CacheBytes,
    MethodSpec,
    ModelShape,
    ShadowKVSpec,
    SparseSpec,
    ValueForm,
    layer_bytes,
)


def shared_cache_bytes(
    specs: Sequence[MethodSpec], shape: ModelShape, prompt_tokens: int, new_tokens: int
) -> CacheBytes:
    """Bytes that cells hold together for one prompt, beside the model and in host memory.

    Keys, values, low-rank keys and landmarks are held once; what each cell attends beside the
    prompt's own data, and its buffers, are its own.
    """
    shadow = [spec for spec in specs if isinstance(spec, ShadowKVSpec)]
    width = shape.key_width
    exact = any(spec.keeps_exact for spec in specs)
    elements = width * 2 * (prompt_tokens + new_tokens) if exact else 0
    elements += max((spec.rank for spec in shadow), default=0) * (prompt_tokens + width)
    elements += width * sum(_own_tokens(spec, prompt_tokens, new_tokens) for spec in specs)
    buffers = sum(
        sum(spec.buffer_bytes(shape, prompt_tokens)) + spec.table_bytes(shape, prompt_tokens)
        for spec in shadow
    )
    landmarks = {
        (s.chunk_size, s.landmarks_per_chunk, s.landmark_dtype): s.landmark_bytes(
            shape, prompt_tokens
        )
        for s in shadow
    }
    there = {ValueForm("device")} if exact else set()  # counted with the exact keys
    by_layer = zip(*(spec.value_forms(shape.num_layers) for spec in shadow), strict=True)
    values = [layer_bytes(set(forms) - there, shape, prompt_tokens) for forms in by_layer]
    a_layer = elements * shape.element_bytes + sum(landmarks.values()) + buffers
    return CacheBytes(
        shape.num_layers * a_layer + sum(held.device for held in values),
        sum(held.host for held in values),
    )


def _own_tokens(spec: MethodSpec, prompt_tokens: int, new_tokens: int) -> int:
    """Tokens of keys and of values that a cell has for itself, both counted, but for buffers."""
    if not isinstance(spec, SparseSpec):
        return 0
    kept = spec.keeps(prompt_tokens)
    fixed = 2 * (kept.outlier_tokens + kept.local_tokens + new_tokens)
    return fixed if isinstance(spec, ShadowKVSpec) else fixed + 2 * kept.selected_tokens
