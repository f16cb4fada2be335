"""Selecting queries that drift from step to step, so that a wanted share of chunks is at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.methods.side_stream import Join, SideStream, beside


class Drift:
    """A stationary random walk of one selecting query a layer, row and query head.

    For benchmarks: random weights give no meaningful hit rate, and real texts give one of their
    own. Attention itself goes on with the model's queries.

    Attributes:
        keep: float32, correlation of neighbouring steps; may be changed between steps.
        queries: [L, R, Hq, D], those of the running step, when `advancing` is done.
        advancing: on a GPU a step goes on beside the model, which selects a little later.
    """

    def __init__(
        self, layers: int, rows: int, q_heads: int, dim: int, like: Tensor, seed: int
    ) -> None:
        device = like.device
        self._seed = seed
        self._state = torch.empty(layers, rows, q_heads, dim, device=device)
        self._dtype = like.dtype
        self.keep = torch.zeros((), device=device)
        self.advancing = Join()
        self._stream = SideStream(device) if device.type == "cuda" else None
        self.restart()
        self.queries = self._state.to(self._dtype)

    @torch.inference_mode()
    def restart(self) -> None:
        """Back to where the walk began, also for a graph that was captured meanwhile."""
        generator = torch.Generator(self._state.device).manual_seed(self._seed)
        self._state.normal_(generator=generator)

    def advance(self) -> None:
        """Go on by one step, without waiting for the device."""
        with beside(self._stream) as self.advancing:
            noise = torch.randn_like(self._state)
            noise *= (1 - self.keep**2).clamp_min(0).sqrt()
            self._state.mul_(self.keep).add_(noise)
            self.queries.copy_(self._state)


class DriftingRows:
    """Some rows of a drift, for the group that decodes them: the same walk however rows are cut.

    Groups step in the order of their rows; all rows go on with the first.
    """

    def __init__(self, drift: Drift, rows: slice) -> None:
        self._drift, self._rows = drift, rows

    def queries(self, layer: int) -> Tensor:
        """Those of the running step, [R, Hq, D], for which the current stream waits."""
        self.join()
        return self._drift.queries[layer, self._rows]

    def join(self) -> None:
        """Let the current stream wait for what `advance` began."""
        self._drift.advancing.wait()

    def advance(self) -> None:
        """Begin a step; all that came before it must have joined."""
        if self._rows.start == 0:
            self._drift.advance()
