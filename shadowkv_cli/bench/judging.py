"""Figures that were to be reached, beside what runs measured: as targets.json and as a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from shadowkv_cli.bench.markdown import markdown_table
from shadowkv_cli.console import print_table
from shadowkv_cli.errors import UsageError
from shadowkv_cli.rowlog import write_atomic

FILE = "targets.json"
HEADS = ["target", "wanted", "measured", "unit", ""]
M = TypeVar("M")
Manifest = Mapping[str, Any]
"""Of a run: where and how it was measured."""


@dataclass(frozen=True)
class Target(Generic[M]):
    """A figure to be reached: at least `target`, or at most if `is_limit`.

    `target` may be of what was measured itself; None: the figure is reported alone.
    """

    name: str
    target: float | Callable[[M], float | None] | None
    unit: str
    measure: Callable[[M], float | None]
    is_limit: bool = False

    def wanted(self, measured: M) -> float | None:
        return self.target(measured) if callable(self.target) else self.target

    def met(self, figure: float | None, wanted: float | None) -> bool | None:
        """None where there is nothing to tell."""
        if figure is None or wanted is None:
            return None
        return figure <= wanted if self.is_limit else figure >= wanted


def check_one_device(manifests: Sequence[Manifest]) -> None:
    """Raise UsageError for runs of different devices, whose figures do not belong together."""
    devices = dict.fromkeys(map(_device, manifests))
    if len(devices) > 1:
        raise UsageError(f"The runs were made on different devices: {', '.join(map(str, devices))}")


def judge(
    targets: Sequence[Target[M]],
    measured: M,
    manifests: Sequence[Manifest],
    alone: Sequence[M] = (),
) -> list[dict[str, Any]]:
    """Each target beside what the runs measured.

    Args:
        measured: by all runs together.
        manifests: theirs.
        alone: by each of them. A figure that is to be at least so much is that of the best run, so
            that a ratio never has its sides from two. Where what is wanted depends on the run, the
            most demanding of them counts. Each figure is told with commands and commit of the first
            run that gives it; one that none gives alone has the commands of all, and the first
            one's commit; what nobody measured has none.
    """
    rows = []
    for target in targets:
        figure = target.measure(measured)
        # What is wanted may be of a ratio, whose sides come from one run as well.
        limits = [limit for one in alone if (limit := target.wanted(one)) is not None]
        strictest = min if target.is_limit else max
        wanted = strictest(limits) if limits else target.wanted(measured)
        own = [target.measure(one) for one in alone]
        found = [one for one in own if one is not None]
        if found and not target.is_limit:
            figure = max(found)
        gave = [
            manifest for manifest, one in zip(manifests, own, strict=bool(alone)) if one == figure
        ]
        told = [] if figure is None else gave[:1] or [*manifests]
        git = (told[0]["environment"].get("git") or {}) if told else {}
        commands = dict.fromkeys(" ".join(line) for one in told for line in _commands(one))
        rows.append(
            {
                "name": target.name,
                "target": _rounded(wanted),
                "sense": "at most" if target.is_limit else "at least",
                "measured": _rounded(figure),
                "unit": target.unit,
                "met": target.met(figure, wanted),
                "command": " && ".join(commands) or None,
                "commit": git.get("commit"),
                "device": _device(manifests[0]),
            }
        )
    return rows


def _commands(manifest: Manifest) -> list[list[str]]:
    """All command lines that a run was measured with, the last one last."""
    earlier = [session["command"] for session in manifest.get("earlier_sessions", [])]
    return [*earlier, manifest["command"]]


def _device(manifest: Manifest) -> str | None:
    name: str | None = (manifest["environment"].get("gpu") or {}).get("name")
    return name


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _as_cells(row: dict[str, Any]) -> list[str]:
    """A row of the table: target, wanted, measured, unit, verdict."""
    wanted = "reported" if row["target"] is None else f"{row['sense']} {row['target']:.4g}"
    measured = "not measured" if row["measured"] is None else _figure(row)
    verdict = {True: "met", False: "not met", None: ""}[row["met"]]
    return [row["name"], wanted, measured, row["unit"], verdict]


def _figure(row: dict[str, Any]) -> str:
    """Three digits, or all where these would look as if a target were met that is not."""
    figure, wanted = row["measured"], row["target"]
    short = f"{figure:.3g}"
    if row["met"] is not False:
        return short
    looks_met = float(short) <= wanted if row["sense"] == "at most" else float(short) >= wanted
    return f"{figure:g}" if looks_met else short


def target_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a targets.json in Markdown."""
    return markdown_table(HEADS, [_as_cells(row) for row in rows])


def write_and_print(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write targets.json into a run's folder and print it as a table."""
    write_atomic(folder / FILE, json.dumps(rows, indent=1) + "\n")
    print_table("Targets", HEADS, [_as_cells(row) for row in rows], [])
