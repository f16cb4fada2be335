"""What a person sees while work runs: notices and progress on stderr, results on stdout."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

SCHEMA_VERSION = 1
PLAIN_INTERVAL_S = 10.0
PIPE_WIDTH = 160
"""Columns of a table that goes into a pipe or file, unless COLUMNS says otherwise."""
HEAD_WIDTH = 20
"""Longer heads of columns are folded."""
MIN_ROOM = 36
"""Columns of the terminal that a long first column leaves to the others."""
GAP = 3
"""Between two columns."""
EDGES = 2
"""Left and right of a table."""


def notice(message: str) -> None:
    """Print one line to stderr, above a live progress bar if there is one."""
    print(message, file=sys.stderr, flush=True)


def print_json(payload: dict[str, Any]) -> None:
    """Print one JSON object with its schema version to stdout."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **payload}, ensure_ascii=False))


def format_duration(seconds: float) -> str:
    """Write seconds as a person would say them: 8 s, 3 min 20 s, 2 h 05 min."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def format_bytes(count: float) -> str:
    """Write a number of bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Progress:
    """Progress of one piece of long work; `advance` is called once per finished unit."""

    def __init__(self, label: str, total: int) -> None:
        self.label = label
        self.total = total
        self.done = self.skipped = 0
        self.detail = ""
        self.started = time.monotonic()

    def skip(self, count: int) -> None:
        """Count units that an earlier run finished; they say nothing about the time left."""
        self.done += count
        self.skipped += count

    def advance(self, count: int = 1, detail: str = "") -> None:
        self.done += count
        self.detail = detail

    @property
    def eta_s(self) -> float | None:
        elapsed, done = time.monotonic() - self.started, self.done - self.skipped
        return elapsed / done * (self.total - self.done) if done else None


class _PlainProgress(Progress):
    """Lines instead of a bar, for logs and pipes: one every few seconds, and the last one."""

    def __init__(self, label: str, total: int) -> None:
        super().__init__(label, total)
        self._last = self.started

    def advance(self, count: int = 1, detail: str = "") -> None:
        super().advance(count, detail)
        now = time.monotonic()
        if self.done >= self.total or now - self._last >= PLAIN_INTERVAL_S:
            self._last = now
            left = (
                ""
                if self.eta_s is None or self.done >= self.total
                else f", {format_duration(self.eta_s)} left"
            )
            tail = f", {detail}" if detail else ""
            notice(f"{self.label}: {self.done}/{self.total}{left}{tail}")


class _RichProgress(Progress):
    """A live bar on a terminal."""

    def __init__(self, label: str, total: int, bar: Any) -> None:
        super().__init__(label, total)
        self._bar = bar
        self._task = bar.add_task(label, total=total, detail="")

    def skip(self, count: int) -> None:
        super().skip(count)
        self._bar.update(self._task, completed=self.done)

    def advance(self, count: int = 1, detail: str = "") -> None:
        super().advance(count, detail)
        self._bar.update(self._task, completed=self.done, detail=detail)


@contextmanager
def progress(label: str, total: int) -> Iterator[Progress]:
    """Show the progress of `total` units of work; a bar on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield _PlainProgress(label, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _RichProgress(label, total, bar)


def fold_name(text: str, width: int) -> str:
    """Break a long name into lines, behind the commas and colons of its settings where it can."""
    lines = [""]
    for part in re.findall(r"[^,: ]+[,: ]*|[,: ]+", text):
        while len(part.rstrip()) > width:
            lines += [part[:width], ""]
            part = part[width:]
        if len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines if line.strip())


def column_blocks(widths: list[int], room: int) -> list[list[int]]:
    """Split columns into tables that fit beside each other's first column; indices of each."""
    blocks: list[list[int]] = []
    left = 0
    for i, width in enumerate(widths[1:], start=1):
        if not blocks or width + GAP > left:
            blocks.append([0])
            left = room - widths[0]
        blocks[-1].append(i)
        left -= width + GAP
    return blocks or [[0]]


@dataclass(frozen=True)
class _Layout:
    """A table that was folded and split for a width: heads, cells, and the columns of each part."""

    heads: list[str]
    cells: list[list[str]]
    blocks: list[list[int]]

    @classmethod
    def of(cls, columns: list[str], rows: list[list[str]], room: int, first: int) -> _Layout:
        """`first` is the most that the first column takes, where others stand beside it."""
        first = max(12, first) if len(columns) > 1 else room
        heads = [fold_name(name, HEAD_WIDTH if i else first) for i, name in enumerate(columns)]
        cells = [[fold_name(row[0], first), *row[1:]] for row in rows]
        widths = [
            max(len(line) for row in [heads, *cells] for line in row[i].split("\n"))
            for i in range(len(columns))
        ]
        return cls(heads, cells, column_blocks(widths, room))

    @property
    def num_lines(self) -> int:
        return len(self.blocks) * (4 + sum(row[0].count("\n") + 1 for row in self.cells))


def print_table(
    title: str, columns: list[str], rows: list[list[str]], notes: list[str] | None = None
) -> None:
    """Print a table to stdout, the first column left and the others right, then its notes.

    Columns that do not fit beside each other follow below, each block with the first column again.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit() else PIPE_WIDTH
    console = Console(file=sys.stdout, width=width, highlight=False)
    plain, folded = (
        _Layout.of(columns, rows, console.width - EDGES, first)
        for first in (console.width - EDGES - MIN_ROOM, HEAD_WIDTH)
    )
    layout = folded if folded.num_lines < plain.num_lines else plain
    console.print(Text(title, style="italic"))
    for block in layout.blocks:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for i in block:
            numbers = any(re.match(r"[-+]?\d|-$", row[i]) for row in rows)
            justify: Literal["left", "right"] = "right" if i and numbers else "left"
            table.add_column(Text(layout.heads[i]), justify=justify, overflow="fold")
        for row in layout.cells:
            table.add_row(*(Text(row[i]) for i in block))
        console.print(table)
    for note in notes or []:
        console.print(note, markup=False)
