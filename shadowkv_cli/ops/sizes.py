"""Sizes of random arguments of the ops, and the sizes that the kernels serve."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
"""In the order of the op's schema."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a case; see `shadowkv_cli.ops` for the letters.

    Attributes:
        rows, prompts, heads, group, dim: R, P, Hk, G, D.
        chunks, chunk_size, landmarks: C, c, L.
        wanted: N, chunks that a row may select.
        slots: B, of a buffer.
        rank: r, the most that a row uses; tensors hold `spare` columns more.
        pairs: rotated pairs of dimensions, E.
        fixed: tokens of each section of the fixed part.
        fp8: whether landmarks and values are in fp8, with scales.
        packed: whether they are packed instead, which are bfloat16 then.
        poison: whether what must not be read is NaN, and rows are unequal.
    """

    rows: int = 3
    prompts: int = 2
    heads: int = 2
    group: int = 4
    dim: int = 64
    chunks: int = 40
    chunk_size: int = 8
    landmarks: int = 1
    wanted: int = 6
    slots: int = 9
    rank: int = 32
    spare: int = 8
    pairs: int = 32
    interleaved: bool = False
    fixed: tuple[int, ...] = (10, 7, 12)
    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False
    packed: bool = False
    device: str = "cuda"
    poison: bool = True
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.chunks * self.chunk_size

    @property
    def hidden(self) -> int:
        """Width of a layer's input, H."""
        return self.heads * self.group * self.dim

    @property
    def inner(self) -> int:
        """Width of its feed-forward part, F: 3.5 times H, as in Llama-3.1-8B."""
        return 7 * self.hidden // 2

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, g: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=self.device).to(self.dtype)

    def ints(self, g: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
        """int32 from low to high inclusive; without poison all are the highest."""
        if not self.poison:
            return torch.full(shape, high, dtype=torch.int32, device=self.device)
        return torch.randint(
            low, high + 1, shape, generator=g, device=self.device, dtype=torch.int32
        )

    def prompt_index(self, g: torch.Generator) -> Tensor:
        """int32 [R]: each prompt its row, or any where there are more rows."""
        if self.rows == self.prompts:
            return torch.arange(self.rows, dtype=torch.int32, device=self.device)
        return torch.randint(
            self.prompts, (self.rows,), generator=g, device=self.device, dtype=torch.int32
        )


def random_sizes(seed: int, **fixed: Any) -> Sizes:
    """Any sizes that the kernels serve, small enough for a loop over rows."""
    draw = random.Random(seed)
    dim, wanted = draw.choice((64, 96, 128)), draw.choice((1, 5, 8, 33, 70))
    landmarks = draw.choice((1, 1, 2, 4))
    values: dict[str, Any] = {
        "rows": draw.choice((1, 2, 5, 8)),
        "prompts": draw.choice((1, 2, 3)),
        "heads": draw.choice((1, 2, 3, 8)),
        "group": draw.choice((1, 2, 3, 4, 5, 7, 8, 12, 16)),
        "dim": dim,
        "chunks": wanted + draw.randrange(0, 90),
        "chunk_size": landmarks * draw.choice((1, 2, 3, 5, 8, 16)),
        "landmarks": landmarks,
        "wanted": wanted,
        "slots": wanted + draw.randrange(0, 3 * wanted),
        "rank": draw.choice((1, 3, 16, 17, 31, 32, 40, 97, 160)),
        "spare": draw.choice((0, 1, 3, 8)),
        "pairs": draw.choice((dim // 2, dim // 4, 7)),
        "interleaved": draw.random() < 0.5,
        "fixed": tuple(draw.randrange(0, 40) for _ in range(3)),
        "dtype": draw.choice((torch.bfloat16, torch.float16, torch.float32)),
        "seed": seed,
    }
    return Sizes(**(values | fixed))
