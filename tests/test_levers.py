"""The table of what each lever gives, from constructed rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from shadowkv_cli.bench import levers
from shadowkv_cli.bench.levers import lever_table
from shadowkv_cli.bench.markdown import section
from shadowkv_cli.errors import UsageError
from shadowkv_cli.results import read_run

ROOT = Path(__file__).resolve().parent.parent


def row(speed: float, rate: float | None = 0.88, **more) -> dict:
    settings = {"value_buffer": 4.0, "key_buffer": 4.0, "value_dtype": "model"}
    return {
        "method": "shadowkv",
        "settings": settings | more.pop("settings", {}),
        "driven_hit_rate": rate,
        "lanes": 2,
        "captured": True,
        "batch_size": 8,
        "context_length": 122_880,
        "tokens_per_s": speed,
        "error": None,
        **more,
    }


def test_every_lever_stands_beside_the_base() -> None:
    rows = [row(s) for s in (500, 480, 520)] + [row(s, 0.59) for s in (300, 310)]
    rows += [row(250, captured=False), row(400, lanes=1), row(330, 0.59, lanes=4)]
    rows += [row(600, settings={"value_dtype": "fp8"})]
    rows += [row(360, 0.59, micro_batches=2)]
    rows += [row(450, settings={"value_buffer": 1.5, "key_buffer": 2.0}), row(0, error="failed")]
    rows += [row(99, method="full", settings={}, rate=None)]
    assert lever_table(rows).splitlines() == [
        "| lever | tokens/s, hits 59% | tokens/s, hits 88% |",
        "| --- | --- | --- |",
        "| base: value_buffer 4.0, key_buffer 4.0, 2 lanes, one CUDA graph, batch 8, 122,880 "
        "tokens | 305 [300, 310] | 500 [480, 520] |",
        "| no CUDA graph | not measured | 250 [250, 250], 0.50x |",
        "| 1 lane | not measured | 400 [400, 400], 0.80x |",
        "| 4 lanes | 330 [330, 330], 1.08x | not measured |",
        "| value_dtype fp8 | not measured | 600 [600, 600], 1.20x |",
        "| 2 micro-batches of 2 lanes | 360 [360, 360], 1.18x | not measured |",
        "| key_buffer 2.0, value_buffer 1.5 | not measured | 450 [450, 450], 0.90x |",
    ]


def test_batches_lengths_and_hits_that_nobody_drove() -> None:
    rows = [row(100, None), row(150, None, batch_size=14), row(90, None, context_length=1024)]
    assert lever_table(rows).splitlines()[0] == "| lever | tokens/s, hits as they come |"
    assert [line.split(" | ")[0] for line in lever_table(rows).splitlines()[3:]] == [
        "| batch 14",
        "| 1,024 tokens",
    ]


def test_a_run_without_shadowkv_has_no_levers() -> None:
    with pytest.raises(UsageError, match="no measurement of shadowkv"):
        lever_table([row(1, method="full"), row(2, error="failed")])


def test_the_command_reads_a_run_and_writes_into_a_page(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from shadowkv_cli.cli import run

    command = ["bench", "--model", str(tiny_model_folder), "--state", "synthetic", "--rank", "8"]
    command += ["--context-length", "512", "--decode-steps", "3", "--rounds", "2", "--share"]
    command += ["--sparse-budget", "32", "--method", "shadowkv", "--one-at-a-time"]
    command += ["--value-placement", "host", "--batch-size", "2", "--output", str(tmp_path / "b")]
    assert run([*command, "--value-buffer", "2,1", "--lanes", "2,1"]) == 0
    more = ["--value-buffer", "2", "--lanes", "2", "--value-dtype", "model,fp8"]
    assert run([*command, *more]) == 0
    assert "2 of 4 measurements are done" in capsys.readouterr().err
    capsys.readouterr()
    page = tmp_path / "page.md"
    page.write_text("<!-- levers -->\n<!-- /levers -->\n")
    monkeypatch.setattr(sys, "argv", ["levers", str(tmp_path / "b"), "--readme", str(page)])
    levers.main()
    table = capsys.readouterr().out.strip()
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]] == [
        "base: value_buffer 2.0, key_buffer 1.0, 2 lanes, no CUDA graph, batch 2, 512 tokens",
        "1 lane",
        "value_buffer 1.0",
        "value_dtype fp8",
    ]
    assert table in page.read_text()
    monkeypatch.setattr(sys, "argv", ["levers", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as stopped:
        levers.main()
    assert stopped.value.code == 2
    assert json.loads((tmp_path / "b/throughput.jsonl").read_text().splitlines()[0])["lanes"] == 2


def test_the_page_has_the_table_of_the_committed_run() -> None:
    rows = read_run(ROOT / "results" / "h100-levers").throughput
    page = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    assert section(page, levers.SECTION) == lever_table(rows)
