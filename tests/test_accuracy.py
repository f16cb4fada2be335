"""Accuracy on the bundled model: what recalls, what a starved budget loses, what a mistake breaks.

The mutation tests at the end break one part of the method at a time and assert that the accuracy
check of this file notices.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from shadowkv_cli.cli import run
from shadowkv_cli.config import FullSpec, ModelShape, ShadowKVSpec, SparseBudget
from shadowkv_cli.methods import (
    Prompt,
    PromptStore,
    RotaryTables,
    Row,
    build_groups,
    low_rank,
    shadowkv,
    store,
)
from shadowkv_cli.methods.shadowkv import ShadowKVGroup
from shadowkv_cli.methods.sparse import SparseGroup
from shadowkv_cli.model.loading import LoadedModel, load_model
from shadowkv_cli.run_config import ModelChoice
from shadowkv_cli.stats import paired_difference
from shadowkv_cli.tasks.rows import Dataset, Sample
from shadowkv_cli.tasks.tokenization import load_tokenizer
from shadowkv_cli.testing import log_prob_error, score_cells

TASKS = ("niah_single_2", "niah_multikey_1", "niah_multivalue")
PER_TASK = 6
NEW_TOKENS = 48
GENEROUS = "shadowkv:sparse_budget=256,rank=128,chunk_size=4"
EVERYTHING = "shadowkv:sparse_budget=100%,rank=256,chunk_size=4,dense_fallback=never"
STARVED = "shadowkv:sparse_budget=16,rank=8,chunk_size=16"
ORACLE = "oracle:sparse_budget=256,chunk_size=4"
RANDOM = "random:sparse_budget=256,chunk_size=4"
MAX_ERROR = 0.01
"""Of log-probabilities, with everything kept at full rank: float32 rounding is far below."""
Scores = dict[str, list[float]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Prompts of 2,048 tokens; the model was neither trained nor scored with their seed."""
    folder = tmp_path_factory.mktemp("data") / "ruler"
    command = f"build-data ruler --tokenizer demo --context-length 2k --num-samples {PER_TASK}"
    tasks = ["--tasks", ",".join(TASKS), "--seed", "5"]
    assert run([*command.split(), *tasks, "--output", str(folder)]) == 0
    dataset = Dataset.open(folder)
    return [sample for task in TASKS for sample in dataset.samples(2048, task)]


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(ModelChoice("demo", device="cpu"))


def scores_of(
    loaded: LoadedModel, samples: list[Sample], *cells: str, new_tokens: int = NEW_TOKENS
) -> Scores:
    return score_cells(loaded, load_tokenizer("demo"), samples, cells, new_tokens)


@pytest.fixture(scope="module")
def scores(demo: LoadedModel, samples: list[Sample]) -> Scores:
    return scores_of(demo, samples, "full", GENEROUS, STARVED, ORACLE, RANDOM)


def check_not_worse(method: list[float], reference: list[float]) -> None:
    """Fail where the paired interval of `method - reference` lies below 0."""
    difference = paired_difference(method, reference)
    assert difference.high >= 0, f"{difference}: {method} against {reference}"


def check_accurate(scores: Scores, everything_error: float) -> None:
    """Everything at full rank is full attention; a generous setting costs little or nothing."""
    assert everything_error < MAX_ERROR, everything_error
    check_not_worse(scores[GENEROUS], scores["full"])
    assert fmean(scores[GENEROUS]) >= fmean(scores["full"]) - 0.1, scores


def test_full_attention_recalls(scores: Scores) -> None:
    assert fmean(scores["full"]) >= 0.95, scores["full"]


def error_of_everything(loaded: LoadedModel, samples: list[Sample]) -> float:
    return log_prob_error(loaded, load_tokenizer("demo"), samples[:2], EVERYTHING)


def test_a_generous_setting_is_not_worse_than_full_attention(
    demo: LoadedModel, samples: list[Sample], scores: Scores
) -> None:
    check_accurate(scores, error_of_everything(demo, samples))


