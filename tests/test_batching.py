"""Samples that are decoded together: which, how many, and that nothing but their speed changes."""

from __future__ import annotations

import itertools
import json
import re
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shadowkv_cli import batching, console, side_by_side
from shadowkv_cli.answering import Question
from shadowkv_cli.batching import MOST_SAMPLES, samples_together
from shadowkv_cli.bench import memory
from shadowkv_cli.cells import build_specs
from shadowkv_cli.cli import run
from shadowkv_cli.config import ModelShape
from shadowkv_cli.errors import EXIT_INCOMPLETE, ShadowKVError
from shadowkv_cli.model.failures import MethodFailure
from shadowkv_cli.model.session import Session
from shadowkv_cli.results import read_run
from shadowkv_cli.shared_bytes import shared_cache_bytes
from shadowkv_cli.side_by_side import in_batches
from shadowkv_cli.tasks.rows import Sample, SecondCall
from shadowkv_cli.times import times_of

SHAPE = ModelShape(num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=16, element_bytes=4)
SPECS = build_specs(["full", "shadowkv"], {"sparse_budget": "32", "rank": "16"})
CPU = torch.device("cpu")


def question(number: int, length: int = 1024, tokens: int = 900, second: bool = False) -> Question:
    call = SecondCall("", 0, 8) if second else None
    sample = Sample(
        *(f"s-{number}", "vt", number, "text", "", ["a"], "all", tokens + 8, tokens, 8, length, 0),
        second=call,
    )
    return Question(sample, SPECS, 0)


# ---- which ----


@given(
    st.lists(st.sampled_from([1024, 4096]), min_size=1, max_size=40).map(sorted),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_batches_hold_every_question_once(lengths: list[int], most: int, workers: int) -> None:
    questions = [question(i, length) for i, length in enumerate(lengths)]
    batches = in_batches(questions, most, workers)
    assert [q for batch in batches for q in batch] == questions
    assert all(0 < len(batch) <= most for batch in batches)
    for length, own in itertools.groupby(batches, lambda batch: batch[0].sample.context_length):
        sizes = [len(batch) for batch in own]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True), "a session serves as many as it can"
        assert len(sizes) % workers == 0 or max(sizes) == 1, (length, sizes)
    assert all(len({q.layout for q in batch}) == 1 for batch in batches)


def test_unlike_samples_are_apart() -> None:
    """Another length, prompts short enough for full attention, and those with a second call."""
    questions = [
        *(question(i) for i in range(3)),
        *(question(i, tokens=60) for i in range(3, 5)),
        *(question(i, second=True) for i in range(5, 7)),
        *(question(i, length=2048) for i in range(7, 9)),
    ]
    assert [len(batch) for batch in in_batches(questions, 8, 1)] == [3, 2, 1, 1, 2]


class Pool:
    """A worker process in a thread, which answers when it is let."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.futures: list[Future] = []

    def submit(self, work: object, batch: list[int]) -> Future:
        self.given += batch
        self.futures.append(Future())
        return self.futures[-1]


def test_whoever_is_free_takes_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """While this process is at its first batch, the worker answers two and takes a third.

    Each goes on beside its last one: this process from the front, the worker from the back.
    """
    pool, own = Pool(), []

    def ask(answerer: object, batch: list[int]) -> list[int]:
        own.extend(batch)
        if own == [0]:
            pool.futures[0].set_result([4])
            pool.futures[1].set_result([3])
        if own == [0, 1]:
            pool.futures[2].set_result([2])
        return batch

    monkeypatch.setattr(side_by_side, "ask", ask)
    answered = list(side_by_side._share(None, [[n] for n in range(5)], pool, 1))
    assert (pool.given, own) == ([4, 3, 2], [0, 1])
    assert sorted(answered) == [[n] for n in range(5)]


def test_a_pool_that_breaks_between_two_batches_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker dies when it has answered; nobody waits for what it was to take next."""
    pool = Pool()
    take = pool.submit

    def submit(work: object, batch: list[int]) -> Future:
        if pool.given:
            raise BrokenProcessPool("a worker died")
        return take(work, batch)

    def ask(answerer: object, batch: list[int]) -> list[int]:
        if batch == [0]:
            pool.futures[0].set_result([4])
        return batch

    monkeypatch.setattr(pool, "submit", submit)
    monkeypatch.setattr(side_by_side, "ask", ask)
    with pytest.raises(BrokenProcessPool, match="a worker died"):
        list(side_by_side._share(None, [[n] for n in range(5)], pool, 1))


