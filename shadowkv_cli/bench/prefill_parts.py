"""The parts that a layer's prefill is made of, each timed alone on a GPU.

Attention by backend, the matrix products, the ops around them, and what the official code does in
their place, on tensors of the true shape and the weights of the model's first layer: its layers are
all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shadowkv_cli import ops
from shadowkv_cli.methods.low_rank import Method, factorise
from shadowkv_cli.methods.tiles import tiles
from shadowkv_cli.model import exact_attention
from shadowkv_cli.model.last_layer import last_mlp
from shadowkv_cli.model.loading import LoadedModel
from shadowkv_cli.model.rotary import attention_modules

SEED = 42
LARGE = 8192
"""Rows and columns of the large matrix product that everything is held against."""


def best_seconds(device: torch.device, work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each repeat, on a GPU by its own events, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    return seconds[1:]


def random(*size: int, like: LoadedModel) -> Tensor:
    """Standard normal numbers in a model's precision, on its device."""
    generator = torch.Generator(like.device).manual_seed(SEED)
    return torch.randn(size, generator=generator, device=like.device, dtype=like.dtype)


def large_product(loaded: LoadedModel, repeats: int) -> tuple[list[float], float]:
    """Seconds and operations of a large square matrix product."""
    a, b = (random(LARGE, LARGE, like=loaded) for _ in range(2))
    out = torch.empty_like(a)
    return best_seconds(loaded.device, lambda: torch.mm(a, b, out=out), repeats), 2 * LARGE**3


def heads_of(loaded: LoadedModel, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values of a layer as its projections lay them out."""
    shape = loaded.shape
    return tuple(  # type: ignore[return-value]
        random(1, tokens, heads, shape.head_dim, like=loaded).transpose(1, 2)
        for heads in (shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads)
    )


def attention(
    loaded: LoadedModel, tokens: int, backend: str, repeats: int
) -> tuple[list[float], float]:
    """Seconds and operations of one layer's causal attention."""
    q, k, v = heads_of(loaded, tokens)
    scale = loaded.shape.head_dim**-0.5
    work = partial(exact_attention.attend, backend, q, k, v, scale)
    seconds = best_seconds(loaded.device, work, repeats)
    return seconds, 2 * tokens**2 * loaded.shape.num_q_heads * loaded.shape.head_dim


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def _layer(loaded: LoadedModel) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """Projections of the first layer's attention and of its MLP."""
    first = attention_modules(loaded.model)[0]
    layer = next(m for m in loaded.model.modules() if any(child is first for child in m.children()))
    ours = _linears(first)
    return ours, [m for m in _linears(layer) if all(m is not other for other in ours)]


def products(loaded: LoadedModel, tokens: int, repeats: int) -> tuple[list[float], float]:
    """Seconds and operations of one layer's matrix products, the MLP's in tiles as they are run."""
    attending, mlp = _layer(loaded)
    inputs = {m.in_features: random(1, tokens, m.in_features, like=loaded) for m in attending}
    cut = list(tiles(tokens))
    longest = max(tile.stop - tile.start for tile in cut)
    inner = {m.in_features: random(1, longest, m.in_features, like=loaded) for m in mlp}
    into = [m for m in mlp if m.in_features == loaded.hidden_size]
    out_of = [m for m in mlp if m.in_features != loaded.hidden_size]
    joint = torch.cat([m.weight for m in into])  # gate and up are one product

    def run() -> None:
        for m in attending:
            nn.functional.linear(inputs[m.in_features], m.weight)
        for tile in cut:
            rows = tile.stop - tile.start
            nn.functional.linear(inner[loaded.hidden_size][:, :rows], joint)
            for m in out_of:
                nn.functional.linear(inner[m.in_features][:, :rows], m.weight)

    weights = sum(m.weight.numel() for m in (*attending, *mlp))
    return best_seconds(loaded.device, run, repeats), 2 * weights * tokens


def small_ops(loaded: LoadedModel, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of a layer's norms, rotation, gate and sums, each alone."""
    width = loaded.hidden_size
    x, y = random(1, tokens, width, like=loaded), random(1, tokens, width, like=loaded)
    weight = random(width, like=loaded)
    q, k, _ = heads_of(loaded, tokens)
    cos, sin = (random(1, tokens, loaded.shape.head_dim, like=loaded) for _ in range(2))
    cut = list(tiles(tokens))
    longest = max(tile.stop - tile.start for tile in cut)
    _, mlp = _layer(loaded)
    inner = max(m.in_features for m in mlp)
    gate, up = random(1, longest, 2 * inner, like=loaded).chunk(2, -1)

    def rotate() -> None:
        ops.rotate_heads_(q, k, cos, sin, loaded.interleaved)

    def gated() -> None:
        for tile in cut:
            rows = tile.stop - tile.start
            ops.gated_silu(gate[:, :rows], up[:, :rows])

    return {
        "two norms": best_seconds(
            loaded.device, lambda: [ops.rms_norm(x, weight, 1e-5) for _ in range(2)], repeats
        ),
        "rotation": best_seconds(loaded.device, rotate, repeats),
        "gate": best_seconds(loaded.device, gated, repeats),
        "two sums": best_seconds(loaded.device, lambda: [x + y for _ in range(2)], repeats),
    }


def prefill_flops(loaded: LoadedModel, tokens: int) -> float:
    """Operations of a whole prefill: products of all layers, and causal attention.

    Without what only the last token goes through: the last layer's attention and MLP, the head.
    """
    shape, model = loaded.shape, loaded.model
    ends = [model.get_input_embeddings(), model.get_output_embeddings(), last_mlp(model)]
    skipped = {id(p): p.numel() for m in ends if m is not None for p in m.parameters()}
    weights = sum(p.numel() for p in model.parameters()) - sum(skipped.values())
    attention = 2 * tokens**2 * shape.num_q_heads * shape.head_dim * (shape.num_layers - 1)
    return float(2 * weights * tokens + attention)


def official_svd(loaded: LoadedModel, tokens: int) -> list[float]:
    """Seconds of the official code's factorisation of a layer: a full SVD in float32."""
    keys = random(tokens, loaded.shape.key_width, like=loaded).float()
    return best_seconds(loaded.device, lambda: torch.linalg.svd(keys, full_matrices=False), 1)


def factorisation(
    loaded: LoadedModel, tokens: int, rank: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of a layer's low-rank form by each way to find its directions."""
    keys = random(tokens, loaded.shape.key_width, like=loaded)
    ways: Sequence[Method] = ("eigh", "subspace")
    return {
        way: best_seconds(loaded.device, partial(factorise, keys, rank, way), repeats)
        for way in ways
    }
