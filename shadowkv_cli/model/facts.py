"""What a dry run must know of a model, from its configuration alone: no weights are downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging

from shadowkv_cli.config import ModelShape
from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.model.demo import demo_config
from shadowkv_cli.model.rotary import attention_modules, rotary_module


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a decoder that time and memory follow from.

    Attributes:
        name: as it was asked for.
        dtype: of its weights and cache, like `bfloat16`.
        parameters: all of them, tied ones once.
        layer_parameters: those that every token of a prompt is multiplied with: without the
            embedding and the output head, which a prefill uses for the last token only.
        shape: sizes of its attention.
        max_positions: the longest context that it has positions for.
        weight_bytes: bytes of all parameters.
    """

    name: str
    dtype: str
    parameters: int
    layer_parameters: int
    shape: ModelShape
    max_positions: int
    weight_bytes: int


def model_facts(
    name: str,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
) -> ModelFacts:
    """Describe `demo`, a folder or a hub model by building it without memory (the meta device).

    Raises:
        UsageError: a folder without a model, or an architecture that methods can't serve.
        ShadowKVError: the configuration is gated, not in reach or not readable.
    """
    transformers_logging.set_verbosity_error()
    if name == "demo":
        config: PreTrainedConfig = _demo_config()
    else:
        config = _load_config(name, revision, trust_remote_code, offline)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except (ValueError, ImportError) as error:
        raise UsageError(f"Cannot build the model {name}: {_one_line(error)}") from None
    return _facts(model, name, dtype)


def _facts(model: PreTrainedModel, name: str, dtype: torch.dtype) -> ModelFacts:
    attention: list[Any] = [*attention_modules(model)]
    rotary_module(model)  # refuses a model that does not rotate keys
    config = model.config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    embeddings: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    ends = {module.weight for module in embeddings if module is not None}
    return ModelFacts(
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        parameters=parameters,
        layer_parameters=parameters - sum(weight.numel() for weight in ends),
        shape=ModelShape(
            num_layers=len(attention),
            num_q_heads=config.num_attention_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=attention[0].head_dim,
            element_bytes=dtype.itemsize,
        ),
        max_positions=config.max_position_embeddings,
        weight_bytes=sum(p.nbytes for p in model.parameters()),
    )


def _demo_config() -> PreTrainedConfig:
    from shadowkv_cli.tasks.tokenization import load_tokenizer

    tokenizer = load_tokenizer("demo")
    return demo_config(
        len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    )


def _load_config(name: str, revision: str | None, trust: bool, offline: bool) -> PreTrainedConfig:
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UsageError(f"The folder {name} holds no model: it has no config.json.")
    try:
        return AutoConfig.from_pretrained(
            name,
            revision=revision or "main",
            trust_remote_code=trust,
            local_files_only=offline,
        )
    except (OSError, ValueError) as error:
        raise ShadowKVError(
            f"Cannot read the configuration of {name}: {_one_line(error)} (a folder with "
            "config.json, a hub id with the hub in reach, or `demo`)"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
