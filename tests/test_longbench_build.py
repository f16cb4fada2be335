"""`shadowkv build-data longbench` and `longbench-v2` from end to end, on made-up files."""

import hashlib
import importlib.util
import json
import shutil
import zipfile
from pathlib import Path

import pytest

from shadowkv_cli.answering import until
from shadowkv_cli.cli import run
from shadowkv_cli.tasks.longbench.definitions import all_tasks, longbench_sets, set_of
from shadowkv_cli.tasks.longbench.items import v2_item
from shadowkv_cli.tasks.longbench.prompts import context_length_for, cut_middle
from shadowkv_cli.tasks.metrics import METRICS, score
from shadowkv_cli.tasks.package_data import read_yaml
from shadowkv_cli.tasks.rows import Dataset
from shadowkv_cli.tasks.tokenization import encode_prompt, load_tokenizer

_spec = importlib.util.spec_from_file_location(
    "longbench_files", Path(__file__).parent / "longbench_files.py"
)
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)

PROMPTS_SHA256 = "b832f885abb0c2ee016f66cbeb0b64fbe3a5b50b8d27af68e115a298075cec42"
"""Of name and prompt of all sets by name, as in LongBench's dataset2prompt.json."""


def build(output: Path, *options: str, suite: str = "longbench") -> int:
    return run(["build-data", suite, "--tokenizer", "demo", "--output", str(output), *options])


