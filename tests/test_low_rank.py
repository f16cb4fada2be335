"""Subspace iteration against the full eigendecomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shadowkv_cli.methods.low_rank import (
    Method,
    factorise,
    factorise_parts,
    leading,
    method_for,
)


def keys_like(tokens: int, width: int, power: float, seed: int) -> Tensor:
    """Directions that fall off by a power, around a mean that holds most: as keys do."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
    strength = torch.arange(1, width + 1).float() ** -power
    keys = torch.randn(tokens, width, generator=g) * strength @ turn
    mean = torch.randn(width, generator=g)
    return keys + mean / mean.norm() * 2 * keys.norm() / tokens**0.5


def left_out(keys: Tensor, basis: Tensor) -> float:
    exact, directions = keys.double(), basis.double()
    return float((exact - exact @ directions @ directions.T).square().sum())


@pytest.mark.parametrize("power", [0.4, 0.8, 1.2])
@pytest.mark.parametrize("rank", [16, 96, 160])
def test_it_leaves_out_little_more_than_the_best(power: float, rank: int) -> None:
    keys = keys_like(2000, 512, power, rank)
    gram = keys.T @ keys
    best, ours = (left_out(keys, leading(gram, rank, m)) for m in ("eigh", "subspace"))
    assert ours <= 1.03 * best, (power, rank, ours / best)
    basis = leading(gram, rank, "subspace")
    assert torch.allclose(basis.T @ basis, torch.eye(rank), atol=1e-5)


def test_smaller_ranks_are_its_first_columns() -> None:
    keys = keys_like(1500, 512, 0.7, 0)
    gram = keys.T @ keys
    whole = leading(gram, 160, "subspace")
    for rank in (1, 24, 64):
        assert torch.allclose(leading(gram, rank, "subspace"), whole[:, :rank], atol=1e-4)
        best = left_out(keys, leading(gram, rank, "eigh"))
        assert left_out(keys, whole[:, :rank]) <= 1.05 * best, rank


@pytest.mark.parametrize("tokens", [0, 1, 40, 300])
def test_fewer_tokens_than_directions_are_kept_whole(tokens: int) -> None:
    keys = keys_like(300, 512, 0.7, 1)[:tokens]
    a, b = factorise(keys, 160, "subspace")
    assert bool(torch.isfinite(a).all())
    assert torch.allclose(b @ b.T, torch.eye(160), atol=1e-5)
    if tokens <= 160:
        assert torch.allclose(a @ b, keys, atol=1e-4)


def test_it_gives_the_same_again() -> None:
    keys = keys_like(600, 512, 0.7, 2)
    first, second = (factorise(keys, 100, "subspace") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("sizes", [(700,), (512, 188), (1, 300, 399)], ids=str)
def test_parts_give_what_all_keys_give(sizes: tuple[int, ...]) -> None:
    keys = keys_like(700, 512, 0.7, 4)
    a, b = factorise(keys, 100)
    coefficients, asked = torch.full((700, 100), float("nan")), []

    def parts() -> list[Tensor]:
        asked.append(sizes)
        return [*keys.split(sizes)]

    basis = factorise_parts(parts, coefficients)
    assert len(asked) == 2
    assert torch.allclose(coefficients @ basis, a @ b, atol=1e-4)
    assert torch.allclose(coefficients, keys @ basis.T, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "rank", "method"),
    [(192, 32, "eigh"), (512, 160, "subspace"), (1024, 160, "subspace"), (1024, 512, "eigh"),
     (3072, 160, "subspace"), (3072, 1024, "subspace"), (3072, 1025, "eigh")],
)  # fmt: skip
def test_few_of_many_directions_are_found_by_iteration(
    width: int, rank: int, method: Method
) -> None:
    assert method_for(width, rank) == method


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["eigh", "subspace"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tensor_cores_keep_as_much(dtype: torch.dtype, method: Method) -> None:
    keys = keys_like(5000, 1024, 0.6, 3).to(dtype)
    a, b = factorise(keys.cuda(), 160, method)
    exact = keys.double()
    _, best = torch.linalg.eigh(exact.T @ exact)
    least = left_out(exact, best[:, -160:])
    assert a.dtype == dtype
    found = float((exact - a.double().cpu() @ b.double().cpu()).square().sum())
    rounding = 4 * torch.finfo(dtype).eps ** 2 * float(exact.square().sum())
    assert found <= 1.03 * least + rounding, (dtype, method, found, least)


@pytest.mark.gpu
def test_subspace_iteration_never_waits_for_the_device() -> None:
    keys = keys_like(5000, 1024, 0.6, 3).to(torch.bfloat16).cuda()
    factorise(keys, 160, "subspace")  # the directions to begin with are made once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        factorise(keys, 160, "subspace")
    finally:
        torch.cuda.set_sync_debug_mode("default")
