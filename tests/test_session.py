"""The engine against transformers itself: full attention, and ShadowKV that keeps everything."""

from __future__ import annotations

import pytest
import torch

from shadowkv_cli.cells import build_specs
from shadowkv_cli.config import FullSpec, MethodSpec
from shadowkv_cli.model.loading import LoadedModel
from shadowkv_cli.model.session import Session, _finite_rows
from shadowkv_cli.testing import FAMILIES, tiny_model

NEW_TOKENS = 12


def prompt_of(tokens: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 256, (tokens,), generator=generator).tolist()


def reference(loaded: LoadedModel, ids: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
    out = loaded.model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


def answers(
    loaded: LoadedModel,
    specs: list[MethodSpec],
    ids: list[int],
    new_tokens: int = NEW_TOKENS,
    **session_options,
) -> tuple[list[list[int]], Session]:
    session = Session(
        loaded, specs, prompt_tokens=len(ids), new_tokens=new_tokens, **session_options
    )
    first = session.prefill(ids, key="a").argmax(-1).expand(len(specs))
    return session.generate(first, [new_tokens] * len(specs), frozenset()), session


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [100, 301])
def test_full_attention_equals_generate(family: str, tokens: int) -> None:
    loaded, ids = tiny_model(family), prompt_of(tokens)
    # Longrope is told its table by the prompt; generate would switch at 128 in the answer.
    tokens_ahead = NEW_TOKENS if tokens + NEW_TOKENS <= 128 or tokens > 128 else 128 - tokens
    found, _ = answers(loaded, [FullSpec()], ids, tokens_ahead)
    assert found[0] == reference(loaded, ids, tokens_ahead), (family, tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("landmarks", ["1", "2"])
def test_shadowkv_that_keeps_everything_equals_full(family: str, landmarks: str) -> None:
    loaded, ids = tiny_model(family), prompt_of(301)
    specs = build_specs(
        ["full", "shadowkv"],
        {
            "rank": "32",
            "sparse_budget": "304",
            "landmarks_per_chunk": landmarks,
            "dense_fallback": "never",
        },
    )
    (full, shadow), session = answers(loaded, specs, ids)
    assert shadow == full, family
    audit = session.audit(1, NEW_TOKENS - 1)
    assert audit["attended_tokens"] == 301 + NEW_TOKENS - 1
    assert audit["selected"] > 0, "the method was active"
    assert audit["outlier"] > 0


@pytest.mark.parametrize("method", ["oracle", "random", "streaming"])
def test_controls_that_keep_everything_equal_full(method: str) -> None:
    loaded, ids = tiny_model("llama"), prompt_of(301)
    specs = build_specs(["full", method], {"sparse_budget": "304", "dense_fallback": "never"})
    (full, control), session = answers(loaded, specs, ids)
    assert control == full
    assert session.audit(1, 3)["attended_tokens"] == 304


def test_methods_attend_the_same_number_of_tokens() -> None:
    loaded, ids = tiny_model("llama"), prompt_of(501)
    specs = build_specs(
        ["shadowkv", "oracle", "random", "streaming"], {"sparse_budget": "64"} | {"rank": "8"}
    )
    _, session = answers(loaded, specs, ids)
    counts = {s.name: session.audit(i, 5)["attended_tokens"] for i, s in enumerate(specs)}
    assert set(counts.values()) == {64 + 16 + 32 + 501 % 8 + 5}, counts


CELLS = [
    f"shadowkv:rank={rank},chunk_size={size},sparse_budget={budget}"
    for rank in (4, 8)
    for size in (4, 8)
    for budget in (16, 64)
]


def test_a_row_alone_gives_the_tokens_it_gives_in_a_sweep() -> None:
    loaded, ids = tiny_model("llama"), prompt_of(403)
    specs = build_specs(["full", "oracle", "random", "streaming", *CELLS], {})
    together, joint = answers(loaded, specs, ids)
    for i, spec in enumerate(specs):
        alone, session = answers(loaded, [spec], ids)
        assert alone[0] == together[i], spec.cell
        assert session.audit(0, 5) == joint.audit(i, 5), spec.cell
    assert len({tuple(t) for t in together}) > 1, "the cells differ"


def test_rows_that_end_leave_the_others_as_they_were() -> None:
    """Answers of unequal lengths: the batch shrinks, tokens and audits are those of rows alone."""
    loaded, ids = tiny_model("llama"), prompt_of(403)
    specs = build_specs(["full", "oracle", "random", "streaming", *CELLS], {})
    together, whole = answers(loaded, specs, ids, 24)
    limits = [4 + (7 * i) % 21 for i in range(len(specs))]
    session = Session(loaded, specs, prompt_tokens=403, new_tokens=24)
    first = session.prefill(ids, key="a").argmax(-1).expand(len(specs))
    widths = []
    step = session.next_tokens
    session.next_tokens = lambda tokens: widths.append(len(tokens)) or step(tokens)
    found = session.generate(first, limits, frozenset())
    assert widths[0] == len(specs)
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < len(specs) / 2, widths
    for i, (spec, limit) in enumerate(zip(specs, limits, strict=True)):
        assert found[i] == together[i][:limit], spec.cell
        assert session.audit(i, limit - 1)["generated"] == limit - 1
    session.reset()
    assert session.generate(first, [24] * len(specs), frozenset()) == together
    for i, spec in enumerate(specs):
        assert session.audit(i, 23) == whole.audit(i, 23), spec.cell


def test_unequal_prompts_in_one_batch() -> None:
    loaded = tiny_model("phi3")  # one prompt on either side of the longrope switch
    specs = build_specs(["full", "shadowkv"], {"rank": "32", "sparse_budget": "32"})
    prompts = [prompt_of(97, 5), prompt_of(301, 6), prompt_of(160, 7)]
    session = Session(loaded, specs, prompt_tokens=301, new_tokens=8, num_prompts=3)
    first = []
    for i, ids in enumerate(prompts):
        token = session.prefill(ids, index=i, key=str(i)).argmax(-1)
        first += [token] * len(specs)
    found = session.generate(torch.stack(first), [8] * 6, frozenset())
    for i, ids in enumerate(prompts):
        alone, _ = answers(loaded, specs, ids, 8)
        assert found[2 * i : 2 * i + 2] == alone, i


def test_one_batch_of_prompts_after_another() -> None:
    """Each as in a session of its own; tables of prompts that are gone make room for others."""
    loaded = tiny_model("phi3")
    specs = build_specs(["full", "shadowkv"], {"rank": "32", "sparse_budget": "32"})
    session = Session(loaded, specs, prompt_tokens=301, new_tokens=8, num_prompts=2)
    for lengths in ((97, 80), (301, 160), (60, 250), (301, 301), (40, 41)):
        first = []
        for i, tokens in enumerate(lengths):
            token = session.prefill(prompt_of(tokens, i), index=i, key=str(i)).argmax(-1)
            first += [token] * len(specs)
        found = session.generate(torch.stack(first), [8] * 4, frozenset())
        for i, tokens in enumerate(lengths):
            alone, _ = answers(loaded, specs, prompt_of(tokens, i), 8)
            assert found[2 * i : 2 * i + 2] == alone, (lengths, i)
        assert session.store.tables.cos.shape[0] <= 2


@pytest.mark.parametrize("buffers", ["value_buffer=4,key_buffer=2", "value_placement=host"])
def test_where_chunks_are_held_changes_no_token(buffers: str) -> None:
    loaded, ids = tiny_model("qwen2"), prompt_of(400)
    specs = build_specs(["shadowkv", f"shadowkv:{buffers}"], {"rank": "16", "sparse_budget": "32"})
    (plain, other), session = answers(loaded, specs, ids, 40)
    assert plain == other
    one, four = (session.audit(i, 39)["hit_rate"] for i in (0, 1))
    assert 0 <= one <= four <= 1
    if "value_buffer" in buffers:
        assert four > one, "a larger buffer hits more often"


def test_reset_goes_back_to_the_end_of_the_prefill() -> None:
    loaded, ids = tiny_model("llama"), prompt_of(300)
    specs = build_specs(["full", "shadowkv", "random"], {"sparse_budget": "32", "rank": "8"})
    session = Session(loaded, specs, prompt_tokens=300, new_tokens=10)
    first = session.prefill(ids, key="a").argmax(-1).expand(3)
    once = session.generate(first, [10] * 3, frozenset())
    session.reset()
    assert session.generate(first, [10] * 3, frozenset()) == once


def test_the_model_is_itself_again_after_a_session() -> None:
    loaded, ids = tiny_model("llama"), prompt_of(200)
    before = reference(loaded, ids)
    answers(loaded, [FullSpec()], ids)
    assert reference(loaded, ids) == before
    assert loaded.model.config._attn_implementation != "shadowkv"
    assert "forward" not in vars(loaded.model.model.rotary_emb)


def test_answers_end_at_any_of_several_ids() -> None:
    loaded, ids = tiny_model("llama"), prompt_of(200)
    plain = reference(loaded, ids)
    session = Session(loaded, [FullSpec()], prompt_tokens=200, new_tokens=NEW_TOKENS)
    first = session.prefill(ids).argmax(-1)[None]
    ends = frozenset({plain[4], plain[7]})
    stop = min(plain.index(t) for t in ends)
    assert session.generate(first, [NEW_TOKENS], ends) == [plain[: stop + 1]]


def test_a_session_serves_one_sample_after_another() -> None:
    loaded = tiny_model("llama")
    specs = build_specs(["full", "shadowkv"], {"sparse_budget": "32", "rank": "8"})
    session = Session(loaded, specs, prompt_tokens=300, new_tokens=NEW_TOKENS)
    for seed, tokens in ((1, 300), (2, 211)):
        ids = prompt_of(tokens, seed)
        first = session.prefill(ids, key=str(seed)).argmax(-1).expand(2)
        found = session.generate(first, [NEW_TOKENS] * 2, frozenset())
        assert found == answers(loaded, specs, ids)[0], seed


def test_a_further_turn_sees_what_came_before() -> None:
    """Full attention after a turn of unequal lengths answers as if all had been one prompt."""
    loaded, new = tiny_model("glm"), 6
    prompts = [prompt_of(120, 5), prompt_of(90, 6)]
    turns = [prompt_of(9, 7), prompt_of(4, 8)]
    session = Session(loaded, [FullSpec()], prompt_tokens=120, new_tokens=20, num_prompts=2)
    for i, ids in enumerate(prompts):
        session.prefill(ids, index=i)
    padded = torch.zeros(2, 9, dtype=torch.long)
    for i, turn in enumerate(turns):
        padded[i, : len(turn)] = torch.tensor(turn)
    counts = torch.tensor([9, 4], dtype=torch.int32)
    tokens = session.append(padded, counts).argmax(-1)
    found: list[list[int]] = [[], []]
    for _ in range(new):
        for row, token in enumerate(tokens.tolist()):
            found[row].append(token)
        tokens = session.decode_step(tokens).argmax(-1)
    for i, (prompt, turn) in enumerate(zip(prompts, turns, strict=True)):
        assert found[i] == reference(loaded, prompt + turn, new), i


@pytest.mark.parametrize("method", ["shadowkv", "oracle", "random", "streaming"])
def test_a_turn_at_once_equals_its_tokens_one_by_one(method: str) -> None:
    loaded, ids, turn = tiny_model("llama"), prompt_of(300), prompt_of(7, 9)
    specs = build_specs(
        [method],
        {"sparse_budget": "32"} | {"rank": "8"}
        if method == "shadowkv"
        else {"sparse_budget": "32"},
    )
    session = Session(loaded, specs, prompt_tokens=300, new_tokens=10)
    session.prefill(ids, key="a")
    at_once = session.append(torch.tensor([turn]), torch.tensor([7], dtype=torch.int32))
    session.reset()
    for token in turn:
        one_by_one = session.decode_step(torch.tensor([token]))
    assert torch.allclose(at_once, one_by_one, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_logit_that_is_not_finite_is_found(bad: float) -> None:
    logits = torch.arange(12.0).view(3, 4)
    for place in range(4):
        broken = logits.clone()
        broken[1, place] = bad
        assert _finite_rows(broken).tolist() == [True, False, True]
    assert _finite_rows(logits).all()


def test_a_step_that_fails_behind_the_last_layer_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, ids = tiny_model("llama"), prompt_of(301)
    specs = build_specs(["shadowkv"], {"sparse_budget": "64", "rank": "8"})
    session = Session(loaded, specs, prompt_tokens=len(ids), new_tokens=NEW_TOKENS)
    first = session.prefill(ids, key="a").argmax(-1).expand(1)
    expected = session.decode_step(first)
    session.reset()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    [(_, group)] = session.groups
    with monkeypatch.context() as broken:
        broken.setattr(loaded.model.lm_head, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            session.decode_step(first)
    assert not group._counted, "nothing is held for what no longer runs"
    assert int(group.selected.sum()) > 0, "what it selected was counted"
    session.reset()
    assert torch.equal(session.decode_step(first), expected)
