"""Records, tables and the frontier, against numbers worked out by hand."""

from __future__ import annotations

import csv

import pytest

from shadowkv_cli.frontier import (
    Doubt,
    frontier_is_resolved,
    join_sweep,
    panels,
    pareto_front,
    point_doubts,
    unresolved_pairs,
)
from shadowkv_cli.stats import Interval, macro_average, mean_interval, paired_difference
from shadowkv_cli.summary import (
    AVERAGE,
    COUNTING_METRICS,
    csv_text,
    score_records,
    throughput_records,
    write_summary_csv,
)
from shadowkv_cli.tables import (
    frontier_table,
    score_table,
    settings_table,
    tables,
    throughput_table,
)

SETTINGS = {"sparse_budget": "64", "rank": 32}


def prediction(sample, cell, score, **changes):
    method = cell.partition(":")[0]
    row = {
        "id": sample,
        "task": sample.partition("-")[0],
        "context_length": 4096,
        "method": method,
        "cell": cell,
        "settings": {} if method == "full" else SETTINGS,
        "sparse_budget_tokens": None if method == "full" else 64,
        "outlier_tokens": None if method == "full" else 16,
        "pass": 0,
        "prediction": f"{score}",
        "score": score,
        "num_references": 1,
        "dense_fallback": False,
        "audit": {"attended_tokens": 4096 if method == "full" else 120},
        "gpu_bytes": 1000,
        "host_bytes": 0,
        "hit_rate": None if method == "full" else 0.5,
        "error": None,
    }
    return row | changes


def speed(cell, round_number, tokens_per_s, **changes):
    method = cell.partition(":")[0]
    row = {
        "cell": cell,
        "method": method,
        "settings": {} if method == "full" else SETTINGS,
        "sparse_budget_tokens": None,
        "context_length": 32768,
        "batch_size": 1,
        "batch_rule": "1",
        "state": "synthetic",
        "round": round_number,
        "tokens_per_s": tokens_per_s,
        "step_ms_p50": 1.0,
        "step_ms_p99": 2.0,
        "step_ms": [1.0, 2.0, 3.0],
        "prefill_s": None,
        "gpu_bytes": 10,
        "host_bytes": 20,
        "peak_memory_bytes": 30 + round_number,
        "hit_rate": None if method == "full" else 0.6,
        "device": "cpu",
        "error": None,
    }
    return row | changes


def pick(records, cell, task, length=4096):
    (found,) = [r for r in records if (r.cell, r.task, r.context_length) == (cell, task, length)]
    return found


@pytest.fixture
def rows():
    scores = {"a-1": (1, 1), "a-2": (1, 0), "a-3": (0, 0), "b-1": (1, 0.5), "b-2": (0.5, 0.5)}
    return [
        prediction(sample, cell, score)
        for sample, pair in scores.items()
        for cell, score in zip(("full", "shadowkv"), pair, strict=True)
    ]


def test_scores_by_hand(rows):
    records = score_records(rows)
    full, method = pick(records, "full", "a"), pick(records, "shadowkv", "a")
    assert (full.n, full.failed, full.difference, full.active_share) == (3, 0, None, None)
    assert full.score == mean_interval([1, 1, 0]).scaled(100)
    assert method.score.estimate == pytest.approx(100 / 3)
    assert method.difference == paired_difference([1, 0, 0], [1, 1, 0]).scaled(100)
    assert method.differing == 1
    assert (method.active_share, method.budget_tokens, method.outlier_tokens) == (1, 64, 16)
    assert (method.attended_tokens, method.hit_rate, method.gpu_bytes) == (120, 0.5, 1000)
    average = pick(records, "shadowkv", AVERAGE)
    assert average.score.estimate == pytest.approx((100 / 3 + 50) / 2)
    tasks = [pick(records, "shadowkv", t) for t in "ab"]
    assert average.score == macro_average([t.score for t in tasks])
    assert average.difference.estimate == pytest.approx((-100 / 3 - 25) / 2)
    assert (average.n, average.differing) == (5, 2)


def test_failed_rows_are_left_out_and_counted(rows):
    rows[1] |= {"error": "out of memory", "score": None, "prediction": None}
    method = pick(score_records(rows), "shadowkv", "a")
    assert (method.n, method.failed) == (2, 1)
    assert method.score.estimate == 0
    assert (
        "Failed samples, left out of the scores: shadowkv 1."
        in score_table(score_records(rows)).notes
    )
    everything = [r | {"error": "x", "score": None} for r in rows if r["cell"] == "shadowkv"]
    failed = pick(score_records(everything), "shadowkv", "a")
    assert (failed.score, failed.n, failed.failed) == (None, 0, 3)
    assert score_table(score_records(everything)).rows[0][2] == "failed"


