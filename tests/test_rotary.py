"""Rotation and its inverse, the pairing of each family, and tables that a prompt fixes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from shadowkv_cli.cells import build_specs
from shadowkv_cli.config import FullSpec
from shadowkv_cli.model.loading import load_model
from shadowkv_cli.model.rotary import compute_table, is_interleaved, rotary_module
from shadowkv_cli.model.session import Session
from shadowkv_cli.ops.rotary import rotate, unrotate
from shadowkv_cli.run_config import ModelChoice
from shadowkv_cli.testing import FAMILIES, tiny_model

INTERLEAVED = {"llama": False, "qwen2": False, "glm": True, "phi3": False}
CPU = torch.device("cpu")


def table_of(pairs: int, tokens: int, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequencies = 1e4 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angle = torch.outer(torch.arange(tokens, dtype=torch.float64), frequencies)
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [8, 4, 3])
@pytest.mark.parametrize("factor", [1.0, 1.19, 0.5])
def test_unrotate_undoes_rotate(
    table_dtype: torch.dtype, interleaved: bool, pairs: int, factor: float
) -> None:
    """The rounding of a bf16 table and the factor of longrope cancel; the rest passes as it is."""
    x = torch.randn(2, 3000, 16, generator=torch.Generator().manual_seed(pairs))
    cos, sin = table_of(pairs, 3000, factor, table_dtype)
    turned = rotate(x, cos, sin, interleaved)
    back = unrotate(turned, cos, sin, interleaved)
    case = (table_dtype, interleaved, pairs, factor)
    assert turned.dtype == back.dtype == torch.float32
    assert float((back - x).abs().max()) < 3e-6, case
    assert torch.equal(turned[..., 2 * pairs :], x[..., 2 * pairs :]), case
    assert float((rotate(back, cos, sin, interleaved) - turned).abs().max()) < 3e-6, case


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [8, 3])
def test_rotate_is_a_complex_product(interleaved: bool, pairs: int) -> None:
    """Pair i of a token turns by its angle: multiplication by e^(i angle)."""
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = table_of(pairs, 50, 1.0, torch.float32)
    found = rotate(x, cos, sin, interleaved)
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        product = torch.complex(x[:, a], x[:, b]) * torch.complex(cos[:, i], sin[:, i])
        assert torch.allclose(found[:, a], product.real, atol=1e-6), (interleaved, i)
        assert torch.allclose(found[:, b], product.imag, atol=1e-6), (interleaved, i)


def test_unrotate_recovers_keys_in_bfloat16() -> None:
    """Keys rounded to bf16 after the rotation: back to their own rounding, no more."""
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))
    cos, sin = table_of(32, 4000, 1.0, torch.bfloat16)
    turned = rotate(x, cos, sin, False).bfloat16()
    back = unrotate(turned, cos, sin, False)
    again = rotate(back, cos, sin, False)
    assert float((again - turned.float()).abs().max()) < 2e-6
    assert float((back - x).norm() / x.norm()) < 2**-8


@pytest.mark.parametrize("family", FAMILIES)
def test_pairing_of_each_family(family: str) -> None:
    assert is_interleaved(tiny_model(family).model) == INTERLEAVED[family]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_table_is_the_models_own(family: str, dtype: torch.dtype) -> None:
    loaded = tiny_model(family, dtype=dtype)
    rotary = rotary_module(loaded.model)
    for tokens in (100, 200):
        cos, sin = compute_table(rotary, tokens, tokens, dtype, CPU)
        like = torch.empty(1, dtype=dtype)
        fresh = tiny_model(family, dtype=dtype).model.model.rotary_emb
        expected = fresh(like, torch.arange(tokens)[None])
        assert cos.dtype == dtype
        assert torch.equal(cos, expected[0][0]), (family, tokens)
        assert torch.equal(sin, expected[1][0]), (family, tokens)


def test_frequencies_stay_in_float32() -> None:
    """Rounded to bf16 an angle at token 100,000 is off by hundreds of radians.

    `from_pretrained(dtype=...)` keeps them in float32; `model.to(dtype)` does not.
    """
    kept = tiny_model("llama").model.model.rotary_emb.inv_freq
    assert kept.dtype == torch.float32
    demo = load_model(ModelChoice("demo", dtype="bfloat16", device="cpu"))
    for loaded in (demo, tiny_model("llama", dtype=torch.bfloat16)):
        found = rotary_module(loaded.model).inv_freq
        assert found.dtype == torch.float32, loaded.name


def keys_before_rope(session: Session, layer: int, tokens: int) -> Tensor:
    """What a full-rank factorisation holds of a prompt's keys, [S, Hk * D]."""
    store = session.store
    basis = store.basis[layer][0].transpose(0, 1).flatten(1)
    return store.coefficients[layer][0, :tokens] @ basis


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [90, 231])
def test_keys_before_rope_are_the_projections(family: str, tokens: int) -> None:
    """Recovered from rotated keys, on either side of longrope's switch."""
    loaded = tiny_model(family, seed=5)
    specs = build_specs(["shadowkv"], {"rank": "32", "sparse_budget": "32"})
    session = Session(loaded, specs, prompt_tokens=tokens, new_tokens=4)
    outputs, hooks = [], []
    for layer in loaded.model.model.layers:
        attention = layer.self_attn
        module = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.k_proj
        hooks.append(module.register_forward_hook(lambda m, a, out: outputs.append(out[0])))
    generator = torch.Generator().manual_seed(tokens)
    session.prefill(torch.randint(3, 256, (tokens,), generator=generator).tolist())
    for hook in hooks:
        hook.remove()
    for layer, out in enumerate(outputs):
        expected = out[:, 64:96] if family == "phi3" else out
        found = keys_before_rope(session, layer, tokens)
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error < 1e-5, (family, tokens, layer, error)


