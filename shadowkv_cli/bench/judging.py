"""Figures that were to be reached, beside what a run measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from shadowkv_cli.console import print_table
from shadowkv_cli.results import Run
from shadowkv_cli.rowlog import write_atomic

FILE = "targets.json"
HEADS = ["target", "wanted", "measured", "unit", ""]
R = TypeVar("R")


@dataclass(frozen=True)
class Target(Generic[R]):
    """A figure to be reached: at least `target`, or at most if `is_limit`.

    Attributes:
        target: None: the figure is reported alone.
        measure: looks the figure up in what was measured; None where it was not.
    """

    name: str
    target: float | None
    unit: str
    measure: Callable[[R], float | None]
    is_limit: bool = False

    def met(self, measured: float | None) -> bool | None:
        """None where there is nothing to tell."""
        if measured is None or self.target is None:
            return None
        return measured <= self.target if self.is_limit else measured >= self.target


def judge(targets: Sequence[Target[R]], measured: R, run: Run) -> list[dict[str, Any]]:
    """Each target beside what was measured; command, commit and device from the run's manifest."""
    environment = run.manifest["environment"]
    gpu, git = environment.get("gpu") or {}, environment.get("git") or {}
    earlier = [session["command"] for session in run.manifest.get("earlier_sessions", [])]
    commands = dict.fromkeys(" ".join(told) for told in [*earlier, run.manifest["command"]])
    rows = []
    for target in targets:
        found = target.measure(measured)
        rows.append(
            {
                "name": target.name,
                "target": target.target,
                "sense": "at most" if target.is_limit else "at least",
                "measured": None if found is None else round(found, 3),
                "unit": target.unit,
                "met": target.met(found),
                "command": " && ".join(commands),
                "commit": git.get("commit"),
                "device": gpu.get("name"),
            }
        )
    return rows


def write_and_print(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write `targets.json` into a run's folder and print it as a table."""
    write_atomic(folder / FILE, json.dumps(rows, indent=1) + "\n")
    print_table("Targets", HEADS, [_as_cells(row) for row in rows], [])


def _as_cells(row: dict[str, Any]) -> list[str]:
    wanted = "reported" if row["target"] is None else f"{row['sense']} {row['target']:.4g}"
    measured = "not measured" if row["measured"] is None else f"{row['measured']:.3g}"
    verdict = {True: "met", False: "not met", None: ""}[row["met"]]
    return [row["name"], wanted, measured, row["unit"], verdict]
