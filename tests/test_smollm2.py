"""SmolLM2-135M-Instruct, fetched as a user would: real weights recall, and need their outliers."""

from __future__ import annotations

from statistics import fmean

import pytest
from torch import Tensor

from shadowkv_cli.catalogue.places import smollm2_dir
from shadowkv_cli.cells import build_specs
from shadowkv_cli.cli import run
from shadowkv_cli.methods import Prompt
from shadowkv_cli.methods.shadowkv import ShadowKVGroup
from shadowkv_cli.model.loading import LoadedModel, load_model
from shadowkv_cli.model.session import Session
from shadowkv_cli.run_config import ModelChoice
from shadowkv_cli.stats import paired_difference
from shadowkv_cli.tasks.rows import Dataset, Sample
from shadowkv_cli.tasks.tokenization import encode_prompt, load_tokenizer
from shadowkv_cli.testing import score_cells

pytestmark = pytest.mark.network

NEW_TOKENS = 16
GENEROUS = "shadowkv:sparse_budget=128,rank=96,chunk_size=4"
STARVED = "shadowkv:sparse_budget=8,rank=16"
ORACLE = "oracle:sparse_budget=128,chunk_size=4"
RANDOM = "random:sparse_budget=128,chunk_size=4"


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    assert run(["models", "fetch", "smollm2"]) == 0
    assert (smollm2_dir() / "LICENSE").is_file()
    return load_model(ModelChoice("smollm2", device="cpu", offline=True))


@pytest.fixture(scope="module")
def samples(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("data") / "ruler"
    command = "build-data ruler --tokenizer smollm2 --context-length 1k --num-samples 10 --seed 3"
    assert run([*command.split(), "--tasks", "niah_single_2", "--output", str(folder)]) == 0
    samples = Dataset.open(folder).samples(1024, "niah_single_2")
    assert samples[0].prompt.startswith("<|im_start|>system\n")
    assert samples[0].prompt.endswith("<|im_start|>assistant\n")
    return samples


def scores_of(loaded: LoadedModel, samples: list[Sample], *cells: str) -> dict[str, list[float]]:
    return score_cells(loaded, load_tokenizer("smollm2"), samples, cells, NEW_TOKENS)


@pytest.fixture(scope="module")
def scores(smollm2: LoadedModel, samples: list[Sample]) -> dict[str, list[float]]:
    return scores_of(smollm2, samples, "full", GENEROUS, STARVED, ORACLE, RANDOM)


def test_full_attention_recalls(scores: dict[str, list[float]]) -> None:
    assert fmean(scores["full"]) >= 0.8, scores["full"]


def test_shadowkv_and_the_oracle_are_not_worse_by_more_than_noise(
    scores: dict[str, list[float]],
) -> None:
    for method, reference in ((GENEROUS, "full"), (ORACLE, GENEROUS)):
        difference = paired_difference(scores[method], scores[reference])
        assert difference.high >= 0, (method, difference)
    assert fmean(scores[GENEROUS]) >= 0.7, scores[GENEROUS]


def test_a_starved_budget_and_random_chunks_fall(scores: dict[str, list[float]]) -> None:
    for method in (STARVED, RANDOM):
        difference = paired_difference(scores[method], scores["full"])
        assert difference.high < -0.3, (method, difference)


def log_prob_error(loaded: LoadedModel, samples: list[Sample]) -> float:
    """Mean distance of log-probabilities to full attention's, over four tokens that it gives."""
    tokenizer, specs = load_tokenizer("smollm2"), build_specs(["full", GENEROUS], {})
    session = Session(loaded, specs, prompt_tokens=1024, new_tokens=8)
    errors = []
    for sample in samples:
        logits = session.prefill(encode_prompt(tokenizer, sample.text), key=sample.id)
        for _ in range(4):
            full, shadow = session.decode_step(logits.argmax(-1).expand(2)).log_softmax(-1)
            errors.append(float((shadow - full).abs().mean()))
            logits = full
    return fmean(errors)


def test_outliers_that_are_not_kept_are_missed(
    smollm2: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attention sink lies in the first chunk, which no landmark describes well."""
    sound = log_prob_error(smollm2, samples[:3])
    choose = ShadowKVGroup.outlier_tokens

    def others(self: ShadowKVGroup, layer: int, row: int, prompt: Prompt, k: Tensor) -> Tensor:
        return (choose(self, layer, row, prompt, k) + 400) % (prompt.tokens - 32)

    monkeypatch.setattr(ShadowKVGroup, "outlier_tokens", others)
    broken = log_prob_error(smollm2, samples[:3])
    assert sound < 1 < broken, (sound, broken)
