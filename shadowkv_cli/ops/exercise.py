"""Run every compiled op on small cases: what `make sanitize-gpu` lets compute-sanitizer watch.

python -m shadowkv_cli.ops.exercise
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from shadowkv_cli.ops import cases, compiled, layer_cases
from shadowkv_cli.ops.sizes import Sizes

SIZES = [
    Sizes(),
    Sizes(dtype=torch.float16, dim=128, group=7, landmarks=2, chunk_size=6, rank=17, spare=0),
    Sizes(dtype=torch.float32, dim=96, group=3, chunk_size=1, pairs=7, interleaved=True),
    Sizes(fp8=True, dim=128, landmarks=2),
    Sizes(fp8=True, dtype=torch.float16, dim=96, chunk_size=1),
    Sizes(rows=4, heads=3, group=16, dim=96, chunks=300, wanted=100, slots=170, fixed=(0, 3)),
    Sizes(rows=4, group=4, dim=128, chunks=1500, wanted=100, slots=170, landmarks=4),
]
THREE_LANDMARKS = Sizes(landmarks=3, chunk_size=6)
PACKED = [
    Sizes(packed=True, dim=96),
    Sizes(packed=True, rows=4, dim=128, chunks=1500, wanted=100, slots=170, landmarks=4),
    Sizes(packed=True, rows=4, group=16, dim=64, chunks=3000, wanted=100, slots=170),
]
ODD_SIZES = [
    Sizes(dim=80, pairs=40, spare=0),
    Sizes(dim=7, pairs=2, spare=1, group=3, interleaved=True),
    Sizes(dim=5, pairs=1, group=1, heads=1, spare=0, dtype=torch.float32),
    Sizes(dim=128, group=16, heads=8, spare=0, pairs=64),
    Sizes(dim=128, group=16, heads=8, spare=0, pairs=64, dtype=torch.float32),
]
"""Of ops that serve any: what 16-byte words do not fit, and the longest rows."""

OF_ONE_SIZE = {"await_rows"}
RUNS = [(SIZES[0], name) for name in OF_ONE_SIZE]
RUNS += [(sizes, name) for sizes in SIZES for name in cases.ARGUMENTS.keys() - OF_ONE_SIZE]
RUNS += [(THREE_LANDMARKS, name) for name in ("build_landmarks", "select_chunks")]
OF_PACKED = ("select_chunks", "sparse_attention", "fetch_values")
RUNS += [(sizes, name) for sizes in PACKED for name in OF_PACKED]
RUNS += [(replace(THREE_LANDMARKS, packed=True), "select_chunks")]
ODD_RUNS = [(sizes, name) for sizes in ODD_SIZES for name in layer_cases.ANY_SIZE]


def main() -> None:
    if compiled.ABSENT or not torch.cuda.is_available():
        sys.exit(f"kernels: {compiled.ABSENT or 'loaded'}; GPU: {torch.cuda.is_available()}")
    runs = sorted(RUNS + ODD_RUNS, key=lambda run: run[1])
    for sizes, name in runs:
        getattr(torch.ops.shadowkv, name)(*cases.ARGUMENTS[name](sizes).values())
        try:
            torch.cuda.synchronize()
        except torch.AcceleratorError as error:
            sys.exit(f"{name} failed with {sizes}: {error}")
    print(f"ran {len(cases.ARGUMENTS)} ops in {len(runs)} cases")


if __name__ == "__main__":
    main()
