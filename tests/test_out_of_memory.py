"""Memory that does not suffice for a sample: recorded, and the rest goes on."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from shadowkv_cli.answering import Answerer
from shadowkv_cli.bench import throughput
from shadowkv_cli.cli import run
from shadowkv_cli.config import MethodSpec
from shadowkv_cli.encoding import PromptEncoder
from shadowkv_cli.errors import EXIT_INCOMPLETE, OutOfHostMemory
from shadowkv_cli.model.failures import MethodFailure, blaming, is_out_of_memory
from shadowkv_cli.model.loading import LoadedModel
from shadowkv_cli.model.session import Session
from shadowkv_cli.results import read_run
from shadowkv_cli.tasks.tokenization import encode_prompt, load_tokenizer

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    OutOfHostMemory("Cannot pin 8.1 GB of host memory"),
    MemoryError(),
]


def command(model: Path, data: Path, output: Path, methods: str) -> list[str]:
    what = ["--model", str(model), "--data", str(data), "--tasks", "vt", "--method", methods]
    return ["eval", *what, "--sparse-budget", "32", "--rank", "8", "--output", str(output)]


@pytest.fixture
def fail_on_second(monkeypatch: pytest.MonkeyPatch):
    """Let prefills of the second sample fail in sessions of more than so many cells."""

    def install(error: BaseException, most_cells: int) -> list[list[str]]:
        tried: list[list[str]] = []
        prefill = Session.prefill

        def full(self: Session, ids: list[int], *, key: str = "", **more: int) -> torch.Tensor:
            if key.endswith("1"):
                tried.append([spec.name for spec in self.specs])
                if len(self.specs) > most_cells:
                    raise error
            return prefill(self, ids, key=key, **more)

        monkeypatch.setattr(Session, "prefill", full)
        return tried

    return install


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_sample_is_recorded_and_the_rest_goes_on(
    error: BaseException, fail_on_second, tiny_model_folder: Path, ruler_folder: Path,
    tmp_path: Path, capsys,
) -> None:  # fmt: skip
    tried = fail_on_second(error, 0)
    arguments = command(tiny_model_folder, ruler_folder, tmp_path / "r", "full,shadowkv,oracle")
    assert run(arguments) == EXIT_INCOMPLETE
    assert tried == [["full", "shadowkv", "oracle"], ["full"], ["shadowkv", "oracle"]]
    rows = read_run(tmp_path / "r").predictions
    failed = [row for row in rows if row["error"] is not None]
    assert len(rows) == 3 * 3
    assert [row["cell"].partition(":")[0] for row in failed] == ["full", "shadowkv", "oracle"]
    assert len({row["id"] for row in failed}) == 1
    assert all(row["score"] is None for row in failed)
    assert all(type(error).__name__ in r["error"] or str(error) in r["error"] for r in failed)
    said = capsys.readouterr().err
    assert said.count("Out of memory on ") == 1


def test_what_fits_alone_is_answered_alone(
    fail_on_second, tiny_model_folder: Path, ruler_folder: Path, tmp_path: Path
) -> None:
    fail_on_second(ERRORS[0], 1)
    arguments = command(tiny_model_folder, ruler_folder, tmp_path / "r", "full,shadowkv")
    assert run(arguments) == 0
    rows = read_run(tmp_path / "r").predictions
    assert len(rows) == 3 * 2
    assert all(row["error"] is None for row in rows)
    passes = {(row["id"][-1], row["method"]): row["pass"] for row in rows}
    assert (passes["1", "full"], passes["1", "shadowkv"]) == (0, 1)


def test_it_runs_again_with_the_same_command(
    fail_on_second, tiny_model_folder: Path, ruler_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    fail_on_second(ERRORS[0], 0)
    arguments = command(tiny_model_folder, ruler_folder, tmp_path / "r", "full,shadowkv")
    assert run(arguments) == EXIT_INCOMPLETE
    before = (tmp_path / "r" / "predictions.jsonl").read_bytes()
    monkeypatch.undo()
    assert run(arguments) == 0
    assert (tmp_path / "r" / "predictions.jsonl").read_bytes().startswith(before)


def test_nothing_of_a_failed_pass_is_held(
    fail_on_second, tiny_model_folder: Path, ruler_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    fail_on_second(ERRORS[0], 0)
    held: list[object] = []
    let_go = Answerer._let_go

    def watch(self: Answerer) -> None:
        let_go(self)
        held.append(self._session)

    monkeypatch.setattr(Answerer, "_let_go", watch)
    run(command(tiny_model_folder, ruler_folder, tmp_path / "r", "full,shadowkv"))
    assert held == [None] * 3


def test_another_fault_of_torch_still_ends_the_run(
    fail_on_second, tiny_model_folder: Path, ruler_folder: Path, tmp_path: Path, capsys
) -> None:
    fail_on_second(RuntimeError("an illegal memory access was encountered"), 0)
    arguments = command(tiny_model_folder, ruler_folder, tmp_path / "r", "full,shadowkv")
    assert run(arguments) == 1
    assert "illegal memory access" in capsys.readouterr().err
    assert len(read_run(tmp_path / "r").predictions) == 2


@pytest.mark.parametrize("error", ERRORS[:3], ids=str)
def test_a_method_that_finds_no_room_says_so(error: RuntimeError) -> None:
    suspects: list[MethodSpec] = []
    with pytest.raises(MethodFailure) as failure, blaming(suspects):
        raise error
    assert is_out_of_memory(failure.value)
    with pytest.raises(MethodFailure) as failure, blaming(suspects):
        raise RuntimeError("did not converge")
    assert not is_out_of_memory(failure.value)


# ---- prompts are encoded ahead ----


def test_a_prompt_that_was_begun_gives_the_same_ids() -> None:
    tokenizer = load_tokenizer("demo")
    encoder = PromptEncoder(tokenizer)
    texts = [f"The number for key-{i} is {i * 7919}." * 50 for i in range(6)]
    for text in texts:
        encoder.begin(text)
        encoder.begin(text)
    for text in reversed(texts):
        assert encoder.ids(text) == encode_prompt(tokenizer, text)
        assert encoder.decode(encoder.ids(text)[:20])


def test_what_fails_ahead_fails_where_it_is_wanted() -> None:
    encoder = PromptEncoder(load_tokenizer("demo"))
    encoder.begin(None)  # type: ignore[arg-type]
    with pytest.raises((TypeError, AttributeError)):
        encoder.ids(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ERRORS[0], *ERRORS[3:]], ids=lambda error: type(error).__name__)
def test_bench_measures_alone_what_does_not_fit_together(
    error: BaseException, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a session that did not fit is held while the next one is built."""
    held: weakref.WeakSet[Session] = weakref.WeakSet()
    built: list[list[str]] = []
    fill, begin = throughput.fill_synthetic, Session.__init__

    def count(self: Session, loaded: LoadedModel, specs: list[MethodSpec], **more: int) -> None:
        gc.collect()
        assert not list(held)
        held.add(self)
        built.append([spec.name for spec in specs])
        begin(self, loaded, specs, **more)

    def full(session: Session, tokens: int) -> torch.Tensor:
        if len(session.specs) > 1:
            raise type(error)(*error.args)  # Its own: it holds what is held where it is raised.
        return fill(session, tokens)

    monkeypatch.setattr(Session, "__init__", count)
    monkeypatch.setattr(throughput, "fill_synthetic", full)
    told = ["bench", "--model", str(tiny_model_folder), "--method", "full,shadowkv,streaming"]
    told += ["--rank", "8", "--sparse-budget", "32", "--context-length", "512", "--rounds", "2"]
    told += ["--decode-steps", "3", "--warmup-steps", "1", "--state", "synthetic", "--share"]
    assert run([*told, "--output", str(tmp_path / "b")]) == 0
    rows = read_run(tmp_path / "b").throughput
    assert {row["error"] for row in rows} == {None}
    assert sorted((row["method"], row["round"]) for row in rows) == [
        (method, number) for method in ("full", "shadowkv", "streaming") for number in (0, 1)
    ]
    assert [len(names) for names in built] == [3, 1, 1, 1, 1, 1, 1]
