"""What a dry run must know of a model, from its configuration alone: no weights are downloaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import logging as transformers_logging

from shadowkv_cli.catalogue.places import config_folder
from shadowkv_cli.catalogue.shapes import shape_named
from shadowkv_cli.config import ModelShape
from shadowkv_cli.model.last_layer import last_mlp
from shadowkv_cli.model.loading_errors import explained
from shadowkv_cli.model.rotary import attention_modules, head_dim, rotary_module
from shadowkv_cli.run_config import ModelChoice


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a decoder that time and memory follow from.

    Attributes:
        name: as it was asked for.
        dtype: of its weights and cache, like `bfloat16`.
        parameters: all of them, tied ones once.
        layer_parameters: those that every token of a prompt is multiplied with: without the
            embedding and the output head and the last layer's MLP, which a prefill uses for the
            last token only.
        shape: sizes of its attention.
        max_positions: the longest context that it has positions for.
        weight_bytes: bytes of all parameters.
        hidden_size: width of the residual stream.
        is_quantised: the checkpoint keeps weights in fewer bits, so `weight_bytes` is too many.
    """

    name: str
    dtype: str
    parameters: int
    layer_parameters: int
    shape: ModelShape
    max_positions: int
    weight_bytes: int
    hidden_size: int
    is_quantised: bool = False


def model_facts(choice: ModelChoice, dtype: torch.dtype) -> ModelFacts:
    """Describe a model by building it without memory (the meta device).

    Raises:
        UsageError: a folder without a model, or an architecture that methods can't serve.
        ShadowKVError: the configuration is gated, not in reach or not readable.
    """
    transformers_logging.set_verbosity_error()
    name, trust = choice.name, choice.trust_remote_code
    if (ours := config_folder(name)) is not None:
        choice = dataclasses.replace(choice, name=str(ours), revision=None)
    shape = shape_named(name)
    with explained(choice) as local:
        config = (
            AutoConfig.for_model(**shape)
            if shape is not None
            else AutoConfig.from_pretrained(
                choice.name,
                revision=choice.revision or "main",
                trust_remote_code=trust,
                local_files_only=local,
            )
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    return _facts(model, name, dtype)


def _facts(model: PreTrainedModel, name: str, dtype: torch.dtype) -> ModelFacts:
    attention: list[Any] = [*attention_modules(model)]
    rotary_module(model)  # refuses a model that does not rotate keys
    config = model.config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    embeddings: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    ends = {module.weight for module in embeddings if module is not None}
    if (mlp := last_mlp(model)) is not None:
        ends |= set(mlp.parameters())
    return ModelFacts(
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        parameters=parameters,
        layer_parameters=parameters - sum(weight.numel() for weight in ends),
        shape=ModelShape(
            num_layers=len(attention),
            num_q_heads=config.num_attention_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=head_dim(model),
            element_bytes=dtype.itemsize,
        ),
        max_positions=config.max_position_embeddings,
        weight_bytes=sum(p.nbytes for p in model.parameters()),
        hidden_size=config.hidden_size,
        is_quantised=getattr(model.config, "quantization_config", None) is not None,
    )
