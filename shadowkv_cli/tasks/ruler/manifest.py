"""The manifest of a RULER dataset: what determines its rows, and what may grow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from shadowkv_cli.console import SCHEMA_VERSION
from shadowkv_cli.tasks.manifest import no_rows_yet, plan_rows
from shadowkv_cli.tasks.ruler.definitions import (
    GRID,
    NVIDIA,
    Dialect,
    definitions,
    shadowkv_constants,
)
from shadowkv_cli.tasks.ruler.official.parity import describe

Fit = Literal["best", "official"]
DIALECTS: dict[Fit, str] = {
    "best": "nvidia-main c3f5e3b, per-sample fit",
    "official": "nvidia-main c3f5e3b, official fit",
}
GENERATOR_VERSION = 1
DEVIATIONS = (
    "fit: each sample is grown in single units of its task to the largest size that fits, instead "
    "of one size for all that loses whole steps",
    "random numbers: every sample has its own generators, seeded by seed, task, length and index, "
    "instead of one stream for all",
    "places of needles and assignments: fractions of the haystack drawn once per sample, uniform "
    "over all distinct places as in RULER",
    "niah: keys of one sample, haystack needles included, never equal an inserted key",
    "essay: the text is split into sentences once, not again for every size",
    "cwe: the one-shot turn alone has the BOS token; beyond the word pool distinct adjective-noun "
    "compounds follow instead of RULER's list of English words",
    "fwe: N grows in steps of 1",
    "qa: the order of documents is drawn per sample, so that the gold document's place varies",
)
OFFICIAL_DEVIATIONS = (
    "index: the row's number, where RULER's needle tasks store the place of the answer",
    "a sample that cannot fit is an error, where RULER tries forever",
)
SHADOWKV_SUITE = "ruler-shadowkv"
GRID_SUITE = "niah-grid"
SUITES: dict[Dialect, str] = {"nvidia": "ruler", "shadowkv": SHADOWKV_SUITE, "grid": GRID_SUITE}
GRID_DIALECT = "grid of needles in the wording of nvidia-main c3f5e3b, per-sample fit"
GRID_DEVIATIONS = ("no task of RULER's: niah_single_2 at evenly spaced depths instead of random",)
SHADOWKV_DIALECT = "shadowkv a21f5a9 prompts and metrics, per-sample fit"
SHADOWKV_DEVIATIONS = (
    "rows: prompts of the authors' wording, not their rows: their draws and their lengths differ",
    "vt: between the example and the question stands one empty line; in their copy not checked",
)
SHADOWKV_NOTE = (
    "Prompts and metrics of ShadowKV's authors: not comparable with RULER, and known to be flawed "
    "(an empty answer to a question scores 1.0)."
)
SYNTHETIC_NOTE = "Synthetic text: not comparable with published RULER."


def new_manifest(
    *,
    fit: Fit,
    dialect: Dialect = NVIDIA,
    seed: int,
    tokenizer: dict[str, Any],
    template: dict[str, str],
    source_choice: dict[str, str],
    sources: dict[str, dict[str, Any]],
    sentence_splitter: str | None,
    wonderwords: str,
    depths: list[float] | None = None,
    shuffle_gold: bool = False,
    differences: dict[str, str] | None = None,
) -> dict[str, Any]:
    """A manifest of a dataset without rows.

    `differences` are those of the official fit, from what RULER's own rows are made of; `depths`
    those of a grid, in percent.
    """
    official: dict[str, Any] = {}
    if shuffle_gold:
        official["shuffle_gold"] = True
    if differences is not None:
        official = {"byte_equal_sources": not differences, "not_byte_equal": differences}
    name = DIALECTS[fit]
    deviations: tuple[str, ...] = DEVIATIONS if fit == "best" else OFFICIAL_DEVIATIONS
    if dialect == "shadowkv":
        name, deviations = SHADOWKV_DIALECT, SHADOWKV_DEVIATIONS + DEVIATIONS
        official["known_flaws"] = shadowkv_constants()["known_flaws"]
    if dialect == GRID:
        name, deviations = GRID_DIALECT, GRID_DEVIATIONS
        official["depths"] = depths
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": SUITES[dialect],
        "dialect": name,
        "deviations": list(deviations),
        **official,
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "tokenizer": tokenizer,
        "template": template,
        "source_choice": source_choice,
        "sentence_splitter": sentence_splitter,
        "wonderwords": wonderwords,
        "sources": dict(sorted(sources.items())),
        **no_rows_yet(),
    }


def plan_ruler_rows(
    manifest: dict[str, Any], tasks: Iterable[str], context_lengths: Iterable[int], num_samples: int
) -> None:
    """Enter the rows that are going to be written; what is planned already only grows."""
    counts = dict.fromkeys(tasks, num_samples)
    suite = manifest["suite"]
    order = list(definitions(GRID) if suite == GRID_SUITE else definitions())
    for length in context_lengths:
        plan_rows(manifest, length, counts, order)
    synthetic = any(source["synthetic"] for source in manifest["sources"].values())
    manifest["synthetic"] = synthetic
    manifest["comparable_with_published"] = not synthetic and suite == SUITES[NVIDIA]
    notes = [SHADOWKV_NOTE] if suite == SHADOWKV_SUITE else []
    notes += [SYNTHETIC_NOTE] if synthetic else []
    if manifest.get("not_byte_equal"):
        notes.append(describe(manifest["not_byte_equal"]))
    manifest["note"] = " ".join(notes)
