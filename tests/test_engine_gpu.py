"""The captured decode step on a CUDA device, against the same rows run op by op and on the CPU."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch

from shadowkv_cli.bench import eager, probes
from shadowkv_cli.bench.driven_hits import drive
from shadowkv_cli.bench.state import fill_synthetic
from shadowkv_cli.cells import build_specs
from shadowkv_cli.cli import run
from shadowkv_cli.errors import ShadowKVError
from shadowkv_cli.methods.pinned import idle_bytes
from shadowkv_cli.methods.shadowkv import ShadowKVGroup
from shadowkv_cli.methods.sparse import Placed
from shadowkv_cli.model.failures import MethodFailure
from shadowkv_cli.model.fused import join_projections
from shadowkv_cli.model.loading import LoadedModel, describe
from shadowkv_cli.model.session import Session
from shadowkv_cli.model.step_graph import StepGraph, Stepped
from shadowkv_cli.results import read_run
from shadowkv_cli.testing import FAMILIES, tiny_model

pytestmark = pytest.mark.gpu

SMALL = {"rank": "16", "sparse_budget": "32"}
FP8 = "shadowkv:value_placement=host,value_dtype=fp8,landmark_dtype=fp8"
METHODS = [
    *("full", "shadowkv", "shadowkv:value_placement=host", FP8),
    *("oracle", "random", "streaming"),
]


def on_gpu(family: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> LoadedModel:
    loaded = tiny_model(family, dtype=dtype, head_dim=head_dim)
    model = loaded.model.to("cuda")
    join_projections(model)
    return describe(model, loaded.name, random_weights=True)


def prompt_of(tokens: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 256, (tokens,), generator=generator).tolist()


def forced_logits(session: Session, ids: list[int], rows: int, steps: int) -> torch.Tensor:
    """Logits [steps, R, V] of given tokens after a prompt, by whatever way the session decodes."""
    session.prefill(ids, key="a")
    tokens = torch.tensor(prompt_of(steps, seed=2), device="cuda")
    found = []
    with session.attached():
        for token in tokens:
            found.append(session.next_tokens(token.expand(rows)).logits.clone())
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_gives_the_logits_of_the_same_ops_one_by_one(family, dtype) -> None:
    loaded, ids, specs = on_gpu(family, dtype), prompt_of(403), build_specs(METHODS, SMALL)
    logits, audits = [], []
    for captures in (True, False):
        session = Session(loaded, specs, prompt_tokens=403, new_tokens=30, captures=captures)
        logits.append(forced_logits(session, ids, len(specs), 30))
        assert session.is_captured is captures
        audits.append([session.audit(row, 30) for row in range(len(specs))])
    assert torch.equal(*logits)
    assert audits[0] == audits[1]


def test_one_graph_serves_prompts_of_other_lengths_and_is_captured_once(monkeypatch) -> None:
    loaded, specs = on_gpu("llama"), build_specs(METHODS, SMALL)
    session = Session(loaded, specs, prompt_tokens=700, new_tokens=20)
    captured = []
    capture = Session._capture
    monkeypatch.setattr(Session, "_capture", lambda self: captured.append(1) or capture(self))
    for tokens in (403, 700, 128, 403):
        found = forced_logits(session, prompt_of(tokens), len(specs), 20)
        alone = Session(loaded, specs, prompt_tokens=700, new_tokens=20, captures=False)
        assert torch.equal(found, forced_logits(alone, prompt_of(tokens), len(specs), 20)), tokens
    assert captured == [1]


def test_generate_ends_and_answers_as_without_a_graph() -> None:
    loaded, specs, ids = on_gpu("qwen2"), build_specs(METHODS, SMALL), prompt_of(300)
    found = []
    for captures in (True, False):
        session = Session(loaded, specs, prompt_tokens=300, new_tokens=24, captures=captures)
        for _ in range(2):  # the second answer replays the graph of the first
            first = session.prefill(ids, key="a").argmax(-1).expand(len(specs))
            found.append(session.generate(first, [24] * len(specs), frozenset([7, 11])))
            session.reset()
    assert found[0] == found[1] == found[2] == found[3]


LAYOUTS = list(
    itertools.product(
        ("device", "host", "1 layer"), ((1, 1), (4, 2), (1, 3), (2.5, 1)), (1, 2, 5), (True, False)
    )
)


@pytest.mark.parametrize("kept_in", ["model", "packed", "fp8"])
def test_where_chunks_lie_and_who_works_on_them_changes_no_bit(kept_in: str) -> None:
    """And packed values give what plain ones give."""
    loaded = on_gpu("llama")
    tokens = torch.tensor(prompt_of(40, seed=2), device="cuda")
    expected, runs = None, [(kept_in, layout) for layout in LAYOUTS]
    if kept_in == "packed":
        runs.insert(0, ("model", LAYOUTS[0]))
    for value_dtype, layout in runs:
        placement, (value_buffer, key_buffer), lanes, captures = layout
        settings = SMALL | {
            "value_placement": "device" if placement == "device" else "host",
            "resident_layers": "1" if placement == "1 layer" else "0",
            "value_dtype": value_dtype,
            "landmark_dtype": "fp8" if value_dtype == "fp8" else "model",
            "value_buffer": str(value_buffer),
            "key_buffer": str(key_buffer),
        }
        (spec,) = build_specs(["shadowkv"], settings)
        session = Session(
            loaded, [spec], prompt_tokens=512, new_tokens=40, num_prompts=5, merge_cells=False,
            captures=captures,
        )  # fmt: skip
        fill_synthetic(session, 512)
        session.focus(spec, lanes=lanes)
        with session.attached():
            for token in tokens:
                logits = session.next_tokens(token.expand(5)).logits
        case = (value_dtype, layout)
        assert session.is_captured is captures, case
        expected = logits.clone() if expected is None else expected
        assert torch.equal(logits, expected), case


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_in_bf16_is_at_most_twice_as_wrong_as_torch(family: str) -> None:
    specs, ids = build_specs(["full", "shadowkv:value_placement=host"], SMALL), prompt_of(403)
    exact_model = tiny_model(family, head_dim=64)
    exact = Session(exact_model, specs, prompt_tokens=403, new_tokens=8)
    engine = Session(on_gpu(family), specs, prompt_tokens=403, new_tokens=8)
    plain_model = tiny_model(family, dtype=torch.bfloat16, head_dim=64)  # torch ops on the CPU
    plain = Session(plain_model, specs, prompt_tokens=403, new_tokens=8)
    tokens = prompt_of(8, seed=2)

    def run(session: Session) -> torch.Tensor:
        session.prefill(ids, key="a")
        device = session.loaded.device
        steps = [session.next_tokens(torch.tensor([t, t], device=device)) for t in tokens]
        return steps[-1].logits.float().cpu()

    truth, ours, theirs = run(exact), run(engine), run(plain)
    for row, spec in enumerate(specs):
        allowed = 2 * (theirs[row] - truth[row]).abs().max() + 2e-2 * truth[row].abs().max()
        assert (ours[row] - truth[row]).abs().max() <= allowed, spec.cell


@pytest.mark.slow
def test_four_thousand_tokens_end_as_on_the_torch_path() -> None:
    steps, ids = 4000, prompt_of(600)
    specs = build_specs(["full", "shadowkv:value_placement=host,value_buffer=4"], SMALL)
    last = []
    for captures in (True, False):
        session = Session(
            on_gpu("llama", torch.float32), specs, prompt_tokens=600, new_tokens=steps,
            captures=captures,
        )  # fmt: skip
        session.prefill(ids, key="a")
        tokens = torch.tensor(prompt_of(steps, seed=3), device="cuda")
        with session.attached():
            for token in tokens:
                stepped = session.next_tokens(token.expand(2))
        assert bool(stepped.finite.all())
        last.append(stepped.logits.clone())
    assert torch.equal(*last)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_queries_that_drift_reach_a_hit_rate(micro_batches: int) -> None:
    settings = SMALL | {"sparse_budget": "256", "value_placement": "host", "value_buffer": "4"}
    (spec,) = build_specs(["shadowkv"], settings)
    session = Session(
        on_gpu("llama"), [spec], prompt_tokens=8192, new_tokens=64, num_prompts=6,
        merge_cells=False,
    )  # fmt: skip
    first = fill_synthetic(session, 8192)
    for wanted, lanes in ((0.6, 1), (0.88, 2)):
        session.focus(spec, lanes=lanes, micro_batches=micro_batches)
        drive(session, first, wanted, warmup=32, steps=32)
        assert session.is_captured
        assert session.hit_rate(33, 64) == pytest.approx(wanted, abs=0.02)


def test_the_baseline_decodes_what_the_engine_decodes_on_its_keys_and_values() -> None:
    loaded = on_gpu("llama", torch.float32)
    (spec,) = build_specs(["full"], {})
    session = Session(
        loaded, [spec], prompt_tokens=700, new_tokens=20, num_prompts=3, merge_cells=False
    )
    first = fill_synthetic(session, 700)
    theirs, finite = eager.decode(session, first, 20, before_step=lambda _: None)
    session.focus(spec)
    tokens, ours = first, []
    with session.attached():
        for _ in range(20):
            tokens = session.next_tokens(tokens).tokens.clone()
            ours.append(tokens)
    assert session.is_captured
    assert bool(finite.all())
    assert torch.equal(theirs, torch.stack(ours, 1))


def test_graphs_lanes_and_the_baseline_are_rows_of_one_run(tmp_path: Path) -> None:
    wide = tmp_path / "model"
    tiny_model("llama", dtype=torch.bfloat16, head_dim=64).model.save_pretrained(wide)
    command = ["bench", "--model", str(wide), "--state", "synthetic"]
    command += ["--context-length", "2k", "--batch-size", "4", "--share", "--rounds", "2"]
    command += ["--rank", "16", "--sparse-budget", "64", "--value-placement", "host"]
    command += ["--lanes", "2,1", "--graph", "on,off", "--one-at-a-time", "--eager-baseline"]
    command += ["--decode-steps", "8", "--output", str(tmp_path / "b")]
    name = probes.device_name(torch.device("cuda", 0))
    slow = probes.Probe(name, 1.0, {"bfloat16": 1.0}, 1.0, 1.0, 1.0, "", "2026-11-24")
    probes.store(slow)
    assert run(command) == 0
    found = read_run(tmp_path / "b")
    probe = found.manifest["environment"]["probe"]
    assert probe["memory_read_gb_s"] > 100, "the one that was kept is not of this run"
    rows = [row for row in found.throughput if row["round"] == 0]
    assert [(row["method"], row["lanes"], row["captured"]) for row in rows] == [
        ("full", 1, True),
        ("full", 1, False),
        ("shadowkv", 2, True),
        ("shadowkv", 2, False),
        ("shadowkv", 1, True),
        ("eager-sdpa", 1, False),
    ]
    for row in rows:
        assert (row["phase_ms"] is not None) == row["captured"], row["cell"]
        assert all(clock["sm"] > 0 for clock in row["clocks_mhz"]), row["cell"]
    captured = next(row for row in rows if row["method"] == "shadowkv" and row["captured"])
    assert {"select", "fetch", "rebuild", "attention"} <= captured["phase_ms"].keys()
    assert captured["phase_bytes"]["fetch"] > 0


def test_a_batch_on_memory_that_another_one_left_decodes_the_same() -> None:
    loaded = on_gpu("llama")
    (spec,) = build_specs(["shadowkv"], SMALL | {"value_placement": "host"})

    def decoded(prompts: int) -> list[list[int]]:
        session = Session(
            loaded, [spec], prompt_tokens=512, new_tokens=10, num_prompts=prompts,
            merge_cells=False,
        )  # fmt: skip
        tokens, taken = fill_synthetic(session, 512), []
        session.focus(spec)
        with session.attached():
            for _ in range(10):
                tokens = session.next_tokens(tokens).tokens.clone()
                taken.append(tokens.tolist())
        return taken

    expected = decoded(2)
    decoded(5)
    gc.collect()
    left = idle_bytes()
    assert left > 0
    assert decoded(2) == expected
    gc.collect()
    assert idle_bytes() == left, "nothing was pinned anew"


def product_factors() -> tuple[torch.Tensor, torch.Tensor]:
    """Few rows and a long sum: cuBLAS splits their product, in its workspace."""
    generator = torch.Generator("cuda").manual_seed(0)
    rows, weight = (
        torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)
        for size in ((8, 14_336), (14_336, 4096))
    )
    return rows, weight


def product_graph(rows: torch.Tensor, weight: torch.Tensor) -> StepGraph:
    """The product, captured; both must outlive it."""

    def step(tokens: torch.Tensor) -> Stepped:
        logits = rows @ weight + tokens[:, None]
        return Stepped(logits.argmax(-1), torch.isfinite(logits).all(-1), logits)

    return StepGraph(step, 8, torch.device("cuda"), forget=lambda: None)


def test_a_graph_goes_on_when_the_one_before_it_is_gone() -> None:
    factors, tokens = product_factors(), torch.arange(8, device="cuda")
    before, graph = product_graph(*factors), product_graph(*factors)
    expected = graph.replay(tokens).logits.clone()
    del before
    gc.collect()
    torch.cuda.empty_cache()
    # Whatever was given back holds something else now.
    taken = [torch.full((1 << 24,), float("nan"), device="cuda") for _ in range(32)]
    assert torch.equal(graph.replay(tokens).logits, expected)
    assert bool(taken[0].isnan().all())


def test_graphs_that_come_and_go_leave_no_memory_behind() -> None:
    factors = product_factors()
    product_graph(*factors)
    gc.collect()
    held = torch.cuda.memory_allocated()
    for _ in range(40):  # more than there are streams
        product_graph(*factors)
    gc.collect()
    assert torch.cuda.memory_allocated() == held


def test_a_step_that_fails_while_it_is_captured_says_what_failed() -> None:
    calls = []

    def step(tokens: torch.Tensor) -> Stepped:
        calls.append(1)
        if len(calls) == 2:
            raise ShadowKVError("no room")
        return Stepped(tokens, tokens == tokens, tokens)

    with pytest.raises(ShadowKVError, match="no room"):
        StepGraph(step, 2, torch.device("cuda"), forget=lambda: None)
    assert len(calls) == 2
    factors = product_factors()
    assert product_graph(*factors).replay(torch.arange(8, device="cuda")).finite.all()


@pytest.mark.parametrize(("captures", "fails_at"), [(True, 11), (True, 5), (False, 5)])
def test_a_lane_that_fails_says_what_failed_and_leaves_nothing_under_way(
    captures: bool, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second lane of three in the second layer of two, in the capture or in a step before."""
    session = in_parts_session(torch.bfloat16, 6)
    [spec] = session.specs
    tokens = torch.arange(6, device="cuda")
    session.focus(spec, lanes=3, captures=captures)
    expected = session.next_tokens(tokens).logits.clone()
    rebuild, calls = ShadowKVGroup.load_keys, []

    def failing(self: ShadowKVGroup, layer: int, placed: Placed) -> None:
        calls.append(layer)
        if len(calls) == fails_at:
            raise RuntimeError("no room")
        rebuild(self, layer, placed)

    monkeypatch.setattr(ShadowKVGroup, "load_keys", failing)
    session.focus(spec, lanes=3, captures=captures)
    with pytest.raises(MethodFailure, match="no room"):
        session.next_tokens(tokens)
    monkeypatch.undo()
    torch.cuda.synchronize()
    session.focus(spec, lanes=3, captures=captures)
    assert torch.equal(session.next_tokens(tokens).logits, expected)


