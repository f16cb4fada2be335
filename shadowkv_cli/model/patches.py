"""The one place that changes how a transformers model runs, and changes it back."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from shadowkv_cli.errors import UsageError
from shadowkv_cli.methods.tiles import is_long
from shadowkv_cli.model.fused import Fused
from shadowkv_cli.model.last_layer import last_mlp
from shadowkv_cli.model.long_prompts import (
    LinearInto,
    OutputProjection,
    rotating_in_place,
    tiled,
    tiled_in_place,
)
from shadowkv_cli.model.micro_batches import MicroBatches, in_parts
from shadowkv_cli.model.replacing import replaced
from shadowkv_cli.model.residual import adding
from shadowkv_cli.model.rotary import attention_modules, decoder_layers, rotary_module

ROTATION = "apply_rotary_pos_emb"

IMPLEMENTATION = "shadowkv"


class Attends(Protocol):
    """What takes over attention and rotary tables while it is attached.

    Attributes:
        context_tokens: that the token which is being run may attend to, itself included.
        fused: ops in place of the model's small kernels, or None.
        is_decoding: whether rows are decoded, a token each or several.
        wants_last_token: that nobody looks at what the model says of others.
        micro_batches: takes the decoded rows through the layers in parts, or None.
    """

    context_tokens: int
    fused: Fused | None

    @property
    def micro_batches(self) -> MicroBatches | None: ...

    @property
    def is_decoding(self) -> bool: ...

    @property
    def wants_last_token(self) -> bool: ...

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor: ...

    def end_layer(self) -> None:
        """All of a layer of a long prompt has been issued."""

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]: ...


_active: Attends | None = None
_outputs: dict[nn.Module, OutputProjection] = {}
"""Of each attention module, while a session is attached."""


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
    if module in _outputs:
        _outputs[module].offer_queries(query)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)


def _mlp(
    forward: Callable[[Tensor], Tensor], last: LinearInto | None, *, ends: bool
) -> Callable[[Tensor], Tensor]:
    """Run an MLP in tiles; it is the last of its layer, and may be that of the last one.

    Its input is the fresh output of a norm, of which no family reads anything after its MLP.
    """
    run_tiles = tiled_in_place(forward, last)

    def run(x: Tensor) -> Tensor:
        assert _active is not None, "MLPs run while a session is attached"
        last_alone = ends and _active.wants_last_token
        # One token's in every place: a norm may follow.
        out = x.copy_(forward(x[:, -1:])) if last_alone else run_tiles(x)
        if is_long(x.shape[1]):
            _active.end_layer()
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
        fused = session.fused.modules if session.fused is not None else frozenset()
        last, downs = last_mlp(model), dict[nn.Module, LinearInto]()
        for name, module in model.named_modules():
            if name.split(".")[-1] == "mlp":
                down = getattr(module, "down_proj", None)
                into = LinearInto(down) if type(down) is nn.Linear else None
                if into is not None:
                    downs[module] = into
                    stack.enter_context(replaced(into.linear, into.forward))
                ends = module is last
                stack.enter_context(replaced(module, _mlp(module.forward, into, ends=ends)))
            elif type(module).__name__.endswith("Norm") and module not in fused:
                stack.enter_context(replaced(module, tiled(module.forward)))
        attention = attention_modules(model)
        family: Any = importlib.import_module(type(attention[0]).__module__)
        stack.callback(setattr, family, ROTATION, getattr(family, ROTATION))
        at_once = session.fused.rotate_in_place if session.fused is not None else None
        setattr(family, ROTATION, rotating_in_place(getattr(family, ROTATION), at_once))
        for module in attention:
            if type(module.o_proj) is nn.Linear:
                _outputs[module] = OutputProjection(module.o_proj)
                stack.enter_context(replaced(module.o_proj, _outputs[module].forward))
        for layer in session.fused.plain_layers if session.fused is not None else []:
            out, down = _outputs.get(layer.self_attn), downs.get(layer.mlp)
            if out is not None and down is not None:
                forward = adding(layer, out, down, lambda: session.is_decoding)
                stack.enter_context(replaced(layer, forward))
        if session.micro_batches is not None:
            layers = decoder_layers(model)
            for holder in layers:
                forward = in_parts(holder, session.micro_batches, ends=holder is layers[-1])
                stack.enter_context(replaced(holder, forward))
        model.set_attn_implementation(IMPLEMENTATION)
        _active = session
        try:
            yield
        finally:
            _active = None
            _outputs.clear()
            model.set_attn_implementation(before)
