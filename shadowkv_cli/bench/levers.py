"""What each lever of decoding gives: a run's cells beside its first one, from its rows alone.

    python -m shadowkv_cli.bench.levers results/gpu-levers

The first cell of ShadowKV that was measured is the base. Every other one stands with what it has
other than that: micro-batches, lanes, the graph, settings. Prints Markdown, one column for each
rate that hits were driven to; `--readme FILE` puts it between `<!-- levers -->` and
`<!-- /levers -->` of a file. Every cell is driven to the same rate, so a larger buffer shows here
what it costs; what it gains is hits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from shadowkv_cli.bench.markdown import markdown_table, replace_section
from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.results import read_run
from shadowkv_cli.rowlog import Row

SECTION = "levers"


@dataclass(frozen=True)
class _Setup:
    """What a measurement was made with, its hit rate left out."""

    settings: tuple[tuple[str, Any], ...]
    micro_batches: int
    lanes: int
    captured: bool
    batch_size: int
    context_length: int

    @classmethod
    def of(cls, row: Row) -> _Setup:
        settings = tuple(sorted(row["settings"].items()))
        place = (row["batch_size"], row["context_length"])
        parts = (row.get("micro_batches", 1), row["lanes"])  # earlier runs had one
        return cls(settings, *parts, row["captured"], *place)

    def beside(self, base: _Setup) -> str:
        """What is other than in the base, in words."""
        ours, theirs = dict(self.settings), dict(base.settings)
        words = [f"{name} {value}" for name, value in ours.items() if theirs.get(name) != value]
        if (self.micro_batches, self.lanes) != (base.micro_batches, base.lanes):
            words.append(self.parts)
        if self.captured != base.captured:
            words.append("one CUDA graph" if self.captured else "no CUDA graph")
        if self.batch_size != base.batch_size:
            words.append(f"batch {self.batch_size}")
        if self.context_length != base.context_length:
            words.append(f"{self.context_length:,} tokens")
        return ", ".join(words)

    @property
    def parts(self) -> str:
        """Micro-batches, where there are several, and lanes."""
        lanes = f"{self.lanes} lane{'s' if self.lanes > 1 else ''}"
        return f"{self.micro_batches} micro-batches of {lanes}" if self.micro_batches > 1 else lanes

    def in_words(self) -> str:
        """The base: what another cell may differ in most."""
        own = dict(self.settings)
        return (
            f"base: value_buffer {own['value_buffer']}, key_buffer {own['key_buffer']}, "
            f"{self.parts}, "
            f"{'one CUDA graph' if self.captured else 'no CUDA graph'}, batch {self.batch_size}, "
            f"{self.context_length:,} tokens"
        )


def lever_table(rows: Sequence[Row]) -> str:
    """The table of a run's rows. Raises UsageError where none is of ShadowKV and succeeded."""
    good = [row for row in rows if row["error"] is None and row["method"] == "shadowkv"]
    if not good:
        raise UsageError("The run has no measurement of shadowkv that succeeded.")
    base = _Setup.of(good[0])
    setups = list(dict.fromkeys(map(_Setup.of, good)))
    rates = sorted({row["driven_hit_rate"] for row in good}, key=lambda rate: rate or 0.0)

    def speeds(setup: _Setup, rate: float | None) -> list[float]:
        of_rate = (row for row in good if row["driven_hit_rate"] == rate)
        return [row["tokens_per_s"] for row in of_rate if _Setup.of(row) == setup]

    def cell(setup: _Setup, rate: float | None) -> str:
        own, first = speeds(setup, rate), speeds(base, rate)
        if not own:
            return "not measured"
        text = f"{median(own):,.0f} [{min(own):,.0f}, {max(own):,.0f}]"
        return text if setup == base or not first else f"{text}, {median(own) / median(first):.2f}x"

    heads = ["hits as they come" if rate is None else f"hits {rate:.0%}" for rate in rates]
    table = [
        [setup.in_words() if setup == base else setup.beside(base)]
        + [cell(setup, rate) for rate in rates]
        for setup in setups
    ]
    return markdown_table(["lever", *(f"tokens/s, {head}" for head in heads)], table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("run", type=Path, help="folder of a decode benchmark")
    parser.add_argument("--readme", type=Path, help="put the table into this file, too")
    given = parser.parse_args()
    try:
        table = lever_table(read_run(given.run).throughput)
        if given.readme:
            replace_section(given.readme, SECTION, table)
    except ShadowKVError as error:
        parser.exit(error.exit_code, f"{parser.prog}: error: {error}\n")
    print(table)


if __name__ == "__main__":
    main()
