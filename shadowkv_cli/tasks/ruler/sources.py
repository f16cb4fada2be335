"""Where essays and questions come from: the hub, local files, or the project's own texts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.tasks.hub import hub_access
from shadowkv_cli.tasks.ruler.definitions import sizes_of
from shadowkv_cli.tasks.ruler.essay import Essay
from shadowkv_cli.tasks.ruler.qa_corpus import (
    LoadedQA,
    QACorpus,
    hotpotqa_corpus,
    read_hotpotqa_file,
    read_squad_file,
    squad_corpus,
)
from shadowkv_cli.tasks.ruler.sentences import available_splitter, split_sentences
from shadowkv_cli.tasks.ruler.synthetic_prose import PROSE_VERSION
from shadowkv_cli.tasks.ruler.synthetic_qa import SyntheticQA

SourceKind = Literal["hub", "synthetic"]
ESSAYS_HUB = "baber/paul_graham_essays"
SQUAD_HUB = "rajpurkar/squad_v2"
HOTPOTQA_HUB = "hotpotqa/hotpot_qa"
HOTPOTQA_REVISION = "1908d6afbbead072334abe2965f91bd2709910ab"
OPTIONS = {"essay": "--essays", "squad": "--squad", "hotpotqa": "--hotpotqa"}


@dataclass
class Sources:
    """The texts of one dataset.

    Attributes:
        essay_sentences: the corpus split into sentences; None for the synthetic prose.
        loaded_qa: corpora that were read, by name; the others are synthetic.
        manifest: what the manifest says about them, by name: `name`, `sha256`, `synthetic`.
        sentence_splitter: what split the essays.
        essay_text: the corpus as it was read, white space squeezed; None for synthetic prose.
        english_words: RULER's list for lists beyond the word pool; None where none was given.
    """

    essay_sentences: tuple[str, ...] | None
    loaded_qa: dict[str, LoadedQA]
    manifest: dict[str, dict[str, Any]]
    sentence_splitter: str | None
    essay_text: str | None = None
    english_words: tuple[str, ...] | None = None

    @cached_property
    def essay(self) -> Essay:
        return Essay(self.essay_sentences)

    @cached_property
    def _synthetic_qa(self) -> dict[str, SyntheticQA]:
        return {"squad": SyntheticQA(bridging=False), "hotpotqa": SyntheticQA(bridging=True)}

    def qa(self, name: str) -> QACorpus:
        """The questions called `squad` or `hotpotqa`."""
        return self.loaded_qa.get(name) or self._synthetic_qa[name]

    def __getstate__(self) -> dict[str, Any]:
        """Without what was computed, so that it travels to other processes."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: self.__dict__[name] for name in names}


def needed_sources(tasks: Iterable[str]) -> set[str]:
    """Which of `essay`, `squad` and `hotpotqa` the tasks read."""
    needed = set()
    for name in tasks:
        settings = sizes_of(name).settings
        if settings.get("haystack") == "essay":
            needed.add("essay")
        if "dataset" in settings:
            needed.add(settings["dataset"])
    return needed


def source_choice(
    kind: SourceKind, essays: Path | None, squad: Path | None, hotpotqa: Path | None
) -> dict[str, str]:
    """Where each source would come from, by name, whether or not a task needs it.

    A file is named by its content. Raises UsageError if it cannot be read.
    """
    files = {"haystack": essays, "squad": squad, "hotpotqa": hotpotqa}
    return {
        name: kind if file is None else f"file {hashlib.sha256(read_bytes(file)).hexdigest()}"
        for name, file in files.items()
    }


def read_bytes(file: Path) -> bytes:
    """Read a file that the user named. Raises UsageError with the reason."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read {file}: {error.strerror}.") from None


def load_sources(
    tasks: Iterable[str],
    kind: SourceKind,
    *,
    essays: Path | None = None,
    squad: Path | None = None,
    hotpotqa: Path | None = None,
    offline: bool = False,
) -> Sources:
    """Load what the tasks need. A file wins over `kind`.

    Raises UsageError for a file that cannot be read, ShadowKVError where the hub cannot be reached.
    """
    needed = needed_sources(tasks)
    result = Sources(None, {}, {}, None)
    if "essay" in needed:
        _load_essay(result, kind, essays, offline)
    if "squad" in needed:
        _load_qa(result, "squad", kind, squad, offline)
    if "hotpotqa" in needed:
        _load_qa(result, "hotpotqa", kind, hotpotqa, offline)
    return result


def load_english_words(result: Sources, file: Path) -> None:
    """Read RULER's json/english_words.json. Raises UsageError if it is none."""
    content = read_bytes(file)
    try:
        words = tuple(json.loads(content).values())
    except (ValueError, AttributeError):
        pointer = " (it is a Git LFS pointer)" if content.startswith(b"version https") else ""
        raise UsageError(f"{file} is not RULER's json/english_words.json{pointer}.") from None
    if not words or not all(isinstance(word, str) for word in words):
        raise UsageError(f"{file} is not RULER's json/english_words.json.")
    result.english_words = words
    digest = hashlib.sha256(content).hexdigest()
    result.manifest["english_words"] = _entry(file.name, digest)


