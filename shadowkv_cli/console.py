"""What a person sees while work runs: notices and progress on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SCHEMA_VERSION = 1
PLAIN_INTERVAL_S = 10.0


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


def print_table(
    title: str, columns: list[str], rows: list[list[str]], notes: list[str] | None = None
) -> None:
    """Print one table to stdout, the first column left and the others right, then its notes."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() else 160
    console = Console(file=sys.stdout, width=width, highlight=False)
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(
            name, justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes or []:
        console.print(note, markup=False)
