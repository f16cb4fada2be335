"""Targets beside what a benchmark measured, and the table of them in a document."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from shadowkv_cli.bench import targets
from shadowkv_cli.bench.judging import Target, judge, target_table
from shadowkv_cli.bench.markdown import replace_section, section
from shadowkv_cli.bench.targets import TARGETS, Run, compare
from shadowkv_cli.errors import UsageError

ROOT = Path(__file__).parents[1]
CONTEXT = 122_880


def row(method: str, speed: float, rule: str = "auto", batch: int = 4, **more) -> dict:
    return {
        "cell": method,
        "method": method,
        "tokens_per_s": speed,
        "batch_rule": rule,
        "batch_size": batch,
        "context_length": CONTEXT,
        "driven_hit_rate": None,
        "settings": {},
        "error": None,
        **more,
    }


def driven(speed: float, rate: float, buffer: float = 4.0, **more) -> dict:
    names = ("sparse_budget", "landmarks_per_chunk", "value_dtype", "landmark_dtype")
    settings = {"value_buffer": buffer, "sparse_budget": "2048", "landmarks_per_chunk": 1}
    settings |= {name: more.pop(name) for name in names if name in more}
    cell = f"shadowkv:{settings} {rate}"
    return row("shadowkv", speed, driven_hit_rate=rate, settings=settings) | {"cell": cell} | more


def measured(run: Run) -> dict[str, float | None]:
    return {target.name: target.measure(run) for target in TARGETS}


def test_ratios_are_of_medians_of_the_right_rows() -> None:
    phases = {"matrix products": 5.0, "layer ops": 0.5, "other": 0.25, "select": 9.0}
    rows = [row("full", s) for s in (99, 100, 400)]
    rows += [row("eager-sdpa", s) for s in (93, 95, 96)]
    rows += [driven(s, 0.88, batch_size=14) for s in (600, 700, 900)]
    rows += [driven(9999, 0.88, 2.0), driven(9999, 0.88, context_length=61_440)]
    rows += [driven(420, 0.59, batch_size=14, phase_ms=phases), driven(400, 0.59, 1.0)]
    rows += [row("full", 70, "1", 1), driven(91, 0.88, batch_rule="1", batch_size=1)]
    found = measured(Run(rows, []))
    assert found["exact bf16, LRU buffer of 4 times, hits driven to 88 %"] == 7
    assert found["exact bf16, hits driven to 59 %"] == 4.2, "the fastest buffer"
    assert found["batch 1, hits driven to 88 %"] == pytest.approx(1.3)
    assert found["over the official kernels, a sequence, 59 % hits"] == pytest.approx(1.2)
    assert found["eager SDPA flash, full attention's batch"] == 0.95
    assert found["dense part of a step, one micro-batch"] == 5.75
    assert found["values fp8, 88 %"] is None


def test_bytes_and_budgets_tell_cells_apart() -> None:
    fp8, both = {"value_dtype": "fp8"}, {"value_dtype": "fp8", "landmark_dtype": "fp8"}
    halved = {"sparse_budget": "1024", "landmarks_per_chunk": 2}
    rows = [row("full", 100), driven(700, 0.88, value_dtype="model", landmark_dtype="model")]
    rows += [driven(900, 0.88, 2.0, **fp8), driven(1200, 0.88, **both)]
    rows += [driven(1500, 0.88, **both, **halved)]
    found = measured(Run(rows, []))
    assert found["exact bf16, LRU buffer of 4 times, hits driven to 88 %"] == 7
    assert found["values fp8, 88 %"] == 9
    assert found["values and landmarks fp8, 88 %"] == 12
    assert found["two landmarks a chunk, all fp8, budget 1,024, 88 %"] == 15


def test_other_lengths_are_held_against_the_ratio_at_the_context() -> None:
    lengths = [t for t in TARGETS if t.name.endswith("61,440 tokens")]
    rows = [row("full", 100), driven(700, 0.88)]
    rows += [row("full", 200, context_length=61_440), driven(1240, 0.88, context_length=61_440)]
    run = Run(rows, [])
    (target,) = lengths
    assert (target.measure(run), target.wanted(run)) == (6.2, pytest.approx(6.3))
    assert target.met(target.measure(run), target.wanted(run)) is False
    alone = Run(rows[2:], [])
    assert target.wanted(alone) is None
    assert target.met(target.measure(alone), target.wanted(alone)) is None


def test_a_limit_is_met_from_below_and_nothing_is_met_unmeasured() -> None:
    limit = next(target for target in TARGETS if target.is_limit)
    assert limit.met(0.31, 0.31) is True
    assert limit.met(0.32, 0.31) is False
    floor = next(target for target in TARGETS if not target.is_limit)
    assert floor.met(4, 4) is True
    assert floor.met(3.9, 4) is False
    assert {target.met(None, 1.0) for target in TARGETS} == {None}
    assert floor.met(5, None) is None, "a figure that is reported alone"


@pytest.fixture
def small_run(tiny_model_folder: Path, tmp_path: Path) -> Path:
    from shadowkv_cli.cli import run

    command = ["bench", "--model", str(tiny_model_folder), "--state", "synthetic", "--rank", "8"]
    command += ["--context-length", "512", "--decode-steps", "4", "--rounds", "1", "--share"]
    command += ["--sparse-budget", "32", "--hit-rate", "0.5", "--output", str(tmp_path / "b")]
    assert run(command) == 0
    return tmp_path / "b"


@pytest.mark.parametrize(
    ("measured", "wanted", "sense", "shown"),
    [
        (6.4997, 6.5, "at least", "6.4997"),
        (6.42, 6.5, "at least", "6.42"),
        (6.5003, 6.5, "at least", "6.5"),
        (0.3104, 0.31, "at most", "0.3104"),
        (0.3096, 0.31, "at most", "0.31"),
    ],
)
def test_no_figure_looks_as_if_it_met_what_it_misses(measured, wanted, sense, shown) -> None:
    met = measured >= wanted if sense == "at least" else measured <= wanted
    row = {"name": "a", "target": wanted, "sense": sense, "measured": measured, "unit": "x"}
    assert f"| {shown} | x | {'met' if met else 'not met'} |" in target_table([row | {"met": met}])


def test_a_run_without_a_gpu_meets_no_target(small_run: Path) -> None:
    ops = [{"op": "select_chunks", "batch_size": b, "ms": ms} for b, ms in ((24, 0.3), (8, 0.4))]
    own = {"device": None, "git": {"commit": "other"}, "command": ["op_speed", "--json"]}
    (small_run / "ops.json").write_text(json.dumps({"results": ops, **own}))
    rows = {r["name"]: r for r in compare([small_run])}
    chosen = rows.pop("select_chunks, batch 24")
    assert (chosen["measured"], chosen["met"]) == (0.3, True)
    assert (chosen["commit"], chosen["command"]) == ("other", "op_speed --json"), "not the run's"
    assert {r["met"] for r in rows.values()} == {None}
    unmeasured = [r for r in rows.values() if r["measured"] is None]
    assert unmeasured
    assert {(r["command"], r["commit"]) for r in unmeasured} == {(None, None)}


def test_the_command_writes_targets_and_the_table(
    small_run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- targets -->\nold\n<!-- /targets -->\nafter\n")
    given = [str(small_run), str(small_run), "--readme", str(page)]
    monkeypatch.setattr(sys, "argv", ["targets", *given])
    targets.main()
    assert "not measured" in capsys.readouterr().out
    rows = json.loads((small_run / "targets.json").read_text())
    assert len(rows) == len(TARGETS)
    assert page.read_text() == (
        f"before\n<!-- targets -->\n{target_table(rows)}\n<!-- /targets -->\nafter\n"
    )
    assert "| values fp8, 88 % | at least 8.5 | not measured | x full |  |" in page.read_text()


def test_a_figure_is_told_with_the_run_that_gave_it() -> None:
    manifests = [
        {
            "environment": {"git": {"commit": name}, "gpu": {"name": "H100"}},
            "command": ["measure", name],
        }
        for name in ("first", "second")
    ]
    manifests[1]["earlier_sessions"] = [{"command": ["begin", "second"]}]
    alone = [{"a": 1.0, "b": 2.0}, {"b": 3.0, "c": 4.0}]
    together = {"a": 1.0, "b": 3.0, "c": 4.0, "both": 5.0}
    wanted = [
        Target(name, None, "", lambda found, name=name: found.get(name))
        for name in (*together, "none")
    ]
    rows = {row["name"]: row for row in judge(wanted, together, manifests, alone)}
    told = {name: (row["commit"], row["command"]) for name, row in rows.items()}
    of_first, of_second = ("first", "measure first"), ("second", "begin second && measure second")
    of_all = ("first", "measure first && begin second && measure second")
    assert told == {
        "a": of_first, "b": of_second, "c": of_second, "both": of_all,
        "none": (None, None),
    }  # fmt: skip


@pytest.mark.parametrize(("is_limit", "wanted", "met"), [(False, 5.0, False), (True, 4.0, False)])
def test_of_what_runs_ask_the_most_counts(is_limit: bool, wanted: float, met: bool) -> None:
    manifests = [{"environment": {}, "command": [name]} for name in ("first", "second")]
    alone = [{"a": 4.5, "asked": 4.0}, {"a": 4.5, "asked": 5.0}]
    target = Target("a", lambda one: one["asked"], "", lambda one: one["a"], is_limit=is_limit)
    [row] = judge([target], alone[0], manifests, alone)
    assert (row["target"], row["met"]) == (wanted, met)


def test_a_ratio_has_both_sides_from_one_run_and_limits_are_of_all() -> None:
    manifests = [
        {"environment": {"git": {"commit": name}, "gpu": {"name": "H100"}}, "command": [name]}
        for name in ("first", "second")
    ]
    busy, calm = ({"phase_ms": {"matrix products": ms}} for ms in (7.0, 5.0))
    first = [row("full", 100), driven(405, 0.59, **busy)]
    second = [row("full", 90), driven(380, 0.59, **calm)]
    alone = [Run(first, []), Run(second, [])]
    found = {r["name"]: r for r in judge(TARGETS, Run([*first, *second], []), manifests, alone)}
    ratio = found["exact bf16, hits driven to 59 %"]
    assert (ratio["measured"], ratio["commit"]) == (pytest.approx(380 / 90, abs=1e-3), "second")
    dense = found["dense part of a step, one micro-batch"]
    assert (dense["measured"], dense["commit"], dense["met"]) == (7.0, "first", False)


def test_what_is_wanted_of_a_ratio_is_of_the_best_run_too() -> None:
    manifests = [
        {"environment": {"git": {"commit": name}, "gpu": {"name": "H100"}}, "command": [name]}
        for name in ("first", "second")
    ]
    first = [row("full", 100), driven(700, 0.88)]
    second = [row("full", 100), driven(600, 0.88)]
    alone = [Run(first, []), Run(second, [])]
    found = {r["name"]: r for r in judge(TARGETS, Run([*first, *second], []), manifests, alone)}
    other = found["exact bf16, 88 %, 245,760 tokens"]
    assert other["target"] == pytest.approx(0.9 * 7), "not of the median of both"
    assert other["met"] is None


def test_the_phases_of_micro_batches_are_no_dense_part() -> None:
    """They run beside the other's fetches, which makes them long."""
    rows = [driven(400, 0.88, phase_ms={"matrix products": 6.0})]
    rows.append(driven(500, 0.59, phase_ms={"matrix products": 40.0}, micro_batches=2))
    assert measured(Run(rows, []))["dense part of a step, one micro-batch"] == 6.0


