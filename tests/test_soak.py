"""The soak: cases are text and back, nothing fails here, and what fails can be repeated."""

from __future__ import annotations

import random
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowkv_cli.bench import soak
from shadowkv_cli.bench.soak_cases import (
    MOST_LANES,
    MOST_MICRO_BATCHES,
    MOST_ROWS,
    SoakCase,
    draw_case,
)
from shadowkv_cli.config import ModelShape
from shadowkv_cli.errors import UsageError
from shadowkv_cli.methods.drift import Drift
from shadowkv_cli.methods.shadowkv import ShadowKVGroup

SHAPE = ModelShape(num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=64, element_bytes=2)
FAST = ["--size", "small", "--steps", "5"]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1024, 16_384]))
def test_a_case_is_one_line_that_says_all(seed: int, longest: int) -> None:
    case = draw_case(random.Random(seed), SHAPE, longest)
    assert SoakCase.parse(case.text) == case
    assert "\n" not in case.text
    case.spec.check_model(SHAPE, "bfloat16")
    lengths = case.lengths()
    assert len(lengths) == case.batch <= MOST_ROWS
    assert max(lengths) == lengths[0] == case.tokens <= longest
    for tokens in lengths:
        assert not case.spec.is_dense(tokens), (case, tokens)
    assert all(1 <= lanes <= min(case.batch, MOST_LANES) for lanes in case.lanes)
    assert 1 <= case.micro_batches <= min(case.batch, MOST_MICRO_BATCHES)


