"""`shadowkv sweep` and `shadowkv bench` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shadowkv_cli.cli import run
from shadowkv_cli.results import read_run

GRID = ["--sparse-budget", "16,32", "--rank", "4,16", "--chunk-size", "4,8"]
FAST = ["--decode-steps", "4", "--warmup-steps", "1", "--rounds", "2"]


@pytest.fixture
def command(tiny_model_folder: Path, ruler_folder: Path) -> list[str]:
    return ["sweep", "--model", str(tiny_model_folder), "--data", str(ruler_folder)]


@pytest.fixture(scope="session")
def finished(tiny_model_folder: Path, ruler_folder: Path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sweeps") / "grid"
    arguments = ["--model", str(tiny_model_folder), "--data", str(ruler_folder), *GRID, *FAST]
    arguments += ["--bench-context-length", "1k", "--num-samples", "2", "--output", str(path)]
    assert run(["sweep", *arguments]) == 0
    return path


def test_every_cell_has_accuracy_and_throughput(finished: Path) -> None:
    folder = read_run(finished)
    cells = {r["cell"] for r in folder.predictions}
    assert len(cells) == 1 + 2 * 2 * 2
    assert len(folder.predictions) == 9 * 2 * 2
    assert {r["pass"] for r in folder.predictions} == {0}, "one prefill a sample"
    assert {(r["cell"], r["round"]) for r in folder.throughput} == {
        (cell, n) for cell in cells for n in range(2)
    }
    for row in folder.throughput:
        assert row["tokens_per_s"] > 0
        assert len(row["step_ms"]) == 4
        assert row["gpu_bytes"] > 0
    sparse = [r for r in folder.throughput if r["method"] == "shadowkv"]
    assert {r["sparse_budget_tokens"] for r in sparse} == {16, 32}


def test_a_cell_gets_the_answers_that_eval_gives_it(
    finished: Path, tiny_model_folder: Path, ruler_folder: Path, tmp_path: Path
) -> None:
    arguments = ["eval", "--model", str(tiny_model_folder), "--data", str(ruler_folder)]
    arguments += ["--method", "shadowkv:rank=4,chunk_size=4,sparse_budget=16"]
    assert run([*arguments, "--num-samples", "2", "--output", str(tmp_path / "r")]) == 0
    alone = {r["id"]: r for r in read_run(tmp_path / "r").predictions}
    cell = next(iter(alone.values()))["cell"]
    joint = {r["id"]: r for r in read_run(finished).predictions if r["cell"] == cell}
    assert joint.keys() == alone.keys()
    for key, row in alone.items():
        for field in ("prediction", "score", "audit", "hit_rate"):
            assert joint[key][field] == row[field], (key, field)


def test_a_finished_sweep_has_nothing_left_to_do(
    command: list[str], finished: Path, capsys
) -> None:
    again = [*command, *GRID, *FAST, "--bench-context-length", "1k", "--num-samples", "2"]
    before = [(finished / f"{n}.jsonl").read_bytes() for n in ("predictions", "throughput")]
    assert run([*again, "--output", str(finished)]) == 0
    capsys.readouterr()
    assert run([*again, "--output", str(finished), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prefills"] == 0
    after = [(finished / f"{n}.jsonl").read_bytes() for n in ("predictions", "throughput")]
    assert after == before


def test_a_throughput_phase_continues(command: list[str], finished: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "cut"
    shutil.copytree(finished, copy)
    log = copy / "throughput.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:5]) + lines[5][:50])
    again = [*command, *GRID, *FAST, "--bench-context-length", "1k", "--num-samples", "2"]
    assert run([*again, "--output", str(copy)]) == 0
    key = lambda r: (r["cell"], r["round"])  # noqa: E731
    rows = read_run(copy).throughput
    assert sorted(map(key, rows)) == sorted(map(key, read_run(finished).throughput))


def test_plots_of_a_sweep(finished: Path, tmp_path: Path, capsys) -> None:
    assert run(["plot", str(finished), "--output", str(tmp_path)]) == 0
    assert {"frontier.png", "frontier.svg", "frontier.csv"} <= {f.name for f in tmp_path.iterdir()}


def test_impossible_cells_are_refused_before_anything_runs(
    command: list[str], tmp_path: Path, capsys
) -> None:
    arguments = ["--sparse-budget", "16,32", "--chunk-size", "8,5", "--rank", "4"]
    assert run([*command, *arguments, "--output", str(tmp_path / "r")]) == 2
    assert "not divisible by chunk_size 5" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def bench_command(model: Path, output: Path, *more: str) -> list[str]:
    return ["bench", "--model", str(model), "--rank", "8", *FAST, "--output", str(output), *more]


def test_bench_reports_each_batch(tiny_model_folder: Path, tmp_path: Path, capsys) -> None:
    command = bench_command(
        tiny_model_folder, tmp_path / "b", "--context-length", "512", "--batch-size", "1,3"
    )
    assert run([*command, "--json"]) == 0
    records = json.loads(capsys.readouterr().out)["records"]
    assert {(r["cell"], r["batch_size"]) for r in records} == {
        (cell, size) for cell in ("full", "shadowkv:rank=8") for size in (1, 3)
    }
    for record in records:
        assert record["prefill_s"] > 0
        assert record["step_ms_p99"] >= record["step_ms_p50"] > 0
        assert record["peak_memory_bytes"] > 0
    ratios = [r["ratio"] for r in records if r["method"] == "shadowkv"]
    assert all(ratio > 0 for ratio in ratios)


def test_bench_on_prompts_of_the_data(
    tiny_model_folder: Path, ruler_folder: Path, tmp_path: Path, capsys
) -> None:
    more = ["--data", str(ruler_folder), "--context-length", "1k", "--batch-size", "2"]
    assert run(bench_command(tiny_model_folder, tmp_path / "b", *more)) == 0
    rows = read_run(tmp_path / "b").throughput
    assert {r["state"] for r in rows} == {"prompts"}
    shadow = [r for r in rows if r["method"] == "shadowkv"]
    assert all(0 <= r["hit_rate"] <= 1 for r in shadow)
    capsys.readouterr()
    more[-1] = "50"
    assert run(bench_command(tiny_model_folder, tmp_path / "c", *more)) in (1, 2)
    assert "50" in capsys.readouterr().err


def test_bench_largest_batches_follow_the_memory(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    from shadowkv_cli.bench import cases
    from shadowkv_cli.config import FullSpec
    from shadowkv_cli.model.loading import load_model
    from shadowkv_cli.run_config import ModelChoice

    shape = load_model(ModelChoice(str(tiny_model_folder))).shape
    room = 9 * FullSpec().cache_bytes(shape, 512, 5).device + 100
    monkeypatch.setattr(cases, "free_device_bytes", lambda device, reserve, *_: room)
    more = ["--context-length", "512", "--batch-size", "equal,auto", "--state", "synthetic"]
    more += ["--sparse-budget", "16"]
    assert run(bench_command(tiny_model_folder, tmp_path / "b", *more)) == 0
    rows = read_run(tmp_path / "b").throughput
    sizes = {(r["method"], r["batch_rule"]): r["batch_size"] for r in rows}
    assert sizes["full", "equal"] == sizes["full", "auto"] == sizes["shadowkv", "equal"] == 9
    assert sizes["shadowkv", "auto"] > 9
