"""How long a layer of a captured decode step takes, in seconds instead of minutes.

    python -m shadowkv_cli.bench.layer_speed --batch-size 16 --hit-rate 0.88 \
        --method shadowkv:value_placement=host,outlier_chunks=48,value_buffer=4,key_buffer=4

A model of a few layers as wide as Llama 3.1 8B's, with random keys and values: the layers of a step
are alike, so these tell what a change of a kernel gives. A layer lasts from one selection's
beginning to the next one's, as the profiler sees it. `--trace DIR` keeps every kernel of the
profiled steps as CSV, a file a hit rate: its stream, when it began and ended.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from shadowkv_cli.bench import timeline
from shadowkv_cli.bench.cases import usual_lanes
from shadowkv_cli.bench.driven_hits import drive
from shadowkv_cli.bench.soak import build_model
from shadowkv_cli.bench.state import fill_synthetic
from shadowkv_cli.cells import build_specs
from shadowkv_cli.config import ShadowKVSpec, parse_token_count
from shadowkv_cli.errors import EXIT_FAILED, EXIT_USAGE, ShadowKVError, UsageError
from shadowkv_cli.model.session import Session
from shadowkv_cli.ops import compiled

WARMUP, STEPS = 40, 24


def step_ms(session: Session, first: Tensor) -> float:
    """The median of STEPS steps after WARMUP ones, by the GPU's own clock."""
    session.reset()
    tokens, marks = first, [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    with session.attached():
        for step in range(WARMUP + STEPS):
            if step >= WARMUP:
                marks[step - WARMUP].record()
            tokens = session.next_tokens(tokens).tokens
        marks[-1].record()
    torch.cuda.synchronize()
    return median(before.elapsed_time(after) for before, after in itertools.pairwise(marks))


def layer_us(kernels: Sequence[timeline.Kernel], layers: int) -> float:
    """Microseconds from one selection to the next one of the same step: the median.

    Raises ShadowKVError where there are not as many selections as layers in each step.
    """
    begins = [k.start for k in kernels if timeline.phase_of(k.name) == "select"]
    if layers < 2 or len(begins) != layers * timeline.STEPS:
        raise ShadowKVError(
            f"{len(begins)} selections of {layers} layers tell no layer's time: it takes one "
            "kernel a layer, of two layers at least, and no micro-batches."
        )
    steps = [begins[at : at + layers] for at in range(0, len(begins), layers)]
    return median(b - a for own in steps for a, b in itertools.pairwise(own))


def write_trace(kernels: Sequence[timeline.Kernel], path: Path) -> None:
    """As CSV, times from the first kernel on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("phase", "stream", "start_us", "end_us", "kernel"))
        for name, stream, start, end in kernels:
            phase, since = timeline.phase_of(name) or "waiting", kernels[0].start
            rows.writerow((phase, stream, f"{start - since:.2f}", f"{end - since:.2f}", name))


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--method", required=True, help="of ShadowKV, as `shadowkv bench` has it")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--context-length", default="122880", help="tokens of each prompt")
    parser.add_argument("--layers", type=int, default=5, help="of the model, 2 or more")
    parser.add_argument("--hit-rate", default="0.88", help="that selection is driven to; commas")
    parser.add_argument(
        "--lanes", help="a number for each hit rate, or one for all; default: usual"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="where traces go, one a rate")
    args = parser.parse_args(given)
    try:
        args.rates = [float(rate) for rate in args.hit_rate.split(",")]
        args.lanes = [int(count) for count in args.lanes.split(",")] if args.lanes else []
    except ValueError as error:
        parser.error(f"--hit-rate and --lanes are numbers with commas between them: {error}")
    if len(args.lanes) == 1:
        args.lanes *= len(args.rates)
    if args.lanes and len(args.lanes) != len(args.rates):
        parser.error(f"{len(args.lanes)} numbers of lanes for {len(args.rates)} hit rates")
    least = min(args.batch_size, args.rounds, args.layers - 1, *args.lanes)
    if least < 1 or not all(0 < rate < 1 for rate in args.rates):
        parser.error("hit rates lie between 0 and 1, all other numbers are 1 or more, --layers 2")
    return args


def _measure(args: argparse.Namespace) -> None:
    """Print a line for each hit rate. Raises ShadowKVError for a method that selects nothing."""
    spec, *others = build_specs([args.method], {})
    if others or not isinstance(spec, ShadowKVSpec):
        raise UsageError(f"--method {args.method}: one cell of shadowkv is timed at a time.")
    tokens = parse_token_count(args.context_length)
    loaded = build_model("large", torch.device("cuda"), args.layers)
    spec.check_model(loaded.shape, loaded.dtype_name)
    session = Session(
        loaded,
        [spec],
        prompt_tokens=tokens,
        new_tokens=WARMUP + STEPS,
        num_prompts=args.batch_size,
        merge_cells=False,
    )
    first = fill_synthetic(session, tokens)
    usual = [usual_lanes(spec, args.batch_size, micro_batches=1)] * len(args.rates)
    for rate, lanes in zip(args.rates, args.lanes or usual, strict=True):
        session.focus(spec, lanes=min(lanes, args.batch_size))
        drive(session, first, rate, WARMUP, STEPS)
        found = [step_ms(session, first) for _ in range(args.rounds)]
        hits = session.hit_rate(WARMUP + 1, WARMUP + STEPS) or 0.0
        kernels = timeline.profiled(session, first, WARMUP)
        print(
            f"{layer_us(kernels, args.layers):.1f} us a layer, {median(found):.3f} ms a step of "
            f"{args.layers} layers; {hits:.1%} hits, {lanes} lanes, batch {args.batch_size}, "
            f"{spec.cell}",
            flush=True,
        )
        if args.trace is not None:
            write_trace(kernels, args.trace / f"hits-{100 * rate:g}.csv")


def main(given: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    args = _arguments(given)
    if not torch.cuda.is_available() or compiled.ABSENT:
        print("A layer of a captured step needs a GPU and the kernels.", file=sys.stderr)
        return EXIT_USAGE
    try:
        _measure(args)
    except UsageError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    except (ShadowKVError, torch.OutOfMemoryError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
