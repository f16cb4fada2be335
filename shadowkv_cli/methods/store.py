"""Prompt data that rows share: held once a prompt, whatever the number of methods and cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shadowkv_cli import ops
from shadowkv_cli.config import MethodSpec, ModelShape, ShadowKVSpec
from shadowkv_cli.methods.low_rank import factorise
from shadowkv_cli.methods.pinned import host_memory, pin
from shadowkv_cli.ops.rotary import unrotate


@dataclass(frozen=True)
class Prompt:
    """A prompt in the store: its index, its length, and a name that seeds random draws."""

    index: int
    tokens: int
    key: str


@dataclass
class RotaryTables:
    """The tables that rotate queries and keys, one a distinct set of frequencies.

    Attributes:
        cos, sin: [T, S', D'] in the model's dtype, as the model's own module computes them.
        index: int32 [P], the table of each prompt.
        interleaved: the pairing, see `ops.rotary`.
    """

    cos: Tensor
    sin: Tensor
    index: Tensor
    interleaved: bool

    def halves(self) -> tuple[Tensor, Tensor]:
        """One entry a pair of dimensions: [T, S', D' / 2] each."""
        half = self.cos.shape[-1] // 2
        return self.cos[..., :half], self.sin[..., :half]


@dataclass(frozen=True)
class Needs:
    """What the chosen methods want kept of a prompt."""

    keys: bool
    values: bool
    host_values: bool
    rank: int
    landmarks: tuple[tuple[int, int], ...]
    alignment: int

    @classmethod
    def of(cls, specs: Sequence[MethodSpec], on_host_device: bool) -> Needs:
        """Unite the needs of several methods; `on_host_device`: the model runs on the CPU."""
        shadow = [s for s in specs if isinstance(s, ShadowKVSpec)]
        on_host = any(s.value_placement == "host" for s in shadow) and not on_host_device
        others = any(s.name in ("full", "oracle", "random") for s in specs)
        return cls(
            keys=others,
            values=others
            or any(s.value_placement == "device" for s in shadow)
            or (bool(shadow) and on_host_device),
            host_values=on_host,
            rank=max((s.rank for s in shadow), default=0),
            landmarks=tuple(sorted({(s.chunk_size, s.landmarks_per_chunk) for s in shadow})),
            alignment=math.lcm(*{getattr(s, "chunk_size", 1) for s in specs}),
        )


class PromptStore:
    """Keys, values, low-rank keys and landmarks of P prompts, of up to S tokens, all layers."""

    def __init__(
        self,
        shape: ModelShape,
        specs: Sequence[MethodSpec],
        *,
        num_prompts: int,
        prompt_tokens: int,
        new_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.needs = needs = Needs.of(specs, device.type == "cpu")
        self.num_prompts = num_prompts
        self.prompt_tokens = math.ceil(prompt_tokens / needs.alignment) * needs.alignment
        layers, heads, dim = range(shape.num_layers), shape.num_kv_heads, shape.head_dim
        prompts, tokens = num_prompts, self.prompt_tokens

        def empty(*size: int) -> list[Tensor]:
            return [torch.empty(*size, dtype=dtype, device=device) for _ in layers]

        # The tokens that full attention generates follow the prompt.
        held = tokens + (new_tokens if any(spec.name == "full" for spec in specs) else 0)
        self.keys = empty(prompts, heads, held, dim) if needs.keys else []
        self.values = empty(prompts, heads, held, dim) if needs.values else []
        self.host_values: list[Tensor] = []
        if needs.host_values:
            self.host_values = [host_memory((prompts, heads, tokens, dim), dtype) for _ in layers]
            pin(self.host_values, self)
        rank = needs.rank
        self.coefficients = empty(prompts, tokens, rank) if rank else []
        self.basis = empty(prompts, heads, rank, dim) if rank else []
        self.landmarks = {
            (size, count): empty(prompts, heads, tokens // size, count, dim)
            for size, count in needs.landmarks
        }
        self.similarity: dict[int, list[Tensor]] = {
            size: [
                torch.empty(prompts, heads, tokens // size, dtype=torch.float32, device=device)
                for _ in layers
            ]
            for size in {size for size, _ in needs.landmarks}
        }
        self.tables: RotaryTables | None = None
        """Set before the first prompt; a captured graph reads them where they are."""

    def chunked(self, tensor: Tensor, chunk_size: int) -> Tensor:
        """View the prompt part of keys or values as chunks: [P, Hk, C, c, D]."""
        return tensor[:, :, : self.prompt_tokens].unflatten(2, (-1, chunk_size))

    def chunked_values(self, layer: int, chunk_size: int, placement: str) -> Tensor:
        """The prompt's values as chunks, from where the method wants them: [P, Hk, C, c, D]."""
        held = self.host_values if placement == "host" and self.host_values else self.values
        return self.chunked(held[layer], chunk_size)

    def add_layer(self, layer: int, prompt: Prompt, k: Tensor, v: Tensor) -> None:
        """Take in a prompt's layer: k and v [Hk, S, D], after RoPE."""
        p, tokens = prompt.index, prompt.tokens
        assert tokens <= self.prompt_tokens, f"a prompt of {tokens}, room for {self.prompt_tokens}"
        if self.keys:
            self.keys[layer][p, :, :tokens] = k
        if self.values:
            self.values[layer][p, :, :tokens] = v
        if self.host_values:
            self.host_values[layer][p, :, :tokens].copy_(v, non_blocking=True)
        for (size, count), landmarks in self.landmarks.items():
            means, similarity = ops.build_landmarks(k, size, count)
            landmarks[layer][p, :, : tokens // size] = means
            self.similarity[size][layer][p, :, : tokens // size] = similarity
        if self.coefficients:
            self._add_low_rank(layer, prompt, k)

    def _add_low_rank(self, layer: int, prompt: Prompt, k: Tensor) -> None:
        assert self.tables is not None, "rotary tables come before the first layer"
        table = self.tables.index[prompt.index].long()
        cos, sin = (half[table, : prompt.tokens] for half in self.tables.halves())
        plain = unrotate(k, cos, sin, self.tables.interleaved)  # [Hk, S, D]
        wide = plain.transpose(0, 1).flatten(1)  # [S, Hk*D]
        coefficients, basis = factorise(wide, self.needs.rank)
        self.coefficients[layer][prompt.index, : prompt.tokens] = coefficients
        heads, dim = self.shape.num_kv_heads, self.shape.head_dim
        self.basis[layer][prompt.index] = basis.view(-1, heads, dim).transpose(0, 1)
