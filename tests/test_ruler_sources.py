"""Texts behind the prompts: synthetic ones, official files, sentences, chat wrappers."""

import itertools
import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.tasks.ruler.definitions import definitions
from shadowkv_cli.tasks.ruler.essay import Essay
from shadowkv_cli.tasks.ruler.qa_corpus import read_hotpotqa_file, read_squad_file
from shadowkv_cli.tasks.ruler.sentences import RULES, available_splitter, split_sentences
from shadowkv_cli.tasks.ruler.sources import load_sources, needed_sources
from shadowkv_cli.tasks.ruler.synthetic_prose import prose_sentences
from shadowkv_cli.tasks.ruler.synthetic_qa import NUM_PEOPLE, NUM_TOWNS, SyntheticQA, person, town
from shadowkv_cli.tasks.tokenization import UnitCounter, load_tokenizer
from shadowkv_cli.tasks.wrappers import resolve_wrapper

DATA = Path(__file__).parent / "data/ruler"
TASKS = list(definitions())


@cache
def demo():
    return load_tokenizer("demo")


def test_no_sentence_repeats_in_a_prompt_of_131072_tokens():
    sentences = []
    words = 0
    for sentence in prose_sentences():
        sentences.append(sentence)
        words += sentence.count(" ") + 1
        if words > 131_072:  # a word is a token at least
            break
    assert len(set(sentences)) == len(sentences)
    assert len({s.lower().strip('."') for s in sentences}) == len(sentences)
    assert all(s[-1] in '."' and s.isascii() for s in sentences)


def test_prose_is_the_same_every_time():
    first, second = (list(itertools.islice(prose_sentences(), 50)) for _ in range(2))
    assert first == second


def test_essay_words_and_sentences():
    essay = Essay(("One two three.", "Four five."))
    assert [essay.num_sentences(n) for n in (1, 3, 4, 5, 6, 8)] == [1, 1, 2, 2, 3, 3]
    assert essay.text(0, 2, 4) == "One two three. Four"
    assert essay.text(1, 2, 5) == "Four five."
    assert essay.text(1, 3, 7) == "Four five. One two", "the corpus starts again"
    assert essay.text(1, 1, 5) == ""


@given(st.integers(1, 400), st.integers(1, 400))
def test_essay_pieces_join_to_the_first_words(words, cut):
    essay = Essay(None)
    sentences = essay.num_sentences(words)
    cut = min(cut, sentences)
    pieces = [essay.text(0, cut, words), essay.text(cut, sentences, words)]
    text = " ".join(piece for piece in pieces if piece)
    assert len(text.split(" ")) == words
    assert text == essay.text(0, sentences, words)


def test_essay_tokens_are_those_of_its_words():
    counter = UnitCounter(demo())
    essay = Essay(None)
    text = essay.text(0, essay.num_sentences(300), 300)
    assert essay.tokens(300, counter) == counter.total([f" {text}"])


def test_names_are_unique():
    assert len({town(i).name for i in range(NUM_TOWNS)}) == NUM_TOWNS
    assert len({person(i).name for i in range(NUM_PEOPLE)}) == NUM_PEOPLE


@pytest.mark.parametrize("index", range(40))
def test_a_question_about_a_town_is_answered_by_its_document_alone(index):
    corpus = SyntheticQA(bridging=False)
    item = corpus.item(index)
    own = corpus.document(item.own[0])
    name = own.split(" ", 1)[0]
    assert name in item.question
    assert item.answers[0] in own
    others = [corpus.document(number) for number in item.more]
    assert len(others) == 4
    assert not any(name in document for document in others)


@pytest.mark.parametrize("index", range(40))
def test_a_bridging_question_needs_both_documents(index):
    corpus = SyntheticQA(bridging=True)
    item = corpus.item(index)
    place, someone = (corpus.document(number) for number in item.own[:2])
    assert len(set(item.own)) == 10
    birthplace, name = place.split("\n")[0], someone.split("\n")[0]
    assert name in item.question
    assert birthplace not in item.question
    assert f"{name} was born in {birthplace}" in someone
    assert item.answers[0] in place
    assert item.answers[0] not in someone