def test_a_session_that_nobody_wants_goes_before_a_capture_or_after_it() -> None:
    loaded, specs = on_gpu("llama"), build_specs(["shadowkv"], SMALL | {"value_placement": "host"})
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        session, found = None, []
        for _ in range(4):
            session = Session(loaded, specs, prompt_tokens=403, new_tokens=5)
            loop = [session]
            loop.append(loop)  # so that it goes with the garbage only
            found.append(forced_logits(session, prompt_of(403), 1, 5))
            assert session.is_captured
    finally:
        gc.set_threshold(*thresholds)
    assert all(torch.equal(found[0], other) for other in found[1:])


def in_parts_session(dtype: torch.dtype, rows: int) -> Session:
    """A filled session of one cell that fetches from the host."""
    settings = SMALL | {"value_placement": "host", "value_buffer": "2"}
    session = Session(
        on_gpu("llama", dtype), build_specs(["shadowkv"], settings), prompt_tokens=512,
        new_tokens=40, num_prompts=rows, merge_cells=False,
    )  # fmt: skip
    fill_synthetic(session, [512 - 16 * row for row in range(rows)])
    return session


def steps_of(session: Session, tokens: torch.Tensor) -> tuple[torch.Tensor, object]:
    """Logits [steps, R, V] of given tokens from the end of the prefill, and what was counted."""
    session.reset()
    rows, found = len(session.batch), []
    with session.attached():
        for token in tokens:
            found.append(session.next_tokens(token.expand(rows)).logits.clone())
    audits = [session.audit(row, len(tokens)) for row in range(rows)]
    return torch.stack(found), (audits, session.hit_rate(2, len(tokens)))