@pytest.mark.parametrize(("tokens", "slow"), [(126, 1.0), (128, 1.0), (129, 4.0), (200, 4.0)])
def test_longrope_is_chosen_by_the_prompt_and_kept(tokens: int, slow: float) -> None:
    """An answer that crosses the switch (128) goes on with the prompt's frequencies."""
    loaded = tiny_model("phi3")
    session = Session(loaded, [FullSpec()], prompt_tokens=tokens, new_tokens=8)
    seen: list[tuple[Tensor, Tensor]] = []
    served = session.rotary

    def spy(position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = served(position_ids)
        seen.append((position_ids[0], cos[0]))
        return cos, sin

    session.rotary = spy
    token = session.prefill(list(range(3, 3 + tokens))).argmax()[None]
    for _ in range(7):
        token = session.decode_step(token).argmax(-1)
    factor = (1 + torch.log(torch.tensor(4096 / 128)) / torch.log(torch.tensor(128.0))).sqrt()
    frequencies = 1e4 ** (-torch.arange(8) / 8) / slow
    positions = torch.cat([p for p, _ in seen])
    expected = torch.outer(positions.float(), frequencies).cos() * factor
    assert positions.tolist() == list(range(tokens + 7))
    found = torch.cat([cos for _, cos in seen])[:, :8]
    assert torch.allclose(found, expected, atol=1e-4), float((found - expected).abs().max())


def test_prompts_share_a_table_that_has_the_same_frequencies() -> None:
    loaded = tiny_model("phi3")
    session = Session(loaded, [FullSpec()], prompt_tokens=200, new_tokens=4, num_prompts=4)
    for i, tokens in enumerate((100, 200, 60, 150)):
        session.prefill(list(range(3, 3 + tokens)), index=i)
    tables = session.store.tables
    assert tables is not None
    assert tables.index.tolist() == [0, 1, 0, 1]
    assert tables.cos.shape[0] == 2


def test_a_dynamic_table_does_not_depend_on_earlier_prompts() -> None:
    """Dynamic NTK chooses by length; transformers keeps the longest it has seen."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    )
    model, fresh = LlamaForCausalLM(config), LlamaForCausalLM(config)
    compute_table(rotary_module(model), 400, 420, torch.float32, CPU)
    after = compute_table(rotary_module(model), 100, 120, torch.float32, CPU)
    alone = compute_table(rotary_module(fresh), 100, 120, torch.float32, CPU)
    assert torch.equal(after[0], alone[0])
