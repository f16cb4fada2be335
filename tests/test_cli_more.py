"""What newcomers and judges tried on the command line and found wanting: one test each."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from shadowkv_cli.cli import run
from shadowkv_cli.config import parse_lengths
from shadowkv_cli.console import column_blocks, fold_name, print_table
from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.rowlog import write_failure
from shadowkv_cli.tasks.manifest import continue_manifest
from shadowkv_cli.tasks.row_file import lock_folder

BUILD = "build-data ruler --tokenizer demo --tasks vt --num-samples 2 --context-length"


def only_line(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# Data


def test_a_length_given_in_two_ways_is_built_once(tmp_path: Path) -> None:
    assert run([*BUILD.split(), "1k,1024", "--output", str(tmp_path / "d")]) == 0
    lines = (tmp_path / "d" / "1024" / "vt.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1]
    assert parse_lengths(["4k", "4096,1k"], "--context-length") == (4096, 1024)


def test_two_builds_do_not_write_to_one_folder(tmp_path: Path, capsys) -> None:
    with lock_folder(tmp_path):
        assert run([*BUILD.split(), "1k", "--output", str(tmp_path)]) == 1
        with pytest.raises(ShadowKVError, match="Another shadowkv process"), lock_folder(tmp_path):
            pass
    assert "Another shadowkv process is writing" in only_line(capsys)
    assert list(tmp_path.iterdir()) == []
    assert run([*BUILD.split(), "1k", "--output", str(tmp_path)]) == 0, "free again"


def test_rows_that_came_meanwhile_stop_a_build(tmp_path: Path) -> None:
    from shadowkv_cli.tasks.ruler.build import RulerBuild, RulerConfig

    config = RulerConfig(
        tokenizer="demo", context_lengths=(1024,), num_samples=1, output=tmp_path, tasks=("vt",)
    )
    first, second = RulerBuild(config), RulerBuild(config)
    first.run()
    with pytest.raises(ShadowKVError, match="meanwhile"):
        second.run()


def test_an_absurd_length_is_refused_at_once(tmp_path: Path, capsys) -> None:
    assert run([*BUILD.split(), "300m", "--output", str(tmp_path / "d")]) == 2
    assert "314572800" in only_line(capsys)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("how", ["repeated", "swapped"])
def test_rows_out_of_place_are_refused(how: str, ruler_folder: Path, tmp_path, capsys) -> None:
    folder = shutil.copytree(ruler_folder, tmp_path / "d")
    file = folder / "1024" / "vt.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines, lines[0]] if how == "repeated" else lines[::-1]))
    assert run(["eval", "--model", "demo", "--data", str(folder)]) == 2
    assert f"vt.jsonl line {4 if how == 'repeated' else 1} is not the row" in only_line(capsys)


def test_an_unknown_metric_is_refused_before_a_prefill(ruler_folder, tmp_path, capsys) -> None:
    folder = shutil.copytree(ruler_folder, tmp_path / "d")
    file = folder / "1024" / "vt.jsonl"
    file.write_text(file.read_text().replace('"string_match_all"', '"nope"', 1))
    output = tmp_path / "run"
    assert run(["eval", "--model", "demo", "--data", str(folder), "--output", str(output)]) == 2
    assert "Unknown metric 'nope' of sample vt-1024-0" in only_line(capsys)
    assert not output.exists()


def test_a_run_is_no_dataset_and_a_dataset_no_run(ruler_folder, tmp_path, capsys) -> None:
    assert run(["plot", str(ruler_folder)]) == 2
    assert "is not the manifest of a run" in only_line(capsys)
    (tmp_path / "manifest.json").write_text('{"identity": {}}')
    assert run([*BUILD.split(), "1k", "--output", str(tmp_path)]) == 2
    assert "is not the manifest of a dataset" in only_line(capsys)


def test_another_suites_dataset_is_named_as_such(ruler_folder, tmp_path, capsys) -> None:
    with pytest.raises(UsageError, match=r"another suite \(ruler, not longbench\): choose another"):
        continue_manifest(ruler_folder, {"suite": "longbench", "sources": {}})
    other = {"suite": "longbench", "tasks": ["qasper"], "context_lengths": [4096]}
    (tmp_path / "manifest.json").write_text(json.dumps(other))
    assert run([*BUILD.split(), "1k", "--output", str(tmp_path)]) == 2
    line = only_line(capsys)
    assert f"{tmp_path} holds a dataset of another suite (longbench, not ruler)" in line
    assert line.endswith("choose another --output.")


PARENT = """
from multiprocessing import get_context
from shadowkv_cli.processes import _end_with_parent

