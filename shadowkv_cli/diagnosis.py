"""What is here, what is missing, and what to do about it: the checks of `shadowkv doctor`."""

from __future__ import annotations

import platform
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shadowkv_cli import environment
from shadowkv_cli.console import format_bytes, notice

if TYPE_CHECKING:
    import torch

    from shadowkv_cli.bench.probes import Probe

REQUIREMENTS = {"cuda": "GPU", "kernels": "kernels", "hub": "hub"}
"""What `--require` may name, and the check that answers it."""

HUB_TIMEOUT_S = 4.0
LITTLE_DISK_BYTES = 5e9
LITTLE_MEMORY_BYTES = 4e9


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what, in a word.
        state: `ok`; `note` where something optional is absent; `bad` where runs will fail.
        found: what is there.
        advice: what to do about it; empty where there is nothing to do.
        values: the numbers behind `found`, for --json.
    """

    name: str
    state: Literal["ok", "note", "bad"]
    found: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def run_checks(*, probe: bool, offline: bool) -> list[Check]:
    """Look at everything; measure the device if `probe`, and ask no hub if `offline`."""
    checks = _packages()
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch needs is missing
        advice = "install it again: pip install --force-reinstall torch"
        checks.append(Check("torch import", "bad", " ".join(str(error).split()), advice))
        checks += [Check(name, "note", "unknown without torch") for name in ("GPU", "kernels")]
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        probed = _probe(device, probe)  # first: it tries the attention backends
        checks += [_gpu(), _attention_backends(device), probed, _kernels()]
    return [*checks, _memory(), _disk(), _cache_folder(), _hub(offline), _punkt()]


def _packages() -> list[Check]:
    """Python and every package that the installation declares, torch and transformers first."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        package = metadata.metadata("shadowkv-cli")
    except metadata.PackageNotFoundError:
        advice = "install it to have its requirements checked: pip install -e ."
        return [Check("shadowkv-cli", "note", "runs from a folder, not installed", advice)]
    python, wanted = platform.python_version(), package["Requires-Python"]
    fits = SpecifierSet(wanted).contains(python)
    advice = "" if fits else f"make a virtual environment with Python {wanted}"
    checks = [Check("Python", "ok" if fits else "bad", python, advice)]
    problems = []
    for requirement in map(Requirement, package.get_all("Requires-Dist") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        good = version is not None and requirement.specifier.contains(version, prereleases=True)
        found = "not installed" if version is None else version if good else f"{version}, too old"
        fix = "" if good else f"pip install '{requirement.name}{requirement.specifier}'"
        if requirement.name in ("torch", "transformers"):
            checks.append(Check(requirement.name, "ok" if good else "bad", found, fix))
        elif not good:
            problems.append(Check(requirement.name, "bad", found, fix))
    return [*checks, *problems]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory() -> Check:
    total = environment.memory_bytes()
    if total is None:
        return Check("memory", "note", "unknown")
    found = f"{format_bytes(total)}, {environment.usable_cores()} cores ({environment.cpu_model()})"
    if total < LITTLE_MEMORY_BYTES:
        return Check("memory", "note", found, "keep to contexts of a few thousand tokens")
    return Check("memory", "ok", found)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{format_bytes(free)} free in this folder"
    if free < LITTLE_DISK_BYTES:
        return Check("disk", "note", found, "free some space, or give --output on another disk")
    return Check("disk", "ok", found)


def _cache_folder() -> Check:
    folder = environment.cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        advice = "set XDG_CACHE_HOME to a folder that you may write to; probes are not kept without"
        return Check("cache folder", "note", f"{folder}: {error.strerror}", advice)
    return Check("cache folder", "ok", str(folder))


def _kernels() -> Check:
    from shadowkv_cli.ops import compiled

    if not compiled.ABSENT:
        return Check("kernels", "ok", "compiled, loaded: on a GPU they are used")
    found = f"{compiled.ABSENT}: torch ops are used"
    return Check("kernels", "note", found, compiled.HOW_TO_BUILD)


def _hub(offline: bool) -> Check:
    from huggingface_hub import constants

    if offline or constants.HF_HUB_OFFLINE:
        why = "--offline" if offline else "HF_HUB_OFFLINE is set"
        return Check("hub", "note", f"not asked: {why}")
    reason = _hub_failure(constants.ENDPOINT)
    if not reason:
        return Check("hub", "ok", f"{constants.ENDPOINT} answers")
    advice = (
        "use what needs no hub: --tokenizer demo, --model demo, local folders; behind a proxy set "
        "HTTPS_PROXY, for a mirror HF_ENDPOINT"
    )
    return Check("hub", "note", f"{constants.ENDPOINT} is not in reach: {reason}", advice)


def _hub_failure(endpoint: str) -> str:
    """Why the hub can't be reached; empty where it answers, whatever the answer."""
    result = [f"no answer in {HUB_TIMEOUT_S:.0f} s"]

    def ask() -> None:
        request = urllib.request.Request(endpoint, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
                result[0] = ""
        except urllib.error.HTTPError:
            result[0] = ""
        except (OSError, ValueError) as error:
            result[0] = " ".join(str(getattr(error, "reason", error)).split())

    # A thread: looking a name up has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S + 1)
    return result[0]


def _punkt() -> Check:
    from shadowkv_cli.tasks.ruler.sentences import PUNKT, available_splitter

    if available_splitter() == PUNKT:
        return Check("nltk punkt", "ok", "its data is here")
    advice = (
        "only to split essays exactly as official RULER does: pip install nltk, then "
        "python -m nltk.downloader punkt_tab"
    )
    return Check("nltk punkt", "note", "not here: sentences are split by rules", advice)


def _gpu() -> Check:
    import torch

    if gpu := environment.gpu_facts():
        found = (
            f"{gpu['count']} x {gpu['name']}, {format_bytes(gpu['memory_bytes'])}, compute "
            f"capability {gpu['compute_capability']}, driver {gpu['driver']}, CUDA {gpu['cuda']}"
        )
        return Check("GPU", "ok", found, values=gpu)
    if driver := environment.driver_version():
        if torch.version.cuda is None:
            why, advice = "torch is a CPU build", "install a CUDA build of torch"
        else:
            why = f"torch's CUDA {torch.version.cuda} finds none"
            advice = "update the driver, or install a torch of an older CUDA; see nvidia-smi"
        return Check("GPU", "note", f"not used: driver {driver} is here, but {why}", advice)
    return Check("GPU", "note", "none: everything runs on the CPU")


def _attention_backends(device: torch.device) -> Check:
    """What is installed for the prefill; how fast each is, once it was probed."""
    from shadowkv_cli.bench import probes
    from shadowkv_cli.model.exact_attention import broken, installed

    names, failed = installed(device), broken()
    probe = probes.stored(probes.device_name(device))
    speeds = probe.attention_tflops if probe is not None else {}
    shown = [f"{n} {speeds[n]:.3g} TFLOP/s" if n in speeds else n for n in names if n not in failed]
    found = f"{', '.join(shown)} on {device.type}"
    if speeds:
        found += f"; auto takes {max(speeds, key=lambda name: speeds[name])}"
    values = {"backends": names, "tflops": speeds, "broken": failed}
    if failed:
        why = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        advice = "install it again for this torch and CUDA, or do without: the others work"
        return Check("attention", "note", f"{found}. Does not work: {why}", advice, values)
    return Check("attention", "ok", found, values=values)


def _probe(device: torch.device, measure: bool) -> Check:
    from shadowkv_cli.bench import probes

    if measure:
        notice("Measuring; this takes a few seconds.")
        probe = probes.measure(device, probes.default_dtypes(device))
        probes.store(probe)
    else:
        found = probes.stored(probes.device_name(device))
        if found is None:
            advice = "measure it for the time estimates of dry runs: shadowkv doctor --probe"
            return Check("probe", "note", "not measured yet", advice)
        probe = found
    return Check("probe", "ok", _describe(probe), values=probe.as_json())


def _describe(probe: Probe) -> str:
    parts = [f"memory read {probe.memory_read_gb_s:.3g} GB/s"]
    parts += [f"{dtype} {speed:.3g} TFLOP/s" for dtype, speed in probe.matmul_tflops.items()]
    if probe.h2d_gb_s and probe.d2h_gb_s:
        parts.append(f"to the GPU {probe.h2d_gb_s:.3g} GB/s, back {probe.d2h_gb_s:.3g} GB/s")
        gather = probe.zero_copy_gather_gb_s
        what = f"{gather:.3g} GB/s" if gather else f"not measured ({probe.zero_copy_reason})"
        parts.append(f"zero-copy gather {what}")
    return f"{', '.join(parts)} (measured {probe.measured})"
