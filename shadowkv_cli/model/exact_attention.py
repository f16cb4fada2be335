"""The exact attention of a prefill: the fastest of what is installed, chosen once a shape."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shadowkv_cli.console import notice
from shadowkv_cli.errors import UsageError
from shadowkv_cli.model.failures import is_out_of_memory
from shadowkv_cli.model.two_parts import attend_behind

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PACKAGES = {"flash-attn-4": "flash_attn.cute", "flash-attn": "flash_attn"}
"""Backends that are packages of their own, and the module that holds their `flash_attn_func`."""

IN_TURN: Sequence[Sequence[str]] = (
    ("flash-attn-4", "cudnn", "flash-attn", "flash"),
    ("efficient",),
    ("math",),  # holds all scores at once
)
"""`auto` takes the fastest of the first of these in which one works."""

TRIAL_FLOPS = 2e13
"""A trial leaves out heads until it is no longer than this: 40 ms on an H100."""

MOST_ELEMENTS, PART_ELEMENTS = 2**30, 2**29
"""Queries of more elements are attended in parts of so many."""

RUNS = 3
AGREES = 0.05
"""Outputs are averages of standard normal values, in two-byte precision; a fault is far larger."""

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Choice:
    """A backend, and the TFLOP/s of its trial; None on a CPU, which has none."""

    backend: str
    tflops: float | None = None


def _sdpa(backend: str) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if backend == "efficient" and q.shape[1] != k.shape[1]:
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        with sdpa_kernel(_SDPA[backend]):
            return _scaled_dot_product(q, k, v, scale)

    return attend


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _packaged(backend: str) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        function = importlib.import_module(PACKAGES[backend]).flash_attn_func
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = function(q, k, v, softmax_scale=scale, causal=True)  # aligned at the bottom right
        # flash-attn-4 returns the log-sum-exp too, in some versions only if it is asked for.
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def _attention(backend: str) -> Attention:
    if backend in PACKAGES:
        return _packaged(backend)
    return _scaled_dot_product if backend == "sdpa" else _sdpa(backend)


def _is_installed(package: str) -> bool:
    """Whether a package is here, without importing it.

    flash-attn has files of flash-attn-4 in it, without what these need; flash-attn-4 alone makes
    `flash_attn` a folder without an `__init__.py`.
    """
    spec = importlib.util.find_spec("flash_attn")
    if spec is None:
        return False
    if package == "flash-attn":
        return spec.origin is not None
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        folders = [Path(folder) / "cute" for folder in spec.submodule_search_locations or ()]
        return importlib.util.find_spec("cutlass") is not None and any(f.is_dir() for f in folders)
    return True


def installed(device: torch.device) -> list[str]:
    """Names of the backends that may be asked for on a device; `sdpa` is torch's own choice."""
    if device.type == "cpu":
        return ["flash", "math", "sdpa"]
    names = [name for names in IN_TURN for name in names]
    return [n for n in names if n not in PACKAGES or _is_installed(n)] + ["sdpa"]


def check_installed(backend: str, device: torch.device) -> None:
    """Raise UsageError for a backend that a device does not have; `auto` always passes."""
    names = installed(device)
    if backend != "auto" and backend not in names:
        raise UsageError(
            f"Attention backend '{backend}' is not available on {device}: "
            f"choose from {', '.join(names)} or auto."
        )


