"""The fit: n units fit, n + 1 do not, for every task and for tokenizers of different kinds."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowkv_cli.bench.data_speed import MIN_SAMPLES, measure
from shadowkv_cli.errors import UsageError
from shadowkv_cli.tasks.metrics import score
from shadowkv_cli.tasks.ruler.definitions import constants, definitions
from shadowkv_cli.tasks.ruler.draws import Workbench
from shadowkv_cli.tasks.ruler.fit import fit, local_difference
from shadowkv_cli.tasks.ruler.samples import (
    calibrate_task,
    make_draw,
    make_sample,
    prompt_limit,
)
from shadowkv_cli.tasks.ruler.sources import load_sources
from shadowkv_cli.tasks.tokenization import load_tokenizer
from shadowkv_cli.tasks.wrappers import Wrapper

TASKS = list(definitions())
PLAIN = Wrapper("base", "base", "", "", "")


@cache
def demo():
    return load_tokenizer("demo")


@cache
def merging_tokenizer():
    """A BPE that merges across words, as sentencepiece models may: every unit has seams."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False, prepend_scheme="first")
    text = (
        constants()["noise"] + " said that the keeper of the thing, and a " + constants()["needle"]
    )
    alphabet = sorted({chr(i) for i in range(32, 127)} | {"\n"})
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text, text.lower()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def bench(tokenizer=None, wrapper: Wrapper = PLAIN, seed: int = 42) -> Workbench:
    return Workbench(tokenizer or demo(), wrapper, load_sources(TASKS, "synthetic"), seed)


@cache
def shared_bench() -> Workbench:
    return bench()


def check_both_sides(tokenizer, task: str, length: int, index: int) -> None:
    """Fit in one workbench; render again in a fresh one and count by calling the tokenizer."""
    made_with = bench(tokenizer)
    calibration = calibrate_task(made_with, task, length, num_samples=1)
    limit = prompt_limit(task, length)
    fitted = fit(make_draw(made_with, task, length, index), limit, calibration)
    fresh = make_draw(bench(tokenizer), task, length, index)
    sizes = {}
    for units in (fitted.units, fitted.units + 1):
        rendered = fresh.render(units)
        sizes[units] = len(tokenizer(rendered.prompt + rendered.answer_prefix)["input_ids"])
    case = f"{task} sample {index} at {length}: {sizes}, limit {limit}"
    assert fresh.render(fitted.units) == fitted.rendered, case
    assert sizes[fitted.units] == fitted.prompt_tokens <= limit < sizes[fitted.units + 1], case


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("index", [0, 7])
def test_one_more_unit_would_not_fit(task, index):
    check_both_sides(demo(), task, 4096, index)


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_1", "niah_multikey_2", "vt"])
def test_one_more_unit_would_not_fit_where_units_share_tokens(task):
    for index in range(3):
        check_both_sides(merging_tokenizer(), task, 4096, index)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_filled_and_tokenized_three_times_at_most(task):
    figures = measure(shared_bench(), task, 8192, seconds=0)
    assert figures["samples"] == MIN_SAMPLES
    assert figures["encodings_per_sample"] <= 3, figures
    assert figures["mean_fill"] >= (0.97 if task.startswith("qa_") else 0.99), figures


@pytest.mark.parametrize("task", TASKS)
def test_the_references_score_100_and_nothing_scores_0(task):
    calibration = calibrate_task(shared_bench(), task, 4096, num_samples=3)
    for index in range(3):
        sample = make_sample(shared_bench(), task, 4096, index, calibration)
        assert score(" ".join(sample.references), sample) == 1.0, sample.references
        assert score("", sample) == 0.0
        assert score("I cannot tell.", sample) == 0.0
        assert sample.length <= 4096


@pytest.mark.parametrize("task", TASKS)
def test_a_length_that_cannot_hold_a_task_says_so(task):
    needed = definitions()[task].max_new_tokens + 20
    with pytest.raises(UsageError, match=rf"length of {needed} cannot hold sample 0 of {task}"):
        calibrate_task(shared_bench(), task, needed, num_samples=1)


def test_a_later_sample_that_cannot_fit_is_found_before_it_is_made():
    found = []
    for length in range(230, 280):
        try:
            calibrate_task(shared_bench(), "niah_single_3", length, num_samples=1)
            calibrate_task(shared_bench(), "niah_single_3", length, num_samples=12)
        except UsageError as error:
            found.append(str(error))
    later = [message for message in found if "sample 0 " not in message]
    assert later, found


@settings(max_examples=60, deadline=None)
@given(
    st.text("ab cd.\n", max_size=300),
    st.text("ab cd.\n", max_size=30),
    st.text("ab cd.\n", max_size=30),
)
def test_a_local_difference_is_the_whole_one(around, old, new):
    draw = make_draw(shared_bench(), "vt", 4096, 0)
    padding = "The grass is green. The sky is blue. " * 60
    before, after = (f"{padding}{around}{part} {padding}" for part in (old, new))
    got = local_difference(draw, before, after)
    assert got is not None
    assert got == shared_bench().count(after) - shared_bench().count(before)


def test_a_change_everywhere_is_not_local():
    draw = make_draw(shared_bench(), "vt", 4096, 0)
    assert local_difference(draw, "a b c d " * 200, "e f g h " * 200) is None
