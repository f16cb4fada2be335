"""The 13 tasks: templates to the byte, references that can be found, draws that can grow."""

import itertools
import json
import random
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowkv_cli.errors import UsageError
from shadowkv_cli.tasks.ruler.common_words import CommonWordsDraw
from shadowkv_cli.tasks.ruler.definitions import choose_tasks, constants, definitions
from shadowkv_cli.tasks.ruler.draws import Workbench, distinct_positions
from shadowkv_cli.tasks.ruler.niah import DEPTHS, singular
from shadowkv_cli.tasks.ruler.samples import make_draw
from shadowkv_cli.tasks.ruler.sources import load_sources
from shadowkv_cli.tasks.ruler.words import WordDraw, common_word_pool
from shadowkv_cli.tasks.tokenization import encode_prompt, load_tokenizer
from shadowkv_cli.tasks.wrappers import Wrapper, resolve_wrapper

GOLDEN = Path(__file__).parent / "data/ruler/golden.json"
TASKS = list(definitions())
MARKED = Wrapper("x", "x", "<|bos|>", "<<You are a helpful assistant>>", "<<are>>")


@cache
def tokenizer():
    return load_tokenizer("demo")


def bench(wrapper: Wrapper | None = None, seed: int = 42) -> Workbench:
    wrapper = wrapper or resolve_wrapper("auto", tokenizer())
    return Workbench(tokenizer(), wrapper, load_sources(TASKS, "synthetic"), seed)


def draw(task: str, index: int = 0, length: int = 4096, **more):
    return make_draw(bench(**more), task, length, index)


def smallest(task: str, **more):
    one = draw(task, **more)
    return one.render(one.min_units)


@cache
def golden() -> dict:
    """Regenerate with: python -c "import test_ruler_tasks as t; t.write_golden()" in tests/."""
    result = {}
    for task in TASKS:
        one = smallest(task)
        result[task] = {
            "prompt": one.prompt,
            "answer_prefix": one.answer_prefix,
            "references": one.references,
            "question": one.prompt[one.question_start :],
            "depths": one.depths,
        }
    return result


def write_golden() -> None:
    GOLDEN.write_text(json.dumps(golden(), indent=1, ensure_ascii=False) + "\n")


@pytest.mark.parametrize("task", TASKS)
def test_the_smallest_sample_of_a_task_is_the_committed_one(task):
    assert golden()[task] == json.loads(GOLDEN.read_text())[task]


def test_niah_reads_as_ruler_writes_it():
    one = smallest("niah_single_1")
    key = one.answer_prefix.split(" for ")[1].split(" mentioned")[0]
    value = one.references[0]
    assert one.prompt + one.answer_prefix == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
        f"One of the special magic numbers for {key} is: {value}.\n"
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
        f"\nWhat is the special magic number for {key} mentioned in the provided text?"
        f" The special magic number for {key} mentioned in the provided text is"
    )


def test_several_answers_keep_the_plural():
    one = smallest("niah_multiquery")
    assert one.prompt.startswith("Some special magic numbers are hidden within the following text.")
    question = one.prompt[one.question_start :]
    assert question.startswith("What are all the special magic numbers for ")
    assert question.count(", ") == 3
    assert ", and " in question
    assert one.answer_prefix.endswith(" mentioned in the provided text are")


def test_vt_reads_as_ruler_writes_it():
    one = smallest("vt", wrapper=MARKED)
    example, question = one.prompt.split("\n\nMemorize and track")
    assert example.startswith(
        "<|bos|><<You are a helpful assistant>>Memorize and track the chain(s) of variable "
        "assignment hidden in the following text.\n\n"
    )
    assert ", they are:  " in example, "the prefix ends with a space, and the names follow one more"
    names = example.rsplit("they are:  ", 1)[1].split(" ")
    assert [len(name) for name in names] == [3] * 5
    assert f"VAR {names[1]} = VAR {names[0]} \n" in example
    assert len(tokenizer()(example)["input_ids"]) <= 530
    refs = one.references
    assert [len(name) for name in refs] == [5] * 5
    places = [question.index(f"VAR {refs[0]} = ")]
    places += [question.index(f"VAR {b} = VAR {a} \n") for a, b in itertools.pairwise(refs)]
    assert places == sorted(places), "the chain stands in its order"
    value = question.split(f"VAR {refs[0]} = ")[1][:5]
    assert one.answer_prefix == (
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables "
        f"are assigned the value {value}, they are: "
    )


