"""Attention of a prompt's last tokens, aligned at the bottom right, against float64."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shadowkv_cli.model import exact_attention, two_parts
from shadowkv_cli.model.exact_attention import attend, installed, unfit
from shadowkv_cli.model.two_parts import attend_behind

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ON_GPU = ("flash-attn-4", "cudnn", "flash-attn", "flash", "efficient", "math", "sdpa")


def inputs(
    tokens: int,
    before: int,
    heads: tuple[int, int],
    dim: int = 16,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries laid out by token, keys and values by head, as a session has them."""
    generator = torch.Generator().manual_seed(tokens * 1000 + before)
    q = torch.randn(1, tokens, heads[0], dim, generator=generator) * spread
    k, v = (torch.randn(1, heads[1], before + tokens, dim, generator=generator) for _ in range(2))
    q, k, v = (x.to(device=device, dtype=dtype) for x in (q, k * spread, v))
    return q.transpose(1, 2), k, v


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """By the definition: token i of the last T sees the first S - T + i + 1."""
    q, k, v = (x.double() for x in (q, k, v))
    group, (tokens, total) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    place = torch.arange(total, device=q.device)
    seen = place <= (total - tokens + torch.arange(tokens, device=q.device))[:, None]
    scores = q @ k.repeat_interleave(group, 1).mT * scale
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 1)


@pytest.mark.parametrize("heads", [(4, 2), (6, 6), (9, 3), (4, 1)])
@pytest.mark.parametrize(("tokens", "before"), [(1, 64), (1, 700), (5, 97), (130, 64), (701, 900)])
@pytest.mark.parametrize("backend", installed(CPU))
def test_last_tokens_on_a_cpu(
    backend: str, tokens: int, before: int, heads: tuple[int, int]
) -> None:
    q, k, v = inputs(tokens, before, heads)
    out = attend(backend, q, k, v, 0.3)
    case = (backend, tokens, before, heads)
    assert out.shape == q.shape, case
    assert torch.allclose(out.double(), exact(q, k, v, 0.3), atol=2e-6), case


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 90),
    before=st.integers(1, 90),
    group=st.integers(1, 4),
    spread=st.sampled_from([0.01, 1.0, 10.0]),
)
def test_parts_add_up_however_unequal(tokens: int, before: int, group: int, spread: float) -> None:
    """Also where one of the two has all of the weight."""
    q, k, v = inputs(tokens, before, (2 * group, 2), spread=spread)
    out = attend_behind("flash", q, k, v, 0.25)
    # Logits of some thousands are rounded by some ten-thousandths.
    error = (out.double() - exact(q, k, v, 0.25)).abs().max()
    assert error < (2e-3 if spread > 1 else 3e-6), error


def test_halves_are_merged_in_float32() -> None:
    q, k, v = inputs(300, 500, (4, 2), dtype=torch.bfloat16)
    out = attend_behind("flash", q, k, v, 0.25)
    assert out.dtype == torch.bfloat16
    # An output is rounded twice: by its part, and when it is merged.
    assert (out.double() - exact(q, k, v, 0.25)).abs().max() < 2 * 2**-8


