"""Random arguments of the ops around a layer's matrix products; these serve any head dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shadowkv_cli.ops.sizes import Arguments, Sizes

ANY_SIZE = ("append_tokens", "gated_silu", "rms_norm", "rotate_heads", "rotate_heads_")
"""Where 16-byte words do not fit, elements are served one by one."""


def columns(s: Sizes, g: torch.Generator, tokens: int, *widths: int) -> list[Tensor]:
    """A matrix product's output [R, tokens, …] cut into columns, with NaN in what is spare."""
    product = s.normal(g, s.rows, tokens, sum(widths) + s.spare)
    if s.poison:
        product[..., sum(widths) :] = math.nan
    return list(product[..., : sum(widths)].split(widths, -1))


def norm_arguments(s: Sizes, tokens: int = 3) -> Arguments:
    g = s.generator()
    return {
        "x": columns(s, g, tokens, s.hidden)[0],
        "weight": s.normal(g, s.hidden),
        "eps": 1e-5,
    }


def gate_arguments(s: Sizes, tokens: int = 3) -> Arguments:
    gate, up = columns(s, s.generator(), tokens, s.inner, s.inner)
    return {"gate": gate, "up": up}


def rotate_arguments(s: Sizes, tokens: int = 3) -> Arguments:
    """One table for all rows where they share one prompt."""
    g = s.generator()
    query, key = columns(s, g, tokens, s.hidden, s.heads * s.dim)
    angle = torch.rand(
        1 if s.prompts == 1 else s.rows, tokens, s.pairs, generator=g, device=s.device
    )
    cos, sin = (torch.cat((x, x), -1).to(s.dtype) for x in ((6 * angle).cos(), (6 * angle).sin()))
    if s.poison:
        cos[..., s.pairs :] = math.nan
        sin[..., s.pairs :] = math.nan
    return {
        "query": query.unflatten(-1, (-1, s.dim)).transpose(1, 2),
        "key": key.unflatten(-1, (-1, s.dim)).transpose(1, 2),
        "cos": cos,
        "sin": sin,
        "interleaved": s.interleaved,
    }


def append_arguments(s: Sizes) -> Arguments:
    g, width = s.generator(), s.heads * s.dim
    key, value = (x[:, 0].unflatten(-1, (-1, s.dim)) for x in columns(s, g, 1, width, width))
    room = s.tokens + s.rows
    keys, values = (s.normal(g, s.prompts, s.heads, size, s.dim) for size in (room, room + 3))
    place = torch.randperm(room, generator=g, device=s.device)[: s.rows]
    return {
        "key": key,
        "value": value,
        "plane": s.prompt_index(g),
        "place": place.to(torch.int32),
        "keys": keys,
        "values": values,
    }
