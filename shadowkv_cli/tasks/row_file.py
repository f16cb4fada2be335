"""One JSONL file of samples that grows row by row and survives being killed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shadowkv_cli.console import notice
from shadowkv_cli.errors import ShadowKVError
from shadowkv_cli.rowlog import write_failure
from shadowkv_cli.tasks.rows import Sample


def continue_rows(path: Path, task: str, context_length: int) -> list[int]:
    """Read what a file holds already: the `length` of each row, in order.

    A last line that was cut off is removed with a notice. Raises ShadowKVError, naming file and
    line, for a row that cannot be read or is not the one that belongs there.
    """
    lengths: list[int] = []
    if not path.exists():
        return lengths
    kept = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                sample = Sample.from_json(line.decode("utf-8"))
            except (ValueError, TypeError) as error:
                raise _broken(path, number, str(error)) from None
            place = (sample.task, sample.context_length, sample.index)
            if place != (task, context_length, number - 1):
                raise _broken(path, number, f"found sample {sample.id}")
            lengths.append(sample.length)
            kept += len(line)
    if kept < path.stat().st_size:
        os.truncate(path, kept)
        notice(f"{path}: removed a row that was cut off at the end; it is made again.")
    return lengths


def _broken(path: Path, number: int, reason: str) -> ShadowKVError:
    return ShadowKVError(
        f"{path} line {number} is not the row that belongs there ({reason}): "
        "delete the file and run the same command again."
    )


class RowWriter:
    """Appends samples to a file, each in one write that is undone if it fails half way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, sample: Sample) -> None:
        """Write one row. Raises ShadowKVError if the disk is full or not writable."""
        left = memoryview((sample.to_json() + "\n").encode("utf-8"))
        before = os.fstat(self._descriptor).st_size
        written = False
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
            written = True
        except OSError as error:
            raise write_failure(self.path, error) from error
        finally:
            if not written:
                os.ftruncate(self._descriptor, before)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from writing rows into a folder; leaves no file behind.

    Raises ShadowKVError where one is writing already.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ShadowKVError(
            f"Another shadowkv process is writing to '{folder}': wait for it, or choose another "
            "--output."
        ) from None
    finally:
        os.close(descriptor)
