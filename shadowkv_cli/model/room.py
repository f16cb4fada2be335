"""Whether the weights of a model fit, before any of them is read."""

from __future__ import annotations

import torch

from shadowkv_cli.catalogue.shapes import shape_named
from shadowkv_cli.console import format_bytes
from shadowkv_cli.errors import UsageError
from shadowkv_cli.host_memory import available_host_bytes
from shadowkv_cli.model.facts import model_facts
from shadowkv_cli.run_config import ModelChoice


def check_weights_fit(choice: ModelChoice, dtype: torch.dtype, device: torch.device) -> None:
    """Raise UsageError where they do not: on a CPU the system would end the process, or another.

    Sizes follow from the configuration. Nothing is known of a model whose code is its own, or
    whose weights are kept in fewer bits.
    """
    if choice.trust_remote_code:
        return
    facts = model_facts(choice, dtype)
    if facts.is_quantised:
        return
    check_room(choice.name, facts.dtype, facts.weight_bytes, device)


def check_room(name: str, dtype: str, weight_bytes: int, device: torch.device) -> None:
    """The same for weights of so many bytes, of a model that is called `name`."""
    free: dict[str, int] = {}
    if device.type == "cuda":
        free[f" on {device}"] = torch.cuda.mem_get_info(device)[0]
    # Weights of a checkpoint pass through the host; random ones are drawn where they stay.
    if device.type == "cpu" or shape_named(name) is None:
        free[" of the host's memory"] = available_host_bytes()
    for where, there in free.items():
        if 0 < there < weight_bytes:  # 0: the system does not tell
            smaller = " use --dtype bfloat16, or" if dtype == "float32" else " use"
            raise UsageError(
                f"The weights of {name} take {format_bytes(weight_bytes)} in {dtype}, "
                f"{format_bytes(there)}{where} are free:{smaller} a smaller model or more memory."
            )
