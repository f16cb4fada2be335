"""The prefill on a CUDA device: beside the model or in line, without waiting, within its memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from shadowkv_cli.bench.memory import PeakMemory, allowed_bytes
from shadowkv_cli.cells import build_specs
from shadowkv_cli.config import MethodSpec
from shadowkv_cli.methods.sparse import SparseGroup
from shadowkv_cli.model.compression import Compression
from shadowkv_cli.model.fused import join_projections
from shadowkv_cli.model.loading import LoadedModel, describe, has_kernels
from shadowkv_cli.model.session import Session
from shadowkv_cli.testing import FAMILIES, tiny_model

pytestmark = pytest.mark.gpu
SMALL = {"rank": "16", "sparse_budget": "64"}
CELLS = [
    "full",
    "shadowkv",
    "shadowkv:value_placement=host",
    "shadowkv:value_placement=host,value_dtype=fp8,landmark_dtype=fp8",
    "shadowkv:chunk_size=16,landmarks_per_chunk=2",
    "oracle",
    "streaming",
]
PACKED = "shadowkv:value_placement=host,value_dtype=packed,landmark_dtype=packed"


def on_gpu(family: str, dtype: torch.dtype) -> LoadedModel:
    loaded = tiny_model(family, dtype=dtype, head_dim=64)
    model = loaded.model.to("cuda")
    join_projections(model)
    return describe(model, loaded.name, random_weights=True)


def prompt_of(tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 256, (tokens,), generator=generator).tolist()


def state_of(session: Session, tokens: int) -> Iterator[tuple[str, Tensor]]:
    """Everything that methods keep of a prompt, but for what lies behind its end."""
    store = session.store
    for layer in range(session.loaded.shape.num_layers):
        yield "keys", store.keys[layer][:, :, :tokens]
        for form, by_layer in store.value_store.held.items():
            whole = tokens // (form.chunk_size or 1) * (form.chunk_size or 1)
            yield f"values {form}", by_layer[layer][:, :, :whole].view(torch.uint8)
        for form, landmarks in store.landmarks.items():
            yield f"landmarks {form}", landmarks[layer][:, :, : tokens // form[0]].view(torch.uint8)
        yield "coefficients", store.coefficients[layer][:, :tokens]
        yield "basis", store.basis[layer]
        for _, group in session.groups:
            if isinstance(group, SparseGroup):
                kept = max(k.outlier_tokens for k in group.row_kept)
                yield f"outliers of {group.rows[0].spec.cell}", group.keys[layer][:, :, :kept]
                local = min(k.local_tokens for k in group.row_kept)
                start = group.capacities[0]
                yield "local", group.values[layer][:, :, start : start + local]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beside_the_model_or_in_line_nothing_changes(family: str, dtype: torch.dtype) -> None:
    cells = [*CELLS, PACKED] if dtype == torch.bfloat16 else CELLS
    loaded, specs = on_gpu(family, dtype), build_specs(cells, SMALL)
    sessions = [Session(loaded, specs, prompt_tokens=5000, new_tokens=8) for _ in range(2)]
    sessions[1].compress(beside=False)
    for tokens in (4999, 1025, 5000, 333, 2048):
        ids = prompt_of(tokens, seed=tokens)
        logits, answers = [], []
        for session in sessions:
            logits.append(session.prefill(ids, key="a"))
            first = logits[-1].argmax(-1).expand(len(specs))
            answers.append(session.generate(first, [8] * len(specs), frozenset()))
        assert torch.equal(*logits), tokens
        for (name, ours), (_, theirs) in zip(
            *(state_of(session, tokens) for session in sessions), strict=True
        ):
            assert torch.equal(ours, theirs), (name, tokens)
        assert answers[0] == answers[1], tokens


def test_values_of_odd_lengths_reach_the_host() -> None:
    loaded = on_gpu("llama", torch.bfloat16)
    specs = build_specs(["full", "shadowkv:value_placement=host"], SMALL)
    session = Session(loaded, specs, prompt_tokens=3000, new_tokens=2)
    for tokens in (2999, 1234, 3000):
        session.prefill(prompt_of(tokens, 1), key="a")
        torch.cuda.synchronize()
        held = session.store.value_store.held
        (on_host,) = [by_layer for form, by_layer in held.items() if form.placement == "host"]
        for layer, values in on_host.items():
            assert values.is_pinned()
            expected = session.store.values[layer][:, :, :tokens].cpu()
            assert torch.equal(values[:, :, :tokens], expected), (layer, tokens)


def test_methods_take_in_a_layer_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = on_gpu("llama", torch.bfloat16)
    session = Session(
        loaded, build_specs([*CELLS, PACKED], SMALL), prompt_tokens=3000, new_tokens=2
    )
    session.store.low_rank_method = "subspace"
    ids = prompt_of(2999, 1)
    session.prefill(ids, key="a")  # what is made once is there
    take_in, watched = Compression.take_in, []

    def watch(self: Compression, *arguments: object) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            take_in(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        watched.append(1)

    monkeypatch.setattr(Compression, "take_in", watch)
    session.prefill(ids, key="a")
    assert len(watched) == loaded.shape.num_layers


SHAPES = {
    "llama": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128,
    },
    "phi3": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 32, "pad_token_id": 0,
    },
    "qwen2": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}  # fmt: skip


def wide_model(family: str) -> LoadedModel:
    """Three layers of a true width."""
    config = AutoConfig.for_model(
        family, vocab_size=1000, num_hidden_layers=3, max_position_embeddings=131_072,
        **SHAPES[family],
    )  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if has_kernels(model.device):
        join_projections(model)
    return describe(model, family, random_weights=True)


@pytest.mark.parametrize("backend", ["auto", "cudnn", "flash"])
@pytest.mark.parametrize("tokens", [32_768, 65_535])
@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("cells", [["full"], ["shadowkv:value_placement=host"]], ids=str)
def test_a_prefill_stays_within_its_memory(
    cells: list[str], family: str, tokens: int, backend: str
) -> None:
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # its own are counted, in whatever order tests run
    others = torch.cuda.memory_allocated()  # what other tests of this process hold still
    loaded = wide_model(family)
    if not has_kernels(loaded.device):
        pytest.skip("without the kernels, norms and rotations take more")
    settings = {} if cells == ["full"] else {"sparse_budget": "2048"}
    specs: list[MethodSpec] = build_specs(cells, settings)
    session = Session(loaded, specs, prompt_tokens=tokens, new_tokens=8, backend=backend)
    session.choose_backend()
    peak = PeakMemory(loaded.device)
    peak.restart()
    session.prefill(prompt_of(tokens, 1), key="a")
    torch.cuda.synchronize()
    allowed = allowed_bytes(loaded, tokens, session.held_bytes)
    unit = tokens * loaded.hidden_size * 2
    taken = (peak.read() - others - allowed.total + allowed.workspace) / unit
    print(f"{family} {tokens} {session.backend} {cells}: {taken:.2f} of 6 tensors; {others} bytes")
    assert taken <= 6


def test_sessions_leave_no_memory_behind() -> None:
    """A stream's workspace stays with cuBLAS; so a stream for each session would fill the GPU."""
    loaded = on_gpu("llama", torch.bfloat16)
    left = []
    for _ in range(4):
        specs = build_specs(["shadowkv:value_placement=host"], SMALL)
        session = Session(loaded, specs, prompt_tokens=1000, new_tokens=8)
        session.prefill(prompt_of(1000, 1), key="a")
        torch.cuda.synchronize()
        del session
        gc.collect()
        left.append(torch.cuda.memory_allocated())
    assert left[1:] == left[:1] * 3
