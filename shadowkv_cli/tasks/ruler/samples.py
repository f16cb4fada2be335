"""One sample of one task, from its coordinates to its row."""

from __future__ import annotations

from shadowkv_cli.errors import UsageError
from shadowkv_cli.tasks.rows import Sample
from shadowkv_cli.tasks.ruler.common_words import CommonWordsDraw
from shadowkv_cli.tasks.ruler.definitions import TaskDefinition, definitions, sizes_of
from shadowkv_cli.tasks.ruler.draws import Draw, Rendered, Workbench
from shadowkv_cli.tasks.ruler.fit import Calibration, DoesNotFit, calibrate, check_smallest, fit
from shadowkv_cli.tasks.ruler.frequent_words import FrequentWordsDraw
from shadowkv_cli.tasks.ruler.needle_grid import GridDraw
from shadowkv_cli.tasks.ruler.niah import NeedleDraw
from shadowkv_cli.tasks.ruler.qa import DocumentsDraw
from shadowkv_cli.tasks.ruler.shadowkv_chain import ShadowkvChainDraw
from shadowkv_cli.tasks.ruler.variable_tracking import ChainDraw

FAMILIES: dict[str, type[Draw]] = {
    "niah": NeedleDraw,
    "needle_grid": GridDraw,
    "variable_tracking": ChainDraw,
    "common_words": CommonWordsDraw,
    "frequent_words": FrequentWordsDraw,
    "qa": DocumentsDraw,
}


ROOMY = 8
"""Above this many times the first sample's smallest size, the others' are not measured."""


def make_draw(bench: Workbench, task: str, context_length: int, index: int) -> Draw:
    """Draw sample `index` of a task; it depends on seed, task, length and index only."""
    definition = definitions(bench.variant.dialect)[task]
    family = FAMILIES[definition.family]
    if bench.variant.dialect == "shadowkv" and family is ChainDraw:
        family = ShadowkvChainDraw
    return family(bench, definition, context_length, index)


def prompt_limit(task: str, context_length: int) -> int:
    """Tokens left for the prompt."""
    return context_length - sizes_of(task).max_new_tokens


def calibrate_task(
    bench: Workbench, task: str, context_length: int, num_samples: int
) -> Calibration:
    """Measure sample 0, and check that the length can hold the others.

    Raises UsageError for a length that cannot.
    """
    limit = prompt_limit(task, context_length)
    index = 0
    try:
        calibration = calibrate(make_draw(bench, task, context_length, 0), limit)
        if calibration.smallest_tokens * ROOMY > limit:
            for index in range(1, num_samples):
                check_smallest(make_draw(bench, task, context_length, index), limit)
    except DoesNotFit as error:
        raise too_short(task, context_length, index, error) from None
    return calibration


def make_sample(
    bench: Workbench, task: str, context_length: int, index: int, calibration: Calibration
) -> Sample:
    """Make one row. Raises UsageError for a length that cannot hold the sample."""
    definition = definitions(bench.variant.dialect)[task]
    try:
        draw = make_draw(bench, task, context_length, index)
        fitted = fit(draw, prompt_limit(task, context_length), calibration)
    except DoesNotFit as error:
        raise too_short(task, context_length, index, error) from None
    return finished(definition, context_length, index, fitted.rendered, fitted.prompt_tokens)


def finished(
    task: TaskDefinition,
    context_length: int,
    index: int,
    rendered: Rendered,
    prompt_tokens: int,
    uncounted_tokens: int = 0,
) -> Sample:
    """The row of a rendered sample; `prompt_tokens` include those that are not counted."""
    return Sample(
        id=f"{task.name}-{context_length}-{index}",
        task=task.name,
        index=index,
        prompt=rendered.prompt,
        answer_prefix=rendered.answer_prefix,
        references=rendered.references,
        metric=task.metric,
        length=prompt_tokens - uncounted_tokens + task.max_new_tokens,
        prompt_tokens=prompt_tokens,
        max_new_tokens=task.max_new_tokens,
        context_length=context_length,
        question_start=rendered.question_start,
        depths=rendered.depths,
        gold_documents=rendered.gold_documents,
        num_documents=rendered.num_documents,
        postprocess="ruler" if task.metric.startswith("string_match") else None,
        uncounted_tokens=uncounted_tokens or None,
    )


def too_short(task: str, context_length: int, index: int, error: DoesNotFit) -> UsageError:
    """The error for a length that cannot hold a sample."""
    needed = error.tokens + sizes_of(task).max_new_tokens
    return UsageError(
        f"A context length of {context_length} cannot hold sample {index} of {task}, which needs "
        f"{needed} tokens at the least: use a longer one, or leave the task out with --tasks."
    )