def test_the_vt_example_differs_between_samples_in_names_and_value_only():
    first, second = (draw("vt", index=i).example for i in (0, 1))
    assert first != second
    assert len(first) == len(second)
    assert first.count("The grass is green") == second.count("The grass is green") > 5


def test_cwe_counts_and_its_example():
    one = draw("cwe", wrapper=MARKED)
    rendered = one.render(60)
    before, after = rendered.prompt.split("<<are>> Answer: The top 10 words", 1)
    assert before.startswith("<|bos|><<You are a helpful assistant>>Below is a numbered list")
    answer, question = after.split("\n<<You are a helpful assistant>>", 1)
    assert answer.startswith(" that appear most often in the list are: 1. ")
    assert answer.count(". ") == 10
    assert "<|bos|>" not in after, "BOS stands once, not before the second turn"
    assert before.split("\n")[1].count(". ") == 190
    entries = [entry.split(". ", 1)[1] for entry in split_numbered(question.split("\n")[1])]
    assert len(entries) == 10 * 30 + 50 * 3
    counts = {word: entries.count(word) for word in set(entries)}
    assert sorted(counts.values()) == [3] * 50 + [30] * 10
    assert {word for word, n in counts.items() if n == 30} == set(rendered.references)
    ids = encode_prompt(tokenizer(), rendered.prompt + rendered.answer_prefix)
    assert ids.count(tokenizer().bos_token_id) == 1


def split_numbered(text: str) -> list[str]:
    parts = []
    number = 1
    while True:
        following = text.find(f" {number + 1}. ")
        if following < 0:
            return [*parts, text]
        parts.append(text[:following])
        text = text[following + 1 :]
        number += 1


def test_short_cwe_prompts_repeat_less():
    one = draw("cwe", length=2048)
    assert isinstance(one, CommonWordsDraw)
    assert one.repeats == (6, 1)


def test_cwe_goes_beyond_its_word_pool_without_repeating():
    pool = len(common_word_pool())
    words = WordDraw(random.Random(1)).first(pool + 500)
    assert len(set(words)) == pool + 500
    assert set(words[:pool]) == set(common_word_pool())
    assert WordDraw(random.Random(1)).first(50) == words[:50]


def test_fwe_counts_follow_the_zeta_distribution():
    one = draw("fwe")
    assert one.counts(1555)[:6] == [945, 236, 105, 59, 37, 26], "RULER's own counts"
    rendered = one.render(800)
    words = rendered.prompt.split("coded words. ")[1].split("\n")[0].split(" ")
    counts = sorted(((words.count(w), w) for w in set(words)), reverse=True)
    assert counts[0][1] == "..."
    assert [word for _, word in counts[1:4]] == rendered.references
    assert counts[3][0] > counts[4][0]
    assert all(len(word) == 6 for word in rendered.references)


def test_fwe_answers_are_never_tied():
    one = draw("fwe")
    for units in range(one.min_units, one.min_units + 2000):
        counts = one.counts(units)
        assert counts[1] > counts[2] > counts[3] > counts[4], units


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_qa_documents_are_numbered_and_hold_the_answer(task):
    one = draw(task)
    rendered = one.render(one.min_units + 7)
    context = rendered.prompt.split("given documents.\n\n")[1].split("\n\nAnswer the question")[0]
    documents = context.split("\n\n")
    for number, document in enumerate(documents, start=1):
        assert document.startswith(f"Document {number}:\n")
    assert len({d.split("\n", 1)[1] for d in documents}) == one.min_units + 7
    assert any(rendered.references[0] in document for document in documents)
    assert rendered.answer_prefix == " Answer:"


def test_the_gold_document_moves_between_samples_and_stays_in_order_when_one_joins():
    places = set()
    for index in range(12):
        one = draw("qa_1", index=index)
        gold = one.corpus.document(one.item.own[0])
        places.add(one.render(20).prompt.count("Document ", 0, one.render(20).prompt.index(gold)))
        shorter, longer = (
            [d.split("\n", 1)[1] for d in one.render(n).prompt.split("\n\nDocument ")[1:]]
            for n in (20, 21)
        )
        kept = [document for document in longer[:-1] if document in shorter]
        assert kept == [document for document in shorter if document in kept], index
    assert len(places) > 5


