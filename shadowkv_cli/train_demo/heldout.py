"""Scores on held-out samples: greedy decoding with full attention, RULER's own metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from shadowkv_cli.tasks.metrics import score
from shadowkv_cli.tasks.rows import Dataset, Sample
from shadowkv_cli.tasks.tokenization import special_prefix
from shadowkv_cli.train_demo.network import Cache, Network

TOKENS_AT_ONCE = 1 << 20


@torch.no_grad()
def answer(network: Network, prompts: Sequence[list[int]], most: int, eos: int) -> list[list[int]]:
    """Decode up to `most` ids for each prompt; prompts may differ in length."""
    device = network.model.device
    config = network.config
    longest = max(map(len, prompts))
    rows = len(prompts)
    room = longest + most
    size = (rows, config.num_key_value_heads, room, config.head_dim)
    caches = [
        Cache(*(torch.zeros(size, dtype=network.dtype, device=device) for _ in range(2)))
        for _ in range(config.num_hidden_layers)
    ]
    last = []
    for i, prompt in enumerate(prompts):
        own = [Cache(c.keys[i : i + 1], c.values[i : i + 1]) for c in caches]
        hidden = network.hidden(torch.tensor([prompt], device=device), own)
        last.append(hidden[-1])
    ids = network.logits(torch.stack(last)).argmax(-1)
    positions = torch.tensor([len(prompt) for prompt in prompts], device=device)
    steps = [ids]
    done = ids == eos
    for _ in range(most - 1):
        if bool(done.all()):
            break
        ids = network.step(ids, positions, caches).argmax(-1)
        positions = positions + 1
        done |= ids == eos
        steps.append(ids)
    columns = torch.stack(steps, dim=1).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in columns]


def encode_prompts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """What `encode_prompt` makes of each text that spells no special token, on all cores."""
    prefix = special_prefix(tokenizer)
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [[*prefix, *encoding.ids] for encoding in encodings]


def _groups(samples: list[Sample], context_length: int) -> Iterator[list[Sample]]:
    size = max(TOKENS_AT_ONCE // context_length, 1)
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def held_out_scores(
    network: Network, tokenizer: Any, data: Dataset, limit: int | None, report: Any
) -> list[dict[str, Any]]:
    """Mean score in percent of every task and length."""
    results = []
    for task in data.tasks:
        for length in data.context_lengths:
            started = time.perf_counter()
            samples = data.samples(length, task, limit)
            scores = []
            for group in _groups(samples, length):
                prompts = encode_prompts(tokenizer, [sample.text for sample in group])
                most = group[0].max_new_tokens
                for sample, ids in zip(
                    group, answer(network, prompts, most, tokenizer.eos_token_id), strict=True
                ):
                    scores.append(score(tokenizer.decode(ids), sample))
            mean = 100 * sum(scores) / len(scores)
            results.append(
                {"context_length": length, "task": task, "n": len(scores), "score": round(mean, 2)}
            )
            seconds = time.perf_counter() - started
            report(f"{length} {task}: {mean:.2f} of {len(scores)}, {seconds:.1f} s")
    return results
