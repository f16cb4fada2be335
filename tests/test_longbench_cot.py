"""LongBench v2's chain of thought: two calls, the second behind each method's own first answer."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shadowkv_cli.cli import run
from shadowkv_cli.tasks.rows import Dataset, Sample, SecondCall
from shadowkv_cli.tasks.tokenization import encode_prompt, load_tokenizer

_spec = importlib.util.spec_from_file_location(
    "longbench_files", Path(__file__).parent / "longbench_files.py"
)
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)

QUESTION = (
    "What is the correct answer to this question: {question}\nChoices:\n(A) {choice_A}\n"
    "(B) {choice_B}\n(C) {choice_C}\n(D) {choice_D}\n\nLet\u2019s think step by step:"
)
READ = "Please read the following text and answer the questions below.\n\n"
FIRST = READ + "<text>\n{context}\n</text>\n\n" + QUESTION
ANSWER = (
    " {answer}\n\nBased on the above, what is the single, most likely answer choice? Format your "
    'response as follows: "The correct answer is (insert answer here)".'
)
SECOND = READ + "The text is too long and omitted here.\n\n" + QUESTION + ANSWER


def filled(template: str, number: int, **more: str) -> str:
    fields = {k: v.strip() for k, v in files.v2_row(number).items()}
    return template.format(**fields | more)


def build(output: Path, source: Path, *options: str) -> int:
    command = ["build-data", "longbench-v2", "--tokenizer", "demo", "--source", str(source)]
    return run([*command, "--output", str(output), "--prompt", "cot", *options])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cot")
    source = files.write_v2(folder / "data.json", rows=3)
    assert build(folder / "d", source, "--max-length", "700") == 0
    return folder / "d"


def samples_of(data: Path) -> list[Sample]:
    found = Dataset.open(data)
    return found.samples(found.context_lengths[0], "longbench-v2")


def test_the_prompts_are_the_official_ones(data):
    tokenizer = load_tokenizer("demo")
    assert Dataset.open(data).manifest["prompt"] == "cot"
    first = samples_of(data)[0]
    assert first.prompt == filled(FIRST, 0)
    assert first.max_new_tokens == 1024
    for number, sample in enumerate(samples_of(data)):
        assert sample.second.prompt == filled(SECOND, number, answer="$COT$")
        assert sample.second.text(" \n so. ") == filled(SECOND, number, answer="so.")
        assert sample.second.max_new_tokens == 128
        assert sample.second.prompt_tokens == len(encode_prompt(tokenizer, sample.second.prompt))
        assert Sample.from_json(sample.to_json()) == sample
        assert sample.room >= sample.second.prompt_tokens + 1024 + 128


def test_a_second_call_that_is_longer_counts():
    fields = {"id": "a", "task": "t", "index": 0, "prompt": "p", "answer_prefix": ""}
    sizes = {"length": 8, "prompt_tokens": 4, "max_new_tokens": 4, "context_length": 64}
    more = {"references": ["A"], "metric": "longbench_v2_choice", "question_start": 0}
    one = Sample(**fields, **sizes, **more)
    assert one.room == 8
    assert Sample(**fields, **sizes, **more, second=SecondCall("q", 10, 3)).room == 17


@pytest.fixture(scope="module")
def rows(data, tiny_model_folder, tmp_path_factory) -> list[dict]:
    output = tmp_path_factory.mktemp("run") / "r"
    command = ["eval", "--model", str(tiny_model_folder), "--data", str(data)]
    methods = ["--method", "full,shadowkv,streaming", "--rank", "16", "--sparse-budget", "32"]
    small = ["--outlier-chunks", "2", "--max-new-tokens", "12", "--output", str(output)]
    assert run([*command, *methods, *small]) == 0
    assert run([*command, *methods, *small]) == 0, "nothing is left to run"
    return [json.loads(line) for line in (output / "predictions.jsonl").open()]


def test_every_method_reads_its_own_first_answer(data, rows):
    tokenizer = load_tokenizer("demo")
    samples = {s.id: s for s in samples_of(data)}
    assert len(rows) == 9
    for row in rows:
        assert row["error"] is None
        text = samples[row["id"]].second.text(row["reasoning"])
        assert row["second_prompt_tokens"] == len(encode_prompt(tokenizer, text))
        assert 2 <= row["generated_tokens"] <= 24
        assert row["audit"]["attended_tokens"] > 0
    by_sample = [{r["reasoning"] for r in rows if r["id"] == name} for name in samples]
    assert any(len(texts) > 1 for texts in by_sample), "the methods answer differently"


def test_full_attention_gives_what_generate_gives(data, rows, tiny_model_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    tokenizer = load_tokenizer("demo")

    def answer(text: str) -> str:
        ids = torch.tensor([encode_prompt(tokenizer, text)])
        made = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode(made, skip_special_tokens=True)

    full = {r["id"]: r for r in rows if r["method"] == "full"}
    for sample in samples_of(data):
        thought = answer(sample.text)
        assert full[sample.id]["reasoning"] == thought
        assert full[sample.id]["prediction"] == answer(sample.second.text(thought))


def test_a_method_alone_gives_the_same_two_answers(data, rows, tiny_model_folder, tmp_path):
    command = ["eval", "--model", str(tiny_model_folder), "--data", str(data)]
    method = ["--method", "shadowkv", "--rank", "16", "--sparse-budget", "32"]
    small = ["--outlier-chunks", "2", "--max-new-tokens", "12", "--output", str(tmp_path / "r")]
    assert run([*command, *method, *small]) == 0
    alone = [json.loads(line) for line in (tmp_path / "r/predictions.jsonl").open()]
    beside = [r for r in rows if r["method"] == "shadowkv"]
    fields = ("id", "reasoning", "prediction", "second_prompt_tokens")
    assert [[r[f] for f in fields] for r in alone] == [[r[f] for f in fields] for r in beside]


def test_a_second_call_that_does_not_fit_is_one_line(tmp_path, capsys):
    long = [files.v2_row(0) | {"question": "word " * 3000}]
    source = tmp_path / "data.json"
    source.write_text(json.dumps(long))
    assert build(tmp_path / "d", source, "--max-length", "700") == 2
    assert "The second call of longbench-v2-0 takes" in capsys.readouterr().err
