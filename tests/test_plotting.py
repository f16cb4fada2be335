"""Figures from fabricated runs: what is drawn, what is refused, and what the files say."""

from __future__ import annotations

import csv
import itertools
import json
import random
import subprocess
import sys

import matplotlib
import pytest
import typer
from typer.testing import CliRunner

from shadowkv_cli.commands.plot import plot
from shadowkv_cli.errors import UsageError
from shadowkv_cli.plots import deltas_plot, frontier_plot, parameters_plot, style
from shadowkv_cli.plots.data import different_settings, load, pretty_cell, representative_cells
from shadowkv_cli.plotting import PLOTS, available, default_output, draw_plots
from shadowkv_cli.results import RunFolder, read_run
from shadowkv_cli.run_config import ANY_KERNEL
from shadowkv_cli.summary import AVERAGE, score_records, throughput_records

GRID = [
    {"sparse_budget": str(b), "rank": r, "chunk_size": c, "landmarks_per_chunk": 1}
    for b, r, c in itertools.product((64, 128), (16, 32), (4, 8))
]


def label(settings):
    return "shadowkv:" + ",".join(f"{k}={v}" for k, v in settings.items())


CELLS = [("full", {})] + [(label(s), s) for s in GRID]


def accuracy(settings):
    """Of a made-up method: more budget and rank and smaller chunks score higher."""
    if not settings:
        return 0.9
    return 0.15 * (
        (settings["sparse_budget"] == "128") + settings["rank"] / 16 + 8 / settings["chunk_size"]
    )


def predictions(cells, samples, lengths=(4096,)):
    for length, task, i in itertools.product(lengths, ("niah_single_1", "vt"), range(samples)):
        draw = random.Random(f"{length}{task}{i}").random()
        yield [
            {
                "id": f"{task}-{length}-{i}",
                "task": task,
                "context_length": length,
                "method": cell.partition(":")[0],
                "cell": cell,
                "settings": settings,
                "sparse_budget_tokens": None,
                "pass": 0,
                "prediction": "x",
                "score": float(draw < accuracy(settings)),
                "num_references": 1,
                "dense_fallback": False,
                "hit_rate": None,
                "depth": 100 * i / samples if task == "niah_single_1" else None,
                "error": None,
            }
            for cell, settings in cells
        ]


def rounds(cells, sizes=(1,), noise=0.01):
    for number, (cell, settings), size in itertools.product(range(6), cells, sizes):
        rate = 40 * size**0.5 * (2 - accuracy(settings)) if settings else 30 * size**0.2
        yield [
            {
                "cell": cell,
                "method": cell.partition(":")[0],
                "settings": settings,
                "context_length": 32768,
                "batch_size": size,
                "batch_rule": str(size),
                "state": "synthetic",
                "round": number,
                "tokens_per_s": rate * random.Random(f"{number}{cell}").uniform(1, 1 + noise),
                "step_ms": [1.0, 2.0],
                "step_ms_p50": 1.5,
                "phase_ms": {"attention": 1.2, "matrix products": 0.3} if number == 0 else None,
                "prefill_s": None,
                "hit_rate": None,
                "device": "cpu",
                "error": None,
            }
        ]


def write_run(path, kind, accuracy_rows=(), throughput_rows=(), model="demo", **flags):
    options = {"scope": {}, "environment": {}, "command": [], "flags": flags}
    with RunFolder.open(path, kind=kind, identity={"model": model}, **options) as run:
        run.append("predictions", itertools.chain.from_iterable(accuracy_rows))
        run.append("throughput", itertools.chain.from_iterable(throughput_rows))
    return read_run(path)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "my-sweep"
    data = predictions(CELLS, 60), rounds(CELLS, (1, 2))
    return write_run(path, "sweep", *data, synthetic=True)


@pytest.fixture(scope="module")
def drawn(sweep, tmp_path_factory):
    output = tmp_path_factory.mktemp("plots")
    files, skipped = draw_plots([sweep], output, dpi=60)
    assert not skipped
    assert len(files) == 3 * len(PLOTS)
    return output


