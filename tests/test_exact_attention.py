"""Which exact attention a prefill takes: what is installed, what works, and what is fastest."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shadowkv_cli.config import FullSpec
from shadowkv_cli.errors import UsageError
from shadowkv_cli.model import exact_attention
from shadowkv_cli.model.exact_attention import Choice, attend, choose, installed
from shadowkv_cli.model.session import Session
from shadowkv_cli.testing import tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HEADS = (4, 2, 16)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known from the test before; on a CPU no real package is imported either."""
    monkeypatch.setattr(exact_attention, "_choices", {})
    monkeypatch.setattr(exact_attention, "_broken", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("flash_attn", "cutlass"):
            del sys.modules[name]


def package(folder: Path, name: str, text: str) -> None:
    """A package with a module of that text in it; no `__init__.py` in a folder above it."""
    module = folder / name.replace(".", "/")
    module.mkdir(parents=True)
    (module / "__init__.py").write_text(text)


WORKS = """
from torch.nn.functional import scaled_dot_product_attention as attend
def flash_attn_func(q, k, v, softmax_scale, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = attend(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2){more}
"""
AS_TUPLE = WORKS.format(more=", None")
PLAIN = WORKS.format(more="")
FAULTS = {
    "at import": "raise ImportError('no kernel image')",
    "at the first call": "def flash_attn_func(*_, **more): raise KeyError('it does not compile')",
    "of another interface": "flash_attn = None",
    "wrong": PLAIN.replace("enable_gqa=True)", "enable_gqa=True) * 1.5"),
    "not a number": PLAIN.replace("enable_gqa=True)", "enable_gqa=True) * float('nan')"),
}


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Trials as on a GPU, with seconds by backend in place of its clock."""
    seconds = {"flash-attn": 0.5, "flash-attn-4": 0.25, "flash": 1.0, "cudnn": 0.75}
    trial, attention = exact_attention._Trial, exact_attention._attention

    def start(self: object, device: torch.device, *more: object) -> None:
        init(self, CPU, *more)

    def named(backend: str):
        found = attention(backend if backend in exact_attention.PACKAGES else "math")
        timed[found] = seconds[backend]
        return found

    timed: dict[object, float] = {}
    init = trial.__init__
    monkeypatch.setattr(trial, "__init__", start)
    monkeypatch.setattr(trial, "_seconds", lambda self, found, scale: timed[found])
    monkeypatch.setattr(exact_attention, "_attention", named)
    monkeypatch.setattr(exact_attention, "unfit", lambda *_: "")
    monkeypatch.setattr(exact_attention, "IN_TURN", (("flash-attn-4", "cudnn", "flash-attn"),))
    monkeypatch.setattr(torch.cuda, "device", lambda *_: nullcontext())
    return seconds


def chosen(backend: str = "auto") -> Choice:
    return choose(backend, GPU, torch.float32, HEADS, 33)


def test_a_cpu_has_no_trial() -> None:
    assert choose("auto", CPU, torch.float32, HEADS, 33) == Choice("flash")
    assert choose("sdpa", CPU, torch.float32, HEADS, 33) == Choice("sdpa")
    with pytest.raises(UsageError, match="choose from flash, math, sdpa or auto"):
        choose("flash-attn-4", CPU, torch.float32, HEADS, 33)


@pytest.mark.parametrize("returned", [AS_TUPLE, PLAIN])
def test_auto_takes_the_fastest_that_is_installed(
    on_gpu: dict[str, float], returned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen().backend == "cudnn"
    exact_attention._choices.clear()
    package(tmp_path, "flash_attn.cute", returned)
    package(tmp_path, "cutlass", "")
    monkeypatch.syspath_prepend(tmp_path)
    assert "flash-attn" not in installed(GPU), "flash-attn-4 alone"
    assert chosen() == Choice("flash-attn-4", 2 * 33**2 * 4 * 16 / 0.25 / 1e12)
    on_gpu["flash-attn-4"] = 0.8
    assert chosen().backend == "flash-attn-4", "one trial a shape"
    exact_attention._choices.clear()
    assert chosen().backend == "cudnn"


def test_files_of_flash_attn_4_without_what_they_need_are_not_an_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "flash_attn", PLAIN)
    (tmp_path / "flash_attn" / "cute").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert "flash-attn" in installed(GPU)
    assert "flash-attn-4" not in installed(GPU)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_what_is_installed_but_broken_is_left_out_with_one_notice(
    on_gpu: dict[str, float], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    package(tmp_path, "flash_attn", fault)
    monkeypatch.syspath_prepend(tmp_path)
    for tokens in (33, 47, 48, 100):
        assert choose("auto", GPU, torch.float32, HEADS, tokens).backend == "cudnn"
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert "flash-attn is installed but does not work: " in said
    assert exact_attention.broken().keys() == {"flash-attn"}


def test_what_was_asked_for_and_is_broken_is_replaced_and_named(
    on_gpu: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    package(tmp_path, "flash_attn", FAULTS["at import"])
    monkeypatch.syspath_prepend(tmp_path)
    assert chosen("flash-attn").backend == "cudnn"
    assert (
        "flash-attn is replaced by cudnn: ImportError: no kernel image" in capsys.readouterr().err
    )


def test_what_is_not_made_for_the_shape_is_replaced_too(
    on_gpu: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(
        exact_attention, "unfit", lambda name, *_: "too old" if name == "cudnn" else ""
    )
    monkeypatch.setattr(exact_attention, "IN_TURN", (("cudnn", "flash"),))
    assert chosen("cudnn").backend == "flash"
    assert capsys.readouterr().err == "The attention backend cudnn is replaced by flash: too old.\n"
    assert chosen().backend == "flash"
    assert not capsys.readouterr().err


def test_lengths_that_are_close_share_a_trial(on_gpu: dict[str, float], monkeypatch) -> None:
    made, trial = [], exact_attention._Trial.__init__
    monkeypatch.setattr(
        exact_attention._Trial,
        "__init__",
        lambda self, *arguments: made.append(arguments[-1]) or trial(self, *arguments),
    )
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 15, 16, 23, 24, 31):
        choose("auto", GPU, torch.float32, HEADS, tokens)
    assert made == [1, 2, 3, 4, 6, 8, 12, 16, 24]


def test_no_memory_for_a_trial_is_no_fault_of_a_backend(
    on_gpu: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    full = "import torch\ndef flash_attn_func(*_, **more): raise torch.OutOfMemoryError('full')"
    package(tmp_path, "flash_attn", full)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(torch.OutOfMemoryError):
        chosen()
    assert not exact_attention.broken()
    assert not capsys.readouterr().err


def test_a_package_that_fails_in_the_prefill_itself_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    package(tmp_path, "flash_attn", FAULTS["at the first call"])
    monkeypatch.syspath_prepend(tmp_path)
    chosen = iter([Choice("flash-attn", 700.0), Choice("flash")])
    monkeypatch.setattr(exact_attention, "choose", lambda *_: next(chosen))
    ids = torch.randint(3, 256, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    session = Session(tiny_model("llama"), [FullSpec()], prompt_tokens=50, new_tokens=2)
    logits = session.prefill(ids)
    assert session.backend == "flash"
    assert "flash-attn is installed but does not work: KeyError" in capsys.readouterr().err
    monkeypatch.undo()
    other = Session(tiny_model("llama"), [FullSpec()], prompt_tokens=50, new_tokens=2)
    assert torch.equal(logits, other.prefill(ids))


def test_a_fault_of_torch_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("no such shape")

    monkeypatch.setattr(exact_attention, "attend", fail)
    session = Session(tiny_model("llama"), [FullSpec()], prompt_tokens=8, new_tokens=2)
    with pytest.raises(RuntimeError, match="no such shape"):
        session.prefill([3, 4, 5])


def test_a_trial_of_a_long_prompt_leaves_out_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_attention, "TRIAL_FLOPS", 2 * 64**2 * 4 * 16 * 2.5)
    trial = exact_attention._Trial(CPU, torch.float32, (32, 8, 16), 64)
    assert trial.q.shape == (1, 8, 64, 16)
    assert trial.k.shape == trial.v.shape == (1, 2, 64, 16)
    assert trial.flops == 2 * 64**2 * 8 * 16
    assert exact_attention._Trial(CPU, torch.float32, (32, 8, 16), 640).k.shape[1] == 1


@pytest.mark.parametrize("heads", [(8, 4), (6, 6), (9, 3), (4, 1)])
def test_heads_of_a_very_long_prompt_are_attended_in_parts(
    heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 50, n, 16, generator=generator) for n in (heads[0], *heads[1:] * 2))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    whole = attend("math", q, k, v, 0.25)
    seen, attention = [], exact_attention._attention("math")
    monkeypatch.setattr(
        exact_attention,
        "_attention",
        lambda _: lambda q, *rest: seen.append(q.shape[1]) or attention(q, *rest),
    )
    monkeypatch.setattr(exact_attention, "MOST_ELEMENTS", q.numel() - 1)
    monkeypatch.setattr(exact_attention, "PART_ELEMENTS", q.numel() // 2)
    parts = attend("math", q, k, v, 0.25)
    assert torch.allclose(parts, whole, atol=1e-6)
    assert sum(seen) == heads[0]
    assert len(seen) == (1 if heads[1] == 1 else -(-heads[1] // (heads[1] // 2)))
    if heads[1] > 1:
        assert parts.transpose(1, 2).is_contiguous()


# ---- on a GPU ----

FOR_LONG_PROMPTS = ("flash-attn-4", "cudnn", "flash-attn", "flash", "efficient", "sdpa")


def ours_and_exact(backend: str, tokens: int, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Output of a backend in bfloat16, and of SDPA's math in float32 on the same numbers."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    q, k, v = (
        torch.randn(1, tokens, count, heads[2], generator=generator, device="cuda")
        .to(torch.bfloat16)
        .transpose(1, 2)
        for count in (heads[0], heads[1], heads[1])
    )
    scale = heads[2] ** -0.5
    ours = attend(backend, q, k, v, scale).float()
    exact = attend("math", q.float(), k.float(), v.float(), scale)
    return ours, exact


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8, 128), (28, 4, 128), (32, 32, 96), (9, 3, 64)])
@pytest.mark.parametrize("tokens", [1, 17, 128, 1000, 2049, 4099])
@pytest.mark.parametrize("backend", FOR_LONG_PROMPTS)
def test_every_installed_backend_is_exact(
    backend: str, tokens: int, heads: tuple[int, int, int]
) -> None:
    if backend not in installed(GPU):
        pytest.skip(f"{backend} is not installed")
    if why := exact_attention.unfit(backend, GPU, torch.bfloat16, heads[2]):
        pytest.skip(why)
    if (backend, tokens) == ("cudnn", 1):
        pytest.skip("it refuses a single key, see the test below")
    ours, exact = ours_and_exact(backend, tokens, heads)
    assert ours.shape == exact.shape
    assert (ours - exact).abs().max() < 0.03, (backend, tokens, heads)
    assert (ours - exact).norm() < 0.01 * exact.norm(), (backend, tokens, heads)


@pytest.mark.gpu
def test_a_prompt_of_one_token_is_answered_whatever_was_asked_for() -> None:
    for backend in FOR_LONG_PROMPTS:
        if backend in installed(GPU):
            found = choose(backend, GPU, torch.bfloat16, (32, 8, 128), 1)
            ours, exact = ours_and_exact(found.backend, 1, (32, 8, 128))
            assert (ours - exact).abs().max() < 0.03, (backend, found)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 500, 4099, 60_001])
def test_auto_finds_one_that_works_and_times_it(tokens: int) -> None:
    found = choose("auto", GPU, torch.bfloat16, (32, 8, 128), tokens)
    assert found.backend in installed(GPU)
    assert found.tflops is not None
    assert found.tflops > 0
    floats = choose("auto", GPU, torch.float32, (32, 8, 128), min(tokens, 4099))
    assert floats.backend in ("efficient", "math")


@pytest.mark.gpu
def test_the_output_of_a_long_prompt_is_laid_out_by_token() -> None:
    """So that the output projection needs no copy."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, 4096, n, 128, generator=generator, device="cuda").to(torch.bfloat16)
        for n in (32, 8, 8)
    )
    for backend in installed(GPU):
        if backend in ("math", "efficient") or exact_attention.unfit(
            backend, GPU, torch.bfloat16, 128
        ):
            continue
        out = attend(backend, *(x.transpose(1, 2) for x in (q, k, v)), 128**-0.5)
        assert out.transpose(1, 2).is_contiguous(), backend


def test_the_reference_of_these_tests_is_plain_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 40, 16, generator=generator) for n in (4, 2, 2))
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(
        torch.ones(40, 40, dtype=torch.bool).triu(1), -torch.inf
    )
    expected = F.softmax(scores, -1) @ v.repeat_interleave(2, 1)
    for backend in installed(CPU):
        assert torch.allclose(attend(backend, q, k, v, 0.3), expected, atol=1e-5), backend
