"""What memory, matrix units and bus can do: measured once, kept in the user's cache."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shadowkv_cli.console import notice
from shadowkv_cli.environment import cache_dir, cpu_model
from shadowkv_cli.model import exact_attention

CPU_READ_BYTES = 512 * 2**20
GPU_READ_BYTES = 2 * 2**30
TRANSFER_BYTES = 256 * 2**20
GPU_HEADS, GPU_PROMPT_TOKENS = (32, 8, 128), 32_768
CPU_HEADS, CPU_PROMPT_TOKENS = (4, 1, 64), 2048
"""Query heads, KV heads and their dimension, of the attention that is timed."""

WARM_UP, REPEATS = 2, 7
ENOUGH_S = 0.5
"""Repeats end early after that long."""

STEADY_S = 0.3
"""A GPU copies and reads for at least that long: it raises its clocks meanwhile, and a neighbour on
the bus has time to finish."""

SLOW_PRODUCT_S = 0.02
"""Where the small matrix product takes longer, the large one is left out: float16 on most CPUs."""

NO_BUS = "on a CPU there is no bus between model and host memory"


@dataclass(frozen=True)
class Probe:
    """Measured peaks of one device; GB are 1e9 bytes, TFLOP 1e12 operations.

    Attributes:
        device_name: the key it is stored under, see `device_name`.
        memory_read_gb_s: reading memory once from end to end, far beyond the caches.
        matmul_tflops: a large square product, by dtype (`float32`, `bfloat16`, …).
        h2d_gb_s, d2h_gb_s: copies from and to pinned host memory; None on a CPU.
        zero_copy_gather_gb_s: 2 KiB rows in random order, read by the GPU from pinned memory.
        zero_copy_reason: why that is None; empty where it was measured.
        measured: the day, UTC, like 2026-11-24.
        attention_tflops: causal attention of a long prompt by backend, in bfloat16, on a CPU in
            float32; empty in probes of before.
    """

    device_name: str
    memory_read_gb_s: float
    matmul_tflops: dict[str, float]
    h2d_gb_s: float | None
    d2h_gb_s: float | None
    zero_copy_gather_gb_s: float | None
    zero_copy_reason: str
    measured: str
    attention_tflops: dict[str, float] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values for a manifest, three significant digits."""
        return {k: _rounded(v) for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Probe:
        """Read what `as_json` wrote. Raises TypeError or ValueError where it is something else."""
        probe = cls(**values)
        speeds = [
            probe.memory_read_gb_s,
            *probe.matmul_tflops.values(),
            *probe.attention_tflops.values(),
        ]
        if not all(isinstance(speed, float) and speed > 0 for speed in speeds):
            raise ValueError("speeds must be positive numbers")
        return probe


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def device_name(device: torch.device) -> str:
    """Name of a GPU, or of the processor with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {torch.get_num_threads()} threads"


def default_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The precisions that runs on a device commonly use."""
    if device.type == "cuda":
        return (torch.float32, torch.bfloat16, torch.float16)
    return (torch.float32, torch.bfloat16)


def measure(device: torch.device, dtypes: Sequence[torch.dtype]) -> Probe:
    """Measure a device: a few seconds; other work on it meanwhile makes the result too low.

    Raises RuntimeError (torch's own) where its memory is full.
    """
    h2d = d2h = gather = None
    reason = NO_BUS
    if device.type == "cuda":
        h2d, d2h = _transfers_gb_s(device)
        gather, reason = _gather_gb_s(device)
    return Probe(
        device_name=device_name(device),
        memory_read_gb_s=_read_gb_s(device),
        matmul_tflops={str(d).removeprefix("torch."): _tflops(device, d) for d in dtypes},
        h2d_gb_s=h2d,
        d2h_gb_s=d2h,
        zero_copy_gather_gb_s=gather,
        zero_copy_reason=reason,
        measured=datetime.datetime.now(datetime.UTC).date().isoformat(),
        attention_tflops=_attention_tflops(device),
    )


def _median_s(device: torch.device, work: Callable[[], object]) -> float:
    return statistics.median(_seconds(device, work))


def _fastest_s(device: torch.device, work: Callable[[], object]) -> float:
    """Of bytes that move: what slows a repeat is no property of the device."""
    return min(_seconds(device, work, STEADY_S if device.type == "cuda" else 0.0))


def _seconds(
    device: torch.device, work: Callable[[], object], at_least_s: float = 0.0
) -> list[float]:
    """Seconds of each repeat of a piece of work after warm-up, by CUDA events on a GPU."""
    seconds: list[float] = []
    while len(seconds) < WARM_UP + REPEATS or sum(seconds) < at_least_s:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(device):
                start.record()
                work()
                end.record()
                end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        if len(seconds) > WARM_UP and sum(seconds) > ENOUGH_S:
            break
    return seconds[WARM_UP:]


def _read_gb_s(device: torch.device) -> float:
    size = CPU_READ_BYTES
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        size = min(GPU_READ_BYTES, free // 2)
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    # The maximum: on a CPU, a sum is bound by its additions and not by memory.
    return data.nbytes / _fastest_s(device, data.amax) / 1e9


def _tflops(device: torch.device, dtype: torch.dtype) -> float:
    small, large = (4096, 8192) if device.type == "cuda" else (256, 1024)
    seconds = _seconds(device, _product(small, device, dtype))
    if min(seconds) > SLOW_PRODUCT_S:
        return 2 * small**3 / statistics.median(seconds) / 1e12
    return 2 * large**3 / _median_s(device, _product(large, device, dtype)) / 1e12


def _product(size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _attention_tflops(device: torch.device) -> dict[str, float]:
    """Of every fast backend on a GPU; on a CPU of the one that there is."""
    if device.type == "cuda":
        return exact_attention.trial_tflops(device, torch.bfloat16, GPU_HEADS, GPU_PROMPT_TOKENS)
    (q_heads, kv_heads, dim), tokens = CPU_HEADS, CPU_PROMPT_TOKENS
    q = torch.randn(1, q_heads, tokens, dim)
    k = torch.randn(1, kv_heads, tokens, dim)
    seconds = _median_s(device, lambda: exact_attention.attend("flash", q, k, k, dim**-0.5))
    return {"flash": 2 * tokens**2 * q_heads * dim / seconds / 1e12}


def _transfers_gb_s(device: torch.device) -> tuple[float, float]:
    host = torch.ones(TRANSFER_BYTES, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(host, device=device)
    h2d = _fastest_s(device, lambda: there.copy_(host, non_blocking=True))
    d2h = _fastest_s(device, lambda: host.copy_(there, non_blocking=True))
    return host.nbytes / h2d / 1e9, host.nbytes / d2h / 1e9


def _gather_gb_s(device: torch.device) -> tuple[float | None, str]:
    try:
        from shadowkv_cli.bench.zero_copy import measure_gather_gb_s
    except ImportError:
        return None, "Triton is not installed, and no compiled kernels are"
    return measure_gather_gb_s(device, _fastest_s)


def probes_file() -> Path:
    """Where probes are kept: `shadowkv/probes.json` in the user's cache folder."""
    return cache_dir() / "probes.json"


def _read_all() -> dict[str, Any]:
    path = probes_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notice(f"Stored probes are ignored: cannot read {path} ({error}).")
        return {}
    if not isinstance(content, dict):
        notice(f"Stored probes are ignored: {path} holds no probes by device name.")
        return {}
    return content


def stored(name: str) -> Probe | None:
    """The probe kept under a device name, or None."""
    entry = _read_all().get(name)
    if entry is None:
        return None
    try:
        return Probe.from_json(entry)
    except (TypeError, ValueError, AttributeError) as error:
        notice(f"The stored probe of {name} is ignored: {error}.")
        return None


def store(probe: Probe) -> None:
    """Keep a probe, beside those of other devices; where that is not possible, a notice says so."""
    path = probes_file()
    content = {**_read_all(), probe.device_name: probe.as_json()}
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False
        ) as file:
            temporary = file.name
            json.dump(content, file, indent=2)
        os.replace(temporary, path)
    except OSError as error:
        notice(f"The probe was not kept: cannot write {path} ({error.strerror}).")
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def stored_or_measured(device: torch.device, dtypes: Sequence[torch.dtype] | None = None) -> Probe:
    """The stored probe if it knows the dtypes; else measure the device, and keep that.

    Args:
        device: what to measure.
        dtypes: precisions that must be known, by default those that runs commonly use.
    """
    wanted = default_dtypes(device) if dtypes is None else tuple(dtypes)
    probe = stored(device_name(device))
    known = probe and all(str(d).removeprefix("torch.") in probe.matmul_tflops for d in wanted)
    # A probe of before knows nothing of attention, which is most of a long prefill.
    if probe and known and (probe.attention_tflops or device.type == "cpu"):
        return probe
    notice(f"Measuring {device_name(device)}, once: it is kept for later runs.")
    return measured_anew(device, wanted)


def measured_anew(device: torch.device, dtypes: Sequence[torch.dtype]) -> Probe:
    """Measure the device, in these dtypes and those that runs commonly use, and keep that."""
    probe = measure(device, tuple(dict.fromkeys((*default_dtypes(device), *dtypes))))
    store(probe)
    return probe
