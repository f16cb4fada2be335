"""What a command would do: how many prefills and tokens, bytes, and the time they may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shadowkv_cli.answering import Question, reader_of, tokenizer_of
from shadowkv_cli.config import FullSpec, MethodSpec, ModelShape, ShadowKVSpec, SparseSpec
from shadowkv_cli.console import format_bytes, format_duration, print_json
from shadowkv_cli.errors import UsageError
from shadowkv_cli.evaluate import (
    Work,
    batch_size_for,
    check_tokenizer,
    choose_samples,
    find_missing,
)
from shadowkv_cli.prefix_order import by_beginning, expected_reuse
from shadowkv_cli.results import done_cells, read_run
from shadowkv_cli.run_config import BenchConfig, BenchSettings, EvalConfig, ModelChoice, SweepConfig
from shadowkv_cli.shared_bytes import shared_cache_bytes
from shadowkv_cli.side_by_side import in_batches
from shadowkv_cli.tasks.rows import Dataset

if TYPE_CHECKING:
    from shadowkv_cli.bench.memory import PrefillBytes
    from shadowkv_cli.bench.probes import Probe
    from shadowkv_cli.model.facts import ModelFacts

ROW_BYTES = 1500
"""Of a row of results, about."""

ASSUMED_HITS = 0.6
"""What keeping the last step's chunks gave on real texts (SmolLM2: 60 to 70 %)."""


@dataclass
class Plan:
    """Facts of a run that has not happened: for people as lines, for programs as one object."""

    facts: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def show(self, *, as_json: bool) -> None:
        if as_json:
            print_json({"dry_run": True, **self.facts})
            return
        for line in [*self.lines, "Nothing was run."]:
            print(line)


def step_bytes(spec: MethodSpec, shape: ModelShape, prompt_tokens: int) -> int:
    """Bytes of cache that one decoded token reads, all layers."""
    if not isinstance(spec, SparseSpec) or spec.is_dense(prompt_tokens):
        return shape.kv_bytes(prompt_tokens)
    read = shape.kv_bytes(spec.keeps(prompt_tokens).tokens)
    per_token = shape.num_layers * shape.element_bytes
    if isinstance(spec, ShadowKVSpec):
        read += shape.num_layers * spec.landmark_bytes(shape, prompt_tokens)
        read += per_token * spec.keeps(prompt_tokens).selected_tokens * spec.rank
    if spec.name == "oracle":
        read += shape.kv_bytes(prompt_tokens) // 2
    return read


def _model(
    choice: ModelChoice, specs: Sequence[MethodSpec], tokens: int
) -> tuple[ModelFacts, Probe]:
    """Facts of the model, checked as a run would check them, and the device's probe."""
    from shadowkv_cli.bench.probes import stored_or_measured
    from shadowkv_cli.model.facts import model_facts
    from shadowkv_cli.model.loading import resolve_device, resolve_dtype

    device = resolve_device(choice.device)
    dtype = resolve_dtype(choice.dtype, device)
    facts = model_facts(choice, dtype)
    for spec in specs:
        spec.check_model(facts.shape, facts.dtype)
    if tokens > facts.max_positions:
        raise UsageError(
            f"The context of {tokens} tokens does not fit {choice.name}, which has "
            f"max_position_embeddings {facts.max_positions}: use a shorter --context-length."
        )
    return facts, stored_or_measured(device, [dtype])


def _reused_tokens(config: EvalConfig, work: Work, together: int) -> dict[str, int]:
    """About how many tokens of each sample that is left are taken over, by its id."""
    if not config.reuse_prefix:
        return {sample.id: 0 for sample in work.todo}
    questions = [Question(s, work.missing[s.id], 0) for s in by_beginning(work.todo)]
    batches = in_batches(questions, together, config.num_workers)
    samples = [[question.sample for question in batch] for batch in batches]
    return expected_reuse(samples, config.num_workers)


