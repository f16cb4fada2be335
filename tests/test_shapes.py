"""Models of a true size with random weights: times and memory of samples, never scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shadowkv_cli.catalogue.shapes import SHAPES
from shadowkv_cli.cli import run
from shadowkv_cli.results import read_run
from shadowkv_cli.tasks.tokenization import load_tokenizer

SIZES = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = len(load_tokenizer("demo"))
    monkeypatch.setitem(SHAPES, "tiny", SIZES | {"vocab_size": vocabulary + 5})
    monkeypatch.setitem(SHAPES, "few-words", SIZES | {"vocab_size": vocabulary - 1})


SMALL = ["--sparse-budget", "32", "--rank", "8"]


def command(kind: str, data: Path, output: Path, shape: str = "tiny") -> list[str]:
    what = ["--model", f"shape:{shape}", "--data", str(data), "--num-samples", "1"]
    return [kind, *what, *SMALL, "--output", str(output)]


def test_eval_prints_times_and_memory_and_no_scores(
    ruler_folder: Path, tmp_path: Path, capsys
) -> None:
    assert run(command("eval", ruler_folder, tmp_path / "e")) == 0
    printed = capsys.readouterr().out
    assert "Time and memory of the samples" in printed
    assert "prefill s" in printed
    assert "WARNING: RANDOM WEIGHTS" in printed
    assert "Score" not in printed
    made = read_run(tmp_path / "e")
    assert made.flag("random_weights")
    assert len(made.predictions) == 2 * 2
    for row in made.predictions:
        assert (row["prediction"], row["score"], row["error"]) == (None, None, None)
        assert row["generated_tokens"] > 0
        assert row["prefill_s"] > 0
        assert row["peak_memory_bytes"] > 0
    assert run([*command("eval", ruler_folder, tmp_path / "e"), "--json"]) == 0
    captured = capsys.readouterr()
    assert "nothing is left to run" in captured.err
    report = json.loads(captured.out)
    assert report["records"] == []
    (times,) = report["times"]
    assert times["prefills"] == 2
    assert times["cells"] == 2
    assert times["step_ms"] > 0


def test_sweep_times_its_cells_and_scores_none(ruler_folder: Path, tmp_path: Path, capsys) -> None:
    fast = ["--decode-steps", "4", "--rounds", "1", "--warmup-steps", "1"]
    fast += ["--bench-context-length", "512"]
    assert run([*command("sweep", ruler_folder, tmp_path / "s"), *fast]) == 0
    printed = capsys.readouterr().out
    assert "Decode throughput" in printed
    assert "Time and memory of the samples" in printed
    assert "Score" not in printed
    assert "Accuracy against throughput" not in printed


def test_bench_decodes_from_prompts_of_data(ruler_folder: Path, tmp_path: Path) -> None:
    bench = ["bench", "--model", "shape:tiny", "--data", str(ruler_folder), *SMALL]
    bench += ["--context-length", "1k", "--decode-steps", "4", "--rounds", "1"]
    assert run([*bench, "--output", str(tmp_path / "b")]) == 0
    rows = read_run(tmp_path / "b").throughput
    assert {row["attention_backend"] for row in rows} == {"flash"}


@pytest.mark.parametrize("kind", ["eval", "bench"])
def test_data_of_more_tokens_than_the_shape_has_are_refused(
    kind: str, ruler_folder: Path, tmp_path: Path, capsys
) -> None:
    arguments = command(kind, ruler_folder, tmp_path / "e", "few-words")
    if kind == "bench":
        arguments[arguments.index("--num-samples") :][:2] = []
        del arguments[arguments.index("--num-samples") : arguments.index("--num-samples") + 2]
        arguments += ["--context-length", "1k", "--decode-steps", "4"]
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert "The tokenizer demo has" in error
    assert error.count("\n") == 1


def test_plot_and_score_say_that_there_is_nothing(
    ruler_folder: Path, tmp_path: Path, capsys
) -> None:
    assert run(command("eval", ruler_folder, tmp_path / "e")) == 0
    capsys.readouterr()
    assert run(["plot", str(tmp_path / "e")]) != 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    rows = str(tmp_path / "e" / "predictions.jsonl")
    run(["score", rows, "--data", str(ruler_folder)])
    assert "failed" in capsys.readouterr().out


def test_a_dry_run_reads_the_data_with_their_tokenizer(
    ruler_folder: Path, tmp_path: Path, capsys
) -> None:
    arguments = [*command("eval", ruler_folder, tmp_path / "e"), "--dry-run", "--json"]
    assert run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["prefills"] == 2
    assert not (tmp_path / "e").exists()
