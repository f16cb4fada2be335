"""How fast RULER prompts are made, and how often a whole prompt is tokenized.

    python -m shadowkv_cli.bench.data_speed --context-length 4k,32k,131072 --seconds 3

One process, the demo tokenizer and the project's own texts, so that it runs without a network.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from shadowkv_cli.config import parse_token_count, split_list
from shadowkv_cli.console import print_json, print_table
from shadowkv_cli.tasks.rows import Sample
from shadowkv_cli.tasks.ruler.definitions import choose_tasks
from shadowkv_cli.tasks.ruler.draws import Workbench
from shadowkv_cli.tasks.ruler.samples import calibrate_task, make_sample
from shadowkv_cli.tasks.ruler.sources import load_sources
from shadowkv_cli.tasks.tokenization import DEMO, load_tokenizer
from shadowkv_cli.tasks.wrappers import AUTO, resolve_wrapper

MIN_SAMPLES = 8


def measure(bench: Workbench, task: str, context_length: int, seconds: float) -> dict[str, Any]:
    """Make samples of one task for that long; the first, which fills the caches, is not timed.

    Encodings are all characters that were encoded in whole prompts, over those of the results.
    """
    calibration = calibrate_task(bench, task, context_length, num_samples=1)
    make_sample(bench, task, context_length, 0, calibration)
    bench.characters_encoded = 0
    samples: list[Sample] = []
    start = time.perf_counter()
    while len(samples) < MIN_SAMPLES or time.perf_counter() - start < seconds:
        index = len(samples) + 1
        samples.append(make_sample(bench, task, context_length, index, calibration))
    elapsed = time.perf_counter() - start
    fills = [sample.length / context_length for sample in samples]
    return {
        "task": task,
        "context_length": context_length,
        "samples": len(samples),
        "samples_per_s": len(samples) / elapsed,
        "encodings_per_sample": bench.characters_encoded / sum(len(s.text) for s in samples),
        "mean_fill": sum(fills) / len(fills),
        "min_fill": min(fills),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--context-length", default="4k,32k,131072")
    parser.add_argument("--tasks", default=None)
    parser.add_argument("--tokenizer", default=DEMO)
    parser.add_argument("--seconds", type=float, default=3.0, help="per task and length")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    tasks = choose_tasks(split_list([args.tasks]) if args.tasks else None)
    tokenizer = load_tokenizer(args.tokenizer)
    sources = load_sources(tasks, "synthetic")
    bench = Workbench(tokenizer, resolve_wrapper(AUTO, tokenizer), sources, seed=42)
    results = [
        measure(bench, task, parse_token_count(length), args.seconds)
        for length in split_list([args.context_length])
        for task in tasks
    ]
    if args.json:
        print_json({"tokenizer": args.tokenizer, "results": results})
        return
    rows = [
        [
            r["task"],
            str(r["context_length"]),
            f"{r['samples_per_s']:.1f}",
            f"{r['encodings_per_sample']:.2f}",
            f"{100 * r['mean_fill']:.2f}%",
            f"{100 * r['min_fill']:.2f}%",
            str(r["samples"]),
        ]
        for r in results
    ]
    columns = ["task", "length", "samples/s", "encodings", "mean fill", "min fill", "n"]
    notes = ["Encodings: how often a whole prompt was tokenized per sample. One process."]
    print_table(f"RULER prompts, tokenizer {args.tokenizer}", columns, rows, notes)


if __name__ == "__main__":
    main()