@pytest.mark.parametrize("rows", [5, 8])
def test_captured_micro_batches_give_the_bits_of_the_same_op_by_op(rows: int) -> None:
    session = in_parts_session(torch.bfloat16, rows)
    [spec] = session.specs
    tokens = torch.tensor(prompt_of(40, seed=2), device="cuda")
    session.focus(spec, captures=False, micro_batches=2)
    expected, counted = steps_of(session, tokens)
    assert not session.is_captured
    for lanes, captures in itertools.product((1, 2, 3), (True, False)):
        session.focus(spec, lanes=lanes, captures=captures, micro_batches=2)
        for again in range(3):  # a graph is replayed after a reset
            logits, own = steps_of(session, tokens)
            case = (lanes, captures, again)
            assert session.is_captured is captures, case
            assert torch.equal(logits, expected), case
            assert own == counted, case


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_micro_batches_decode_what_all_rows_decode_at_once(micro_batches: int) -> None:
    session = in_parts_session(torch.float32, 5)
    [spec] = session.specs
    tokens = torch.tensor(prompt_of(40, seed=2), device="cuda")
    session.focus(spec, captures=False)
    expected, counted = steps_of(session, tokens)
    for lanes, captures in itertools.product((1, 2), (True, False)):
        session.focus(spec, lanes=lanes, captures=captures, micro_batches=micro_batches)
        logits, own = steps_of(session, tokens)
        assert torch.allclose(logits, expected, atol=1e-2), (lanes, captures)
        assert own == counted, (lanes, captures)
    session.focus(spec, captures=True)
    assert torch.equal(steps_of(session, tokens)[0], expected), "all at once again"