def test_after_a_failure_no_batch_is_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()

    def ask(answerer: object, batch: list[int]) -> list[int]:
        pool.futures[0].set_exception(ShadowKVError("failed"))
        return batch

    monkeypatch.setattr(side_by_side, "ask", ask)
    with pytest.raises(ShadowKVError, match="failed"):
        list(side_by_side._share(None, [[n] for n in range(5)], pool, 1))
    assert pool.given == [4]


# ---- how many ----


def test_as_many_as_a_share_of_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    held = shared_cache_bytes(SPECS, SHAPE, 1000, 50)
    one = held.device + held.host

    def together(free: float, workers: int = 1, **more: int) -> int:
        monkeypatch.setattr(memory, "free_device_bytes", lambda device: int(free))
        return samples_together(SPECS, SHAPE, CPU, 1000, 50, workers=workers, **more)

    room = one / batching.MEMORY_SHARE
    assert together(3.5 * room) == 3
    assert together(3.5 * room, workers=3) == 1
    assert together(3.5 * room, still_to_load=int(room)) == 2
    assert together(0.1 * room) == 1, "one sample runs, or fails and says so"
    assert together(1e15) == MOST_SAMPLES


def test_pinned_values_need_room_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = build_specs(["shadowkv"], {"value_placement": "host", "sparse_budget": "32"})
    held = shared_cache_bytes(specs, SHAPE, 1000, 50)
    assert held.host
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: 10**15)
    room = held.host / batching.MEMORY_SHARE
    monkeypatch.setattr(memory, "free_host_bytes", lambda: int(2.5 * room))
    gpu = torch.device("cuda")
    assert samples_together(specs, SHAPE, gpu, 1000, 50, workers=1) == 2


@pytest.mark.parametrize("size", ["0", "-1", "many", "1.5", ""])
def test_a_size_that_is_none_is_refused(size: str, capsys, tmp_path: Path) -> None:
    command = ["eval", "--model", "demo", "--data", str(tmp_path), f"--batch-size={size}"]
    assert run(command) == 2
    said = f"shadowkv: --batch-size must be auto or a number from 1, not '{size}'."
    assert capsys.readouterr().err.splitlines() == [said]


