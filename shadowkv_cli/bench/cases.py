"""Which cells a benchmark measures at which length and batch."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from shadowkv_cli.bench import plan
from shadowkv_cli.bench.memory import (
    DECODE_RESERVE,
    RESERVE,
    decode_bytes,
    free_device_bytes,
    free_host_bytes,
)
from shadowkv_cli.bench.probes import Probe
from shadowkv_cli.config import FullSpec, MethodSpec, ModelShape, ShadowKVSpec
from shadowkv_cli.console import format_bytes, notice
from shadowkv_cli.errors import UsageError
from shadowkv_cli.run_config import EAGER, BenchSettings

Row = dict[str, Any]

MOST_ON_CPU = 64


@dataclass(frozen=True)
class Case:
    """One cell at one length and batch, and the way it is decoded.

    Attributes:
        spec: the method, its resident layers resolved to a number.
        asked: the same as it was asked for; None: as `spec`.
        hit_rate: that it is driven to; None: as it comes.
        lanes: parts of a micro-batch whose fetches overlap.
        lanes_asked: whether that number was asked for; the label says it then.
        micro_batches: parts of the batch that go through the layers one behind the other.
        micro_batches_asked: the same of their number.
        graph: on a GPU, a step is one CUDA graph.
        eager: in transformers' own forward, see `bench.eager`; for full attention alone.
    """

    spec: MethodSpec
    context_length: int
    prompt_tokens: int
    batch_size: int
    batch_rule: str
    asked: MethodSpec | None = None
    hit_rate: float | None = None
    lanes: int = 1
    lanes_asked: bool = False
    micro_batches: int = 1
    micro_batches_asked: bool = False
    graph: bool = True
    eager: bool = False

    @property
    def asked_spec(self) -> MethodSpec:
        return self.asked or self.spec

    @property
    def method(self) -> str:
        return EAGER if self.eager else self.spec.name

    @property
    def cell(self) -> str:
        """The label; what was asked of it is part of it, so that nobody mixes two cells up."""
        if self.eager:
            return EAGER
        marks = [] if self.hit_rate is None else [f"hits driven to {100 * self.hit_rate:g}%"]
        if self.micro_batches_asked:
            plural = "es" if self.micro_batches > 1 else ""
            marks.append(f"{self.micro_batches} micro-batch{plural}")
        if self.lanes_asked:
            marks.append(f"{self.lanes} lane{'s' if self.lanes > 1 else ''}")
        if not self.graph:
            marks.append("no graph")
        return self.asked_spec.cell + (f" ({'; '.join(marks)})" if marks else "")

    @property
    def resident_layers(self) -> int | None:
        """Of a method whose values are on the host, layers whose values are not; else None."""
        if not isinstance(self.spec, ShadowKVSpec) or self.spec.value_placement != "host":
            return None
        assert self.spec.resident_layers != "auto", "resolved when the case is made"
        return self.spec.resident_layers


MICRO_BATCHES = 2
"""As many are tried by the planner where nothing is asked for."""


MOST_LANES, MOST_LANES_OF_TWO_TABLES, MOST_LANES_OF_SEVERAL = 32, 16, 8
"""Of a batch, of one whose keys have a table of their own, and of each of several micro-batches."""


def usual_lanes(spec: ShadowKVSpec, batch: int, micro_batches: int) -> int:
    """Lanes of each micro-batch where no number is asked for: those measured to be fastest.

    With a row a lane the bus begins soonest. A lane launches twice as much where its keys have a
    table of their own: then it has two rows.
    """
    rows = math.ceil(batch / micro_batches)
    least, most = 1, MOST_LANES
    if micro_batches > 1:
        most = MOST_LANES_OF_SEVERAL
    elif spec.key_buffer != spec.value_buffer:
        least, most = 2, MOST_LANES_OF_TWO_TABLES
    return max(1, math.ceil(rows / max(least, math.ceil(rows / most))))


def _parts(spec: MethodSpec, batch: int, micro_batches: int, lanes: int | None) -> tuple[int, int]:
    """Micro-batches and lanes of each, of which none is empty; None: the usual ones."""
    micro_batches = max(1, min(micro_batches, batch))
    if lanes is None:
        assert isinstance(spec, ShadowKVSpec), "no other method has lanes"
        return micro_batches, usual_lanes(spec, batch, micro_batches)
    return micro_batches, min(lanes, math.ceil(batch / micro_batches))


def _ways(case: Case, settings: BenchSettings, *, is_first: bool) -> list[Case]:
    """A case in every way that it is decoded: hit rates, micro-batches, lanes, with and without a
    graph.

    Args:
        is_first: of its method; with `one_at_a_time` the others have all but the hit rate fixed.
    """
    spec = case.spec
    fetches = isinstance(spec, ShadowKVSpec) and spec.value_placement == "host"
    micro_batch_counts = settings.micro_batches if fetches else ()
    lane_counts: tuple[int | None, ...] = (settings.lanes or (None,)) if fetches else (1,)
    asked = list(
        itertools.product(micro_batch_counts or (1,), lane_counts, settings.graphs or (True,))
    )
    if settings.one_at_a_time:
        asked = [way for way in asked if sum(map(operator.ne, way, asked[0])) <= 1]
        asked = asked if is_first else asked[:1]
    found = {way: (*_parts(spec, case.batch_size, way[0], way[1]), way[2]) for way in asked}
    fewer = any(way[0] != own[0] or way[1] not in (None, own[1]) for way, own in found.items())
    if fewer and case.batch_size:  # none fits: refused in a line of its own
        notice(
            f"{case.cell}: parts of a batch of {case.batch_size} have a sequence each at least, so "
            "there are fewer lanes or micro-batches than were asked for."
        )
    ways = dict.fromkeys(found.values())
    rates = settings.hit_rates if isinstance(spec, ShadowKVSpec) else (None,)
    return [
        replace(
            case,
            hit_rate=rate,
            lanes=lanes,
            lanes_asked=fetches and bool(settings.lanes),
            micro_batches=micro_batches,
            micro_batches_asked=fetches and bool(settings.micro_batches),
            graph=graph,
        )
        for micro_batches, lanes, graph in ways
        for rate in rates
    ]


def free_bytes(
    device: torch.device, settings: BenchSettings, shape: ModelShape, tokens: int
) -> int:
    """Memory for caches of prompts of that length; a prefill needs more beside them."""
    if settings.state != "synthetic":
        return free_device_bytes(device, RESERVE)
    return free_device_bytes(device, DECODE_RESERVE, decode_bytes(shape, tokens))


@dataclass(frozen=True)
class Room:
    """What a batch must fit into: a device on which the model lies, or will lie.

    Attributes:
        shape: of the model's attention.
        device: where it runs.
        still_to_load: bytes of weights that are not there yet.
        weight_bytes: of the model.
        probe: of a GPU, by which the planner chooses micro-batches; None: there is always one.
    """

    shape: ModelShape
    device: torch.device
    still_to_load: int = 0
    weight_bytes: int = 0
    probe: Probe | None = None

    def free_bytes(self, tokens: int, settings: BenchSettings) -> int:
        return free_bytes(self.device, settings, self.shape, tokens) - self.still_to_load

    def largest_batch(self, spec: MethodSpec, tokens: int, settings: BenchSettings) -> int:
        """Sequences whose cache fits beside the model, and on the host, by the method's bytes.

        On a CPU at most `MOST_ON_CPU`: a small model would fill the whole memory for no gain.
        """
        held = spec.cache_bytes(self.shape, tokens, settings.new_tokens)
        fits = self.free_bytes(tokens, settings) // held.device
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
        room = self.free_bytes(tokens, settings) - batch * held.device
        layers = max(room, 0) // (batch * form.data_bytes(self.shape, tokens))
        return replace(spec, resident_layers=min(layers, self.shape.num_layers))

    def batch_size(self, rule: str, spec: MethodSpec, tokens: int, settings: BenchSettings) -> int:
        """Sequences by a rule: a number, `equal` (full attention's largest) or `auto`."""
        if rule.isdigit():
            return int(rule)
        return self.largest_batch(FullSpec() if rule == "equal" else spec, tokens, settings)

    def in_usual_parts(self, case: Case, settings: BenchSettings, before: Row | None) -> Case:
        """Decoded in micro-batches where these are foretold to be faster, if none were asked for.

        On a CPU each part is one lane.

        Args:
            case: its resident layers resolved; only a captured step at a driven hit rate is
                foretold.
            settings: what was asked for.
            before: an earlier row of the same cell; its parts stay.
        """
        spec = case.spec
        fetches = isinstance(spec, ShadowKVSpec) and spec.value_placement == "host"
        if not fetches or settings.lanes:
            return case
        if before is not None:
            parts = before.get("micro_batches", 1)
            return replace(case, micro_batches=parts, lanes=before["lanes"])
        if self.device.type == "cpu":  # where nothing runs beside anything
            return replace(case, lanes=1)
        if settings.micro_batches:
            return case
        rate, probe = case.hit_rate, self.probe
        if probe is None or rate is None or not case.graph:
            return case
        parts, lanes = _parts(spec, case.batch_size, MICRO_BATCHES, None)
        other = replace(case, micro_batches=parts, lanes=lanes)

        def step_ms(way: Case) -> float:
            return plan.phase_ms(
                spec,
                self.shape,
                self.weight_bytes,
                probe,
                way.prompt_tokens,
                way.batch_size,
                hit_rate=rate,
                lanes=way.lanes,
                micro_batches=way.micro_batches,
            )["step"]

        return min(case, other, key=step_ms)

    def check(self, case: Case, settings: BenchSettings) -> None:
        """Raise UsageError where a case's batch does not fit beside the model, or on the host."""
        held = case.spec.cache_bytes(self.shape, case.prompt_tokens, settings.new_tokens)
        batch = max(case.batch_size, 1)
        places = [(" beside the model", held.device, self.free_bytes(case.prompt_tokens, settings))]
        if held.host:
            places.append((" of host memory", held.host, free_host_bytes()))
        for what, needed, free in places:
            if case.batch_size < 1 or needed * batch > free:
                raise UsageError(
                    f"{case.spec.cell} at {case.context_length} tokens needs "
                    f"{format_bytes(needed * batch)}{what} for batch {batch}, "
                    f"{format_bytes(max(free, 0))} are free: use a smaller --batch-size or "
                    "--context-length."
                )


def cases_at(
    length: int,
    rule: str,
    specs: Sequence[MethodSpec],
    settings: BenchSettings,
    batch_sizes: Mapping[MethodSpec, int],
) -> list[Case]:
    """Every cell in every way at one length and batch rule; `batch_sizes` of each, and of full."""
    first_of = {spec.name: spec for spec in reversed(specs)}
    tokens = settings.prompt_tokens(length)
    cases = []
    for spec in specs:
        case = Case(spec, length, tokens, batch_sizes[spec], rule)
        cases += _ways(case, settings, is_first=spec == first_of[spec.name])
    if settings.eager_baseline:
        cases.append(Case(FullSpec(), length, tokens, batch_sizes[FullSpec()], rule, eager=True))
    return cases


def make_cases(
    specs: Sequence[MethodSpec],
    settings: BenchSettings,
    room: Room,
    measured: Sequence[Row] = (),
) -> list[Case]:
    """Resolve the batch rules, and the ways that each cell is decoded in.

    Raises UsageError where not even one sequence fits, or for graphs on a CPU.

    Args:
        measured: rows of the run that is continued; their batches stay, although the memory that is
            free may have changed.
    """
    if settings.graphs and room.device.type == "cpu":
        raise UsageError("--graph says how a GPU decodes, and this is a CPU: leave it out.")
    before = {(r.get("spec", r["cell"]), r["context_length"], r["batch_rule"]): r for r in measured}
    same = {(r["cell"], r["context_length"], r["batch_rule"]): r for r in measured if "lanes" in r}
    cases = []
    for length, rule in itertools.product(settings.context_lengths, settings.batch_rules):
        rows = {spec: before.get((spec.cell, length, rule)) for spec in [*specs, FullSpec()]}
        batch_sizes = {
            spec: row["batch_size"]
            if row
            else room.batch_size(rule, spec, settings.prompt_tokens(length), settings)
            for spec, row in rows.items()
        }
        for case in cases_at(length, rule, specs, settings, batch_sizes):
            case = _with_resident_layers(case, rows[case.spec], room, settings)
            own = same.get((case.cell, length, rule))
            cases.append(room.in_usual_parts(case, settings, own))
    for case in cases:
        room.check(case, settings)
    return cases


def _with_resident_layers(
    case: Case, before: Row | None, room: Room, settings: BenchSettings
) -> Case:
    """The case with its resident layers as a number: that of an earlier row, or what fits."""
    spec = case.spec
    if not isinstance(spec, ShadowKVSpec) or spec.resident_layers != "auto":
        return case
    batch = max(case.batch_size, 1)
    resolved = (
        replace(spec, resident_layers=before["resident_layers"])
        if before
        else room.resolve(spec, case.prompt_tokens, settings, batch)
    )
    return replace(case, spec=resolved, asked=spec)
