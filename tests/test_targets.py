"""Targets beside what a benchmark measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shadowkv_cli.bench.targets import TARGETS, Run, compare


def row(method: str, speed: float, rule: str = "auto", batch: int = 4, **more) -> dict:
    return {
        "method": method,
        "tokens_per_s": speed,
        "batch_rule": rule,
        "batch_size": batch,
        "driven_hit_rate": None,
        "settings": {},
        "error": None,
        **more,
    }


def driven(speed: float, rate: float, buffer: float, **more) -> dict:
    return row("shadowkv", speed, driven_hit_rate=rate, settings={"value_buffer": buffer}, **more)


def measured(run: Run) -> dict[str, float | None]:
    return {target.name: target.measure(run) for target in TARGETS}


def test_ratios_are_of_medians_of_the_right_rows() -> None:
    phases = {"matrix products": 5.0, "layer ops": 0.5, "other": 0.25, "select": 9.0}
    rows = [row("full", s) for s in (99, 100, 400)]
    rows += [driven(s, 0.88, 4.0, batch=14) for s in (600, 700, 900)]
    rows += [driven(420, 0.59, 4.0, batch=14, phase_ms=phases), driven(999, 0.59, 1.0, batch=14)]
    rows += [row("full", 70, "1", 1), driven(91, 0.88, 4.0, rule="1", batch=1)]
    found = measured(Run(rows, []))
    assert found["exact bf16, LRU buffer of 4 times, hits driven to 88 %"] == 7
    assert found["exact bf16, hits driven to 60 %"] == 4.2
    assert found["batch 1, hits driven to 88 %"] == pytest.approx(1.3)
    assert found["over the official kernels, a sequence, 59 % hits"] == pytest.approx(1.2)
    assert found["dense part of a step, all batches"] == 5.75
    assert found["values fp8, 88 %"] is None


def test_a_limit_is_met_from_below_and_nothing_is_met_unmeasured() -> None:
    limit = next(target for target in TARGETS if target.is_limit)
    assert limit.met(limit.target)
    assert not limit.met(limit.target * 1.01)
    floor = next(target for target in TARGETS if not target.is_limit)
    assert floor.met(floor.target)
    assert not floor.met(floor.target * 0.99)
    assert not any(target.met(None) for target in TARGETS)


def test_a_run_without_a_gpu_meets_no_target(tiny_model_folder: Path, tmp_path: Path) -> None:
    from shadowkv_cli.cli import run

    command = ["bench", "--model", str(tiny_model_folder), "--state", "synthetic", "--rank", "8"]
    command += ["--context-length", "512", "--decode-steps", "4", "--rounds", "1", "--share"]
    command += ["--sparse-budget", "32", "--hit-rate", "0.5", "--output", str(tmp_path / "b")]
    assert run(command) == 0
    ops = [{"op": "select_chunks", "batch_size": b, "ms": ms} for b, ms in ((24, 0.3), (8, 0.4))]
    (tmp_path / "b" / "ops.json").write_text(json.dumps({"results": ops}))
    rows = {r["name"]: r for r in compare(tmp_path / "b")}
    chosen = rows.pop("select_chunks, largest batch measured")
    assert (chosen["measured"], chosen["met"]) == (0.3, True)
    assert not any(r["met"] for r in rows.values())
    assert {r["command"].split()[0] for r in rows.values()} == {"shadowkv"}
