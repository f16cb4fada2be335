"""Write the trained model as any other model is written: configuration and safetensors, bf16."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM


def rounded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy whose float32 weights are those that a bf16 file holds."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return result


def export_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors to `folder`."""
    result: Any = copy.deepcopy(model)
    result.to("cpu", torch.bfloat16)
    config = result.config
    result.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
    )
    result.save_pretrained(folder)