def test_runs_of_other_devices_are_not_mixed(small_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    manifest = json.loads((small_run / "manifest.json").read_text())
    manifest["environment"]["gpu"] = {"name": "H200"}
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="different devices: None, H200"):
        compare([small_run, other])
    speeds = {"device": "H200", "git": None, "command": ["op_speed"], "results": []}
    (small_run / "ops.json").write_text(json.dumps(speeds))
    with pytest.raises(UsageError, match="different devices: None, H200"):
        compare([small_run])
    for text in (json.dumps(speeds)[:-9], json.dumps({"results": []}), "[]"):
        (small_run / "ops.json").write_text(text)
        with pytest.raises(
            UsageError, match=r"ops.json is cut off, or no output of bench.op_speed"
        ):
            compare([small_run])


def test_a_document_without_a_place_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    with pytest.raises(UsageError, match="Cannot read"):
        replace_section(page, "targets", "x")
    for text in ("nothing", "<!-- targets -->\n", 2 * "<!-- targets -->\n<!-- /targets -->\n"):
        page.write_text(text)
        with pytest.raises(UsageError, match="no place for it"):
            replace_section(page, "targets", "x")
        assert page.read_text() == text
    assert section("nothing", "targets") == ""


@pytest.mark.parametrize(
    ("run", "name", "page"),
    [
        ("h100-decode", "targets", "README.md"),
        ("h100-prefill", "prefill targets", "docs/prefill.md"),
    ],
)
def test_a_page_has_the_table_of_the_committed_run(run: str, name: str, page: str) -> None:
    rows = json.loads((ROOT / "results" / run / "targets.json").read_text(encoding="utf-8"))
    assert section((ROOT / page).read_text(encoding="utf-8"), name) == target_table(rows)