def test_a_starved_budget_falls(scores: Scores) -> None:
    difference = paired_difference(scores[STARVED], scores["full"])
    assert difference.high < -0.2, difference


def test_random_chunks_are_far_worse_at_the_same_budget(scores: Scores) -> None:
    difference = paired_difference(scores[RANDOM], scores[GENEROUS])
    assert difference.high < -0.4, difference


def test_true_chunks_are_not_worse_than_landmarks(scores: Scores) -> None:
    check_not_worse(scores[ORACLE], scores[GENEROUS])


# ---- one mistake at a time ----

Patch = pytest.MonkeyPatch


def select_worst(patch: Patch) -> None:
    """Chunks that the query does not point at."""
    select = shadowkv.ops.select_chunks
    patch.setattr(shadowkv.ops, "select_chunks", lambda q, *rest: select(-q, *rest))


def select_neighbours(patch: Patch) -> None:
    """The ids of chunks off by one, as a wrong offset gives them."""
    select = shadowkv.ops.select_chunks

    def off_by_one(*args: Any) -> Tensor:
        ids = select(*args)
        return torch.where(ids > 0, ids - 1, ids)

    patch.setattr(shadowkv.ops, "select_chunks", off_by_one)


def keep_the_smallest_directions(patch: Patch) -> None:
    """A low-rank form of the eigenvectors at the wrong end."""

    def wrong(gram: Tensor, rank: int, method: object) -> Tensor:
        return torch.linalg.eigh(gram)[1][:, :rank]

    patch.setattr(low_rank, "leading", wrong)


def forget_to_rotate(patch: Patch) -> None:
    """Keys rebuilt without their rotation."""
    rebuild = shadowkv.ops.rebuild_keys

    def plain(*args: Any) -> None:
        cos, sin = args[8:10]
        rebuild(*args[:8], torch.ones_like(cos), torch.zeros_like(sin), *args[10:])

    patch.setattr(shadowkv.ops, "rebuild_keys", plain)


def rotate_backwards(patch: Patch) -> None:
    """Keys rebuilt with the sign of the sine wrong."""
    rebuild = shadowkv.ops.rebuild_keys
    patch.setattr(
        shadowkv.ops, "rebuild_keys", lambda *args: rebuild(*args[:9], -args[9], *args[10:])
    )


def pair_wrongly(patch: Patch) -> None:
    """Keys rebuilt with neighbours as pairs, where the model rotates halves."""
    rebuild = shadowkv.ops.rebuild_keys
    patch.setattr(
        shadowkv.ops, "rebuild_keys", lambda *args: rebuild(*args[:11], not args[11], *args[12:])
    )


def rotate_twice(patch: Patch) -> None:
    """Keys that were factorised without taking the rotation off first."""
    patch.setattr(store, "unrotate", lambda keys, *rest: keys)


def fetch_wrong_values(patch: Patch) -> None:
    """Values of the chunks behind those whose keys are attended."""
    fetch = shadowkv.ops.fetch_values

    def shifted(values: Tensor, *rest: Any) -> None:
        fetch(values.roll(1, 2), *rest)

    patch.setattr(shadowkv.ops, "fetch_values", shifted)


def drop_the_tail(patch: Patch) -> None:
    """Generated tokens that are counted and not kept."""
    patch.setattr(SparseGroup, "append", lambda self, layer, k, v: None)


def never_see_the_tail(patch: Patch) -> None:
    """Generated tokens that are kept and not attended, but for the one that attends."""

    see = SparseGroup.see

    def blind(self: SparseGroup, seen: Tensor) -> None:
        see(self, seen)
        self.section_lengths[:, 2] = seen.clamp(max=1)

    patch.setattr(SparseGroup, "see", blind)


