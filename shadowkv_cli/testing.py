"""For tests and for users who check their installation: small random models, scores of cells."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GlmConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from shadowkv_cli.cells import build_specs
from shadowkv_cli.model.loading import LoadedModel, describe
from shadowkv_cli.model.session import Session
from shadowkv_cli.tasks.metrics import score
from shadowkv_cli.tasks.rows import Sample
from shadowkv_cli.tasks.tokenization import encode_prompt

FAMILIES = ("llama", "qwen2", "glm", "phi3")
"""Llama 3.1 scaling; biased projections; interleaved half rotation; longrope past its switch."""

_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def tiny_config(family: str, *, head_dim: int = 16) -> PreTrainedConfig:
    """A configuration with two layers, four query and two KV heads."""
    sizes = _SIZES | {"hidden_size": _SIZES["num_attention_heads"] * head_dim}
    if family == "llama":
        scaling = {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
        return LlamaConfig(**sizes, head_dim=head_dim, rope_parameters=scaling)
    if family == "qwen2":
        return Qwen2Config(**sizes)
    if family == "glm":
        return GlmConfig(**sizes, head_dim=head_dim)
    assert family == "phi3", family
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * (head_dim // 2),
        "long_factor": [4.0] * (head_dim // 2),
        "original_max_position_embeddings": 128,
        "partial_rotary_factor": 1.0,
    }
    return Phi3Config(**sizes, original_max_position_embeddings=128, rope_parameters=longrope)


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, head_dim: int = 16
) -> LoadedModel:
    """A random model of a family, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            tiny_config(family, head_dim=head_dim), dtype=dtype
        )
    return describe(model, f"tiny-{family}", random_weights=True)


def score_cells(
    loaded: LoadedModel,
    tokenizer: Any,
    samples: Sequence[Sample],
    cells: Sequence[str],
    new_tokens: int,
) -> dict[str, list[float]]:
    """Score of every cell on every sample, in [0, 1], all cells after one prefill a sample.

    Args:
        cells: like `shadowkv:rank=64`, see `cells.build_specs`.
        new_tokens: the longest answer.
    """
    specs = build_specs(cells, {})
    longest = max(sample.prompt_tokens for sample in samples)
    session = Session(loaded, specs, prompt_tokens=longest, new_tokens=new_tokens)
    scores: dict[str, list[float]] = {cell: [] for cell in cells}
    for sample in samples:
        logits = session.prefill(encode_prompt(tokenizer, sample.text), key=sample.id)
        first = logits.argmax(-1).expand(len(specs))
        answers = session.generate(first, [new_tokens] * len(specs), loaded.eos_ids)
        for cell, ids in zip(cells, answers, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            scores[cell].append(score(text, sample))
    return scores


def log_prob_error(
    loaded: LoadedModel, tokenizer: Any, samples: Sequence[Sample], cell: str, steps: int = 4
) -> float:
    """Mean distance of a cell's log-probabilities to full attention's, over tokens of the latter.

    Finer than a score: it shows what a robust model answers rightly all the same.
    """
    specs = build_specs(["full", cell], {})
    longest = max(sample.prompt_tokens for sample in samples)
    session = Session(loaded, specs, prompt_tokens=longest, new_tokens=steps)
    errors = []
    for sample in samples:
        logits = session.prefill(encode_prompt(tokenizer, sample.text), key=sample.id)
        for _ in range(steps):
            full, other = session.decode_step(logits.argmax(-1).expand(2)).log_softmax(-1)
            errors.append(float((other - full).abs().mean()))
            logits = full
    return fmean(errors)
