"""The manifest of a dataset while it is built: what may grow, and the refusal of other settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shadowkv_cli.errors import UsageError
from shadowkv_cli.rowlog import write_atomic
from shadowkv_cli.tasks.rows import MANIFEST_NAME, Dataset, manifest_identity


def continue_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Take over what the folder holds already.

    Raises UsageError when it holds another suite's data, and one that says what differs when it
    holds data made with other settings.
    """
    if not (folder / MANIFEST_NAME).exists():
        rows = sorted(folder.glob("*/*.jsonl")) if folder.is_dir() else []
        if rows:
            raise UsageError(f"{folder} holds rows but no {MANIFEST_NAME}: use another --output.")
        return manifest
    old = Dataset.open(folder).manifest
    if old.get("suite") != manifest["suite"]:
        raise UsageError(
            f"{folder} holds a dataset of another suite ({old.get('suite')}, not "
            f"{manifest['suite']}): choose another --output."
        )
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


def no_rows_yet() -> dict[str, Any]:
    """The part of a new manifest that says what is there: nothing, and nothing against it."""
    return {
        "synthetic": False,
        "comparable_with_published": True,
        "note": "",
        "tasks": [],
        "context_lengths": [],
        "num_samples": 0,
        "rows": {},
        "fill": {},
    }


def plan_rows(
    manifest: dict[str, Any],
    context_length: int,
    num_samples: Mapping[str, int],
    order: Sequence[str],
) -> None:
    """Enter how many rows of each task are going to be written; what is planned only grows.

    `order` is that of all tasks of the suite.
    """
    rows: dict[str, dict[str, int]] = manifest["rows"]
    planned = rows.setdefault(str(context_length), {})
    for task, count in num_samples.items():
        planned[task] = max(planned.get(task, 0), count)
    manifest["rows"] = {
        length: {task: rows[length][task] for task in order if task in rows[length]}
        for length in sorted(rows, key=int)
    }
    present = {task for planned in rows.values() for task in planned}
    manifest["tasks"] = [task for task in order if task in present]
    manifest["context_lengths"] = sorted(int(length) for length in rows)
    manifest["num_samples"] = max(n for planned in rows.values() for n in planned.values())


def set_fill(
    manifest: dict[str, Any],
    task: str,
    context_length: int,
    lengths: list[int],
    order: Sequence[str],
) -> None:
    """Store the mean fill of a finished file: row lengths over the context length."""
    fill = manifest["fill"].setdefault(str(context_length), {})
    fill[task] = round(sum(lengths) / len(lengths) / context_length, 4)
    manifest["fill"] = {
        length: dict(sorted(manifest["fill"][length].items(), key=lambda e: order.index(e[0])))
        for length in sorted(manifest["fill"], key=int)
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest in one step."""
    text = json.dumps(manifest, ensure_ascii=False, indent=2) + "\n"
    write_atomic(folder / MANIFEST_NAME, text)