def test_graphs_of_one_and_of_two_micro_batches_come_and_go() -> None:
    session = in_parts_session(torch.bfloat16, 4)
    [spec] = session.specs
    tokens = torch.tensor(prompt_of(10, seed=2), device="cuda")
    found: dict[int, torch.Tensor] = {}
    for micro_batches in (1, 2) * 4:
        session.focus(spec, lanes=2, micro_batches=micro_batches)
        logits, _ = steps_of(session, tokens)
        assert session.is_captured
        assert torch.equal(logits, found.setdefault(micro_batches, logits))
        gc.collect()


def test_a_layer_that_fails_in_a_micro_batch_leaves_the_device_in_order() -> None:
    session = in_parts_session(torch.bfloat16, 4)
    [spec] = session.specs
    tokens = torch.tensor(prompt_of(6, seed=2), device="cuda")
    session.focus(spec, micro_batches=2)
    expected, _ = steps_of(session, tokens)
    session.focus(spec, micro_batches=2)
    _, last = session.batch.parts[1]
    calls, select = [], last.select

    def failing(*args):
        calls.append(args)
        if len(calls) > session.loaded.shape.num_layers:  # while the step is captured
            raise ShadowKVError("no room")
        return select(*args)

    last.select = failing
    with pytest.raises(ShadowKVError, match="no room"):
        steps_of(session, tokens)
    session.focus(spec, micro_batches=2)
    assert torch.equal(steps_of(session, tokens)[0], expected)


@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_more_lanes_than_there_are_streams_decode_the_same(
    micro_batches: int, captures: bool
) -> None:
    rows = 36
    (spec,) = build_specs(
        ["shadowkv"],
        SMALL | {"value_placement": "host", "value_buffer": "2", "key_buffer": "1"},
    )
    session = Session(
        on_gpu("llama"), [spec], prompt_tokens=512, new_tokens=20, num_prompts=rows,
        merge_cells=False,
    )  # fmt: skip
    fill_synthetic(session, 512)
    tokens = torch.tensor(prompt_of(20, seed=2), device="cuda")
    found = []
    for lanes in (1, rows):
        session.focus(spec, lanes=lanes, captures=captures, micro_batches=micro_batches)
        with session.attached():
            for token in tokens:
                logits = session.next_tokens(token.expand(rows)).logits
        found.append(logits.clone())
    assert torch.equal(*found)
