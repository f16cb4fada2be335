"""How fast a prefill is on a GPU, what it is made of, and what methods add to it.

    python -m shadowkv_cli.bench.prefill_speed --output results/gpu-prefill
    python -m shadowkv_cli.bench.prefill_speed --parts sample,long --output results/gpu-prefill

Random weights of a true shape. Each figure is a row of `prefill.jsonl`, written as soon as it is
measured; what is there already is not measured again, so a run may be made in pieces:

    layer    attention by backend, matrix products, the ops around them, the official SVD; one layer
    prefill  a whole prefill by backend, of which nothing is kept
    kept     the same with one ShadowKV configuration, beside the model or in line, eigh or subspace
    chunks   what further chunk sizes add
    sample   131,072 tokens answered with full attention and ShadowKV at once
    sweep    24 cells and full attention beside one evaluation of two
    long     262,144 and 524,288 tokens with ShadowKV alone

Every row has the TFLOP/s of a large matrix product that the same process measured first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from shadowkv_cli.bench import prefill_parts, prefill_targets, probes
from shadowkv_cli.bench.judging import write_and_print
from shadowkv_cli.bench.memory import release_memory
from shadowkv_cli.bench.prefill_figures import PARTS, Figure, figures
from shadowkv_cli.config import parse_token_count, split_list
from shadowkv_cli.console import format_bytes, notice, print_table
from shadowkv_cli.environment import capture
from shadowkv_cli.errors import ShadowKVError
from shadowkv_cli.model import exact_attention
from shadowkv_cli.model.failures import is_out_of_memory, one_line
from shadowkv_cli.model.loading import LoadedModel, load_model
from shadowkv_cli.results import RunFolder
from shadowkv_cli.rowlog import Row
from shadowkv_cli.run_config import ModelChoice

LENGTHS = "8k,32k,122880,131072"
MODEL, LONG_MODEL = "shape:llama-3.1-8b", "shape:llama-3-8b-1m"
PRODUCTS = 7
COLUMNS = ["measured", "tokens", "attention", "time", "speed", "of product", "peak", "allowed"]


class Bench:
    """Measures figures that a run does not have yet, and writes each as a row.

    Attributes:
        product_tflops: of a large matrix product; 0 as long as no model is loaded.
    """

    def __init__(self, run: RunFolder, model: str, long_model: str) -> None:
        self.run, self.names = run, {False: model, True: long_model}
        self.done = {_key(row) for row in run.read("prefill") if row["error"] is None}
        self.product_tflops = 0.0
        self._loaded: LoadedModel | None = None

    def model(self, *, long: bool = False) -> LoadedModel:
        """One of the two models, in place of the other."""
        name = self.names[long]
        if self._loaded is None or self._loaded.name != name:
            self._loaded = None
            release_memory()
            self._loaded = load_model(ModelChoice(name))
        if not self.product_tflops:
            seconds, flops = prefill_parts.large_product(self._loaded, PRODUCTS)
            self.product_tflops = flops / min(seconds) / 1e12
            notice(f"A large matrix product: {self.product_tflops:.0f} TFLOP/s.")
        return self._loaded

    def backends(self) -> list[str]:
        """The fast ones that work here, the fastest first."""
        loaded = self.model()
        shape = loaded.shape
        heads = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
        speeds = exact_attention.trial_tflops(loaded.device, loaded.dtype, heads, 32_768)
        return sorted(speeds, key=lambda name: -speeds[name])

    def measure(self, figure: Figure) -> None:
        """Measure a figure unless the run has all of it; what finds no room is recorded."""
        keys = [(figure.measure, v, figure.context_length, figure.backend) for v in figure.variants]
        if self.done.issuperset(keys):
            return
        loaded = self.model(long=figure.long)
        release_memory()
        try:
            found = figure.work(loaded)
        except (ShadowKVError, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = {"seconds": None, "error": one_line(error)}
            found = dict.fromkeys(figure.variants, failed)
        rows = [self._row(figure, loaded, name, row) for name, row in found.items()]
        self.run.append("prefill", rows)
        self.done |= {_key(row) for row in rows if row["error"] is None}
        for row in rows:
            notice("  ".join(as_cells(row)))

    def _row(self, figure: Figure, loaded: LoadedModel, variant: str, row: Row) -> Row:
        flops, seconds = row.get("flops"), row["seconds"]
        speed = flops / seconds / 1e12 if flops and seconds else None
        return {
            "measure": figure.measure,
            "variant": variant,
            "context_length": figure.context_length,
            "backend": figure.backend,
            "model": loaded.name,
            "num_layers": loaded.shape.num_layers,
            "whole_layers": loaded.shape.num_layers - 1,
            "hardware": probes.device_name(loaded.device),
            "tflops": speed,
            "share_of_product": speed / self.product_tflops if speed else None,
            "product_tflops": self.product_tflops,
            "error": None,
            **{name: value for name, value in row.items() if name != "flops"},
        }


def _key(row: Row) -> tuple[Any, ...]:
    return row["measure"], row["variant"], row["context_length"], row["backend"]


def as_cells(row: Row) -> list[str]:
    """A row of the table."""
    name = f"{row['measure']}: {row['variant']}" if row["variant"] else row["measure"]
    known = [name, str(row["context_length"]), row["backend"] or ""]
    if row["error"] is not None:
        return [*known, "failed", *[""] * 4]
    peak, allowed = row.get("peak_memory_bytes"), row.get("allowed_bytes")
    return [
        *known,
        f"{row['seconds']:.4g} s",
        f"{row['tflops']:.0f} TFLOP/s" if row["tflops"] else "",
        f"{row['share_of_product']:.0%}" if row["share_of_product"] else "",
        format_bytes(peak) if peak else "",
        f"of {format_bytes(allowed)}" if allowed else "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--parts", default=",".join(PARTS), help="of the list above")
    parser.add_argument("--context-length", default=LENGTHS, help="of layer, prefill and kept")
    parser.add_argument("--backend", help="attention backends, the best first; default: all here")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--long-model", default=LONG_MODEL, help="for more than 131,072 positions")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    args = parser.parse_args()
    parts, asked = split_list([args.parts]), split_list([args.context_length])
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts has no '{unknown[0]}': use {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        parser.error("a GPU is needed")
    try:
        lengths = [parse_token_count(text) for text in asked]
        with RunFolder.open(
            args.output,
            kind="bench",
            identity={"measures": "prefill", "model": args.model, "long_model": args.long_model},
            scope={"parts": parts, "context_lengths": lengths},
            environment=capture("cuda"),
            command=["python", "-m", "shadowkv_cli.bench.prefill_speed", *sys.argv[1:]],
            notes=["Random weights and tokens: times and memory alone."],
            flags={"random_weights": True},
            fresh=args.fresh,
        ) as run:
            bench = Bench(run, args.model, args.long_model)
            backends = split_list([args.backend]) if args.backend else bench.backends()
            for figure in figures(parts, lengths, backends):
                bench.measure(figure)
            rows = [as_cells(row) for row in run.read("prefill")]
    except ShadowKVError as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")
    title = "Prefills; attention, products, ops, low rank and svd are those of one layer"
    print_table(title, COLUMNS, rows, [])
    write_and_print(prefill_targets.compare(args.output), args.output)


if __name__ == "__main__":
    main()
