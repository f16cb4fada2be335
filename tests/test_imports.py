"""Imports go one way, and `shadowkv --help` loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "shadowkv_cli"
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "pandas", "scipy", "statsmodels")

BASE = (
    *("errors", "console", "config", "cells", "layout", "shared_bytes", "run_config"),
    *("environment", "host_memory"),
    "processes",
    *("rowlog", "stats", "results", "summary"),
)
LAYERS = (BASE, ("catalogue",), ("tasks", "ops"), ("methods",), ("model",), ("bench",))
RUNNER, COMMAND, ROOT = len(LAYERS), len(LAYERS) + 1, len(LAYERS) + 2
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
LAYER |= {"options": COMMAND, "option_groups": COMMAND, "commands": COMMAND}
LAYER |= {"cli": ROOT, "__main__": ROOT}
"""Level of each module or package; what is not listed is a runner, above `bench`."""

WITHOUT_MODELS = (
    *("tasks", "plots", "plotting", "tables", "frontier", "rescoring", "reporting"),
    *("averages", "activity", "length_averages", "paper_rows", "times"),
)
MODELS = {"ops", "methods", "model", "bench"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {f"shadowkv_cli.{module_name(path)}" for path in FILES}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, within functions too, for type checking not."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if not is_type_checking(node):
            todo.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else str(node.module))
    return {n.removeprefix("shadowkv_cli.") for n in found if n.startswith("shadowkv_cli.")}


IMPORTS = {module_name(path): imported(path) for path in FILES}


def level(module: str) -> int:
    return LAYER.get(module.partition(".")[0], RUNNER)


@pytest.mark.parametrize("module", [m for m in IMPORTS if m])
def test_imports_point_down(module: str) -> None:
    upward = sorted(name for name in IMPORTS[module] if level(name) > level(module))
    assert not upward, f"{module} imports {upward}, which stand above it"


def test_no_module_imports_itself_in_a_circle() -> None:
    try:
        tuple(TopologicalSorter(IMPORTS).static_order())
    except CycleError as error:
        pytest.fail(f"circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", [m for m in IMPORTS if m.partition(".")[0] in WITHOUT_MODELS])
def test_data_and_figures_know_no_models(module: str) -> None:
    wrong = sorted(n for n in IMPORTS[module] if n.partition(".")[0] in MODELS)
    assert not wrong, f"{module} imports {wrong}"


def test_config_needs_the_standard_library_only() -> None:
    assert IMPORTS["config"] <= {"errors"}
    assert not IMPORTS["errors"]


def heavy_modules(code: str) -> list[str]:
    """Heavy packages that are loaded after a piece of code in a fresh interpreter."""
    report = f"import sys; print(*(set({HEAVY}) & sys.modules.keys()), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{code}\n{report}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.split()


def test_help_loads_nothing_heavy() -> None:
    loaded = heavy_modules("from shadowkv_cli.cli import run; assert run(['--help']) == 0")
    assert not loaded, f"`shadowkv --help` imports {loaded}"


def test_help_of_every_command_loads_nothing_heavy() -> None:
    code = """
import typer
from shadowkv_cli.cli import app, run
for name in typer.main.get_command(app).commands:
    assert run([name, "--help"]) == 0, name
"""
    loaded = heavy_modules(code)
    assert not loaded, f"the help of a command imports {loaded}"