def content(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def one_line(capsys) -> str:
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("shadowkv:")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return files.write_v1(tmp_path_factory.mktemp("source") / "data")


def test_prompts_and_lengths_are_the_official_ones():
    sets = longbench_sets()
    prompts = json.dumps([[k, sets[k].prompt] for k in sorted(sets)], ensure_ascii=False)
    assert hashlib.sha256(prompts.encode()).hexdigest() == PROMPTS_SHA256
    assert len(sets) == 21
    assert len(all_tasks(e=True)) == 13
    assert sum(entry.rows for entry in sets.values()) == 4750
    assert sum(entry.rows_e or 0 for entry in sets.values()) == 10 * 300 + 150 + 224 + 294
    assert sum(entry.max_new_tokens for entry in sets.values()) == 3168
    without = {name for name, entry in sets.items() if not entry.chat_template}
    assert without == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {entry.metric for entry in sets.values()} <= METRICS.keys()
    for text in read_yaml("longbench/prompts_v2.yaml")["prompts"].values():
        assert text.endswith('"The correct answer is (insert answer here)".')


def test_all_sets_from_the_archive(source, tmp_path, capsys):
    archive, output = files.write_zip(tmp_path / "data.zip", source), tmp_path / "d"
    assert build(output, "--source", str(archive), "--template", "qwen") == 0
    shown = capsys.readouterr()
    assert "repobench-p at 32768: 3/3" in shown.err
    assert "does not hold all published rows" in shown.err
    assert "Not comparable with published longbench" in shown.out
    data = Dataset.open(output)
    assert data.tasks == all_tasks(e=False)
    assert data.context_lengths == [32768]
    assert str(tmp_path) not in json.dumps(data.manifest)
    tokenizer = load_tokenizer("demo")
    for task in data.tasks:
        entry = set_of(task)
        for number, sample in enumerate(data.samples(32768, task)):
            row = files.v1_row(task, number)
            plain = entry.prompt.format(**row)
            assert sample.id == f"{task}-{number}"
            assert sample.references == row["answers"]
            assert sample.prompt_tokens == len(encode_prompt(tokenizer, sample.text))
            assert sample.max_new_tokens == entry.max_new_tokens
            assert plain in sample.prompt
            assert (sample.prompt == plain) == (not entry.chat_template), task
            before, after = (sample.prompt[: sample.question_start], entry.prompt)
            assert before.endswith(row["context"]), task
            assert after.partition("{context}")[2].format(**row) in sample.prompt
            best = score(row["answers"][-1], sample)
            assert best == pytest.approx(1, abs=1e-6), task


@pytest.mark.parametrize("form", ["archive", "folder", "above", "file"])
def test_every_form_of_source_gives_the_same_rows(form, source, tmp_path):
    given = {
        "archive": lambda: files.write_zip(tmp_path / "data.zip", source),
        "folder": lambda: source,
        "above": lambda: source.parent,
        "file": lambda: source / "qasper.jsonl",
    }[form]()
    options = ("--tasks", "qasper")
    assert build(tmp_path / "a", "--source", str(given), *options) == 0
    assert build(tmp_path / "b", "--source", str(source), *options) == 0
    for name, rows in content(tmp_path / "b").items():
        if name.endswith(".jsonl"):
            assert content(tmp_path / "a")[name] == rows


def test_longbench_e_is_averaged_by_length_too(tmp_path):
    source, output = files.write_v1(tmp_path / "s", e=True), tmp_path / "d"
    assert build(output, "--source", str(source), "--e", "--tasks", "qasper,lcc_e") == 0
    data = Dataset.open(output)
    assert data.tasks == ["qasper_e", "lcc_e"]
    assert data.manifest["suite"] == "longbench-e"
    assert data.manifest["comparable_with_published"] is False
    assert "fewer samples than published in 2 of 2" in data.manifest["note"]
    assert [s.groups for s in data.samples(32768, "lcc_e")] == [["0-4k"], ["4-8k"], ["8k+"]]


@pytest.mark.parametrize(("language", "count"), [("en", 16), ("zh", 7), ("all", 21)])
def test_code_counts_as_both_languages(language, count, source, tmp_path):
    options = ("--source", str(source), "--language", language, "--num-samples", "1")
    assert build(tmp_path, *options) == 0
    tasks = Dataset.open(tmp_path).tasks
    assert len(tasks) == count
    assert tasks[-2:] == ["lcc", "repobench-p"]


def test_a_build_that_was_cut_continues_to_the_same_bytes(source, tmp_path, capsys):
    options = ("--source", str(source), "--tasks", "qasper,lcc")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert build(whole, *options) == 0
    shutil.copytree(whole, cut)
    file = cut / "32768" / "qasper.jsonl"
    file.write_bytes(file.read_bytes()[:-50])
    (cut / "32768" / "lcc.jsonl").unlink()
    with pytest.raises(Exception, match="interrupted"):
        Dataset.open(cut).samples(32768, "lcc")
    assert build(cut, *options) == 0
    assert content(cut) == content(whole)
    small = tmp_path / "small"
    assert build(small, "--source", str(source), "--tasks", "qasper", "--num-samples", "1") == 0
    assert build(small, *options) == 0, "more sets and samples may follow"
    rows = {k: v for k, v in content(whole).items() if k.endswith(".jsonl")}
    assert {k: v for k, v in content(small).items() if k.endswith(".jsonl")} == rows


def test_other_settings_are_refused_and_named(source, tmp_path, capsys):
    options = ("--source", str(source), "--tasks", "gov_report")
    assert build(tmp_path / "d", *options) == 0
    other = files.write_v1(tmp_path / "other", rows=2)
    for change, named in (
        (("--max-length", "4k"), "max length: 31500 there, 4096 here"),
        (("--min-length", "100"), "min length"),
        (("--compat", "official"), "rouge: true there, official here"),
        (("--template", "qwen"), "template"),
        (("--source", str(other)), "gov report: "),
    ):
        capsys.readouterr()
        assert build(tmp_path / "d", *options, *change) == 2
        assert named in one_line(capsys)


def test_compat_official_names_the_other_metric(source, tmp_path):
    options = ("--source", str(source), "--tasks", "gov_report,vcsum,qasper")
    assert build(tmp_path, *options, "--compat", "official") == 0
    data = Dataset.open(tmp_path)
    metrics = [data.samples(32768, task)[0].metric for task in data.tasks]
    assert metrics == [
        "longbench_qa_f1",
        "longbench_rouge_official",
        "longbench_rouge_zh_official",
    ]


def test_long_prompts_lose_their_middle_and_short_ones_can_be_left_out(source, tmp_path, capsys):
    tokenizer, entry = load_tokenizer("demo"), set_of("qasper")
    plain = [entry.prompt.format(**files.v1_row("qasper", i)) for i in range(3)]
    tokens = [len(encode_prompt(tokenizer, text)) for text in plain]
    options = ("--source", str(source), "--tasks", "qasper,trec")
    limits = ("--min-length", str(tokens[1]), "--max-length", str(tokens[1] + 7))
    assert build(tmp_path, *options, *limits) == 0
    data = Dataset.open(tmp_path)
    length = data.context_lengths[0]
    assert length % 1024 == 0
    first, second = data.samples(length, "qasper")
    assert (first.id, second.id) == ("qasper-1", "qasper-2")
    assert first.prompt == plain[1]
    half = (tokens[1] + 7) // 2
    ids = encode_prompt(tokenizer, plain[2])
    parts = [tokenizer.decode(i, skip_special_tokens=True) for i in (ids[:half], ids[-half:])]
    assert second.prompt == "".join(parts)
    assert second.prompt[second.question_start :].startswith("\n\n Answer the question based")
    assert "only prompts of at least" in data.manifest["note"]


@pytest.mark.parametrize(
    ("official", "window"), [(31500, 32768), (15500, 16384), (7500, 8192), (3500, 4096)]
)
def test_official_lengths_come_to_the_windows_they_were_made_for(official, window):
    assert context_length_for(official, 512, 0) == window


def test_a_cut_text_keeps_its_ends():
    tokenizer = load_tokenizer("demo")
    text = " ".join(f"word{i}" for i in range(200))
    cut, lost = cut_middle(tokenizer, text, 101)
    assert cut.startswith("word0 word1")
    assert cut.endswith("word199")
    assert lost == len(encode_prompt(tokenizer, text)) - 100
    assert cut_middle(tokenizer, text, 10_000) == (text, 0)


def test_prompts_that_lost_their_middle_are_counted(source, tmp_path, capsys):
    options = ("--source", str(source), "--max-length", "500", "--tasks", "qasper,hotpotqa")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert build(whole, *options) == 0
    assert "lost middle" in capsys.readouterr().out
    data = Dataset.open(whole)
    (length,) = data.context_lengths
    tokenizer = load_tokenizer("demo")
    rows = {task: data.samples(length, task) for task in data.tasks}
    counts = {t: sum(s.middle_tokens_cut is not None for s in own) for t, own in rows.items()}
    assert data.manifest["lost_middle"] == {str(length): counts}
    assert all(0 < count < 3 for count in counts.values()), counts
    for sample in rows["qasper"]:
        text = set_of("qasper").prompt.format(**files.v1_row("qasper", sample.index))
        excess = len(encode_prompt(tokenizer, text)) - 500
        assert sample.middle_tokens_cut == (excess if excess > 0 else None)
    assert build(parts, *options, "--num-samples", "2") == 0
    assert build(parts, *options, "--tasks", "qasper") == 0
    assert content(parts) == content(whole), "continued, it counts the same"


def test_dry_run_and_json(source, tmp_path, capsys):
    options = ("--source", str(source), "--tasks", "qasper", "--json")
    assert build(tmp_path / "d", *options, "--dry-run") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["prompts"] == 3
    assert plan["tokens"] > 100
    assert not (tmp_path / "d").exists()
    assert build(tmp_path / "d", *options) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["rows"] == {"32768": {"qasper": 3}}


def bad_zip(path: Path, source: Path, how: str) -> Path:
    files.write_zip(path, source)
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    if how == "damaged":
        with zipfile.ZipFile(path) as archive:
            place = archive.getinfo("data/qasper.jsonl").header_offset
        data[place + 60 : place + 80] = bytes(20)
        path.write_bytes(data)
    if how in ("huge", "lying"):
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo("data/qasper.jsonl").file_size
        entry = data.rindex(b"data/qasper.jsonl")
        claimed = 4_100_000_000 if how == "huge" else size // 2
        data[entry - 46 + 24 : entry - 46 + 28] = claimed.to_bytes(4, "little")
        path.write_bytes(data)
    if how == "outside":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../qasper.jsonl", "{}")
    return path


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", "cut off"),
        ("damaged", "damaged"),
        ("huge", "would unpack to 4,100,000,000 bytes"),
        ("lying", "damaged"),
        ("outside", "holds no qasper.jsonl"),
    ],
)
def test_bad_archives_are_one_line(how, says, source, tmp_path, capsys):
    archive = bad_zip(tmp_path / "data.zip", source, how)
    assert build(tmp_path / "d", "--source", str(archive), "--tasks", "qasper") == 2
    assert says in one_line(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.zip"], "nothing was unpacked"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answers": []}, "row 1: 'answers' is not what LongBench has"),
        ({"answers": None}, "'answers'"),
        ({"context": ...}, "has no column 'context'"),
        ({"input": 3}, "'input'"),
    ],
)
def test_wrong_rows_are_one_line(change, says, tmp_path, capsys):
    row = files.v1_row("qasper", 0) | change
    row = {k: v for k, v in row.items() if v is not ...}
    file = tmp_path / "qasper.jsonl"
    file.write_text(json.dumps(row) + "\n")
    assert build(tmp_path / "d", "--source", str(file), "--tasks", "qasper") == 2
    assert says in one_line(capsys)


