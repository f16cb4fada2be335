"""Data files of the benchmarks that lie in this package."""

from __future__ import annotations

from importlib.resources import files
from typing import Any


def read_yaml(path: str) -> Any:
    """Read a file by its path from `tasks/`, like `ruler/tasks.yaml`."""
    import yaml

    return yaml.safe_load((files(__package__) / path).read_text(encoding="utf-8"))
