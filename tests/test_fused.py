"""Fused ops in place of a model's small kernels: the same numbers, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shadowkv_cli.model.fused import Fused, join_projections
from shadowkv_cli.model.rotary import is_interleaved

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "glm": {"head_dim": 16, "attention_bias": True},
    "phi3": {},
    "mistral": {},
    "gemma": {"head_dim": 16},
    "olmo2": {},
}


def tiny(family: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases are trivial by default
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fused_ops_change_no_number(family: str) -> None:
    model, ids = tiny(family), torch.randint(1, 101, (3, 17))
    plain = model(ids).logits
    join_projections(model)
    assert torch.equal(model(ids).logits, plain)
    fused = Fused(model, is_interleaved(model))
    with fused.applied():
        ours = model(ids).logits
        one_token = model(ids[:, :1]).logits
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one_token, plain[:, :1], rtol=1e-4, atol=1e-5)
    assert torch.equal(model(ids).logits, plain)


def test_what_is_fused_is_what_a_llama_consists_of() -> None:
    model = tiny("llama")
    join_projections(model)
    kinds = [type(module).__name__ for module, _ in Fused(model, interleaved=False).forwards]
    layers = SIZES["num_hidden_layers"]
    assert kinds.count("LlamaRMSNorm") == 2 * layers + 1
    assert kinds.count("LlamaMLP") == layers
    assert kinds.count("Linear") == 5 * layers


def test_a_norm_of_another_kind_is_left_alone() -> None:
    kinds = [type(module).__name__ for module, _ in Fused(tiny("gemma"), False).forwards]
    assert not any("Norm" in kind for kind in kinds)


@torch.no_grad()
def test_joint_products_keep_nothing_and_mix_up_no_inputs() -> None:
    model = tiny("llama")
    join_projections(model)
    attention = model.model.layers[0].self_attn
    first, second = torch.randn(2, 1, 4, 64)
    expected = [
        [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)] for x in (first, second)
    ]
    fused = Fused(model, interleaved=False)
    with fused.applied():
        q_first = attention.q_proj(first)  # the others are never asked for
        answers = [part(second) for part in (attention.v_proj, attention.q_proj, attention.k_proj)]
        again = attention.k_proj(first)
    torch.testing.assert_close(q_first, expected[0][0])
    torch.testing.assert_close(again, expected[0][1])
    for answer, place in zip(answers, (2, 0, 1), strict=True):
        torch.testing.assert_close(answer, expected[1][place])
    assert "forward" not in attention.q_proj.__dict__
