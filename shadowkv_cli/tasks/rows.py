"""A dataset on disk: `DIR/manifest.json` and `DIR/<context length>/<task>.jsonl`."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shadowkv_cli.errors import UsageError

MANIFEST_NAME = "manifest.json"
GROWING_FIELDS = frozenset(
    {
        "schema_version",
        "tasks",
        "context_lengths",
        "num_samples",
        "rows",
        "fill",
        "lost_middle",
        "sources",
        "synthetic",
        "comparable_with_published",
        "note",
    }
)
"""Manifest fields that a later build may extend; all others determine the rows."""


ANSWER_MARK = "$COT$"
"""Stands in the prompt of a second call for what the first one answered."""


@dataclass(frozen=True)
class SecondCall:
    """A question behind the answer to the first; its own answer is what is scored.

    Attributes:
        prompt: finished, with `ANSWER_MARK` in place of the first answer.
        prompt_tokens: tokens of the prompt, the mark included.
        max_new_tokens: tokens that may be generated.
    """

    prompt: str
    prompt_tokens: int
    max_new_tokens: int

    def text(self, answer: str) -> str:
        """What the model reads after that answer."""
        return self.prompt.replace(ANSWER_MARK, answer.strip())


@dataclass(frozen=True)
class Sample:
    """One prompt with its references.

    Attributes:
        id: unique in the dataset.
        task: name of the task.
        index: number of the sample in its task and context length, from 0.
        prompt: the text before the answer prefix, finished: chat template applied.
        answer_prefix: follows `prompt` directly; the model continues after it.
        references: expected answers.
        metric: a name in `metrics.METRICS`.
        length: tokens of prompt, answer prefix and `max_new_tokens`, without `uncounted_tokens`.
        prompt_tokens: tokens of prompt and answer prefix, special tokens included.
        max_new_tokens: tokens that may be generated.
        context_length: the limit that `length` was fitted to.
        question_start: character offset in `prompt` of the question behind the context.
        depths: where the needles of the asked keys stand, in percent of the context.
        stop: strings at which the answer ends.
        postprocess: a name in `metrics.POSTPROCESS`, applied before the metric.
        all_classes: the labels of a classification task.
        context_id: the same for samples that ask about the same context.
        groups: what the sample is also averaged by, such as its difficulty.
        gold_documents: numbers, from 1, of the documents that hold the answer.
        num_documents: how many documents the prompt has.
        middle_tokens_cut: tokens that the middle of the text lost; None if it is whole.
        second: the call that follows the first, of a chain of thought.
        uncounted_tokens: special tokens in front, which RULER's own fit does not count.
    """

    id: str
    task: str
    index: int
    prompt: str
    answer_prefix: str
    references: list[str]
    metric: str
    length: int
    prompt_tokens: int
    max_new_tokens: int
    context_length: int
    question_start: int
    depths: list[float] | None = None
    stop: list[str] | None = None
    postprocess: str | None = None
    all_classes: list[str] | None = None
    context_id: str | None = None
    groups: list[str] | None = None
    gold_documents: list[int] | None = None
    num_documents: int | None = None
    middle_tokens_cut: int | None = None
    second: SecondCall | None = None
    uncounted_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt or not self.references:
            raise ValueError("prompt and references must not be empty")
        whole = self.prompt_tokens + self.max_new_tokens
        if self.length + (self.uncounted_tokens or 0) != whole:
            raise ValueError("length must be prompt_tokens + max_new_tokens - uncounted_tokens")
        if self.length > self.context_length:
            raise ValueError(f"length {self.length} is above {self.context_length}")
        if not 0 <= self.question_start <= len(self.prompt):
            raise ValueError(f"question_start {self.question_start} lies outside the prompt")

    @property
    def room(self) -> int:
        """Tokens that prompt and answer take together, those of a second call if they are more."""
        first = self.prompt_tokens + self.max_new_tokens
        if self.second is None:
            return first
        again = self.second.prompt_tokens + self.second.max_new_tokens
        return max(first, again + self.max_new_tokens)

    @property
    def text(self) -> str:
        """What the model reads."""
        return self.prompt + self.answer_prefix

    def to_json(self) -> str:
        """One line without its newline; fields that are None are left out."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.second is not None:
            values["second"] = dataclasses.asdict(self.second)
        return json.dumps({k: v for k, v in values.items() if v is not None}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Sample:
        """Read one line. Raises ValueError that says what is wrong with it."""
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        fields = dataclasses.fields(cls)
        known = {f.name for f in fields}
        required = {f.name for f in fields if f.default is dataclasses.MISSING}
        if missing := sorted(required - values.keys()):
            raise ValueError(f"field '{missing[0]}' is missing")
        for name, kind in _FIELD_TYPES.items():
            if not isinstance(values[name], kind) or isinstance(values[name], bool):
                raise ValueError(f"field '{name}' is no {kind.__name__}")
        if not all(isinstance(reference, str) for reference in values["references"]):
            raise ValueError("field 'references' holds something that is no str")
        if values.get("second") is not None:
            values["second"] = SecondCall(**values["second"])
        return cls(**{k: v for k, v in values.items() if k in known})


_FIELD_TYPES: dict[str, type] = {
    **dict.fromkeys(("id", "task", "prompt", "answer_prefix", "metric"), str),
    **dict.fromkeys(
        (
            "index",
            "length",
            "prompt_tokens",
            "max_new_tokens",
            "context_length",
            "question_start",
        ),
        int,
    ),
    "references": list,
}


class Dataset:
    """A folder that `build-data` wrote."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """Read the manifest. Raises UsageError when the folder is no (complete) dataset."""
        path = Path(path)
        file = path / MANIFEST_NAME
        if not path.is_dir():
            raise UsageError(f"No data folder {path}: make one with `shadowkv build-data`.")
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(
                f"{path} holds no {MANIFEST_NAME}: make the data with `shadowkv build-data`."
            ) from None
        except ValueError as error:
            raise UsageError(
                f"{file} is not valid JSON ({error}): delete that folder and build the data again, "
                "or choose another."
            ) from None
        for field in ("context_lengths", "tasks"):
            if not isinstance(manifest, dict) or field not in manifest:
                raise UsageError(
                    f"{file} is not the manifest of a dataset (no field '{field}'): choose a "
                    "folder that `shadowkv build-data` wrote, or a new one."
                )
        return cls(path, manifest)

    @property
    def context_lengths(self) -> list[int]:
        """Lengths that the folder holds, ascending, in tokens."""
        return [int(length) for length in self.manifest["context_lengths"]]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that the folder holds, in the order of the suite."""
        return list(self.manifest["tasks"])

    def file(self, context_length: int, task: str) -> Path:
        """Where the rows of one task and length lie."""
        return self.path / str(context_length) / f"{task}.jsonl"

    def samples(self, context_length: int, task: str, limit: int | None = None) -> list[Sample]:
        """Read the (first `limit`) samples of one task and length; [] where none were built.

        Raises UsageError, naming file and line, for a row that cannot be read, and when the
        build was interrupted before all rows that are asked for were written.
        """
        file = self.file(context_length, task)
        samples: list[Sample] = []
        try:
            with file.open(encoding="utf-8", newline="\n") as lines:
                for number, line in enumerate(itertools.islice(lines, limit), start=1):
                    sample = _read_row(file, number, line)
                    if (sample.task, sample.context_length) != (task, context_length) or (
                        sample.index != number - 1
                    ):
                        raise UsageError(
                            f"{file} line {number} is not the row that belongs there (found sample "
                            f"{sample.id}): delete the file and build the data again."
                        )
                    samples.append(sample)
        except FileNotFoundError:
            pass
        except UnicodeDecodeError:
            raise UsageError(f"{file} is not valid UTF-8: build the data again.") from None
        planned = self.manifest.get("rows", {}).get(str(context_length), {}).get(task, 0)
        if len(samples) < (planned if limit is None else min(limit, planned)):
            raise UsageError(
                f"{file} holds {len(samples)} of {planned} samples, so its build was interrupted: "
                "run the same `shadowkv build-data` command again to continue it."
            )
        return samples

    def fingerprint(self) -> str:
        """Hash of what determines the rows; the same for a dataset that only grew."""
        identity = manifest_identity(self.manifest)
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def manifest_identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part of a manifest that must match for two builds to give the same rows.

    A tokenizer counts by what it does, a template by what it writes; names may differ.
    """
    identity = {k: v for k, v in manifest.items() if k not in GROWING_FIELDS}
    if isinstance(identity.get("tokenizer"), dict):
        identity["tokenizer"] = identity["tokenizer"].get("fingerprint")
    if isinstance(identity.get("template"), dict):
        identity["template"] = [identity["template"].get(k) for k in ("before", "after")]
    return identity


def _read_row(file: Path, number: int, line: str) -> Sample:
    if not line.endswith("\n"):
        raise UsageError(
            f"{file} line {number} is cut off: run the same `shadowkv build-data` command again, "
            "it repairs the line and continues."
        )
    try:
        return Sample.from_json(line)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{file} line {number} is not a valid row: {error}.") from None
