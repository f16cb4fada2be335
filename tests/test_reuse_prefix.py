"""`--reuse-prefix` from the command line: the same answers, in an order where neighbours share."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowkv_cli.bench.estimate import prefill_flops
from shadowkv_cli.cli import run
from shadowkv_cli.config import LEAST_SHARED_TOKENS, ModelShape
from shadowkv_cli.model.facts import ModelFacts
from shadowkv_cli.model.session import Session
from shadowkv_cli.prefix_order import by_beginning, expected_reuse, shared_characters
from shadowkv_cli.results import read_run
from shadowkv_cli.summary import csv_text, records_as_rows, score_records
from shadowkv_cli.tasks.rows import Dataset, Sample
from shadowkv_cli.times import times_of, times_table


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four samples whose needles lie in the same text, and a chain, which begins otherwise."""
    folder = tmp_path_factory.mktemp("data") / "ruler"
    build = "build-data ruler --tokenizer demo --context-length 1k --seed 3"
    for tasks, count in (("niah_single_2", "4"), ("vt", "1")):
        more = ["--tasks", tasks, "--num-samples", count, "--output", str(folder)]
        assert run([*build.split(), *more]) == 0
    return folder


def command(data: Path, *more: str, output: Path) -> list[str]:
    what = ["eval", "--model", "demo", "--device", "cpu", "--data", str(data)]
    methods = ["--method", "full,shadowkv,random", "--sparse-budget", "64"]
    methods += ["--rank", "32", "--max-new-tokens", "8"]
    return [*what, *methods, *more, "--output", str(output)]


def answers(path: Path) -> dict:
    rows = read_run(path).predictions
    return {
        (r["id"], r["cell"]): (r["prediction"], r["score"], r["audit"], r["hit_rate"], r["finish"])
        for r in rows
    }


def reused(path: Path, task: str = "niah_single_2") -> dict[str, int]:
    rows = [r for r in read_run(path).predictions if r["task"] == task]
    return {r["id"]: r["reused_tokens"] for r in rows}


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "plain"
    assert run(command(data, output=path)) == 0
    return path


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "reusing"
    assert run(command(data, "--reuse-prefix", output=path)) == 0
    return path


def test_the_answers_are_the_same(plain: Path, finished: Path) -> None:
    """A trained model: its answers do not hang on the last bits of a product."""
    assert answers(finished) == answers(plain)
    assert read_run(finished).manifest["environment"]["reuse_prefix"] is True
    assert read_run(plain).manifest["environment"]["reuse_prefix"] is False


def test_rows_say_what_was_taken_over(plain: Path, finished: Path) -> None:
    assert set(reused(plain).values()) | set(reused(plain, "vt").values()) == {0}
    counts = list(reused(finished).values())
    assert counts[0] == 0, "nothing was there before the first"
    assert all(LEAST_SHARED_TOKENS <= count < 1024 for count in counts[1:])


def test_the_summary_does_not_hang_on_the_order(plain: Path, finished: Path) -> None:
    mine, theirs = (read_run(path).predictions for path in (finished, plain))
    assert [r["id"] for r in mine] != [r["id"] for r in theirs]
    ours, expected = (csv_text(records_as_rows(score_records(rows))) for rows in (mine, theirs))
    assert ours == expected


def test_times_say_how_much_was_spared(plain: Path, finished: Path) -> None:
    ((of_plain,), (of_finished,)) = (
        times_of(read_run(path).predictions) for path in (plain, finished)
    )
    assert of_plain.reused_share == 0
    both = (reused(finished), reused(finished, "vt"))
    spared = sum(sum(of_task.values()) for of_task in both)
    whole = {r["id"]: r["prompt_tokens"] for r in read_run(finished).predictions}
    assert of_finished.reused_share == pytest.approx(spared / sum(whole.values()))
    note = f"prefills were spared those taken over: {of_finished.reused_share:.0%} at 1024."
    assert note in times_table([of_finished]).notes[-1]
    assert not any("taken over" in text for text in times_table([of_plain]).notes)


