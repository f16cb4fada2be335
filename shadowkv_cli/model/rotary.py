"""The model's own rotary tables: how it pairs dimensions, and one fixed table a prompt."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from shadowkv_cli.errors import UsageError
from shadowkv_cli.ops.rotary import rotate


def rotary_module(model: nn.Module) -> nn.Module:
    """Find the model's one rotary module. Raises UsageError where there is none or several."""
    found = [m for name, m in model.named_modules() if name.split(".")[-1] == "rotary_emb"]
    if len(found) != 1:
        raise UsageError(
            f"{type(model).__name__} has {len(found)} rotary modules; methods need exactly one."
        )
    if "layer_type" in inspect.signature(type(found[0]).forward).parameters:
        raise UsageError(
            f"{type(model).__name__} rotates layers of different types differently; methods need "
            "one rotary table for all."
        )
    return found[0]


def attention_modules(model: nn.Module) -> list[Any]:
    """The attention of each layer, in order."""
    found: list[Any] = [
        m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")
    ]
    if not found:
        raise UsageError(f"{type(model).__name__} has no attention layers that methods know.")
    return sorted(found, key=lambda m: int(m.layer_idx))


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that hold an attention module each, in order."""
    holders = {child: module for module in model.modules() for child in module.children()}
    return [holders[attention] for attention in attention_modules(model)]


def head_dim(model: nn.Module) -> int:
    """Dimensions of a key. Raises UsageError for keys that are compressed (latent attention)."""
    dim = getattr(attention_modules(model)[0], "head_dim", None)
    if dim is None:
        raise UsageError(
            f"{type(model).__name__} compresses its keys and values by itself; methods need plain "
            "heads."
        )
    return int(dim)


def is_interleaved(model: nn.Module) -> bool:
    """Whether the model rotates neighbouring dimensions (GLM) or halves (Llama), by trying it.

    Raises UsageError for a family that rotates in another way.
    """
    family = importlib.import_module(type(attention_modules(model)[0]).__module__)
    apply = getattr(family, "apply_rotary_pos_emb", None)
    if apply is None:
        raise UsageError(f"{type(model).__name__} does not rotate keys the way methods know.")
    device = next(model.parameters()).device
    cos, sin = compute_table(rotary_module(model), 8, 8, torch.float32, device)
    # Some families rotate the whole head or its first part themselves, some are given that part.
    dim = cos.shape[-1]
    sample = torch.randn(1, 1, 8, dim, generator=torch.Generator().manual_seed(0)).to(device)
    expected = apply(sample, sample, cos[None], sin[None])[1]
    half = cos.shape[-1] // 2
    for interleaved in (False, True):
        ours = rotate(sample, cos[:, :half], sin[:, :half], interleaved)
        if torch.allclose(ours, expected, atol=1e-5):
            return interleaved
    raise UsageError(f"{type(model).__name__} pairs rotary dimensions in a way methods don't know.")


@torch.no_grad()
def compute_table(
    rotary: nn.Module,
    prompt_tokens: int,
    total_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [total_tokens, D'] with the frequencies that the prompt's length asks for.

    Families that choose frequencies by length (longrope, dynamic) choose them once, by the prompt:
    they would otherwise change in the middle of an answer.
    """
    like = torch.empty(1, dtype=dtype, device=device)
    for tokens in (1, prompt_tokens):  # the first undoes what a longer prompt left behind
        rotary(like, torch.arange(tokens, device=device)[None])
    plain = inspect.unwrap(type(rotary).forward)
    cos, sin = plain(rotary, like, torch.arange(total_tokens, device=device)[None])
    half = cos.shape[-1] // 2
    if not torch.equal(cos[..., :half], cos[..., half:]):
        raise UsageError(f"{type(rotary).__name__} builds its table in a way methods don't know.")
    return cos[0], sin[0]
