"""Made-up files in the form of LongBench's, for tests: the texts are ours."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from shadowkv_cli.tasks.longbench.definitions import all_tasks, set_of

LABELS = ["Colour", "Colour of a thing", "Place", "Number"]


def v1_row(task: str, number: int) -> dict:
    """A row of any of the sets, longer with its number."""
    entry = set_of(task)
    chinese = entry.language == "zh"
    line = f"盒子{number}是红色的。" if chinese else f"Box {number} is red. "
    answers = {
        "longbench_classification": ["Colour"],
        "longbench_retrieval": ["Paragraph 3"],
        "longbench_retrieval_zh": ["段落3"],
        "longbench_count": ["3"],
        "longbench_code_similarity": ["    return red"],
    }.get(entry.metric, ["红色" if chinese else "red", "它是红色的" if chinese else "It is red."])
    return {
        "input": f"What colour is box {number}?",
        "context": line * (20 + 40 * number),
        "answers": answers,
        "length": 3000 * (number + 1),
        "dataset": task,
        "language": entry.language,
        "all_classes": LABELS if entry.metric == "longbench_classification" else None,
        "_id": f"{task}{number}",
    }


def v2_row(number: int) -> dict:
    return {
        "_id": f"v2-{number}",
        "domain": "Boxes",
        "sub_domain": "Red boxes",
        "difficulty": ("easy", "hard")[number % 2],
        "length": ("short", "medium", "long")[number % 3],
        "question": " Which box is red? ",
        **{f"choice_{letter}": f"box {letter} " for letter in "ABCD"},
        "answer": "ABCD"[number % 4],
        "context": f"\n Box {number} is red. " * (20 + 10 * number),
    }


def write_v1(folder: Path, *, e: bool = False, rows: int = 3) -> Path:
    """A folder with a file of each set."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in all_tasks(e=e):
        lines = [json.dumps(v1_row(task, i), ensure_ascii=False) + "\n" for i in range(rows)]
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def write_zip(file: Path, folder: Path) -> Path:
    """An archive as it is published: everything under `data/`."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.glob("*.jsonl")):
            archive.write(path, f"data/{path.name}")
    return file


def write_v2(file: Path, rows: int = 6) -> Path:
    file.write_text(json.dumps([v2_row(i) for i in range(rows)]), encoding="utf-8")
    return file
