"""A prompt's last layer works for its last token alone; nothing that leaves the model changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shadowkv_cli.cells import build_specs
from shadowkv_cli.config import FullSpec
from shadowkv_cli.methods import tiles as cutting
from shadowkv_cli.model import exact_attention
from shadowkv_cli.model import session as sessions
from shadowkv_cli.model.last_layer import attend_last, last_mlp
from shadowkv_cli.model.session import Session
from shadowkv_cli.testing import FAMILIES, tiny_model


def prompt_of(tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 256, (tokens,), generator=generator).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_caches_are_those_of_the_whole_model(family: str) -> None:
    """Of transformers itself, and of a session that lets the last layer attend from all tokens."""
    loaded, ids = tiny_model(family), prompt_of(173)
    with torch.inference_mode():
        theirs = loaded.model(torch.tensor([ids]), logits_to_keep=1, use_cache=True)
    session = Session(loaded, [FullSpec()], prompt_tokens=173, new_tokens=2)
    logits = session.prefill(ids)
    assert torch.allclose(logits, theirs.logits[0, -1].float(), atol=1e-4)
    for layer, cached in enumerate(theirs.past_key_values.layers):
        for ours, their in (
            (session.store.keys[layer], cached.keys),
            (session.store.values[layer], cached.values),
        ):
            assert torch.allclose(ours[0, :, :173], their[0], atol=1e-4), (family, layer)


@pytest.mark.parametrize("longest", [8192, 24])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_last_token_is_worked_for(
    family: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "SHORTEST_TILE", min(longest, 16))
    monkeypatch.setattr(cutting, "LONGEST_TILE", longest)
    loaded = tiny_model(family)
    attended: list[int] = []
    exactly = exact_attention.attend

    def attend(backend: str, q: Tensor, *rest: object) -> Tensor:
        attended.append(q.shape[2])
        return exactly(backend, q, *rest)

    monkeypatch.setattr(sessions.exact_attention, "attend", attend)
    widths: dict[int, list[int]] = {0: [], 1: []}
    for layer, seen in widths.items():
        mlp = loaded.model.model.layers[layer].mlp
        mlp.forward = lambda x, run=mlp.forward, seen=seen: seen.append(x.shape[1]) or run(x)
    session = Session(loaded, [FullSpec()], prompt_tokens=100, new_tokens=4)
    session.prefill(prompt_of(100))
    assert attended == [100], "the first of two layers"
    assert sum(widths[0]) == 100
    assert widths[1] == [1]
    session.decode_step(torch.tensor([5]))
    session.append(torch.tensor([[6, 7]]), torch.tensor([2], dtype=torch.int32))
    assert widths[1] == [1, 1, 2], "what is decoded or appended goes through as it is"


def test_every_method_gets_all_of_the_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries too: nothing is cut before a method has seen it."""
    seen = []
    session = Session(
        tiny_model("llama"),
        build_specs(["full", "shadowkv"], {"rank": "16", "sparse_budget": "32"}),
        prompt_tokens=90,
        new_tokens=2,
    )
    for _, group in session.groups:
        before = group.prefill_layer
        monkeypatch.setattr(
            group,
            "prefill_layer",
            lambda layer, prompt, q, k, v, run=before: (
                seen.append((layer, q.shape[1], k.shape[1], v.shape[1]))
                or run(layer, prompt, q, k, v)
            ),
        )
    session.prefill(prompt_of(90))
    assert seen == [(layer, 90, 90, 90) for layer in (0, 0, 1, 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_mlp_is_found(family: str) -> None:
    model = tiny_model(family).model
    assert last_mlp(model) is model.model.layers[-1].mlp


def test_one_token_stands_for_all() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, 33, 16, generator=generator) for heads in (6, 2, 2))
    out = attend_last(q, k, v, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.3, enable_gqa=True
    )
    assert out.shape == expected.shape
    assert torch.allclose(out, expected[:, :, -1:].expand_as(q), atol=1e-5)
