"""A prompt that takes over the keys and values of a beginning it shares is as if it did not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shadowkv_cli.cells import build_specs
from shadowkv_cli.config import LEAST_SHARED_TOKENS, FullSpec, MethodSpec
from shadowkv_cli.methods import tiles as cutting
from shadowkv_cli.methods.full import FullGroup
from shadowkv_cli.model.loading import LoadedModel, describe
from shadowkv_cli.model.residents import Prefix, Residents, shared_tokens
from shadowkv_cli.model.session import Session
from shadowkv_cli.testing import FAMILIES, tiny_model

TOKENS = 203
SETTINGS = {"rank": "16", "sparse_budget": "32", "chunk_size": "8", "dense_fallback": "never"}
METHODS = ["full", "shadowkv", "shadowkv:landmarks_per_chunk=2,value_dtype=fp8", "oracle"]
METHODS += ["random", "streaming"]


def prompt_of(tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 256, (tokens,), generator=generator).tolist()


def branched(ids: list[int], shared: int, tokens: int = TOKENS) -> list[int]:
    """Another prompt of so many tokens, of which only the first `shared` are those of `ids`."""
    other = prompt_of(tokens - shared, 1000 + shared)
    other[0] = 3 if ids[shared] != 3 else 4
    return ids[:shared] + other


def all_methods() -> list[MethodSpec]:
    return build_specs(METHODS, SETTINGS)


def session_of(loaded: LoadedModel, specs: list[MethodSpec], **options) -> Session:
    sizes = {"prompt_tokens": 256, "new_tokens": 9} | options
    return Session(loaded, specs, **sizes)


def state_of(session: Session, index: int, tokens: int) -> dict[str, Tensor]:
    """All that a store holds of a prompt; low-rank keys as the keys that they give."""
    store, found = session.store, {}
    for layer in range(store.shape.num_layers):
        found[f"keys {layer}"] = store.keys[layer][index, :, :tokens]
        found[f"values {layer}"] = store.values[layer][index, :, :tokens]
        basis = store.basis[layer][index].transpose(0, 1).flatten(1)  # [r, Hk * D]
        found[f"low-rank keys {layer}"] = store.coefficients[layer][index, :tokens] @ basis
        for form, landmarks in store.landmarks.items():
            count = tokens // form[0]
            found[f"landmarks {form} {layer}"] = landmarks[layer][index, :, :count].float()
    return found


def assert_same(session: Session, index: int, whole: Session, tokens: int, case: object) -> None:
    expected = state_of(whole, 0, tokens)
    for name, tensor in state_of(session, index, tokens).items():
        assert torch.allclose(tensor, expected[name], atol=1e-4), (case, name)


@pytest.mark.parametrize("place", ["the same", "another"])
@pytest.mark.parametrize("shared", [LEAST_SHARED_TOKENS, 101, TOKENS - 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_that_of_a_whole_prefill(family: str, shared: int, place: str) -> None:
    loaded, first = tiny_model(family), prompt_of(TOKENS, 1)
    second, case = branched(first, shared), (family, shared, place)
    specs, prompts = all_methods(), 1 if place == "the same" else 2
    session = session_of(loaded, specs, num_prompts=prompts, reuse_prefix=True)
    whole = session_of(loaded, specs)
    session.prefill(first, key="first")
    assert session.reused_tokens == 0
    logits = session.prefill(second, index=prompts - 1, key="second")
    expected = whole.prefill(second, key="second")
    assert session.reused_tokens == shared
    assert torch.allclose(logits, expected, atol=1e-4), case
    assert_same(session, prompts - 1, whole, TOKENS, case)

    answers = []
    for one in (session, whole):
        rows = one.num_prompts * len(specs)
        found = one.generate(logits.argmax(-1).expand(rows), [9] * rows, frozenset())
        answers.append(found[-len(specs) :])
    assert answers[0] == answers[1], case


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_every_backend_attends_to_what_was_taken_over(backend: str) -> None:
    loaded, first = tiny_model("llama"), prompt_of(TOKENS, 1)
    session = session_of(loaded, [FullSpec()], backend=backend, reuse_prefix=True)
    session.prefill(first)
    second = branched(first, 90)
    expected = session_of(loaded, [FullSpec()]).prefill(second)
    assert torch.allclose(session.prefill(second), expected, atol=1e-4)
    assert session.reused_tokens == 90


def test_a_prompt_that_was_taken_over_from_is_left_as_it_was() -> None:
    loaded, specs = tiny_model("llama"), all_methods()
    first = prompt_of(TOKENS, 1)
    session = session_of(loaded, specs, num_prompts=2, reuse_prefix=True)
    session.prefill(first, key="first")
    before = {name: tensor.clone() for name, tensor in state_of(session, 0, TOKENS).items()}
    session.prefill(branched(first, 90), index=1, key="second")
    assert session.reused_tokens == 90
    for name, tensor in state_of(session, 0, TOKENS).items():
        assert torch.equal(tensor, before[name]), name


def test_it_is_taken_from_the_prompt_that_shares_most() -> None:
    """Of all places, through answers and batches; again and again from what was taken over."""
    loaded, specs = tiny_model("llama"), all_methods()
    session = session_of(loaded, specs, num_prompts=3, reuse_prefix=True)
    whole = session_of(loaded, specs)
    trunk = prompt_of(256, 1)
    lengths = [(100, 0), (200, 100), (150, 150), (170, 170), (230, 200), (256, 230), (80, 80)]
    for number, (shared, expected) in enumerate(lengths):
        ids = trunk if shared == 256 else branched(trunk, shared, min(256, shared + 40))
        logits = session.prefill(ids, index=number % 3, key=str(number))
        assert session.reused_tokens == expected, number
        assert torch.allclose(logits, whole.prefill(ids, key=str(number)), atol=1e-4), number
        assert_same(session, number % 3, whole, len(ids), number)
        if number >= 2:  # answers are written behind the prompts of all places
            rows = 3 * len(specs)
            session.generate(logits.argmax(-1).expand(rows), [9] * rows, frozenset())


@pytest.mark.parametrize("longest", [16, 40])
def test_long_prompts_in_tiles_are_no_exception(
    longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "SHORTEST_TILE", 16)
    monkeypatch.setattr(cutting, "LONGEST_TILE", longest)
    loaded, specs, first = tiny_model("llama"), all_methods(), prompt_of(TOKENS, 1)
    session, whole = session_of(loaded, specs, reuse_prefix=True), session_of(loaded, specs)
    session.prefill(first)
    for shared in (101, 70):
        second = branched(first, shared)
        assert torch.allclose(session.prefill(second), whole.prefill(second), atol=1e-4)
        assert session.reused_tokens == shared
        assert_same(session, 0, whole, TOKENS, shared)


@pytest.mark.parametrize("shared", [0, 1, LEAST_SHARED_TOKENS - 1])
def test_a_short_beginning_is_not_taken_over(shared: int) -> None:
    loaded, first = tiny_model("llama"), prompt_of(TOKENS, 1)
    session = session_of(loaded, [FullSpec()], reuse_prefix=True)
    whole = session_of(loaded, [FullSpec()])
    session.prefill(first)
    second = branched(first, shared)
    assert torch.equal(session.prefill(second), whole.prefill(second)), "the very same work"
    assert session.reused_tokens == 0


def test_without_being_asked_nothing_is_taken_over() -> None:
    loaded, first = tiny_model("llama"), prompt_of(TOKENS, 1)
    session = session_of(loaded, [FullSpec()])
    logits = session.prefill(first)
    assert torch.equal(session.prefill(first), logits)
    assert session.reused_tokens == 0


def test_without_exact_keys_there_is_nothing_to_take_over() -> None:
    session = session_of(
        tiny_model("llama"), build_specs(["shadowkv", "streaming"], SETTINGS), reuse_prefix=True
    )
    for _ in range(2):
        session.prefill(prompt_of(TOKENS, 1))
        assert session.reused_tokens == 0


def test_a_method_that_reads_queries_gets_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(FullGroup, "needs_queries", True)
    monkeypatch.setattr(
        FullGroup, "prefill_layer", lambda self, layer, prompt, q, k, v: seen.append(q.shape[1])
    )
    session = session_of(tiny_model("llama"), [FullSpec()], reuse_prefix=True)
    for _ in range(2):
        session.prefill(prompt_of(TOKENS, 1))
    assert seen == [TOKENS] * 4
    assert session.reused_tokens == 0


@pytest.mark.parametrize("prompts", [1, 2])
def test_keys_of_another_rotary_table_are_left_alone(prompts: int) -> None:
    """Longrope switches its table at 128 tokens: what comes before depends on what follows."""
    loaded, long = tiny_model("phi3"), prompt_of(TOKENS, 1)
    session = session_of(loaded, [FullSpec()], num_prompts=prompts, reuse_prefix=True)
    whole = session_of(loaded, [FullSpec()])
    session.prefill(long)
    for tokens, reused in ((110, 0), (120, 110), (190, 0 if prompts == 1 else 190 - 1)):
        ids = long[:tokens]
        logits = session.prefill(ids, index=prompts - 1)
        assert session.reused_tokens == reused, tokens
        assert torch.allclose(logits, whole.prefill(ids), atol=1e-4), tokens


def test_a_prompt_that_failed_half_way_is_not_taken_over_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded, first = tiny_model("llama"), prompt_of(TOKENS, 1)
    session = session_of(loaded, [FullSpec()], reuse_prefix=True)
    session.prefill(first)
    add_layer = session.store.add_layer

    def fails(layer: int, *rest: object) -> None:
        if layer == 1:
            raise MemoryError
        add_layer(layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(session.store, "add_layer", fails)
        with pytest.raises(MemoryError):
            session.prefill(branched(first, 80))
    logits = session.prefill(first)
    assert session.reused_tokens == 0
    assert torch.equal(logits, session_of(loaded, [FullSpec()]).prefill(first))


# ---- which prompt ----

SMALL = st.lists(st.integers(0, 1), min_size=1, max_size=8)


@given(one=SMALL, other=SMALL)
def test_shared_tokens_end_at_the_first_difference(one: list[int], other: list[int]) -> None:
    count = shared_tokens(torch.tensor(one), torch.tensor(other))
    assert one[:count] == other[:count]
    assert count == min(len(one), len(other)) or one[count] != other[count]


@given(st.lists(st.lists(st.integers(0, 1), max_size=4), min_size=1, max_size=4), SMALL)
def test_the_longest_prefix_leaves_a_token(ends: list[list[int]], end: list[int]) -> None:
    trunk = [7] * LEAST_SHARED_TOKENS
    residents, ids = Residents(), trunk + end
    for index, held in enumerate(ends):
        residents.note(index, torch.tensor(trunk + held), (1.0,))
    found = residents.longest_prefix(torch.tensor(ids), (1.0,))
    assert found is not None
    held = trunk + ends[found.index]
    assert LEAST_SHARED_TOKENS <= found.tokens < len(ids)
    assert held[: found.tokens] == ids[: found.tokens]
    for other in ends:
        longer = (trunk + other)[: found.tokens + 1]
        assert longer != ids[: found.tokens + 1] or found.tokens == len(ids) - 1
    assert residents.longest_prefix(torch.tensor(ids), (2.0,)) is None
    for index in range(len(ends)):
        residents.forget(index)
    assert residents.longest_prefix(torch.tensor(ids), (1.0,)) is None


def test_a_prefix_of_enough_tokens_is_taken_as_it_is() -> None:
    residents, ids = Residents(), torch.arange(LEAST_SHARED_TOKENS + 1)
    residents.note(3, ids, ())
    assert residents.longest_prefix(ids, ()) == Prefix(3, LEAST_SHARED_TOKENS)
    assert residents.longest_prefix(ids[:-1], ()) is None, "one token must be left"


# ---- on a GPU ----

FLOAT = torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("shared", [LEAST_SHARED_TOKENS, 1003, 1921, 2050])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT], ids=["bf16", "float32"])
def test_on_a_gpu_too(dtype: torch.dtype, shared: int, prompts: int) -> None:
    """Beside a side stream, again and again; by the kernels that `auto` takes.

    In two bytes another order of sums rounds differently: the errors, against float32 with the same
    weights, must be no more than twice those of a whole prefill.
    """
    tokens, sizes = 2051, {"prompt_tokens": 2056, "new_tokens": 9}
    specs = build_specs(["full", "shadowkv", "random"], SETTINGS | {"sparse_budget": "128"})
    first = prompt_of(tokens, 1)
    second = branched(first, shared, tokens)
    low, high = (tiny_model("llama", dtype=kind, head_dim=64).model for kind in (dtype, FLOAT))
    high.load_state_dict({name: weight.float() for name, weight in low.state_dict().items()})
    loaded, exact = (describe(m.to("cuda"), "tiny", random_weights=True) for m in (low, high))

    truth = session_of(exact, [FullSpec()], **sizes)
    whole = session_of(loaded, specs, **sizes)
    session = session_of(loaded, specs, num_prompts=prompts, reuse_prefix=True, **sizes)
    logits = [s.prefill(second, key="second") for s in (truth, whole)]
    case, place = (dtype, shared, prompts), prompts - 1

    def assert_close(ours: Tensor, true: Tensor, theirs: Tensor, name: str) -> None:
        ours, true, theirs = ours.float(), true.float(), theirs.float()
        allowed = 2 * (theirs - true).norm() + 1e-4 * true.norm()
        assert (ours - true).norm() <= allowed, (name, case)

    other = prompt_of(tokens, 2)
    for _ in range(5):
        session.prefill(other, index=place, key="other")  # so that it does not lie there itself
        session.prefill(first, key="first")
        ours = session.prefill(second, index=place, key="second")
        assert session.reused_tokens == shared
        assert_close(ours, *logits, "logits")
        for layer in range(2):
            for name in ("keys", "values"):
                held = [getattr(s.store, name)[layer] for s in (session, truth, whole)]
                mine, true, theirs = (
                    x[i, :, :tokens] for x, i in zip(held, (place, 0, 0), strict=True)
                )
                assert_close(mine, true, theirs, f"{name} {layer}")
        rows = prompts * len(specs)
        session.generate(ours.argmax(-1).expand(rows), [9] * rows, frozenset())