def read_csv(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("name", PLOTS)
def test_files_exist_and_say_what_they_are(drawn, name):
    assert (drawn / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    svg = (drawn / f"{name}.svg").read_text()
    assert "Synthetic text: not comparable" in svg
    assert len(read_csv(drawn / f"{name}.csv")) > 0


def test_frontier_csv_holds_the_numbers_of_the_summary(sweep, drawn):
    scores = {r.cell: r.score for r in score_records(sweep.predictions) if r.task == AVERAGE}
    speeds = {(r.cell, r.batch_size): r.tokens_per_s for r in throughput_records(sweep.throughput)}
    rows = read_csv(drawn / "frontier.csv")
    assert len(rows) == 2 * len(CELLS)
    for row in rows:
        speed = speeds[row["cell"], int(row["batch_size"])]
        for name, value in (
            ("score", scores[row["cell"]].estimate),
            ("score_low", scores[row["cell"]].low),
            ("tokens_per_s", speed.estimate),
            ("tokens_per_s_high", speed.high),
        ):
            assert float(row[name]) == pytest.approx(value, rel=1e-8), (row["cell"], name)
    assert {r["on_frontier"] for r in rows if r["cell"] == "full"} == {"True"}


def test_deltas_csv_holds_the_numbers_of_the_summary(sweep, drawn):
    records = {(r.cell, r.task): r for r in score_records(sweep.predictions)}
    for row in read_csv(drawn / "task-deltas.csv"):
        expected = records[row["cell"], row["task"]].difference
        assert float(row["difference"]) == pytest.approx(expected.estimate, abs=1e-8)
        assert int(row["pairs"]) == expected.n


def test_depth_csv_counts_samples(drawn):
    rows = [r for r in read_csv(drawn / "niah-depth.csv") if r["cell"] == "full"]
    assert [(r["depth_low"], r["n"]) for r in rows] == [(f"{d}", "12") for d in (0, 20, 40, 60, 80)]


def test_parameter_lines_differ_in_one_setting(drawn):
    rows = [r for r in read_csv(drawn / "parameters.csv") if r["on_baseline_line"] == "True"]
    for name in ("sparse_budget", "rank", "chunk_size"):
        line = [r["cell"] for r in rows if r["parameter"] == name]
        assert len(line) == 2, (name, line)
        parts = [set(cell.partition(":")[2].split(",")) for cell in line]
        assert {p.partition("=")[0] for p in parts[0] ^ parts[1]} == {name}


def test_baseline_is_the_cell_with_most_neighbours(tmp_path):
    star = [CELLS[0], *(CELLS[i + 1] for i in (0, 1, 2, 4))]
    run = write_run(tmp_path / "star", "sweep", predictions(star, 3))
    records = [r for r in score_records(run.predictions) if r.task == AVERAGE]
    assert parameters_plot.baseline(records[1:]).cell == CELLS[1][0]


def test_the_same_data_give_the_same_bytes(sweep, drawn, tmp_path):
    files, _ = draw_plots([sweep], tmp_path, ["frontier", "parameters"], dpi=60)
    for file in files:
        assert file.read_bytes() == (drawn / file.name).read_bytes(), file.name


@pytest.mark.parametrize("name", PLOTS)
def test_no_text_is_cut_off(sweep, name):
    from shadowkv_cli.plotting import _module

    with matplotlib.rc_context(style.RC):
        figure = _module(name).draw(load([sweep]))
        figure.canvas.draw()
        frame = figure.bbox.padded(1)
        # Labels of ticks outside the axes exist without being drawn; only their left end counts.
        ticks = {
            t for a in figure.axes for axis in (a.xaxis, a.yaxis) for t in axis.get_ticklabels()
        }
        for text in figure.findobj(matplotlib.text.Text):
            if not text.get_text() or not text.get_visible():
                continue
            owner = text.axes
            if owner is not None and not owner.get_visible():
                continue
            box = matplotlib.text.Text.get_window_extent(text)
            inside = frame.x0 <= box.x0 and (
                text in ticks or (box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
            )
            assert inside, (name, text.get_text(), box)


def test_frontier_labels_do_not_overlap(sweep):
    with matplotlib.rc_context(style.RC):
        figure = frontier_plot.draw(load([sweep]))
        figure.canvas.draw()
        labels = [t for t in figure.axes[0].texts if t.get_text().startswith("b ")]
        assert labels, "the points on the frontier carry their settings"
        boxes = [matplotlib.text.Text.get_window_extent(t) for t in labels]
        for (a, i), (b, j) in itertools.combinations(zip(boxes, labels, strict=True), 2):
            assert not a.overlaps(b), (i.get_text(), j.get_text())


def svg_text(run, tmp_path, name="frontier"):
    draw_plots([run], tmp_path / "out", [name], dpi=50)
    return (tmp_path / "out" / f"{name}.svg").read_text()


PHASES = {"select": 8.5, "matrix products": 5.8, "layer ops": 0.4, "other": 0.3, "fetch": 5.8}
PHASES |= {"rebuild": 3.1, "attention": 3.1, "misses": 1.2, "residency": 0.4}
PROBE = {"memory_read_gb_s": 3000.0, "h2d_gb_s": 55.0, "zero_copy_gather_gb_s": 50.0}


def timed_step(cell, number=0, **more):
    settings = dict(
        part.split("=") for part in cell.partition(":")[2].partition(" (")[0].split(",")
    )
    row = {"cell": cell, "method": "shadowkv", "settings": settings, "context_length": 122_880}
    row |= {"batch_size": 14, "batch_rule": "auto", "state": "synthetic", "device": "cuda:0"}
    row |= {"round": number, "tokens_per_s": 670.0, "step_ms": [20.7], "step_ms_p50": 20.7}
    row |= {"hit_rate": 0.88, "lanes": 2, "error": None, "phase_ms": PHASES}
    return row | {"phase_bytes": {"select": 12.75e9, "fetch": 0.29e9}} | more


def gpu_run(path, rows, probe=PROBE):
    options = {"scope": {}, "environment": {"probe": probe}, "command": []}
    with RunFolder.open(path, kind="bench", identity={"model": "m"}, **options) as run:
        run.append("throughput", rows)
    return read_run(path)


def test_a_timeline_says_bandwidths_where_bytes_and_probe_are_known(tmp_path):
    cells = ["shadowkv:rank=160,lanes=2 (hits driven to 59%)", "shadowkv:rank=160,lanes=4"]
    rows = [timed_step(cells[0], lanes=1), timed_step(cells[0], 1, phase_ms={"select": 99.0})]
    rows += [timed_step(cells[1], phase_bytes=None)]
    run = gpu_run(tmp_path / "r", rows)
    draw_plots([run], tmp_path / "out", ["timeline"], dpi=50)
    points = read_csv(tmp_path / "out" / "timeline.csv")
    first = {r["phase"]: r for r in points if r["cell"] == cells[0]}
    assert list(first) == [
        "dense", "select", "residency", "attention", "other", "fetch", "rebuild",
    ]  # fmt: skip
    assert [float(first[p]["ms"]) for p in ("dense", "select", "residency")] == [6.2, 8.5, 1.6]
    assert float(first["select"]["gb_s"]) == pytest.approx(1500)
    assert float(first["select"]["share_of_probe"]) == pytest.approx(0.5)
    assert float(first["fetch"]["share_of_probe"]) == pytest.approx(1.0)
    assert {r["gb_s"] for r in points if r["cell"] == cells[1]} == {""}
    assert {p for p, r in first.items() if r["beside"] == "True"} == {"fetch", "rebuild"}
    text = (tmp_path / "out" / "timeline.svg").read_text()
    for word in ("20.7 ms", "select 8.5 ms, 1,500 GB/s, 50 %", "5.8 ms, 100 %", "lanes\u00a04"):
        assert word in text, word
    assert "rank\u00a0160." in text, "what all cells have stands in the caption"


@pytest.mark.parametrize("parts", [{"lanes": 2}, {"lanes": 1, "micro_batches": 2}])
def test_a_timeline_tells_no_rate_of_what_lanes_do_beside_each_other(tmp_path, parts) -> None:
    run = gpu_run(tmp_path / "r", [timed_step("shadowkv:rank=160", **parts)])
    draw_plots([run], tmp_path / "out", ["timeline"], dpi=50)
    points = {r["phase"]: r for r in read_csv(tmp_path / "out" / "timeline.csv")}
    assert (points["fetch"]["gb_s"], points["fetch"]["share_of_probe"]) == ("", "")
    assert float(points["fetch"]["ms"]) > 0
    assert float(points["select"]["gb_s"]) == pytest.approx(1500), "one kernel for all lanes"


def test_a_timeline_tells_the_rate_of_lanes_whose_times_were_not_added_up(tmp_path) -> None:
    row = timed_step("shadowkv:rank=160", phase_rule=ANY_KERNEL)
    row["phase_ms"] = PHASES | {"beside": 0.1}
    draw_plots([gpu_run(tmp_path / "r", [row])], tmp_path / "out", ["timeline"], dpi=50)
    points = {r["phase"]: r for r in read_csv(tmp_path / "out" / "timeline.csv")}
    assert float(points["fetch"]["gb_s"]) == pytest.approx(50)
    assert float(points["fetch"]["share_of_probe"]) == pytest.approx(1)
    assert points["counts, drift"]["ms"] == "0.1"
    assert points["counts, drift"]["beside"] == "True"


def test_a_timeline_without_a_probe_shows_times_alone(tmp_path):
    run = gpu_run(tmp_path / "r", [timed_step("shadowkv:rank=160")], None)
    text = svg_text(run, tmp_path, "timeline")
    assert "select 8.5" in text
    assert "GB/s, " not in text
    assert {r["share_of_probe"] for r in read_csv(tmp_path / "out" / "timeline.csv")} == {""}


def test_many_steps_are_drawn_in_part(tmp_path):
    rows = [timed_step(f"shadowkv:rank={rank},lanes=2") for rank in range(10, 30)]
    svg_text(gpu_run(tmp_path / "r", rows), tmp_path, "timeline")
    drawn = {r["cell"]: r["drawn"] for r in read_csv(tmp_path / "out" / "timeline.csv")}
    assert list(drawn.values()) == ["True"] * 10 + ["False"] * 10


def test_settings_that_all_cells_have_are_no_names():
    cells = ["full", "shadowkv:rank=64,chunk_size=4", "shadowkv:rank=64 (2 lanes; no graph)"]
    names, common = different_settings(cells)
    assert names == ["full", "shadowkv, chunk\u00a04", "shadowkv (2 lanes; no graph)"]
    assert common == "rank\u00a064"
    assert different_settings(["full", "shadowkv"]) == (["full", "shadowkv"], "")


def test_random_weights_get_no_frontier(tmp_path):
    data = predictions(CELLS, 60), rounds(CELLS)
    run = write_run(tmp_path / "r", "sweep", *data, random_weights=True)
    text = svg_text(run, tmp_path)
    assert "Random weights: scores mean nothing." in text
    assert "no frontier is drawn" in text
    assert "Pareto frontier" not in text
    assert {r["on_frontier"] for r in read_csv(tmp_path / "out" / "frontier.csv")} == {"False"}


def test_overlapping_intervals_get_no_frontier(tmp_path):
    data = predictions(CELLS, 4), rounds(CELLS, noise=3)
    text = svg_text(write_run(tmp_path / "r", "sweep", *data, toy_model=True), tmp_path)
    assert "No frontier: intervals that overlap<" in text
    assert "Pareto frontier" not in text
    assert "Toy model." in text


@pytest.mark.parametrize(("count", "covers"), [(1, "0"), (2, "50"), (3, "75"), (6, None)])
def test_a_frontier_says_what_few_rounds_are_worth(tmp_path, count, covers):
    pair = [CELLS[0], CELLS[1]]
    few = [batch for batch in rounds(pair) if batch[0]["round"] < count]
    text = svg_text(write_run(tmp_path / "r", "sweep", predictions(pair, 60), few), tmp_path)
    text = text.replace("\u00a0", " ")
    assert "overlap" not in text
    assert ("No frontier: fewer than 5 rounds<" in text) == (covers is not None)
    assert ("Pareto frontier" in text) == (covers is None)
    assert ("whole" in text) == (covers is not None)
    if covers:
        assert f"covers {covers} %" in text


def with_budgets(budgets, samples=5):
    """Predictions of one method at these budgets; nothing else varies."""
    cells = [(label(s), s) for s in ({**GRID[0], "sparse_budget": b} for b in budgets)]
    return predictions([CELLS[0], *cells], samples)


@pytest.mark.parametrize(
    ("budgets", "axis", "ticks", "joined"),
    [
        (("64", "128"), "Sparse budget (tokens)", ["64", "128"], True),
        (("12%", "6%"), "Sparse budget (share of the prompt)", ["6%", "12%"], True),
        (("6%", "56"), "Sparse budget (tokens, or % of the prompt)", ["56", "6%"], False),
    ],
)
def test_the_axis_of_budgets_has_their_unit(tmp_path, budgets, axis, ticks, joined):
    run = write_run(tmp_path / "r", "sweep", with_budgets(budgets))
    with matplotlib.rc_context(style.RC):
        figure = parameters_plot.draw(load([run]))
        [panel] = figure.axes
        assert panel.get_xlabel() == axis
        assert [t.get_text() for t in panel.get_xticklabels()] == ticks
        [line] = [c.lines[0] for c in panel.containers]
        assert (line.get_linestyle() != "None") == joined
        texts = " ".join(t.get_text().replace("\n", " ") for t in figure.texts)
        assert ("Not joined" in texts) != joined


def deltas(run):
    """The figure of differences: its axes and all words below them."""
    with matplotlib.rc_context(style.RC):
        figure = deltas_plot.draw(load([run]))
        figure.canvas.draw()
    return figure.axes, " ".join(t.get_text().replace("\n", " ") for t in figure.texts)


def test_methods_without_a_difference_are_told_apart(tmp_path):
    run = write_run(tmp_path / "r", "eval", ([*b] for b in predictions(CELLS[:3], 4)))
    for row in run.predictions:
        row["score"] = 1.0
    [axes], words = deltas(run)
    markers = [line for line in axes.lines if line.get_marker() in style.MARKERS]
    assert [line.get_color() for line in markers] == [*style.OKABE_ITO[:2]]
    assert all(list(line.get_xdata()) == [0, 0, 0] for line in markers)
    assert "Whiskers: 95 % interval" in words
    assert "Bars" not in words


@pytest.mark.parametrize("failing", [("vt",), ("niah_single_1", "vt")])
def test_a_task_that_failed_is_marked_and_has_no_average(tmp_path, failing):
    run = write_run(tmp_path / "r", "eval", predictions(CELLS[:3], 4))
    cell = CELLS[1][0]
    for row in run.predictions:
        if row["cell"] == cell and row["task"] in failing:
            row |= {"score": None, "prediction": None, "error": "out of memory"}
    [axes], words = deltas(run)
    marks = [t for t in axes.texts if t.get_text() == "failed"]
    assert [t.get_color() for t in marks] == [style.OKABE_ITO[0]] * len(failing)
    own, other = (line for line in axes.lines if line.get_marker() in style.MARKERS)
    assert (len(own.get_xdata()), len(other.get_xdata())) == (2 - len(failing), 3)
    assert "has no average" in words
    draw_plots([run], tmp_path / "out", ["task-deltas"], dpi=50)
    rows = [r for r in read_csv(tmp_path / "out" / "task-deltas.csv") if r["cell"] == cell]
    empty = [(r["task"], r["failed"]) for r in rows if not r["difference"]]
    assert empty == [(task, "4") for task in failing]


def test_full_attention_that_failed_leaves_nothing_to_compare(tmp_path):
    run = write_run(tmp_path / "r", "eval", predictions(CELLS[:2], 4))
    for row in run.predictions:
        if row["cell"] == "full" and row["task"] == "vt":
            row |= {"score": None, "prediction": None, "error": "out of memory"}
    [axes], _ = deltas(run)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["niah_single_1"]
    assert not axes.texts


def test_available_says_what_is_needed(sweep, tmp_path):
    assert available([sweep]) == dict.fromkeys(PLOTS)
    reasons = available([write_run(tmp_path / "e", "eval", predictions(CELLS[:2], 5))])
    assert reasons["task-deltas"] is None
    assert "a sweep, or an eval and a bench" in reasons["frontier"]
    assert "needs 10 samples" in reasons["niah-depth"]
    assert "needs throughput" in reasons["batch"]
    assert "needs a bench on a GPU" in reasons["timeline"]
    assert "two values of a setting" in reasons["parameters"]
    empty = available([write_run(tmp_path / "n", "eval")])
    assert all(empty.values()), empty


def test_few_samples_are_hatched(tmp_path):
    run = write_run(tmp_path / "r", "eval", predictions(CELLS[:2], 51, (4096, 8192)))
    rows = [r for r in run.predictions if r["context_length"] == 4096 or r["id"].endswith("-1")]
    text = svg_text(type(run)(run.path, run.manifest, rows, []), tmp_path, "niah-depth")
    assert "n&lt;10" in text
    drawn = {r["context_length"]: r["drawn"] for r in read_csv(tmp_path / "out/niah-depth.csv")}
    assert drawn == {"4096": "True", "8192": "False"}


def test_eval_and_bench_of_one_model_are_joined(tmp_path):
    accuracy_run = write_run(tmp_path / "e", "eval", predictions(CELLS, 5))
    same = write_run(tmp_path / "b", "bench", (), rounds(CELLS))
    other = write_run(tmp_path / "o", "bench", (), rounds(CELLS), model="another")
    joined = load([accuracy_run, same]).joined
    assert [j.label for j in joined] == ["e + b"]
    assert len(joined[0].points) == len(CELLS)
    assert load([accuracy_run, other]).joined == []
    files, _ = draw_plots([accuracy_run, same], tmp_path / "out", ["frontier"], dpi=50)
    assert "e + b" in files[1].read_text()
    with pytest.raises(UsageError, match="--output"):
        default_output([accuracy_run, same])


def test_what_is_impossible_is_refused(sweep, tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'frontier'"):
        draw_plots([sweep], tmp_path, ["frontir"])
    run = write_run(tmp_path / "e", "eval", predictions(CELLS[:1], 2))
    with pytest.raises(UsageError, match="'batch' needs throughput"):
        draw_plots([run], tmp_path, ["batch"])
    with pytest.raises(UsageError, match="no plot yet"):
        draw_plots([run], tmp_path)


def test_names_and_choice_of_cells(sweep):
    assert pretty_cell("full") == "full"
    assert pretty_cell("shadowkv:sparse_budget=64").replace("\u00a0", " ") == "shadowkv, budget 64"
    chosen = representative_cells(score_records(sweep.predictions), 3)
    assert chosen[0] == "full"
    assert chosen[-1] == label({**GRID[1], "rank": 16}), "the worst: small budget, rank, big chunks"


@pytest.fixture(scope="module")
def app():
    application = typer.Typer()
    application.command()(plot)
    return application


def test_command_lists_and_draws(app, sweep, tmp_path):
    runner = CliRunner()
    shown = runner.invoke(app, [str(sweep.path), "--list"])
    assert shown.exit_code == 0, shown.output
    assert all(name in shown.output for name in PLOTS)
    listed = runner.invoke(app, [str(sweep.path), "--list", "--json"])
    assert json.loads(listed.output)["plots"] == dict.fromkeys(PLOTS)
    args = [str(sweep.path), "--plots", "batch", "--output", str(tmp_path), "--dpi", "50"]
    result = runner.invoke(app, [*args, "--json"])
    files = json.loads(result.output)["files"]
    assert files == [str(tmp_path / f"batch.{suffix}") for suffix in ("png", "svg", "csv")]


def test_plots_need_no_torch(sweep, tmp_path):
    code = """
import sys
from pathlib import Path
from shadowkv_cli.plotting import draw_plots
from shadowkv_cli.results import read_run
import shadowkv_cli.commands.plot, shadowkv_cli.commands.score
assert "matplotlib" not in sys.modules
draw_plots([read_run(Path(sys.argv[1]))], Path(sys.argv[2]), ["batch"], dpi=50)
print([name for name in ("torch", "transformers", "datasets") if name in sys.modules])
"""
    args = [sys.executable, "-c", code, str(sweep.path), str(tmp_path)]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_that_is_a_file_is_refused(sweep, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=r"file' is a file: choose another --output\."):
        draw_plots([sweep], tmp_path / place, ["batch"], dpi=50)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_full_attention_decoded_in_a_methods_place_is_no_point_of_it(tmp_path):
    rows = list(rounds(CELLS[:2], (1, 2)))
    for [row] in rows:
        row["dense_fallback"] = row["method"] != "full" and row["batch_size"] == 1
    run = write_run(tmp_path / "b", "bench", (), rows)
    draw_plots([run], tmp_path / "plots", ["batch"])
    drawn = {
        (r["method"], int(r["batch_size"])) for r in read_csv(tmp_path / "plots" / "batch.csv")
    }
    assert drawn == {("full", 1), ("full", 2), ("shadowkv", 2)}
