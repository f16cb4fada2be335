"""LongBench through eval, sweep, score and plot, and its averages worked out by hand."""

import importlib.util
import json
from pathlib import Path

import pytest

from shadowkv_cli.activity import activity_of, activity_table
from shadowkv_cli.averages import (
    FLAT_MEAN,
    UNPARSED,
    averages_table,
    category_averages,
    group_averages,
    official_mean,
)
from shadowkv_cli.cli import run
from shadowkv_cli.summary import score_records
from shadowkv_cli.tasks.longbench.definitions import all_tasks, longbench_sets
from shadowkv_cli.tasks.rows import Dataset

_spec = importlib.util.spec_from_file_location(
    "longbench_files", Path(__file__).parent / "longbench_files.py"
)
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)

SHADOW = "shadowkv:rank=8"


def row(task, number, score, cell="full", **changes) -> dict:
    method = cell.partition(":")[0]
    return {
        "id": f"{task}-{number}",
        "task": task,
        "context_length": 32768,
        "method": method,
        "cell": cell,
        "settings": {},
        "pass": 0,
        "prediction": f"{score}",
        "score": score,
        "num_references": 1,
        "prompt_tokens": 1000,
        "dense_fallback": False,
        "audit": {"attended_tokens": 1010 if method == "full" else 260, "generated": 10},
        "error": None,
    } | changes


def values(found, cell="full") -> dict[str, float | None]:
    return {
        one.name: None if one.value is None else one.value.estimate
        for one in found
        if one.cell == cell
    }


def test_the_means_are_over_categories_and_over_sets():
    scores = {name: (i % 5) / 4 for i, name in enumerate(all_tasks(e=False))}
    rows = [row(name, i, score) for name, score in scores.items() for i in range(2)]
    got = values(category_averages(score_records(rows)))

    def mean(names):
        return 100 * sum(scores[name] for name in names) / len(names)

    sets = longbench_sets()
    for language in ("en", "zh"):
        by_category: dict[str, list[str]] = {}
        for name, entry in sets.items():
            if entry.language in (language, "code"):
                by_category.setdefault(entry.category, []).append(name)
        assert len(by_category) == 6
        expected = sum(map(mean, by_category.values())) / 6
        assert got[official_mean(language)] == pytest.approx(expected)
    flat = [name for name, entry in sets.items() if entry.language != "zh"]
    assert len(flat) == 16
    assert got[FLAT_MEAN] == pytest.approx(mean(flat))
    assert got["code"] == pytest.approx(mean(["lcc", "repobench-p"]))
    assert got["summarisation, zh"] == pytest.approx(mean(["vcsum"]))


def test_a_mean_that_lacks_a_set_is_not_given():
    rows = [row(name, 0, 1.0) for name in all_tasks(e=False) if name != "qmsum"]
    got = values(category_averages(score_records(rows)))
    assert got["summarisation, en (2 of 3 sets)"] == 100
    assert FLAT_MEAN not in got
    assert official_mean("en") not in got
    assert official_mean("zh") in got


def test_groups_count_samples_not_tasks():
    answers = ["The correct answer is (A)", "A", "The correct answer is (B)", ""]
    groups = [["easy", "short"], ["easy", "long"], ["hard", "short"], ["easy", "long"]]
    rows = [
        row("longbench-v2", i, float(i == 0), prediction=text, groups=group)
        for i, (text, group) in enumerate(zip(answers, groups, strict=True))
    ]
    got = values(group_averages(rows, "longbench-v2"))
    assert list(got) == ["overall", "easy", "hard", "short", "long", UNPARSED]
    assert got["overall"] == 25
    assert got["easy"] == pytest.approx(100 / 3)
    assert got["short"] == 50
    assert got[UNPARSED] == 50
    e = [row("lcc_e", i, i / 2, groups=[["0-4k"], ["8k+"], ["8k+"]][i]) for i in range(3)]
    assert values(group_averages(e, "longbench-e")) == {"lcc_e 0-4k": 0, "lcc_e 8k+": 75}


def test_activity_is_told_for_all_samples_and_for_the_active_ones():
    rows = [row("lcc", i, 1.0) for i in range(4)]
    for i in range(4):
        short = i >= 1
        audit = {"attended_tokens": 1010 if short else 505, "generated": 10}
        rows.append(row("lcc", i, float(short), SHADOW, dense_fallback=short, audit=audit))
    (one,) = activity_of(rows, score_records(rows))
    assert (one.n, one.active) == (4, 1)
    assert one.attended_share == pytest.approx((3 + 0.5) / 4)
    assert one.active_attended_share == 0.5
    assert one.score.estimate == 75
    assert one.active_score.estimate == 0
    assert one.active_difference.estimate == -100
    table = activity_table([one])
    assert [r[:3] for r in table.rows] == [
        [SHADOW, "1 of 4", "87.5%"],
        [f"{SHADOW}, active only", "1", "50.0%"],
    ]


