"""Run folders: resume, refusal, repair after a kill, full disks and locks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from shadowkv_cli import rowlog
from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.results import (
    RunFolder,
    clear,
    describe_contents,
    describe_difference,
    done_cells,
    identity_hash,
    merge_scope,
    read_run,
)
from shadowkv_cli.rowlog import append_group, read_rows, repair, write_atomic

IDENTITY = {"model": {"name": "demo", "dtype": "float32"}, "seed": 42, "methods": ["full"]}


def open_run(path, **changes):
    options = {
        "kind": "eval",
        "identity": IDENTITY,
        "scope": {"tasks": ["a"], "num_samples": 4},
        "environment": {"torch": "2"},
        "command": ["shadowkv", "eval"],
    }
    return RunFolder.open(path, **(options | changes))


def group(sample, size, number=0):
    return [
        {"id": sample, "cell": f"c{i}", "pass": number, "prediction": "naïve\n…", "error": None}
        for i in range(size)
    ]


def test_new_run_writes_a_whole_manifest(tmp_path):
    with open_run(tmp_path / "a" / "b", notes=["synthetic"], flags={"synthetic": True}) as run:
        manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["identity"] == IDENTITY
    assert manifest["identity_sha256"] == identity_hash(IDENTITY)
    assert manifest["notes"] == ["synthetic"]
    assert manifest["created"] == manifest["updated"]
    assert sorted(f.name for f in run.path.iterdir()) == [".lock", "manifest.json"]


def test_rows_survive_reopening(tmp_path):
    with open_run(tmp_path) as run:
        run.append("predictions", group("s1", 3))
    with open_run(tmp_path) as run:
        run.append("predictions", group("s2", 2))
        assert list(run.read("predictions")) == group("s1", 3) + group("s2", 2)
        assert list(run.read("throughput")) == []
    read = read_run(tmp_path)
    assert read.predictions == group("s1", 3) + group("s2", 2)
    assert read.name == tmp_path.name


def test_another_identity_is_refused_in_one_line(tmp_path):
    with open_run(tmp_path) as run:
        run.append("predictions", group("s1", 3))
    other = {
        "model": {"name": "demo", "dtype": "bfloat16"},
        "seed": 42,
        "methods": ["full"],
        "x": 1,
    }
    with pytest.raises(UsageError) as caught:
        open_run(tmp_path, identity=other)
    message = str(caught.value)
    assert 'model.dtype: "float32" -> "bfloat16", x: null -> 1' in message, message
    for part in ("--fresh", "--output", "3 rows"):
        assert part in message, message
    for part in ("seed", "\n"):
        assert part not in message, message
    with pytest.raises(UsageError, match='kind: "eval" -> "sweep"'):
        open_run(tmp_path, kind="sweep")
    with open_run(tmp_path) as run:  # the refusal let the lock go and changed nothing
        assert run.manifest["identity"] == IDENTITY


def test_identity_ignores_order_and_tuples(tmp_path):
    open_run(tmp_path).close()
    open_run(tmp_path, identity=dict(reversed({**IDENTITY, "methods": ("full",)}.items()))).close()
    assert describe_difference({"a": {"b": 1}}, {"a": {"b": 1}}) == ""


def test_scope_notes_and_flags_grow(tmp_path):
    open_run(tmp_path, notes=["n1"], flags={"synthetic": True}).close()
    with open_run(
        tmp_path,
        scope={"tasks": ["b", "a"], "num_samples": 2, "cells": ["x"]},
        notes=["n2", "n1"],
        flags={"synthetic": False, "toy_model": True},
        environment={"torch": "3"},
    ) as run:
        manifest = run.manifest
    assert manifest["scope"] == {"tasks": ["a", "b"], "num_samples": 4, "cells": ["x"]}
    assert manifest["notes"] == ["n1", "n2"]
    assert manifest["flags"] == {"synthetic": True, "toy_model": True}
    assert manifest["environment"] == {"torch": "3"}
    assert [s["environment"] for s in manifest["earlier_sessions"]] == [{"torch": "2"}]


def test_merge_scope_of_everything():
    assert merge_scope({"n": 4}, {"n": None}) == {"n": None}
    assert merge_scope(["a"], ["a"]) == ["a"]


@pytest.mark.parametrize("size", [1, 3])
def test_a_kill_at_any_byte_leaves_whole_groups(tmp_path, size, capsys):
    file = tmp_path / "predictions.jsonl"
    append_group(file, group("s1", 2))
    first = file.stat().st_size
    append_group(file, group("s2", size))
    whole = file.read_bytes()
    for length in range(first, len(whole) + 1):
        file.write_bytes(whole[:length])
        expected = group("s1", 2) + (group("s2", size) if length == len(whole) else [])
        assert list(read_rows(file)) == expected, f"read, cut at {length}"
        assert file.stat().st_size == length, "reading must not write"
        repair(file)
        assert file.read_bytes() == whole[: len(whole) if length == len(whole) else first], length
        notice = capsys.readouterr().err
        assert bool(notice) == (first < length < len(whole)), (length, notice)
        append_group(file, group("s3", 1))
        assert list(read_rows(file)) == expected + group("s3", 1), f"append after {length}"


def test_open_repairs_with_a_notice(tmp_path, capsys):
    with open_run(tmp_path) as run:
        run.append("predictions", group("s1", 2))
        run.append("predictions", group("s2", 2))
    file = tmp_path / "predictions.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    with open_run(tmp_path) as run:
        assert list(run.read("predictions")) == group("s1", 2)
    assert "removed 2 row(s) of an interrupted write" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["{oops}", "[1]", ""])
def test_a_broken_line_elsewhere_names_file_and_line(tmp_path, broken):
    with open_run(tmp_path) as run:
        run.append("predictions", group("s1", 1))
    file = tmp_path / "predictions.jsonl"
    file.write_text(file.read_text() + broken + "\n" + file.read_text())
    for attempt in (lambda: open_run(tmp_path), lambda: read_run(tmp_path)):
        with pytest.raises(ShadowKVError, match=r"predictions\.jsonl:2: ") as caught:
            attempt()
        assert caught.value.exit_code == 1


def test_rows_of_other_tools_need_no_part(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": "a"}\n{"id": "b"}')
    assert [r["id"] for r in read_rows(file)] == ["a"]
    assert [r["id"] for r in read_rows(file, whole_groups=False)] == ["a", "b"]


def test_odd_text_survives(tmp_path):
    row = {"id": "s", "prediction": '\ud800 \u2028 \x00 " \\ 名'}
    append_group(tmp_path / "p.jsonl", [row])
    assert list(read_rows(tmp_path / "p.jsonl")) == [row]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    run = open_run(tmp_path)
    run.append("predictions", group("s1", 2))
    before = (tmp_path / "predictions.jsonl").read_bytes()
    real, calls = os.write, []

    def short_then_full(descriptor, data):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[:100])

    monkeypatch.setattr(rowlog.os, "write", short_then_full)
    with pytest.raises(ShadowKVError, match=r"Disk full.*nothing already written is lost"):
        run.append("predictions", group("s2", 2))
    monkeypatch.undo()
    assert len(calls) == 2
    assert (tmp_path / "predictions.jsonl").read_bytes() == before
    run.append("predictions", group("s2", 2))
    assert list(run.read("predictions")) == group("s1", 2) + group("s2", 2)
    run.close()


def test_a_real_size_limit_loses_nothing(tmp_path):
    code = """
