"""A run's folder: what identifies it (manifest.json) and what it measured (append-only logs).

with RunFolder.open(path, kind="eval", identity=..., scope=..., ...) as run:
    done = done_cells(run.read("predictions"))
    run.append("predictions", rows_of_one_pass)
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from shadowkv_cli.console import SCHEMA_VERSION, format_bytes, notice
from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.rowlog import Row, append_group, read_rows, repair, write_atomic

RunKind = Literal["eval", "sweep", "bench"]
LogName = Literal["predictions", "throughput", "prefill"]

MANIFEST, LOCK, SUMMARY, PLOTS = "manifest.json", ".lock", "summary.csv", "plots"
LOGS: tuple[LogName, ...] = ("predictions", "throughput", "prefill")
FIGURE_SUFFIXES = (".png", ".svg", ".csv")
NUMBERS = (
    *("context_length", "prompt_tokens", "generated_tokens", "pass", "score", "num_references"),
    *("sparse_budget_tokens", "outlier_tokens", "attended_tokens", "hit_rate"),
    *("gpu_bytes", "host_bytes", "peak_memory_bytes"),
    *("prefill_peak_bytes", "prefill_allowed_bytes"),
    *("batch_size", "round", "decode_steps", "samples_together"),
    *("tokens_per_s", "step_ms_p50", "step_ms_p99", "predicted_step_ms", "prefill_s", "decode_s"),
)
"""Fields of rows that are calculated with; a row that has one holds a number in it, or null."""


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Sha256 of an identity, independent of the order of its keys."""
    text = json.dumps(identity, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys; lists stay values."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _short(value: Any) -> str:
    """A value as JSON; of a hash only the beginning."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,}", value):
        return f"{value[:8]}…"
    return json.dumps(value, ensure_ascii=False)


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """List the keys in which two identities differ, as `key: old -> new`; empty if none does."""
    before, after = _flatten(dict(old)), _flatten(dict(new))
    return ", ".join(
        f"{key}: {_short(before.get(key))} -> {_short(after.get(key))}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    )


def merge_scope(old: Any, new: Any) -> Any:
    """What two scopes cover together: union of lists, larger of numbers, None is everything."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {
            key: merge_scope(old[key], new[key]) if key in old and key in new else part[key]
            for part in (old, new)
            for key in part
        }
    if old is None or new is None:
        return None
    if isinstance(old, list) and isinstance(new, list):
        return old + [item for item in new if item not in old]
    if isinstance(old, int) and isinstance(new, int):
        return max(old, new)
    return new


def done_cells(rows: Iterable[Row], *, include_failed: bool = True) -> dict[str, set[str]]:
    """Cells that each sample has a row for, by sample id."""
    done: dict[str, set[str]] = {}
    for row in rows:
        if include_failed or row.get("error") is None:
            done.setdefault(row["id"], set()).add(row["cell"])
    return done


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raises UsageError if there is none, ShadowKVError if it cannot be understood."""
    file = path / MANIFEST
    if not path.exists():
        raise UsageError(
            f"There is no run '{path}': give the folder that eval, bench or sweep wrote."
        )
    if not path.is_dir():
        raise UsageError(f"'{path}' is a file: give the run's folder.")
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"'{path}' is no run: it has no {MANIFEST}.") from None
    except ValueError as error:
        raise ShadowKVError(
            f"{file} is not valid JSON ({error}): restore it, or start the run over with --fresh."
        ) from None
    if not isinstance(manifest, dict) or "identity" not in manifest:
        raise UsageError(
            f"{file} is not the manifest of a run: give a folder that eval, bench or sweep wrote, "
            "or a new one."
        )
    if manifest.get("schema_version", 0) > SCHEMA_VERSION:
        raise ShadowKVError(
            f"{file} has schema_version {manifest['schema_version']}; this version reads up to "
            f"{SCHEMA_VERSION}: update shadowkv-cli."
        )
    return manifest


def _own_files(path: Path) -> list[Path]:
    """Files of a run folder that this tool writes, in a fixed order; never anybody else's."""
    names = [MANIFEST, *(f"{log}.jsonl" for log in LOGS), SUMMARY]
    files = [path / name for name in names if (path / name).is_file()]
    figures = (path / PLOTS).glob("*") if (path / PLOTS).is_dir() else ()
    return files + sorted(f for f in figures if f.suffix in FIGURE_SUFFIXES and f.is_file())


def describe_contents(path: Path) -> str | None:
    """What `clear` would delete (files, rows, bytes) in one line; None if there is nothing."""
    files = _own_files(path)
    if not files:
        return None
    parts = []
    for log in LOGS:
        file = path / f"{log}.jsonl"
        if file in files:
            with file.open("rb") as lines:
                parts.append(f"{sum(1 for _ in lines)} rows of {log}")
    size = format_bytes(sum(file.stat().st_size for file in files))
    return f"{', '.join(parts) or 'no rows'} in {len(files)} files ({size}) of {path}"


def clear(path: Path) -> None:
    """Delete what this tool wrote into a run folder; other files stay. The manifest goes last."""
    for file in reversed(_own_files(path)):
        file.unlink()