def test_there_is_an_end_to_questions(tmp_path):
    bench_ = bench()
    last = bench_.sources.qa("squad").num_questions
    with pytest.raises(UsageError, match=rf"qa_1 has {last} questions.*--num-samples {last}"):
        make_draw(bench_, "qa_1", 4096, last)


@pytest.mark.parametrize("task", TASKS)
def test_references_stand_in_the_context_and_the_question_behind_it(task):
    one = draw(task, index=3, wrapper=MARKED)
    rendered = one.render(one.min_units + 5)
    context = rendered.prompt[: rendered.question_start]
    missing = [ref for ref in rendered.references if ref not in context]
    assert not missing, missing
    question = rendered.prompt[rendered.question_start :]
    assert question.startswith(("What ", "Question: ", "Answer the question based"))
    assert question.endswith("<<are>>")


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_depends_on_its_coordinates_only(task):
    first = smallest(task, index=5)
    other = bench()
    for index in range(3):
        one = make_draw(other, task, 4096, index)
        one.render(one.min_units + 30)
    again = make_draw(other, task, 4096, 5)
    again.render(again.min_units + 11)
    assert again.render(again.min_units) == first
    assert smallest(task, index=6) != first
    reseeded = draw(task, index=5, seed=43)
    assert reseeded.render(again.min_units + 11) != again.render(again.min_units + 11)


@pytest.mark.parametrize("task", TASKS)
def test_the_rewrite_leaves_the_wrapper_alone(task):
    prompt = smallest(task, wrapper=MARKED).prompt
    assert prompt.startswith("<|bos|><<You are a helpful assistant>>")
    assert prompt.endswith("<<are>>")


def test_the_singular_rewrite():
    family = constants()["families"]["niah"]
    assert singular(family["template"]).startswith("A special magic {type_needle_v} is hidden")
    assert "What is the special magic" in singular(family["template"])
    assert singular(family["answer_prefix"]).endswith("provided text is")


def test_depths_are_rulers():
    assert len(DEPTHS) == 40
    assert DEPTHS[:10] == (0, 3, 5, 8, 10, 13, 15, 18, 21, 23)
    assert DEPTHS[-8:] == (82, 85, 87, 90, 92, 95, 97, 100)


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_1", "niah_single_1"])
def test_needles_stand_at_their_depth(task):
    one = draw(task, index=2)
    rendered = one.render(120 if task == "niah_single_1" else 2500)
    start = rendered.prompt.index("\n") + 1
    context = rendered.prompt[start : rendered.question_start]
    place = 100 * context.index(rendered.references[0]) / len(context)
    assert rendered.depths is not None
    assert abs(place - rendered.depths[0]) < 6, (place, rendered.depths)


def test_haystack_needles_never_have_the_asked_key():
    one = draw("niah_multikey_2")
    rendered = one.render(200)
    assert rendered.prompt.count(f"for {one.keys[0]} is:") == 1


@given(st.lists(st.floats(0, 1, exclude_max=True), max_size=8), st.integers(8, 500))
def test_positions_are_distinct_and_in_range(fractions, size):
    places = distinct_positions(fractions, size)
    assert len(set(places)) == len(fractions)
    assert all(0 <= place < size for place in places)


def test_positions_are_uniform_over_ordered_pairs():
    steps = [(i + 0.5) / 60 for i in range(60)]
    pairs = [tuple(distinct_positions([a, b], 5)) for a in steps for b in steps]
    counts = {pair: pairs.count(pair) for pair in set(pairs)}
    assert len(counts) == 20
    assert set(counts.values()) == {180}


@settings(max_examples=30)
@given(st.floats(0, 1, exclude_max=True), st.integers(3, 1000))
def test_positions_move_little_when_the_haystack_grows(fraction, size):
    (before,), (after,) = (distinct_positions([fraction], n) for n in (size, size + 1))
    assert after - before in (0, 1)


def test_tasks_are_chosen_by_name():
    assert choose_tasks(None) == TASKS
    assert len(TASKS) == 13
    assert choose_tasks(["vt", "niah_single_1"]) == ["niah_single_1", "vt"]
    with pytest.raises(
        UsageError, match=r"Unknown task 'niah_singel_1'.*Did you mean 'niah_single"
    ):
        choose_tasks(["niah_singel_1"])
