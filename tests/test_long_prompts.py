"""A long prompt is done in tiles and in place: the same numbers, and less memory."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from shadowkv_cli.cells import build_specs
from shadowkv_cli.config import FullSpec
from shadowkv_cli.methods import store
from shadowkv_cli.methods import tiles as cutting
from shadowkv_cli.methods.tiles import tiles
from shadowkv_cli.model.fused import Fused, join_projections
from shadowkv_cli.model.loading import LoadedModel, describe
from shadowkv_cli.model.long_prompts import (
    LinearInto,
    OutputProjection,
    rotating_in_place,
    tiled,
    tiled_in_place,
)
from shadowkv_cli.model.rotary import attention_modules
from shadowkv_cli.model.session import Session
from shadowkv_cli.testing import FAMILIES, tiny_model

METHODS = ["full", "shadowkv", "oracle", "random", "streaming"]
SMALL = {"rank": "16", "sparse_budget": "64"}


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "SHORTEST_TILE", 16)
    monkeypatch.setattr(cutting, "LONGEST_TILE", 24)


def prompt_of(tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 256, (tokens,), generator=generator).tolist()


def with_fused(family: str) -> LoadedModel:
    """A model with joint projections and the torch references of the fused ops."""
    model = tiny_model(family).model
    join_projections(model)
    loaded = describe(model, family, random_weights=True)
    object.__setattr__(loaded, "fused", Fused(model, loaded.interleaved))
    return loaded


@pytest.mark.parametrize("tokens", [1, 512, 513, 8192, 50_001, 131_072, 524_289])
def test_tiles_cover_a_prompt_once(tokens: int) -> None:
    cut = list(tiles(tokens))
    assert cut[0].start == 0
    assert cut[-1].stop == tokens
    assert all(a.stop == b.start for a, b in itertools.pairwise(cut))
    assert all(t.stop - t.start <= 8192 for t in cut)
    assert all(t.stop - t.start >= 512 for t in cut[:-1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("build", [tiny_model, with_fused], ids=["plain", "fused"])
def test_tiles_change_no_answer(family: str, build, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, specs = prompt_of(203), build_specs(METHODS, SMALL)
    found = []
    for longest in (8192, 24):
        monkeypatch.setattr(cutting, "SHORTEST_TILE", min(longest, 512))
        monkeypatch.setattr(cutting, "LONGEST_TILE", longest)
        session = Session(build(family), specs, prompt_tokens=203, new_tokens=8)
        logits = session.prefill(ids, key="a")
        answers = session.generate(logits.argmax(-1).expand(5), [8] * 5, frozenset())
        found.append((logits, answers, session.store.keys, [*session.store.values.values()]))
    (plain, answers, *caches), (cut, same_answers, *same_caches) = found
    assert torch.allclose(plain, cut, atol=1e-4)
    assert answers == same_answers
    for cache, other in zip(caches, same_caches, strict=True):
        for a, b in zip(cache, other, strict=True):
            assert torch.allclose(a[:, :, :203], b[:, :, :203], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_wide_keys_are_factorised_in_tiles(
    family: str, short_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, specs = prompt_of(203), build_specs(["shadowkv"], {"rank": "16", "sparse_budget": "16"})
    found = []
    for widest in (1024, 1):
        monkeypatch.setattr(store, "WIDEST_WHOLE", widest)
        session = Session(tiny_model(family), specs, prompt_tokens=203, new_tokens=8)
        session.prefill(ids, key="a")
        kept = zip(session.store.coefficients, session.store.basis, strict=True)
        found.append([a[0, :203] @ b[0].transpose(0, 1).flatten(1) for a, b in kept])
    for whole, tiled_keys in zip(*found, strict=True):
        assert float(whole.abs().max()) > 0.1
        assert torch.allclose(whole, tiled_keys, atol=1e-4)


def test_everything_is_put_back(short_tiles: None) -> None:
    loaded = tiny_model("llama")
    family = importlib.import_module(type(attention_modules(loaded.model)[0]).__module__)
    rotation = family.apply_rotary_pos_emb
    session = Session(loaded, [FullSpec()], prompt_tokens=100, new_tokens=2)
    with session.attached():
        assert family.apply_rotary_pos_emb is not rotation
    assert family.apply_rotary_pos_emb is rotation
    assert not [name for name, m in loaded.model.named_modules() if "forward" in m.__dict__]


def test_norms_and_mlps_see_no_more_than_a_tile(short_tiles: None, monkeypatch) -> None:
    loaded, widths = tiny_model("llama"), []
    norm, mlp = loaded.model.model.norm, loaded.model.model.layers[0].mlp
    for module in (norm, mlp):
        before = module.forward
        module.forward = lambda x, run=before: widths.append(x.shape[1]) or run(x)
    session = Session(loaded, [FullSpec()], prompt_tokens=100, new_tokens=2)
    session.prefill(prompt_of(100))
    assert len(widths) == 2 * 7
    assert max(widths) == 16


def test_a_tiled_module_gives_the_same() -> None:
    norm = nn.LayerNorm(8)
    x = torch.randn(1, 2500, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, before = norm(x), x.clone()
        assert torch.equal(tiled(norm)(x), expected)
        assert torch.equal(x, before)
        assert tiled_in_place(norm)(x) is x
        assert torch.equal(x, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
def test_an_mlp_writes_over_its_input(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2500, 8, generator=generator)
    up, down = nn.Linear(8, 24), nn.Linear(24, 8, bias=bias)
    last, written = LinearInto(down), []

    def mlp(part: Tensor) -> Tensor:
        out = last.forward(up(part).relu())
        written.append(out.data_ptr() == part.data_ptr())
        return out

    with torch.inference_mode():
        expected = down(up(x).relu())
        assert tiled_in_place(mlp, last)(x) is x
        assert torch.allclose(x, expected, atol=1e-6)
        assert written == [rows == 1] * 5
        short = expected[:, :100].clone()
        assert torch.equal(tiled_in_place(mlp, last)(short), mlp(short))
        assert torch.equal(short, expected[:, :100])


def test_rotation_writes_over_what_it_reads(short_tiles: None) -> None:
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(1, 50, 6 * 4, generator=generator)
    q, k = (part.view(1, 50, -1, 4).transpose(1, 2) for part in joint.split([16, 8], -1))
    cos, sin = torch.randn(2, 1, 50, 4, generator=generator)

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q * cos[:, None], k * sin[:, None]

    expected = rotate(q.clone(), k.clone(), cos, sin)
    alone = tuple(x.clone() for x in (q, k))
    found = rotating_in_place(rotate, lambda q, k, *_: (q.zero_(), k.zero_()))(*alone, cos, sin)
    assert not any(x.count_nonzero() for x in (*alone, *found))
    found = rotating_in_place(rotate)(q, k, cos, sin)
    assert found[0] is q
    assert found[1] is k
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def long_enough(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cutting, "SHORTEST_TILE", 8)
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("beside", [0, 8], ids=["queries alone", "beside keys and values"])
def test_the_output_takes_the_place_of_the_queries(
    bias: bool, beside: int, long_enough: None
) -> None:
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(1, 20, 12 + beside, generator=generator)
    kept = joint[..., 12:].clone()
    query = joint[..., :12].unflatten(-1, (3, 4)).transpose(1, 2)
    x, linear = torch.randn(1, 20, 12, generator=generator), nn.Linear(12, 12, bias=bias)
    projection = OutputProjection(linear)
    projection.offer_queries(query)
    found = projection.forward(x)
    assert torch.allclose(found, linear(x), atol=1e-5)
    assert found.data_ptr() == joint.data_ptr()
    assert torch.equal(joint[..., 12:], kept), "keys and values are still wanted"
    assert projection.forward(x).data_ptr() != joint.data_ptr(), "an offer is taken once"


def test_queries_that_do_not_fit_are_left_alone(long_enough: None) -> None:
    linear = nn.Linear(12, 12)
    x = torch.randn(1, 20, 12)
    gated = torch.randn(1, 20, 3, 8)[..., :4].transpose(1, 2)  # a gate lies between the heads
    short, by_head = torch.randn(1, 3, 5, 4), torch.randn(1, 3, 20, 4)
    for query in (gated, short, by_head, torch.randn(1, 5, 20, 4)):
        before = query.clone()
        projection = OutputProjection(linear)
        projection.offer_queries(query)
        assert torch.allclose(projection.forward(x), linear(x), atol=1e-5)
        assert torch.equal(query, before), query.shape
