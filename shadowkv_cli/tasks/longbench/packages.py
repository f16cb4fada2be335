"""The two packages that define LongBench's scores: jieba and rouge, imported when needed."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

from shadowkv_cli.errors import ShadowKVError


def _missing(package: str, what: str) -> ShadowKVError:
    return ShadowKVError(f"{what} needs the package {package}: pip install {package}")


@cache
def check_packages(metric: str) -> None:
    """Raise ShadowKVError where a package that a metric needs is not installed."""
    needed = {"jieba": "_zh" in metric, "rouge": "rouge" in metric}
    for package, wanted in needed.items():
        if wanted and find_spec(package) is None:
            raise _missing(package, f"The metric {metric}")


@cache
def _jieba() -> Any:
    try:
        import jieba
    except ImportError:
        raise _missing("jieba", "Scoring LongBench's Chinese sets") from None
    jieba.setLogLevel(logging.WARNING)  # it reports on stderr that it loads its dictionary
    return jieba


def segment(text: str) -> list[str]:
    """Words of a Chinese text. Raises ShadowKVError where jieba is not installed."""
    return list(_jieba().cut(text, cut_all=False))


@cache
def rouge_scorer() -> Any:
    """The package's scorer for ROUGE-L. Raises ShadowKVError where rouge is not installed."""
    try:
        from rouge import Rouge
    except ImportError:
        raise _missing("rouge", "Scoring LongBench's summaries") from None
    return Rouge(metrics=["rouge-l"])
