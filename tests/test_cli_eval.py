"""`shadowkv eval` from the command line: results, resume, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest

from shadowkv_cli import answering
from shadowkv_cli.cli import run
from shadowkv_cli.results import read_run

METHODS = "full,shadowkv,oracle,random,streaming"
SMALL = ["--rank", "16", "--sparse-budget", "32"]
MEASURED = ("prefill_s", "decode_s", "peak_memory_bytes")


def rows_of(path: Path) -> list[dict]:
    return read_run(path).predictions


def stable(rows: list[dict]) -> list[dict]:
    """Rows without what differs from run to run: times, and which prefill made them."""
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in rows]


@pytest.fixture
def command(tiny_model_folder: Path, ruler_folder: Path) -> list[str]:
    return ["eval", "--model", str(tiny_model_folder), "--data", str(ruler_folder)]


@pytest.fixture(scope="session")
def finished(tiny_model_folder: Path, ruler_folder: Path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "all"
    arguments = ["--model", str(tiny_model_folder), "--data", str(ruler_folder)]
    arguments += ["--method", METHODS, *SMALL, "--output", str(path)]
    assert run(["eval", *arguments]) == 0
    return path


def test_every_sample_has_a_row_for_every_method(finished: Path) -> None:
    rows = rows_of(finished)
    assert len(rows) == 2 * 3 * 5
    for row in rows:
        audit = row["audit"]
        parts = sum(audit[k] for k in ("selected", "outlier", "local", "generated"))
        assert audit["attended_tokens"] == parts, row["id"]
        assert row["error"] is None
        assert row["score"] is not None
        assert row["row_bucket"] == 5, "a CPU pads no rows"
    sparse = [r for r in rows if r["method"] != "full"]
    assert {r["sparse_budget_tokens"] for r in sparse} == {32}
    assert {r["outlier_tokens"] for r in sparse} == {8}
    assert not any(r["dense_fallback"] for r in sparse)
    for sample in {r["id"] for r in rows}:
        of_sample = [r for r in sparse if r["id"] == sample]
        kept = {r["audit"]["attended_tokens"] - r["audit"]["generated"] for r in of_sample}
        assert len(kept) == 1, "all sparse methods attend as many prompt tokens"


def test_the_manifest_says_what_ran(finished: Path, ruler_folder: Path) -> None:
    manifest = read_run(finished).manifest
    assert manifest["identity"]["dtype"] == "float32"
    assert manifest["flags"]["synthetic"] is True
    assert any("not comparable" in note for note in manifest["notes"])
    assert manifest["environment"]["attention_backend"] == ["flash"]
    assert "full" in manifest["scope"]["cells"]


def test_json_and_table(command: list[str], finished: Path, capsys) -> None:
    again = [*command, "--method", METHODS, *SMALL, "--output", str(finished)]
    capsys.readouterr()
    assert run([*again, "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload["schema_version"] == 1
    assert {r["cell"].split(":")[0] for r in payload["records"]} == set(METHODS.split(","))
    assert run(again) == 0
    out = capsys.readouterr().out
    assert "niah_single_2" in out
    assert "not comparable" in out
    assert (finished / "summary.csv").read_text().count("\n") > 5


def test_a_run_continues_and_ends_the_same(
    command: list[str], finished: Path, tmp_path: Path, capsys
) -> None:
    copy = tmp_path / "cut"
    shutil.copytree(finished, copy)
    log = copy / "predictions.jsonl"
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])  # in the middle of a row
    assert run([*command, "--method", METHODS, *SMALL, "--output", str(copy)]) == 0
    assert "interrupted write" in capsys.readouterr().err
    key = lambda row: (row["id"], row["cell"])  # noqa: E731
    assert sorted(stable(rows_of(copy)), key=key) == sorted(stable(rows_of(finished)), key=key)


def test_kill_9_and_again(command: list[str], finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "killed"
    arguments = [*command, "--method", METHODS, *SMALL, "--output", str(path)]
    code = f"from shadowkv_cli.cli import run; raise SystemExit(run({arguments!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    log = path / "predictions.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert run(arguments) == 0
    key = lambda row: (row["id"], row["cell"])  # noqa: E731
    assert sorted(stable(rows_of(path)), key=key) == sorted(stable(rows_of(finished)), key=key)


def test_scope_grows_and_pairs_stay_pairs(command: list[str], tmp_path: Path) -> None:
    path = ["--output", str(tmp_path / "r")]
    assert run([*command, "--method", "full,streaming", "--num-samples", "1", *path]) == 0
    assert run([*command, "--method", "full,streaming,oracle", "--num-samples", "2", *path]) == 0
    rows = rows_of(tmp_path / "r")
    oracle = [r for r in rows if r["method"] == "oracle"]
    assert len(oracle) == 2 * 2
    full = {(r["id"], r["pass"]) for r in rows if r["method"] == "full"}
    assert all((r["id"], r["pass"]) in full for r in oracle)
    assert {r["pass"] for r in oracle} == {0, 1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--dtype", "bfloat16"], "dtype"),
        (["--method", "streaming:sink_tokens=8"], "sink_tokens=8"),
    ],
)
def test_another_configuration_is_refused(
    command: list[str], tmp_path: Path, capsys, change: list[str], says: str
) -> None:
    base = [*command, "--num-samples", "1", "--tasks", "vt", "--output", str(tmp_path / "r")]
    assert run([*base, "--method", "streaming"]) == 0
    before = (tmp_path / "r" / "predictions.jsonl").read_bytes()
    again = change if "--method" in change else ["--method", "streaming", *change]
    assert run([*base, *again]) == 2
    assert says in capsys.readouterr().err
    assert (tmp_path / "r" / "predictions.jsonl").read_bytes() == before


def test_a_short_prompt_is_answered_densely_and_said_so(
    command: list[str], tmp_path: Path, capsys
) -> None:
    arguments = [*command, "--num-samples", "1", "--rank", "8", "--sparse-budget", "1024"]
    assert run([*arguments, "--output", str(tmp_path / "r")]) == 0
    rows = rows_of(tmp_path / "r")
    full, shadow = ([r for r in rows if r["method"] == m] for m in ("full", "shadowkv"))
    assert all(r["dense_fallback"] for r in shadow)
    assert [r["prediction"] for r in shadow] == [r["prediction"] for r in full]
    assert "not tested" in capsys.readouterr().out.lower()
    never = [*arguments, "--dense-fallback", "never", "--output", str(tmp_path / "n")]
    assert run(never) == 0
    assert not any(r["dense_fallback"] for r in rows_of(tmp_path / "n"))


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(
    command: list[str], tmp_path: Path, capsys, monkeypatch
) -> None:
    from shadowkv_cli.methods import oracle

    def fail(*args, **kwargs):
        raise RuntimeError("broken on purpose")

    arguments = [*command, "--method", METHODS, *SMALL, "--num-samples", "1"]
    arguments += ["--output", str(tmp_path / "r")]
    with monkeypatch.context() as patch:
        patch.setattr(oracle.OracleGroup, "select", fail)
        assert run(arguments) == 3
    rows = rows_of(tmp_path / "r")
    failed = [r for r in rows if r["error"]]
    assert {r["method"] for r in failed} == {"oracle"}
    assert all("broken on purpose" in r["error"] for r in failed)
    assert sum(r["error"] is None for r in rows) == 2 * 4
    assert run(arguments) == 0, "what failed runs again"
    assert sum(r["method"] == "oracle" and r["error"] is None for r in rows_of(tmp_path / "r")) == 2


def test_one_of_several_cells_of_a_group_fails(
    command: list[str], tmp_path: Path, monkeypatch
) -> None:
    from shadowkv_cli.methods.shadowkv import ShadowKVGroup

    original = ShadowKVGroup.load_keys

    def fail_for_rank_8(self, *args):
        if any(row.spec.rank == 8 for row in self.rows):
            raise RuntimeError("rank 8 is broken")
        return original(self, *args)

    monkeypatch.setattr(ShadowKVGroup, "load_keys", fail_for_rank_8)
    arguments = [*command, "--method", "full,shadowkv", "--rank", "4,8,16", "--num-samples", "1"]
    assert run([*arguments, "--tasks", "vt", "--output", str(tmp_path / "r")]) == 3
    rows = rows_of(tmp_path / "r")
    assert {r["settings"].get("rank") for r in rows if r["error"]} == {8}
    good = {r["settings"].get("rank") for r in rows if not r["error"] and r["method"] != "full"}
    assert good == {4, 16}
    full = {(r["id"], r["pass"]) for r in rows if r["method"] == "full"}
    assert all((r["id"], r["pass"]) in full for r in rows if not r["error"])


def test_answers_do_not_echo_the_prompt(finished: Path) -> None:
    for row in rows_of(finished):
        assert row["generated_tokens"] <= 128
        assert "mentioned in the provided text" not in row["prediction"][:40]


def test_interrupt_says_how_to_go_on(command: list[str], tmp_path, capsys, monkeypatch) -> None:
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(answering.Answerer, "answer", interrupt)
    assert run([*command, "--output", str(tmp_path / "r"), "--rank", "8"]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_several_processes_give_the_rows_of_one(
    command: list[str], finished: Path, tmp_path: Path
) -> None:
    path = tmp_path / "shared"
    arguments = ["--method", METHODS, *SMALL, "--num-workers", "3", "--output", str(path)]
    assert run([*command, *arguments]) == 0
    assert read_run(path).manifest["environment"]["num_workers"] == 3

    def by_place(rows: list[dict]) -> dict[tuple, dict]:
        return {(r["id"], r["cell"]): r for r in stable(rows)}

    assert by_place(rows_of(path)) == by_place(rows_of(finished))


def test_a_worker_that_dies_is_one_line_and_loses_nothing(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "died"
    arguments = [*command, *SMALL, "--num-workers", "2", "--output", str(path)]

    def kill_workers() -> None:
        for child in active_children():
            os.kill(child.pid, signal.SIGKILL)

    answer = answering.Answerer.answer
    with pytest.MonkeyPatch.context() as patch:

        def answer_and_kill(self, *args):
            kill_workers()
            return answer(self, *args)

        patch.setattr(answering.Answerer, "answer", answer_and_kill)
        assert run(arguments) == 1
    err = capsys.readouterr().err
    assert "smaller --num-workers" in err.splitlines()[-1], err
    kept = len({r["id"] for r in rows_of(path)})
    assert 0 < kept < 6
    assert run(arguments) == 0
    assert len({r["id"] for r in rows_of(path)}) == 6


def test_answers_can_be_cut(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / "short"
    arguments = [*command, "--method", "full", "--output", str(path)]
    assert run([*arguments, "--max-new-tokens", "5"]) == 0
    rows = rows_of(path)
    assert {r["generated_tokens"] for r in rows} == {5}
    assert all(r["finish"] == "length" for r in rows)
    assert any("cut at 5 tokens" in note for note in read_run(path).manifest["notes"])
    assert run(arguments) == 2, "a run with other limits is another run"
    assert run([*arguments, "--max-new-tokens", "0"]) == 2
