"""Decoding rows in micro-batches, half a layer apart: one fetches while another multiplies.

Embedding, last norm and logits see all rows. In between every layer runs once for each
micro-batch, on a stream of that one's own, and hidden states stay apart from layer to layer. Left
to themselves the streams fall in step: all fetch, then all multiply. So a micro-batch begins a
layer only when the one before it has selected its chunks, and has its fetch before it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from shadowkv_cli.errors import UsageError
from shadowkv_cli.methods.side_stream import Join, after_failure
from shadowkv_cli.model.replacing import Forward


@functools.cache
def _streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    """Streams that stay: cuBLAS makes a workspace for each, which no graph may hold.

    They multiply for the first time in a step that is not captured, see `step_graph`.
    """
    return tuple(torch.cuda.Stream(device) for _ in range(count))


class MicroBatches:
    """Takes the rows of a batch through a model's layers in parts.

    Attributes:
        rows: places in the batch of each part, one behind the other; none: all at once.
        current: number of the part whose layer is running; None between layers.
        turn: where a part has selected its chunks, the last one that did.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.rows: Sequence[slice] = ()
        self.current: int | None = None
        self.turn = Join()
        self._device = device
        self._own = _streams(device, count) if device.type == "cuda" else ()
        self._whole: Tensor | None = None

    def fork(self, hidden: Tensor) -> list[Tensor]:
        """Hidden states [R, T, H] of all rows as those of each part: views, held until `join`."""
        self._whole = hidden
        self.turn.event = None  # of the step before, maybe of another graph
        for stream in self._own:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        return [hidden[rows] for rows in self.rows]

    def join(self) -> None:
        """Let the current stream wait for all parts."""
        for stream in self._own:
            torch.cuda.current_stream(self._device).wait_stream(stream)
        self._whole = None

    def run(self, part: int, forward: Forward, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run a layer for one part, when the part before it has selected its chunks."""
        here: AbstractContextManager[Any]
        here = torch.cuda.stream(self._own[part]) if self._own else nullcontext()
        everybody, rows = self.rows[-1].stop, self.rows[part]
        own = [_cut(value, everybody, rows) for value in args]
        named = {name: _cut(value, everybody, rows) for name, value in kwargs.items()}
        self.current = part
        try:
            with here:
                self.turn.wait()
                return forward(hidden, *own, **named)
        finally:
            self.current = None


def _cut(value: Any, everybody: int, rows: slice) -> Any:
    """Of what all sequences have a row of, those rows: [R, T, …], or a tuple of such."""
    if isinstance(value, tuple):
        return tuple(_cut(item, everybody, rows) for item in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == everybody:
        return value[rows]
    return value


def in_parts(layer: nn.Module, parts: MicroBatches, *, ends: bool) -> Forward:
    """The forward of a decoder layer, which passes on a list of hidden states, one each part.

    Args:
        layer: as it runs for all rows.
        parts: the rows.
        ends: whether this is the last layer, which puts the rows together again.
    """
    theirs = layer.forward

    def forward(hidden_states: Tensor | list[Tensor], *args: Any, **kwargs: Any) -> Any:
        if not parts.rows:
            return theirs(hidden_states, *args, **kwargs)
        with after_failure(parts.join):
            apart = hidden_states
            if isinstance(apart, Tensor):
                apart = parts.fork(apart)
            found = [
                parts.run(part, theirs, own, *args, **kwargs) for part, own in enumerate(apart)
            ]
            if not all(isinstance(out, Tensor) for out in found):
                raise UsageError(
                    f"{type(layer).__name__} returns more than hidden states, so its rows can't be "
                    "decoded in parts: use --micro-batches 1."
                )
        if not ends:
            return found
        parts.join()
        return torch.cat(found)

    return forward
