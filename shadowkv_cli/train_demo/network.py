"""The demo model's weights, and a forward pass over them that trains fast.

The weights live in transformers' LlamaForCausalLM; a test holds this forward pass equal to its own.
Everything but attention sees ids as one flat list, so that steps of any row length run the same two
compiled functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""The first that can be used is used."""
LOOK_BACK = (1, 2, 3, None)
"""How far each KV head of the first layer looks back at the start of training; one is free."""
CONSTANT, SHARPNESS, FREQUENCIES = 4.0, 4.0, 6


def new_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """Random weights, but heads of the first layer start by looking at the ids just before.

    Induction heads need such heads and are slow to find them. A small copy of this model, trained
    with Muon, copied 97 % of repeated spans after 264 steps; from plain random weights 26 % after
    700, and with AdamW about 30 % after 500 from either (one seed and one learning rate each).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    _look_back(model)
    return model


@torch.no_grad()
def _look_back(model: LlamaForCausalLM) -> None:
    """A constant first channel becomes a query, and a key that is rotated back by a distance."""
    config: Any = model.config
    size, half = config.head_dim, config.head_dim // 2
    group = config.num_attention_heads // config.num_key_value_heads
    frequencies = model.model.rotary_emb.inv_freq
    std = config.initializer_range
    model.model.embed_tokens.weight[:, 0] = std * CONSTANT
    attention = model.model.layers[0].self_attn
    strength = SHARPNESS / CONSTANT
    for head, distance in enumerate(LOOK_BACK[: config.num_key_value_heads]):
        if distance is None:
            continue
        for i in range(FREQUENCIES):
            angle = distance * float(frequencies[i])
            attention.k_proj.weight[head * size + i, 0] = strength * math.cos(angle)
            attention.k_proj.weight[head * size + half + i, 0] = strength * math.sin(angle)
            for query in range(head * group, (head + 1) * group):
                attention.q_proj.weight[query * size + i, 0] = strength
                attention.q_proj.weight[query * size + half + i, 0] = 0.0


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    x = x.view(x.shape[0], -1, head_dim)
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def project(
    x: Tensor,
    norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    head_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, hidden) -> rotated queries and keys, and values, each (n, heads, head_dim)."""
    x = rms_norm(x, norm, eps)
    queries = _rotate(_linear(x, q, dtype), cos, sin, head_dim)
    keys = _rotate(_linear(x, k, dtype), cos, sin, head_dim)
    values = _linear(x, v, dtype)
    return queries, keys, values.view(values.shape[0], -1, head_dim)


def combine(
    x: Tensor,
    attended: Tensor,
    o: Tensor,
    norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Add what attention found and what the MLP makes of it: (n, hidden) -> (n, hidden)."""
    x = x + _linear(attended, o, dtype)
    y = rms_norm(x, norm, eps)
    inner = F.silu(_linear(y, gate, dtype)) * _linear(y, up, dtype)
    return x + _linear(inner, down, dtype)


@dataclass
class Cache:
    """Keys and values of one layer, (batch, KV heads, room, head_dim)."""

    keys: Tensor
    values: Tensor


class Network:
    """Forward passes over a model's weights.

    Attributes:
        dtype: of the matrix products; the residual stream is float32.
    """

    def __init__(self, model: LlamaForCausalLM, *, dtype: torch.dtype, compiled: bool) -> None:
        self.model = model
        self.config: Any = model.config
        self.dtype = dtype
        self._project: Callable[..., tuple[Tensor, Tensor, Tensor]] = project
        self._combine: Callable[..., Tensor] = combine
        if compiled:
            self._project = torch.compile(project, dynamic=False)
            self._combine = torch.compile(combine, dynamic=False)
        # Like compiling, cuDNN takes time for each new shape, and is the fastest after that.
        self._attention = [SDPBackend.CUDNN_ATTENTION, *ATTENTION] if compiled else ATTENTION
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def _table(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        if (rows, length) not in self._tables:
            device = self.model.model.embed_tokens.weight.device
            cos, sin = self.angles(torch.arange(length, device=device))
            self._tables[rows, length] = (cos.repeat(rows, 1), sin.repeat(rows, 1))
        return self._tables[rows, length]

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (n, head_dim), of n positions."""
        inverse = self.model.model.rotary_emb.inv_freq.float()
        angles = positions.float()[:, None] * inverse
        return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def hidden(self, ids: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """Hidden states before the last norm of (rows, length) ids: (rows * length, hidden).

        With caches, keys and values are kept at the first `length` places.
        """
        rows, length = ids.shape
        cos, sin = self._table(rows, length)
        eps, size = self.config.rms_norm_eps, self.config.head_dim
        x = self.model.model.embed_tokens(ids.reshape(-1))
        for number, layer in enumerate(self.model.model.layers):
            a, m = layer.self_attn, layer.mlp
            q, k, v = self._project(
                x,
                layer.input_layernorm.weight,
                a.q_proj.weight,
                a.k_proj.weight,
                a.v_proj.weight,
                cos,
                sin,
                eps,
                size,
                self.dtype,
            )
            q, k, v = (t.view(rows, length, -1, size).transpose(1, 2) for t in (q, k, v))
            if caches is not None:
                caches[number].keys[:, :, :length] = k
                caches[number].values[:, :, :length] = v
            with sdpa_kernel(self._attention, set_priority=True):
                found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            found = found.transpose(1, 2).reshape(rows * length, -1)
            x = self._combine(
                x,
                found,
                a.o_proj.weight,
                layer.post_attention_layernorm.weight,
                m.gate_proj.weight,
                m.up_proj.weight,
                m.down_proj.weight,
                eps,
                self.dtype,
            )
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) before the last norm -> (n, vocabulary) float32."""
        norm = self.model.model.norm.weight
        normed = rms_norm(hidden, norm, self.config.rms_norm_eps)
        return _linear(normed, self.model.lm_head.weight, self.dtype).float()

    def step(self, ids: Tensor, positions: Tensor, caches: list[Cache]) -> Tensor:
        """One id for each row at its own place: (rows,) -> (rows, vocabulary); extends caches."""
        rows = ids.shape[0]
        cos, sin = self.angles(positions)
        eps, size = self.config.rms_norm_eps, self.config.head_dim
        x = self.model.model.embed_tokens(ids)
        every = torch.arange(rows, device=ids.device)
        room = caches[0].keys.shape[2]
        mask = torch.arange(room, device=ids.device)[None] <= positions[:, None]
        for layer, cache in zip(self.model.model.layers, caches, strict=True):
            a, m = layer.self_attn, layer.mlp
            q, k, v = project(
                x,
                layer.input_layernorm.weight,
                a.q_proj.weight,
                a.k_proj.weight,
                a.v_proj.weight,
                cos,
                sin,
                eps,
                size,
                self.dtype,
            )
            cache.keys[every, :, positions] = k
            cache.values[every, :, positions] = v
            grouped = q.view(rows, cache.keys.shape[1], -1, size)
            scores = (grouped @ cache.keys.mT).float() / math.sqrt(size)
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
            found = scores.softmax(-1).to(v.dtype) @ cache.values
            x = combine(
                x,
                found.reshape(rows, -1),
                a.o_proj.weight,
                layer.post_attention_layernorm.weight,
                m.gate_proj.weight,
                m.up_proj.weight,
                m.down_proj.weight,
                eps,
                self.dtype,
            )
        return self.logits(x)
