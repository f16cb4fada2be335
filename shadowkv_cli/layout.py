"""Which cells work as one group: one launch of each kernel serves them all."""

from __future__ import annotations

from shadowkv_cli.config import MethodSpec, ShadowKVSpec, SparseSpec


def layout(spec: MethodSpec) -> tuple[object, ...]:
    """What rows of one group must have in common."""
    key: tuple[object, ...] = (spec.name,)
    if isinstance(spec, SparseSpec):
        key += (spec.chunk_size,)
    if isinstance(spec, ShadowKVSpec):
        key += (spec.landmarks_per_chunk, spec.landmark_dtype)
        key += (spec.value_dtype, spec.value_placement, spec.resident_layers)
    return key
