"""The bundled model: its architecture, and its weights beside the package's code."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from shadowkv_cli.catalogue.places import DEMO_MODEL_DIR

DEMO_CONTEXT = 32_768
"""Ids that it is trained for, answers included; its recall beyond them was not measured."""


def demo_config(vocab_size: int, bos: int, eos: int, pad: int) -> LlamaConfig:
    """A Llama of 6 layers, 8 query and 4 KV heads of 64: small enough for a CPU."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=DEMO_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def load_demo_model(dtype: torch.dtype) -> PreTrainedModel:
    """Load the trained weights that come with the package."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL_DIR, dtype=dtype, local_files_only=True, use_safetensors=True
    )
    return model