def describe_evaluation(config: EvalConfig, kind: str = "eval") -> Plan:
    """What `eval`, or the accuracy phase of `sweep`, would do.

    Raises the UsageErrors that the run would raise before its first prefill.
    """
    from shadowkv_cli.bench import estimate
    from shadowkv_cli.bench.memory import prefill_bytes
    from shadowkv_cli.model.loading import resolve_device

    dataset = Dataset.open(config.data)
    work = choose_samples(config, dataset)
    choice = config.model
    allowed = config.allow_tokenizer_mismatch
    check_tokenizer(dataset, tokenizer_of(reader_of(choice, dataset)), choice.name, allowed=allowed)
    facts, probe = _model(choice, config.specs, work.longest)
    old = [] if config.fresh or not config.output.exists() else read_run(config.output).predictions
    find_missing(work, config.specs, done_cells(old, include_failed=False))
    device, to_load = resolve_device(choice.device), facts.weight_bytes
    together = batch_size_for(config, work, facts.shape, device, still_to_load=to_load)
    together = min(together, max(len(work.todo), 1))
    reused = _reused_tokens(config, work, together)
    prefill_s, decode_s, generated = 0.0, 0.0, 0
    for sample in work.todo:
        cells, tokens = work.missing[sample.id], sample.prompt_tokens
        prefill_s += estimate.prefill_seconds(
            facts, probe, tokens, cells, choice.backend, reused[sample.id]
        )
        steps = sample.max_new_tokens - 1  # the first token is the prefill's
        if probe.h2d_gb_s is not None:
            of_all = estimate.captured_seconds(
                facts, probe, cells, tokens, steps, hit_rate=ASSUMED_HITS, samples=together
            )
        else:
            read = together * sum(step_bytes(spec, facts.shape, tokens) for spec in cells)
            of_all = estimate.decode_seconds(facts, probe, read, steps)
        decode_s += of_all / together
        generated += len(cells) * sample.max_new_tokens
    if probe.h2d_gb_s is not None:
        decode_s += estimate.GRAPH_S * len({sample.context_length for sample in work.todo})
    seconds = prefill_s + decode_s
    rows = sum(map(len, work.missing.values()))
    longest = max(sample.prompt_tokens for sample in work.samples)
    shared = shared_cache_bytes(config.specs, facts.shape, longest, work.room)
    on_host = together * shared.host
    held = together * shared.device + on_host
    needed = prefill_bytes(
        facts.weight_bytes, facts.shape, facts.hidden_size, longest, together * shared.device
    )
    on_gpu = probe.h2d_gb_s is not None
    prompt_tokens = sum(sample.prompt_tokens for sample in work.todo)
    tokens_reused = sum(reused.values())
    taken_over = f", about {tokens_reused:,} of them taken over" if config.reuse_prefix else ""
    plan = Plan(
        {
            "kind": kind,
            "output": str(config.output),
            "cells": [spec.cell for spec in config.specs],
            "samples": len(work.samples),
            "samples_done": len(work.samples) - len(work.todo),
            "prefills": len(work.todo),
            "prompt_tokens": prompt_tokens,
            "estimated_reused_tokens": tokens_reused,
            "max_generated_tokens": generated,
            "rows": rows,
            "weight_bytes": facts.weight_bytes,
            "cache_bytes": held,
            "host_cache_bytes": on_host,
            "batch_size": together,
            "workspace_bytes": needed.layer + needed.workspace,
            "device_bytes": needed.total,
            "output_bytes": rows * ROW_BYTES,
            "estimated_prefill_seconds": prefill_s,
            "estimated_decode_seconds": decode_s,
            "estimated_seconds": seconds,
        }
    )
    plan.lines = [
        f"Would run {kind} of {choice.name} on {config.data}, into {config.output}:",
        *(f"  {spec.cell}: {_budget(spec, longest)}" for spec in config.specs),
        f"  {len(work.todo)} prefills of {prompt_tokens:,} tokens in all{taken_over} "
        f"({len(work.samples) - len(work.todo)} of {len(work.samples)} samples are done), then at "
        f"most {generated:,} generated tokens in {len(config.specs)} cells, of {together} at a "
        "time",
        f"  memory: {format_bytes(facts.weight_bytes)} of weights, {format_bytes(held)} of caches"
        f"{_at_most(needed, on_host) if on_gpu else ''}; "
        f"disk: about {format_bytes(rows * ROW_BYTES)}",
        f"  time: about {format_duration(seconds)} ({format_duration(prefill_s)} of prefills, "
        f"{format_duration(decode_s)} of decoding to the longest answers), estimated from the "
        "probe of this device",
    ]
    return plan


