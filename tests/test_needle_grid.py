"""`build-data niah`: a grid of lengths by depths, and its heat map."""

import csv
import json
from pathlib import Path

import pytest

from shadowkv_cli.cli import run
from shadowkv_cli.plots.data import load
from shadowkv_cli.plots.depth_plot import depth_scores, unavailable
from shadowkv_cli.plotting import draw_plots
from shadowkv_cli.results import RunFolder, read_run
from shadowkv_cli.tasks.rows import Dataset
from shadowkv_cli.tasks.ruler.needle_grid import grid_depths

BASE = ["build-data", "niah", "--tokenizer", "demo"]


def build(output: Path, *options: str) -> int:
    return run([*BASE, "--output", str(output), *options])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("grid") / "d"
    assert build(folder, "--context-length", "1k,2k", "--depths", "5", "--num-samples", "2") == 0
    return Dataset.open(folder)


def test_every_cell_has_its_samples_at_its_depth(data):
    assert data.manifest["suite"] == "niah-grid"
    assert data.manifest["depths"] == [0, 25, 50, 75, 100]
    assert data.manifest["comparable_with_published"] is False
    assert data.manifest["rows"] == {"1024": {"niah_grid": 10}, "2048": {"niah_grid": 10}}
    for length in (1024, 2048):
        samples = data.samples(length, "niah_grid")
        assert [s.depths for s in samples] == [[d] for d in grid_depths(5)] * 2
        assert len({s.references[0] for s in samples}) == 10
        assert len({s.id for s in samples}) == 10
        for sample in samples:
            start = sample.prompt.index("\n") + 1
            place = sample.prompt.index("One of the special magic numbers", start)
            share = 100 * (place - start) / (sample.question_start - start)
            assert abs(share - sample.depths[0]) < 9, sample.id
            assert sample.length >= 0.98 * length


def test_more_samples_keep_the_rows(tmp_path, data):
    options = ("--context-length", "1k", "--depths", "5")
    assert build(tmp_path, *options, "--num-samples", "3") == 0
    before = (data.path / "1024/niah_grid.jsonl").read_bytes()
    assert (tmp_path / "1024/niah_grid.jsonl").read_bytes().startswith(before)
    assert build(tmp_path, "--context-length", "1k", "--depths", "4") == 2, "another grid"


def test_the_defaults_suffice_for_the_heat_map(tmp_path, capsys):
    assert build(tmp_path / "d", "--context-length", "1k", "--dry-run", "--json") == 0
    (piece,) = json.loads(capsys.readouterr().out)["pieces"]
    assert piece["prompts"] == 100


@pytest.mark.parametrize("depths", ["1", "102", "0"])
def test_impossible_depths_are_one_line(tmp_path, capsys, depths):
    assert build(tmp_path / "d", "--context-length", "1k", "--depths", depths) == 2
    shown = capsys.readouterr().err
    assert "--depths must be from 2 to 101" in shown
    assert shown.count("\n") == 1


def row(length, depth, number, **changes):
    return {
        "id": f"niah_grid-{length}-{depth}-{number}",
        "task": "niah_grid",
        "context_length": length,
        "method": "full",
        "cell": "full",
        "settings": {},
        "pass": 0,
        "prediction": "x",
        "score": float(depth != 50),
        "num_references": 1,
        "dense_fallback": False,
        "depth": depth,
        "error": None,
    } | changes


def fabricated(folder, counts):
    options = {"scope": {}, "environment": {}, "command": [], "flags": {}}
    rows = [row(n, d, i) for (n, d), count in counts.items() for i in range(count)]
    identity = {"model": "demo", "data": "niah-grid"}
    with RunFolder.open(folder, kind="eval", identity=identity, **options) as one:
        one.append("predictions", rows)
    return read_run(folder)


def test_the_heat_map_has_the_grids_own_depths_and_hatches_what_is_thin(tmp_path):
    depths = grid_depths(11)
    counts = {(n, d): 10 for n in (1024, 2048) for d in depths} | {(2048, 0.0): 9}
    one = fabricated(tmp_path / "r", counts)
    found = depth_scores(load([one]).series[0])
    assert sorted({d.band for d in found}) == [(d, d) for d in depths]
    draw_plots([one], tmp_path / "out", ["niah-depth"], dpi=60)
    with (tmp_path / "out/niah-depth.csv").open(newline="") as lines:
        cells = {(r["context_length"], r["depth_low"]): r for r in csv.DictReader(lines)}
    assert len(cells) == 22
    assert cells["2048", "0"]["drawn"] == "False"
    assert sum(r["drawn"] == "True" for r in cells.values()) == 21
    assert cells["1024", "50"]["score"] == "0"
    svg = (tmp_path / "out/niah-depth.svg").read_text()
    assert svg.count("n&lt;10") == 1
    assert " to 40" not in svg, "no bands"


def test_too_few_samples_everywhere_say_so(tmp_path):
    one = fabricated(tmp_path / "r", {(1024, 0.0): 9, (1024, 100.0): 3})
    assert "the most here are 9" in unavailable(load([one]))


def test_through_eval_and_plot(data, tiny_model_folder, tmp_path):
    output = tmp_path / "run"
    command = ["eval", "--model", str(tiny_model_folder), "--data", str(data.path)]
    method = ["--method", "full", "--max-new-tokens", "2", "--context-length", "1k"]
    assert run([*command, *method, "--output", str(output)]) == 0
    rows = [json.loads(line) for line in (output / "predictions.jsonl").open()]
    assert sorted({r["depth"] for r in rows}) == grid_depths(5)
    assert run(["plot", str(output), "--list"]) == 0
