"""An append-only log of JSON rows in which a group of rows is written whole or not at all.

Every row carries `part: [i, n]`: it is the i-th of the n rows of one append. That is how a reader
tells a whole group from one that was cut between two lines.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from shadowkv_cli.console import notice
from shadowkv_cli.errors import ShadowKVError, UsageError

Row = dict[str, Any]

PART = "part"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_failure(path: Path, error: OSError) -> ShadowKVError:
    """Say in one line why a file could not be written, and that earlier rows are safe."""
    if error.errno in DISK_FULL:
        return ShadowKVError(
            f"Disk full ({error.strerror}) while writing {path}: nothing already written is lost; "
            "free space and run the same command again."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return UsageError(f"Cannot write {path} ({error.strerror}): choose another --output.")
    return ShadowKVError(
        f"Cannot write {path}: {error.strerror}. Nothing already written is lost; "
        "run the same command again once that is solved."
    )


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader or a crash meets the old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_failure(path, error) from error


def append_group(path: Path, rows: Iterable[Row]) -> None:
    """Append the rows as one group and wait until they are on the disk.

    If anything stops the write half way (full disk, Ctrl-C), the file is cut back to its length
    before. Raises ShadowKVError if the file cannot be written.
    """
    group = list(rows)
    lines = [
        json.dumps({**row, PART: [i, len(group)]}, ensure_ascii=False, allow_nan=False) + "\n"
        for i, row in enumerate(group, start=1)
    ]
    # A lone surrogate becomes \udXXX, which is its JSON escape.
    left = memoryview("".join(lines).encode("utf-8", "backslashreplace"))
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        length_before = os.fstat(descriptor).st_size
        written = False
        try:
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
            written = True
        finally:
            if not written:
                os.ftruncate(descriptor, length_before)
            os.close(descriptor)
    except OSError as error:
        raise write_failure(path, error) from error


def parse_row(path: Path, number: int, line: bytes) -> Row:
    """Read one line; raise ShadowKVError naming file and line if it is no JSON object."""
    try:
        row = json.loads(line)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ShadowKVError(
            f"{path}:{number}: broken row ({reason}); delete that line to go on without it."
        ) from None
    if not isinstance(row, dict):
        raise ShadowKVError(
            f"{path}:{number}: not a JSON object; delete that line to go on without it."
        )
    return row


def _check_numbers(path: Path, number: int, row: Row, names: Collection[str]) -> None:
    """Raise ShadowKVError naming file and line if one of the fields is neither number nor null."""
    for name in names:
        if not isinstance(row.get(name), int | float | None):
            raise ShadowKVError(
                f"{path}:{number}: the field '{name}' must be a number or null, not "
                f"{json.dumps(row[name])}; delete that line to go on without it."
            )


def _ends_group(row: Row) -> bool:
    part = row.get(PART)
    return part is None or part[0] == part[1]


def repair(path: Path) -> None:
    """Cut off what an interrupted append left at the end, with a notice.

    Raises ShadowKVError for a broken line anywhere else.
    """
    if not path.exists():
        return
    offset = kept_bytes = kept_rows = number = 0
    with path.open("r+b") as file:
        for number, line in enumerate(file, start=1):
            offset += len(line)
            if line.endswith(b"\n") and _ends_group(parse_row(path, number, line)):
                kept_bytes, kept_rows = offset, number
        if kept_bytes == offset:
            return
        file.truncate(kept_bytes)
        file.flush()
        os.fsync(file.fileno())
    notice(
        f"{path}: removed {number - kept_rows} row(s) of an interrupted write at the end; "
        "what they belong to runs again."
    )


def read_rows(
    path: Path, *, whole_groups: bool = True, numbers: Collection[str] = ()
) -> Iterator[Row]:
    """Yield the rows of a log, without `part`; nothing if the file does not exist.

    A last line without its newline is left out with a notice, and so is a last group that is not
    whole unless `whole_groups` is False (files that were filtered by hand; blank lines are
    skipped there).
    Raises ShadowKVError naming file and line for a broken line anywhere else, and for a row that
    holds neither a number nor null in one of the fields `numbers`.
    """
    if not path.exists():
        return
    group: list[Row] = []
    cut = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not whole_groups and not line.strip():
                continue
            if not line.endswith(b"\n") and whole_groups:
                cut = 1
                break
            row = parse_row(path, number, line)
            _check_numbers(path, number, row, numbers)
            ends, starts = _ends_group(row), row.pop(PART, (1, 1))[0] == 1
            if starts or not whole_groups:
                yield from group
                group = []
            group.append(row)
            if ends:
                yield from group
                group = []
    if not whole_groups:
        yield from group
    elif group or cut:
        notice(f"{path}: left out {len(group) + cut} row(s) of an unfinished write at the end.")