def test_squad_in_its_official_form():
    corpus = read_squad_file(DATA / "squad.json")
    assert corpus.num_documents == 5
    assert list(corpus.documents) == sorted(corpus.documents)
    assert [item.question for item in corpus.items] == [
        "When was the harbour of Quellmouth dug?",
        "Which engineer added a lighthouse?",
        "How many arches has the bridge of Ostrel?",
        "How much was the toll?",
    ]
    first = corpus.item(0)
    assert first.answers == ("1612", "1612", "in 1612")
    assert "dug in 1612" in corpus.document(first.own[0])
    assert {corpus.document(d).split(" ")[0] for d in first.more} == {"A", "Fishing"}


def test_hotpotqa_in_its_official_form():
    corpus = read_hotpotqa_file(DATA / "hotpotqa.json")
    assert corpus.num_questions == 2
    assert corpus.num_documents == 12, "paragraphs that two questions share are one document"
    first = corpus.item(0)
    assert first.answers == ("Norway",)
    assert len(first.own) == 10
    assert corpus.document(first.own[1]) == (
        "Signe Aas\nSigne Aas was born in Norway. She kept bees."
    )


@pytest.mark.parametrize("reader", [read_squad_file, read_hotpotqa_file])
def test_other_files_are_refused(reader, tmp_path):
    file = tmp_path / "x.json"
    for content, message in (
        ("{", "is not valid JSON"),
        ('{"rows": 1}', "official JSON"),
        ('[{"question": 1}]', "official JSON"),
        ("3", "official JSON"),
    ):
        file.write_text(content)
        with pytest.raises(UsageError, match=message):
            reader(file)
    with pytest.raises(UsageError, match=r"Cannot read .*No such file"):
        reader(tmp_path / "none.json")


def test_files_win_and_are_named_in_the_manifest():
    sources = load_sources(
        TASKS,
        "hub",
        essays=DATA / "essays.txt",
        squad=DATA / "squad.json",
        hotpotqa=DATA / "hotpotqa.json",
    )
    assert {k: v["name"] for k, v in sources.manifest.items()} == {
        "haystack": "essays.txt",
        "squad": "squad.json",
        "hotpotqa": "hotpotqa.json",
    }
    assert not any(entry["synthetic"] for entry in sources.manifest.values())
    assert sources.sentence_splitter == available_splitter()
    assert sources.essay.text(0, 1, 100) == "Tools shape the people who use them."


def test_rulers_essay_file_is_read_too(tmp_path):
    file = tmp_path / "PaulGrahamEssays.json"
    file.write_text(json.dumps({"text": "Alpha  beta.\nGamma delta."}))
    sources = load_sources(["niah_single_2"], "hub", essays=file)
    assert sources.essay.text(0, 2, 4) == "Alpha beta. Gamma delta."
    file.write_text("{}")
    with pytest.raises(UsageError, match="field 'text'"):
        load_sources(["niah_single_2"], "hub", essays=file)


def test_only_what_tasks_need_is_loaded():
    assert needed_sources(["niah_single_1", "vt", "cwe", "fwe"]) == set()
    assert needed_sources(TASKS) == {"essay", "squad", "hotpotqa"}
    assert load_sources(["vt"], "hub").manifest == {}


