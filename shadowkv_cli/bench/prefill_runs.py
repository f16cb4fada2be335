"""Whole prefills on a GPU, with and without what methods keep of them, and whole samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shadowkv_cli.bench.memory import PeakMemory, PrefillBytes, allowed_bytes
from shadowkv_cli.bench.state import random_prompts
from shadowkv_cli.config import MethodSpec
from shadowkv_cli.model import exact_attention
from shadowkv_cli.model.forward import last_logits
from shadowkv_cli.model.last_layer import attend_last
from shadowkv_cli.model.loading import LoadedModel
from shadowkv_cli.model.rotary import compute_table, rotary_module
from shadowkv_cli.model.session import Session

Row = dict[str, Any]


class Plain:
    """Serves exact attention and keeps nothing: what a prefill takes by itself."""

    micro_batches = None
    is_decoding = False
    wants_last_token = True

    def __init__(self, loaded: LoadedModel, tokens: int, backend: str) -> None:
        self.loaded, self.fused, self.backend = loaded, loaded.fused, backend
        self.context_tokens = tokens
        rotary = rotary_module(loaded.model)
        self.table = compute_table(rotary, tokens, tokens, loaded.dtype, loaded.device)

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.table
        return cos[position_ids], sin[position_ids]

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if layer + 1 == self.loaded.shape.num_layers:
            return attend_last(q, k, v, scale)
        return exact_attention.attend(self.backend, q, k, v, scale)

    def end_layer(self) -> None:
        """Nothing is held."""

    def prefill(self, ids: Sequence[int]) -> None:
        tokens = torch.tensor(list(ids), device=self.loaded.device)[None]
        positions = torch.arange(len(ids), device=self.loaded.device)[None]
        last_logits(self.loaded.model, self, tokens, positions, 0)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(loaded: LoadedModel, work: Callable[[], Any], repeats: int) -> tuple[list[float], int]:
    """Seconds of each repeat by the host's clock, and the largest peak of memory in bytes."""
    peak, seconds = PeakMemory(loaded.device), []
    peak.restart()
    for _ in range(repeats):
        _wait_for(loaded.device)
        started = time.perf_counter()
        work()
        _wait_for(loaded.device)
        seconds.append(time.perf_counter() - started)
    return seconds, peak.read()


def _row(seconds: list[float], peak: int, allowed: PrefillBytes, **facts: Any) -> Row:
    return {
        "seconds": min(seconds),
        "all_seconds": seconds,
        "peak_memory_bytes": peak,
        "allowed_bytes": allowed.total,
        "workspace_limit_bytes": allowed.workspace,
        **facts,
    }


def prompt(loaded: LoadedModel, tokens: int) -> list[int]:
    return random_prompts(1, tokens, loaded.vocab_size)[0]


def plain_prefill(loaded: LoadedModel, tokens: int, backend: str, repeats: int) -> Row:
    """A prefill of which nothing is kept."""
    plain, ids = Plain(loaded, tokens, backend), prompt(loaded, tokens)
    seconds, peak = _timed(loaded, lambda: plain.prefill(ids), repeats)
    return _row(seconds, peak, allowed_bytes(loaded, tokens, 0))


def kept_prefill(
    loaded: LoadedModel,
    specs: Sequence[MethodSpec],
    tokens: int,
    backend: str,
    repeats: int,
    ways: Sequence[tuple[str, bool, Any]],
) -> dict[str, Row]:
    """A prefill that methods take in, in several ways one after the other.

    Args:
        ways: a name, whether it is done beside the model, and how low-rank keys are found.
    """
    session = Session(loaded, specs, prompt_tokens=tokens, new_tokens=1, backend=backend)
    ids, found = prompt(loaded, tokens), {}
    for name, beside, method in ways:
        session.store.low_rank_method = method
        session.compress(beside=beside)
        seconds, peak = _timed(loaded, lambda: session.prefill(ids, key="a"), repeats)
        allowed = allowed_bytes(loaded, tokens, session.held_bytes)
        found[name] = _row(seconds, peak, allowed, backend_used=session.backend)
    return found


def sample(
    loaded: LoadedModel,
    specs: Sequence[MethodSpec],
    tokens: int,
    new_tokens: int,
    backend: str,
    samples: int,
) -> Row:
    """Samples as an evaluation answers them: a prefill, then all cells decode together.

    The first captures the graph of a step, which the others replay; both are told.
    """
    session = Session(loaded, specs, prompt_tokens=tokens, new_tokens=new_tokens, backend=backend)
    session.choose_backend()
    ids, prefills = prompt(loaded, tokens), []

    def answer() -> None:
        started = time.perf_counter()
        first = session.prefill(ids, key="a").argmax(-1).expand(len(specs))
        int(first[0])  # waits for the device
        prefills.append(time.perf_counter() - started)
        # No id ends an answer, so that all take as long.
        session.generate(first, [new_tokens] * len(specs), frozenset())

    seconds, peak = _timed(loaded, answer, samples)
    allowed = allowed_bytes(loaded, tokens, session.held_bytes)
    return _row(
        seconds[1:] or seconds,
        peak,
        allowed,
        first_s=round(seconds[0], 4),
        prefill_s=min(prefills),
        new_tokens=new_tokens,
        cells=len(specs),
        captured=session.is_captured,
        backend_used=session.backend,
    )
