"""`build-data ruler --fit official` against a second implementation of RULER's generators."""

import importlib.util
import json
import random
import re
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowkv_cli.cli import run
from shadowkv_cli.tasks.rows import Dataset
from shadowkv_cli.tasks.ruler.official import needles, search, stream
from shadowkv_cli.tasks.ruler.official.chains import draw_chain
from shadowkv_cli.tasks.ruler.official.parity import differences
from shadowkv_cli.tasks.ruler.official.stream import CompoundList, Stream, all_keys
from shadowkv_cli.tasks.ruler.sentences import PUNKT, RULES, available_splitter, split_sentences
from shadowkv_cli.tasks.ruler.words import word_list
from shadowkv_cli.tasks.tokenization import encode_prompt, load_tokenizer
from shadowkv_cli.tasks.wrappers import Wrapper

_spec = importlib.util.spec_from_file_location(
    "ruler_reference", Path(__file__).parent / "ruler_reference.py"
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

ADJECTIVES, NOUNS = word_list("adjectivelist")[:90], word_list("nounlist")[:120]
META = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nTASK<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
PLAIN = Wrapper("base", "base", "", "", "")


@cache
def tokenizer():
    return load_tokenizer("demo")


def prose(seed: str, sentences: int) -> str:
    rng = random.Random(seed)
    return " ".join(
        " ".join(rng.choices(NOUNS, k=rng.randint(4, 14))).capitalize() + rng.choice(".?!")
        for _ in range(sentences)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Essays, SQuAD and HotpotQA in the official formats, with made-up text."""
    folder = tmp_path_factory.mktemp("sources")
    essay = prose("essay", 500).replace(" ", "\n", 40) + "\n"
    (folder / "essays.json").write_text(json.dumps({"text": essay}))
    articles = [
        {
            "title": f"a{a}",
            "paragraphs": [
                {
                    "context": prose(f"squad {a} {p}", 3),
                    "qas": [
                        {
                            "question": f"Which word is number {p} of {a}?",
                            "is_impossible": p == 1,
                            "answers": [{"text": f"x{p}"}, {"text": f"x{p}"}],
                        }
                    ],
                }
                for p in range(14)
            ],
        }
        for a in range(9)
    ]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    hops = [
        {
            "question": f"What is {q}?",
            "answer": f"y{q}",
            "context": [[f"t{q} {p}", [prose(f"hop {q} {p}", 2), " End."]] for p in range(10)],
        }
        for q in range(12)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(hops))
    return folder


def sentences_of(files: Path):
    text = re.sub(r"\s+", " ", json.loads((files / "essays.json").read_text())["text"])
    words = text.split(" ")
    assert words[-1] == "", "the text ends with white space, which is a word to RULER"

    def first(size: int) -> list[str]:
        many = words * (size // len(words) + 1)
        return split_sentences(" ".join(many[:size]).strip(), available_splitter())

    return first


def corpus_of(files: Path, task: str):
    if task == "qa_1":
        data = json.loads((files / "squad.json").read_text())["data"]
        documents = sorted({p["context"] for a in data for p in a["paragraphs"]})
        questions = []
        for article in data:
            places = [documents.index(p["context"]) for p in article["paragraphs"]]
            for paragraph, own in zip(article["paragraphs"], places, strict=True):
                questions += [
                    (
                        asked["question"],
                        [answer["text"] for answer in asked["answers"]],
                        [own],
                        [place for place in places if place != own],
                    )
                    for asked in paragraph["qas"]
                    if not asked["is_impossible"]
                ]
        return documents, questions
    data = json.loads((files / "hotpotqa.json").read_text())
    texts = [[t + "\n" + "".join(s) for t, s in q["context"]] for q in data]
    documents = sorted({text for own in texts for text in own})
    return documents, [
        (q["question"], [q["answer"]], [documents.index(t) for t in own], [])
        for q, own in zip(data, texts, strict=True)
    ]


def expected(files: Path, task: str, *, size: int, seed: int, count: int, frame: str = "TASK"):
    pool = [w for n in ("nounlist", "adjectivelist", "verblist") for w in word_list(n)]
    keys = sorted({f"{a}-{n}" for a in ADJECTIVES for n in NOUNS})
    corpus = corpus_of(files, task) if task.startswith("qa") else None
    world = reference.World(
        tokenizer(),
        frame,
        seed,
        size,
        keys=keys,
        pool=pool,
        sentences=sentences_of(files),
        corpus=corpus,
    )
    return world.rows(task, count)


@pytest.fixture
def few_keys(monkeypatch):
    """Both sides draw keys from some 10,000 compounds instead of six million."""
    monkeypatch.setattr(stream, "all_keys", lambda: CompoundList(ADJECTIVES, NOUNS))


def build(output: Path, files: Path, *options: str) -> int:
    given = ["--essays", "essays.json", "--squad", "squad.json", "--hotpotqa", "hotpotqa.json"]
    given = [str(files / part) if part.endswith(".json") else part for part in given]
    command = ["build-data", "ruler", "--tokenizer", "demo", "--fit", "official"]
    return run([*command, *given, "--output", str(output), *options])


def assert_equal_rows(output: Path, size: int, task: str, rows: list[dict]) -> None:
    samples = Dataset.open(output).samples(size, task)
    assert len(samples) == len(rows)
    for number, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        assert sample.id == f"{task}-{size}-{number}"
        assert sample.prompt == row["input"], (task, number)
        assert sample.references == row["outputs"], (task, number)
        assert sample.answer_prefix == row["answer_prefix"], (task, number)
        assert sample.length == row["length"] <= size, (task, number)
        assert len(encode_prompt(tokenizer(), sample.text)) == sample.prompt_tokens


TASKS = [*reference.NIAH_TASKS, "vt", "cwe", "fwe", "qa_1", "qa_2"]


@pytest.mark.parametrize(("size", "seed"), [(2048, 42), (4096, 7), (3000, 0), (9000, 11)])
def test_all_tasks_equal_the_reference(tmp_path, files, few_keys, size, seed):
    count = 3
    options = ["--context-length", str(size), "--seed", str(seed), "--tasks", ",".join(TASKS)]
    assert build(tmp_path, files, *options, "--num-samples", str(count)) == 0
    for task in TASKS:
        rows = expected(files, task, size=size, seed=seed, count=count)
        assert_equal_rows(tmp_path, size, task, rows)


@pytest.mark.parametrize("task", ["cwe", "vt", "niah_multivalue", "niah_multikey_3", "qa_1", "fwe"])
def test_long_prompts_equal_the_reference(tmp_path, files, few_keys, task):
    options = ["--context-length", "32k", "--seed", "1", "--tasks", task, "--num-samples", "1"]
    assert build(tmp_path, files, *options) == 0
    rows = expected(files, task, size=32768, seed=1, count=1)
    assert_equal_rows(tmp_path, 32768, task, rows)


def test_a_chat_template_stands_in_both_turns_of_cwe(tmp_path, files, few_keys):
    options = ["--context-length", "6k", "--tasks", "cwe,vt,niah_multikey_2", "--num-samples", "2"]
    assert build(tmp_path, files, *options, "--template", "meta-llama3") == 0
    for task in ("cwe", "vt", "niah_multikey_2"):
        rows = expected(files, task, size=6144, seed=42, count=2, frame=META)
        assert_equal_rows(tmp_path, 6144, task, rows)
    (first, _) = Dataset.open(tmp_path).samples(6144, "cwe")
    assert first.prompt.count("<|begin_of_text|>") == 2


def test_a_build_continues_to_the_same_rows(tmp_path, files, few_keys):
    options = ["--context-length", "2k", "--tasks", "niah_multikey_2,qa_1", "--seed", "5"]
    assert build(tmp_path / "a", files, *options, "--num-samples", "2") == 0
    assert build(tmp_path / "a", files, *options, "--num-samples", "4") == 0
    assert build(tmp_path / "b", files, *options, "--num-samples", "4") == 0
    for name in ("manifest.json", "2048/qa_1.jsonl", "2048/niah_multikey_2.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_manifest_names_the_fit_and_what_is_not_equal(tmp_path, files, capsys):
    options = ["--context-length", "2k", "--tasks", "vt", "--num-samples", "1"]
    assert build(tmp_path / "official", files, *options) == 0
    manifest = Dataset.open(tmp_path / "official").manifest
    assert manifest["dialect"].endswith("official fit")
    assert manifest["byte_equal_sources"] is False
    assert "another file" in manifest["not_byte_equal"]["squad"]
    assert "not byte-equal" in capsys.readouterr().out
    best = ["build-data", "ruler", "--tokenizer", "demo", *options]
    assert run([*best, "--output", str(tmp_path / "best")]) == 0
    manifest = Dataset.open(tmp_path / "best").manifest
    assert manifest["dialect"].endswith("per-sample fit")
    assert "not_byte_equal" not in manifest
    assert run([*best, "--output", str(tmp_path / "official")]) == 2, "another fit is refused"


def test_differences_are_told_by_source():
    ours = {"haystack": "synthetic", "squad": "synthetic", "hotpotqa": "synthetic"}
    assert set(differences(ours, RULES, PLAIN)) == {"essays", "squad", "hotpotqa"}
    theirs = {
        "haystack": "file abc",
        "squad": "file 80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
        "hotpotqa": "file abc",
    }
    assert differences(theirs, PUNKT, PLAIN) == {}
    assert set(differences(theirs, RULES, PLAIN)) == {"essays"}
    polite = Wrapper("x", "x", "", "You are a helpful assistant. ", "")
    assert set(differences(theirs, PUNKT, polite)) == {"template"}
    hub = dict.fromkeys(theirs, "hub")
    assert set(differences(hub, PUNKT, PLAIN)) == {"essays", "squad", "hotpotqa"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-workers", "2"], "--num-workers has no effect with --fit official"),
        (["--context-length", "700"], "A context length of 700 cannot hold sample 0 of vt"),
        (["--fit", "best", "--english-words", "w.json"], "no effect without --fit official"),
        (["--english-words", "nowhere.json"], "Cannot read nowhere.json"),
        (["--tasks", "qa_2", "--num-samples", "13"], "use --num-samples 12 or less"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, files, capsys, monkeypatch, options, message):
    monkeypatch.setattr(search, "TRIES_AT_THE_SMALLEST", 3)
    given = ["--context-length", "2k", "--tasks", "vt", "--num-samples", "1", *options]
    assert build(tmp_path / "d", files, *given) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "d").exists()


def test_english_words_take_over_where_the_pool_ends(tmp_path, files, capsys, monkeypatch):
    from shadowkv_cli.tasks.ruler.official import words

    monkeypatch.setattr(words, "common_word_pool", lambda: word_list("nounlist")[:60])
    monkeypatch.setattr(words.CommonWordsGenerator, "estimate_units", 50)
    options = ["--context-length", "6k", "--tasks", "cwe", "--num-samples", "1"]
    assert build(tmp_path / "d", files, *options) == 2
    assert "give it with --english-words" in capsys.readouterr().err
    english = tmp_path / "english_words.json"
    english.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert build(tmp_path / "d", files, *options, "--english-words", str(english)) == 2
    assert "Git LFS pointer" in capsys.readouterr().err
    english.write_text(json.dumps({str(i): f"plain{i}" for i in range(4000)}))
    assert build(tmp_path / "d", files, *options, "--english-words", str(english)) == 0
    (sample,) = Dataset.open(tmp_path / "d").samples(6144, "cwe")
    assert all(word.startswith("plain") for word in sample.references)
    assert "english_words" in Dataset.open(tmp_path / "d").manifest["sources"]


@given(
    st.lists(st.text("ab- ", min_size=1, max_size=5), min_size=1, max_size=8),
    st.lists(st.text("ab- ", min_size=1, max_size=4), min_size=1, max_size=8),
)
def test_compounds_are_the_sorted_set_of_all(firsts, seconds):
    every = sorted({f"{a}-{b}" for a in firsts for b in seconds})
    found = CompoundList(firsts, seconds)
    assert list(found) == every
    assert len(found) == len(every)
    assert found[-1] == every[-1]


def test_all_keys_are_as_many_as_ruler_has():
    keys = all_keys()
    assert len(keys) == 6_171_620, "wonderwords 3.0.1"
    places = sorted(random.Random(3).sample(range(len(keys)), 3000))
    found = [keys[i] for i in places]
    assert found == sorted(set(found))


def test_two_equal_names_stop_the_official_generator():
    one = Stream(1)
    calls = iter(["A", "A", "B", "C", "D", "E"])
    one.random.choices = lambda letters, k: [next(calls)]
    with pytest.raises(search.NoRoom, match="two variables have one name"):
        draw_chain(one, 5, 5, None)
    assert next(calls, None) is None, "names are drawn until five are distinct"


def test_sentences_of_one_size_are_split_once(files, monkeypatch):
    calls = []
    monkeypatch.setattr(needles, "split_sentences", lambda text, how: calls.append(how) or ["a."])

    class Sources:
        essay_text = "One. Two. Three."
        sentence_splitter = RULES

    class Bench:
        sources = Sources
        seed = 1

    from shadowkv_cli.tasks.ruler.definitions import definitions

    made = needles.NeedleGenerator(Bench, definitions()["niah_single_2"], 4096)
    for words in (2, 2, 3):
        made._sentences(words)
    assert calls == [RULES, RULES]
