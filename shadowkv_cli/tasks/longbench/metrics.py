"""LongBench's metrics by the names that rows carry; the best reference of a sample counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from shadowkv_cli.errors import UsageError
from shadowkv_cli.tasks.longbench import matching
from shadowkv_cli.tasks.longbench.overlap import qa_f1, qa_f1_zh
from shadowkv_cli.tasks.longbench.rouge_l import rouge_l, rouge_l_zh
from shadowkv_cli.tasks.rows import Sample

Scorer = Callable[[str, Sample], float]


def best_reference(function: Callable[[str, str], float]) -> Scorer:
    """The score of a sample from that of a prediction and one reference: the best."""

    def scored(prediction: str, sample: Sample) -> float:
        return max(function(prediction, reference) for reference in sample.references)

    return scored


def _classification(prediction: str, sample: Sample) -> float:
    classes: Sequence[str] | None = sample.all_classes
    if not classes:
        raise UsageError(f"Sample {sample.id} has no 'all_classes', which its metric needs.")
    return max(matching.classification(prediction, label, classes) for label in sample.references)


def _retrieval(word: str) -> Scorer:
    def scored(prediction: str, sample: Sample) -> float:
        numbers = [matching.paragraph_number(text, word) for text in sample.references]
        if None in numbers:
            raise UsageError(f"A reference of sample {sample.id} has no number behind '{word}'.")
        return max(matching.count(prediction, number) for number in numbers if number is not None)

    return scored


def _choice(prediction: str, sample: Sample) -> float:
    return float(matching.chosen_letter(prediction) in sample.references)


V2_METRIC = "longbench_v2_choice"
METRICS: dict[str, Scorer] = {
    "longbench_qa_f1": best_reference(qa_f1),
    "longbench_qa_f1_zh": best_reference(qa_f1_zh),
    "longbench_rouge": best_reference(rouge_l),
    "longbench_rouge_zh": best_reference(rouge_l_zh),
    "longbench_rouge_official": best_reference(partial(rouge_l, official=True)),
    "longbench_rouge_zh_official": best_reference(partial(rouge_l_zh, official=True)),
    "longbench_classification": _classification,
    "longbench_retrieval": _retrieval("Paragraph "),
    "longbench_retrieval_zh": _retrieval("段落"),
    "longbench_count": best_reference(matching.count),
    "longbench_code_similarity": best_reference(matching.code_similarity),
    V2_METRIC: _choice,
}
POSTPROCESS = {"longbench_first_line": matching.first_line}
