"""On a CUDA device: the engine against transformers and against the CPU. Run by `make test-gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shadowkv_cli.cells import build_specs
from shadowkv_cli.cli import run
from shadowkv_cli.config import FullSpec, ValueForm
from shadowkv_cli.model.loading import LoadedModel, describe
from shadowkv_cli.model.session import Session
from shadowkv_cli.results import read_run
from shadowkv_cli.testing import FAMILIES, tiny_model

pytestmark = pytest.mark.gpu
NEW_TOKENS = 12

# The compiled kernels serve heads of 64; the torch references those of 16.
head_dims = pytest.mark.parametrize("head_dim", [16, 64])


def on_gpu(family: str, dtype: torch.dtype = torch.float32, head_dim: int = 16) -> LoadedModel:
    loaded = tiny_model(family, dtype=dtype, head_dim=head_dim)
    return describe(loaded.model.to("cuda"), loaded.name, random_weights=True)


def prompt_of(tokens: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 256, (tokens,), generator=generator).tolist()


def answers(loaded: LoadedModel, specs: list, ids: list[int], steps: int = NEW_TOKENS):
    session = Session(loaded, specs, prompt_tokens=len(ids), new_tokens=steps)
    first = session.prefill(ids, key="a").argmax(-1).expand(len(specs))
    return session.generate(first, [steps] * len(specs), frozenset()), session


@pytest.mark.parametrize("family", FAMILIES)
def test_full_attention_equals_generate(family: str) -> None:
    loaded, ids = on_gpu(family), prompt_of(301)
    out = loaded.model.generate(
        torch.tensor([ids], device="cuda"),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device="cuda"),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    found, _ = answers(loaded, [FullSpec()], ids)
    assert found[0] == out[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", ["device", "host"])
@head_dims
def test_shadowkv_that_keeps_everything_equals_full(
    family: str, placement: str, head_dim: int
) -> None:
    loaded, ids = on_gpu(family, head_dim=head_dim), prompt_of(301)
    # Full rank: both KV heads side by side.
    settings = {"rank": str(2 * head_dim), "sparse_budget": "304", "dense_fallback": "never"}
    specs = build_specs(["full", f"shadowkv:value_placement={placement}"], settings)
    (full, shadow), session = answers(loaded, specs, ids)
    assert shadow == full
    assert session.audit(1, NEW_TOKENS - 1)["selected"] > 0
    if placement == "host":
        held = session.store.value_store.held[ValueForm("host")]
        assert all(values.is_pinned() for values in held.values())


@pytest.mark.parametrize("family", FAMILIES)
@head_dims
def test_every_method_answers_as_on_the_cpu(family: str, head_dim: int) -> None:
    ids = prompt_of(403)
    methods = ["full", "shadowkv", "shadowkv:landmarks_per_chunk=2", "oracle", "random"]
    specs = build_specs([*methods, "streaming"], {"rank": "16", "sparse_budget": "64"})
    gpu, _ = answers(on_gpu(family, head_dim=head_dim), specs, ids)
    cpu, _ = answers(tiny_model(family, head_dim=head_dim), specs, ids)
    # Float32 products differ in the last bits, so a near-tie may flip an answer: not most of them.
    same = sum(a == b for a, b in zip(gpu, cpu, strict=True))
    assert same >= len(specs) - 1, (family, gpu, cpu)


@pytest.mark.parametrize("buffers", ["value_buffer=4,key_buffer=2", "value_placement=host"])
@head_dims
def test_where_chunks_are_held_changes_no_token(buffers: str, head_dim: int) -> None:
    specs = build_specs(["shadowkv", f"shadowkv:{buffers}"], {"rank": "16", "sparse_budget": "32"})
    (plain, other), _ = answers(
        on_gpu("qwen2", torch.bfloat16, head_dim), specs, prompt_of(400), 40
    )
    assert plain == other


def test_bf16_logits_are_at_most_twice_as_wrong_as_transformers() -> None:
    ids = prompt_of(400)
    exact = tiny_model("llama").model(torch.tensor([ids])).logits[0, -1].detach()
    rough = on_gpu("llama", torch.bfloat16)
    theirs = rough.model(torch.tensor([ids], device="cuda")).logits[0, -1].float().cpu().detach()
    session = Session(rough, [FullSpec()], prompt_tokens=400, new_tokens=2)
    ours = session.prefill(ids).cpu()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-3


def test_eval_sweep_and_bench_run_on_the_gpu(
    tiny_model_folder: Path, ruler_folder: Path, tmp_path: Path, capsys
) -> None:
    model = ["--model", str(tiny_model_folder), "--device", "cuda"]
    data = ["--data", str(ruler_folder), "--num-samples", "1"]
    small = ["--rank", "8", "--sparse-budget", "32"]
    methods = ["--method", "full,shadowkv,oracle,random,streaming"]
    assert run(["eval", *model, *data, *methods, *small, "--output", str(tmp_path / "e")]) == 0
    manifest = read_run(tmp_path / "e").manifest
    assert manifest["identity"]["dtype"] == "bfloat16"
    assert "NVIDIA" in json.dumps(manifest["environment"])
    fast = ["--decode-steps", "8", "--rounds", "2", "--bench-context-length", "2k"]
    grid = ["--rank", "8,16", "--sparse-budget", "32,64", "--bench-batch-size", "1,4"]
    assert run(["sweep", *model, *data, *grid, *fast, "--output", str(tmp_path / "s")]) == 0
    assert len(read_run(tmp_path / "s").throughput) == 5 * 2 * 2
    host = ["--value-placement", "host", "--context-length", "2k", "--batch-size", "4"]
    bench = ["bench", *model, *small, *host, "--rounds", "2", "--decode-steps", "8"]
    assert run([*bench, "--output", str(tmp_path / "b")]) == 0
    shadow = [r for r in read_run(tmp_path / "b").throughput if r["method"] == "shadowkv"]
    assert all(r["host_bytes"] > 0 and r["peak_memory_bytes"] > 0 for r in shadow)


def test_samples_together_give_what_they_give_alone(tmp_path: Path) -> None:
    """By one graph of all their rows; a trained model, whose answers do not hang on last bits."""
    data = tmp_path / "data"
    build = "build-data ruler --tokenizer demo --context-length 1k --num-samples 5 --seed 3"
    tasks = "niah_single_2,niah_multikey_1"
    assert run([*build.split(), "--tasks", tasks, "--output", str(data)]) == 0
    found = {}
    for size in ("1", "4", "auto"):
        command = ["eval", "--model", "demo", "--device", "cuda", "--dtype", "float32"]
        command += ["--data", str(data), "--method", "full,shadowkv", "--sparse-budget", "64"]
        more = ["--rank", "32", "--batch-size", size, "--output", str(tmp_path / size)]
        assert run([*command, *more]) == 0
        rows = read_run(tmp_path / size).predictions
        found[size] = {(r["id"], r["cell"]): r["prediction"] for r in rows}
        most = max(r["samples_together"] for r in rows)
        assert most == {"1": 1, "4": 4, "auto": 5}[size]
    assert found["1"] == found["4"] == found["auto"]


@pytest.mark.parametrize("size", ["1", "4"])
def test_beginnings_that_are_taken_over_change_no_answer(size: str, tmp_path: Path) -> None:
    """A trained model; some samples of every task share their first text."""
    data = tmp_path / "data"
    build = "build-data ruler --tokenizer demo --context-length 4k --num-samples 5 --seed 3"
    tasks = "niah_single_2,niah_multikey_1"
    assert run([*build.split(), "--tasks", tasks, "--output", str(data)]) == 0
    found = {}
    for reuse in ("--no-reuse-prefix", "--reuse-prefix"):
        command = ["eval", "--model", "demo", "--device", "cuda", "--dtype", "float32"]
        command += ["--data", str(data), "--method", "full,shadowkv", "--sparse-budget", "64"]
        more = ["--rank", "32", "--batch-size", size, reuse, "--output", str(tmp_path / reuse)]
        assert run([*command, *more]) == 0
        rows = read_run(tmp_path / reuse).predictions
        found[reuse] = {(r["id"], r["cell"]): r["prediction"] for r in rows}
        reused = sum(r["reused_tokens"] for r in rows) / sum(r["prompt_tokens"] for r in rows)
        assert reused > 0.05 if reuse == "--reuse-prefix" else reused == 0
    assert found["--reuse-prefix"] == found["--no-reuse-prefix"]


def test_doctor_sees_the_gpu(capsys) -> None:
    assert run(["doctor", "--require", "cuda", "--probe", "--json", "--offline"]) == 0
    report = capsys.readouterr().out
    assert "NVIDIA" in report