def _at_most(needed: PrefillBytes, host: int) -> str:
    """What a prefill on a GPU takes in all."""
    pinned = f", {format_bytes(host)} of them in pinned host memory" if host else ""
    return (
        f"{pinned}, up to {format_bytes(needed.layer + needed.workspace)} for a prefill; at most "
        f"{format_bytes(needed.total)} on the GPU"
    )


def _budget(spec: MethodSpec, prompt_tokens: int) -> str:
    if not isinstance(spec, SparseSpec):
        return f"all of up to {prompt_tokens:,} tokens"
    if spec.is_dense(prompt_tokens):
        return f"full attention: {prompt_tokens:,} tokens are not more than it keeps"
    kept = spec.keeps(prompt_tokens)
    return (
        f"{kept.tokens:,} of {prompt_tokens:,} tokens ({kept.selected_tokens:,} selected, "
        f"{kept.outlier_tokens} outliers, {kept.local_tokens} local)"
    )


def _describe_throughput(
    settings: BenchSettings, specs: Sequence[MethodSpec], facts: ModelFacts, probe: Probe
) -> tuple[dict[str, Any], str]:
    """Facts and a line of the throughput phase; `equal` and `auto` count as batches of 1."""
    from shadowkv_cli.bench.cases import cases_at
    from shadowkv_cli.bench.estimate import decode_seconds, prefill_seconds

    seconds, count, num_prefills, num_tokens = 0.0, 0, 0, 0
    for length in settings.context_lengths:
        tokens = settings.prompt_tokens(length)
        for rule in settings.batch_rules:
            batch = int(rule) if rule.isdigit() else 1
            prefills = batch * (1 if settings.share else len(specs))
            if settings.state != "synthetic":
                num_prefills += prefills
                num_tokens += prefills * tokens
                backend = settings.backend
                seconds += prefills * prefill_seconds(facts, probe, tokens, specs, backend)
            sizes = dict.fromkeys([*specs, FullSpec()], batch)
            for case in cases_at(length, rule, specs, settings, sizes):
                read = batch * step_bytes(case.spec, facts.shape, tokens)
                one_round = decode_seconds(facts, probe, read, settings.new_tokens)
                seconds += settings.rounds * one_round
                count += settings.rounds
    before = (
        f", after {num_prefills} prefills of {num_tokens:,} tokens in all" if num_prefills else ""
    )
    line = (
        f"  throughput: {count} measurements ({len(specs)} cells, lengths "
        f"{', '.join(map(str, settings.context_lengths))}, batch {', '.join(settings.batch_rules)},"
        f" {settings.rounds} rounds) of {settings.new_tokens} steps, state {settings.state}"
        f"{before}: about {format_duration(seconds)}"
    )
    facts_of_it = {
        "measurements": count,
        "throughput_prefills": num_prefills,
        "throughput_prompt_tokens": num_tokens,
        "estimated_seconds": seconds,
    }
    return facts_of_it, line


def describe_benchmark(config: BenchConfig) -> Plan:
    """What `bench` would do."""
    settings = config.settings
    longest = max(settings.context_lengths)
    facts, probe = _model(config.model, config.specs, longest)
    timing, line = _describe_throughput(settings, config.specs, facts, probe)
    held = max(
        s.cache_bytes(facts.shape, longest, settings.new_tokens).device for s in config.specs
    )
    plan = Plan(
        {
            "kind": "bench",
            "output": str(config.output),
            "cells": [spec.cell for spec in config.specs],
            "weight_bytes": facts.weight_bytes,
            "cache_bytes_per_sequence": held,
            "output_bytes": timing["measurements"] * ROW_BYTES,
            **timing,
        }
    )
    plan.lines = [
        f"Would run bench of {config.model.name}, into {config.output}:",
        *(f"  {spec.cell}: {_budget(spec, longest)}" for spec in config.specs),
        line,
        f"  memory: {format_bytes(facts.weight_bytes)} of weights, up to {format_bytes(held)} of "
        f"cache a sequence; disk: about {format_bytes(plan.facts['output_bytes'])}",
    ]
    return plan


