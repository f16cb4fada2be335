"""Decode throughput: every cell alone with its batch, in rounds that take turns over the cells."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shadowkv_cli.bench.memory import PeakMemory, free_device_bytes, free_host_bytes
from shadowkv_cli.bench.state import fill_prompts, fill_synthetic, random_prompts
from shadowkv_cli.config import FullSpec, MethodSpec, SparseSpec
from shadowkv_cli.console import format_bytes
from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.model.loading import LoadedModel
from shadowkv_cli.model.session import MethodFailure, Session
from shadowkv_cli.run_config import BenchSettings

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One cell at one length and batch."""

    spec: MethodSpec
    context_length: int
    batch_size: int
    batch_rule: str


def largest_batch(spec: MethodSpec, loaded: LoadedModel, tokens: int, new_tokens: int) -> int:
    """Sequences whose cache fits beside the model, and on the host, by the method's bytes."""
    held = spec.cache_bytes(loaded.shape, tokens, new_tokens)
    fits = free_device_bytes(loaded.device) // held.device
    if held.host:
        fits = min(fits, free_host_bytes() // held.host)
    return int(fits)


def make_cases(
    specs: Sequence[MethodSpec], settings: BenchSettings, loaded: LoadedModel
) -> list[Case]:
    """Resolve the batch rules. Raises UsageError where not even one sequence fits."""
    cases = []
    for tokens in settings.context_lengths:
        for rule in settings.batch_rules:
            for spec in specs:
                size = int(rule) if rule.isdigit() else 0
                if not size:
                    by = FullSpec() if rule == "equal" else spec
                    size = largest_batch(by, loaded, tokens, settings.new_tokens)
                needed = spec.cache_bytes(loaded.shape, tokens, settings.new_tokens).device
                free = free_device_bytes(loaded.device)
                if size < 1 or needed * size > free:
                    batch = max(size, 1)
                    raise UsageError(
                        f"{spec.cell} at {tokens} tokens needs {format_bytes(needed * batch)} for "
                        f"batch {batch}, {format_bytes(free)} are free: use a smaller --batch-size "
                        "or --context-length."
                    )
                cases.append(Case(spec, tokens, size, rule))
    return cases


def _needed_bytes(specs: Sequence[MethodSpec], case: Case, loaded: LoadedModel, new: int) -> int:
    return sum(
        s.cache_bytes(loaded.shape, case.context_length, new).device * case.batch_size
        for s in specs
    )


class _Bench:
    """The sessions of the cases of one length and batch size, built when they are needed."""

    def __init__(
        self,
        loaded: LoadedModel,
        settings: BenchSettings,
        cases: list[Case],
        prompts: Callable[[int, int], list[list[int]]] | None,
    ) -> None:
        self.loaded, self.settings, self.cases = loaded, settings, cases
        self.prompts = prompts
        specs = list(dict.fromkeys(case.spec for case in cases))
        self.sets = [specs] if settings.share else [[spec] for spec in specs]
        needed = _needed_bytes(specs, cases[0], loaded, settings.new_tokens)
        self.all_fit = needed <= free_device_bytes(loaded.device)
        if settings.share and not self.all_fit:
            self.sets = [[spec] for spec in specs]
        self._kept: dict[int, tuple[Session, torch.Tensor, float | None]] = {}

    @contextmanager
    def session(self, place: int) -> Iterator[tuple[Session, torch.Tensor, float | None]]:
        """A filled session of a set: kept for the next round if all sets fit together."""
        if place in self._kept:
            yield self._kept[place]
            return
        built = self._build(self.sets[place])
        if self.all_fit:
            self._kept[place] = built
        yield built

    def _build(self, specs: list[MethodSpec]) -> tuple[Session, torch.Tensor, float | None]:
        case, settings = self.cases[0], self.settings
        tokens, batch = case.context_length, case.batch_size
        prompts: list[list[int]] = []
        if settings.state == "tokens":
            prompts = random_prompts(batch, tokens, self.loaded.vocab_size)
        elif settings.state == "prompts":
            assert self.prompts is not None, "prompts come with the state 'prompts'"
            prompts = self.prompts(tokens, batch)
        session = Session(
            self.loaded,
            specs,
            prompt_tokens=max(map(len, prompts), default=tokens),
            new_tokens=settings.new_tokens,
            num_prompts=batch,
            backend=settings.backend,
            merge_cells=False,
        )
        if settings.state == "synthetic":
            return session, fill_synthetic(session, tokens), None
        return session, *fill_prompts(session, prompts)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(session: Session, first: torch.Tensor, case: Case, settings: BenchSettings) -> Row:
    """Decode one cell alone, greedily, and time each step."""
    device = session.loaded.device
    session.focus(case.spec)
    tokens, step_ms = first, []
    for step in range(settings.new_tokens):
        _synchronise(device)
        started = time.perf_counter()
        tokens = session.decode_step(tokens).argmax(-1)
        _synchronise(device)
        if step >= settings.warmup_steps:
            step_ms.append((time.perf_counter() - started) * 1e3)
    audits = [session.audit(row, settings.new_tokens) for row in range(case.batch_size)]
    hits = [a["hit_rate"] for a in audits if a["hit_rate"] is not None]
    return {
        "tokens_per_s": case.batch_size * len(step_ms) / sum(step_ms) * 1e3,
        "step_ms_p50": float(np.percentile(step_ms, 50)),
        "step_ms_p99": float(np.percentile(step_ms, 99)),
        "step_ms": [round(ms, 4) for ms in step_ms],
        "hit_rate": sum(hits) / len(hits) if hits else None,
        "attended_tokens": sum(a["attended_tokens"] for a in audits) / len(audits),
        "error": None,
    }


def describe_case(case: Case, settings: BenchSettings, loaded: LoadedModel) -> Row:
    """What is known of a measurement before it is made."""
    spec, batch = case.spec, case.batch_size
    held = spec.cache_bytes(loaded.shape, case.context_length, settings.new_tokens)
    wanted = spec.wanted(case.context_length) if isinstance(spec, SparseSpec) else None
    return {
        "cell": spec.cell,
        "method": spec.name,
        "settings": spec.settings(),
        "sparse_budget_tokens": wanted.selected_tokens if wanted else None,
        "outlier_tokens": wanted.outlier_tokens if wanted else None,
        "context_length": case.context_length,
        "batch_size": batch,
        "batch_rule": case.batch_rule,
        "state": settings.state,
        "decode_steps": settings.decode_steps,
        "warmup_steps": settings.warmup_steps,
        "gpu_bytes": held.device * batch,
        "host_bytes": held.host * batch,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }


def run_cases(
    cases: Sequence[Case],
    settings: BenchSettings,
    loaded: LoadedModel,
    *,
    done: Callable[[Case, int], bool],
    prompts: Callable[[int, int], list[list[int]]] | None = None,
) -> Iterator[Row]:
    """Measure every case in every round that is not done; yields one row a measurement.

    Args:
        done: whether a case's round has a row already.
        prompts: makes prompts of (tokens, count), for the state `prompts`.

    """
    together: dict[tuple[int, int], list[Case]] = {}
    for case in cases:
        together.setdefault((case.context_length, case.batch_size), []).append(case)
    peak = PeakMemory(loaded.device)
    for of_size in together.values():
        bench = _Bench(loaded, settings, of_size, prompts)
        for number in range(settings.rounds):
            for place, specs in enumerate(bench.sets):
                open_cases = [c for c in of_size if c.spec in specs and not done(c, number)]
                if not open_cases:
                    continue
                with bench.session(place) as (session, first, prefill_s):
                    for case in open_cases:
                        row = describe_case(case, settings, loaded) | {"round": number}
                        peak.restart()
                        try:
                            row |= measure(session, first, case, settings)
                        except MethodFailure as failure:
                            row |= {"tokens_per_s": None, "error": str(failure)}
                        row |= {"prefill_s": prefill_s, "peak_memory_bytes": peak.read()}
                        yield row


def check_done(rows: Sequence[Row]) -> Callable[[Case, int], bool]:
    """Look up measurements that exist and did not fail."""
    have = {
        (r["cell"], r["context_length"], r["batch_size"], r["batch_rule"], r["round"])
        for r in rows
        if r["error"] is None
    }
    return lambda case, number: (
        (
            case.spec.cell,
            case.context_length,
            case.batch_size,
            case.batch_rule,
            number,
        )
        in have
    )


def prompts_from(
    tokenizer: Any, texts_of: Callable[[int], list[str]]
) -> Callable[[int, int], list[list[int]]]:
    """Make the prompts of a benchmark from a dataset's texts of a context length.

    Raises ShadowKVError, when called, where the dataset has fewer than a batch needs.
    """
    from shadowkv_cli.tasks.tokenization import encode_prompt

    def make(context_length: int, count: int) -> list[list[int]]:
        texts = texts_of(context_length)
        if len(texts) < count:
            raise ShadowKVError(
                f"The data hold {len(texts)} prompts of {context_length} tokens, batch {count} "
                "needs as many: build more samples or use --state synthetic."
            )
        return [encode_prompt(tokenizer, text) for text in texts[:count]]

    return make
