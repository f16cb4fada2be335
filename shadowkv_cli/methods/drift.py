"""Selecting queries that drift from step to step, so that a wanted share of chunks is at hand."""

from __future__ import annotations

import torch
from torch import Tensor


class Drift:
    """A stationary random walk of one selecting query a layer, row and query head.

    For benchmarks: random weights give no meaningful hit rate, and real texts give one of their
    own. Attention itself goes on with the model's queries.

    Attributes:
        keep: float32, correlation of neighbouring steps; may be changed between steps.
        queries: [L, R, Hq, D], those of the running step.
    """

    def __init__(
        self, layers: int, rows: int, q_heads: int, dim: int, like: Tensor, seed: int
    ) -> None:
        device = like.device
        self._seed = seed
        self._state = torch.empty(layers, rows, q_heads, dim, device=device)
        self._dtype = like.dtype
        self.keep = torch.zeros((), device=device)
        self.restart()
        self.queries = self._state.to(self._dtype)

    @torch.inference_mode()
    def restart(self) -> None:
        """Back to where the walk began, also for a graph that was captured meanwhile."""
        generator = torch.Generator(self._state.device).manual_seed(self._seed)
        self._state.normal_(generator=generator)

    def advance(self) -> None:
        """Go on by one step, without waiting for the device."""
        noise = torch.randn_like(self._state)
        self._state.mul_(self.keep).add_(noise * (1 - self.keep**2).clamp_min(0).sqrt())
        self.queries = self._state.to(self._dtype)


class DriftingRows:
    """Some rows of a drift, for the group that decodes them: the same walk however rows are cut.

    Groups step in the order of their rows; all rows go on with the first.
    """

    def __init__(self, drift: Drift, rows: slice) -> None:
        self._drift, self._rows = drift, rows

    @property
    def queries(self) -> Tensor:
        """Those of the running step: [L, R, Hq, D]."""
        return self._drift.queries[:, self._rows]

    def advance(self) -> None:
        """Begin a step."""
        if self._rows.start == 0:
            self._drift.advance()