def _load_essay(result: Sources, kind: SourceKind, file: Path | None, offline: bool) -> None:
    if file is None and kind == "synthetic":
        digest = result.essay.digest()
        result.manifest["haystack"] = _entry(PROSE_VERSION, digest, synthetic=True)
        return
    if file is not None:
        name, text = file.name, _read_essays(file)
    else:
        rows = _load_hub("essay", ESSAYS_HUB, split="train", offline=offline)
        name, text = ESSAYS_HUB, " ".join(row["text"] for row in rows)
    result.essay_text = re.sub(r"\s+", " ", text)
    text = result.essay_text.strip()
    if not text:
        raise UsageError(f"{name} holds no text for --essays.")
    result.sentence_splitter = available_splitter()
    result.essay_sentences = tuple(split_sentences(text, result.sentence_splitter))
    result.manifest["haystack"] = _entry(name, hashlib.sha256(text.encode()).hexdigest())


def _load_qa(
    result: Sources, which: str, kind: SourceKind, file: Path | None, offline: bool
) -> None:
    if file is None and kind == "synthetic":
        corpus: QACorpus = result.qa(which)
        texts = [corpus.document(i) for i in range(0, corpus.num_documents, 997)]
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        result.manifest[which] = _entry(corpus.name, digest, synthetic=True)
        return
    if file is not None:
        loaded = read_squad_file(file) if which == "squad" else read_hotpotqa_file(file)
    elif which == "squad":
        rows = _load_hub(which, SQUAD_HUB, split="validation", offline=offline)
        loaded = squad_corpus(
            SQUAD_HUB, ({**row, "answers": row["answers"]["text"]} for row in rows)
        )
    else:
        rows = _load_hub(
            which,
            HOTPOTQA_HUB,
            "distractor",
            split="validation",
            revision=HOTPOTQA_REVISION,
            offline=offline,
        )
        loaded = hotpotqa_corpus(
            HOTPOTQA_HUB,
            (
                {
                    **row,
                    "context": zip(
                        row["context"]["title"], row["context"]["sentences"], strict=True
                    ),
                    "supporting_facts": zip(*_supporting_facts(row), strict=True),
                }
                for row in rows
            ),
        )
    # Without what a row does not depend on.
    items = [{k: v for k, v in vars(item).items() if k != "gold"} for item in loaded.items]
    content = json.dumps([loaded.documents, items])
    digest = hashlib.sha256(content.encode()).hexdigest()
    result.loaded_qa[which] = loaded
    result.manifest[which] = _entry(loaded.name, digest)


def _supporting_facts(row: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    facts = row.get("supporting_facts") or {"title": [], "sent_id": []}
    return facts["title"], facts["sent_id"]


def _entry(name: str, sha256: str, *, synthetic: bool = False) -> dict[str, Any]:
    return {"name": name, "sha256": sha256, "synthetic": synthetic}


def _read_essays(file: Path) -> str:
    """Read plain text, or RULER's PaulGrahamEssays.json ({"text": ...})."""
    try:
        content = read_bytes(file).decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{file} is not UTF-8 text.") from None
    if file.suffix != ".json":
        return content
    try:
        return str(json.loads(content)["text"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{file} is not JSON with a field 'text'.") from None


def _load_hub(
    which: str,
    name: str,
    *config: str,
    split: str,
    offline: bool,
    revision: str | None = None,
) -> Any:
    """Load one split of a hub dataset; a hub that cannot be reached is one clear error."""
    # mypy sees the repository's folder of the same name.
    from datasets import load_dataset  # type: ignore[attr-defined]
    from datasets.exceptions import DatasetsError

    way_out = f"give a local file with {OPTIONS[which]}, or use --sources synthetic (no network)"
    with hub_access(offline) as reachable:
        try:
            return load_dataset(name, *config, split=split, revision=revision)
        except (OSError, RuntimeError, ValueError, DatasetsError) as error:
            reason = " ".join(str(error).split())[:160]
            if not reachable:
                reason = "the hub cannot be asked, and there is no copy on this machine"
            raise ShadowKVError(f"Cannot load {name} ({reason}): {way_out}.") from error
