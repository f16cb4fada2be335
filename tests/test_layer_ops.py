"""The ops around a layer's matrix products: against plain formulas, and models of transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from shadowkv_cli import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ---- rms_norm ----


@every_dtype
@pytest.mark.parametrize("width", [1, 5, 64])
def test_rms_norm(dtype: torch.dtype, width: int) -> None:
    x, weight = normal(0, 2, 3, width, dtype=dtype), normal(1, width, dtype=dtype)
    found = ops.rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype
    for r in range(2):
        for t in range(3):
            row = x[r, t].double()
            exact = row / (row.square().sum() / width + 1e-5).sqrt() * weight.double()
            bound = 2 * torch.finfo(dtype).eps
            assert torch.allclose(found[r, t].double(), exact, rtol=bound, atol=1e-6)


@every_dtype
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_rms_norm_is_that_of_transformers_to_the_bit(dtype: torch.dtype, eps: float) -> None:
    module = modeling_llama.LlamaRMSNorm(96, eps).to(dtype)
    with torch.no_grad():
        module.weight.copy_(normal(1, 96))
        wide = 3 * normal(0, 4, 5, 100, dtype=dtype)
        for x in (
            wide[..., :96],
            wide[:, 0, :96],
            wide[0, 0, 2:98],
            wide[:, :, 4:].transpose(0, 1),
        ):
            found = ops.rms_norm(x, module.weight, eps)
            assert found.is_contiguous()
            assert torch.equal(found, module(x))


# ---- gated_silu ----


@every_dtype
@pytest.mark.parametrize("width", [1, 7, 48])
def test_gated_silu(dtype: torch.dtype, width: int) -> None:
    gate, up = (4 * normal(width, 2, 3, 2 * width, dtype=dtype)).chunk(2, -1)
    found = ops.gated_silu(gate, up)
    assert found.is_contiguous()
    assert found.dtype == dtype
    wide = gate.double()
    silu = (wide / (1 + (-wide).exp())).to(dtype)
    error = (found.double() - silu.double() * up.double()).abs()
    assert bool((error <= 2 * torch.finfo(dtype).eps * found.double().abs() + 1e-6).all())
    assert torch.equal(found, F.silu(gate) * up), "as models of transformers work it out"


def test_gated_silu_of_the_largest_gates() -> None:
    gate = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4])
    assert ops.gated_silu(gate, torch.full_like(gate, 2)).tolist() == [0, 0, 0, 400, 2e4]


# ---- rotate_heads ----

MODELS = {
    # name: module, rotated dimensions of 16, pairing
    "llama": (modeling_llama, 16, False),
    "glm": (modeling_glm, 8, True),
    "phi3": (modeling_phi3, 12, False),
}


def rotate_case(
    turned: int, rows: int, table_rows: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Transposed views of a matrix product's output, and a table whose halves are equal."""
    product = normal(0, rows, 5, 6 * 16, dtype=dtype)
    angle = 6 * normal(1, table_rows, 5, turned // 2)
    return {
        "query": product[..., :64].unflatten(-1, (4, 16)).transpose(1, 2),
        "key": product[..., 64:].unflatten(-1, (2, 16)).transpose(1, 2),
        "cos": torch.cat((angle, angle), -1).cos().to(dtype),
        "sin": torch.cat((angle, angle), -1).sin().to(dtype),
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("rows", "table_rows"), [(1, 1), (3, 1), (3, 3)])
def test_rotate_heads_is_that_of_transformers(name: str, rows: int, table_rows: int) -> None:
    module, turned, interleaved = MODELS[name]
    case = rotate_case(turned, rows, table_rows)
    theirs = module.apply_rotary_pos_emb(case["query"], case["key"], case["cos"], case["sin"])
    for found, wanted in zip(
        ops.rotate_heads(**case, interleaved=interleaved), theirs, strict=True
    ):
        assert found.is_contiguous()
        assert torch.equal(found, wanted)
    ops.rotate_heads_(**case, interleaved=interleaved)
    assert torch.equal(case["query"], theirs[0])
    assert torch.equal(case["key"], theirs[1])


@every_dtype
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [0, 6, 16])
def test_rotate_heads_rounds_once(dtype: torch.dtype, interleaved: bool, turned: int) -> None:
    case, pairs = rotate_case(turned, 2, 2, dtype), turned // 2
    wide = {k: v.float() for k, v in case.items()}
    cos, sin = wide["cos"], wide["sin"]
    for name, found in zip(
        ("query", "key"), ops.rotate_heads(**case, interleaved=interleaved), strict=True
    ):
        x, wanted = wide[name], wide[name].clone()
        for i in range(pairs):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
            c, s = cos[:, None, :, i], sin[:, None, :, i]
            wanted[..., a] = x[..., a] * c - x[..., b] * s
            wanted[..., b] = x[..., b] * c + x[..., a] * s
        assert torch.equal(found, wanted.to(dtype))
        assert torch.equal(found[..., turned:], case[name][..., turned:])