@pytest.mark.parametrize(
    "more", [["--batch-size", "5"], ["--batch-size", "1", "--num-workers", "2"]]
)
def test_batches_and_workers(more: list[str], data: Path, plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert run(command(data, "--reuse-prefix", *more, output=path)) == 0
    assert answers(path) == answers(plain)
    counts = reused(path).values()
    workers = 1 + ("--num-workers" in more)
    assert sum(count > 0 for count in counts) >= len(counts) - workers


def test_a_stopped_run_goes_on(data: Path, plain: Path, finished: Path, tmp_path: Path) -> None:
    """From a row that was cut in the middle, and with what is left in its order."""
    copy = tmp_path / "cut"
    shutil.copytree(finished, copy)
    log = copy / "predictions.jsonl"
    os.truncate(log, log.stat().st_size // 3)
    assert run(command(data, "--reuse-prefix", output=copy)) == 0
    assert answers(copy) == answers(plain)
    zeros = [name for name, count in reused(copy).items() if not count]
    assert len(zeros) == 2, "the first of each command"
    assert run(command(data, output=copy)) == 0, "nothing is left, and nothing is refused"


def test_a_session_without_exact_keys_takes_nothing_over(data: Path, tmp_path: Path) -> None:
    """Cells that come later, of which none keeps all: the run goes on without."""
    keeps = ["--method", "random,streaming", "--sparse-budget", "64", "--max-new-tokens", "4"]
    what = ["eval", "--model", "demo", "--device", "cpu", "--data", str(data), "--reuse-prefix"]
    more = ["--tasks", "niah_single_2", "--output", str(tmp_path / "run")]
    assert run([*what, "--method", "random", *keeps[2:], *more]) == 0
    assert run([*what, *keeps, *more]) == 0
    rows = read_run(tmp_path / "run").predictions
    by_method = {
        m: {r["reused_tokens"] for r in rows if r["method"] == m} for m in keeps[1].split(",")
    }
    assert max(by_method["random"]) > 0
    assert by_method["streaming"] == {0}


def test_no_method_that_keeps_all_is_refused(data: Path, tmp_path: Path, capsys) -> None:
    what = ["eval", "--model", "demo", "--data", str(data), "--output", str(tmp_path / "run")]
    assert run([*what, "--method", "shadowkv,streaming", "--reuse-prefix"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "none of shadowkv, streaming does: add full to --method." in said
    assert not (tmp_path / "run").exists()


def test_prompts_that_share_nothing_give_zero(data: Path, plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert run(command(data, "--reuse-prefix", "--num-samples", "1", output=path)) == 0
    expected = reused(path, "vt")["vt-1024-0"]
    texts = {s.task: s.text for task in ("niah_single_2", "vt")
             for s in Dataset.open(data).samples(1024, task, 1)}  # fmt: skip
    shared = shared_characters(*texts.values())
    assert shared < LEAST_SHARED_TOKENS, "two tasks begin with their own sentence"
    assert expected == 0
    assert set(reused(path).values()) == {0}


def test_a_failed_batch_is_answered_one_by_one(
    data: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = Session.prefill

    def fails(self: Session, ids: list[int], *, index: int = 0, key: str = ""):
        if index == 1:
            raise MemoryError("out of memory")
        return prefill(self, ids, index=index, key=key)

    monkeypatch.setattr(Session, "prefill", fails)
    path = tmp_path / "run"
    assert run(command(data, "--reuse-prefix", "--batch-size", "3", output=path)) == 0
    assert answers(path) == answers(plain)
    assert sum(count > 0 for count in reused(path).values()) == 3


def test_a_dry_run_counts_what_is_spared(
    data: Path, finished: Path, tmp_path: Path, capsys
) -> None:
    plans = {}
    for more in ([], ["--reuse-prefix"]):
        wanted = command(data, *more, "--dry-run", "--json", output=tmp_path / "run")
        assert run(wanted) == 0
        plans[bool(more)] = json.loads(capsys.readouterr().out)
    assert plans[False]["estimated_reused_tokens"] == 0
    estimated = plans[True]["estimated_reused_tokens"]
    truth = sum(reused(finished).values()) + sum(reused(finished, "vt").values())
    assert abs(estimated - truth) < 0.1 * truth
    assert plans[True]["prompt_tokens"] == plans[False]["prompt_tokens"]
    share = estimated / plans[True]["prompt_tokens"]
    seconds = [plans[on]["estimated_prefill_seconds"] for on in (True, False)]
    assert 1 - 1.1 * share < seconds[0] / seconds[1] < 1 - 0.5 * share
    assert run(command(data, "--reuse-prefix", "--dry-run", output=tmp_path / "run")) == 0
    assert f", about {estimated:,} of them taken over (" in capsys.readouterr().out


def test_flops_of_a_prefix_are_those_of_its_own_prefill() -> None:
    shape = ModelShape(num_layers=3, num_q_heads=4, num_kv_heads=2, head_dim=16, element_bytes=4)
    facts = ModelFacts.__new__(ModelFacts)
    for name, value in {"shape": shape, "layer_parameters": 1000}.items():
        object.__setattr__(facts, name, value)
    whole, prefix, rest = (prefill_flops(facts, *a) for a in ((900,), (300,), (900, 300)))
    assert rest == tuple(w - p for w, p in zip(whole, prefix, strict=True))


# ---- the order ----


def sample(text: str, name: str, task: str = "a", length: int = 4096) -> Sample:
    return Sample(
        id=name, task=task, index=0, prompt=text or "-", answer_prefix="", references=["x"],
        metric="m", length=2000, prompt_tokens=1000, max_new_tokens=1000, context_length=length,
        question_start=0,
    )  # fmt: skip


@given(one=st.text("ab", max_size=9), other=st.text("ab", max_size=9))
def test_shared_characters_end_at_the_first_difference(one: str, other: str) -> None:
    count = shared_characters(one, other)
    assert one[:count] == other[:count]
    assert count == min(len(one), len(other)) or one[count] != other[count]


@given(st.lists(st.text("ab", max_size=6), min_size=1, max_size=8))
def test_the_sample_before_shares_most(texts: list[str]) -> None:
    samples = [sample(text, str(number)) for number, text in enumerate(texts)]
    ordered = by_beginning(samples)
    assert sorted(s.id for s in ordered) == sorted(s.id for s in samples)
    for place in range(1, len(ordered)):
        shared = [shared_characters(ordered[place].text, s.text) for s in ordered[:place]]
        assert shared[-1] == max(shared)


def test_tasks_and_lengths_stay_where_they_are() -> None:
    kinds = [("b", 8192), ("a", 8192), ("b", 4096)]
    samples = [sample(text, f"{t}{n}{text}", t, n) for t, n in kinds for text in ("z", "y")]
    expected = ["b8192y", "b8192z", "a8192y", "a8192z", "b4096y", "b4096z"]
    assert [s.id for s in by_beginning(samples)] == expected


def test_a_worker_knows_the_batch_before_its_own() -> None:
    """Texts of 1,000 characters and as many tokens, which share ever more with the next."""
    samples = [sample("x" * n * 100 + "y" * (1000 - n * 100), str(n)) for n in range(1, 7)]
    batches = [samples[0:2], samples[2:4], samples[4:6]]
    one = {"1": 0, "2": 100, "3": 200, "4": 300, "5": 400, "6": 500}
    assert expected_reuse(batches, 1) == one
    assert expected_reuse(batches, 2) == one
    assert expected_reuse(batches, 3) == one | {"3": 0, "5": 200}
    assert expected_reuse(batches, 6) == one | {"3": 0, "5": 0}
    near = [[sample("x" * (LEAST_SHARED_TOKENS - n) + "y" * 990, str(n))] for n in (1, 0)]
    assert set(expected_reuse(near, 1).values()) == {0}, "so little is not taken over"
    far = [[sample("x" * 1000, "1")], [sample("x" * 1000, "2", length=8192)]]
    assert set(expected_reuse(far, 1).values()) == {0}
    assert expected_reuse([[*far[0], sample("x" * 1000, "3")]], 1)["3"] == 999
