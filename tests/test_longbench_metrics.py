"""LongBench's metrics against what LongBench itself gives (metric_cases.json names the source)."""

import builtins
import difflib
import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.tasks.longbench import matching, packages
from shadowkv_cli.tasks.longbench.metrics import METRICS
from shadowkv_cli.tasks.longbench.overlap import normalize_answer, qa_f1
from shadowkv_cli.tasks.longbench.rouge_l import rouge_l, rouge_l_zh
from shadowkv_cli.tasks.metrics import POSTPROCESS, check_metric, score
from shadowkv_cli.tasks.rows import Sample

OFFICIAL = json.loads(
    (Path(__file__).parent / "data/longbench/metric_cases.json").read_text(encoding="utf-8")
)
NAMES = {
    "qa_f1_score": "longbench_qa_f1",
    "qa_f1_zh_score": "longbench_qa_f1_zh",
    "rouge_score": "longbench_rouge_official",
    "rouge_zh_score": "longbench_rouge_zh_official",
    "classification_score": "longbench_classification",
    "count_score": "longbench_count",
    "retrieval_score": "longbench_retrieval",
    "retrieval_zh_score": "longbench_retrieval_zh",
    "code_sim_score": "longbench_code_similarity",
}
characters = st.characters(exclude_categories=["Cs"])
texts = st.text(st.one_of(st.sampled_from("ab the.中文段落12 \n#`"), characters), max_size=40)
words = st.lists(st.sampled_from(["a", "b", "c", "d", ".", "e"]), max_size=12).map(" ".join)


def sample(metric: str, *references: str, **more) -> Sample:
    return Sample(
        id="t-0",
        task="t",
        index=0,
        prompt="p",
        answer_prefix="",
        references=list(references),
        metric=metric,
        length=8,
        prompt_tokens=4,
        max_new_tokens=4,
        context_length=64,
        question_start=0,
        **more,
    )


@pytest.mark.parametrize(
    "case", OFFICIAL["longbench_v1"], ids=lambda c: f"{c['fn']}-{c['pred'][:20]!r}"
)
def test_scores_are_the_official_ones(case):
    asked = sample(NAMES[case["fn"]], case["gold"], all_classes=case.get("all_classes"))
    assert score(case["pred"], asked) == pytest.approx(case["score"], abs=1e-12), case


@pytest.mark.parametrize("case", OFFICIAL["longbench_v2_extract"], ids=lambda c: c["response"])
def test_letters_are_read_as_officially(case):
    assert matching.chosen_letter(case["response"]) == case["pred"]
    for letter in "ABCD":
        right = score(case["response"], sample("longbench_v2_choice", letter))
        assert right == (letter == case["pred"]), (case, letter)


@pytest.mark.parametrize("name", [n for n in METRICS if n != "longbench_v2_choice"])
def test_the_best_reference_counts(name):
    references = {
        "longbench_retrieval": ("Paragraph 4", "Paragraph 7"),
        "longbench_retrieval_zh": ("段落4", "段落7"),
    }.get(name, ("4", "7"))
    asked = sample(name, *references, all_classes=["4", "7"])
    assert score(references[1], asked) == pytest.approx(1.0, abs=1e-6), name
    assert score("", asked) == 0.0