child = get_context("spawn").Process(target=_end_with_parent)
child.start()
print(child.pid, flush=True)
child.join()
"""


def test_workers_end_when_the_main_process_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    status = Path(f"/proc/{worker}/stat")
    end = time.monotonic() + 20
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    alive = status.exists() and status.read_text().split()[2] != "Z"
    if alive:
        os.kill(worker, signal.SIGKILL)
    assert not alive, "the worker outlived its main process"


# Models


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("more layers", "does not hold the weights model.layers.2"),
        ("wider", "another shape than its config.json says"),
        ("cut off", "safetensors are cut off or damaged"),
        ("no tokenizer", "holds no tokenizer"),
    ],
)
def test_a_broken_model_folder(
    fault: str, says: str, tiny_model_folder, ruler_folder, tmp_path, capsys
) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    config, weights = folder / "config.json", folder / "model.safetensors"
    values = json.loads(config.read_text())
    if fault == "more layers":
        values["num_hidden_layers"] = 3
    elif fault == "wider":
        values["intermediate_size"] = 192
    elif fault == "cut off":
        weights.write_bytes(weights.read_bytes()[:10_000])
    else:
        for file in folder.glob("tokenizer*"):
            file.unlink()
    config.write_text(json.dumps(values))
    output = tmp_path / "run"
    command = ["eval", "--model", str(folder), "--data", str(ruler_folder), "--method", "full"]
    capsys.readouterr()
    assert run([*command, "--output", str(output)]) == 1
    assert says in only_line(capsys)
    assert not output.exists()


def test_one_missing_weight_is_enough(tiny_model_folder, ruler_folder, tmp_path, capsys) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert run(["eval", "--model", str(folder), "--data", str(ruler_folder)]) == 1
    assert "model.norm.weight; they would be random" in only_line(capsys)


# Options


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--rank ,", "--rank is empty"),
        ("--tasks ,", "--tasks is empty"),
        ("--method ,", "--method is empty"),
        ("--context-length ,", "--context-length is empty"),
        ("--context-length 4g", "--context-length: '4g'"),
        ("--sparse-budget 0.5", "a share of the prompt like 1.5625%"),
        ("--value-buffer 1e308", "value_buffer"),
        ("--revision main", "--revision has no effect"),
        ("--method shadowkv:rank=8 --rank 16", "sets its own rank"),
        ("--tasks vtt", "Unknown task 'vtt' in "),
        ("--method shadowkv:rnk=8", "Unknown setting 'rnk' of method 'shadowkv'"),
        ("--num-samples many", "must be a valid integer, not 'many'"),
        ("--dtype int4", "'--dtype': 'int4' is not one of"),
    ],
)
def test_eval_options_in_one_line(arguments: str, says: str, ruler_folder, capsys) -> None:
    command = ["eval", "--model", "demo", "--data", str(ruler_folder), "--dry-run"]
    assert run([*command, *arguments.split()]) == 2
    assert says in only_line(capsys)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("bench --model demo --state synthetic --data d", "--data has no effect"),
        ("bench --model demo --state synthetic --attention-backend math", "no effect"),
        ("sweep --model demo --data d --no-throughput --rounds 3", "--no-throughput"),
        ("sweep --model demo --data d --no-throughput --bench-batch-size 2", "--no-throughput"),
        ("build-data ruler --tokenizer demo --context-length 1k --revision x --output d", "demo"),
        ("eval --model demo", "see `shadowkv eval --help`"),
        ("nothing", "see `shadowkv --help`"),
        ("plot x --dpi 5", "not '5'"),
    ],
)
def test_options_without_effect_and_mistakes(command: str, says: str, capsys) -> None:
    assert run(command.split()) == 2
    assert says in only_line(capsys)


@pytest.mark.parametrize("value", ["", ",", " , "])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(("bench", name) for name in ("--batch-size", "--context-length", "--method", "--rank")),
        *(("bench", name) for name in ("--lanes", "--micro-batches", "--hit-rate", "--graph")),
        *(("sweep", f"--bench-{name}") for name in ("batch-size", "context-length")),
        *(("sweep", name) for name in ("--tasks", "--sparse-budget")),
        *(("eval", name) for name in ("--tasks", "--context-length", "--value-placement")),
    ],
)
def test_a_list_that_holds_nothing_is_refused(command, option, value, tmp_path, capsys) -> None:
    words = [command, "--model", "demo", option, value, "--output", str(tmp_path / "run")]
    words += [] if command == "bench" else ["--data", "d"]
    assert run(words) == 2
    said = f"shadowkv: {option} is empty: give it a value, or leave it out."
    assert only_line(capsys) == said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["build-data ruler", "eval", "bench", "sweep", "plot"])
def test_no_option_shows_a_python_type(command: str, capsys) -> None:
    assert run([*command.split(), "--help"]) == 0
    shown = re.findall(r"--\S+ <(?:str|int|float|list|path)\S*", capsys.readouterr().out)
    assert not shown, shown


def test_help_lists_the_commands_as_they_are_used(capsys) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    order = ["build-data", "eval", "score", "bench", "sweep", "plot", "doctor"]
    places = [text.index(f"\n  {name} ") for name in order]
    assert places == sorted(places)
    assert "..." not in text.split("Commands:")[1], "no description is cut off"


# Configuration files


@pytest.mark.parametrize("command", ["score", "plot", "doctor"])
def test_every_command_reads_a_configuration(command: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "c.yaml").write_text("nonsense: 1\n")
    assert run([command, "--config", str(tmp_path / "c.yaml")]) == 2
    assert "unknown name 'nonsense'" in only_line(capsys)


def test_names_of_a_configuration_are_those_of_the_options(tmp_path, capsys) -> None:
    (tmp_path / "run").mkdir()
    manifest = {"schema_version": 1, "identity": {}, "kind": "eval"}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "c.yaml").write_text("list: true\njson: true\n")
    assert run(["plot", str(tmp_path / "run"), "--config", str(tmp_path / "c.yaml")]) == 0
    assert "plots" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("model: [a, b]", "model takes one value, not a list"),
        ("rank: {a: 1}", "write plain values"),
        ("rank: [[1, 2], [3]]", "write plain values"),
        ("method: [shadowkv: 1]", "write plain values"),
        ("num-samples: true", "num-samples is no flag"),
        ("json: 'yes'", "json must be true or false"),
    ],
)
def test_wrong_types_in_a_configuration(content, says, tmp_path, ruler_folder, capsys) -> None:
    (tmp_path / "c.yaml").write_text(content)
    command = ["eval", "--model", "demo", "--data", str(ruler_folder), "--dry-run"]
    assert run([*command, "--config", str(tmp_path / "c.yaml")]) == 2
    assert says in only_line(capsys)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("rank: 8\nrank: 16\n", "rank"),
        ("rank: 8\nnum-samples: 1\nrank: 8\n", "rank"),
        ("num_samples: 1\nnum-samples: 2\n", "num-samples"),
        ("rank: null\nrank: 8\n", "rank"),
    ],
)
def test_a_key_that_stands_twice_in_a_configuration(content, key, tmp_path, capsys) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    assert run(["eval", "--model", "demo", "--data", "d", "--config", str(file)]) == 2
    said = f"shadowkv: The configuration {file} gives '{key}' twice: keep one of them."
    assert only_line(capsys) == said


@pytest.mark.parametrize("content", ["", "rank: null\n"])
def test_empty_values_of_a_configuration_are_left_out(content, tmp_path, ruler_folder) -> None:
    (tmp_path / "c.yaml").write_text(content)
    command = ["eval", "--model", "demo", "--data", str(ruler_folder), "--dry-run"]
    assert run([*command, "--config", str(tmp_path / "c.yaml")]) == 0


# Predictions of other tools


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("id,prediction\nvt-1024-0,x\n", "is not a file of predictions"),
        ('[{"id": "vt-1024-0", "prediction": "x"}]', "is not a file of predictions"),
        ('{\n  "schema_version": 1,\n  "kind": "eval"\n}\n', "is not a file of predictions"),
        ('{"schema_version": 1, "kind": "eval"}\n', "is not a file of predictions"),
        ('{"id": ["a"], "prediction": "x"}', "the field 'id' must be a text"),
        ('{"id": "vt-1024-0", "prediction": "x", "audit": 7}', "'audit' must be an object"),
        ('{"id": "vt-1024-0", "prediction": "x", "pass": "a"}', "'pass' must be a whole number"),
        ('{"id": "vt-1024-0", "prediction": "x", "hit_rate": "a"}', "'hit_rate' must be a number"),
    ],
)
def test_predictions_of_wrong_types(content, says, tmp_path, ruler_folder, capsys) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    assert run(["score", str(tmp_path / "p.jsonl"), "--data", str(ruler_folder)]) == 2
    assert says in only_line(capsys)


def test_blank_lines_and_a_missing_last_newline_are_no_matter(tmp_path, ruler_folder, capsys):
    rows = [json.dumps({"id": f"vt-1024-{i}", "prediction": "x"}) for i in range(3)]
    (tmp_path / "p.jsonl").write_text("\ufeff" + "\n\n".join(rows))
    assert run(["score", str(tmp_path / "p.jsonl"), "--data", str(ruler_folder)]) == 3
    out = capsys.readouterr().out
    assert "vt" in out
    assert "attended" not in out, "nothing is known about what was attended"


# Tables


def table_text(monkeypatch, capsys, columns: int, *table) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    print_table(*table)
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_tables_fit_the_terminal_and_break_no_number(columns: int, monkeypatch, capsys) -> None:
    names = ["full", "shadowkv:sparse_budget=64,rank=16", "shadowkv:sparse_budget=128,rank=16"]
    rows = [[name, "1,019", "522.2 kB", "+0.0 [-38.0, +38.0]", "12%"] for name in names]
    heads = ["cell", "attended", "device", "to full", "hits"]
    text = table_text(monkeypatch, capsys, columns, "Title", heads, rows)
    assert max(map(len, text.splitlines())) <= columns
    for value in rows[0][1:]:
        assert text.count(value) == 3, (value, text)
    assert "rank=16" in text


def test_a_column_of_words_is_not_set_to_the_right(monkeypatch, capsys) -> None:
    rows = [["frontier", "yes", "1"], ["batch", "needs more", "20"]]
    text = table_text(monkeypatch, capsys, 80, "Plots", ["plot", "possible", "n"], rows)
    assert re.search(r"frontier +yes +1 *$", text, re.M)
    yes, needs = (next(x for x in text.splitlines() if w in x).index(w) for w in ("yes", "needs"))
    assert yes == needs


def test_folding_and_blocks() -> None:
    assert fold_name("shadowkv:sparse_budget=64,rank=16", 20) == (
        "shadowkv:\nsparse_budget=64,\nrank=16"
    )
    assert fold_name("", 5) == ""
    assert fold_name("abcdefgh", 3) == "abc\ndef\ngh"
    assert column_blocks([10, 20, 20, 20], 60) == [[0, 1, 2], [0, 3]]
    assert column_blocks([10], 60) == [[0]]
    assert column_blocks([10, 90], 60) == [[0, 1]], "a wide column has a block to itself"


# Output and interruption


@pytest.mark.parametrize("number", [13, 30])
def test_a_place_that_cannot_be_written_is_a_usage_error(number: int, tmp_path: Path) -> None:
    error = write_failure(tmp_path, OSError(number, os.strerror(number)))
    assert isinstance(error, UsageError)
    assert "another --output" in str(error)


def test_ctrl_c_reaches_workers_through_the_main_process_only(tmp_path: Path) -> None:
    command = "build-data ruler --tokenizer demo --tasks vt --num-samples 5000 --num-workers 2 "
    command += f"--context-length 4k --output {tmp_path / 'd'}"
    code = "import sys; from shadowkv_cli.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command.split()],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, and so would what pytest starts among them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    file = tmp_path / "d" / "manifest.json"
    end = time.monotonic() + 60
    while not file.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.3)  # the workers are starting
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert error.strip().splitlines()[-1].startswith("Interrupted: what was finished is saved")
