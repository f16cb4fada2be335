"""Whether the weights of a model fit, before any of them is read."""

from __future__ import annotations

import torch

from shadowkv_cli.catalogue.shapes import shape_named
from shadowkv_cli.console import format_bytes
from shadowkv_cli.errors import UsageError
from shadowkv_cli.host_memory import available_host_bytes
from shadowkv_cli.model.facts import ModelFacts


def check_weights_fit(facts: ModelFacts, device: torch.device) -> None:
    """Raise UsageError where they do not: on a CPU the system would end the process, or another.

    Of weights that a checkpoint keeps in fewer bits nothing is known.
    """
    if facts.is_quantised:
        return
    free: dict[str, int] = {}
    if device.type == "cuda":
        free[f" on {device}"] = torch.cuda.mem_get_info(device)[0]
    # Weights of a checkpoint pass through the host; random ones are drawn where they stay.
    if device.type == "cpu" or shape_named(facts.name) is None:
        free[" of the host's memory"] = available_host_bytes()
    for where, there in free.items():
        if 0 < there < facts.weight_bytes:  # 0: the system does not tell
            smaller = " use --dtype bfloat16, or" if facts.dtype == "float32" else " use"
            raise UsageError(
                f"The weights of {facts.name} take {format_bytes(facts.weight_bytes)} in "
                f"{facts.dtype}, {format_bytes(there)}{where} are free:{smaller} a smaller model "
                "or more memory."
            )