def test_no_mask_is_held_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor any other tensor of queries by keys."""
    seen: list[int] = []
    part = two_parts._part

    def recorded(kernel: str, q: Tensor, k: Tensor, *rest, **more) -> tuple[Tensor, Tensor]:
        seen.append(k.shape[2])
        return part(kernel, q, k, *rest, **more)

    monkeypatch.setattr(two_parts, "_part", recorded)
    monkeypatch.setattr(torch, "ones", None)
    for backend in ("flash", "sdpa"):
        attend(backend, *inputs(20, 80, (4, 2)), 0.3)
        attend(backend, *inputs(20, 0, (4, 2)), 0.3)
    assert seen == [20, 80, 20, 80], "whole prompts are not cut"


HALF, FLOAT = torch.bfloat16, torch.float32
KERNELS = [
    ("cudnn", HALF, 200, 128, "cudnn"), ("cudnn", HALF, 127, 128, "flash"),
    ("flash", HALF, 200, 64, "flash"), ("sdpa", HALF, 200, 64, "flash"),
    ("sdpa", FLOAT, 200, 64, "efficient"), ("efficient", FLOAT, 1, 64, "efficient"),
    ("efficient", HALF, 33, 64, "efficient"), ("math", HALF, 33, 64, "math"),
    ("flash", HALF, 33, 60, "math"),
]  # fmt: skip


@pytest.mark.parametrize(("backend", "dtype", "tokens", "dim", "kernel"), KERNELS)
def test_kernels_of_a_gpu_are_called_as_torch_declares_them(
    backend: str, dtype: torch.dtype, tokens: int, dim: int, kernel: str
) -> None:
    """On tensors without numbers, whose ops check arguments and say what shapes come of them."""
    q, k, v = (
        torch.empty(1, heads, count, dim, dtype=dtype, device="meta")
        for heads, count in ((6, tokens), (2, tokens + 64), (2, tokens + 64))
    )
    assert two_parts._kernel_of(backend, q) == kernel
    out = attend(backend, q, k, v, 0.3)
    assert (out.shape, out.dtype) == (q.shape, dtype)


@pytest.mark.parametrize("backend", installed(CPU))
def test_heads_of_very_many_keys_are_attended_in_parts(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a long prefix there are more elements of keys than of queries."""
    q, k, v = inputs(7, 90, (8, 4))
    whole = attend(backend, q, k, v, 0.3)
    monkeypatch.setattr(exact_attention, "MOST_ELEMENTS", k.numel() - 1)
    monkeypatch.setattr(exact_attention, "PART_ELEMENTS", k.numel() // 2)
    assert q.numel() < exact_attention.MOST_ELEMENTS
    widths: list[int] = []

    def recorded(name: str, q: Tensor, *rest) -> Tensor:
        widths.append(q.shape[1])
        return attend_behind(name, q, *rest)

    monkeypatch.setattr(exact_attention, "attend_behind", recorded)
    assert torch.allclose(attend(backend, q, k, v, 0.3), whole, atol=1e-6)
    assert widths == [4, 4]


def test_a_package_is_called_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn aligns at the bottom right by itself, so one call has all keys."""

    def attend_all(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
        assert causal
        assert (q.shape[1], k.shape[1], v.shape[1]) == (5, 85, 85)
        return q * softmax_scale

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=attend_all))
    q, k, v = inputs(5, 80, (4, 2))
    assert torch.equal(attend("flash-attn", q, k, v, 0.5), q * 0.5)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8, 128), (28, 4, 128), (32, 32, 96), (9, 3, 64)])
@pytest.mark.parametrize(
    ("tokens", "before"),
    [(1, 64), (2, 1000), (17, 64), (127, 999), (128, 64), (129, 4097), (1000, 65), (1601, 5000)],
)
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
def test_last_tokens_on_a_gpu(
    dtype: torch.dtype, backend: str, tokens: int, before: int, heads: tuple[int, int, int]
) -> None:
    if backend not in installed(GPU):
        pytest.skip(f"{backend} is not installed")
    if why := unfit(backend, GPU, dtype, heads[2]):
        pytest.skip(why)
    q, k, v = inputs(tokens, before, heads[:2], heads[2], device=GPU, dtype=dtype)
    scale = heads[2] ** -0.5
    out, expected = attend(backend, q, k, v, scale).double(), exact(q, k, v, scale)
    error, case = (out - expected).abs().max(), (backend, tokens, before, heads, dtype)
    assert out.shape == expected.shape, case
    assert error < (0.03 if dtype == torch.bfloat16 else 2e-3), case
    assert (out - expected).norm() < 0.01 * expected.norm(), case


@pytest.mark.gpu
def test_a_long_prefix_takes_no_memory_for_a_mask() -> None:
    q, k, v = inputs(8192, 57344, (4, 4), 64, device=GPU, dtype=torch.bfloat16)
    for backend in ("cudnn", "flash", "efficient", "sdpa"):
        attend(backend, q, k, v, 0.125)  # what libraries hold for themselves
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = attend(backend, q, k, v, 0.125)
        taken = torch.cuda.max_memory_allocated() - before
        assert taken < 8 * q.nbytes, (backend, taken, q.nbytes)  # a mask of bytes: 128
        del out