import resource, sys
from pathlib import Path
from shadowkv_cli.rowlog import append_group
from shadowkv_cli.errors import ShadowKVError
file = Path(sys.argv[1])
append_group(file, [{"id": "a"}])
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    append_group(file, [{"id": "b" * 100}, {"id": "c" * 100}])
except ShadowKVError as error:
    print(error)
"""
    file = tmp_path / "p.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    assert "Disk full" in done.stdout, done
    assert list(read_rows(file)) == [{"id": "a"}]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(rowlog.os, "write", lambda fd, data: real(fd, data[:7]))
    append_group(tmp_path / "p.jsonl", group("s1", 3))
    assert list(read_rows(tmp_path / "p.jsonl")) == group("s1", 3)


def test_an_interrupt_in_a_write_is_undone(tmp_path, monkeypatch):
    file = tmp_path / "p.jsonl"
    append_group(file, group("s1", 1))
    before, real = file.read_bytes(), os.write

    def interrupted(descriptor, data):
        real(descriptor, data[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(rowlog.os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        append_group(file, group("s2", 1))
    assert file.read_bytes() == before


def test_two_writers_are_refused(tmp_path):
    with open_run(tmp_path), pytest.raises(ShadowKVError, match="Another shadowkv process"):
        open_run(tmp_path)
    open_run(tmp_path).close()


def test_reading_needs_no_lock(tmp_path):
    with open_run(tmp_path) as run:
        run.append("predictions", group("s1", 1))
        assert len(read_run(tmp_path).predictions) == 1


def test_fresh_says_what_goes_and_keeps_foreign_files(tmp_path, capsys):
    with open_run(tmp_path) as run:
        run.append("predictions", group("s1", 3))
    (tmp_path / "plots").mkdir()
    for name in ("summary.csv", "plots/frontier.png", "plots/mine.txt", "notes.txt"):
        (tmp_path / name).write_text("x")
    with open_run(tmp_path, identity={"other": 1}, fresh=True) as run:
        assert list(run.read("predictions")) == []
        assert run.manifest["identity"] == {"other": 1}
    notice = capsys.readouterr().err
    assert "--fresh: deleting 3 rows of predictions in 4 files" in notice, notice
    left = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file())
    assert left == [".lock", "manifest.json", "notes.txt", "plots/mine.txt"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, fresh):
    (tmp_path / "summary.csv").write_text("mine")
    with pytest.raises(UsageError, match="is no run"):
        open_run(tmp_path, fresh=fresh)
    assert [f.name for f in tmp_path.iterdir()] == ["summary.csv"]


def test_describe_and_clear_nothing(tmp_path):
    assert describe_contents(tmp_path) is None
    clear(tmp_path)


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"Cannot write to .*choose another --output"):
        open_run(tmp_path / "file" / "run")


def test_read_run_errors(tmp_path):
    with pytest.raises(UsageError, match="There is no run"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="has no manifest"):
        read_run(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ShadowKVError, match="not valid JSON"):
        read_run(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 99, "identity": {}}')
    with pytest.raises(ShadowKVError, match="schema_version 99"):
        read_run(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        read_run(tmp_path / "manifest.json")


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    file = tmp_path / "m.json"
    write_atomic(file, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rowlog.os, "fsync", full)
    with pytest.raises(ShadowKVError, match="Disk full"):
        write_atomic(file, "new")
    assert [f.name for f in tmp_path.iterdir()] == ["m.json"]
    assert file.read_text() == "old"


def test_done_cells():
    rows = group("s1", 2) + group("s1", 1, number=1) + group("s2", 1)
    rows[1]["error"] = "out of memory"
    assert done_cells(rows) == {"s1": {"c0", "c1"}, "s2": {"c0"}}
    assert done_cells(rows, include_failed=False) == {"s1": {"c0"}, "s2": {"c0"}}


@pytest.mark.parametrize(
    ("log", "name", "value"),
    [
        ("predictions", "score", "high"),
        ("predictions", "hit_rate", [0.5]),
        ("throughput", "tokens_per_s", "high"),
        ("throughput", "step_ms_p50", {"p50": 1}),
    ],
)
def test_a_field_that_is_no_number_is_refused(tmp_path, log, name, value):
    with open_run(tmp_path) as run:
        run.append(log, [{"id": "s1", name: 0.5}])
        run.append(log, [{"id": "s2", name: None}])
        run.append(log, [{"id": "s3", name: value}])
        for read in (lambda: read_run(tmp_path), lambda: list(run.read(log))):
            with pytest.raises(ShadowKVError) as caught:
                read()
            message = str(caught.value)
            where = f"{tmp_path / log}.jsonl:3: the field '{name}' must be a number or null"
            assert message.startswith(where), message
            assert json.dumps(value) in message
            assert "\n" not in message