@pytest.mark.parametrize(
    ("task", "answers"), [("passage_retrieval_en", ["three"]), ("passage_retrieval_zh", ["3"])]
)
def test_a_gold_paragraph_without_a_number_is_one_line(task, answers, tmp_path, capsys):
    (tmp_path / f"{task}.jsonl").write_text(
        json.dumps(files.v1_row(task, 0) | {"answers": answers})
    )
    assert build(tmp_path / "d", "--source", str(tmp_path), "--tasks", task) == 2
    assert "no number behind" in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tasks", "quasper"], "Did you mean 'qasper'"),
        (["--tasks", "qasper", "--language", "zh"], "of the language zh"),
        (["--tasks", "qasper", "--max-length", "10"], "--max-length must be from 64"),
        (["--tasks", "qasper", "--min-length", "x"], "--min-length"),
        (["--tasks", "qasper", "--min-length", "1m"], "No sample has --min-length"),
        (["--tasks", "qasper", "--num-samples", "0"], "--num-samples must be at least 1"),
        (["--tasks", "qasper", "--source", "/nowhere"], "There is no --source"),
    ],
)
def test_wrong_options_are_one_line(options, says, source, tmp_path, capsys):
    assert build(tmp_path / "d", "--source", str(source), *options) == 2
    assert says in one_line(capsys)
    assert not (tmp_path / "d").exists()


