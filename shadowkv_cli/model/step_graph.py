"""A decode step of all rows as one CUDA graph: captured once, replayed for every token."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@functools.cache
def _working_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that every step works on, before it is captured and meanwhile.

    A stream has one workspace of cuBLAS (32 MiB on an H100), made when it first multiplies. Made
    within a capture it would lie in that graph's own memory, and torch gives it back when a graph
    that was captured on this stream goes, though other graphs still write to it
    (pytorch/pytorch, issue 193402). This stream first multiplies in a warm-up, and no capture
    begins on it: graphs may come and go, and none brings a workspace of its own.
    """
    return torch.cuda.Stream(device)


@contextmanager
def _working(device: torch.device) -> Iterator[None]:
    """Work on that stream after all that was issued; what is issued next waits for it.

    After a failure too: a capture cannot end while a stream has not joined.
    """
    here, stream = torch.cuda.current_stream(device), _working_stream(device)
    stream.wait_stream(here)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        here.wait_stream(stream)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Collect what is garbage before, and nothing within.

    A session that goes waits for the device, which ends a capture, and so may its graphs.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
        with _working(device):
            step(self.tokens)
        forget()
        self.graph = torch.cuda.CUDAGraph()
        captured = torch.cuda.graph(self.graph, capture_error_mode="thread_local")
        with _without_collection(), captured, _working(device):
            self.stepped = step(self.tokens)
        forget()

    def replay(self, tokens: Tensor) -> Stepped:
        """Take a step from these tokens, int64 [R]."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.stepped
