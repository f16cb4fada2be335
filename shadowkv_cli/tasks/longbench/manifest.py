"""The manifest of a LongBench dataset: what determines its rows, and what readers must know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shadowkv_cli.console import SCHEMA_VERSION
from shadowkv_cli.tasks.longbench.suites import LONGBENCH_V2, Suite
from shadowkv_cli.tasks.manifest import no_rows_yet

DIALECT = "THUDM/LongBench 2e00731"
GENERATOR_VERSION = 2
"""2: rows say how much of their middle was cut."""
DEVIATIONS = (
    "chat template: the tokenizer's own, or the one named; LongBench ships none for newer models",
    "samsum: newlines at the very start of an answer are skipped, where LongBench forbids the "
    "first token to be one",
)
V2_DEVIATIONS = (
    "greedy answers instead of temperature 0.1",
    "chat template applied here, not by a server",
)


def new_manifest(
    suite: Suite,
    *,
    tokenizer: dict[str, Any],
    template: dict[str, str],
    max_length: int,
    min_length: int | None,
    sources: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """A manifest of a dataset without rows; lengths in tokens."""
    deviations = V2_DEVIATIONS if suite.name == LONGBENCH_V2 else DEVIATIONS
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": suite.name,
        "dialect": DIALECT,
        "deviations": list(deviations),
        "generator_version": GENERATOR_VERSION,
        **suite.settings,
        "max_length": max_length,
        "min_length": min_length,
        "tokenizer": tokenizer,
        "template": template,
        "sources": dict(sorted(sources.items())),
        **no_rows_yet(),
        "lost_middle": {},
    }


def add_lost_middle(manifest: dict[str, Any], context_length: int, task: str, count: int) -> None:
    """Count further prompts of a task whose middle was cut."""
    counts = manifest["lost_middle"].setdefault(str(context_length), {})
    counts[task] = counts.get(task, 0) + count


def count_lost_middle(file: Path) -> int:
    """How many rows of a file were cut in their middle; 0 for a file that is not there."""
    if not file.is_file():
        return 0
    with file.open(encoding="utf-8", newline="\n") as lines:
        # A text that spells the field has its quotes escaped.
        return sum('"middle_tokens_cut": ' in line for line in lines)


def set_note(manifest: dict[str, Any], suite: Suite) -> None:
    """Say what makes scores on these rows another number than published ones."""
    notes = []
    if manifest["min_length"] is not None:
        notes.append(f"only prompts of at least {manifest['min_length']} tokens")
    fewer = [
        task
        for rows in manifest["rows"].values()
        for task, count in rows.items()
        if count < suite.published_rows(task)
    ]
    if fewer and manifest["min_length"] is None:
        notes.append(f"fewer samples than published in {len(fewer)} of {len(manifest['tasks'])}")
    if suite.settings.get("prompt") == "no-context":
        notes.append("asked without the documents")
    manifest["comparable_with_published"] = not notes
    manifest["note"] = (
        f"Not comparable with published {suite.name}: {'; '.join(notes)}." if notes else ""
    )
