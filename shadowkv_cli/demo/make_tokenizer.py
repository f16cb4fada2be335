"""Make the demo tokenizer: byte-level BPE with 4,096 entries, digits one by one.

    python -m shadowkv_cli.demo.make_tokenizer [FOLDER]

Trained on what the demo's prompts are made of: the word lists, the project's own prose and
questions, RULER's templates, UUIDs and variable names. The same bytes on every run.
"""

from __future__ import annotations

import itertools
import json
import random
import string
import sys
from collections.abc import Iterator
from pathlib import Path

from shadowkv_cli.catalogue.places import DEMO_TOKENIZER_DIR
from shadowkv_cli.tasks.ruler.definitions import constants, definitions
from shadowkv_cli.tasks.ruler.synthetic_prose import prose_sentences
from shadowkv_cli.tasks.ruler.synthetic_qa import SyntheticQA
from shadowkv_cli.tasks.ruler.words import common_word_pool, random_value, word_list

VOCABULARY_SIZE = 4096
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
MAX_LENGTH = 1_048_576


def training_text() -> Iterator[str]:
    """Yield the texts that the merges are learned from."""
    rng = random.Random("shadowkv demo tokenizer 1")
    for task in definitions().values():
        yield from itertools.repeat(task.template + task.answer_prefix, 40)
    for line in (constants()["noise"], constants()["needle"]):
        yield from itertools.repeat(f"\n{line}", 400)
    # Every word as it stands in lists, keys and prose: most of them become one to three tokens.
    for _ in range(6):
        for word in common_word_pool():
            yield f" {word}"
    for noun in word_list("nounlist") * 3:
        yield f"-{noun}"
    for adjective in word_list("adjectivelist") * 12:
        yield f" {adjective}-"
    yield from itertools.islice(prose_sentences(), 6_000)
    for corpus in (SyntheticQA(bridging=False), SyntheticQA(bridging=True)):
        for index in range(400):
            item = corpus.item(index)
            yield f"Question: {item.question} Answer: {item.answers[0]}"
            yield corpus.document(item.own[0])
    for _ in range(300):
        yield f" {random_value('uuids', rng)}."
        yield f"VAR {''.join(rng.choices(string.ascii_uppercase, k=5))} ="
        yield f" {''.join(rng.choices(string.ascii_lowercase, k=6))}"


def write_tokenizer(folder: Path) -> None:
    """Train the tokenizer and write tokenizer.json and tokenizer_config.json to `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE, tokenizer.get_vocab_size()
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(tokenizer.to_str())
    config = {
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": MAX_LENGTH,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(folder / "tokenizer.json", content)
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO_TOKENIZER_DIR
    write_tokenizer(target)
    print(target)
