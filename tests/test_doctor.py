"""`shadowkv doctor`: what is here, what is missing, and the exit code."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from shadowkv_cli import diagnosis, environment
from shadowkv_cli.bench import probes
from shadowkv_cli.commands import doctor as command
from shadowkv_cli.errors import UsageError
from shadowkv_cli.ops import compiled

app = typer.Typer()
app.command()(command.doctor)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def report(*arguments: str) -> tuple[int, dict[str, dict[str, str]], list[str]]:
    """Exit code, checks by name, and what is missing."""
    result = CliRunner().invoke(app, ["--json", "--offline", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    found = json.loads(result.stdout)
    assert found["schema_version"] == 1
    return result.exit_code, {check["name"]: check for check in found["checks"]}, found["missing"]


def test_everything_is_looked_at() -> None:
    code, checks, missing = report()
    assert code == 0, missing
    assert checks["torch"]["found"] == torch.__version__
    assert {check["state"] for check in checks.values()} <= {"ok", "note"}
    expected = {"Python", "torch", "transformers", "GPU", "attention", "probe", "kernels", "memory"}
    assert expected | {"disk", "cache folder", "hub", "nltk punkt"} == checks.keys()


def test_lines_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "ABSENT", "not built")
    result = CliRunner().invoke(app, ["--offline"])
    assert result.exit_code == 0
    assert "torch ops are used" in result.stdout
    assert "-> measure it" in result.stdout


def test_what_is_required_and_missing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "ABSENT", "not built")
    assert report("--require", "kernels")[0] == 1
    assert "make kernels" in report()[1]["kernels"]["advice"]
    code, _, missing = report("--require", "kernels,hub")
    assert (code, missing) == (1, ["kernels", "hub"])


def test_a_gpu_that_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, checks, missing = report("--require", "cuda")
    assert (code, missing) == (1, ["cuda"])
    assert checks["attention"]["found"].endswith("on cpu")


def test_a_cpu_build_beside_a_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(environment, "driver_version", lambda: "580.95.05")
    check = report()[1]["GPU"]
    assert "580.95.05" in check["found"]
    assert "CUDA build" in check["advice"]


def test_kernels_that_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "ABSENT", "")
    code, checks, _ = report("--require", "kernels")
    assert (code, checks["kernels"]["state"]) == (0, "ok")


def test_an_unknown_requirement_says_what_was_meant() -> None:
    result = CliRunner().invoke(app, ["--require", "cudo"])
    assert isinstance(result.exception, UsageError)
    assert "Did you mean 'cuda'?" in str(result.exception)


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_a_package_that_is_too_old_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = diagnosis._version
    monkeypatch.setattr(diagnosis, "_version", lambda n: "0.1" if n == name else real(n))
    code, checks, missing = report()
    assert (code, missing) == (1, [name])
    assert "too old" in checks[name]["found"]
    assert checks[name]["advice"].startswith("pip install")


def test_a_package_that_is_missing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = diagnosis._version
    monkeypatch.setattr(diagnosis, "_version", lambda n: None if n == "scipy" else real(n))
    code, checks, _ = report()
    assert (code, checks["scipy"]["found"]) == (1, "not installed")


def test_probe_is_measured_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(probes, "CPU_READ_BYTES", 2**20)
    monkeypatch.setattr(probes, "REPEATS", 1)
    assert report()[1]["probe"]["state"] == "note"
    measured = report("--probe")[1]["probe"]
    assert measured["state"] == "ok"
    assert report()[1]["probe"] == measured


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file in the folder's place")
    code, checks, _ = report()
    assert (code, checks["cache folder"]["state"]) == (0, "note")
    assert "XDG_CACHE_HOME" in checks["cache folder"]["advice"]


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def test_a_hub_that_refuses(no_proxy: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert "refused" in diagnosis._hub_failure(f"http://127.0.0.1:{port}").lower()


def test_a_hub_that_says_no_is_in_reach(no_proxy: None) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Forbidden(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Forbidden)
    Thread(target=server.handle_request, daemon=True).start()
    try:
        assert diagnosis._hub_failure(f"http://127.0.0.1:{server.server_port}") == ""
    finally:
        server.server_close()


def test_a_hub_that_hangs(no_proxy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "HUB_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert diagnosis._hub_failure(f"http://127.0.0.1:{port}")


def test_it_runs_from_a_folder_that_is_not_installed(monkeypatch) -> None:
    from importlib import metadata

    def missing(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", missing)
    check = diagnosis._packages()[0]
    assert check.state == "note"
    assert "pip install" in check.advice
