"""The one place that changes how a transformers model runs, and changes it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from shadowkv_cli.errors import UsageError
from shadowkv_cli.model.fused import Fused, replaced
from shadowkv_cli.model.rotary import rotary_module

IMPLEMENTATION = "shadowkv"
MLP_TILE_TOKENS = 8192


class Attends(Protocol):
    """What takes over attention and rotary tables while it is attached.

    Attributes:
        context_tokens: that the token which is being run may attend to, itself included.
        fused: ops in place of the model's small kernels, or None.
    """

    context_tokens: int
    fused: Fused | None

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor: ...

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]: ...


_active: Attends | None = None


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    assert _active is not None, "the attention function runs while a session is attached"
    for feature in ("softcap", "s_aux"):
        if kwargs.get(feature) is not None:
            raise UsageError(f"{type(module).__name__} uses {feature}, which no method supports.")
    window = kwargs.get("sliding_window")
    if window is not None and window < _active.context_tokens:
        raise UsageError(
            f"{type(module).__name__} attends a window of {window} tokens: use a shorter context."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _active.attention(module.layer_idx, query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)


def _tiled(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Run a module that treats tokens one by one in tiles of the sequence, to bound its memory."""

    def run(x: Tensor) -> Tensor:
        if x.shape[1] <= MLP_TILE_TOKENS:
            return forward(x)
        out = torch.empty_like(x)
        for start in range(0, x.shape[1], MLP_TILE_TOKENS):
            tile = slice(start, start + MLP_TILE_TOKENS)
            out[:, tile] = forward(x[:, tile])
        return out

    return run


@contextmanager
def attached(model: PreTrainedModel, session: Attends) -> Iterator[None]:
    """Let a session serve the model's attention and rotary tables; undone on the way out.

    Within itself, for the same session, it does nothing.
    """
    global _active
    if _active is session:
        yield
        return
    assert _active is None, "one session at a time"
    before = model.config._attn_implementation

    def rotary(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return session.rotary(position_ids)

    with ExitStack() as stack:
        stack.enter_context(replaced(rotary_module(model), rotary))
        if session.fused is not None:
            stack.enter_context(session.fused.applied())
        for name, module in model.named_modules():
            if name.split(".")[-1] == "mlp":
                stack.enter_context(replaced(module, _tiled(module.forward)))
        model.set_attn_implementation(IMPLEMENTATION)
        _active = session
        try:
            yield
        finally:
            _active = None
            model.set_attn_implementation(before)
