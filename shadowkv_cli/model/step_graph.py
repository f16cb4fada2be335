"""A decode step of all rows as one CUDA graph: captured once, replayed for every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Stepped(NamedTuple):
    """What a step from each row's last token gives.

    Attributes:
        tokens: int64 [R], the likeliest next ones.
        finite: bool [R], whether all logits of a row are.
        logits: [R, V].
    """

    tokens: Tensor
    finite: Tensor
    logits: Tensor


Step = Callable[[Tensor], Stepped]
"""Steps from int64 [R] on tensors that stay where they are, and never waits for the device."""


class StepGraph:
    """A captured step; `tokens` and what it returns are overwritten by the next replay."""

    def __init__(
        self,
        step: Step,
        rows: int,
        device: torch.device,
        *,
        forget: Callable[[], None],
    ) -> None:
        """Run the step once, so that libraries and workspaces are there, and capture it.

        Args:
            step: what is captured.
            rows: R.
            device: a GPU.
            forget: undoes what a step changes.
        """
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        here = torch.cuda.current_stream(device)
        beside = torch.cuda.Stream(device)
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            step(self.tokens)
        here.wait_stream(beside)
        forget()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.stepped = step(self.tokens)
        forget()

    def replay(self, tokens: Tensor) -> Stepped:
        """Take a step from these tokens, int64 [R]."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.stepped
