"""RULER's summary over lengths against sums by hand, and through the command line."""

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowkv_cli.cli import run
from shadowkv_cli.length_averages import length_summaries, summaries_as_rows, summaries_table
from shadowkv_cli.reporting import report_run
from shadowkv_cli.results import RunFolder
from shadowkv_cli.stats import Interval, macro_average
from shadowkv_cli.summary import score_records
from shadowkv_cli.tasks.rows import Dataset

README_4K_TO_128K = (95.5, 93.8, 91.6, 87.4, 84.7, 77.0)
"""Llama-3.1-8B-Instruct in RULER's README, whose averages there are 88.3, 85.4 and 91.3."""


def row(length, task, number, score, cell="full", **changes) -> dict:
    return {
        "id": f"{task}-{length}-{number}",
        "task": task,
        "context_length": length,
        "method": cell.partition(":")[0],
        "cell": cell,
        "settings": {},
        "pass": 0,
        "prediction": "x",
        "score": score,
        "num_references": 1,
        "dense_fallback": False,
        "error": None,
    } | changes


def summaries(rows):
    return length_summaries(score_records(rows), rows)


def test_the_averages_are_those_of_the_readme():
    lengths = [4096 * 2**i for i in range(6)]
    rows = [
        row(length, task, 0, mean / 100)
        for length, mean in zip(lengths, README_4K_TO_128K, strict=True)
        for task in ("vt", "cwe")
    ]
    (one,) = summaries(rows)
    assert [round(s.estimate, 1) for s in one.by_length.values()] == list(README_4K_TO_128K)
    got = (one.average.estimate, one.rising.estimate, one.falling.estimate)
    assert [round(v, 1) for v in got] == [88.3, 85.4, 91.3]
    assert one.effective_length == 32768
    table = summaries_table([one], all_tasks=13)
    assert table.columns[-5:] == ["Avg", "wAvg (inc)", "wAvg (dec)", "effective length", "nulls"]
    assert table.rows[0][0] == "full"
    assert table.rows[0][-2:] == ["32768", "0"]
    assert any("as few as 2 of RULER's 13 tasks" in note for note in table.notes)
    assert len(summaries_table([one], all_tasks=2).notes) == 1


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=7),
    st.lists(st.integers(1, 9), min_size=7, max_size=7),
)
def test_a_weighted_average_lies_inside_and_equal_weights_change_nothing(values, weights):
    parts = [Interval(v, v - 1, v + 2, 5) for v in values]
    weights = weights[: len(values)]
    one = macro_average(parts, weights)
    assert one.estimate == pytest.approx(
        sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    )
    assert one.low <= one.estimate <= one.high
    assert one.high - one.estimate <= 2 + 1e-9
    same = macro_average(parts, [3] * len(parts))
    assert same.estimate == pytest.approx(macro_average(parts).estimate)
    assert same.low == pytest.approx(macro_average(parts).low)


def test_nulls_and_lengths_without_a_score():
    rows = [row(n, "vt", 0, 1.0, prediction=text) for n, text in ((4096, "\x00 \n"), (8192, "a"))]
    rows += [row(4096, "vt", 0, 0.5, "shadowkv", prediction="")]
    rows += [row(8192, "vt", 0, None, "shadowkv", prediction=None, error="out of memory")]
    full, shadow = summaries(rows)
    assert (full.nulls, shadow.nulls) == (1, 1)
    assert full.effective_length == 8192
    assert shadow.effective_length is None
    assert shadow.average is None
    assert shadow.by_length[8192] is None
    shown = summaries_table([full, shadow], all_tasks=1).rows[1]
    assert shown[2:5] == ["-", "-", "-"]
    assert shown[-2:] == ["under 4096", "1"]
    assert json.dumps(summaries_as_rows([full, shadow]))


def test_a_method_that_never_answered_is_not_tested():
    rows = [row(n, "vt", 0, 1.0, cell) for n in (4096, 8192) for cell in ("full",)]
    rows += [row(n, "vt", 0, 1.0, "shadowkv", dense_fallback=True) for n in (4096, 8192)]
    _, shadow = summaries(rows)
    assert not shadow.tested
    shown = summaries_table([shadow], all_tasks=1).rows[0]
    assert shown[1:-1] == ["not tested"] * 6


def test_summary_csv_has_the_averages_of_several_lengths(tmp_path, capsys):
    rows = [row(n, "vt", i, float(n == 4096)) for n in (4096, 8192) for i in range(2)]
    options = {"scope": {}, "environment": {}, "command": [], "flags": {}}
    identity = {"model": "demo", "data": "ruler"}
    with RunFolder.open(tmp_path / "r", kind="eval", identity=identity, **options) as folder:
        folder.append("predictions", rows)
    report_run(tmp_path / "r", as_json=False)
    assert "RULER by length" in capsys.readouterr().out
    with (tmp_path / "r/summary.csv").open(newline="") as lines:
        own = [r for r in csv.DictReader(lines) if r["phase"] == "lengths"]
    assert [(r["task"], round(float(r["score"]), 2)) for r in own] == [
        ("Avg", 50),
        ("wAvg (inc)", 33.33),
        ("wAvg (dec)", 66.67),
    ]
    assert own[0]["effective_length"] == "4096"


def test_score_shows_the_table_where_there_are_several_lengths(tmp_path, capsys):
    data = tmp_path / "d"
    build = "build-data ruler --tokenizer demo --context-length 1k,2k --num-samples 1 --tasks vt"
    assert run([*build.split(), "--output", str(data)]) == 0
    found = Dataset.open(data)
    samples = [found.samples(n, "vt")[0] for n in found.context_lengths]
    lines = [
        json.dumps({"id": s.id, "prediction": " ".join(s.references) if n else ""})
        for n, s in enumerate(samples)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    capsys.readouterr()
    command = ["score", str(tmp_path / "p.jsonl"), "--data", str(data)]
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert "RULER by length" in shown
    assert "wAvg (inc)" in shown
    assert run([*command, "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["lengths"]
    assert one["by_length"]["1024"][0] == 0
    assert one["by_length"]["2048"][0] == 100
    assert one["rising"][0] == pytest.approx(200 / 3)
    assert one["falling"][0] == pytest.approx(100 / 3)
    assert (one["effective_length"], one["nulls"]) == (2048, 1)
    alone = [*build.replace("1k,2k", "1k").split(), "--output", str(tmp_path / "one")]
    assert run(alone) == 0
    (tmp_path / "q.jsonl").write_text(lines[0])
    capsys.readouterr()
    assert run(["score", str(tmp_path / "q.jsonl"), "--data", str(tmp_path / "one")]) == 0
    assert "RULER by length" not in capsys.readouterr().out
