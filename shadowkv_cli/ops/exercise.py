"""Run every compiled op on small cases: what `make sanitize-gpu` lets compute-sanitizer watch.

python -m shadowkv_cli.ops.exercise
"""

from __future__ import annotations

import sys

import torch

from shadowkv_cli.ops import cases, compiled
from shadowkv_cli.ops.cases import Sizes

SIZES = [
    Sizes(),
    Sizes(dtype=torch.float16, dim=128, group=7, landmarks=2, chunk_size=6, rank=17, spare=0),
    Sizes(dtype=torch.float32, dim=96, group=3, chunk_size=1, pairs=7, interleaved=True),
    Sizes(rows=4, heads=3, group=16, dim=96, chunks=300, wanted=100, slots=170, fixed=(0, 3)),
]


def main() -> None:
    if compiled.ABSENT or not torch.cuda.is_available():
        sys.exit(f"kernels: {compiled.ABSENT or 'loaded'}; GPU: {torch.cuda.is_available()}")
    for sizes in SIZES:
        for name, arguments in cases.ARGUMENTS.items():
            getattr(torch.ops.shadowkv, name)(*arguments(sizes).values())
            torch.cuda.synchronize()
            print("ran", name, sizes.dtype, flush=True)


if __name__ == "__main__":
    main()