def describe_batches(config: BenchConfig) -> Plan:
    """Bytes of every item and milliseconds of every phase of what `bench` would measure.

    Raises UsageError where a batch does not fit.
    """
    from shadowkv_cli.bench import plan as planner
    from shadowkv_cli.bench.cases import Room, make_cases
    from shadowkv_cli.model.loading import resolve_device
    from shadowkv_cli.model.weights_fit import check_weights_fit

    settings, device = config.settings, resolve_device(config.model.device)
    facts, probe = _model(config.model, config.specs, max(settings.context_lengths))
    weights = facts.weight_bytes
    check_weights_fit(facts, device)
    room = Room(facts.shape, device, still_to_load=weights, weight_bytes=weights, probe=probe)
    rows, lines = [], []
    for case in make_cases(config.specs, settings, room):
        items = planner.memory_items(
            case.spec, facts.shape, case.prompt_tokens, settings.new_tokens, case.batch_size
        )
        phases: dict[str, float] = {}
        if device.type == "cuda" and case.graph and not case.eager:
            phases = planner.phase_ms(
                case.spec,
                facts.shape,
                facts.weight_bytes,
                probe,
                case.prompt_tokens,
                case.batch_size,
                hit_rate=case.hit_rate if case.hit_rate is not None else ASSUMED_HITS,
                lanes=case.lanes,
                micro_batches=case.micro_batches,
            )
        rows.append(
            {
                "cell": case.cell,
                "context_length": case.context_length,
                "batch_size": case.batch_size,
                "resident_layers": case.resident_layers,
                "lanes": case.lanes,
                "micro_batches": case.micro_batches,
                "device_bytes": {item.name: item.device for item in items if item.device},
                "host_bytes": {item.name: item.host for item in items if item.host},
                "phase_ms": phases,
            }
        )
        lines += [
            f"{case.cell}, {case.context_length:,} tokens, batch {case.batch_size}:",
            f"  device: weights {format_bytes(facts.weight_bytes)}, "
            + ", ".join(f"{i.name} {format_bytes(i.device)}" for i in items if i.device)
            + f"; in all {format_bytes(facts.weight_bytes + sum(i.device for i in items))}",
        ]
        if any(item.host for item in items):
            held = ", ".join(f"{i.name} {format_bytes(i.host)}" for i in items if i.host)
            if case.resident_layers:
                held += f"; {case.resident_layers} layers' values are on the device"
            lines.append(f"  pinned host memory: {held}")
        if phases:
            shown = ", ".join(f"{k} {v:.2f}" for k, v in phases.items() if k != "step")
            if case.micro_batches > 1:
                shown += f"; in {case.micro_batches} micro-batches of {case.lanes} lanes"
            speed = case.batch_size / phases["step"] * 1e3
            lines.append(f"  step: {phases['step']:.1f} ms ({shown}); {speed:,.0f} tokens/s")
    if device.type == "cpu":
        lines.append("Milliseconds are foretold for a GPU only.")
    elif None in settings.hit_rates:
        lines.append(
            f"Without --hit-rate, {ASSUMED_HITS:.0%} of the chunks are taken to be at hand."
        )
    return Plan({"weight_bytes": facts.weight_bytes, "batches": rows}, lines)


def describe_sweep(config: SweepConfig) -> Plan:
    """What both phases of `sweep` would do."""
    plan = describe_evaluation(config.evaluation, "sweep")
    settings = config.throughput
    if settings is None:
        return plan
    specs = config.evaluation.specs
    longest = max(settings.context_lengths, default=0)
    facts, probe = _model(config.evaluation.model, specs, longest)
    settings = settings.for_model(facts.max_positions)
    timing, line = _describe_throughput(settings, specs, facts, probe)
    total = timing["estimated_seconds"] + plan.facts["estimated_seconds"]
    plan.facts |= {**timing, "estimated_seconds": total}
    plan.lines += [line, f"  both phases: about {format_duration(total)}"]
    return plan
