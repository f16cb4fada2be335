"""From an item to a finished prompt: cut in the middle, chat template, counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shadowkv_cli.errors import UsageError
from shadowkv_cli.tasks.longbench.items import Item
from shadowkv_cli.tasks.rows import Sample, SecondCall
from shadowkv_cli.tasks.tokenization import encode_prompt
from shadowkv_cli.tasks.wrappers import Wrapper

LENGTH_STEP = 1024
LEAST_SLACK = 64
"""Tokens; a text that was cut and decoded may be a few tokens longer when it is encoded again."""


@dataclass(frozen=True)
class TaskRules:
    """What all samples of a task share; see `Sample`."""

    name: str
    metric: str
    max_new_tokens: int
    postprocess: str | None
    stop: tuple[str, ...] | None
    wrapper: Wrapper
    second_max_new_tokens: int = 0


def context_length_for(max_length: int, answer_tokens: int, wrapper_tokens: int) -> int:
    """The smallest multiple of 1,024 that holds prompt, chat template and answer.

    LongBench's 31,500 for a model of 32K come to 32,768, 3,500 to 4,096.
    """
    needed = max_length + answer_tokens + max(LEAST_SLACK, wrapper_tokens + LEAST_SLACK // 2)
    return -(-needed // LENGTH_STEP) * LENGTH_STEP


def cut_middle(tokenizer: Any, text: str, max_length: int) -> tuple[str, int]:
    """The text, or its first and last halves of `max_length` tokens where it has more.

    Also returns how many tokens it lost. As pred.py of LongBench does it: special tokens count,
    there is no mark at the cut.
    """
    ids = encode_prompt(tokenizer, text)
    if len(ids) <= max_length:
        return text, 0
    half = max_length // 2
    parts = (ids[:half], ids[-half:])
    halves = (tokenizer.decode(part, skip_special_tokens=True) for part in parts)
    return "".join(halves), len(ids) - 2 * half


def make_sample(
    tokenizer: Any,
    item: Item,
    index: int,
    rules: TaskRules,
    *,
    max_length: int,
    context_length: int,
) -> Sample:
    """The finished row. Raises UsageError if it does not fit its context length."""
    text, lost = cut_middle(tokenizer, item.text, max_length)
    prompt = rules.wrapper.wrap(text)
    tokens = len(encode_prompt(tokenizer, prompt))
    name = f"{rules.name}-{item.number}"
    if tokens + rules.max_new_tokens > context_length:
        raise UsageError(
            f"{name} has {tokens} tokens with its chat template, which does not fit "
            f"{context_length} with the answer: use a shorter --max-length."
        )
    second = None
    if item.second_text is not None:
        second = _second_call(tokenizer, item.second_text, rules)
        needed = second.prompt_tokens + rules.max_new_tokens + second.max_new_tokens
        if needed > context_length:
            raise UsageError(
                f"The second call of {name} takes {needed} tokens, which does not fit "
                f"{context_length}: use a longer --max-length."
            )
    question = max(len(text) - item.tail_characters, 0)
    return Sample(
        id=name,
        task=rules.name,
        index=index,
        prompt=prompt,
        answer_prefix="",
        references=item.references,
        metric=rules.metric,
        length=tokens + rules.max_new_tokens,
        prompt_tokens=tokens,
        max_new_tokens=rules.max_new_tokens,
        context_length=context_length,
        question_start=rules.wrapper.offset() + question,
        stop=list(rules.stop) if rules.stop else None,
        postprocess=rules.postprocess,
        all_classes=item.all_classes,
        groups=item.groups,
        middle_tokens_cut=lost or None,
        second=second,
    )


def _second_call(tokenizer: Any, text: str, rules: TaskRules) -> SecondCall:
    prompt = rules.wrapper.wrap(text)
    tokens = len(encode_prompt(tokenizer, prompt))
    return SecondCall(prompt, tokens, rules.second_max_new_tokens)
