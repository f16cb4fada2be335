"""The bundled model's architecture; its weights are random until trained ones are shipped."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

DEMO_SEED = 20261124
DEMO_CONTEXT = 131_072


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


def random_demo_model(config: LlamaConfig) -> PreTrainedModel:
    """Make the demo model with weights that depend on nothing but `DEMO_SEED`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DEMO_SEED)
        return LlamaForCausalLM(config)
