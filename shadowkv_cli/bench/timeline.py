"""Which phase of a captured decode step takes how long: kernel times, sorted by name."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.model.session import Session

STEPS = 4

PHASES = {
    "select": ("select_in_cluster", "score_chunks", "select_best"),
    "residency": ("place_chunks",),
    "fetch": ("fetch_in_bulk", "copy_chunks"),
    "rebuild": ("rebuild_tiles", "rebuild_float"),
    "attention": ("attend_tiles", "attend_tokens", "merge_splits", "flash", "fmha"),
    "layer ops": ("normalise_", "rotate_units", "gate", "append_"),
    "matrix products": ("gemm", "gemv", "cutlass", "nvjet", "splitKreduce"),
}
"""Parts of kernel names, ours first; what no phase knows is `other`."""
WAITING = "wait_for_rows"
"""The kernel that does nothing but wait for another one."""


def phase_of(kernel: str) -> str | None:
    """None: it waits."""
    if WAITING in kernel:
        return None
    return next(
        (phase for phase, parts in PHASES.items() if any(part in kernel for part in parts)), "other"
    )


def phase_ms(session: Session, first: Tensor, warmup: int) -> dict[str, float]:
    """Milliseconds of kernels a step by phase; phases that overlap add up to more than a step.

    Args:
        session: set to decode one cell; it is reset.
        first: int64 [R], the tokens to begin with.
        warmup: steps before those that are looked at; the session must have room for all.
    """
    session.reset()
    tokens = first
    with session.attached():
        for _ in range(warmup):
            tokens = session.next_tokens(tokens).tokens
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            for _ in range(STEPS):
                tokens = session.next_tokens(tokens).tokens
            torch.cuda.synchronize()
    total: dict[str, float] = {}
    for entry in profile.key_averages():
        phase = phase_of(entry.key)
        if phase is not None:
            total[phase] = total.get(phase, 0.0) + entry.self_device_time_total / 1e3 / STEPS
    return {phase: round(ms, 4) for phase, ms in sorted(total.items(), key=lambda x: -x[1])}