def test_a_failure_that_a_later_pass_mended_does_not_count(rows):
    rows[1] |= {"error": "out of memory", "score": None, "prediction": None}
    rows += [
        prediction("a-1", "full", 0, **{"pass": 1}),
        prediction("a-1", "shadowkv", 1, **{"pass": 1}),
    ]
    method = pick(score_records(rows), "shadowkv", "a")
    assert (method.n, method.failed) == (3, 0)
    # Paired with the full attention of the same prefill (0), not with that of pass 0 (1).
    assert method.difference == paired_difference([1, 0, 0], [0, 1, 0]).scaled(100)
    assert pick(score_records(rows), "full", "a").score.estimate == pytest.approx(200 / 3)


def test_rows_of_different_passes_are_no_pairs():
    rows = [prediction("a-1", "full", 1), prediction("a-1", "shadowkv", 1, **{"pass": 1})]
    method = pick(score_records(rows), "shadowkv", "a")
    assert (method.n, method.difference, method.differing) == (1, None, None)


def test_not_tested_is_said_instead_of_a_score(rows):
    for row in rows:
        row["dense_fallback"] = row["cell"] != "full"
    records = score_records(rows)
    assert pick(records, "shadowkv", "a").active_share == 0
    table = score_table(records)
    assert table.rows[0][table.columns.index("shadowkv")] == "not tested"
    assert any(note.startswith("Not tested (shadowkv)") for note in table.notes)
    rows[1]["dense_fallback"] = False
    records = score_records(rows)
    assert pick(records, "shadowkv", "a").active_share == pytest.approx(1 / 3)
    assert settings_table(records).rows[1][4] == "17%"


def test_several_lengths_have_an_average_over_all(rows):
    longer = [r | {"context_length": 8192, "id": "x" + r["id"], "score": 0} for r in rows]
    records = score_records(longer + rows)
    assert [r.context_length for r in records if r.cell == "full"] == [
        *[4096] * 3,
        *[8192] * 3,
        None,
    ]
    overall = pick(records, "full", AVERAGE, None)
    assert overall.score.estimate == pytest.approx((200 / 3 + 75 + 0 + 0) / 4)
    names = [row[0] for row in score_table(records).rows]
    here = ["4096 a", "4096 b", "4096 average"]
    assert names == [*here, *(n.replace("4096", "8192") for n in here), "average of all"]


def test_score_table_cells(rows):
    table = score_table(score_records(rows), ["synthetic text"])
    assert table.columns == ["task", "n", "full", "shadowkv", "difference"]
    assert table.rows[0][:2] == ["a", "3"]
    assert table.rows[0][2].startswith("66.7 [")
    assert table.rows[0][4].startswith("-33.3 [-")
    assert table.notes[0] == "synthetic text"


def test_random_weights_come_first_and_loud(rows):
    shown = tables(score_records(rows), notes=["synthetic text", "Random weights: no meaning"])
    assert shown[0].notes[:2] == ["WARNING: Random weights: no meaning", "synthetic text"]


def test_many_cells_are_rows():
    rows = [prediction("a-1", "full", 1)]
    rows += [prediction("a-1", f"shadowkv:rank={r}", 1) for r in range(8)]
    table = score_table(score_records(rows))
    assert table.columns == ["cell", "n", "4096", "difference"]
    assert [row[0] for row in table.rows][:2] == ["full", "shadowkv:rank=0"]


def test_unequal_tasks_are_said(rows):
    records = score_records([r for r in rows if (r["cell"], r["task"]) != ("shadowkv", "b")])
    assert any("different tasks" in note for note in score_table(records).notes)


def test_throughput_by_hand():
    rows = [speed("full", i, v) for i, v in enumerate([10, 12, 11])]
    rows += [speed("shadowkv", i, v) for i, v in enumerate([20, 18, 33])]
    rows.append(speed("shadowkv", 3, None, error="failed", step_ms=None))
    full, method = throughput_records(rows)
    assert full.tokens_per_s == Interval(11, 10, 12, 3, 0.75)
    assert full.ratio is None
    assert method.tokens_per_s.estimate == 20
    assert method.failed == 1
    assert (method.ratio.low, method.ratio.estimate, method.ratio.high) == (1.5, 2, 3)
    assert (method.step_ms_p50, method.peak_memory_bytes) == (2, 32)
    assert method.step_ms_p99 == pytest.approx(3)
    notes = " ".join(tables([], [full, method], ["note"])[0].notes)
    for part in ("Failed rounds, left out: 1", "cover 75%", "Synthetic state", "note"):
        assert part in notes, notes


