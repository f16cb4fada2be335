"""The metrics of ShadowKV's authors (bytedance/ShadowKV a21f5a9, data/metrics.py), flaws included.

They are not RULER's: an empty answer to a question scores 1, and needles must be whole words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from shadowkv_cli.tasks.longbench.overlap import normalize_answer
from shadowkv_cli.tasks.rows import Sample

_ENDS = ("<|eot_id|>", "</s>", "</s", "</")


def cleaned(prediction: str) -> str:
    """Without spelled ends of a turn; control characters become newlines."""
    text = prediction.strip()
    for end in _ENDS:
        text = text.replace(end, "")
    return re.sub(r"[\x00-\x1f]", "\n", text).strip()


def needle_score(prediction: str, sample: Sample) -> float:
    """1 if the normalised prediction begins with the reference, or has it as a word."""
    text, wanted = normalize_answer(cleaned(prediction)), normalize_answer(sample.references[0])
    return float(text.startswith(wanted) or wanted in text.split())


def _share(references: Iterable[str], found: Iterable[str]) -> float:
    known, wanted = set(found), list(references)
    return sum(reference in known for reference in wanted) / len(wanted)


def multi_number(prediction: str, sample: Sample) -> float:
    """Share of the references among the numbers of the normalised prediction."""
    return _share(sample.references, re.findall(r"\d+", normalize_answer(prediction)))


def multi_words(prediction: str, sample: Sample) -> float:
    """Share of the references among the words of the prediction, ignoring case."""
    wanted = (reference.lower() for reference in sample.references)
    return _share(wanted, re.findall(r"\b\w+\b", prediction.lower()))


def string_match_part(prediction: str, sample: Sample) -> float:
    """1 if the prediction contains a reference, or a reference the prediction, which may be ""."""
    text = cleaned(prediction).lower()
    wanted = [reference.lower() for reference in sample.references]
    return float(any(reference in text or text in reference for reference in wanted))


METRICS: dict[str, Callable[[str, Sample], float]] = {
    "shadowkv_needle_score": needle_score,
    "shadowkv_multi_number": multi_number,
    "shadowkv_multi_words": multi_words,
    "shadowkv_string_match_part": string_match_part,
}
