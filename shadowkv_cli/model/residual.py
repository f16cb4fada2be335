"""A decoded token's residual stream, to which projections add their outputs as they multiply.

Two kernels a layer less, and one rounding less each: a product in 32 bits is added before it is
rounded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shadowkv_cli.model.long_prompts import LinearInto
from shadowkv_cli.model.replacing import Forward, replaced

CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def plain_layers(model: nn.Module) -> list[Any]:
    """Decoder layers that do nothing but add what attention and MLP make of the norms' outputs.

    Tried on random numbers, once for each class of layers.
    """
    found: list[Any] = []
    good: dict[type, bool] = {}
    for module in model.modules():
        children = dict(module.named_children())
        inner = {name for name, child in children.items() if type(child) is not nn.Dropout}
        if inner != CHILDREN:
            continue
        if type(module) not in good:
            good[type(module)] = _adds(module)
        if good[type(module)]:
            found.append(module)
    return found


@torch.no_grad()
def _adds(layer: Any) -> bool:
    """Whether a layer is `x += attention(norm(x)); x += mlp(norm(x))`."""
    first, *others = inspect.signature(layer.forward).parameters.values()
    optional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    if any(p.default is inspect.Parameter.empty and p.kind not in optional for p in others):
        return False
    weight = next(layer.input_layernorm.parameters(), None)
    if first.name != "hidden_states" or weight is None or weight.dim() != 1:
        return False

    def attend(hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states * 3, None

    generator = torch.Generator(weight.device).manual_seed(0)
    size = (1, 3, len(weight))
    x = torch.randn(size, generator=generator, device=weight.device).to(weight.dtype)
    with replaced(layer.self_attn, attend), replaced(layer.mlp, lambda x: x * 5):
        theirs = layer(x)
    x = x + layer.input_layernorm(x) * 3
    x = x + layer.post_attention_layernorm(x) * 5
    return isinstance(theirs, Tensor) and torch.equal(theirs, x)


def adding(
    layer: Any, attention_out: LinearInto, mlp_out: LinearInto, is_decoding: Callable[[], bool]
) -> Forward:
    """The forward of a plain layer; of one token a row, the projections add to the stream.

    Args:
        layer: one of `plain_layers`.
        attention_out, mlp_out: its last linears.
        is_decoding: whether that is wanted now.
    """
    theirs = layer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or hidden_states.shape[1] != 1 or not is_decoding():
            return theirs(hidden_states, *args, **kwargs)
        stream = hidden_states
        normed = layer.input_layernorm(stream)
        attention_out.add_to(stream)
        attended, _ = layer.self_attn(hidden_states=normed, **kwargs)
        if attended.data_ptr() != stream.data_ptr():  # a projection with a bias
            stream = stream + attended
        normed = layer.post_attention_layernorm(stream)
        mlp_out.add_to(stream)
        made = layer.mlp(normed)
        return made if made.data_ptr() == stream.data_ptr() else stream + made

    return forward
