"""How many samples are answered as one batch: as many as memory holds with ease."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shadowkv_cli.config import MethodSpec, ModelShape
from shadowkv_cli.errors import UsageError
from shadowkv_cli.shared_bytes import shared_cache_bytes

if TYPE_CHECKING:
    import torch

MOST_SAMPLES = 8
"""More gain little: a step then takes longer with every row."""

MEMORY_SHARE = 0.25
"""Of the memory that is free, what their caches may take: a prefill wants workspace, too."""


def parse_batch_size(text: str) -> int | None:
    """Read `auto` (None) or a number of samples. Raises UsageError for anything else."""
    if text == "auto":
        return None
    if not (text.isdecimal() and int(text)):
        raise UsageError(f"--batch-size must be auto or a number from 1, not '{text}'.")
    return int(text)


def samples_together(
    specs: Sequence[MethodSpec],
    shape: ModelShape,
    device: torch.device,
    prompt_tokens: int,
    new_tokens: int,
    *,
    workers: int,
    still_to_load: int = 0,
) -> int:
    """Choose how many samples are decoded together, at least 1.

    Args:
        specs: the cells of each.
        shape: of the model.
        device: where it is, or will be.
        prompt_tokens, new_tokens: of the longest prompt and answer.
        workers: processes that do this on the device at a time.
        still_to_load: bytes of the model, where it is not there yet.
    """
    from shadowkv_cli.bench.memory import free_device_bytes, free_host_bytes

    held = shared_cache_bytes(specs, shape, prompt_tokens, new_tokens)
    needs = [(held.device, free_device_bytes(device) - still_to_load)]
    if device.type == "cpu":
        needs = [(held.device + held.host, needs[0][1])]
    elif held.host:
        needs.append((held.host, free_host_bytes()))
    fitting = [MEMORY_SHARE * free / workers / bytes_ for bytes_, free in needs]
    return max(1, min(MOST_SAMPLES, math.floor(min(fitting))))
