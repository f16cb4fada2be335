"""Methods take in a layer of the prompt while the model goes on with the next."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from shadowkv_cli.config import MethodSpec, ShadowKVSpec
from shadowkv_cli.methods import Group, Prompt, PromptStore
from shadowkv_cli.methods.side_stream import Join, SideStream
from shadowkv_cli.model.failures import blaming, specs_of


@functools.cache
def _side_of(device: torch.device) -> SideStream:
    """One for all sessions: cuBLAS keeps a workspace of every stream that ever multiplied."""
    return SideStream(device)


class Compression:
    """What the store and the groups do with a layer's keys and values, on a stream of its own.

    On a GPU it begins as soon as they are there, beside the layer's attention, and the model waits
    for it at the end of the layer: until then the keys and values are held, then the allocator may
    give their memory away. So a prefill holds those of one layer, however far the host runs ahead.
    """

    def __init__(
        self,
        store: PromptStore,
        groups: Sequence[tuple[list[int], Group]],
        specs: Sequence[MethodSpec],
        *,
        beside: bool,
    ) -> None:
        self.store = store
        self.groups = [group for _, group in groups]
        shadow: list[MethodSpec] = [s for s in specs if isinstance(s, ShadowKVSpec)]
        self.suspects = shadow or list(specs)  # the store's low-rank keys fail most easily
        self.waits = any(group.needs_queries for group in self.groups)
        beside = beside and store.device.type == "cuda"
        self.side = _side_of(store.device) if beside else None
        self._join = Join()
        self._held: tuple[Tensor, ...] = ()

    def mark(self) -> torch.cuda.Event | None:
        """When a layer's queries, keys and values are there; call it before they are attended."""
        self.end_layer()
        if self.side is None:
            return None
        return torch.cuda.current_stream(self.store.device).record_event()

    def take_in(
        self,
        layer: int,
        prompt: Prompt,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ready: torch.cuda.Event | None,
    ) -> None:
        """Let every method take in a layer: q [Hq, T, D], k and v [Hk, S, D], after RoPE.

        Args:
            ready: from `mark`; what comes after it on the model's stream is not waited for.
        """
        with nullcontext(Join()) if self.side is None else self.side.forked(ready) as join:
            self._held = (k, v)
            with blaming(self.suspects):
                self.store.add_layer(layer, prompt, k, v)
            for group in self.groups:
                with blaming(specs_of(group, range(len(group.rows)))):
                    group.prefill_layer(layer, prompt, q, k, v)
        self._join = join
        if self.waits:
            self.end_layer()

    def check(self) -> None:
        """Raise MethodFailure where something could not be packed; the host waits if it was."""
        with blaming(self.suspects):
            self.store.packer.check()

    def end_layer(self) -> None:
        """Let the model's stream wait for the last layer that was taken in."""
        self._join.wait()
        self._join, self._held = Join(), ()

    def finish(self) -> None:
        """Let the model's stream wait for everything, also after a failure."""
        if self.side is not None:
            torch.cuda.current_stream(self.store.device).wait_stream(self.side.stream)
        self._join, self._held = Join(), ()