def test_own_largest_batch_is_held_against_fulls_largest():
    rows = [speed("full", 0, 10, batch_rule="equal", batch_size=4)]
    rows += [speed("shadowkv", 0, 50, batch_rule="auto", batch_size=24)]
    assert throughput_records(rows)[1].ratio.estimate == 5


def test_csv_is_one_flat_table(rows, tmp_path):
    file = tmp_path / "summary.csv"
    speeds = throughput_records([speed("full", 0, 10)])
    write_summary_csv(file, score_records(rows), speeds)
    with file.open(newline="") as lines:
        read = list(csv.DictReader(lines))
    assert {r["phase"] for r in read} == {"accuracy", "throughput"}
    method = next(r for r in read if (r["cell"], r["task"]) == ("shadowkv", "a"))
    assert float(method["score"]) == pytest.approx(100 / 3)
    assert (method["n"], method["setting_rank"], method["differing"]) == ("3", "32", "1")
    assert csv_text([{"a": None, "b": "x,y"}, {"c": 0.5}]) == 'a,b,c\n,"x,y",\n,,0.5\n'


def sweep_points(values):
    """Points of cells c0, c1, …: (score per sample, tokens/s per round)."""
    rows, speeds = [], []
    for i, (scores, rates) in enumerate(values):
        cell = f"shadowkv:{i}"
        rows += [prediction(f"a-{j}", cell, s) for j, s in enumerate(scores)]
        speeds += [speed(cell, j, v) for j, v in enumerate(rates)]
    return join_sweep(score_records(rows), throughput_records(speeds))


def around(value):
    return [value - 0.1, value - 0.05, value, value + 0.05, value + 0.1]


def test_pareto_front_by_hand():
    points = sweep_points(
        [
            ([1] * 100, around(10)),
            ([1] * 50 + [0] * 50, around(20)),
            ([1] * 40 + [0] * 60, around(15)),  # beaten by the second in both
            ([0] * 100, around(30)),
            ([0] * 100, around(30)),  # the same again
        ]
    )
    assert [p.cell for p in pareto_front(points)] == [f"shadowkv:{i}" for i in (0, 1, 3)]
    assert frontier_is_resolved(points)
    assert list(panels(points)) == [(32768, "1")]
    table = frontier_table(points)
    assert [row[4] for row in table.rows] == ["yes", "", "yes", "", "yes"]
    without = frontier_table(points, with_frontier=False)
    assert {row[4] for row in without.rows} == {""}


@pytest.mark.parametrize(
    "values",
    [
        [([1] * 100, [9, 9, 10, 10, 21]), ([0] * 100, [20, 22, 22, 23, 23])],  # speeds overlap
        [([1] * 5 + [0] * 5, around(10)), ([1] * 4 + [0] * 6, around(20))],  # scores overlap
        # one beats the other, unproven
        [([1] * 6 + [0] * 4, [9, 10, 22, 29, 30]), ([1] * 5 + [0] * 5, [8, 9, 20, 21, 22])],
    ],
)
def test_overlapping_intervals_establish_nothing(values):
    points = sweep_points(values)
    assert not frontier_is_resolved(points)
    assert len(unresolved_pairs(points)) == 1
    table = frontier_table(points)
    assert "overlaps" in [row[4] for row in table.rows]
    assert any(note.startswith("overlaps:") for note in table.notes)


def test_too_few_rounds_are_no_overlap():
    high, low = [1] * 90 + [0] * 10, [1] * 50 + [0] * 50
    few = sweep_points([(high, [10, 10.1, 10.2]), (low, [20, 20.1, 20.2])])
    assert {doubt for *_, doubt in unresolved_pairs(few)} == {Doubt.FEW_ROUNDS}
    table = frontier_table(few)
    assert [row[4] for row in table.rows] == ["few rounds", "few rounds"]
    assert any("fewer than 5 rounds" in note for note in table.notes)
    assert not any("overlap" in note for note in table.notes)
    enough = [(high, around(10)), (low, around(20))]
    assert frontier_is_resolved(sweep_points(enough)), "5 rounds suffice"
    three = sweep_points([*enough, ([1] * 45 + [0] * 55, [30, 30.1])])
    assert list(point_doubts(three).values()) == [Doubt.OVERLAP] * 2


