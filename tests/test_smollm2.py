"""SmolLM2-135M-Instruct, fetched as a user would: real weights recall, and need their outliers."""

from __future__ import annotations

from statistics import fmean

import pytest
from torch import Tensor

from shadowkv_cli.catalogue.places import smollm2_dir
from shadowkv_cli.cli import run
from shadowkv_cli.methods import Prompt
from shadowkv_cli.methods.shadowkv import ShadowKVGroup
from shadowkv_cli.model.loading import LoadedModel, load_model
from shadowkv_cli.run_config import ModelChoice
from shadowkv_cli.stats import paired_difference
from shadowkv_cli.tasks.rows import Dataset, Sample
from shadowkv_cli.tasks.tokenization import load_tokenizer
from shadowkv_cli.testing import log_prob_error, score_cells

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


def test_outliers_that_are_not_kept_are_missed(
    smollm2: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attention sink lies in the first chunk, which no landmark describes well."""
    tokenizer = load_tokenizer("smollm2")
    sound = log_prob_error(smollm2, tokenizer, samples[:3], GENEROUS)
    choose = ShadowKVGroup.outlier_tokens

    def others(self: ShadowKVGroup, layer: int, row: int, prompt: Prompt, k: Tensor) -> Tensor:
        return (choose(self, layer, row, prompt, k) + 400) % (prompt.tokens - 32)

    monkeypatch.setattr(ShadowKVGroup, "outlier_tokens", others)
    broken = log_prob_error(smollm2, tokenizer, samples[:3], GENEROUS)
    assert sound < 1 < broken, (sound, broken)
