"""One forward of a transformers model whose attention somebody else serves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from shadowkv_cli.model.patches import Attends, attached


class _PassingLayer(CacheLayerMixin):
    """A cache layer that only tells transformers how many tokens came before."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1


@torch.inference_mode()
def last_logits(
    model: PreTrainedModel,
    serving: Attends,
    ids: Tensor,
    positions: Tensor,
    before: int,
    keep: int = 1,
) -> Tensor:
    """Logits of the last `keep` tokens of each row, float32 [rows, keep, V].

    Args:
        model: runs its projections, norms and MLPs.
        serving: its attention and rotary tables.
        ids, positions: int64 [rows, tokens].
        before: tokens of the longest row that came before.
    """
    count = model.config.get_text_config().num_hidden_layers
    layers: list[Any] = [_PassingLayer(before) for _ in range(count)]
    with attached(model, serving):
        out = model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=Cache(layers=layers),
            use_cache=True,
            logits_to_keep=keep,
        )
    return out.logits[:, -keep:].float()
