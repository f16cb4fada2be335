"""RULER's metrics against what RULER itself gives."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowkv_cli.errors import UsageError
from shadowkv_cli.tasks.metrics import METRICS, POSTPROCESS, metric, score
from shadowkv_cli.tasks.rows import Sample

OFFICIAL = json.loads((Path(__file__).parent / "data/ruler/metric_cases.json").read_text())
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def sample(references: list[str], name: str = "string_match_all", **more: object) -> Sample:
    fields: dict = {
        "id": "t-64-0",
        "task": "t",
        "index": 0,
        "prompt": "p",
        "answer_prefix": "",
        "references": references,
        "metric": name,
        "length": 8,
        "prompt_tokens": 4,
        "max_new_tokens": 4,
        "context_length": 64,
        "question_start": 0,
        "postprocess": "ruler",
    }
    return Sample(**{**fields, **more})


@pytest.mark.parametrize("case", OFFICIAL["ruler"], ids=lambda c: f"{c['match']}-{c['pred']!r}")
def test_scores_are_the_official_ones(case):
    got = score(case["pred"], sample(case["refs"], f"string_match_{case['match']}"))
    assert 100 * got == pytest.approx(case["official_pct"]), case


def test_the_mean_over_a_corpus_is_the_official_one():
    cases = [case for case in OFFICIAL["ruler"] if case["match"] == "all"]
    mean = sum(score(c["pred"], sample(c["refs"])) for c in cases) / len(cases)
    assert round(100 * mean, 2) == OFFICIAL["ruler_corpus_all"]


@pytest.mark.parametrize("name", ["string_match_all", "string_match_part"])
def test_an_empty_prediction_scores_nothing(name):
    assert score("", sample(["France"], name)) == 0.0


def test_control_characters_become_newlines():
    assert POSTPROCESS["ruler"]("\x00 a\x07b\t \n") == "a\nb"
    assert score("Fra\x00nce", sample(["France"])) == 0.0


@given(prediction=texts, references=st.lists(texts, min_size=1, max_size=4))
def test_scores_lie_between_0_and_1(prediction, references):
    all_of, part_of = (score(prediction, sample(references, name)) for name in METRICS_OF_RULER)
    assert 0 <= all_of <= part_of <= 1, (prediction, references)


METRICS_OF_RULER = ("string_match_all", "string_match_part")


@given(references=st.lists(st.text("abcXYZ0189- ", min_size=1), min_size=1, max_size=5))
def test_all_references_joined_score_1(references):
    assert score(f"x{', '.join(references)}x", sample(references)) == 1.0, references


def test_unknown_names_say_what_exists():
    with pytest.raises(UsageError, match=r"string_mach_all.*Did you mean 'string_match_all'"):
        score("a", sample(["a"], "string_mach_all"))
    with pytest.raises(UsageError, match=r"Unknown postprocessing 'none'.*ruler"):
        score("a", sample(["a"], postprocess="none"))


def test_the_registry_is_open(monkeypatch):
    monkeypatch.setattr("shadowkv_cli.tasks.metrics.METRICS", dict(METRICS))

    @metric("first_letter")
    def first_letter(prediction, sample):
        return float(prediction[:1] == sample.references[0][:1])

    assert score("bee", sample(["bat"], "first_letter")) == 1.0
