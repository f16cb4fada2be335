"""What an outside review found: models that broke, and numbers that could mislead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shadowkv_cli.answering import Answerer
from shadowkv_cli.bench.cases import Room, make_cases
from shadowkv_cli.bench.state import fill_synthetic
from shadowkv_cli.bench.throughput import check_comparable, describe_case, run_cases
from shadowkv_cli.cells import build_specs
from shadowkv_cli.cli import run
from shadowkv_cli.config import FullSpec, ShadowKVSpec
from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.evaluate import Work, find_missing
from shadowkv_cli.frontier import Doubt, FrontierPoint, doubt_between
from shadowkv_cli.methods.shadowkv import ShadowKVGroup
from shadowkv_cli.model.failures import MethodFailure
from shadowkv_cli.model.loading import LoadedModel, describe
from shadowkv_cli.model.session import Session
from shadowkv_cli.results import read_run
from shadowkv_cli.run_config import BenchSettings
from shadowkv_cli.stats import Interval, median_interval
from shadowkv_cli.tables import frontier_table
from shadowkv_cli.tasks.rows import Sample
from shadowkv_cli.tasks.wrappers import resolve_wrapper
from shadowkv_cli.testing import tiny_model

NEW_TOKENS = 8
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}


def build(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **{**SIZES, **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def loaded_model(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> LoadedModel:
    return describe(build(kind, dtype, **more), f"tiny-{kind}", random_weights=True)


def prompt_of(tokens: int) -> list[int]:
    return torch.randint(3, 256, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()


SUPPORTED = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 16},
    "stablelm": {},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5": {"head_dim": 16},
}


@pytest.mark.parametrize("kind", SUPPORTED)
def test_further_families_answer_as_generate_does(kind: str) -> None:
    loaded, ids = loaded_model(kind, **SUPPORTED[kind]), prompt_of(203)
    expected = loaded.model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(ids) :].tolist()
    settings = {"rank": "32", "sparse_budget": "208", "dense_fallback": "never"}
    specs = build_specs(["full", "shadowkv"], settings)
    session = Session(loaded, specs, prompt_tokens=len(ids), new_tokens=NEW_TOKENS)
    first = session.prefill(ids, key="a").argmax(-1).expand(2)
    full, shadow = session.generate(first, [NEW_TOKENS] * 2, frozenset())
    assert (full, shadow) == (expected, expected), kind


REFUSED = {
    "gemma2": ({"head_dim": 16}, "softcap"),
    "gemma3_text": ({"head_dim": 16}, "different types"),
    "olmo3": ({}, "different types"),
    "deepseek_v3": (LATENT, "compresses its keys"),
    "falcon_h1": ({}, "cannot run with methods attached"),
    "diffllama": ({}, "more than once a layer"),
    "gpt2": ({}, "no attention layers"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_methods_cannot_serve_is_refused_when_it_is_loaded(kind: str) -> None:
    more, reason = REFUSED[kind]
    with pytest.raises(UsageError, match=reason):
        loaded_model(kind, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "glm", "phi3"])
def test_rotated_keys_are_recognised_in_each_precision(family: str, dtype: torch.dtype) -> None:
    assert tiny_model(family, dtype=dtype).odd_layers == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_without_rotation_are_no_place_for_shadowkv(dtype: torch.dtype) -> None:
    loaded = loaded_model("smollm3", dtype, no_rope_layers=[1, 0])
    assert loaded.odd_layers == (1,)
    loaded.check([FullSpec()], 100)
    with pytest.raises(UsageError, match="layer 1"):
        loaded.check([FullSpec(), ShadowKVSpec(rank=8)], 100)


def test_a_norm_behind_the_rotation_is_noticed() -> None:
    model = build("hunyuan_v1_dense", head_dim=16)
    weight = dict(model.named_parameters())["model.layers.1.self_attn.key_layernorm.weight"]
    with torch.no_grad():
        weight[:8] = 3.0
    assert describe(model, "tiny").odd_layers == (1,)


def test_a_sliding_window_is_refused_while_decoding_too() -> None:
    loaded = loaded_model("mistral", sliding_window=64)
    session = Session(loaded, [FullSpec()], prompt_tokens=60, new_tokens=8)
    first = session.prefill(prompt_of(60), key="a").argmax(-1).expand(1)
    with pytest.raises(UsageError, match="window of 64"):
        session.generate(first, [8], frozenset())
    synthetic = Session(loaded, [FullSpec()], prompt_tokens=128, new_tokens=2)
    with pytest.raises(UsageError, match="window of 64"):
        synthetic.decode_step(fill_synthetic(synthetic, 128))


@pytest.mark.parametrize("where", ["group", "low rank"])
def test_a_method_that_fails_while_prefilling_is_named(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("did not converge")

    if where == "group":
        monkeypatch.setattr(ShadowKVGroup, "prefill_layer", fail)
    else:
        monkeypatch.setattr("shadowkv_cli.methods.store.factorise_parts", fail)
    specs = build_specs(["full", "oracle", "shadowkv"], {"sparse_budget": "16"} | {"rank": "8"})
    session = Session(tiny_model("llama"), specs, prompt_tokens=200, new_tokens=4)
    with pytest.raises(MethodFailure, match="did not converge") as failure:
        session.prefill(prompt_of(200), key="a")
    assert failure.value.suspects == [specs[2]]


def sample(name: str) -> Sample:
    return Sample(
        id=name,
        task="t",
        index=0,
        prompt="p",
        answer_prefix="",
        references=["r"],
        metric="string_match_all",
        length=20,
        prompt_tokens=10,
        max_new_tokens=10,
        context_length=20,
        question_start=0,
    )


def test_full_attention_that_comes_later_gets_pairs() -> None:
    full, shadow = specs = build_specs(["full", "shadowkv"], {})
    work = Work([sample("new"), sample("shadow"), sample("full"), sample("both")])
    done = {"shadow": {shadow.cell}, "full": {full.cell}, "both": {full.cell, shadow.cell}}
    find_missing(work, specs, done)
    assert work.missing == {"new": specs, "shadow": specs, "full": specs, "both": []}


def settings_of(**changes: Any) -> BenchSettings:
    how = {"decode_steps": 3, "warmup_steps": 1, "rounds": 2, "state": "tokens"} | changes
    return BenchSettings(context_lengths=(256,), **how)


@pytest.mark.parametrize("share", [True, False])
def test_memory_and_prefill_are_told_only_of_a_cell_alone(share: bool) -> None:
    loaded, settings = tiny_model("llama"), settings_of(share=share)
    specs = build_specs(["full", "shadowkv"], {"rank": "8", "sparse_budget": "16"})
    cases = make_cases(specs, settings, Room(loaded.shape, loaded.device))
    rows = list(run_cases(cases, settings, loaded, done=lambda *_: False))
    assert len(rows) == 4
    for row in rows:
        assert (row["prefill_s"] is None) == share, row["cell"]
        assert (row["peak_memory_bytes"] is None) == share, row["cell"]


def test_waiting_sessions_are_no_part_of_a_peak() -> None:
    from shadowkv_cli.bench.throughput import _Bench

    loaded, settings = tiny_model("llama"), settings_of()
    specs = build_specs(["full", "shadowkv"], {"rank": "8", "sparse_budget": "16"})
    bench = _Bench(
        loaded, settings, make_cases(specs, settings, Room(loaded.shape, loaded.device)), None
    )
    with bench.session(0), bench.session(1):
        pass
    other = (
        specs[1].cache_bytes(loaded.shape, settings.prompt_tokens(256), settings.new_tokens).device
    )
    assert bench.peak_alone(0, 10**9) == 10**9 - other
    assert bench.peak_alone(0, 0) is None, "where the system does not tell"


@pytest.mark.parametrize(
    "change", [{"decode_steps": 9}, {"warmup_steps": 2}, {"state": "synthetic"}]
)
def test_measurements_of_another_kind_are_not_joined(change: dict[str, Any]) -> None:
    loaded, settings = tiny_model("llama"), settings_of()
    row = describe_case(
        make_cases([FullSpec()], settings, Room(loaded.shape, loaded.device))[0], settings, loaded
    )
    check_comparable([row], settings, loaded)
    with pytest.raises(UsageError, match=next(iter(change))):
        check_comparable([row], settings_of(**change), loaded)
    with pytest.raises(UsageError, match="hardware"):
        check_comparable([row | {"hardware": "another GPU"}], settings, loaded)
    other = re.sub(r"\d+ threads", "77 threads", row["hardware"])
    with pytest.raises(UsageError, match="run it with OMP_NUM_THREADS=77, choose another"):
        check_comparable([row | {"hardware": other}], settings, loaded)


def point_of(score: float, speed: float, confidence: float = 0.97, **more: Any) -> FrontierPoint:
    fields: dict[str, Any] = {
        "cell": "full",
        "method": "full",
        "settings": {},
        "budget_tokens": None,
        "score": Interval(score, score - 2, score + 2, 10),
        "score_length": 32_768,
        "tested": True,
        "tokens_per_s": Interval(speed, speed - 1, speed + 1, 6, confidence),
        "context_length": 32_768,
        "batch_rule": "1",
        "batch_size": 1,
        "hit_rate_accuracy": None,
        "hit_rate_throughput": None,
    }
    return FrontierPoint(**(fields | more))


@pytest.mark.parametrize(("rounds", "established"), [(1, False), (2, False), (5, True), (6, True)])
def test_few_rounds_establish_no_order(rounds: int, established: bool) -> None:
    confidence = median_interval(range(rounds)).confidence
    a, b = point_of(90, 10, confidence), point_of(80, 20)
    assert doubt_between(a, b) == (None if established else Doubt.FEW_ROUNDS), confidence


@pytest.mark.parametrize("score_length", [4096, 32_768, None])
def test_a_frontier_says_where_its_scores_are_from(score_length: int | None) -> None:
    point = point_of(90, 10, score_length=score_length)
    said = [note for note in frontier_table([point]).notes if "Scores are of" in note]
    assert bool(said) == (score_length != 32_768)
    assert not said or ("4096" in said[0]) == (score_length == 4096)


def test_the_phi3_wrapper_is_that_of_nvidia_main() -> None:
    wrapper = resolve_wrapper("Phi3", None)
    assert wrapper.wrap("TEXT") == "<|user|>\nTEXT<|end|>\n<|assistant|>\n"


def test_a_stopped_run_says_which_exact_attention_its_rows_came_from(
    tiny_model_folder: Path, ruler_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Answerer.answer

    def stop_at_the_second(self: Answerer, sample: Sample, *more: Any) -> Any:
        if sample.index:
            raise ShadowKVError("stopped")
        return answer(self, sample, *more)

    monkeypatch.setattr(Answerer, "answer", stop_at_the_second)
    command = ["eval", "--model", str(tiny_model_folder), "--data", str(ruler_folder)]
    more = ["--method", "full", "--tasks", "vt", "--output", str(tmp_path / "run")]
    assert run([*command, *more]) == 1
    stopped = read_run(tmp_path / "run")
    assert len(stopped.predictions) == 1
    assert stopped.manifest["environment"]["attention_backend"] == ["flash"]