# ---- append_tokens ----


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_append_tokens(dtype: torch.dtype) -> None:
    key, value = normal(0, 3, 2 * 2 * 5, dtype=dtype).unflatten(-1, (2, 2, 5)).unbind(1)
    keys, values = normal(1, 2, 2, 7, 5, dtype=dtype), normal(2, 2, 2, 9, 5, dtype=dtype)
    before = keys.clone(), values.clone()
    plane, place = [1, 0, 1], [6, 0, 2]
    ops.append_tokens(key, value, ints(*plane), ints(*place), keys, values)
    for now, old, new in ((keys, before[0], key), (values, before[1], value)):
        for r in range(3):
            old[plane[r], :, place[r]] = new[r]
        assert torch.equal(now, old)


@pytest.mark.parametrize(("plane", "place"), [(0, 7), (2, 0)])
def test_append_tokens_refuses_what_lies_beyond(plane: int, place: int) -> None:
    token, planes = torch.ones(1, 2, 5), torch.zeros(2, 2, 7, 5)
    with pytest.raises(IndexError, match="out of bounds"):
        ops.append_tokens(token, token, ints(plane), ints(place), planes, planes.clone())
    assert not planes.any()


# ---- refusals ----


def refusals() -> dict[str, tuple]:
    """Op, arguments, and the words that the message must hold."""
    zeros, index = torch.zeros, ints(0)
    case = list(rotate_case(8, 3, 3).values())
    query, key, cos, sin = case
    return {
        "norm: weight": (ops.rms_norm, [zeros(2, 4), zeros(3), 1e-5], "weight must be"),
        "norm: dtype": (ops.rms_norm, [zeros(2, 4), zeros(4).half(), 1e-5], "weight must be"),
        "gate: up": (ops.gated_silu, [zeros(2, 4), zeros(1, 4)], "up must be"),
        "rotate: query": (ops.rotate_heads, [query[0], key, cos, sin, False], "query must be"),
        "rotate: key": (ops.rotate_heads, [query, key[:, :, :1], cos, sin, False], "key must be"),
        "rotate: rows": (ops.rotate_heads, [query, key, cos[:2], sin, False], "cos must be"),
        "rotate: odd": (ops.rotate_heads, [query, key, cos, sin[..., :3], False], "sin must be"),
        "rotate: wide": (ops.rotate_heads, [query, key, cos, sin.repeat(1, 1, 3), False], "sin"),
        "rotate: both": (ops.rotate_heads, [query, key, cos, sin[..., :4], False], "cos is"),
        "append: keys": (
            ops.append_tokens,
            [zeros(1, 2, 4), zeros(1, 2, 4), index, index, zeros(1, 3, 5, 4), zeros(1, 2, 5, 4)],
            "keys must be",
        ),
        "append: place": (
            ops.append_tokens,
            [zeros(2, 2, 4), zeros(2, 2, 4), ints(0, 0), index, *zeros(2, 1, 2, 5, 4)],
            "place must be",
        ),
    }


@pytest.mark.parametrize("name", refusals())
def test_refusals_name_the_tensor(name: str) -> None:
    op, arguments, words = refusals()[name]
    with pytest.raises(ValueError, match=words):
        op(*arguments)
