"""Low-rank form of the pre-RoPE keys of a layer, all KV heads side by side (paper, section 4.1)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

Method = Literal["eigh", "subspace"]
"""How the leading eigenvectors of a Gram matrix are found."""

ROUNDS = 4
"""Of subspace iteration, each with two products. On the bundled model it then leaves out 0.6 to
0.8 % more than `eigh`, as if the rank were a column smaller; with 3, up to 1.3 %."""

WIDE = 512
"""Columns from which a full eigendecomposition is slow on a GPU."""

WIDEST_WHOLE = 1024
"""Columns up to which a prompt's keys are held whole to be factorised. Where every query head has
keys of its own they are as wide as the model, and come in tiles instead, twice."""

FEW = 3
"""Subspace iteration is for ranks up to this part of the columns."""


def method_for(width: int, rank: int) -> Method:
    """Subspace iteration where few directions are wanted of many, else `eigh`."""
    return "subspace" if width >= WIDE and rank * FEW <= width else "eigh"


def working_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In what a layer's keys are best given to `factorise`: float32, but for half on a GPU."""
    return dtype if device.type == "cuda" and dtype.itemsize == 2 else torch.float32


def factorise(keys: Tensor, rank: int, method: Method | None = None) -> tuple[Tensor, Tensor]:
    """Find A [S, r] and B [r, W] whose product is close to the best one of rank r.

    By eigenvectors of the Gram matrix, multiplied in float32. They are nested, so a smaller
    rank is the first columns of A and rows of B, and one factorisation serves every rank of a
    sweep. On a GPU, keys of two bytes are multiplied on the tensor cores, and A is of their dtype.

    Args:
        keys: [S, W].
        rank: r.
        method: by default as `method_for` says.
    """
    keys = keys if _on_tensor_cores(keys) else keys.float()
    coefficients = keys.new_empty(keys.shape[0], rank)
    return coefficients, factorise_parts(lambda: [keys], coefficients, method)


def factorise_parts(
    parts: Callable[[], Iterable[Tensor]], coefficients: Tensor, method: Method | None = None
) -> Tensor:
    """The same of keys that come in parts: writes A [S, r] and returns B [r, W].

    Args:
        parts: gives stretches of the keys, [T, W] each, in float32 or what tensor cores take; it is
            called twice.
        coefficients: where A goes.
        method: by default as `method_for` says.
    """
    basis = leading(_gram(parts()), coefficients.shape[1], method)
    start = 0
    for part in parts():
        coefficients[start : start + len(part)] = part @ basis.to(part.dtype)
        start += len(part)
    return basis.T.contiguous()


def _on_tensor_cores(keys: Tensor) -> bool:
    return keys.is_cuda and keys.dtype.itemsize == 2


def _gram(parts: Iterable[Tensor]) -> Tensor:
    """Sum of the parts' Gram matrices, float64 [W, W], each multiplied in float32.

    Some rows after the others, so that little of a wide one is there twice.
    """
    total: Tensor | None = None
    for part in parts:
        width = part.shape[1]
        if total is None:
            total = part.new_zeros(width, width, dtype=torch.float64)
        on_tensor_cores = _on_tensor_cores(part)
        for rows, turned in zip(total.split(WIDEST_WHOLE), part.T.split(WIDEST_WHOLE), strict=True):
            if on_tensor_cores:
                rows += torch.mm(turned, part, out_dtype=torch.float32)
            else:
                rows += turned @ part
    assert total is not None, "a prompt has tokens"
    return total


def leading(gram: Tensor, rank: int, method: Method | None = None) -> Tensor:
    """Orthonormal directions [W, r] that hold most of a Gram matrix [W, W], the strongest first.

    `eigh` finds the eigenvectors and waits for the device. Subspace iteration never waits: each
    round multiplies random directions with the matrix and makes them orthonormal one by one, so
    that the first ones do not depend on how many there are. In float64, for a mean key may hold a
    million times what the last direction holds.
    """
    if (method or method_for(gram.shape[0], rank)) == "eigh":
        _, vectors = torch.linalg.eigh(gram.float())  # ascending eigenvalues
        return vectors[:, -rank:].flip(-1)
    gram = gram.double()
    basis = _start(gram.shape[0], rank, gram.device)
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(gram @ (gram @ basis)).Q
    return basis.float()


@functools.lru_cache(maxsize=8)
def _start(width: int, rank: int, device: torch.device) -> Tensor:
    """The same random directions [W, r] in every run, float64; more of them begin with the same."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    return start.T.contiguous().to(device)
