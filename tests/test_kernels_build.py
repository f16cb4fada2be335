"""The kernels compile without a GPU, load under a CPU build of torch, and cover every op."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shadowkv_cli import ops
from shadowkv_cli.ops import compiled

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "kernels" / "csrc"

LOAD = """
import json, sys, torch
from shadowkv_cli import ops
torch.ops.load_library(sys.argv[1])
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps({name: has(f"shadowkv::{name}", "CUDA") for name in ops.__all__}))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that was built, if no source is newer; else one compiled here."""
    sources = [ROOT / "kernels" / "CMakeLists.txt", *SOURCES.rglob("*.*")]
    newest = max(path.stat().st_mtime for path in sources)
    if compiled.LIBRARY.is_file() and compiled.LIBRARY.stat().st_mtime >= newest:
        return compiled.LIBRARY
    if not (shutil.which("nvcc") and shutil.which("cmake")):
        pytest.skip("no library is built, and nvcc or cmake is not installed")
    folder = tmp_path_factory.mktemp("kernels")
    configure = ["cmake", "-S", str(ROOT / "kernels"), "-B", str(folder)]
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DSHADOWKV_ARCHITECTURES=90-real"]
    subprocess.run([*configure, *options], check=True, timeout=120)
    subprocess.run(["cmake", "--build", str(folder), "--parallel", "2"], check=True, timeout=600)
    return folder / "shadowkv_kernels.so"


def test_it_loads_here_and_has_cuda_for_every_op(library: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD, str(library)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, compiled.SWITCH: "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(ops.__all__, True)


def test_it_needs_nothing_of_cuda_to_load(library: Path) -> None:
    """The runtime is linked in, and the one symbol of torch's CUDA part may be absent."""
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    dynamic = subprocess.run(
        ["readelf", "-dsW", str(library)], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert not [name for name in needed if "cuda" in name or "python" in name], needed
    stream = re.search(r"(\w+)\s+DEFAULT\s+UND aoti_torch_get_current_cuda_stream", dynamic)
    assert stream, "the stream is asked of torch"
    assert stream[1] == "WEAK"


@pytest.mark.parametrize("name", ops.__all__)
def test_every_op_has_its_sources(name: str) -> None:
    assert (SOURCES / f"{name.rstrip('_')}.cu").is_file()  # in place: beside the other
    assert f'm.impl("{name}"' in (SOURCES / "register.cpp").read_text(encoding="utf-8")
    assert f" {name}(" in (SOURCES / "api.h").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.cuh")), ids=lambda path: path.name)
def test_device_code_knows_no_torch(path: Path) -> None:
    assert "torch/" not in path.read_text(encoding="utf-8")


def test_they_can_be_left_out() -> None:
    code = "from shadowkv_cli.ops import compiled; print(compiled.ABSENT)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, compiled.SWITCH: "1"},
    )
    assert done.stdout.strip() == f"left out by {compiled.SWITCH}"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "sections", "words"),
    [
        (torch.bfloat16, 128, 4, 3, ""),
        (torch.float32, 64, 16, 4, ""),
        (torch.float16, 80, 4, 3, "head dimension of 80"),
        (torch.float64, 128, 4, 3, "float64"),
        (torch.float16, 128, 17, 3, "17 query heads"),
        (torch.float16, 128, 4, 5, "5 sections"),
    ],
)
def test_what_they_do_not_serve_is_named(
    dtype: torch.dtype, head_dim: int, group: int, sections: int, words: str
) -> None:
    lacking = compiled._lacking(dtype, head_dim, group, sections)
    assert words in lacking
    assert bool(lacking) == bool(words)


def test_ops_of_any_size_are_named_by_dtype_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking: list[str] = []
    monkeypatch.setattr(compiled, "_judge", lambda words: lacking.append(words) or not words)
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert compiled.serves_any_size(on_gpu)
    assert not compiled.serves_any_size(SimpleNamespace(is_cuda=True, dtype=torch.float64))
    assert lacking == ["", "torch.float64"]
    assert compiled.serves_any_size(torch.ones(1, dtype=torch.float64)), "a CPU has the reference"


def test_a_gpu_without_them_is_told_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "ABSENT", "not built")
    compiled._say_once.cache_clear()
    assert compiled._judge("")
    assert compiled._judge("")
    assert capsys.readouterr().err.count("make kernels") == 1