def test_overlaps_are_told_before_few_rounds():
    values = [([1] * 90 + [0] * 10, [10]), ([1] * 50 + [0] * 50, [20]), ([1] * 45 + [0] * 55, [30])]
    doubts = point_doubts(points := sweep_points(values))
    assert [doubts[id(p)] for p in points] == ["few rounds", "overlaps", "overlaps"]


def test_no_other_length_stands_in_for_a_failed_average(rows):
    for row in rows:
        if row["method"] == "shadowkv" and row["task"] == "a":
            row |= {"error": "out of memory", "score": None, "prediction": None}
    longer = [
        r | {"context_length": 32768, "id": "x" + r["id"], "error": None, "score": 1.0}
        for r in rows
    ]
    speeds = [speed("shadowkv", 0, 10, context_length=length) for length in (4096, 32768)]
    points = join_sweep(score_records(rows + longer), throughput_records(speeds))
    assert [p.score_length for p in points] == [32768]


def test_hit_rates_that_differ_are_flagged():
    points = sweep_points([([1, 0], around(10))])
    assert points[0].hit_rates_differ, "0.5 in accuracy, 0.6 in throughput"
    assert any("more than 5 points" in note for note in frontier_table(points).notes)


def test_join_takes_the_score_at_the_length_of_the_throughput(rows):
    longer = [r | {"context_length": 32768, "id": "x" + r["id"], "score": 0} for r in rows]
    scores = score_records(rows + longer)
    at_length = join_sweep(scores, throughput_records([speed("full", 0, 10)]))
    assert (at_length[0].score_length, at_length[0].score.estimate) == (32768, 0)
    other = throughput_records([speed("full", 0, 10, context_length=65536)])
    overall = join_sweep(scores, other)
    assert overall[0].score_length is None
    assert join_sweep(scores, throughput_records([speed("oracle", 0, 10)])) == []


def test_there_is_no_average_over_fewer_tasks_than_the_cells_beside_it_have(rows):
    for row in rows:
        if row["method"] == "shadowkv" and row["task"] == "a":
            row |= {"error": "out of memory", "score": None, "prediction": None}
    records = score_records(rows)
    average = pick(records, "shadowkv", AVERAGE)
    assert (average.score, average.difference, average.differing) == (None, None, None)
    assert average.failed == 3
    assert pick(records, "full", AVERAGE).score is not None
    table = score_table(records)
    assert table.rows[-1][table.columns.index("shadowkv")] == "failed"


@pytest.mark.parametrize(
    ("metric", "parts"), [("string_match_all", 4), ("string_match_part", 1), (None, 1)]
)
def test_alternatives_make_no_interval_narrower(metric: str | None, parts: int) -> None:
    scores = [0.5, 0.52, 0.48]
    more = {"metric": metric, "num_references": 4}
    cells = [prediction(f"a-{i}", "full", score, **more) for i, score in enumerate(scores)]
    [record, _] = score_records(cells)
    assert record.score == mean_interval(scores, num_references=parts).scaled(100)


def test_metrics_that_count_references_are_known() -> None:
    from shadowkv_cli.tasks.longbench import metrics as longbench
    from shadowkv_cli.tasks.metrics import METRICS
    from shadowkv_cli.tasks.rows import Sample
    from shadowkv_cli.tasks.ruler import shadowkv_metrics as dialect

    assert longbench, "they name theirs when they are imported"
    assert dialect
    words = ["10", "20", "30", "40"]
    texts = {"id": "a-0", "task": "a", "prompt": "?", "answer_prefix": "", "metric": ""}
    sizes = {"length": 89, "prompt_tokens": 80, "max_new_tokens": 9, "context_length": 100}
    sample = Sample(**texts, **sizes, index=0, references=words, question_start=0)
    counting = set()
    for name, score in METRICS.items():
        if not name.startswith("longbench"):
            none, one, two, all_ = (score(" ".join(words[:n]), sample) for n in (0, 1, 2, 4))
            if none < one < two < all_:
                counting.add(name)
    assert counting == COUNTING_METRICS


def test_full_attention_in_a_methods_place_is_no_measurement_of_it() -> None:
    rows = [speed("full", 0, 10.0), speed("shadowkv", 0, 9.0, dense_fallback=True)]
    full, method = throughput_records(rows)
    assert (full.tested, method.tested) == (True, False)
    assert (method.ratio, method.hit_rate) == (None, None)
    table = throughput_table([full, method])
    assert table.rows[1][table.columns.index("x full")] == "not tested"
    assert any(note.startswith("Not tested (shadowkv)") for note in table.notes)
