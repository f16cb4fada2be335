"""The figures of `bench.prefill_speed`: what is measured at which length, with which backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from shadowkv_cli.bench import prefill_parts, prefill_runs
from shadowkv_cli.bench.prefill_targets import CONTEXT, SAMPLE_CONTEXT
from shadowkv_cli.cells import build_specs
from shadowkv_cli.config import FullSpec, MethodSpec
from shadowkv_cli.model.loading import LoadedModel
from shadowkv_cli.rowlog import Row

NEW_TOKENS, FEW_TOKENS = 128, 16
LONG = (262_144, 524_288)
RANK = 160
CHUNK_SIZES = (4, 8, 16, 32)
BUDGETS, RANKS, SWEPT_SIZES = (512, 1024, 2048, 4096), (64, 128, RANK), (8, 16)
OPS = ("two norms", "rotation", "gate", "two sums")
Ways = Sequence[tuple[str, bool, Any]]
"""A name, whether methods take a layer in beside the model, and how low-rank keys are found."""

WAYS: Ways = (("beside", True, None), ("in line", False, None))
MORE_WAYS: Ways = (("beside, eigh", True, "eigh"), ("in line, eigh", False, "eigh"))
Rows = Mapping[str, Row]


@dataclass(frozen=True)
class Figure:
    """Something to measure.

    Attributes:
        measure: its name in the rows.
        context_length: tokens.
        work: measures it with a model, and gives a row of each variant, with at least `seconds`.
        backend: of exact attention, where one is asked for.
        variants: names of what it measures.
        long: whether it needs a model of more than 131,072 positions.
    """

    measure: str
    context_length: int
    work: Callable[[LoadedModel], Rows]
    backend: str | None = None
    variants: tuple[str, ...] = ("",)
    long: bool = False


def one_cell() -> list[MethodSpec]:
    """The paper's configuration with values on the host."""
    cell = f"shadowkv:sparse_budget=2048,rank={RANK},outlier_chunks=48,value_placement=host"
    return build_specs([cell], {})


def cells_of(chunk_sizes: Sequence[int]) -> list[MethodSpec]:
    """The same with several chunk sizes, and as many outlier tokens in each."""
    cells = [f"sparse_budget=2048,value_placement=host,chunk_size={size}" for size in chunk_sizes]
    return build_specs([f"shadowkv:{cell}" for cell in cells], {})


def swept_cells() -> list[MethodSpec]:
    """24 cells, values beside the model."""
    cells = [
        f"shadowkv:sparse_budget={budget},rank={rank},chunk_size={size}"
        for budget in BUDGETS
        for rank in RANKS
        for size in SWEPT_SIZES
    ]
    return build_specs(cells, {})


def repeats_at(tokens: int) -> int:
    """Few at long lengths, where a prefill takes ten seconds."""
    return 3 if tokens <= 32_768 else 2


def _row(seconds: list[float], flops: float | None = None) -> Row:
    return {"seconds": min(seconds), "all_seconds": seconds, "flops": flops}


# ---- one layer ----


def _attention(loaded: LoadedModel, *, tokens: int, backend: str) -> Rows:
    return {"": _row(*prefill_parts.attention(loaded, tokens, backend, repeats_at(tokens)))}


def _products(loaded: LoadedModel, *, tokens: int) -> Rows:
    return {"": _row(*prefill_parts.products(loaded, tokens, repeats_at(tokens)))}


def _small_ops(loaded: LoadedModel, *, tokens: int) -> Rows:
    found = prefill_parts.small_ops(loaded, tokens, repeats_at(tokens))
    return {name: _row(found[name]) for name in OPS}


def _low_rank(loaded: LoadedModel, *, tokens: int) -> Rows:
    found = prefill_parts.factorisation(loaded, tokens, RANK, repeats_at(tokens))
    return {way: _row(seconds) for way, seconds in found.items()}


def _svd(loaded: LoadedModel, *, tokens: int) -> Rows:
    return {"": _row(prefill_parts.official_svd(loaded, tokens))}


def layer_figures(tokens: int, backends: Sequence[str]) -> list[Figure]:
    """The parts of one layer; the official SVD, which is slow, at long lengths alone."""
    figures = [
        Figure("attention", tokens, partial(_attention, tokens=tokens, backend=name), name)
        for name in backends
    ]
    figures.append(Figure("products", tokens, partial(_products, tokens=tokens)))
    figures.append(Figure("ops", tokens, partial(_small_ops, tokens=tokens), variants=OPS))
    ways = ("eigh", "subspace")
    figures.append(Figure("low rank", tokens, partial(_low_rank, tokens=tokens), variants=ways))
    if tokens >= CONTEXT:
        figures.append(Figure("svd", tokens, partial(_svd, tokens=tokens)))
    return figures


# ---- whole prefills ----


