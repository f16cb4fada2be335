"""Numbers, labels, lines of code and letters: the other metrics of LongBench and LongBench v2.

As in THUDM/LongBench 2e00731 (LongBench/metrics.py, pred.py of v2), each from 0 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher


def count(prediction: str, reference: str) -> float:
    """Share of the numbers in the prediction that are, as texts, the reference."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def paragraph_number(reference: str, word: str) -> str | None:
    """The number behind `word` (`Paragraph ` or `段落`), None where there is none."""
    found = re.search(rf"{word}(\d+)", reference)
    return found[1] if found else None


def classification(prediction: str, reference: str, all_classes: Sequence[str]) -> float:
    """1 over the number of classes that the prediction names, if the reference is one of them.

    Classes that are a part of the reference do not count. The official function removes them from
    the list that it walks through, and so skips the class behind each that it removes; the same
    here, since scores follow from it.
    """
    named = [label for label in all_classes if label in prediction]
    place = 0
    while place < len(named):
        label = named[place]
        if label != reference and label in reference:
            named.remove(label)
        place += 1
    return 1 / len(named) if reference in named else 0.0


def code_similarity(prediction: str, reference: str) -> float:
    """Similarity of the first line of code, in hundredths.

    The first line without a backtick, `#` and `//`, behind leading newlines; it may be blank.
    The measure is difflib's, as fuzzywuzzy has it without python-Levenshtein, whatever is
    installed: it is not symmetric. Two empty texts are alike.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


def first_line(prediction: str) -> str:
    """What is scored on trec, triviaqa, samsum and lsht: leading newlines go, nothing else."""
    return prediction.lstrip("\n").split("\n")[0]


def chosen_letter(response: str) -> str | None:
    """The letter that a response to LongBench v2 chooses, None where it cannot be read.

    Asterisks are left out; the form with parentheses wins wherever it stands.
    """
    text = response.replace("*", "")
    for pattern in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        if found := re.search(pattern, text):
            return found[1]
    return None