METHOD = "shadowkv:sparse_budget=32,rank=16,value_placement=host"
GOOD = SoakCase(3, (2, 3), 1, 300, 0.01, 7, METHOD)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("batch=3", "", "must say batch, lanes"),
        ("seed=7", "seed=7 more=1", "must say batch, lanes"),
        ("batch=3", "batch=0", "out of range"),
        ("lanes=2,3", "lanes=2,x", "no number"),
        ("micro_batches=1", "micro_batches=0", "out of range"),
        ("drift=0.01", "drift=2", "out of range"),
        ("shadowkv:", "oracle:", "oracle"),
        ("rank=16", "rank=160", "above the model's key width 128"),
    ],
)
def test_a_bad_case_is_one_line_and_wrong_usage(old: str, new: str, said: str, capsys) -> None:
    assert soak.main([*FAST, "--case", GOOD.text.replace(old, new)]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


BAD_OPTIONS = [
    ["--cases", "0"],
    ["--layers", "0"],
    ["--steps", "4"],
    ["--profile", "--no-graph"],
]


@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_options_that_make_no_sense_are_wrong_usage(bad: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        soak.main(bad)
    assert stopped.value.code == 2


def test_two_methods_are_no_case() -> None:
    case = SoakCase.parse(GOOD.text.replace("shadowkv:", "full,shadowkv:"))
    with pytest.raises(UsageError, match="no method of ShadowKV"):
        case.spec  # noqa: B018


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a test of its own")
def test_random_cases_decode_the_same_in_lanes(capsys) -> None:
    assert soak.main([*FAST, "--cases", "3", "--seed", "3"]) == 0
    told = capsys.readouterr().out
    assert told.count("the same;") == 3
    assert "3 cases, no failure" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="plants what would fail otherwise there")
@pytest.mark.parametrize(
    ("factor", "said"),
    [(None, "FAILED: 2 lanes: logits are not finite"), (0.5, "FAILED: 2 lanes: logits of 5 of 5")],
)
def test_what_lanes_break_is_found_and_can_be_repeated(factor, said, monkeypatch, capsys) -> None:
    load = ShadowKVGroup.load_values

    def broken(self: ShadowKVGroup, layer: int, placed) -> None:
        last = len(self.rows) == 1  # the second lane of two, of three rows
        if not last or factor is not None:
            load(self, layer, placed)
        if last and factor is not None:
            self.buffer(self.values[layer]).mul_(factor)

    monkeypatch.setattr(ShadowKVGroup, "load_values", broken)
    assert soak.main([*FAST, "--layers", "1", "--case", GOOD.text]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith(said)
    repeated = shlex.split(told[1].removeprefix("Repeat: "))
    assert repeated[:3] == ["python", "-m", "shadowkv_cli.bench.soak"]
    assert soak.main(repeated[3:]) == 1
    monkeypatch.undo()
    assert soak.main(repeated[3:]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="plants what would fail otherwise there")
def test_bytes_that_never_come_are_found_though_their_scales_do(monkeypatch, capsys) -> None:
    """Nothing is evicted from that buffer: what lay there before would be right."""
    load, text = (
        ShadowKVGroup.load_values,
        (
            "batch=3 lanes=2 micro_batches=1 tokens=300 drift=0.01 seed=7 method=shadowkv:"
            "sparse_budget=32,rank=16,value_placement=host,value_buffer=4,value_dtype=fp8"
        ),
    )
    assert soak.main([*FAST, "--layers", "1", "--case", text]) == 0

    def broken(self: ShadowKVGroup, layer: int, placed) -> None:
        held = self.value_buffers[layer].clone()
        load(self, layer, placed)
        if len(self.rows) == 1:  # the first lane of two, of three rows
            self.value_buffers[layer].copy_(held)

    monkeypatch.setattr(ShadowKVGroup, "load_values", broken)
    assert soak.main([*FAST, "--layers", "1", "--case", text]) == 1
    assert "FAILED: 2 lanes: logits are not finite" in capsys.readouterr().err


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="compares micro-batches with each other there"
)
def test_what_micro_batches_break_is_found(monkeypatch, capsys) -> None:
    case = ["--case", GOOD.text.replace("micro_batches=1", "micro_batches=2")]
    assert soak.main([*FAST, *case]) == 0
    split = ShadowKVGroup.micro_batches

    def swapped(self: ShadowKVGroup, count: int) -> list[ShadowKVGroup]:
        parts = split(self, count)
        for part in parts:
            part.prompt_index = part.prompt_index.flip(0)  # two rows that read each other's prompts
        return parts

    monkeypatch.setattr(ShadowKVGroup, "micro_batches", swapped)
    assert soak.main([*FAST, *case]) == 1
    assert "FAILED: 2 lanes, 2 micro-batches: logits of" in capsys.readouterr().err


def test_a_restarted_drift_walks_the_same_way() -> None:
    drift = Drift(2, 3, 4, 8, like=torch.zeros(1), seed=5)
    drift.keep.fill_(0.9)
    walks = []
    for _ in range(2):
        drift.restart()
        torch.manual_seed(1)
        steps = []
        for _ in range(3):
            drift.advance()
            steps.append(drift.queries.clone())
        walks.append(torch.stack(steps))
    assert torch.equal(*walks)
    assert not torch.equal(walks[0][0], walks[0][1])


FAKE = """#!/bin/sh
while [ "$1" != -m ]; do
	[ "$1" = --tool ] && tool=$2
	shift
done
[ "$2" = shadowkv_cli.bench.soak ] || exit 9
caching=${PYTORCH_NO_CUDA_MEMORY_CACHING:-0}
case "$caching $*" in "1 "*--no-graph* | "0 "*) ;; *) exit 8 ;; esac
echo "4 cases, no failure, 1 s"
echo "========= $tool SUMMARY: $FOUND"
[ "$tool" != racecheck ] || [ "$FOUND" = "0 errors" ]
"""


@pytest.mark.parametrize(("found", "status"), [("0 errors", 0), ("2 errors", 1)])
def test_sanitizers_say_one_line_a_pass(tmp_path: Path, found: str, status: int) -> None:
    fake = tmp_path / "sanitizer"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    script = Path(__file__).parents[1] / "kernels" / "sanitize_soak.sh"
    environment = {"PATH": "/usr/bin:/bin", "COMPUTE_SANITIZER": str(fake), "FOUND": found}
    done = subprocess.run(
        ["sh", str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done
    names = [line.partition(": ")[0] for line in done.stdout.splitlines() if ";" in line]
    assert names == ["memcheck", "memcheck-in-graphs", "racecheck-in-graphs"]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [["--profile"], ["--no-graph"]])
def test_random_cases_decode_the_same_on_a_gpu(options: list[str], capsys) -> None:
    assert soak.main(["--size", "small", "--cases", "12", "--seed", "1", *options]) == 0, (
        capsys.readouterr().err
    )
