"""How many sequences of each known model fit a GPU, with full attention and with ShadowKV."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from shadowkv_cli.catalogue.models import MODELS, KnownModel
from shadowkv_cli.config import FullSpec, MethodSpec, ShadowKVSpec
from shadowkv_cli.console import format_bytes
from shadowkv_cli.errors import UsageError

NEW_TOKENS = 1024
"""Generated tokens that room is counted for."""
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class FitTable:
    """One record a model, and the same as text."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    records: list[dict[str, Any]]
    notes: list[str]


def parse_memory(text: str, option: str) -> int:
    """Turn `80GB` or `128 GiB` into bytes. Raises UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", text.strip())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise UsageError(f"{option} must be a size like 80GB or 128GiB, not '{text}'.")
    return int(float(match[1]) * UNITS[match[2]])


def largest_batch(
    model: KnownModel, spec: MethodSpec, tokens: int, gpu_bytes: int, host_bytes: int
) -> int:
    """Sequences that fit beside the weights, each with memory of its own; activations not counted.

    Args:
        tokens: of prompt and answer of one sequence.
        gpu_bytes, host_bytes: what there is.
    """
    held = spec.cache_bytes(model.shape, tokens - NEW_TOKENS, NEW_TOKENS)
    room = gpu_bytes - model.parameters * model.shape.element_bytes
    fits = max(room, 0) // held.device
    return min(fits, host_bytes // held.host) if held.host else fits


def describe_models(tokens: int, gpu_bytes: int, host_bytes: int) -> FitTable:
    """The table of `shadowkv models`. Raises UsageError for a length with no room for a prompt."""
    if tokens <= NEW_TOKENS:
        raise UsageError(f"--context-length must be over {NEW_TOKENS} tokens, not {tokens}.")
    records, rows = [], []
    for model in MODELS.values():
        batches: list[int | None] = [None, None]
        if tokens <= model.max_positions:
            rank = min(ShadowKVSpec().rank, model.shape.key_width)
            methods = (FullSpec(), ShadowKVSpec(rank=rank, value_placement="host"))
            batches = [largest_batch(model, m, tokens, gpu_bytes, host_bytes) for m in methods]
        per_token = model.shape.kv_bytes(1)
        records.append(
            {
                "model": model.name,
                "access": model.access,
                "licence": model.licence,
                "source": model.source,
                "parameters": model.parameters,
                "max_positions": model.max_positions,
                "kv_bytes_per_token": per_token,
                "context_length": tokens,
                "batch_full": batches[0],
                "batch_shadowkv": batches[1],
            }
        )
        rows.append(
            [
                model.name,
                model.access,
                model.licence,
                f"{model.parameters / 1e9:.2f} B",
                f"{model.max_positions:,}",
                format_bytes(per_token),
                *("-" if batch is None else str(batch) for batch in batches),
            ]
        )
    return FitTable(
        title=f"Known models; batches of {tokens:,} tokens on {format_bytes(gpu_bytes)} of GPU "
        f"memory with {format_bytes(host_bytes)} of the host's",
        columns=[
            *("--model", "access", "licence", "parameters", "context", "KV a token"),
            *("batch, full", "batch, shadowkv"),
        ],
        rows=rows,
        records=records,
        notes=[
            "Batches in two-byte precision: weights and caches only, values of ShadowKV in pinned "
            "host memory, default settings; -: longer than the model's context.",
            "bundled: comes along; package: fetched from the Python package index at first use; "
            "gated: accept the licence on the hub and log in with `hf auth login`.",
        ],
    )
