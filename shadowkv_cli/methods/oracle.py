"""Control: the chunks that truly hold the most attention, with exact keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.methods.exact import ExactGroup
from shadowkv_cli.ops.select_chunks import landmark_scores, top_chunks
from shadowkv_cli.ops.sparse_attention import fixed_scores


class OracleGroup(ExactGroup):
    """Rows of a perfect selector: chunks by their true share of the attention."""

    @property
    def is_capturable(self) -> bool:
        # Rows of several prompts are sorted by prompt on the host.
        return self.store.num_prompts == 1 and super().is_capturable

    def select(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Take each chunk's mass from full attention, the largest of the group of query heads."""
        keys = self.store.chunked(self.store.keys[layer], self.chunk_size)
        # With every key as a landmark, a chunk's logsumexp is its unnormalised mass.
        scores = landmark_scores(q, keys, None, self.prompt_index, scale)  # [R, Hk, G, C]
        chunks = torch.arange(scores.shape[-1], device=q.device)
        barred = (chunks >= self.num_chunks[:, None])[:, None, None]
        scores = scores.masked_fill(barred, float("-inf"))
        others, _ = fixed_scores(q, self.keys[layer], self.section_lengths, self.capacities)
        total = torch.logaddexp(scores.logsumexp(-1), (others * scale).logsumexp(-1))
        shares = (scores - total[..., None]).amax(2)
        return top_chunks(shares, self.budget_chunks, self.max_chunks)
