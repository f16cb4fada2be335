"""The training of the bundled model: batches, labels, seeds, resuming, and the shipped weights."""

import json
import random
import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowkv_cli.catalogue.places import DEMO_MODEL_DIR
from shadowkv_cli.model.demo import demo_config, load_demo_model
from shadowkv_cli.tasks.metrics import score
from shadowkv_cli.tasks.ruler.definitions import constants, definitions
from shadowkv_cli.tasks.ruler.draws import Workbench
from shadowkv_cli.tasks.ruler.samples import calibrate_task, make_draw, make_sample
from shadowkv_cli.tasks.ruler.sources import load_sources
from shadowkv_cli.tasks.ruler.synthetic_prose import prose_sentences
from shadowkv_cli.tasks.tokenization import encode_prompt, load_tokenizer
from shadowkv_cli.tasks.wrappers import resolve_wrapper
from shadowkv_cli.train_demo.batches import Job, make_batch, make_row
from shadowkv_cli.train_demo.chains import EXAMPLE_LINES
from shadowkv_cli.train_demo.curriculum import (
    CONTINUED,
    EXACT_LENGTHS,
    LONG_LENGTH,
    MIN_LENGTHS,
    NEEDLES,
    PAIRS,
    REPEATS,
    STAGES,
    TASK_WEIGHTS,
    TINY,
)
from shadowkv_cli.train_demo.heldout import answer, encode_prompts
from shadowkv_cli.train_demo.network import Network, new_model
from shadowkv_cli.train_demo.pieces import HELD_OUT_SENTENCES, Pieces
from shadowkv_cli.train_demo.prefetch import Prefetch
from shadowkv_cli.train_demo.trainer import CHECKPOINT, Settings, Trainer

TASKS = list(definitions())


@cache
def tokenizer():
    return load_tokenizer("demo")


@cache
def pieces() -> Pieces:
    return Pieces()


def row_of(task: str, length: int, *, exact: bool = True, seed: int = 0):
    return make_row(pieces(), Job(seed, 0, 1, length, ((task, 1.0),), float(exact), 6), 0)


def text_of(ids) -> str:
    return tokenizer().decode([i for i in ids if i != pieces().eos][1:])


def model(seed: int = 0, layers: int = 2):
    config = demo_config(4096, 1, 2, 0)
    config.num_hidden_layers = layers
    config.hidden_size, config.intermediate_size = 64, 96
    return new_model(config, seed)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from([*TASKS, PAIRS]), st.integers(0, 10_000), st.booleans())
def test_a_row_is_what_the_tokenizer_makes_of_its_text(task, seed, exact):
    length = max(MIN_LENGTHS.get(task, 256), 1024 if seed % 2 else 256)
    row = row_of(task, length, exact=exact, seed=seed)
    ids = list(row.ids)
    kept = [i for i in ids if i != pieces().eos]
    assert encode_prompt(tokenizer(), text_of(ids)) == kept, (task, seed, exact, text_of(ids))
    assert ids.count(pieces().bos) == 1, task
    assert len(ids) <= length, (task, len(ids))


@pytest.mark.parametrize("task", TASKS)
def test_an_exact_row_asks_in_the_words_of_the_generator(task):
    """The text up to the answer starts and ends as the generator's sample of that task does."""
    bench = Workbench(
        tokenizer(), resolve_wrapper("auto", tokenizer()), load_sources(TASKS, "synthetic"), 3
    )
    draw = make_draw(bench, task, 4096, 0)
    sample = draw.render(draw.min_units)
    row = row_of(task, max(4096, EXACT_LENGTHS.get(task, 0)))
    (only,) = row.answers
    text = text_of(row.ids[: only.start])

    def skeleton(words: str) -> str:
        """Keys, numbers, names and questions blanked."""
        words = re.sub(r"Question: [A-Z](?!hat are the|o not|ind all)[^?]*\?", "Question: ?", words)
        words = re.sub(r"for (?!the)\S+(, \S+)*(, and \S+)? mentioned", "for K mentioned", words)
        return re.sub(r"\d+", "0", words)

    question = sample.prompt[sample.question_start :] + sample.answer_prefix
    assert skeleton(text).endswith(skeleton(question)), (text[-300:], question)
    head = definitions()[task].template.split("{context}")[0].split("{")[0].split(" ", 2)[-1]
    assert head in text[:400], (task, text[:200])


