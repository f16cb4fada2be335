"""Projections that add to the residual stream of a decoded token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from shadowkv_cli.model.long_prompts import LinearInto
from shadowkv_cli.model.replacing import replaced
from shadowkv_cli.model.residual import adding, plain_layers
from shadowkv_cli.model.rotary import decoder_layers
from shadowkv_cli.testing import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_most_families_are_plain(family: str) -> None:
    model = tiny_model(family).model
    assert plain_layers(model) == decoder_layers(model)


def test_layers_that_do_something_else_are_not() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("olmo2", vocab_size=101, intermediate_size=96, **sizes)
    assert plain_layers(AutoModelForCausalLM.from_config(config)) == [], "its norms come behind"
    model: Any = tiny_model("llama").model
    kind = type(model.model.layers[0])

    class Scaled(kind):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(hidden_states, *args, **kwargs) * 1.01

    for layer in model.model.layers:
        layer.__class__ = Scaled
    assert plain_layers(model) == []


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Layer(nn.Module):
    """A layer whose attention is its projection, and so is its MLP."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.o_proj, self.down_proj = (nn.Linear(8, 8, bias=bias) for _ in range(2))

    def self_attn(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        assert kwargs == {"position_ids": 3}
        return self.o_proj(hidden_states), None

    def mlp(self, x: Tensor) -> Tensor:
        return self.down_proj(x)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = (
            hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("decoding", [False, True])
@torch.inference_mode()
def test_it_is_the_same_sum(bias: bool, tokens: int, decoding: bool) -> None:
    torch.manual_seed(0)
    layer, x = Layer(bias), torch.randn(5, tokens, 8)
    expected = layer(x.clone(), position_ids=3)
    out, down = LinearInto(layer.o_proj), LinearInto(layer.down_proj)
    with replaced(layer.o_proj, out.forward), replaced(layer.down_proj, down.forward):
        given = x.clone()
        found = adding(layer, out, down, lambda: decoding)(given, position_ids=3)
    torch.testing.assert_close(found, expected)
    in_place = decoding and tokens == 1 and not bias
    assert (found.data_ptr() == given.data_ptr()) == in_place
    assert in_place or torch.equal(given, x)
