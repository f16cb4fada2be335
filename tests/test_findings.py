"""The sentence that a sweep ends with."""

from __future__ import annotations

import pytest

from shadowkv_cli.findings import finding
from shadowkv_cli.summary import score_records, throughput_records


def prediction(cell: str, sample: int, score: float, attended: int) -> dict:
    return {
        "id": f"t-{sample}",
        "task": "t",
        "context_length": 4096,
        "method": cell.split(":")[0],
        "cell": cell,
        "settings": {"cell": cell},
        "pass": 0,
        "prediction": str(score),
        "score": score,
        "num_references": 1,
        "dense_fallback": False,
        "audit": {"attended_tokens": attended},
        "error": None,
    }


def speed(cell: str, number: int, tokens_per_s: float) -> dict:
    return {
        "cell": cell,
        "method": cell.split(":")[0],
        "settings": {"cell": cell},
        "context_length": 32768,
        "batch_size": 1,
        "batch_rule": "1",
        "state": "synthetic",
        "round": number,
        "tokens_per_s": tokens_per_s,
        "step_ms": [1000 / tokens_per_s],
        "device": "cpu",
        "error": None,
    }


CELLS = {"full": (1.0, 4000), "shadowkv:a": (1.0, 300), "shadowkv:b": (1.0, 200)}
STARVED = {"shadowkv:c": (0.2, 50)}


def sentence(cells: dict[str, tuple[float, int]], random_weights: bool = False) -> str | None:
    rows = [
        prediction(cell, i, float(i < 20 * share), attended)
        for cell, (share, attended) in cells.items()
        for i in range(20)
    ]
    speeds = [
        speed(cell, n, 50.0 if cell == "full" else 100.0 + n) for cell in cells for n in range(6)
    ]
    return finding(score_records(rows), throughput_records(speeds), random_weights=random_weights)


def test_it_names_the_cheapest_cell_that_keeps_up() -> None:
    text = sentence(CELLS | STARVED)
    assert text is not None
    assert "shadowkv:b" in text
    assert "attending 200 of 4,000 tokens" in text
    assert "n = 20" in text
    assert "difference of +0.0 [" in text
    assert "2.05 [2.00, 2.10] times as fast" in text


def test_it_says_when_the_best_cell_is_below_full_attention() -> None:
    text = sentence({"full": (1.0, 4000)} | STARVED)
    assert text is not None
    assert "shadowkv:c" in text
    assert "below full attention" in text


def test_random_weights_find_nothing_about_accuracy() -> None:
    text = sentence(CELLS, random_weights=True)
    assert text is not None
    assert "nothing about accuracy" in text
    assert "scores" not in text


@pytest.mark.parametrize("cells", [{"full": (1.0, 4000)}, {"shadowkv:a": (1.0, 300)}])
def test_without_a_pair_there_is_no_sentence(cells: dict[str, tuple[float, int]]) -> None:
    assert sentence(cells) is None
