"""How long a run will take, by arithmetic from a model's sizes and a device's probe.

An estimate, to tell minutes from hours before anything runs. It assumes that prefills are bound by
matrix products and decoding by reading memory, that nothing else runs on the device, and that each
is reached only in part (the shares below). Every parameter counts as used, so a mixture of experts
comes out too slow; what a method computes beside attention (factorisation, landmarks) is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shadowkv_cli.bench.probes import Probe
    from shadowkv_cli.model.facts import ModelFacts

LINEAR_SHARE = 0.8
"""Of the probe's matrix product, what the linear layers of a prefill reach."""

ATTENTION_SHARE = 0.5
"""The same for causal attention (SDPA flash on an H100: 343 TFLOP/s beside 611 of an MLP)."""

GPU_READ_SHARE = 0.8
"""Of the probe's memory bandwidth, what a decoding step reaches (H100: 81 to 88 %)."""

CPU_READ_SHARE = 0.35
"""The same on a CPU, whose products of a matrix and a vector are bound by arithmetic."""

LAYER_OVERHEAD_S = 1e-3
"""A layer's many small operations, called one by one from Python, per step."""


def prefill_flops(facts: ModelFacts, tokens: int) -> tuple[int, int]:
    """Operations of one prompt's linear layers, and of its causal attention (QK and AV)."""
    shape = facts.shape
    linear = 2 * facts.layer_parameters * tokens
    attention = 2 * tokens**2 * shape.num_q_heads * shape.head_dim * shape.num_layers
    return linear, attention


def prefill_seconds(facts: ModelFacts, probe: Probe, tokens: int) -> float:
    """Estimate the prefill of one prompt.

    The probe must know the model's dtype; `stored_or_measured` sees to that.
    """
    linear, attention = prefill_flops(facts, tokens)
    rate = probe.matmul_tflops[facts.dtype] * 1e12
    work = linear / LINEAR_SHARE + attention / ATTENTION_SHARE
    return work / rate + facts.shape.num_layers * LAYER_OVERHEAD_S


def decode_seconds(facts: ModelFacts, probe: Probe, rows_bytes: float, steps: int) -> float:
    """Estimate the decoding of all rows of one batch together.

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
