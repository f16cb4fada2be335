"""What `make bench-ops` and `make sanitize-gpu` run, as far as a CPU can tell."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shadowkv_cli import ops
from shadowkv_cli.bench import op_speed
from shadowkv_cli.bench.timeline import phase_of
from shadowkv_cli.config import packed_width
from shadowkv_cli.ops import cases, exercise
from shadowkv_cli.ops.fp8 import FP8
from shadowkv_cli.ops.sizes import Sizes

ROOT = Path(__file__).parents[1]
SMALL = replace(op_speed.sizes_of(2, 512, 8, 64, 16), device="cpu", dtype=torch.float32)
MEASURED = [
    *sorted(set(ops.__all__) - op_speed.WAITING),
    *op_speed.VARIANTS,
    *(f"{op} (prompt)" for op in op_speed.COLUMN_OPS),
]


class Values:
    """Of the class that pins, without a GPU to pin for."""

    def chunks(self, s: Sizes) -> torch.Tensor:
        width = packed_width(s.dim) if s.packed else s.dim
        size = (s.prompts, s.heads, s.chunks, s.chunk_size, width)
        return torch.zeros(size).to(torch.uint8 if s.packed else FP8 if s.fp8 else s.dtype)


@pytest.mark.parametrize("op", MEASURED)
def test_every_op_has_bytes_and_arguments(op: str) -> None:
    sizes = replace(SMALL, dtype=torch.bfloat16) if op.endswith("packed)") else SMALL
    assert op_speed.moved_bytes(op, sizes) > 0
    assert op_speed.input_bytes(op, sizes) > 0
    arguments = op_speed.make(op, sizes, Values())
    if op != op_speed.SDPA_FLASH:
        getattr(ops, op.partition(" ")[0])(*arguments.values())


def test_sdpa_attends_what_full_attention_attends() -> None:
    ours = ops.full_attention(*op_speed.make("full_attention", SMALL, Values()).values())
    theirs = op_speed._sdpa_flash(*op_speed.make(op_speed.SDPA_FLASH, SMALL, Values()).values())
    assert torch.allclose(ours, theirs[:, :, 0], atol=1e-5)


def test_a_larger_share_of_the_bytes_is_moved_by_what_reads_everything() -> None:
    assert op_speed.moved_bytes(op_speed.SDPA_FLASH, SMALL) == 2 * 2 * 8 * 512 * 128 * 2
    once, prompt = (op_speed.moved_bytes(f"gated_silu{name}", SMALL) for name in ("", " (prompt)"))
    assert prompt == 512 / 2 * once


def test_the_sanitizers_see_every_op() -> None:
    assert set(cases.ARGUMENTS) == set(ops.__all__)
    assert {name for _, name in exercise.RUNS} == set(ops.__all__)
    assert len(exercise.RUNS) < 100, "racecheck takes a second for some"


def test_every_case_that_a_sanitizer_sees_is_one_that_its_op_takes() -> None:
    """By the references, which refuse what the kernels refuse of dtypes and shapes."""
    for sizes, name in exercise.RUNS + exercise.ODD_RUNS:
        arguments = cases.ARGUMENTS[name](replace(sizes, device="cpu"))
        getattr(torch.ops.shadowkv, name)(*arguments.values())


FAKE = """#!/bin/sh
while [ "$1" != -m ]; do
	[ "$1" = --tool ] && tool=$2
	shift
done
[ "$2" = shadowkv_cli.ops.exercise ] || exit 9
echo "ran 11 ops in 64 cases"
echo "========= $tool SUMMARY: $FOUND"
[ "$tool" != racecheck ] || [ "$FOUND" = "0 errors" ]
"""


def sanitize(tool: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(ROOT / "kernels" / "sanitize.sh"), "python3"]
    environment = {"PATH": "/usr/bin:/bin", "COMPUTE_SANITIZER": tool, **variables}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_sanitizers_say_one_line_each_and_all_where_they_found_something(tmp_path: Path) -> None:
    fake = tmp_path / "sanitizer"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    done = sanitize(str(fake), FOUND="0 errors")
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        f"{tool}: ran 11 ops in 64 cases;{tool} SUMMARY: 0 errors"
        for tool in ("memcheck", "racecheck")
    ]
    assert len(lines) == 3
    failed = sanitize(str(fake), FOUND="2 errors")
    assert failed.returncode == 1
    assert "========= racecheck SUMMARY: 2 errors" in failed.stdout


def test_without_a_sanitizer_nothing_is_claimed() -> None:
    done = sanitize("no-such-sanitizer")
    assert done.returncode == 1
    assert "There is no no-such-sanitizer here" in done.stderr
    assert not done.stdout


def kernels_of(source: str) -> list[str]:
    """Names of the kernels in a CUDA source."""
    found = re.findall(r"__global__(.*?)\{", source, re.DOTALL)
    heads = (re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", head) for head in found)
    return [re.search(r"void\s+(\w+)\s*\(", head)[1] for head in heads]


def test_the_timeline_knows_every_kernel_of_a_step() -> None:
    sources = sorted((ROOT / "kernels" / "csrc").glob("*.cuh"))
    names = {name for path in sources for name in kernels_of(path.read_text(encoding="utf-8"))}
    assert len(names) > 10
    unknown = {name for name in names if phase_of(f"void shadowkv::{name}<128>(Params)") == "other"}
    assert unknown == {"average_chunks"}, "which works in a prefill"
    assert phase_of("shadowkv::(anonymous namespace)::wait_for_rows(int*, int, int)") is None
