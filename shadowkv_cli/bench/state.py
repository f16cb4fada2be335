"""What a decode benchmark starts from: random keys and values, or prompts that are prefilled."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from shadowkv_cli.methods import Prompt
from shadowkv_cli.model.session import Session

SEED = 42


@torch.inference_mode()
def fill_synthetic(session: Session, prompt_tokens: int | Sequence[int]) -> torch.Tensor:
    """Give every prompt random keys and values, each its own; returns random first tokens [P].

    Args:
        session: any; it forgets what it decoded.
        prompt_tokens: of all prompts, or of each.
    """
    shape, store = session.loaded.shape, session.store
    generator = torch.Generator(store.device).manual_seed(SEED)

    def normal(heads: int, tokens: int) -> torch.Tensor:
        size = (heads, tokens, shape.head_dim)
        return torch.randn(size, generator=generator, device=store.device, dtype=store.dtype)

    if isinstance(prompt_tokens, int):
        prompt_tokens = [prompt_tokens] * session.num_prompts
    for index, tokens in enumerate(prompt_tokens):
        prompt = Prompt(index, tokens, f"synthetic-{index}")
        session.set_prompt(prompt)
        for layer in range(shape.num_layers):
            k, v = (normal(shape.num_kv_heads, tokens) for _ in range(2))
            # No method looks at the prompt's queries; theirs would be the largest tensor of all.
            q = k.new_zeros(1).expand(shape.num_q_heads, tokens, shape.head_dim)
            store.add_layer(layer, prompt, k, v)
            for _, group in session.groups:
                group.prefill_layer(layer, prompt, q, k, v)
            del k, v, q  # before the next ones are drawn: they are as large as a cell's reserve
        store.packer.check()
    return torch.randint(
        session.loaded.vocab_size, (session.num_prompts,), generator=generator, device=store.device
    )


def fill_prompts(session: Session, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, float]:
    """Prefill the prompts; returns the first answer tokens [P] and the seconds of one prefill."""
    first, seconds = [], 0.0
    session.choose_backend()
    for index, ids in enumerate(prompts):
        started = time.perf_counter()
        token = session.prefill(ids, index=index, key=f"prompt-{index}").argmax(-1)
        first.append(int(token))  # waits for the device
        seconds += time.perf_counter() - started
    return torch.tensor(first, device=session.store.device), seconds / len(prompts)


def random_prompts(count: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """Prompts of random tokens, each its own."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocabulary, (count, tokens), generator=generator).tolist()
