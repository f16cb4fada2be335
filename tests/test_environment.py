"""What a manifest says of the machine: enough to repeat a run, nothing private."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import pytest

from shadowkv_cli import environment
from shadowkv_cli.ops import compiled


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, timeout=30)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    package = tmp_path / "project" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(tmp_path / "project", "init", "-q")
    git(tmp_path / "project", "add", ".")
    git(tmp_path / "project", "commit", "-q", "-m", "first")
    return package


def test_capture_names_what_results_depend_on() -> None:
    found = environment.capture()
    assert found["python"] == platform.python_version()
    assert {"shadowkv-cli", "torch", "transformers", "numpy"} <= found["versions"].keys()
    assert found["cpu"]["cores"] >= 1
    assert found["memory_bytes"] > 1e8


def test_capture_is_stable_and_json() -> None:
    first = environment.capture("cpu")
    assert json.loads(json.dumps(first)) == environment.capture("cpu")
    assert first["device"] == "cpu"
    assert first["gpu"] is None


@pytest.mark.parametrize(
    ("absent", "ops"), [("", "compiled"), ("not built", "torch"), ("built, but (path)", "torch")]
)
def test_capture_names_what_serves_the_ops_of_a_gpu(
    absent: str, ops: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert environment.capture("cpu")["kernels"] is None
    (tmp_path / "library.so").write_bytes(b"code")
    monkeypatch.setattr(environment, "gpu_facts", lambda device: {"name": "a GPU"})
    monkeypatch.setattr(compiled, "ABSENT", absent)
    monkeypatch.setattr(compiled, "LIBRARY", tmp_path / "library.so")
    found = environment.capture("cuda")["kernels"]
    assert found["ops"] == ops
    assert "path" not in json.dumps(found)


def test_capture_holds_nothing_private() -> None:
    text = json.dumps(environment.capture())
    private = [str(Path.home()), str(Path.cwd()), str(environment.PACKAGE_DIR), os.sep + "tmp"]
    for secret in private:
        assert secret == os.sep or secret not in text, secret
    words = text.replace('"', " ").replace(",", " ").split()
    assert platform.node() not in words


def test_git_state_of_a_clean_and_a_changed_checkout(checkout: Path) -> None:
    clean = environment.git_state(checkout)
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (checkout.parent / "notes.txt").write_text("beside the package")
    assert environment.git_state(checkout) == clean
    (checkout / "new.py").write_text("a = 1\n")
    assert environment.git_state(checkout) == {**clean, "dirty": True}


def test_a_package_inside_a_foreign_checkout_has_no_state(checkout: Path) -> None:
    installed = checkout.parent / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert environment.git_state(installed) is None


def test_git_state_outside_of_any_checkout(tmp_path: Path) -> None:
    assert environment.git_state(tmp_path) is None


def test_git_state_within_a_hook(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = environment.git_state(checkout)
    monkeypatch.setenv("GIT_DIR", "/nowhere/.git")
    assert environment.git_state(checkout) == expected


def test_without_git_there_is_no_state(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment.git_state(checkout) is None


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environment.cache_dir() == tmp_path / "shadowkv"
    for ignored in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert environment.cache_dir() == Path.home() / ".cache" / "shadowkv", ignored