@pytest.mark.parametrize(
    ("task", "option"), [("niah_single_2", "--essays"), ("qa_1", "--squad"), ("qa_2", "--hotpotqa")]
)
def test_no_network_is_one_line_that_names_the_options(task, option, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("shadowkv_cli.tasks.hub.hub_reachable", lambda: False)
    with pytest.raises(ShadowKVError, match=rf"{option}.*--sources synthetic") as info:
        load_sources([task], "hub")
    assert "\n" not in str(info.value)


def test_hub_rows_become_the_same_corpora(monkeypatch):
    squad = json.loads((DATA / "squad.json").read_text())
    squad_rows = [
        {
            "title": article["title"],
            "context": paragraph["context"],
            "question": qa["question"],
            "answers": {"text": [a["text"] for a in qa["answers"]], "answer_start": []},
        }
        for article in squad["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    hotpotqa_rows = [
        {
            "question": row["question"],
            "answer": row["answer"],
            "context": {
                "title": [title for title, _ in row["context"]],
                "sentences": [sentences for _, sentences in row["context"]],
            },
            "supporting_facts": {
                "title": [title for title, _ in row["supporting_facts"]],
                "sent_id": [number for _, number in row["supporting_facts"]],
            },
        }
        for row in json.loads((DATA / "hotpotqa.json").read_text())
    ]
    rows = {"essay": [{"text": "A b."}, {"text": "C d."}]}
    rows |= {"squad": squad_rows, "hotpotqa": hotpotqa_rows}
    monkeypatch.setattr(
        "shadowkv_cli.tasks.ruler.sources._load_hub", lambda which, *_, **__: rows[which]
    )
    sources = load_sources(TASKS, "hub")
    assert sources.essay.text(0, 2, 4) == "A b. C d."
    file = read_squad_file(DATA / "squad.json")
    assert [i.question for i in sources.loaded_qa["squad"].items] == [
        i.question for i in file.items
    ]
    assert sources.loaded_qa["squad"].item(0).answers == file.item(0).answers
    file = read_hotpotqa_file(DATA / "hotpotqa.json")
    assert sources.loaded_qa["hotpotqa"].documents == file.documents
    assert sources.loaded_qa["hotpotqa"].items == file.items


@pytest.mark.network
def test_the_hub_has_what_is_expected():
    sources = load_sources(TASKS, "hub")
    squad, hotpotqa = sources.qa("squad"), sources.qa("hotpotqa")
    assert squad.item(0).question == "In what country is Normandy located?"
    assert "France" in squad.item(0).answers
    assert (squad.num_questions, hotpotqa.num_questions) == (5928, 7405)
    assert len(hotpotqa.item(0).own) == 10
    assert len(sources.essay.text(0, 100, 1000)) > 1000


@given(st.text("ab. !?\"'Mr.e.g.AB1 ", max_size=80))
def test_sentences_join_to_the_text(text):
    text = " ".join(text.split())
    assert " ".join(split_sentences(text, RULES)) == text


def test_the_rules_know_abbreviations():
    text = " ".join((DATA / "essays.txt").read_text().split())
    assert split_sentences(text, RULES) == [
        "Tools shape the people who use them.",
        "A carpenter who owns one saw makes one kind of chair.",
        "Dr. Vane, who owned twelve, made none!",
        '"Why bother?" asked a visitor.',
        "He was told that e.g. a good plane needs sharpening, i.e. patience.",
        "The visitor left at 5 p.m. on a Friday.",
        "Nobody followed him.",
        "It rained.",
    ]


def chat_tokenizer(template: str | None):
    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = template
    return tokenizer


LLAMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|eos|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_auto_is_the_tokenizers_own_template():
    wrapper = resolve_wrapper("auto", chat_tokenizer(LLAMA_LIKE))
    assert wrapper.resolved == "chat_template"
    assert wrapper.bos == "<|bos|>"
    assert wrapper.wrap("Q") == "<|bos|><|user|>\nQ<|eos|><|assistant|>\n"
    assert wrapper.wrap("Q", first=False) == "<|user|>\nQ<|eos|><|assistant|>\n"
    assert wrapper.to_manifest() == {
        "requested": "auto",
        "resolved": "chat_template",
        "before": "<|bos|><|user|>\n",
        "after": "<|eos|><|assistant|>\n",
    }


def test_auto_is_base_where_there_is_no_template():
    wrapper = resolve_wrapper("auto", demo())
    assert (wrapper.resolved, wrapper.wrap("Q")) == ("base", "Q")


def test_a_named_template_wins():
    wrapper = resolve_wrapper("llama-3", chat_tokenizer(LLAMA_LIKE))
    assert wrapper.wrap("Q") == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>You are a helpful assistant"
        "<|eot_id|><|start_header_id|>user<|end_header_id|>Q<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", "chat template failed"),
        ("nothing", "exactly once"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "exactly once"),
    ],
)
def test_a_chat_template_that_cannot_be_used_says_so(template, message):
    with pytest.raises(UsageError, match=rf"{message}.*--template"):
        resolve_wrapper("auto", chat_tokenizer(template))


def test_an_unknown_template_says_what_exists():
    with pytest.raises(UsageError, match=r"Unknown template 'llama3'.*llama-3"):
        resolve_wrapper("llama3", demo())