MISTAKES: tuple[Callable[[Patch], None], ...] = (
    select_worst,
    select_neighbours,
    keep_the_smallest_directions,
    forget_to_rotate,
    rotate_backwards,
    pair_wrongly,
    rotate_twice,
    fetch_wrong_values,
    drop_the_tail,
    never_see_the_tail,
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_the_accuracy_check_notices(
    mistake: Callable[[Patch], None],
    demo: LoadedModel,
    samples: list[Sample],
    monkeypatch: Patch,
) -> None:
    few = [sample for sample in samples if len(sample.references) == 1][::2]
    mistake(monkeypatch)
    broken = scores_of(demo, few, "full", GENEROUS, new_tokens=20)
    assert fmean(broken["full"]) >= 0.85, "the mistake must not touch full attention"
    with pytest.raises(AssertionError):
        check_accurate(broken, error_of_everything(demo, few))


# ---- outliers, which the bundled model does without: a state that needs them ----


def attend_beside_full() -> tuple[Tensor, Tensor]:
    """Outputs of ShadowKV and of full attention, [2, 16], for a key that its chunk's mean hides.

    One key of chunk 5 points at the query and its neighbours point away, so that they cancel.
    """
    shape = ModelShape(num_layers=1, num_q_heads=2, num_kv_heads=1, head_dim=16, element_bytes=4)
    spec = ShadowKVSpec(
        sparse_budget=SparseBudget.parse("16"), rank=16, outlier_chunks=1, local_chunks=1
    )
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 256, 16, generator=draw) for _ in range(2))
    direction = torch.nn.functional.normalize(torch.randn(16, generator=draw), dim=0)
    keys[0, 40:48] = -direction * 8 / 7
    keys[0, 43] = direction * 8
    prompt_store = PromptStore(
        shape,
        [FullSpec(), spec],
        num_prompts=1,
        prompt_tokens=256,
        new_tokens=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    unturned = torch.ones(1, 258, 16), torch.zeros(1, 258, 16)
    prompt_store.tables = RotaryTables(*unturned, torch.zeros(1, dtype=torch.int32), False)
    rows = [Row(FullSpec(), 0), Row(spec, 0)]
    groups = [group for _, group in build_groups(rows, prompt_store, 2)]
    prompt = Prompt(0, 256, "constructed")
    for group in groups:
        group.begin(prompt)
    prompt_store.add_layer(0, prompt, keys, values)
    query = (4 * direction).expand(2, 16)
    outputs = []
    for group in groups:
        group.prefill_layer(0, prompt, torch.zeros(2, 256, 16), keys, values)
        group.make_room(1)
        group.advance()
        group.append(0, torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16))
        outputs.append(group.attend(0, query[None, :, None], 1.0)[0, :, 0])
    return outputs[1], outputs[0]


def check_outliers() -> None:
    found, exact = attend_beside_full()
    torch.testing.assert_close(found, exact, atol=1e-3, rtol=0)


def test_outliers_keep_what_a_mean_hides() -> None:
    check_outliers()


def forget_outliers(patch: Patch) -> None:
    """Outliers that no query selects, since they are masked, and that are not kept either."""
    choose = ShadowKVGroup.outlier_tokens

    def others(self: ShadowKVGroup, *args: Any) -> Tensor:
        return (choose(self, *args) + 64) % 240

    patch.setattr(ShadowKVGroup, "outlier_tokens", others)


def choose_the_best_described(patch: Patch) -> None:
    """Outliers by the largest similarity in place of the smallest."""
    build = store.ops.build_landmarks

    def reversed_similarity(*args: Any) -> tuple[Tensor, Tensor]:
        landmarks, similarity = build(*args)
        return landmarks, -similarity

    patch.setattr(store.ops, "build_landmarks", reversed_similarity)


@pytest.mark.parametrize("mistake", [forget_outliers, choose_the_best_described])
def test_the_check_of_outliers_notices(
    mistake: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        check_outliers()
