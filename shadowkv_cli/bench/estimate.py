"""How long a run will take, by arithmetic from a model's sizes and a device's probe.

An estimate, to tell minutes from hours before anything runs. It assumes that nothing else runs on
the device. Every parameter counts as used, so a mixture of experts comes out too slow. On a GPU,
prefills follow from its matrix products, its attention backends and its memory, decoding from
`plan`; on a CPU both from matrix products and memory, each reached only in part (the shares below).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shadowkv_cli.bench import together
from shadowkv_cli.config import MethodSpec, ShadowKVSpec

if TYPE_CHECKING:
    from shadowkv_cli.bench.probes import Probe
    from shadowkv_cli.model.facts import ModelFacts

LINEAR_SHARE = 0.8
"""Of the probe's matrix product, what the linear layers of a prefill reach on a CPU."""

GPU_LINEAR_SHARE = 0.9
"""The same on a GPU (H100: 611 TFLOP/s of an MLP in tiles, 790 of the attention's projections)."""

ATTENTION_SHARE = 0.5
"""Of the probe's matrix product, what causal attention reaches, where that was not probed."""

SMALL_OPS_TENSORS = 25
"""Tensors of the prompt by the model's width that norms, gates, sums and rotations of a layer read
and write."""

COMPRESSION_SHARE = 0.03
"""What ShadowKV's keys, landmarks and values add to a prefill on a GPU, beside the model."""

GPU_READ_SHARE = 0.8
"""Of the probe's memory bandwidth, what small ops, and a step outside of a graph, reach."""

CPU_READ_SHARE = 0.35
"""The same on a CPU, whose products of a matrix and a vector are bound by arithmetic."""

LAYER_OVERHEAD_S = 1e-3
"""A layer's many small operations, called one by one from Python, per step."""

GRAPH_S = 2.0
"""The capture of a step, once for each length."""


def prefill_flops(facts: ModelFacts, tokens: int, reused: int = 0) -> tuple[int, int]:
    """Operations of one prompt's linear layers, and of its causal attention (QK and AV).

    The last layer's attention is that of one token.

    Args:
        reused: tokens at its beginning that are not computed, only attended.
    """
    shape = facts.shape
    linear = 2 * facts.layer_parameters * (tokens - reused)
    pairs = tokens**2 - reused**2
    attention = 2 * pairs * shape.num_q_heads * shape.head_dim * (shape.num_layers - 1)
    return linear, attention


def attention_tflops(facts: ModelFacts, probe: Probe, backend: str) -> float:
    """Of the backend as it was probed, else a share of the matrix product."""
    speeds = probe.attention_tflops
    # A GPU's were probed in two bytes; float32 has other kernels.
    if speeds and (facts.shape.element_bytes == 2 or not probe.h2d_gb_s):
        return speeds.get(backend, max(speeds.values()))
    return probe.matmul_tflops[facts.dtype] * ATTENTION_SHARE


def prefill_seconds(
    facts: ModelFacts,
    probe: Probe,
    tokens: int,
    specs: Sequence[MethodSpec] = (),
    backend: str = "auto",
    reused: int = 0,
) -> float:
    """Estimate the prefill of one prompt.

    The probe must know the model's dtype; `stored_or_measured` sees to that.

    Args:
        specs: methods that take the prompt in.
        backend: of exact attention; `auto` is the fastest that was probed.
        reused: tokens at its beginning that are taken over from another prompt.
    """
    linear, attention = prefill_flops(facts, tokens, reused)
    on_gpu = probe.h2d_gb_s is not None
    share = GPU_LINEAR_SHARE if on_gpu else LINEAR_SHARE
    seconds = linear / (probe.matmul_tflops[facts.dtype] * 1e12 * share)
    seconds += attention / (attention_tflops(facts, probe, backend) * 1e12)
    if on_gpu:
        moved = (
            SMALL_OPS_TENSORS * (tokens - reused) * facts.hidden_size * facts.shape.element_bytes
        )
        read = probe.memory_read_gb_s * 1e9 * GPU_READ_SHARE
        seconds += facts.shape.num_layers * moved / read
        if any(isinstance(spec, ShadowKVSpec) and not spec.is_dense(tokens) for spec in specs):
            seconds *= 1 + COMPRESSION_SHARE
    return seconds + facts.shape.num_layers * LAYER_OVERHEAD_S


def decode_seconds(facts: ModelFacts, probe: Probe, rows_bytes: float, steps: int) -> float:
    """Estimate the decoding of all rows of one batch together, op by op.

    Args:
        facts: of the model; its weights are read once a step, whatever the number of rows.
        probe: of the device.
        rows_bytes: bytes of cache that one step reads, all rows together: what they attend to,
            landmarks and low-rank keys, not what they merely hold.
        steps: tokens decoded per row.
    """
    share = GPU_READ_SHARE if probe.h2d_gb_s else CPU_READ_SHARE
    read_s = (facts.weight_bytes + rows_bytes) / (probe.memory_read_gb_s * 1e9 * share)
    return steps * (read_s + facts.shape.num_layers * LAYER_OVERHEAD_S)


def captured_seconds(
    facts: ModelFacts,
    probe: Probe,
    specs: Sequence[MethodSpec],
    tokens: int,
    steps: int,
    hit_rate: float,
    samples: int = 1,
) -> float:
    """Estimate the same for cells that share prompts on a GPU, a step being one CUDA graph."""
    step = together.step_ms(
        specs,
        facts.shape,
        facts.weight_bytes,
        probe,
        tokens,
        hit_rate=hit_rate,
        samples=samples,
    )
    return steps * step / 1e3