def test_the_hub_is_asked_once_and_explained_where_it_is_not_there(
    source, tmp_path, monkeypatch, capsys
):
    import huggingface_hub

    archive = files.write_zip(tmp_path / "data.zip", source)
    asked = []

    def download(repository, name, *, repo_type):
        asked.append((repository, name, repo_type))
        return str(archive)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert build(tmp_path / "d", "--tasks", "qasper", "--offline") == 0
    assert asked == [("THUDM/LongBench", "data.zip", "dataset")]
    name = Dataset.open(tmp_path / "d").manifest["sources"]["qasper"]["name"]
    assert name == "THUDM/LongBench"

    def fail(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    capsys.readouterr()
    assert build(tmp_path / "e", "--tasks", "qasper", "--offline") == 1
    assert "give it with --source" in one_line(capsys)


def test_v2_asks_as_officially(tmp_path, capsys):
    source, output = files.write_v2(tmp_path / "data.json"), tmp_path / "d"
    assert build(output, "--source", str(source), suite="longbench-v2") == 0
    assert "longbench-v2 6 of 503" in capsys.readouterr().err
    data = Dataset.open(output)
    samples = data.samples(data.context_lengths[0], "longbench-v2")
    assert [s.references[0] for s in samples] == list("ABCDAB")
    assert [s.groups for s in samples][:2] == [["easy", "short"], ["hard", "medium"]]
    first = samples[0]
    assert first.prompt.startswith("Please read the following text and answer the question below.")
    assert "<text>\nBox 0 is red." in first.prompt
    assert "question: Which box is red?\nChoices:\n(A) box A\n(B) box B" in first.prompt
    assert first.prompt[first.question_start :].startswith("\n</text>")
    assert first.max_new_tokens == 128
    assert score("**The correct answer is (A)**", first) == 1.0
    assert score("A", first) == 0.0


def test_v2_without_the_document_is_told_apart(tmp_path, capsys):
    source, output = files.write_v2(tmp_path / "data.json"), tmp_path / "d"
    options = ("--source", str(source), "--prompt")
    assert build(output, *options, "no-context", suite="longbench-v2") == 0
    data = Dataset.open(output)
    assert "without the documents" in data.manifest["note"]
    first = data.samples(data.context_lengths[0], "longbench-v2")[0]
    assert "is red." not in first.prompt
    assert first.question_start == 0
    capsys.readouterr()
    assert build(output, *options, "0shot", suite="longbench-v2") == 2
    assert "prompt: no-context there, 0shot here" in one_line(capsys)


def test_v2_substitutes_one_mark_after_the_other():
    prompt = read_yaml("longbench/prompts_v2.yaml")["prompts"]["0shot"]
    row = files.v2_row(0) | {"context": "It says $Q$."}
    assert "It says Which box is red?." in v2_item(row, 0, prompt, "data.json").text


@pytest.mark.parametrize(
    ("text", "says"),
    [("[{", "cut off"), ("[]", "no rows"), ("[1]", "not an object"), ("[{}]", "no column")],
)
def test_bad_files_of_v2_are_one_line(text, says, tmp_path, capsys):
    (tmp_path / "data.json").write_text(text)
    given = ("--source", str(tmp_path / "data.json"))
    assert build(tmp_path / "d", *given, suite="longbench-v2") == 2
    assert says in one_line(capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ann waits.\nDialogue: …", "Ann waits."),
        ("\n\nAnn waits.\nmore", "\n\nAnn waits."),
        ("Ann waits.", "Ann waits."),
        ("\n", "\n"),
        ("", ""),
    ],
)
def test_samsum_ends_at_a_newline_that_is_not_its_first_character(text, expected):
    assert set_of("samsum").stop == ("\n",)
    assert until(text, "\n") == expected