@pytest.mark.parametrize("task", [*NEEDLES, "vt"])
@pytest.mark.parametrize("seed", range(3))
def test_the_answers_are_the_ones_that_the_context_holds(task, seed):
    row = row_of(task, 2048, seed=seed)
    (only,) = row.answers
    context = text_of(row.ids[: only.start])
    learned = tokenizer().decode(list(row.ids[only.start : only.end - 1]))
    assert row.ids[only.end - 1] == pieces().eos
    assert only.end == len(row.ids)
    if task == "vt":
        value = re.findall(r"assigned the value (\d+)", context)[-1]
        names = [re.findall(rf"VAR (\w+) = {value}\n", context)[-1]]
        while found := re.findall(rf"VAR (\w+) = VAR {names[-1]} \n", context):
            names += found
        assert learned.split() == names
        return
    query = re.findall(r"for (\S.*?) mentioned in the provided text (?:is|are)$", context)[0]
    query = query.split(" for ")[-1]
    keys = re.split(r", and |, ", query)
    needles = re.findall(r"One of the special magic \w+ for (.*?) is: (\S+)\.", context)
    assert len(keys) == definitions()[task].settings["queries"], query
    wanted = [value for key, value in needles if key in keys]
    assert learned == " " + ", ".join(wanted) + ".", (learned, wanted)


