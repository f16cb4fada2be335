"""`shadowkv build-data ruler` from end to end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shadowkv_cli.catalogue.places import DEMO_TOKENIZER_DIR
from shadowkv_cli.cli import run
from shadowkv_cli.tasks.rows import Dataset
from shadowkv_cli.tasks.ruler.definitions import definitions
from shadowkv_cli.tasks.tokenization import (
    encode_prompt,
    load_tokenizer,
    tokenizer_fingerprint,
)

DATA = Path(__file__).parent / "data/ruler"
TASKS = list(definitions())
BASE = ["build-data", "ruler", "--tokenizer", "demo"]


def build(output: Path, *options: str) -> int:
    return run([*BASE, "--output", str(output), *options])


def content(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_all_tasks_from_the_command_line(tmp_path, capsys):
    output = tmp_path / "d"
    assert build(output, "--context-length", "4k", "--num-samples", "2") == 0
    shown = capsys.readouterr()
    assert "not comparable with published RULER" in shown.out
    assert "niah_multikey_3" in shown.out
    assert "qa_2 at 4096: 2/2" in shown.err
    data = Dataset.open(output)
    assert data.tasks == TASKS
    assert data.context_lengths == [4096]
    manifest = data.manifest
    assert manifest["synthetic"] is True
    assert manifest["comparable_with_published"] is False
    assert manifest["template"]["resolved"] == "base"
    assert manifest["wonderwords"] == "3.0.1"
    assert set(manifest["sources"]) == {"haystack", "squad", "hotpotqa"}
    assert str(tmp_path) not in json.dumps(manifest)
    for task in TASKS:
        samples = data.samples(4096, task)
        assert [s.id for s in samples] == [f"{task}-4096-{i}" for i in range(2)]
        fill = sum(s.length for s in samples) / 2 / 4096
        assert manifest["fill"]["4096"][task] == pytest.approx(fill, abs=1e-4)
        assert all(s.metric.startswith("string_match") for s in samples)


def test_the_number_of_workers_changes_no_byte(tmp_path):
    options = ("--context-length", "2k", "--num-samples", "5", "--tasks", "niah_multikey_1,qa_1,vt")
    assert build(tmp_path / "one", *options, "--num-workers", "1") == 0
    assert build(tmp_path / "two", *options, "--num-workers", "2") == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_more_samples_lengths_and_tasks_keep_the_rows(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    assert build(small, "--context-length", "2k", "--num-samples", "2", "--tasks", "vt,fwe") == 0
    before = content(small)
    fingerprint = Dataset.open(small).fingerprint()
    every = ("--context-length", "2048,3k", "--num-samples", "4", "--tasks", "niah_single_2,vt,fwe")
    assert build(small, *every) == 0
    assert build(large, *every) == 0
    assert content(small) == content(large)
    for name, rows in before.items():
        if name.endswith(".jsonl"):
            assert content(small)[name].startswith(rows), name
    assert Dataset.open(small).fingerprint() == fingerprint
    fewer = ("--context-length", "2k", "--num-samples", "1", "--tasks", "vt")
    assert build(small, *fewer) == 0
    assert content(small) == content(large), "asking for less takes nothing away"


def test_a_build_that_was_cut_continues_to_the_same_bytes(tmp_path, capsys):
    options = ("--context-length", "2k", "--num-samples", "4", "--tasks", "niah_single_2,vt,qa_1")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert build(whole, *options) == 0
    shutil.copytree(whole, cut)
    file = cut / "2048" / "vt.jsonl"
    file.write_bytes(file.read_bytes()[:-1000])
    (cut / "2048" / "qa_1.jsonl").unlink()
    manifest = json.loads((cut / "manifest.json").read_text())
    manifest["fill"] = {"2048": {"niah_single_2": manifest["fill"]["2048"]["niah_single_2"]}}
    (cut / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert build(cut, *options) == 0
    assert "removed a row that was cut off" in capsys.readouterr().err
    assert content(cut) == content(whole)


def test_kill_9_and_the_same_command_again(tmp_path):
    options = ["--context-length", "8k", "--num-samples", "40", "--tasks", "vt,niah_single_1"]
    command = [sys.executable, "-c", "from shadowkv_cli.cli import main; main()", *BASE, *options]
    output = tmp_path / "killed"
    rows = output / "8192" / "niah_single_1.jsonl"
    process = subprocess.Popen(
        [*command, "--output", str(output)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not (rows.exists() and rows.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert rows.stat().st_size
    assert not (output / "8192" / "vt.jsonl").exists(), "it was killed in its first task"
    assert build(output, *options) == 0
    assert build(tmp_path / "whole", *options) == 0
    assert content(output) == content(tmp_path / "whole")


def test_other_settings_are_refused_and_named(tmp_path, capsys):
    options = ("--context-length", "2k", "--num-samples", "1", "--tasks", "niah_single_2")
    assert build(tmp_path, *options) == 0
    before = content(tmp_path)
    for change, named in (
        (("--seed", "43"), "seed: 42 there, 43 here"),
        (("--template", "qwen"), "template: "),
        (("--essays", str(DATA / "essays.txt")), "source choice: "),
    ):
        capsys.readouterr()
        assert build(tmp_path, *options, *change) == 2
        message = capsys.readouterr().err
        assert named in message
        assert message.count("\n") == 1
    assert content(tmp_path) == before


def test_a_length_that_is_too_short_writes_nothing(tmp_path, capsys):
    output = tmp_path / "d"
    assert build(output, "--context-length", "8k,600", "--num-samples", "2") == 2
    message = capsys.readouterr().err
    assert "A context length of 600 cannot hold sample 0 of vt" in message
    assert message.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--tasks", "niah_single_9"],
            "Unknown task 'niah_single_9'. Did you mean 'niah_single_",
        ),
        (["--template", "lama-3"], "Unknown template 'lama-3'. Did you mean 'llama-3'"),
        (["--context-length", "4x"], "'4x' is no number of tokens"),
        (["--num-samples", "0"], "--num-samples must be at least 1"),
        (["--num-workers", "0"], "--num-workers must be at least 1"),
        (["--squad", "nowhere.json"], "Cannot read nowhere.json"),
        (["--sources", "web"], "--sources"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, options, message):
    given = [*BASE, "--output", str(tmp_path / "d"), "--context-length", "4k", *options]
    assert run(given) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "d").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "d").write_text("x")
    assert build(tmp_path / "d", "--context-length", "2k") == 2
    assert "is a file, not a folder" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_is_one_line(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert build(tmp_path / "d", "--context-length", "2k", "--tasks", "vt") == 1
    assert "No permission to write" in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_counts(tmp_path, capsys):
    options = ("--context-length", "2k", "--num-samples", "3", "--tasks", "vt,fwe")
    assert build(tmp_path / "d", *options, "--dry-run", "--json") == 0
    forecast = json.loads(capsys.readouterr().out)
    assert forecast["prompts"] == 6
    assert forecast["seconds"] > 0
    assert not (tmp_path / "d").exists()
    assert build(tmp_path / "d", *options) == 0
    size = sum(len(rows) for name, rows in content(tmp_path / "d").items() if "/" in name)
    assert forecast["bytes"] == pytest.approx(size, rel=0.05)
    capsys.readouterr()
    assert build(tmp_path / "d", *options, "--dry-run") == 0
    assert "Would be written" in capsys.readouterr().out


def test_json_is_one_object_on_stdout(tmp_path, capsys):
    options = ("--context-length", "2k", "--num-samples", "1", "--tasks", "niah_single_2")
    assert build(tmp_path, *options, "--json") == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["schema_version"] == 1
    assert result["rows"] == {"2048": {"niah_single_2": 1}}
    assert "not comparable" in result["note"]
    assert "not comparable" in shown.err


def test_a_configuration_file_gives_the_options(tmp_path):
    config = tmp_path / "build.yaml"
    config.write_text(
        "tokenizer: demo\ncontext-length: [2k]\nnum-samples: 2\ntasks: [vt]\nseed: 7\n"
        f"output: {tmp_path / 'd'}\n"
    )
    assert run(["build-data", "ruler", "--config", str(config), "--num-samples", "1"]) == 0
    data = Dataset.open(tmp_path / "d")
    assert data.manifest["seed"] == 7
    assert len(data.samples(2048, "vt")) == 1


def test_local_files_in_the_official_formats(tmp_path, capsys):
    files = ["--essays", str(DATA / "essays.txt"), "--squad", str(DATA / "squad.json")]
    files += ["--hotpotqa", str(DATA / "hotpotqa.json")]
    tasks = "niah_single_2,qa_1,qa_2"
    options = ("--context-length", "2k", "--num-samples", "2", "--tasks", tasks)
    assert build(tmp_path / "d", *options, *files) == 0
    data = Dataset.open(tmp_path / "d")
    assert data.manifest["note"] == ""
    assert data.manifest["comparable_with_published"] is True
    assert data.manifest["sentence_splitter"]
    essay = data.samples(2048, "niah_single_2")[0]
    assert "Nobody followed him. It rained. Tools shape" in essay.prompt, "the corpus goes on"
    first = data.samples(2048, "qa_1")[0]
    assert first.references == ["1612", "1612", "in 1612"]
    assert first.prompt.endswith("Question: When was the harbour of Quellmouth dug?")
    assert first.prompt.count("The harbour of Quellmouth was dug") > 1, "documents repeat"
    bridge = data.samples(2048, "qa_2")[0]
    assert "\nSigne Aas\nSigne Aas was born in Norway. She kept bees." in bridge.prompt
    assert build(tmp_path / "e", "--context-length", "2k", "--num-samples", "5", *files) == 2
    assert "use --num-samples 2 or less" in capsys.readouterr().err


def llama_like_tokenizer(folder: Path, chat_template: str | None) -> Path:
    """The demo tokenizer with Llama 3's special tokens, which are single ids in a prompt."""
    folder.mkdir()
    for file in DEMO_TOKENIZER_DIR.iterdir():
        text = file.read_text(encoding="utf-8").replace("<|bos|>", "<|begin_of_text|>")
        (folder / file.name).write_text(text.replace("<|eos|>", "<|eot_id|>"), encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "chat_template", "resolved", "header"),
    [
        ("auto", CHAT, "chat_template", "<|eot_id|>assistant:\n"),
        ("auto", None, "base", ""),
        ("llama-3", CHAT, "llama-3", "<|start_header_id|>assistant<|end_header_id|>"),
    ],
)
def test_bos_stands_once_and_the_prefix_behind_the_header(
    tmp_path, template, chat_template, resolved, header
):
    folder = llama_like_tokenizer(tmp_path / "tokenizer", chat_template)
    options = ["--tokenizer", str(folder), "--context-length", "8k", "--num-samples", "1"]
    options += ["--template", template, "--sources", "synthetic", "--output", str(tmp_path / "d")]
    assert run(["build-data", "ruler", *options]) == 0
    data = Dataset.open(tmp_path / "d")
    assert data.manifest["template"]["resolved"] == resolved
    tokenizer = load_tokenizer(str(folder))
    assert data.manifest["tokenizer"]["fingerprint"] == tokenizer_fingerprint(tokenizer)
    for task in TASKS:
        (sample,) = data.samples(8192, task)
        ids = encode_prompt(tokenizer, sample.text)
        assert ids.count(tokenizer.bos_token_id) == 1, task
        assert ids[0] == tokenizer.bos_token_id, task
        assert len(ids) == sample.prompt_tokens, task
        assert sample.prompt.endswith(header), task
        assert sample.answer_prefix.startswith(" "), task
        assert "You is" not in sample.prompt, task


def test_bare_build_data_prints_help(capsys):
    assert run(["build-data"]) == 0
    assert "ruler" in capsys.readouterr().out