class RunFolder:
    """A run's folder, held open for writing by one process.

    Attributes:
        path: the folder.
        manifest: the content of manifest.json.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.manifest: dict[str, Any] = {}
        self._lock = lock

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        kind: RunKind,
        identity: Mapping[str, Any],
        scope: Mapping[str, Any],
        environment: Mapping[str, Any],
        command: Sequence[str],
        notes: Sequence[str] = (),
        flags: Mapping[str, bool] | None = None,
        fresh: bool = False,
    ) -> RunFolder:
        """Create the run, or continue it if its identity is the same.

        Args:
            identity: what must be equal for rows to belong together (model, data, settings).
            scope: what may grow (samples, tasks, cells); merged with what the run covered before.
            fresh: say what is in the folder, delete it and start over.

        Raises:
            UsageError: the folder cannot be written, is no run, or holds a run of another identity.
            ShadowKVError: another process writes to it, or its files are damaged.
        """
        _refuse_foreign(path)
        run = cls(path, _take_lock(path))
        with ExitStack() as on_failure:
            on_failure.callback(run.close)
            if fresh:
                run._start_over()
            given: dict[str, Any] = {
                "schema_version": SCHEMA_VERSION,
                "kind": kind,
                "identity": dict(identity),
                "identity_sha256": identity_hash(identity),
                "scope": dict(scope),
                "environment": dict(environment),
                "command": list(command),
                "notes": list(notes),
                "flags": dict(flags or {}),
            }
            run._write_manifest(json.loads(json.dumps(given)))
            for log in LOGS:
                repair(run.log_path(log))
            on_failure.pop_all()
        return run

    def _start_over(self) -> None:
        """Say what is in the folder and delete it."""
        if contents := describe_contents(self.path):
            notice(f"--fresh: deleting {contents}.")
            clear(self.path)

    def _write_manifest(self, given: dict[str, Any]) -> None:
        """Write a new manifest, or join `given` to the one that is there if it may be."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        created = now
        if (self.path / MANIFEST).exists():
            old = _read_manifest(self.path)
            created = old.get("created", now)
            given |= self._join(old, given)
        self.manifest = {**given, "created": created, "updated": now}
        text = json.dumps(self.manifest, indent=2, ensure_ascii=False)
        write_atomic(self.path / MANIFEST, text + "\n")

    def _join(self, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        """What a run that continues changes in its manifest; UsageError if it is another run."""
        before, after = ({"kind": m.get("kind"), **m["identity"]} for m in (old, new))
        if difference := describe_difference(before, after):
            raise UsageError(
                f"'{self.path}' holds another run ({difference}): choose another --output, or "
                f"--fresh to delete {describe_contents(self.path)} and start over."
            )
        sessions = list(old.get("earlier_sessions", []))
        if any(old.get(key) != new[key] for key in ("command", "environment")):
            sessions.append({key: old.get(key) for key in ("updated", "command", "environment")})
        flags = old.get("flags", {})
        return {
            "scope": merge_scope(old.get("scope", {}), new["scope"]),
            "notes": merge_scope(old.get("notes", []), new["notes"]),
            "flags": flags | {k: v or flags.get(k, False) for k, v in new["flags"].items()},
            "earlier_sessions": sessions,
        }

    def record_environment(self, **facts: Any) -> None:
        """Add what was found out while running, such as the attention backend, to the manifest."""
        self.manifest["environment"] |= facts
        text = json.dumps(self.manifest, indent=2, ensure_ascii=False)
        write_atomic(self.path / MANIFEST, text + "\n")

    def log_path(self, log: LogName) -> Path:
        return self.path / f"{log}.jsonl"

    def append(self, log: LogName, rows: Iterable[Row]) -> None:
        """Append rows that belong together: all of them are kept, or none. Then they are on disk.

        Raises ShadowKVError if the disk is full or the file cannot be written.
        """
        append_group(self.log_path(log), rows)

    def read(self, log: LogName) -> Iterator[Row]:
        """Yield the rows of a log; nothing if nothing was appended yet."""
        return read_rows(self.log_path(log), numbers=NUMBERS)

    def close(self) -> None:
        """Let other processes write to the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_foreign(path: Path) -> None:
    """Raise UsageError if the folder holds files although it is no run."""
    if not path.is_dir():
        return
    names = sorted(f.name for f in path.iterdir() if not f.name.startswith("."))
    if MANIFEST not in names and set(names) - {PLOTS}:
        raise UsageError(
            f"'{path}' is not empty and is no run (it has {names[0]} but no {MANIFEST}): choose "
            "another --output."
        )


def check_writable(path: Path) -> None:
    """Refuse a folder that nothing can be written into, before anything slow happens.

    Raises UsageError: it is a file or lies below one, or there is no permission to write.
    """
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UsageError(f"'{existing}' is a file: choose another --output.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"Cannot write to '{existing}': choose another --output.")


def check_place(path: Path) -> None:
    """Refuse a place that no run can be written to, before anything slow happens.

    Raises UsageError as `check_writable` does, and for a folder of somebody else's.
    """
    check_writable(path)
    _refuse_foreign(path)


def _take_lock(path: Path) -> int:
    """Make the folder and lock it; returns the descriptor that holds the lock."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(
            f"Cannot write to '{path}' ({error.strerror}): choose another --output."
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ShadowKVError(
            f"Another shadowkv process is writing to '{path}': wait for it, or choose another "
            "--output."
        ) from None
    return lock


@dataclass(frozen=True)
class Run:
    """A run as it was read: manifest and rows."""

    path: Path
    manifest: dict[str, Any]
    predictions: list[Row]
    throughput: list[Row]
    prefill: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def notes(self) -> list[str]:
        return list(self.manifest.get("notes", []))

    def flag(self, name: str) -> bool:
        """Whether a flag (`synthetic`, `random_weights`, `toy_model`) is set."""
        return bool(self.manifest.get("flags", {}).get(name, False))


def read_run(path: Path) -> Run:
    """Read a run without writing anything, also while another process adds to it.

    Raises:
        UsageError: there is no such folder, or it is no run.
        ShadowKVError: its files are damaged; names file and line.
    """
    manifest = _read_manifest(path)
    logs = (path / f"{log}.jsonl" for log in LOGS)
    return Run(path, manifest, *(list(read_rows(log, numbers=NUMBERS)) for log in logs))
