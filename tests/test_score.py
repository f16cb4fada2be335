"""`shadowkv score`: predictions of ours and of other tools against a dataset."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from shadowkv_cli.commands.score import score
from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.rescoring import is_echo, read_samples, rescore
from shadowkv_cli.rowlog import append_group
from shadowkv_cli.tasks.rows import Dataset

QUESTION = "What are all the special magic numbers for quick-fox mentioned in the provided text?"
PREFIX = " The special magic numbers for quick-fox mentioned in the provided text are"


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    (folder / "4096").mkdir(parents=True)
    rows = []
    for i in range(3):
        context = f"Some special magic numbers are hidden here. {i}11 and {i}22.\n"
        rows.append(
            {
                "id": f"niah-4096-{i}",
                "task": "niah",
                "index": i,
                "prompt": context + QUESTION,
                "answer_prefix": PREFIX,
                "references": [f"{i}11", f"{i}22"],
                "metric": "string_match_all",
                "length": 200,
                "prompt_tokens": 72,
                "max_new_tokens": 128,
                "context_length": 4096,
                "question_start": len(context),
            }
        )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "4096" / "niah.jsonl").write_text(lines)
    manifest = {
        "schema_version": 1,
        "suite": "ruler",
        "tasks": ["niah"],
        "context_lengths": [4096],
        "num_samples": 3,
        "rows": {"4096": {"niah": 3}},
        "synthetic": True,
        "note": "synthetic text: not comparable with published RULER",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def good(tmp_path):
    answers = [(0, "011 and 022"), (1, "111"), (2, "none")]
    rows = [{"id": f"niah-4096-{i}", "prediction": text} for i, text in answers]
    return write(tmp_path / "p.jsonl", rows)


@pytest.fixture
def invoke():
    app = typer.Typer()
    app.command()(score)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


def test_scores_by_hand(good, data):
    result = rescore(good, data)
    assert [r["score"] for r in result.rows] == [1, 0.5, 0]
    assert {r["cell"] for r in result.rows} == {"predictions"}
    assert (result.missing, result.echoes) == ({}, [])


def test_command_prints_the_table(good, data, invoke):
    result = invoke(good, "--data", data)
    assert result.exit_code == 0, result.output
    assert "50.0 [" in result.output
    assert "not comparable with published RULER" in result.output
    payload = json.loads(invoke(good, "--data", data, "--json").stdout)
    record = payload["records"][0]
    assert payload["schema_version"] == 1
    assert (record["cell"], record["task"], record["n"]) == ("predictions", "niah", 3)
    assert record["score"] == pytest.approx(50)


def test_our_own_rows_keep_cells_and_pairs(tmp_path, data):
    file = tmp_path / "predictions.jsonl"
    for i in range(3):
        pair = [("full", f"{i}11 {i}22"), ("shadowkv:rank=8", f"{i}11")]
        row = {"id": f"niah-4096-{i}", "pass": 0, "score": 0.123, "error": None}
        append_group(
            file,
            [row | {"cell": c, "method": c[:8].split(":")[0], "prediction": p} for c, p in pair],
        )
    result = rescore(file, data)
    assert [r["score"] for r in result.rows] == [1, 0.5] * 3
    from shadowkv_cli.summary import score_records

    method = next(r for r in score_records(result.rows) if r.cell == "shadowkv:rank=8")
    assert method.difference.estimate == pytest.approx(-50)
    # Filtered by hand, groups are not whole any more; no row may be lost.
    lines = [line for line in file.read_text().splitlines() if '"full"' in line]
    file.write_text("\n".join(lines))
    assert len(rescore(file, data).rows) == 3


def test_missing_samples_are_counted_and_exit_3(tmp_path, data, invoke):
    file = write(tmp_path / "p.jsonl", [{"id": "niah-4096-1", "prediction": "111 122"}])
    result = invoke(file, "--data", data)
    assert result.exit_code == 3
    assert "2 samples of the data have no prediction" in result.output
    assert "100.0 [" in result.output


def test_a_failed_row_is_incomplete_too(tmp_path, data, invoke):
    rows = [{"id": f"niah-4096-{i}", "prediction": None, "error": "oom"} for i in range(3)]
    rows[0] = {"id": "niah-4096-0", "prediction": "011 022"}
    result = invoke(write(tmp_path / "p.jsonl", rows), "--data", data)
    assert result.exit_code == 3
    assert "Failed samples, left out of the scores: predictions 2." in result.output


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "other-1", "prediction": ""}], r"p\.jsonl:1: the dataset has no sample 'other-1'"),
        ([{"id": "niah-4096-0", "prediction": ""}] * 2, r"p\.jsonl:2: a second prediction for"),
        ([{"id": "niah-4096-0"}], r"p\.jsonl:1: .*needs the field 'prediction'"),
        ([{"prediction": ""}], r"p\.jsonl:1: .*needs the field 'id'"),
        ([{"text": ""}], r"p\.jsonl' is not a file of predictions"),
        ([{"id": "niah-4096-0", "prediction": 3}], "must be a text or null"),
        ([], "holds no predictions"),
    ],
)
def test_bad_predictions_are_refused(tmp_path, data, rows, message):
    with pytest.raises(UsageError, match=message) as caught:
        rescore(write(tmp_path / "p.jsonl", rows), data)
    assert "\n" not in str(caught.value)


def test_bad_files_are_refused(tmp_path, data, good):
    with pytest.raises(UsageError, match="There are no predictions"):
        rescore(tmp_path / "nowhere.jsonl", data)
    with pytest.raises(UsageError, match="No data folder"):
        rescore(good, tmp_path / "nowhere")
    good.write_text(good.read_text() + "{oops}\n")
    with pytest.raises(ShadowKVError, match=r"p\.jsonl:4: broken row"):
        rescore(good, data)
    good.write_text("{oops}\n")
    with pytest.raises(UsageError, match=r"p\.jsonl' is not a file of predictions"):
        rescore(good, data)


def test_the_same_id_in_two_cells_or_passes_is_fine(tmp_path, data):
    row = {"id": "niah-4096-0", "prediction": "011"}
    rows = [row | {"cell": "full"}, row | {"method": "x"}, row | {"cell": "full", "pass": 1}]
    result = rescore(write(tmp_path / "p.jsonl", rows), data)
    assert result.missing == {"full": 2, "x": 2}


@pytest.mark.parametrize(
    ("prediction", "echo"),
    [
        ("011, 022", False),
        ("", False),
        ("The numbers for quick-fox are 011 and 022.", False),
        (QUESTION + PREFIX + " 011, 022", True),
        ("mentioned  in the\nprovided text?", False),
        ("magic numbers for quick-fox mentioned   in the\nprovided text? 011", True),
        (PREFIX.strip() + " 011", True),
    ],
)
def test_echoes(data, prediction, echo):
    sample = read_samples(Dataset.open(data))["niah-4096-0"]
    assert is_echo(prediction, sample) is echo, prediction


def test_command_warns_of_echoes(tmp_path, data, invoke):
    rows = [{"id": f"niah-4096-{i}", "prediction": PREFIX + " 0"} for i in range(3)]
    result = invoke(write(tmp_path / "p.jsonl", rows), "--data", data)
    assert result.exit_code == 0
    assert "Warning: 3 predictions contain the end of their prompt" in result.output
    assert "the first is niah-4096-0" in result.output