def _plain(loaded: LoadedModel, *, tokens: int, backend: str) -> Rows:
    row = prefill_runs.plain_prefill(loaded, tokens, backend, repeats_at(tokens))
    return {"": row | {"flops": prefill_parts.prefill_flops(loaded, tokens)}}


def _kept(
    loaded: LoadedModel, *, specs: Sequence[MethodSpec], tokens: int, backend: str, ways: Ways
) -> Rows:
    return prefill_runs.kept_prefill(loaded, specs, tokens, backend, repeats_at(tokens), ways)


def prefill_figures(tokens: int, backends: Sequence[str]) -> list[Figure]:
    """A prefill of which nothing is kept, by backend."""
    return [
        Figure("prefill", tokens, partial(_plain, tokens=tokens, backend=name), name)
        for name in backends
    ]


def kept_figures(tokens: int, backends: Sequence[str]) -> list[Figure]:
    """One configuration: every way with the first backend, at one length one with the others."""
    figures = []
    for name in backends if tokens == CONTEXT else backends[:1]:
        ways = [*WAYS, *(MORE_WAYS if tokens == CONTEXT else ())]
        if name != backends[0]:
            ways = ways[:1]
        work = partial(_kept, specs=one_cell(), tokens=tokens, backend=name, ways=ways)
        names = tuple(way for way, *_ in ways)
        figures.append(Figure("kept", tokens, work, name, names))
    return figures


def _chunk_sizes(loaded: LoadedModel, *, sizes: Sequence[int], tokens: int, backend: str) -> Rows:
    found = _kept(loaded, specs=cells_of(sizes), tokens=tokens, backend=backend, ways=WAYS[:1])
    return {str(len(sizes)): found[WAYS[0][0]]}


def chunk_figures(backend: str) -> list[Figure]:
    """One chunk size, and several."""
    return [
        Figure(
            "chunk sizes",
            CONTEXT,
            partial(_chunk_sizes, sizes=sizes, tokens=CONTEXT, backend=backend),
            backend,
            (str(len(sizes)),),
        )
        for sizes in ((8,), CHUNK_SIZES)
    ]


# ---- whole samples ----


def _sample(
    loaded: LoadedModel,
    *,
    name: str,
    specs: Sequence[MethodSpec],
    tokens: int,
    new_tokens: int,
    backend: str,
    samples: int,
) -> Rows:
    return {name: prefill_runs.sample(loaded, specs, tokens, new_tokens, backend, samples)}


def _sample_figure(
    name: str,
    specs: Sequence[MethodSpec],
    tokens: int,
    backend: str,
    *,
    new_tokens: int = NEW_TOKENS,
    samples: int = 2,
) -> Figure:
    work = partial(
        _sample,
        name=name,
        specs=specs,
        tokens=tokens,
        new_tokens=new_tokens,
        backend=backend,
        samples=samples,
    )
    return Figure("sample", tokens, work, backend, (name,), long=tokens + new_tokens > 131_072)


def _evaluation(tokens: int, backend: str) -> Figure:
    return _sample_figure("full and shadowkv", [FullSpec(), *one_cell()], tokens, backend)


def sample_figures(backend: str) -> list[Figure]:
    """A sample answered with full attention and ShadowKV at once."""
    return [_evaluation(SAMPLE_CONTEXT, backend)]


def sweep_figures(backend: str) -> list[Figure]:
    """A sample of a sweep, and of an evaluation to hold it against."""
    cells = [FullSpec(), *swept_cells()]
    return [_evaluation(CONTEXT, backend), _sample_figure("24 cells", cells, CONTEXT, backend)]


def long_figures(backend: str) -> list[Figure]:
    """What full attention has no room for."""
    few = {"new_tokens": FEW_TOKENS, "samples": 1}
    return [_sample_figure("shadowkv", one_cell(), tokens, backend, **few) for tokens in LONG]


PER_LENGTH: Mapping[str, Callable[[int, Sequence[str]], list[Figure]]] = {
    "layer": layer_figures,
    "prefill": prefill_figures,
    "kept": kept_figures,
}
WITH_THE_BEST: Mapping[str, Callable[[str], list[Figure]]] = {
    "chunks": chunk_figures,
    "sample": sample_figures,
    "sweep": sweep_figures,
    "long": long_figures,
}
PARTS = (*PER_LENGTH, *WITH_THE_BEST)


def figures(parts: Sequence[str], lengths: Sequence[int], backends: Sequence[str]) -> list[Figure]:
    """Everything that was asked for; the first backend is the best."""
    found = []
    for part in PARTS:
        if part in parts and part in PER_LENGTH:
            found += [f for tokens in lengths for f in PER_LENGTH[part](tokens, backends)]
        elif part in parts:
            found += WITH_THE_BEST[part](backends[0])
    return found
