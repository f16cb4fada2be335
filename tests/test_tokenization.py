"""Tokenizers: BOS once, a lossless demo tokenizer, a fingerprint of what one does."""

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowkv_cli.catalogue.places import DEMO_TOKENIZER_DIR
from shadowkv_cli.demo.make_tokenizer import BOS, VOCABULARY_SIZE, write_tokenizer
from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.tasks.ruler.words import common_word_pool
from shadowkv_cli.tasks.tokenization import (
    UnitCounter,
    count_plain,
    encode_prompt,
    load_tokenizer,
    special_prefix,
    tokenizer_fingerprint,
)


@cache
def demo():
    return load_tokenizer("demo")


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_the_demo_tokenizer_loses_nothing(text):
    ids = demo()(text, add_special_tokens=False)["input_ids"]
    assert demo().decode(ids, skip_special_tokens=False) == text


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_the_short_way_gives_the_ids_of_a_call(text):
    if not text.startswith(BOS):
        assert encode_prompt(demo(), text) == demo()(text)["input_ids"]


def test_the_demo_tokenizer_has_4096_entries_and_single_digits():
    tokenizer = demo()
    assert len(tokenizer) == tokenizer.vocab_size == VOCABULARY_SIZE == 4096
    pieces = tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, " 1234567")[1:])
    assert pieces == ["Ġ", *"1234567"]
    assert tokenizer.chat_template is None
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|bos|>",
        "<|eos|>",
        "<|pad|>",
    )


def test_most_words_are_few_tokens():
    counts = count_plain(demo(), [f" {word}" for word in common_word_pool()])
    assert sum(n <= 3 for n in counts) / len(counts) > 0.85
    assert sum(counts) / len(counts) < 2.5


def test_the_script_makes_the_committed_bytes(tmp_path):
    write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (DEMO_TOKENIZER_DIR / name).read_bytes(), name


def test_bos_stands_exactly_once():
    tokenizer = demo()
    bos = tokenizer.bos_token_id
    assert special_prefix(tokenizer) == (bos,)
    for text in ("hello", f"{BOS}hello"):
        ids = encode_prompt(tokenizer, text)
        assert ids[0] == bos
        assert ids.count(bos) == 1, text
    assert encode_prompt(tokenizer, "hello") == encode_prompt(tokenizer, f"{BOS}hello")


def test_an_eos_that_a_tokenizer_adds_behind_is_left_out(tmp_path):
    from tokenizers import processors

    tokenizer = load_tokenizer("demo")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A <|eos|>",
        special_tokens=[(BOS, tokenizer.bos_token_id), ("<|eos|>", tokenizer.eos_token_id)],
    )
    assert tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in encode_prompt(tokenizer, "x")


def test_a_truncating_tokenizer_does_not_cut_prompts():
    tokenizer = load_tokenizer("demo")
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert len(encode_prompt(tokenizer, "one two three four five six")) > 6


def test_the_fingerprint_is_of_what_a_tokenizer_does(tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in DEMO_TOKENIZER_DIR.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert tokenizer_fingerprint(load_tokenizer(str(folder))) == tokenizer_fingerprint(demo())
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    other = load_tokenizer(str(folder))
    assert special_prefix(other) == ()
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(demo())


def test_units_are_counted_once(monkeypatch):
    seen = []

    def count(tokenizer, texts):
        seen.extend(texts)
        return [len(text) for text in texts]

    monkeypatch.setattr("shadowkv_cli.tasks.tokenization.count_plain", count)
    counter = UnitCounter(None)
    assert counter.counts(["a", "bb", "a"]) == [1, 2, 1]
    assert counter.total(["bb", "ccc"]) == 5
    assert seen == ["a", "bb", "ccc"]


def test_tokenizers_that_cannot_be_loaded_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="No tokenizer folder"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(
        ShadowKVError, match=r"some/model is not on this machine.*--offline"
    ) as info:
        load_tokenizer("some/model", offline=True)
    assert "\n" not in str(info.value)


def test_no_network_is_one_line_that_names_the_ways_out(monkeypatch):
    monkeypatch.setattr("shadowkv_cli.tasks.hub.hub_reachable", lambda: False)
    with pytest.raises(ShadowKVError, match=r"cannot be reached.*`demo`"):
        load_tokenizer("some/model")
