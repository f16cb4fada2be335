"""Where the gold document of a question stands, and `--shuffle-gold`."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowkv_cli.cli import run
from shadowkv_cli.tasks.rows import Dataset, Sample
from shadowkv_cli.tasks.ruler.gold import gold_fractions, gold_places, moved
from shadowkv_cli.tasks.ruler.qa_corpus import hotpotqa_corpus

BASE = ["build-data", "ruler", "--tokenizer", "demo", "--tasks", "qa_1,qa_2"]


def build(output: Path, *options: str) -> Dataset:
    assert run([*BASE, "--output", str(output), *options]) == 0
    return Dataset.open(output)


def documents_of(sample: Sample) -> list[str]:
    context = sample.prompt.split("given documents.\n\n", 1)[1]
    context = context.split("\n\nAnswer the question based", 1)[0]
    return [text.split("\n", 1)[1] for text in context.split("\n\n") if text.startswith("Document")]


def assert_gold_is_told(sample: Sample, *, bridging: bool) -> None:
    documents = documents_of(sample)
    assert sample.num_documents == len(documents)
    assert len(sample.gold_documents) == (2 if bridging else 1)
    gold = [documents[place - 1] for place in sample.gold_documents]
    assert any(sample.references[0] in text for text in gold), sample.id
    others = [text for text in documents if text not in gold]
    if not bridging and sample.references[0].istitle():
        assert not any(sample.references[0] in text for text in others), sample.id


@pytest.mark.parametrize("options", [(), ("--shuffle-gold",), ("--fit", "official")])
def test_rows_name_the_documents_with_the_answer(tmp_path, options):
    size = "4k" if "official" in options else "3k"
    data = build(tmp_path, "--context-length", size, "--num-samples", "4", *options)
    for task in ("qa_1", "qa_2"):
        for sample in data.samples(data.context_lengths[0], task):
            assert_gold_is_told(sample, bridging=task == "qa_2")


def shares(data: Dataset) -> list[float]:
    samples = data.samples(data.context_lengths[0], "qa_1")
    return [s.gold_documents[0] / s.num_documents for s in samples]


def test_shuffled_gold_is_even_over_the_prompt(tmp_path):
    options = ("--context-length", "3k", "--num-samples", "32", "--tasks", "qa_1")
    data = build(tmp_path, *options, "--shuffle-gold")
    assert data.manifest["shuffle_gold"] is True
    quarters = Counter(min(int(4 * (share - 1e-6)), 3) for share in shares(data))
    assert all(5 <= quarters[q] <= 11 for q in range(4)), quarters


def test_the_official_place_is_one_and_shuffled_it_moves(tmp_path):
    options = (
        "--context-length",
        "4k",
        "--num-samples",
        "8",
        "--tasks",
        "qa_1",
        "--fit",
        "official",
    )
    fixed, moved_ = (
        build(tmp_path / "a", *options),
        build(tmp_path / "b", *options, "--shuffle-gold"),
    )
    by_size = {}
    for sample in fixed.samples(4096, "qa_1"):
        by_size.setdefault(sample.num_documents, set()).add(tuple(sample.gold_documents))
    assert all(len(places) == 1 for places in by_size.values()), by_size
    assert len(set(shares(moved_))) > 4
    assert "questions" in moved_.manifest["not_byte_equal"]
    assert "questions" not in fixed.manifest["not_byte_equal"]


def test_other_settings_and_tasks_without_documents_are_refused(tmp_path, capsys):
    options = ("--context-length", "3k", "--num-samples", "1")
    build(tmp_path / "d", *options)
    assert run([*BASE, *options, "--shuffle-gold", "--output", str(tmp_path / "d")]) == 2
    assert "shuffle gold: null there, true here" in capsys.readouterr().err
    command = [*BASE[:-2], *options, "--tasks", "vt", "--shuffle-gold"]
    assert run([*command, "--output", str(tmp_path / "e")]) == 2
    assert "--shuffle-gold has no effect" in capsys.readouterr().err


def test_answers_carry_the_place(tmp_path, tiny_model_folder):
    build(tmp_path / "d", "--context-length", "2k", "--num-samples", "1")
    command = ["eval", "--model", str(tiny_model_folder), "--data", str(tmp_path / "d")]
    method = ["--method", "full", "--max-new-tokens", "2", "--output", str(tmp_path / "r")]
    assert run([*command, *method]) == 0
    rows = [json.loads(line) for line in (tmp_path / "r/predictions.jsonl").open()]
    assert [len(row["gold_documents"]) for row in rows] == [1, 2]
    assert all(0 < place <= row["num_documents"] for row in rows for place in row["gold_documents"])


def test_supporting_facts_name_the_gold_of_hotpotqa():
    context = [["A", ["a."]], ["B", ["b."]], ["C", ["c."]]]
    row = {"question": "?", "answer": "x", "context": context}
    plain = hotpotqa_corpus("h", [row])
    assert plain.item(0).gold_or_own == plain.item(0).own
    told = hotpotqa_corpus("h", [row | {"supporting_facts": [["A", 0], ["C", 0], ["C", 1]]}])
    assert [told.document(i) for i in told.item(0).gold_or_own] == ["A\na.", "C\nc."]


@given(st.lists(st.integers(0, 30), min_size=2, max_size=20, unique=True), st.integers(0, 500))
def test_moving_keeps_the_others_in_their_order(numbers, index):
    gold = numbers[:2]
    spread = gold_fractions(1, "qa_1/4096", index, 2)
    assert all(0 <= fraction < 1 for fraction in spread)
    after = moved(numbers, gold, spread)
    assert sorted(after) == sorted(numbers)
    assert [n for n in after if n not in gold] == [n for n in numbers if n not in gold]
    assert len(gold_places(after, gold)) == 2
