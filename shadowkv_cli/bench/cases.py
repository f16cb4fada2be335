"""Which cells a benchmark measures at which length and batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from shadowkv_cli.bench.memory import DECODE_RESERVE, RESERVE, free_device_bytes, free_host_bytes
from shadowkv_cli.config import FullSpec, MethodSpec, ModelShape, ShadowKVSpec
from shadowkv_cli.console import format_bytes
from shadowkv_cli.errors import UsageError
from shadowkv_cli.run_config import BenchSettings

Row = dict[str, Any]

MOST_ON_CPU = 64


@dataclass(frozen=True)
class Case:
    """One cell at one length and batch, driven to a hit rate or not.

    Attributes:
        spec: the method, its resident layers resolved to a number.
        asked: the same as it was asked for, where that differs.
    """

    spec: MethodSpec
    context_length: int
    prompt_tokens: int
    batch_size: int
    batch_rule: str
    hit_rate: float | None = None
    asked: MethodSpec | None = None

    @property
    def asked_spec(self) -> MethodSpec:
        return self.asked or self.spec

    @property
    def cell(self) -> str:
        """The cell's label; that it was driven is part of it, so that nobody mixes the two up."""
        driven = "" if self.hit_rate is None else f" (hits driven to {100 * self.hit_rate:g}%)"
        return self.asked_spec.cell + driven

    @property
    def resident_layers(self) -> int | None:
        """Of a method whose values are on the host, layers whose values are not; else None."""
        if not isinstance(self.spec, ShadowKVSpec) or self.spec.value_placement != "host":
            return None
        assert self.spec.resident_layers != "auto", "resolved when the case is made"
        return self.spec.resident_layers


LANES_FROM = 4
"""Rows from which a batch is worked on in two lanes, if the method fetches from the host."""


def lanes_of(case: Case, settings: BenchSettings) -> int:
    """Parts that a case's batch is worked on in."""
    if not (isinstance(case.spec, ShadowKVSpec) and case.spec.value_placement == "host"):
        return 1
    if settings.lanes is not None:
        return min(settings.lanes, case.batch_size)
    return 2 if case.batch_size >= LANES_FROM else 1


def free_bytes(device: torch.device, settings: BenchSettings) -> int:
    """Memory for caches; a prefill needs more beside them than decoding."""
    synthetic = settings.state == "synthetic"
    return free_device_bytes(device, DECODE_RESERVE if synthetic else RESERVE)


@dataclass(frozen=True)
class Room:
    """What a batch must fit into: a device on which the model lies, or will lie.

    Attributes:
        shape: of the model's attention.
        device: where it runs.
        still_to_load: bytes of weights that are not there yet.
    """

    shape: ModelShape
    device: torch.device
    still_to_load: int = 0

    def free_bytes(self, settings: BenchSettings) -> int:
        return free_bytes(self.device, settings) - self.still_to_load

    def largest_batch(self, spec: MethodSpec, tokens: int, settings: BenchSettings) -> int:
        """Sequences whose cache fits beside the model, and on the host, by the method's bytes.

        On a CPU at most `MOST_ON_CPU`: a small model would fill the whole memory for no gain.
        """
        held = spec.cache_bytes(self.shape, tokens, settings.new_tokens)
        fits = self.free_bytes(settings) // held.device
        if self.device.type == "cpu":
            fits = min(fits, MOST_ON_CPU)
        on_host = free_host_bytes() if held.host else 0
        while fits > 0 and self._host_bytes(spec, tokens, settings, fits) > on_host:
            fits -= 1
        return fits

    def _host_bytes(
        self, spec: MethodSpec, tokens: int, settings: BenchSettings, batch: int
    ) -> int:
        resolved = self.resolve(spec, tokens, settings, batch)
        return batch * resolved.cache_bytes(self.shape, tokens, settings.new_tokens).host

    def resolve(
        self, spec: MethodSpec, tokens: int, settings: BenchSettings, batch: int
    ) -> MethodSpec:
        """The method with as many resident layers as the device holds, where they are `auto`.

        A CPU has one memory for both, so there are none.
        """
        if not isinstance(spec, ShadowKVSpec) or spec.resident_layers != "auto":
            return spec
        if self.device.type == "cpu":
            return replace(spec, resident_layers=0)
        held = spec.cache_bytes(self.shape, tokens, settings.new_tokens)
        [form, *_] = spec.value_forms(self.shape.num_layers)
        room = self.free_bytes(settings) - batch * held.device
        layers = max(room, 0) // (batch * form.data_bytes(self.shape, tokens))
        return replace(spec, resident_layers=min(layers, self.shape.num_layers))


def make_cases(
    specs: Sequence[MethodSpec],
    settings: BenchSettings,
    room: Room,
    measured: Sequence[Row] = (),
) -> list[Case]:
    """Resolve the batch rules. Raises UsageError where not even one sequence fits.

    Args:
        measured: rows of the run that is continued; their batches stay, although the memory that is
            free may have changed.
    """
    before = {(r.get("spec", r["cell"]), r["context_length"], r["batch_rule"]): r for r in measured}
    cases = []
    for length in settings.context_lengths:
        tokens = settings.prompt_tokens(length)
        for rule in settings.batch_rules:
            for spec in specs:
                row = before.get((spec.cell, length, rule), {})
                size = int(rule) if rule.isdigit() else row.get("batch_size", 0)
                if not size:
                    by = FullSpec() if rule == "equal" else spec
                    size = room.largest_batch(by, tokens, settings)
                resolved = _as_before(spec, row)
                if resolved is None:
                    resolved = room.resolve(spec, tokens, settings, max(size, 1))
                needed = resolved.cache_bytes(room.shape, tokens, settings.new_tokens).device
                free = room.free_bytes(settings)
                if size < 1 or needed * size > free:
                    batch = max(size, 1)
                    raise UsageError(
                        f"{spec.cell} at {length} tokens needs {format_bytes(needed * batch)} for "
                        f"batch {batch}, {format_bytes(free)} are free: use a smaller --batch-size "
                        "or --context-length."
                    )
                rates = settings.hit_rates if isinstance(spec, ShadowKVSpec) else (None,)
                cases += [
                    Case(resolved, length, tokens, size, rule, rate, asked=spec) for rate in rates
                ]
    return cases


def _as_before(spec: MethodSpec, row: Row) -> MethodSpec | None:
    """The method as a row of the run that is continued resolved it; None for others."""
    if getattr(spec, "resident_layers", 0) != "auto" or not row:
        return None
    assert isinstance(spec, ShadowKVSpec)
    return replace(spec, resident_layers=row["resident_layers"])