def test_labels_cover_the_answers_and_every_row_weighs_the_same():
    mix = tuple((name, 1.0) for name in [*TASK_WEIGHTS, PAIRS, REPEATS])
    job = Job(5, 1, 24, 1024, mix, 0.5, 6)
    batch = make_batch(pieces(), job)
    flat = batch.ids.reshape(-1)
    wanted, weights = [], [0.0] * job.rows
    for index in range(job.rows):
        row = make_row(pieces(), job, index)
        for one in row.answers:
            wanted += list(row.ids[one.start : one.end])
            assert all(one.start <= i < one.end for i in one.lookups), (row.task, one)
    assert flat[batch.targets].tolist() == wanted
    for target, weight in zip(batch.targets, batch.weights, strict=True):
        weights[target // job.length] += float(weight)
    assert weights == pytest.approx([1 / job.rows] * job.rows, rel=1e-4)
    assert max(batch.groups) + 1 == len(batch.group_tasks)


@pytest.mark.parametrize("stage", [*STAGES, *CONTINUED], ids=lambda stage: stage.name)
def test_every_stage_can_make_its_batches(stage):
    for length, _ in stage.lengths:
        mix = tuple((task, 1.0) for task in stage.tasks(length)) or ((REPEATS, 1.0), (PAIRS, 1.0))
        rows = 4 if length > 4096 else 16
        batch = make_batch(pieces(), Job(1, 0, rows, length, mix, stage.exact, stage.gap))
        assert batch.ids.shape == (rows, length)
        assert (batch.targets % length > 0).all(), "a BOS cannot be predicted"


def test_trained_weights_see_more_of_what_is_hard_in_long_rows_only():
    (stage,) = CONTINUED
    assert set(stage.factors) <= set(TASK_WEIGHTS)
    for task, weight in TASK_WEIGHTS.items():
        assert stage.weight(task, LONG_LENGTH - 1) == weight
        assert stage.weight(task, LONG_LENGTH) == weight * stage.factors.get(task, 1)
        assert STAGES[-1].weight(task, LONG_LENGTH) == weight


def test_a_batch_depends_on_its_job_only():
    mix = tuple((name, 1.0) for name in TASK_WEIGHTS)
    first, again, other = (
        make_batch(pieces(), Job(seed, 3, 6, 1024, mix, 0.5, 6)) for seed in (1, 1, 2)
    )
    assert (first.ids == again.ids).all()
    assert (first.weights == again.weights).all()
    assert not (first.ids == other.ids).all()


def test_workers_make_the_same_batches_in_order():
    jobs = [
        Job(1, step, 2, 512, (("vt", 1.0), ("niah_multikey_3", 1.0)), 0.5, 6) for step in (4, 5)
    ]
    alone = Prefetch(lambda step: jobs[step % 2], 4, 0)
    together = Prefetch(lambda step: jobs[step % 2], 4, 1)
    try:
        for _ in jobs:
            assert (alone.next()[1].ids == together.next()[1].ids).all()
    finally:
        together.close()


def test_prose_that_the_tasks_read_is_not_trained_on():
    read = set()
    for number, sentence in enumerate(prose_sentences()):
        if number == HELD_OUT_SENTENCES:
            break
        read.add(sentence)
    passage = pieces().prose.draw(random.Random(1), 2000)
    sentences = re.split(r"(?<=[.?!]) ", text_of([1, *passage.ids]).strip())[1:-1]
    assert len(sentences) > 50
    assert not read & set(sentences)


def test_the_solved_example_of_variable_tracking_is_as_long_as_the_generators():
    sources = load_sources(["vt"], "synthetic")
    draw = make_draw(
        Workbench(tokenizer(), resolve_wrapper("auto", tokenizer()), sources, 1), "vt", 4096, 0
    )
    lines = draw.example.count(constants()["noise"])
    assert lines == draw.bench.example_lines == EXAMPLE_LINES


def test_prompts_are_encoded_together_as_one_by_one():
    texts = ["What is it?", "VAR ABC = 12345\n", ""]
    assert encode_prompts(tokenizer(), texts) == [encode_prompt(tokenizer(), t) for t in texts]


def test_rates_of_trained_weights_fall_from_the_start(tmp_path):
    for begin, wanted in ((0.5, 1.0), (0.0, 0.515)):
        settings_ = Settings(seed=1, output=tmp_path, steps=1000, decay_from=begin)
        trainer = Trainer(model(), CONTINUED, settings_)
        trainer.progress.step = 500
        assert trainer.rate() == pytest.approx(wanted), begin


def test_the_fast_forward_pass_is_the_models_own():
    one = model()
    ids = torch.randint(3, 4096, (2, 96), generator=torch.Generator().manual_seed(1))
    network = Network(one, dtype=torch.float32, compiled=False)
    with torch.no_grad():
        ours = network.logits(network.hidden(ids)).view(2, 96, -1)
        torch.testing.assert_close(ours, one(ids).logits, atol=1e-5, rtol=1e-5)
    theirs = one.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
    prompts = [ids[0].tolist(), ids[1, :50].tolist()]
    assert answer(network, prompts, 6, eos=-1)[0] == theirs[0, 96:].tolist()


def test_heads_of_the_first_layer_start_by_looking_back():
    one = model()
    one.set_attn_implementation("eager")
    ids = torch.randint(3, 4096, (1, 64), generator=torch.Generator().manual_seed(1))
    maps = one(ids, output_attentions=True).attentions[0][0].detach()
    for head, distance in ((0, 1), (2, 2), (4, 3)):
        looked = [float(maps[head].diagonal(-d).mean()) for d in range(6)]
        assert max(range(6), key=looked.__getitem__) == distance, (head, looked)


def trained(folder, calls: list[float | None]):
    """Train 4 tiny steps in as many calls as there are pauses."""
    for number, pause in enumerate(calls):
        one = model(3)
        trainer = Trainer(one, TINY, Settings(seed=3, output=folder, steps=4, pause=pause))
        if number:
            trainer.load(folder / CHECKPOINT)
        trainer.run()
    return one, trainer.progress


def test_a_resumed_training_ends_where_one_call_ends(tmp_path):
    for name in ("one", "two", "again"):
        (tmp_path / name).mkdir()
    whole, progress = trained(tmp_path / "one", [None])
    parts, resumed = trained(tmp_path / "two", [2, None])
    again, _ = trained(tmp_path / "again", [None])
    assert progress.step == resumed.step == 4
    assert progress.stage == resumed.stage == 1
    assert progress.exact_match == resumed.exact_match
    for (name, weight), other, third in zip(
        whole.named_parameters(), parts.parameters(), again.parameters(), strict=True
    ):
        assert torch.equal(weight, other), f"{name} differs after resuming"
        assert torch.equal(weight, third), f"{name} differs for the same seed"


def test_the_shipped_files_are_of_this_architecture():
    config = json.loads((DEMO_MODEL_DIR / "config.json").read_text())
    special = (tokenizer().bos_token_id, tokenizer().eos_token_id, tokenizer().pad_token_id)
    wanted = demo_config(len(tokenizer()), *special).to_dict()
    for name, value in config.items():
        if name not in ("architectures", "dtype", "transformers_version"):
            assert wanted.get(name) == value, name
    assert (DEMO_MODEL_DIR / "model.safetensors").stat().st_size < 25_000_000


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_2", "niah_multivalue"])
def test_the_shipped_model_recalls(task):
    """Generated samples, with prose that it was not trained on; all of them are right."""
    bench = Workbench(
        tokenizer(), resolve_wrapper("auto", tokenizer()), load_sources([task], "synthetic"), 5
    )
    calibration = calibrate_task(bench, task, 1024, 4)
    network = Network(load_demo_model(torch.float32), dtype=torch.float32, compiled=False)
    samples = [make_sample(bench, task, 1024, i, calibration) for i in range(4)]
    prompts = [encode_prompt(tokenizer(), sample.text) for sample in samples]
    for sample, ids in zip(samples, answer(network, prompts, 40, pieces().eos), strict=True):
        text = tokenizer().decode(ids)
        assert score(text, sample) == 1, (sample.id, sample.references, text)
