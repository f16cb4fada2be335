"""Memory: what is free for caches, and the peak of a stretch of work."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from shadowkv_cli.config import ModelShape
from shadowkv_cli.host_memory import available_host_bytes, proc_field
from shadowkv_cli.model.loading import LoadedModel

RESERVE = 0.1
"""Share of the memory that is left for activations, the allocator and everybody else."""

HOST_RESERVE_BYTES = 6_000_000_000
"""Beside a GPU, the most that is left of the host's memory: what a process takes while it decodes,
captures and profiles does not grow with the memory there is."""

DECODE_RESERVE = 0.025
"""The same on a GPU that only decodes, if that is more than `decode_bytes`."""


def free_host_bytes() -> int:
    """Memory of the host that values beside a GPU may take."""
    available = available_host_bytes()
    return available - min(int(RESERVE * available), HOST_RESERVE_BYTES)


def free_device_bytes(device: torch.device, reserve: float = RESERVE, least: int = 0) -> int:
    """Memory beside the model that caches may take.

    Args:
        device: of the model.
        reserve: share of a GPU's memory that is left; on a CPU it is always `RESERVE`.
        least: bytes that are left at least, on a GPU.
    """
    if device.type == "cpu":
        return int(available_host_bytes() * (1 - RESERVE))
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + cached - max(reserve * total, least))


def release_memory() -> None:
    """Give back what nothing holds any more.

    The allocator keeps what was freed in pieces as large as it was asked for, and what other sizes
    leave of these is lost to them: 10 of an H100's 79 GiB after full attention's cache.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def decode_bytes(shape: ModelShape, tokens: int) -> int:
    """What decoding on a GPU takes beside the caches, random prompts' being made included.

    A layer of such a prompt is there with what is computed of it, 1.6 times its keys and values by
    their sizes: more than a step's workspace later. That was 0.5 GB on an H100, of the shape of
    Llama-3.1-8B at 122,880 tokens; graphs, libraries and what the allocator could not join, 0.9.
    """
    layer = shape.kv_bytes(tokens) // shape.num_layers
    return layer * 8 // 5 + 900_000_000


WORKSPACE = 6
"""What a prefill may take beside all that it must hold: so many tensors of the prompt's tokens by
the model's width, in the model's precision."""


@dataclass(frozen=True)
class PrefillBytes:
    """What a prefill may hold on the device, in bytes.

    Attributes:
        weights: of the model.
        layer: keys and values of one layer.
        caches: what the methods keep of the prompt, and have ready for answers.
        workspace: the rest.
    """

    weights: int
    layer: int
    caches: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.layer + self.caches + self.workspace


def prefill_bytes(
    weights: int, shape: ModelShape, hidden_size: int, tokens: int, caches: int
) -> PrefillBytes:
    """What the prefill of one prompt may hold beside the caches of all."""
    layer = shape.kv_bytes(tokens) // shape.num_layers
    workspace = WORKSPACE * tokens * hidden_size * shape.element_bytes
    return PrefillBytes(weights, layer, caches, workspace)


def allowed_bytes(loaded: LoadedModel, tokens: int, caches: int) -> PrefillBytes:
    """The same for a model that is loaded, beside caches that are there."""
    return prefill_bytes(loaded.weight_bytes, loaded.shape, loaded.hidden_size, tokens, caches)


class PeakMemory:
    """Peak of the device's allocator, or on a CPU of the process, since `restart`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def restart(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        control = Path("/proc/self/clear_refs")
        with suppress(OSError):  # no such file, or not ours: then since the process began
            control.write_text("5")  # resets VmHWM, see proc(5)

    def read(self) -> int:
        """Bytes; 0 where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return proc_field("/proc/self/status", "VmHWM")
