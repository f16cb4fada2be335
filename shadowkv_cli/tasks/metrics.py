"""Metrics by name: RULER's, which are recall of substrings (NVIDIA/RULER c3f5e3b), and others'."""

from __future__ import annotations

import re
from collections.abc import Callable

from shadowkv_cli.errors import unknown_name
from shadowkv_cli.tasks.longbench import metrics as longbench
from shadowkv_cli.tasks.longbench.packages import check_packages
from shadowkv_cli.tasks.rows import Sample
from shadowkv_cli.tasks.ruler import shadowkv_metrics

Metric = Callable[[str, Sample], float]
"""(prediction after postprocessing, sample) -> score in [0, 1]."""

METRICS: dict[str, Metric] = {}
POSTPROCESS: dict[str, Callable[[str], str]] = {}


def metric(name: str) -> Callable[[Metric], Metric]:
    """Register a metric under a name that rows may carry."""

    def register(function: Metric) -> Metric:
        assert name not in METRICS, f"metric {name} exists already"
        METRICS[name] = function
        return function

    return register


def postprocess(name: str) -> Callable[[Callable[[str], str]], Callable[[str], str]]:
    """Register a change of predictions that comes before the metric."""

    def register(function: Callable[[str], str]) -> Callable[[str], str]:
        assert name not in POSTPROCESS, f"postprocessing {name} exists already"
        POSTPROCESS[name] = function
        return function

    return register


def check_metric(sample: Sample) -> None:
    """Refuse a sample that cannot be scored.

    Raises UsageError for a metric or postprocessing that is not registered, ShadowKVError where a
    package that the metric needs is not installed.
    """
    where = f"of sample {sample.id}"
    if sample.metric not in METRICS:
        raise unknown_name("metric", sample.metric, METRICS, where)
    if sample.postprocess is not None and sample.postprocess not in POSTPROCESS:
        raise unknown_name("postprocessing", sample.postprocess, POSTPROCESS, where)
    if sample.metric in longbench.METRICS:
        check_packages(sample.metric)


def score(prediction: str, sample: Sample) -> float:
    """Score one prediction, from 0 to 1. Raises UsageError for a name that is not registered."""
    check_metric(sample)
    if sample.postprocess is not None:
        prediction = POSTPROCESS[sample.postprocess](prediction)
    return METRICS[sample.metric](prediction, sample)


@postprocess("ruler")
def replace_control_characters(prediction: str) -> str:
    """RULER's `postprocess_pred`: strip, control characters become newlines, strip."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


@metric("string_match_all")
def string_match_all(prediction: str, sample: Sample) -> float:
    """Share of the references that the prediction contains, ignoring case."""
    text = prediction.lower()
    return sum(ref.lower() in text for ref in sample.references) / len(sample.references)


@metric("string_match_part")
def string_match_part(prediction: str, sample: Sample) -> float:
    """1 if the prediction contains any of the references, ignoring case."""
    text = prediction.lower()
    return float(any(ref.lower() in text for ref in sample.references))


METRICS |= longbench.METRICS | shadowkv_metrics.METRICS
POSTPROCESS |= longbench.POSTPROCESS
