"""The command line itself: help, errors in one line, exit codes, configuration files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from shadowkv_cli.cli import app, run

COMMANDS = ["build-data", "eval", "score", "bench", "sweep", "plot", "doctor"]


def error_line(capsys) -> str:
    """The one line that a failure prints."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("shadowkv:")]
    assert len(lines) == 1, text
    return lines[0]


def test_bare_command_prints_help(capsys) -> None:
    assert run([]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


def test_the_package_runs_as_a_module_too() -> None:
    command = [sys.executable, "-m", "shadowkv_cli", "eval", "--model", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("shadowkv: "), done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    "command", [*COMMANDS, "build-data ruler", "build-data longbench", "build-data longbench-v2"]
)
def test_every_command_has_help_with_an_example(command: str, capsys) -> None:
    assert run([*command.split(), "--help"]) == 0
    assert "Example" in capsys.readouterr().out


def test_every_option_has_a_help_text() -> None:
    def check(command, path: str) -> None:
        for parameter in command.params:
            if parameter.name not in ("help", "install_completion", "show_completion"):
                assert getattr(parameter, "help", "x"), f"{path} --{parameter.name}"
        for name, child in getattr(command, "commands", {}).items():
            check(child, f"{path} {name}")

    check(typer.main.get_command(app), "shadowkv")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("evl", 2, "eval"),
        ("eval --model demo --data nowhere", 2, "nowhere"),
        ("eval --model demo --data DATA --method shadowkw", 2, "shadowkv"),
        ("eval --model demo --data DATA --tasks niah_singel_2", 2, "niah_single_2"),
        ("eval --model demo --data DATA --context-length 2k", 2, "1024"),
        ("eval --model demo --data DATA --context-length x", 2, "4096 or 4k"),
        ("eval --model demo --data DATA --rank 0", 2, "rank must be at least 1"),
        ("eval --model MODEL --data DATA --rank 160", 2, "key width 32"),
        ("eval --model demo --data DATA --rank many", 2, "must be a whole number, not 'many'"),
        ("eval --model demo --data DATA --sparse-budget 100", 2, "not divisible by chunk_size 8"),
        ("eval --model demo --data DATA --sparse-budget 0%", 2, "no sparse budget"),
        ("eval --model demo --data DATA --method full --rank 8", 2, "--rank has no effect"),
        ("eval --model demo --data DATA --method full,full", 2, "twice"),
        ("eval --model demo --data DATA --num-samples 0", 2, "--num-samples"),
        ("eval --model demo --data DATA --dtype int4", 2, "int4"),
        ("eval --model demo --data DATA --device tpu", 2, "tpu"),
        ("eval --model demo --data DATA --device cuda:99", 2, "cuda:99"),
        ("eval --model SHORT --data DATA --method full", 2, "max_position_embeddings 512"),
        ("eval --model OTHER --data DATA --method full", 2, "--allow-tokenizer-mismatch"),
        ("eval --model EMPTY --data DATA", 1, "EMPTY"),
        ("sweep --model demo --data DATA --chunk-size 8 --sparse-budget 64,12", 2, "12"),
        ("sweep --model MODEL --data DATA --rank 8,64 --no-throughput", 2, "key width 32"),
        ("bench --model MODEL --rank 8 --batch-size none", 2, "none"),
        ("bench --model MODEL --rank 8 --batch-size 1000000 --context-length 2k", 2, "are free"),
        ("bench --model MODEL --rank 8 --state prompts", 2, "--data"),
        ("bench --model MODEL --rank 8 --context-length 8k", 2, "max_position_embeddings 4096"),
        ("plot nowhere", 2, "nowhere"),
    ],
)
def test_bad_input_gets_one_line_and_its_code(
    arguments: str,
    code: int,
    says: str,
    capsys,
    tmp_path: Path,
    ruler_folder: Path,
    tiny_model_folder: Path,
    unfit_models: dict[str, Path],
) -> None:
    places = {"DATA": ruler_folder, "MODEL": tiny_model_folder, **unfit_models}
    words = [str(places.get(word, word)) for word in arguments.split()]
    if words[0] in ("eval", "sweep", "bench"):
        words += ["--output", str(tmp_path / "run")]
    assert run(words) == code, arguments
    line = error_line(capsys)
    assert str(places.get(says, says)) in line, line
    assert not (tmp_path / "run").exists(), "nothing is written before the input is right"


@pytest.fixture(scope="session")
def unfit_models(tmp_path_factory, tiny_model_folder: Path) -> dict[str, Path]:
    """A model with too short a context, one with another tokenizer, and a folder with neither."""
    root = tmp_path_factory.mktemp("unfit")
    for name in ("SHORT", "OTHER"):
        shutil.copytree(tiny_model_folder, root / name)
    config = root / "SHORT" / "config.json"
    values = json.loads(config.read_text()) | {"max_position_embeddings": 512}
    config.write_text(json.dumps(values))
    tokenizer = root / "OTHER" / "tokenizer.json"
    values = json.loads(tokenizer.read_text())
    values["model"]["merges"] = values["model"]["merges"][:-40]
    kept = list(values["model"]["vocab"].items())
    values["model"]["vocab"] = dict(kept[:-40])
    tokenizer.write_text(json.dumps(values))
    (root / "EMPTY").mkdir()
    return {name: root / name for name in ("SHORT", "OTHER", "EMPTY")}


def test_a_config_file_gives_defaults_and_the_command_line_wins(
    tmp_path: Path, capsys, ruler_folder: Path, tiny_model_folder: Path
) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text(
        f"model: {tiny_model_folder}\ndata: {ruler_folder}\nmethod: [full, shadowkv]\n"
        f"rank: 8\nsparse-budget: [32, 64]\nnum_samples: 3\ndry_run: true\njson: true\n"
    )
    assert run(["eval", "--config", str(file), "--num-samples", "1"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["samples"] == 2, "the command line wins"
    assert plan["cells"] == [
        "full",
        "shadowkv:sparse_budget=32,rank=8",
        "shadowkv:sparse_budget=64,rank=8",
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [("rnk: 3", "Did you mean 'rank'"), ("- a", "option: value"), ("a: [", "not valid YAML")],
)
def test_a_bad_config_file_is_one_line(tmp_path: Path, capsys, content: str, says: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    assert run(["eval", "--config", str(file), "--model", "demo", "--data", "x"]) == 2
    assert says in error_line(capsys)
    assert run(["eval", "--config", str(tmp_path / "none.yaml"), "--model", "m"]) == 2
    assert "none.yaml" in error_line(capsys)


def test_debug_shows_the_traceback(ruler_folder: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        run(["eval", "--model", "demo", "--data", "nowhere", "--debug"])


def test_a_cut_row_is_named(
    tmp_path: Path, capsys, ruler_folder: Path, tiny_model_folder: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(ruler_folder, data)
    file = data / "1024" / "vt.jsonl"
    file.write_bytes(file.read_bytes()[:-100])
    arguments = ["eval", "--model", str(tiny_model_folder), "--data", str(data), "--rank", "8"]
    assert run([*arguments, "--output", str(tmp_path / "r")]) == 2
    line = error_line(capsys)
    assert "vt.jsonl" in line
    assert "3" in line


def test_an_output_that_is_a_file_is_one_line(
    tmp_path: Path, capsys, ruler_folder: Path, tiny_model_folder: Path
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["eval", "--model", str(tiny_model_folder), "--data", str(ruler_folder)]
    assert run([*arguments, "--rank", "8", "--output", str(tmp_path / "file" / "run")]) == 2
    assert "--output" in error_line(capsys)