@pytest.mark.parametrize("run", ["h100-decode", "h100-prefill"])
def test_a_committed_figure_comes_from_a_committed_run(run: str) -> None:
    """Its command writes to a folder of results/ whose manifest names the same commit, or it is the
    one that the speeds of the ops were written by."""
    file = ROOT / "results" / run / "ops.json"
    ops = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for row in json.loads((ROOT / "results" / run / "targets.json").read_text(encoding="utf-8")):
        if row["measured"] is None:
            assert (row["command"], row["commit"]) == (None, None), row["name"]
            continue
        if row["command"] == " ".join(ops.get("command", [])):
            assert row["commit"] == ops["git"]["commit"], row["name"]
            continue
        folders = re.findall(r"--output (results/\S+)", row["command"])
        manifests = [json.loads((ROOT / f / "manifest.json").read_text()) for f in folders]
        assert manifests[0]["environment"]["git"]["commit"] == row["commit"], row["name"]


@pytest.mark.parametrize("module", ["targets", "levers", "prefill_targets"])
def test_a_manifest_that_is_cut_off_is_one_line(module: str, tmp_path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(ROOT / "results" / "h100-decode", run)
    whole = (run / "manifest.json").read_bytes()
    (run / "manifest.json").write_bytes(whole[:-400])
    monkeypatch.setattr("sys.argv", [module, str(run)])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"shadowkv_cli.bench.{module}").main()
    assert stopped.value.code == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "manifest.json is not valid JSON" in told
    assert (run / "manifest.json").read_bytes() == whole[:-400]
