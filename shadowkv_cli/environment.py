"""What a result was made with: versions, processor, GPU and the state of the source code."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE_DIR = Path(__file__).resolve().parent
PACKAGES = (
    "shadowkv-cli",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "numpy",
    "scipy",
    "statsmodels",
    "wonderwords",
    "flash-attn",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "nltk",
)
"""Packages whose version may change a result; those that are not installed are left out."""

_COMMAND_TIMEOUT_S = 10.0


def capture(device: str | None = None) -> dict[str, Any]:
    """Describe this process for a manifest: stable between two runs on one machine.

    Holds no path, host name or user name, since manifests of reference runs are committed.

    Args:
        device: where the run computes, like `cpu` or `cuda:1`; if None, the current GPU is
            described where torch is loaded and has one.
    """
    return {
        "python": platform.python_version(),
        "platform": " ".join(filter(None, (platform.system(), platform.machine(), *_libc()))),
        "cpu": {"model": cpu_model(), "cores": usable_cores()},
        "memory_bytes": memory_bytes(),
        "versions": versions(),
        "git": git_state(PACKAGE_DIR),
        "device": device,
        "gpu": gpu_facts(device),
        "kernels": _kernels(device),
        "threads": _threads(),
    }


def cache_dir() -> Path:
    """This program's folder in the user's cache: `$XDG_CACHE_HOME/shadowkv`, else `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification tells programs to ignore a relative path.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "shadowkv"


def versions() -> dict[str, str]:
    """Version of each of `PACKAGES` that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """Name of the processor as its maker writes it, or the architecture where it is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        lines = _output("sysctl", "-n", "machdep.cpu.brand_string") or ""
        return lines or platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", lines, re.MULTILINE)
    return " ".join(match[1].split()) if match else platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Bytes of memory that this process may use: the machine's, or its container's limit."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no container, or the word `max`
        return total
    return min(total, limit)


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository that tracks a folder's files, and whether they differ from it.

    Returns None for a folder that no repository tracks: an installed package in somebody's
    project would otherwise be taken for a part of it.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--", "."))}


def gpu_facts(device: str | None = None) -> dict[str, Any] | None:
    """Describe a GPU, by default the current one; None where torch is not loaded or has none."""
    torch = sys.modules.get("torch")
    if torch is None or (device and not device.startswith("cuda")):
        return None
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device or "cuda")
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "count": torch.cuda.device_count(),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
    }


def driver_version() -> str | None:
    """Version of the NVIDIA driver, or None where there is none."""
    output = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return output.splitlines()[0].strip() if output else None


def clocks_mhz(device: Any) -> dict[str, int] | None:
    """Clocks of a GPU's processors and memory as they are now; None where nothing tells them.

    Args:
        device: a `torch.device`.
    """
    torch = sys.modules.get("torch")
    if torch is None or device.type != "cuda":
        return None
    output = _output(
        "nvidia-smi",
        f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}",
        "--query-gpu=clocks.sm,clocks.mem",
        "--format=csv,noheader,nounits",
    )
    numbers = re.fullmatch(r"(\d+), (\d+)", output or "")
    return {"sm": int(numbers[1]), "memory": int(numbers[2])} if numbers else None


def _kernels(device: str | None) -> dict[str, Any] | None:
    """Whether a GPU has the compiled kernels or runs torch ops; None where it is not used."""
    compiled = sys.modules.get("shadowkv_cli.ops.compiled")
    if compiled is None or gpu_facts(device) is None:
        return None
    if compiled.ABSENT:
        return {"ops": "torch", "reason": compiled.ABSENT.partition(" (")[0]}
    library = compiled.LIBRARY.read_bytes()
    return {"ops": "compiled", "sha256": hashlib.sha256(library).hexdigest()}


def _git(folder: Path, *arguments: str) -> str | None:
    # A git hook exports these, and they would win over -C.
    hidden = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    variables = {k: v for k, v in os.environ.items() if k not in hidden}
    command = ("git", "-C", str(folder), *arguments)
    return _output(*command, variables={**variables, "GIT_OPTIONAL_LOCKS": "0"})


def _output(*command: str, variables: dict[str, str] | None = None) -> str | None:
    """What a command prints; None where it is not installed, fails or hangs."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            timeout=_COMMAND_TIMEOUT_S,
            env=variables,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _libc() -> tuple[str, ...]:
    return tuple(part for part in platform.libc_ver() if part)


def _threads() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    return {
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "torch": torch.get_num_threads() if torch else None,
    }
