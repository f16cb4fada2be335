"""Full attention as it runs without this program: the second baseline of a decode benchmark.

transformers' own forward with `attn_implementation="sdpa"`, launched op by op, nothing of it fused
or captured. Its keys and values are the session's, where full attention left them: what a token
adds is written behind them. transformers' growing cache would copy all of them for each token, and
its static one masks, which keeps SDPA from its flash kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from shadowkv_cli.model.session import Session

NOTE = "transformers' own forward, attn_implementation=sdpa, op by op; keys and values preallocated"


class _HeldLayer(CacheLayerMixin):
    """A layer's keys and values [P, Hk, S, D], of which the first `tokens` are in use."""

    def __init__(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        super().__init__()
        self.held_keys, self.held_values, self.tokens = keys, values, tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        before, self.tokens = self.tokens, self.tokens + key_states.shape[2]
        self.held_keys[:, :, before : self.tokens] = key_states
        self.held_values[:, :, before : self.tokens] = value_states
        return self.held_keys[:, :, : self.tokens], self.held_values[:, :, : self.tokens]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return int(self.held_keys.shape[2])


@contextmanager
def _plain(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def decode(
    session: Session, first: Tensor, steps: int, *, before_step: Callable[[int], None]
) -> tuple[Tensor, Tensor]:
    """Decode every prompt of a session greedily, in transformers' own forward.

    What full attention itself has generated is overwritten.

    Args:
        session: whose prompts have one length, and whose store holds keys and values.
        first: int64 [P], the tokens to begin with.
        steps: tokens to decode, at most as many as the session has room for.
        before_step: called with 0 to `steps`, so that the last call is behind the last step.

    Returns:
        The tokens, int64 [P, steps], and whether all logits of a prompt were finite, bool [P].
    """
    store, model = session.store, session.loaded.model
    tokens = int(session.lengths[0])
    assert bool((session.lengths == tokens).all()), "prompts of unequal length need a mask"
    assert steps <= session.new_tokens, f"room for {session.new_tokens} tokens, not {steps}"
    layers = range(session.loaded.shape.num_layers)
    held: list[Any] = [_HeldLayer(store.keys[i], store.values[i], tokens) for i in layers]
    cache, last, taken = Cache(layers=held), first, []
    finite = torch.ones(len(first), dtype=torch.bool, device=first.device)
    with _plain(model):
        for step in range(steps):
            before_step(step)
            logits = model(input_ids=last[:, None], past_key_values=cache, use_cache=True).logits
            last = logits[:, -1].argmax(-1)
            finite &= torch.isfinite(logits[:, -1]).all(-1)
            taken.append(last)
        before_step(steps)
    return torch.stack(taken, 1), finite
