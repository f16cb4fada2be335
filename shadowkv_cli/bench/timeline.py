"""Which phase of a captured decode step takes how long: kernels, sorted by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import DeviceType

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
"""Parts of kernel names, ours first; what no phase knows is `other`, or `beside` on a stream where
nothing is multiplied: there chunks are counted, and queries drift that are driven to a hit rate."""
WAITING = "wait_for_rows"
"""The kernel that does nothing but wait for another one."""


class Kernel(NamedTuple):
    """One kernel of a step; when it began and ended, in microseconds."""

    name: str
    stream: int
    start: float
    end: float


def phase_of(kernel: str) -> str | None:
    """None: it waits."""
    if WAITING in kernel:
        return None
    return next(
        (phase for phase, parts in PHASES.items() if any(part in kernel for part in parts)), "other"
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of these spans, each from a time to a time, lasts."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def profiled(session: Session, first: Tensor, warmup: int) -> list[Kernel]:
    """The kernels of STEPS steps, in the order in which they began.

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
    kernels = [
        Kernel(e.name, e.device_resource_id, e.time_range.start, e.time_range.end)
        for e in profile.events()
        if e.device_type == DeviceType.CUDA
    ]
    return sorted(kernels, key=lambda kernel: kernel.start)


def phase_ms(session: Session, first: Tensor, warmup: int) -> dict[str, float]:
    """Milliseconds a step in which any kernel of a phase runs, by phase; see `profiled`.

    Phases that overlap add up to more than a step.
    """
    return by_phase(profiled(session, first, warmup))


def by_phase(kernels: Sequence[Kernel]) -> dict[str, float]:
    """The same of the kernels of STEPS steps, the longest first."""
    multiply = {k.stream for k in kernels if phase_of(k.name) == "matrix products"}
    spans: dict[str, list[tuple[float, float]]] = {}
    for kernel in kernels:
        phase = phase_of(kernel.name)
        if phase == "other" and multiply and kernel.stream not in multiply:
            phase = "beside"
        if phase is not None:
            spans.setdefault(phase, []).append((kernel.start, kernel.end))
    total = {phase: covered(own) / 1e3 / STEPS for phase, own in spans.items()}
    return {phase: round(ms, 4) for phase, ms in sorted(total.items(), key=lambda x: -x[1])}