def unfit(backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Why a backend is not made for a GPU, dtype and head dimension; empty where it is."""
    if backend in ("efficient", "math", "sdpa"):
        return ""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    least = (9, 0) if backend == "flash-attn-4" else (8, 0)
    if capability < least:
        there = ".".join(map(str, capability))
        return f"it needs compute capability {least[0]}.{least[1]}, this GPU has {there}"
    if backend == "flash-attn-4" and dim not in (64, 96, 128):
        return f"it is made for heads of 64, 96 and 128, not {dim}"
    return ""


_broken: dict[str, str] = {}
"""Packages that are installed and do not work, and why; found once a process."""


def give_up(backend: str, error: Exception) -> bool:
    """Do without a package that failed from now on, and say so; False for anything else."""
    if backend not in PACKAGES or is_out_of_memory(error):
        return False
    _broken[backend] = _reason(error)
    _choices.clear()
    notice(
        f"The attention backend {backend} is installed but does not work: {_broken[backend]}. "
        "It is left out."
    )
    return True


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}{': ' if text else ''}{text}"


class _Trial:
    """Random queries, keys and values of a shape, on which backends are timed and compared.

    Heads are left out where attention would take long; their number changes little.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], tokens: int
    ) -> None:
        q_heads, kv_heads, dim = heads
        group = q_heads // kv_heads
        of_one = 2 * tokens**2 * group * dim  # scores and values, half of each
        kv_heads = max(1, min(kv_heads, int(TRIAL_FLOPS // of_one)))
        self.flops = kv_heads * of_one
        generator = torch.Generator(device).manual_seed(0)
        sizes = [(1, tokens, count, dim) for count in (kv_heads * group, kv_heads, kv_heads)]
        self.q, self.k, self.v = (
            torch.randn(size, generator=generator, device=device, dtype=dtype).transpose(1, 2)
            for size in sizes
        )
        self._expected: Tensor | None = None

    def tflops(self, backend: str) -> float:
        """TFLOP/s of the best of some runs, after one that compiles; 0 where it does not work.

        Raises torch.OutOfMemoryError, but for `math`, which needs far more memory than the others.
        """
        device = self.q.device
        if backend in _broken or unfit(backend, device, self.q.dtype, self.q.shape[-1]):
            return 0.0
        attention, scale = _attention(backend), self.q.shape[-1] ** -0.5
        try:
            with torch.cuda.device(device), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of every backend that refuses
                out = attention(self.q, self.k, self.v, scale)
                if backend in PACKAGES:
                    self._check(out, scale)
                seconds = [self._seconds(attention, scale) for _ in range(RUNS)]
        # A package that compiles at run time may raise anything; torch's own refuse a shape so.
        except Exception as error:
            full = is_out_of_memory(error) and backend != "math"
            if full or not (give_up(backend, error) or isinstance(error, RuntimeError)):
                raise
            return 0.0
        return self.flops / min(seconds) / 1e12

    def _check(self, out: Tensor, scale: float) -> None:
        """Raise ValueError where an output is not that of torch's own choice."""
        if self._expected is None:
            self._expected = _scaled_dot_product(self.q, self.k, self.v, scale)
        if out.shape != self.q.shape or not bool(((out - self._expected).abs() < AGREES).all()):
            raise ValueError("its output is wrong")

    def _seconds(self, attention: Attention, scale: float) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        attention(self.q, self.k, self.v, scale)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


_choices: dict[tuple[object, ...], Choice] = {}


def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    tokens: int,
) -> Choice:
    """Resolve `auto` for a shape: on a GPU the fastest in a trial, on a CPU torch's flash.

    A backend that was asked for and does not work is replaced by the fastest that does, and a
    notice says so.

    Args:
        backend: `auto` or a name of `installed`.
        heads: query heads, KV heads, head dimension.
        tokens: of the prompt.

    Raises:
        UsageError: the backend is not installed, or none takes the shape.
        torch.OutOfMemoryError: there is no memory for a trial.
    """
    check_installed(backend, device)
    # One trial for lengths from 2^n to 3 * 2^(n-1), one from there to 2^(n+1).
    about = (tokens.bit_length(), tokens >> max(0, tokens.bit_length() - 2))
    key = (backend, device, dtype, heads, about)
    if key not in _choices:
        if device.type == "cpu":
            return Choice("flash" if backend == "auto" else backend)
        chosen = _choose(backend, device, dtype, heads, tokens)
        _choices[key] = chosen
    return _choices[key]


def _choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    tokens: int,
) -> Choice:
    trial = _Trial(device, dtype, heads, tokens)
    if backend != "auto":
        if speed := trial.tflops(backend):
            return Choice(backend, speed)
        why = unfit(backend, device, dtype, heads[2]) or _broken.get(
            backend, "it refuses the shape"
        )
    found = _fastest(trial, installed(device))
    if found is None:
        raise UsageError(f"No attention backend takes {dtype} with heads of {heads[2]} here.")
    if backend != "auto":
        notice(f"The attention backend {backend} is replaced by {found.backend}: {why}.")
    return found


def _fastest(trial: _Trial, names: Sequence[str]) -> Choice | None:
    for in_turn in IN_TURN:
        speeds = {name: trial.tflops(name) for name in in_turn if name in names}
        if any(speeds.values()):
            best = max(speeds, key=lambda name: speeds[name])
            return Choice(best, speeds[best])
    return None


def trial_tflops(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], tokens: int
) -> dict[str, float]:
    """TFLOP/s of every fast backend that works on a GPU for a shape."""
    trial, names = _Trial(device, dtype, heads, tokens), installed(device)
    speeds = {name: trial.tflops(name) for name in IN_TURN[0] if name in names}
    return {name: speed for name, speed in speeds.items() if speed}


def broken() -> dict[str, str]:
    """Packages that are installed and did not work in this process, and why."""
    return dict(_broken)


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of a prompt's last T of S tokens: q [1, Hq, T, D], k and v [1, Hk, S, D].

    Some heads after the others where all would be more elements than kernels can be trusted to
    count: an 8B model's queries of 524,288 tokens are 2^31.
    """
    in_parts = q.shape[2] < k.shape[2] and backend not in PACKAGES
    attention = functools.partial(attend_behind, backend) if in_parts else _attention(backend)
    kv_heads = k.shape[1]
    elements = max(q.numel(), k.numel())
    if elements <= MOST_ELEMENTS or kv_heads == 1:
        return attention(q, k, v, scale)
    out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)  # laid out by token
    most = max(1, kv_heads * PART_ELEMENTS // elements)
    group = q.shape[1] // kv_heads
    for first in range(0, kv_heads, most):
        own = slice(first, first + most)
        queries = slice(first * group, min(first + most, kv_heads) * group)
        out[:, queries] = attention(q[:, queries], k[:, own], v[:, own], scale)
    return out