# ---- what comes of it ----


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five samples each of two tasks, with answers of unequal length."""
    folder = tmp_path_factory.mktemp("data") / "ruler"
    command = "build-data ruler --tokenizer demo --context-length 1k --num-samples 5 --seed 3"
    tasks = "niah_single_2,vt"
    assert run([*command.split(), "--tasks", tasks, "--output", str(folder)]) == 0
    return folder


def command(data: Path, *more: str, output: Path) -> list[str]:
    what = ["eval", "--model", "demo", "--device", "cpu", "--data", str(data)]
    methods = ["--method", "full,shadowkv,random", "--sparse-budget", "64", "--rank", "32"]
    methods += ["--max-new-tokens", "12"]
    return [*what, *methods, *more, "--output", str(output)]


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("runs") / "alone"
    assert run(command(data, output=path)) == 0
    return answers(path)


def answers(path: Path) -> dict:
    rows = read_run(path).predictions
    return {
        (r["id"], r["cell"]): (r["prediction"], r["score"], r["audit"], r["hit_rate"], r["finish"])
        for r in rows
    }


@pytest.mark.parametrize(
    ("more", "sizes"),
    [(["--batch-size", "4"], {3, 4}), (["--batch-size", "auto"], {5}), (["--num-workers", "2",
      "--batch-size", "5"], {5})],
)  # fmt: skip
def test_samples_together_give_what_they_give_alone(
    more: list[str], sizes: set[int], data: Path, alone: dict, tmp_path: Path, capsys, monkeypatch
) -> None:
    """A trained model: its answers do not hang on the last bits of a product."""
    monkeypatch.setattr(console, "PLAIN_INTERVAL_S", 0.0)
    assert run(command(data, *more, output=tmp_path / "run")) == 0
    done = [int(n) for n in re.findall(r": (\d+)/10, ", capsys.readouterr().err)]
    steps = {after - before for before, after in itertools.pairwise([0, *done])}
    assert steps == sizes, "the time left is told by whole batches"
    assert answers(tmp_path / "run") == alone
    read = read_run(tmp_path / "run")
    assert {row["samples_together"] for row in read.predictions} == sizes
    assert read.manifest["environment"]["batch_size"] >= max(sizes)
    for row in read.predictions:
        assert row["decode_steps"] >= row["generated_tokens"] - 1
        assert row["row_bucket"] == 3 * row["samples_together"]


def test_a_step_is_one_of_all_samples() -> None:
    """Of two samples one answered 5 tokens and one 11, in ten steps of 20 ms."""
    rows = [
        {"id": name, "pass": 0, "context_length": 512, "prompt_tokens": 500, "prefill_s": 1.0,
         "generated_tokens": tokens, "decode_s": 0.2, "decode_steps": 10, "samples_together": 2}
        for name, tokens in (("a", 5), ("b", 11))
    ]  # fmt: skip
    (times,) = times_of(rows)
    assert times.step_ms == pytest.approx(20)
    assert times.tokens_per_s == pytest.approx((4 + 10) / 0.2)


def test_a_dry_run_says_how_many_at_a_time(data: Path, tmp_path: Path, capsys) -> None:
    seconds = {}
    for size in ("1", "5"):
        more = ["--batch-size", size, "--dry-run", "--json"]
        assert run(command(data, *more, output=tmp_path / "run")) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["batch_size"] == int(size)
        seconds[size] = plan["estimated_decode_seconds"]
    assert seconds["5"] < seconds["1"], "weights are read once for all"


# ---- what fails together is tried alone ----


@pytest.fixture
def fail_together(monkeypatch: pytest.MonkeyPatch):
    """Let sessions of several prompts fail in their second prefill; returns what was tried."""

    def install(error: BaseException) -> list[int]:
        tried: list[int] = []
        prefill = Session.prefill

        def fails(self: Session, ids: list[int], *, index: int = 0, key: str = "") -> torch.Tensor:
            if index == 1:
                tried.append(self.num_prompts)
                raise error
            return prefill(self, ids, index=index, key=key)

        monkeypatch.setattr(Session, "prefill", fails)
        return tried

    return install


def test_without_memory_for_several_each_runs_alone_from_then_on(
    fail_together, data: Path, alone: dict, tmp_path: Path, capsys
) -> None:
    tried = fail_together(torch.OutOfMemoryError("CUDA out of memory."))
    assert run(command(data, "--batch-size", "5", output=tmp_path / "run")) == 0
    assert tried == [5], "not tried again"
    assert answers(tmp_path / "run") == alone
    assert "Out of memory with 5 samples: from here on one by one." in capsys.readouterr().err


def test_a_method_that_fails_is_found_sample_by_sample(
    fail_together, data: Path, alone: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is blamed in a batch: alone, only the cell that fails there gets an error."""
    shadow = build_specs(["shadowkv"], {"sparse_budget": "64", "rank": "32"})
    fail_together(MethodFailure(shadow, "did not converge"))
    assert run(command(data, "--batch-size", "5", output=tmp_path / "run")) == 0
    assert answers(tmp_path / "run") == alone
    monkeypatch.undo()

    prefill = Session.prefill

    def fails(self: Session, ids: list[int], *, index: int = 0, key: str = "") -> torch.Tensor:
        if key.startswith("vt") and key.endswith("0") and shadow[0] in self.specs:
            raise MethodFailure(shadow, "did not converge")
        return prefill(self, ids, index=index, key=key)

    monkeypatch.setattr(Session, "prefill", fails)
    again = command(data, "--batch-size", "5", output=tmp_path / "other")
    assert run(again) == EXIT_INCOMPLETE
    rows = read_run(tmp_path / "other").predictions
    failed = {(row["id"], row["method"]) for row in rows if row["error"] is not None}
    assert failed == {("vt-1024-0", "shadowkv")}
    assert len(rows) == 2 * 5 * 3
