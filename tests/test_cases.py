"""The random arguments of every op: they are what its contract asks for, on a CPU too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shadowkv_cli import ops
from shadowkv_cli.ops import cases
from shadowkv_cli.ops.sizes import Sizes, random_sizes

SMALL = [
    Sizes(device="cpu"),
    Sizes(device="cpu", dtype=torch.float32, chunk_size=1, spare=3, poison=False),
    *(random_sizes(seed, device="cpu", dtype=torch.float32) for seed in range(3)),
]


@pytest.mark.parametrize("sizes", SMALL, ids=lambda s: f"c{s.chunk_size}-{s.seed}")
@pytest.mark.parametrize("name", ops.__all__)
def test_the_reference_takes_them(name: str, sizes: Sizes) -> None:
    arguments: dict[str, Any] = cases.ARGUMENTS[name](sizes)
    again = cases.ARGUMENTS[name](sizes)
    for key, value in again.items():
        if isinstance(value, Tensor) and key in ("query", "keys", "values", "ids", "misses"):
            same = torch.equal(value.nan_to_num(7), arguments[key].nan_to_num(7))
            assert same, f"{key}: the same seed draws the same"
    getattr(ops, name)(**arguments)


def test_every_op_has_arguments() -> None:
    assert set(cases.ARGUMENTS) == set(ops.__all__)
