"""Write the rows of a dataset that are missing, piece by piece, continuing what was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shadowkv_cli.console import progress
from shadowkv_cli.errors import ShadowKVError
from shadowkv_cli.tasks.manifest import set_fill, write_manifest
from shadowkv_cli.tasks.row_file import RowWriter, continue_rows, lock_folder
from shadowkv_cli.tasks.rows import Sample


@dataclass(frozen=True)
class Piece:
    """The rows of one task and length: the lengths of those that exist, and how many are wanted."""

    task: str
    context_length: int
    existing: list[int]
    wanted: int

    @property
    def missing(self) -> int:
        return max(self.wanted - len(self.existing), 0)

    @property
    def numbers(self) -> range:
        """Numbers of the rows that are missing."""
        return range(len(self.existing), self.wanted)


def _file(output: Path, task: str, context_length: int) -> Path:
    return output / str(context_length) / f"{task}.jsonl"


def read_pieces(output: Path, wanted: Sequence[tuple[str, int, int]]) -> list[Piece]:
    """Read what a folder holds of each (task, context length, number of rows).

    A last row that was cut off is removed, unless another process is writing to the folder: that
    raises ShadowKVError.
    """
    with lock_folder(output) if output.is_dir() else nullcontext():
        return [
            Piece(task, length, continue_rows(_file(output, task, length), task, length), count)
            for task, length, count in wanted
        ]


def forecast(
    pieces: Sequence[Piece], make: Callable[[Piece], Sample], num_workers: int = 1
) -> list[dict[str, Any]]:
    """What a build would write, one entry per piece, from one sample made of each by `make`."""
    entries = []
    for piece in pieces:
        entry: dict[str, Any] = {
            "context_length": piece.context_length,
            "task": piece.task,
            "existing": len(piece.existing),
            "prompts": piece.missing,
            "tokens": 0,
            "bytes": 0,
            "seconds": 0.0,
        }
        if piece.missing:
            start = time.perf_counter()
            sample = make(piece)
            seconds = time.perf_counter() - start
            entry["tokens"] = piece.missing * sample.prompt_tokens
            entry["bytes"] = piece.missing * (len(sample.to_json().encode()) + 1)
            entry["seconds"] = round(piece.missing * seconds / num_workers, 3)
        entries.append(entry)
    return entries


def write_missing(
    output: Path,
    manifest: dict[str, Any],
    pieces: Sequence[Piece],
    samples: Iterator[Sample],
    order: Sequence[str],
) -> None:
    """Append the missing rows of each piece, in their order, and store the mean fill of each.

    Args:
        samples: exactly the rows that are missing, piece by piece.
        order: of the suite's tasks.

    Raises:
        ShadowKVError: another process writes to the folder, or has since the pieces were read.
    """
    output.mkdir(parents=True, exist_ok=True)
    with lock_folder(output):
        for piece in pieces:
            file = _file(output, piece.task, piece.context_length)
            if len(continue_rows(file, piece.task, piece.context_length)) != len(piece.existing):
                raise ShadowKVError(
                    f"Another shadowkv process wrote to {output} meanwhile: run the same command "
                    "again to continue."
                )
        write_manifest(output, manifest)
        for piece in pieces:
            lengths = list(piece.existing)
            if piece.missing:
                label = f"{piece.task} at {piece.context_length}"
                path = _file(output, piece.task, piece.context_length)
                with progress(label, piece.missing) as bar, RowWriter(path) as writer:
                    for _ in range(piece.missing):
                        sample = next(samples)
                        writer.append(sample)
                        lengths.append(sample.length)
                        bar.advance()
            # A folder with more rows than were asked for keeps them.
            set_fill(manifest, piece.task, piece.context_length, lengths, order)
            write_manifest(output, manifest)
