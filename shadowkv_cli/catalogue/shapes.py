"""`shape:NAME`: models of a true size with random weights, for timing without a download."""

from __future__ import annotations

from typing import Any

from shadowkv_cli.errors import unknown_name

PREFIX = "shape:"

_LLAMA3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA3
    | {
        "max_position_embeddings": 131_072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-3-8b-1m": _LLAMA3
    | {
        "max_position_embeddings": 1_048_576,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3_580_165_449.0},
    },
    "glm-4-9b-1m": {
        "model_type": "glm",
        "vocab_size": 151_552,
        "hidden_size": 4096,
        "intermediate_size": 13_696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "attention_bias": True,
        "max_position_embeddings": 1_048_576,
    },
    "yi-9b-200k": {
        "model_type": "llama",
        "vocab_size": 64_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0},
    },
    "phi-3-mini-128k": {
        "model_type": "phi3",
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 131_072,
    },
    "qwen2-7b": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
}
"""Sizes as in the models' published configurations; factors of rotations that change no time (of
longrope, GLM's base) are left at defaults."""


def shape_named(name: str) -> dict[str, Any] | None:
    """The configuration behind `shape:NAME`; None for the name of a real model.

    Raises UsageError, naming all shapes, for one that there is not.
    """
    if not name.startswith(PREFIX):
        return None
    shape = name.removeprefix(PREFIX)
    if shape not in SHAPES:
        raise unknown_name("shape", shape, SHAPES)
    return SHAPES[shape]