def test_a_method_that_was_never_active_is_not_tested():
    rows = [row("lcc", 0, 1.0), row("lcc", 0, 1.0, SHADOW, dense_fallback=True)]
    records = score_records(rows)
    (one,) = activity_of(rows, records)
    assert activity_table([one]).rows[0][1] == "0 of 1"
    assert activity_table([one]).rows[0][3] == "not tested"
    table = averages_table(category_averages(records))
    assert table.columns == ["average", "n", "full", SHADOW]
    assert table.rows[0][0] == "code (1 of 2 sets)"
    assert table.rows[0][3] == "not tested"


def test_another_tools_rows_say_nothing_about_activity():
    rows = [row("lcc", 0, 1.0, "other", dense_fallback=None)]
    assert activity_of(rows, score_records(rows)) == []


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """One short sample and one long of all 21 sets, cut to 900 tokens."""
    folder = tmp_path_factory.mktemp("longbench")
    source = files.write_v1(folder / "source", rows=2)
    command = ["build-data", "longbench", "--tokenizer", "demo", "--source", str(source)]
    assert run([*command, "--max-length", "900", "--output", str(folder / "data")]) == 0
    return folder / "data"


def test_all_sets_through_eval_and_plot(data, tiny_model_folder, tmp_path, capsys):
    output = tmp_path / "run"
    command = ["eval", "--model", str(tiny_model_folder), "--data", str(data)]
    budget = ["--method", "full,shadowkv", "--rank", "16", "--sparse-budget", "64"]
    cut = ["--max-new-tokens", "3", "--output", str(output), "--outlier-chunks", "2"]
    assert run([*command, *budget, *cut]) == 0
    shown = capsys.readouterr().out
    for text in ("Averages (0 to 100)", official_mean("en"), official_mean("zh"), FLAT_MEAN):
        assert text in shown
    assert "For how many samples each method was active" in shown
    assert "Not comparable with published longbench" in shown
    rows = [json.loads(line) for line in (output / "predictions.jsonl").open()]
    assert {r["task"] for r in rows} == set(all_tasks(e=False))
    assert all(r["error"] is None for r in rows)
    assert run([*command, *budget, *cut, "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert {"full"} < {one["cell"] for one in payload["averages"]}
    assert payload["activity"][0]["n"] == 42
    assert run(["plot", str(output)]) == 0


def test_all_sets_through_score(data, tmp_path, capsys):
    """The last reference as the answer of each sample scores 100 everywhere."""
    found = Dataset.open(data)
    lines = [
        json.dumps({"id": sample.id, "prediction": sample.references[-1]})
        for task in found.tasks
        for sample in found.samples(found.context_lengths[0], task)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    assert run(["score", str(tmp_path / "p.jsonl"), "--data", str(data), "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    by_name = {one["name"]: one["value"] for one in payload["averages"]}
    for name in (official_mean("en"), official_mean("zh"), FLAT_MEAN):
        assert by_name[name] == pytest.approx(100, abs=1e-4)
    assert payload["activity"] == []


def test_v2_through_sweep_and_score(tiny_model_folder, tmp_path, capsys):
    data = tmp_path / "data"
    source = str(files.write_v2(tmp_path / "data.json", rows=3))
    build = ["build-data", "longbench-v2", "--tokenizer", "demo", "--source", source]
    assert run([*build, "--max-length", "700", "--output", str(data)]) == 0
    output = tmp_path / "run"
    command = ["sweep", "--model", str(tiny_model_folder), "--data", str(data)]
    settings = ["--method", "full,streaming", "--sparse-budget", "32", "--max-new-tokens", "2"]
    timing = ["--context-length", "1k", "--decode-steps", "2", "--warmup-steps", "1"]
    more = ["--rounds", "1", "--output", str(output)]
    assert run([*command, *settings, *timing, *more]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "overall" in shown
    assert UNPARSED in shown
    found = Dataset.open(data)
    (length,) = found.context_lengths
    predictions = [
        json.dumps({"id": s.id, "prediction": f"The correct answer is ({s.references[0]})."})
        for s in found.samples(length, "longbench-v2")[:2]
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(predictions))
    assert run(["score", str(tmp_path / "p.jsonl"), "--data", str(data)]) == 3, "one is missing"
    shown = capsys.readouterr()
    assert "100.0 [" in shown.out
    assert "1 samples of the data have no prediction" in shown.err
