"""The manifest of a RULER dataset: what determines its rows, and what may grow."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shadowkv_cli.console import SCHEMA_VERSION
from shadowkv_cli.errors import UsageError
from shadowkv_cli.rowlog import write_atomic
from shadowkv_cli.tasks.rows import MANIFEST_NAME, Dataset, manifest_identity
from shadowkv_cli.tasks.ruler.definitions import definitions

DIALECT = "nvidia-main c3f5e3b, per-sample fit"
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
SYNTHETIC_NOTE = "Synthetic text: not comparable with published RULER."


def new_manifest(
    *,
    seed: int,
    tokenizer: dict[str, Any],
    template: dict[str, str],
    source_choice: dict[str, str],
    sources: dict[str, dict[str, Any]],
    sentence_splitter: str | None,
    wonderwords: str,
) -> dict[str, Any]:
    """A manifest of a dataset without rows."""
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": "ruler",
        "dialect": DIALECT,
        "deviations": list(DEVIATIONS),
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "tokenizer": tokenizer,
        "template": template,
        "source_choice": source_choice,
        "sentence_splitter": sentence_splitter,
        "wonderwords": wonderwords,
        "sources": dict(sorted(sources.items())),
        "synthetic": False,
        "comparable_with_published": True,
        "note": "",
        "tasks": [],
        "context_lengths": [],
        "num_samples": 0,
        "rows": {},
        "fill": {},
    }


def continue_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Take over what the folder holds already.

    Raises UsageError that says what differs when it holds data made with other settings.
    """
    if not (folder / MANIFEST_NAME).exists():
        rows = sorted(folder.glob("*/*.jsonl")) if folder.is_dir() else []
        if rows:
            raise UsageError(f"{folder} holds rows but no {MANIFEST_NAME}: use another --output.")
        return manifest
    old = Dataset.open(folder).manifest
    differences = _differences(manifest_identity(old), manifest_identity(manifest))
    shared = old.get("sources", {}).keys() & manifest["sources"].keys()
    differences += _differences(
        {name: old["sources"][name]["sha256"] for name in sorted(shared)},
        {name: manifest["sources"][name]["sha256"] for name in sorted(shared)},
    )
    if differences:
        raise UsageError(
            f"{folder} holds data made with other settings ({'; '.join(differences)}): use the "
            "same settings to continue it, or another --output."
        )
    return {**old, "sources": dict(sorted({**old["sources"], **manifest["sources"]}.items()))}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = [*old, *(name for name in new if name not in old)]
    return [
        f"{name.replace('_', ' ')}: {_short(old.get(name))} there, {_short(new.get(name))} here"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def plan_rows(
    manifest: dict[str, Any], tasks: Iterable[str], context_lengths: Iterable[int], num_samples: int
) -> None:
    """Enter the rows that are going to be written; what is planned already only grows."""
    tasks, lengths = list(tasks), list(context_lengths)
    rows: dict[str, dict[str, int]] = manifest["rows"]
    for length in lengths:
        planned = rows.setdefault(str(length), {})
        for task in tasks:
            planned[task] = max(planned.get(task, 0), num_samples)
    order = list(definitions())
    manifest["rows"] = {
        length: {task: rows[length][task] for task in order if task in rows[length]}
        for length in sorted(rows, key=int)
    }
    present = {task for planned in rows.values() for task in planned}
    manifest["tasks"] = [task for task in order if task in present]
    manifest["context_lengths"] = sorted(int(length) for length in rows)
    manifest["num_samples"] = max(n for planned in rows.values() for n in planned.values())
    synthetic = any(source["synthetic"] for source in manifest["sources"].values())
    manifest["synthetic"] = synthetic
    manifest["comparable_with_published"] = not synthetic
    manifest["note"] = SYNTHETIC_NOTE if synthetic else ""


def set_fill(manifest: dict[str, Any], task: str, context_length: int, lengths: list[int]) -> None:
    """Store the mean fill of a finished file: row lengths over the context length."""
    fill = manifest["fill"].setdefault(str(context_length), {})
    fill[task] = round(sum(lengths) / len(lengths) / context_length, 4)
    order = list(definitions())
    manifest["fill"] = {
        length: dict(sorted(manifest["fill"][length].items(), key=lambda e: order.index(e[0])))
        for length in sorted(manifest["fill"], key=int)
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest in one step."""
    text = json.dumps(manifest, ensure_ascii=False, indent=2) + "\n"
    write_atomic(folder / MANIFEST_NAME, text)
