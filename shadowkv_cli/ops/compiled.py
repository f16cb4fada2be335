"""The compiled CUDA kernels: loaded where they were built, passed by where they cannot serve.

The library only adds CUDA to the ops that this package defines; without it, or for sizes that it
was not compiled for, the torch references serve a GPU too.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from shadowkv_cli.console import notice
from shadowkv_cli.environment import PACKAGE_DIR

LIBRARY = PACKAGE_DIR / "shadowkv_kernels.so"
SWITCH = "SHADOWKV_NO_KERNELS"
HOW_TO_BUILD = "compile them: make kernels (no GPU is needed for it; see kernels/README.md)"

HEAD_DIMS = (64, 96, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_GROUP = 16
MAX_SECTIONS = 4


def _load() -> str:
    """Load the library; why it is not there, empty where it is."""
    if os.environ.get(SWITCH, "0") not in ("", "0"):
        return f"left out by {SWITCH}"
    if not LIBRARY.is_file():
        return "not built"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"built, but torch {torch.__version__} cannot load them ({error})"
    return ""


ABSENT = _load()
"""Why the kernels are not loaded; empty where they are."""


def ready(dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether kernels serve these sizes on a GPU, so that no op waits for the device."""
    return not ABSENT and not _lacking(dtype, head_dim, group, sections=1)


def serves(tensor: Tensor, head_dim: int, *, group: int = 1, sections: int = 1) -> bool:
    """Whether the dispatcher may have this call; if not, the reference is to be called by name.

    Args:
        tensor: one that lies where the op computes.
        head_dim: D.
        group: query heads a KV head.
        sections: of the fixed part.
    """
    return not tensor.is_cuda or _judge(_lacking(tensor.dtype, head_dim, group, sections))


def serves_any_size(tensor: Tensor) -> bool:
    """The same of an op that works on elements one by one: every size, but not every dtype."""
    lacking = "" if tensor.dtype in DTYPES else str(tensor.dtype)
    return not tensor.is_cuda or _judge(lacking)


def serves_copies(source: Tensor, target: Tensor) -> bool:
    """The same of an op that only moves bytes, to a GPU from wherever they are."""
    if not target.is_cuda:
        return True
    reachable = source.is_cuda or source.is_pinned()
    return _judge("" if reachable else "values in host memory that is not pinned")


def _judge(lacking: str) -> bool:
    if ABSENT:
        advice = "" if ABSENT.startswith("left out") else f"; {HOW_TO_BUILD}"
        _say_once(f"The CUDA kernels are {ABSENT}: torch ops are used{advice}.")
        return True  # the dispatcher knows the references only
    if lacking:
        _say_once(f"The CUDA kernels do not serve {lacking}: torch ops are used there.")
    return not lacking


def _lacking(dtype: torch.dtype, head_dim: int, group: int, sections: int) -> str:
    if head_dim not in HEAD_DIMS:
        return f"a head dimension of {head_dim} (but {', '.join(map(str, HEAD_DIMS))})"
    if dtype not in DTYPES:
        return str(dtype)
    if group > MAX_GROUP:
        return f"{group} query heads a KV head (but up to {MAX_GROUP})"
    if sections > MAX_SECTIONS:
        return f"{sections} sections of the fixed part (but up to {MAX_SECTIONS})"
    return ""


@functools.cache
def _say_once(message: str) -> None:
    notice(message)