def apart(total: int) -> tuple[str, str]:
    """Two texts that share their first word; the path through them is `total` steps long."""
    return ("z" + " x" * (total // 2), "z" + " y" * (total - total // 2))


def test_long_sentences_have_their_true_value_unless_the_official_one_is_asked_for():
    draw = random.Random(0)
    prediction, reference = (
        " ".join(f"w{draw.randrange(60)}" for _ in range(600)) for _ in range(2)
    )
    before = sys.getrecursionlimit()
    assert rouge_l(prediction, reference) > 0.5
    assert rouge_l(prediction, reference, official=True) == 0.0
    assert rouge_l_zh(prediction, reference, official=True) == 0.0
    short = " ".join(prediction.split()[:400])
    assert rouge_l(short, short, official=True) == rouge_l(short, short) > 0.99
    assert sys.getrecursionlimit() == before


def deeper(frames: int, total: int) -> float:
    if frames:
        return deeper(frames - 1, total)
    return rouge_l(*apart(total), official=True)


@pytest.mark.parametrize("frames", [0, 200])
def test_the_official_zero_begins_where_it_does_in_longbench_whoever_calls(frames):
    """989 is where a script with LongBench's own functions still had a score (Python 3.11)."""
    assert deeper(frames, 989) > 0
    assert deeper(frames, 990) == 0.0
    assert rouge_l(*apart(990)) > 0


@settings(max_examples=60, deadline=None)
@given(prediction=words, reference=words)
def test_both_forms_of_rouge_agree_on_short_texts(prediction, reference):
    assert rouge_l(prediction, reference) == rouge_l(prediction, reference, official=True)


@settings(max_examples=60, deadline=None)
@given(prediction=texts, reference=texts)
def test_scores_lie_between_0_and_1(prediction, reference):
    for name in METRICS:
        gold = {"longbench_retrieval": "Paragraph 3", "longbench_retrieval_zh": "段落3"}
        asked = sample(name, gold.get(name, reference), all_classes=[reference, "a", "ab"])
        assert 0 <= score(prediction, asked) <= 1, (name, prediction, reference)


@given(prediction=texts, reference=texts)
def test_f1_is_symmetric_and_blind_to_punctuation(prediction, reference):
    assert qa_f1(prediction, reference) == pytest.approx(qa_f1(reference, prediction))
    assert normalize_answer(normalize_answer(reference)) == normalize_answer(reference)


@given(classes=st.lists(st.text("ab", min_size=1, max_size=3), unique=True, min_size=1))
def test_classification_is_a_loop_that_removes_from_its_own_list(classes):
    reference = classes[-1]
    for prediction in (reference, "".join(classes), "b"):
        named = [label for label in classes if label in prediction]
        for label in named:
            if label in reference and label != reference:
                named.remove(label)
        expected = 1 / len(named) if reference in named else 0.0
        assert matching.classification(prediction, reference, classes) == expected


@given(prediction=st.text("abc #\n`", max_size=20), reference=st.text("abc ", max_size=20))
def test_code_is_compared_by_difflib(prediction, reference):
    got = matching.code_similarity(prediction, reference)
    assert got == round(got, 2)
    line = prediction.lstrip("\n").split("\n")[0]
    if not set(line) & set("#`"):
        ratio = difflib.SequenceMatcher(None, line, reference).ratio()
        assert got == round(100 * ratio) / 100, "whole hundredths, halves to the even one"


def test_the_first_line_keeps_its_spaces():
    assert POSTPROCESS["longbench_first_line"]("\n\n City \nmore") == " City "
    assert POSTPROCESS["longbench_first_line"](" \nCity") == " "


def test_what_a_metric_needs_is_named():
    with pytest.raises(UsageError, match="no 'all_classes'"):
        score("a", sample("longbench_classification", "a"))
    with pytest.raises(UsageError, match="no number behind 'Paragraph '"):
        score("a", sample("longbench_retrieval", "third"))


@pytest.mark.parametrize(
    ("package", "metric"), [("jieba", "longbench_qa_f1_zh"), ("rouge", "longbench_rouge")]
)
def test_a_package_that_is_missing_is_one_line(package, metric, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest, **more)

    for cached in (packages._jieba, packages.rouge_scorer):
        cached.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ShadowKVError, match=f"pip install {package}") as failure:
        score("a", sample(metric, "a"))
    assert "\n" not in str(failure.value)


def test_a_package_that_is_missing_is_noticed_before_a_prefill(monkeypatch):
    packages.check_packages.cache_clear()
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ShadowKVError, match=r"longbench_qa_f1_zh needs the package jieba"):
        check_metric(sample("longbench_qa_f1_zh", "a"))
    check_metric(sample("longbench_qa_f1", "a"))
