"""The exact attention of a prefill: the fastest of what is installed, chosen once."""

from __future__ import annotations

import functools
import importlib.util
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shadowkv_cli.errors import UsageError

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _sdpa(backend: str) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if backend == "efficient" and q.shape[1] != k.shape[1]:
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        with sdpa_kernel(_SDPA[backend]):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )

    return attend


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flash_attn_func(q, k, v, softmax_scale=scale, causal=True).transpose(1, 2)


def _attention(backend: str) -> Attention:
    return _flash_attn if backend == "flash-attn" else _sdpa(backend)


def installed(device: torch.device) -> list[str]:
    """Names of the backends that may be tried on a device."""
    if device.type == "cpu":
        return ["flash", "math"]
    package = ["flash-attn"] if importlib.util.find_spec("flash_attn") else []
    return ["cudnn", "flash", "efficient", *package, "math"]


def check_installed(backend: str, device: torch.device) -> None:
    """Raise UsageError for a backend that a device does not have; `auto` always passes."""
    names = installed(device)
    if backend != "auto" and backend not in names:
        raise UsageError(
            f"Attention backend '{backend}' is not available on {device}: "
            f"choose from {', '.join(names)} or auto."
        )


def _time_s(attend: Attention, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Seconds of one causal attention after a warm-up; infinite where the backend refuses it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of every backend that refuses
            for _ in range(2):
                torch.cuda.synchronize(q.device)
                started = time.perf_counter()
                attend(q, k, v, 1.0)
                torch.cuda.synchronize(q.device)
    except RuntimeError:
        return float("inf")
    return time.perf_counter() - started


@functools.cache
def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    tokens: int,
) -> str:
    """Resolve `auto` for a shape: on a GPU the fastest in one trial, on a CPU torch's flash.

    Args:
        backend: `auto` or a name of `installed`.
        heads: query heads, KV heads, head dimension.
        tokens: of the prompt.

    Raises:
        UsageError: the backend is not installed or refuses the shape.
    """
    check_installed(backend, device)
    if device.type == "cpu":
        return "flash" if backend == "auto" else backend
    q = torch.randn(1, heads[0], tokens, heads[2], device=device, dtype=dtype)
    k, v = (torch.randn(1, heads[1], tokens, heads[2], device=device, dtype=dtype) for _ in "kv")
    # `math` holds all scores at once: only when it is asked for.
    fast = [name for name in installed(device) if name != "math"]
    tried = fast if backend == "auto" else [backend]
    times = {name: _time_s(_attention(name), q, k, v) for name in tried}
    best = min(times, key=lambda name: times[name])
    if times[best] == float("inf"):
        if backend == "auto" and dtype == torch.float32:
            return "math"
        raise UsageError(f"No attention backend of {', '.join(tried)} takes {dtype} here.")
    return best


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of a whole prompt: q [1, Hq, S, D], k and v [1, Hk, S, D]."""
    return _attention(backend)(q, k, v, scale)
