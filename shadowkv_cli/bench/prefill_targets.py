"""Hold measured prefills against the project's targets.

    python -m shadowkv_cli.bench.prefill_targets results/gpu-prefill

Reads the rows of `bench.prefill_speed`, takes the best time of each figure, and writes
`targets.json` beside them. Of several runs a later one tells what the earlier ones do not: figures
of two runs are never put together. `--readme FILE` puts the table between
`<!-- prefill targets -->` and `<!-- /prefill targets -->` of a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shadowkv_cli.bench.judging import (
    Target,
    check_one_device,
    judge,
    target_table,
    write_and_print,
)
from shadowkv_cli.bench.markdown import replace_section
from shadowkv_cli.errors import ShadowKVError
from shadowkv_cli.results import read_run
from shadowkv_cli.rowlog import Row

SECTION = "prefill targets"
CONTEXT = 122_880
SAMPLE_CONTEXT = 131_072
NUM_SAMPLES = 13 * 96
"""Of the published evaluation: RULER's tasks with 96 samples each."""


@dataclass(frozen=True)
class Measured:
    """Rows that did not fail, looked up by what they measured."""

    rows: Sequence[Row]

    def _of(self, measure: str, variant: str, length: int) -> list[Row]:
        key = (measure, variant, length)
        return [r for r in self.rows if (r["measure"], r["variant"], r["context_length"]) == key]

    def seconds(
        self, measure: str, variant: str = "", length: int = CONTEXT, backend: str | None = None
    ) -> float | None:
        """The best, of one backend or of all."""
        found = [
            r["seconds"]
            for r in self._of(measure, variant, length)
            if backend in (None, r["backend"])
        ]
        return min(found, default=None)

    def best_backend(self, length: int = CONTEXT) -> str | None:
        """Of attention alone."""
        rows = self._of("attention", "", length)
        return min(rows, key=lambda r: r["seconds"])["backend"] if rows else None

    def parts(self, length: int = CONTEXT) -> float | None:
        """Seconds of the best attention alone and the matrix products alone.

        Of all layers but the last, which does next to nothing of both; rows that were measured
        before that was so do not say how many these are.
        """
        attention = self.seconds("attention", length=length)
        products = self.seconds("products", length=length)
        if attention is None or products is None:
            return None
        row = self._of("products", "", length)[0]
        layers = row["whole_layers"] if "whole_layers" in row else row["num_layers"]
        return float(layers * (attention + products))

    def over_parts(self) -> float | None:
        return _ratio(self.seconds("prefill", backend=self.best_backend()), self.parts())

    def compression_share(self) -> float | None:
        """What one configuration adds to a prefill, in percent."""
        best = self.best_backend()
        kept, plain = (
            self.seconds("kept", "beside", backend=best),
            self.seconds("prefill", backend=best),
        )
        added = _ratio(kept, plain)
        return None if added is None else 100 * (added - 1)

    def share_of_a_chunk_size(self) -> float | None:
        """What each further chunk size adds to it, in percent."""
        one, four = (self.seconds("chunk sizes", variant) for variant in ("1", "4"))
        added = _ratio(four, one)
        return None if added is None else 100 * (added - 1) / 3

    def sweep_over_evaluation(self) -> float | None:
        return _ratio(
            self.seconds("sample", "24 cells"), self.seconds("sample", "full and shadowkv")
        )

    def official_seconds(self, length: int) -> float | None:
        """Prefill with SDPA's flash, and an SVD a layer: computed from the measured parts."""
        prefill, svd = (
            self.seconds("prefill", length=length, backend="flash"),
            self._of("svd", "", length),
        )
        if prefill is None or not svd:
            return None
        return float(prefill + svd[0]["num_layers"] * svd[0]["seconds"])

    def published_hours(self, gpus: int) -> float | None:
        """Hours of the published evaluation, computed from one measured sample."""
        sample = self.seconds("sample", "full and shadowkv", SAMPLE_CONTEXT)
        return None if sample is None else NUM_SAMPLES * sample / gpus / 3600


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


TARGETS: Sequence[Target[Measured]] = (
    Target("prefill over the sum of its parts", 1.10, "x", Measured.over_parts, is_limit=True),
    Target("prefill with one configuration, flash-attn-4", 9.3, "s",
           lambda m: m.seconds("kept", "beside", backend="flash-attn-4"), is_limit=True),
    Target("prefill with one configuration, cudnn", 10.3, "s",
           lambda m: m.seconds("kept", "beside", backend="cudnn"), is_limit=True),
    Target("one configuration, of the prefill", 4.0, "%", Measured.compression_share,
           is_limit=True),
    Target("each further chunk size, of the prefill", 1.0, "%", Measured.share_of_a_chunk_size,
           is_limit=True),
    Target("accuracy phase of 24 cells over one evaluation", 1.5, "x",
           Measured.sweep_over_evaluation, is_limit=True),
    Target("sample of 131,072 tokens, full and shadowkv, 128 new tokens each", 14.0, "s",
           lambda m: m.seconds("sample", "full and shadowkv", SAMPLE_CONTEXT), is_limit=True),
    Target("official design's prefill, 122,880 tokens, computed from parts", None, "s",
           lambda m: m.official_seconds(CONTEXT)),
    Target("official design's prefill, 131,072 tokens, computed from parts", None, "s",
           lambda m: m.official_seconds(SAMPLE_CONTEXT)),
    Target("262,144 tokens, shadowkv alone, 16 new tokens", None, "s",
           lambda m: m.seconds("sample", "shadowkv", 262_144)),
    Target("524,288 tokens, shadowkv alone, 16 new tokens", None, "s",
           lambda m: m.seconds("sample", "shadowkv", 524_288)),
    Target("published evaluation, one GPU, computed from a sample", None, "h",
           lambda m: m.published_hours(1)),
    Target("published evaluation, eight GPUs, computed from a sample", None, "h",
           lambda m: m.published_hours(8)),
)  # fmt: skip


def compare(*folders: Path) -> list[dict[str, Any]]:
    """Each target beside what the first run that measured it gave.

    Raises UsageError where there is no run, or runs are of different devices.
    """
    runs = [read_run(folder) for folder in folders]
    check_one_device([run.manifest for run in runs])
    found = []
    for run in runs:
        rows = [row for row in run.prefill if row["error"] is None]
        found.append(judge(TARGETS, Measured(rows), [run.manifest]))
    return [
        next((row for row in by_run if row["measured"] is not None), by_run[0])
        for by_run in zip(*found, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("run", type=Path, nargs="+", help="folders of measured prefills")
    parser.add_argument("--readme", type=Path, help="put the table into this file, too")
    given = parser.parse_args()
    try:
        rows = compare(*given.run)
        if given.readme:
            replace_section(given.readme, SECTION, target_table(rows))
    except ShadowKVError as error:
        parser.exit(error.exit_code, f"{parser.prog}: error: {error}\n")
    write_and_print(rows, given.run[0])


if __name__ == "__main__":
    main()
