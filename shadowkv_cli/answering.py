"""Answer samples with every cell: a prefill each, all cells of all of them as one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shadowkv_cli.catalogue.shapes import PREFIX
from shadowkv_cli.config import FullSpec, MethodSpec, SparseSpec
from shadowkv_cli.console import notice
from shadowkv_cli.encoding import PromptEncoder
from shadowkv_cli.errors import ShadowKVError
from shadowkv_cli.run_config import ModelChoice
from shadowkv_cli.tasks.metrics import score
from shadowkv_cli.tasks.rows import Dataset, Sample, SecondCall
from shadowkv_cli.tasks.tokenization import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from shadowkv_cli.model.loading import LoadedModel
    from shadowkv_cli.model.session import Session

SECOND_STEP = 1024
"""Prompts of second calls share a session up to the next multiple of so many tokens."""
Row = dict[str, Any]
FULL = FullSpec()


def tokenizer_of(choice: ModelChoice) -> Any:
    """Load the model's tokenizer. Raises ShadowKVError with the way out where that fails."""
    return load_tokenizer(
        choice.name,
        revision=choice.revision,
        trust_remote_code=choice.trust_remote_code,
        offline=choice.offline,
    )


def reader_of(choice: ModelChoice, dataset: Dataset) -> ModelChoice:
    """Whose tokenizer reads the data: the model's own, for a shape the one that fitted them."""
    if not choice.name.startswith(PREFIX):
        return choice
    made_with = dataset.manifest["tokenizer"]
    return replace(choice, name=made_with["name"], revision=made_with.get("revision"))


def until(text: str, stop: str) -> str:
    """A text up to a string at which it ends; those at its very start do not end it."""
    begin = 0
    while stop and text.startswith(stop, begin):
        begin += len(stop)
    end = text.find(stop, begin) if stop else -1
    return text if end < 0 else text[:end]


@dataclass(frozen=True)
class Question:
    """A sample, the cells that are to answer it, and the number of its first prefill."""

    sample: Sample
    cells: Sequence[MethodSpec]
    first_pass: int

    @property
    def layout(self) -> tuple[object, ...]:
        """Equal for questions that one batch can answer; a sample with a second call is alone."""
        tokens = self.sample.prompt_tokens
        dense = tuple(spec.is_dense(tokens) for spec in self.cells)
        alone = self.sample.id if self.sample.second is not None else None
        return self.sample.context_length, tuple(self.cells), dense, alone


class Answerer:
    """Answers samples; keeps the last session, since samples of one length can share it.

    Attributes:
        room: tokens that any answer may take, so that tasks of one length share a session.
        scores: whether answers mean anything; without, times and memory are all that rows have.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: Any,
        *,
        backend: str,
        room: int,
        tokenizer_mismatch: bool = False,
        reuse_prefix: bool = False,
    ) -> None:
        self.loaded = loaded
        self.encoder = PromptEncoder(tokenizer)
        self.scores = not loaded.random_weights
        self.backend = backend
        self.room = room
        self.tokenizer_mismatch = tokenizer_mismatch
        self.reuse_prefix = reuse_prefix
        self.backends_used: dict[str, float | None] = {}  # and the TFLOP/s of their trials
        self._key: tuple[object, ...] = ()
        self._session: Session | None = None
        self._one_by_one = False  # memory did not suffice for more

    def _session_for(
        self, specs: Sequence[MethodSpec], prompt_tokens: int, num_prompts: int = 1
    ) -> Session:
        from shadowkv_cli.model.session import Session

        key = (*specs, prompt_tokens, num_prompts)
        if self._session is None or key != self._key:
            self._session = None  # free the old one first
            self._session = Session(
                self.loaded,
                specs,
                prompt_tokens=prompt_tokens,
                new_tokens=self.room,
                num_prompts=num_prompts,
                backend=self.backend,
                reuse_prefix=self.reuse_prefix,
            )
            self._key = key
        return self._session

    def answer_together(self, questions: Sequence[Question]) -> list[list[Row]]:
        """Answer questions of one layout: a prefill each, then all are decoded as one batch.

        Where that fails for want of memory, or by a method, each is answered alone.

        Returns:
            The rows of each, see `answer`.

        Raises:
            ShadowKVError: full attention itself fails.
        """
        from shadowkv_cli.model.failures import MethodFailure, is_out_of_memory

        together = len(questions) > 1 and not self._one_by_one
        encoded = [self._encoded(q.sample) for q in questions] if together else []
        # Other tokens than the data say may be dense for other cells.
        dense = {tuple(s.is_dense(len(ids)) for s in questions[0].cells) for ids in encoded}
        if len(dense) == 1:
            try:
                return self._side_by_side(questions, encoded, questions[0].cells)
            except (MethodFailure, MemoryError, RuntimeError) as error:
                full = is_out_of_memory(error)
                if not full and not isinstance(error, MethodFailure):
                    raise
            self._let_go()
            if full:
                notice(f"Out of memory with {len(questions)} samples: from here on one by one.")
                self._one_by_one = True
        return [self.answer(q.sample, q.cells, q.first_pass) for q in questions]

    def _encoded(self, sample: Sample) -> list[int]:
        ids = self.encoder.ids(sample.text)
        if len(ids) != sample.prompt_tokens and not self.tokenizer_mismatch:
            raise ShadowKVError(
                f"{sample.id} has {len(ids)} tokens but its row says {sample.prompt_tokens}: "
                "build the data again with this version of the tokenizer."
            )
        return ids

    def answer(self, sample: Sample, specs: Sequence[MethodSpec], first_pass: int) -> list[Row]:
        """Decode every cell and score it.

        A cell that fails gets a row with its error, and the sample runs again without it. Where it
        is not clear which of several cells failed, each runs in a pass of its own beside full
        attention, if that was asked for. Where memory does not suffice, full attention and the
        others run one after the other; what does not fit then either gets rows that say so.

        Args:
            first_pass: number of the first prefill.

        Returns:
            One row a cell, and rows of full attention of further passes, their pairs.

        Raises:
            ShadowKVError: full attention itself fails.
        """
        from shadowkv_cli.model.failures import MethodFailure, is_out_of_memory, one_line

        ids = self._encoded(sample)
        waiting, rows, number, told = [list(specs)], [], first_pass, False
        while waiting:
            batch = waiting.pop(0)
            try:
                rows += self._one_pass(sample, ids, batch, number)
                number += 1
                continue
            except (MethodFailure, MemoryError, RuntimeError) as error:
                full, reason = is_out_of_memory(error), one_line(error)
                suspects = error.suspects if isinstance(error, MethodFailure) else []
                if not full and not suspects:
                    raise
            if full:  # only here, when the error has gone, can its tensors go
                self._let_go()
                if not told:
                    notice(f"Out of memory on {sample.id}: what does not fit is recorded.")
                told, others = True, [spec for spec in batch if spec != FULL]
                if FULL in batch and others:
                    waiting[:0] = [[FULL], others]
                else:
                    rows += [self._failed_row(sample, spec, number, reason) for spec in batch]
                continue
            if FULL in suspects:
                raise ShadowKVError(f"Full attention failed on {sample.id}: {reason}")
            others = [spec for spec in batch if spec not in suspects]
            pair = [FULL] if FULL in batch else []
            if len(suspects) == 1:
                rows.append(self._failed_row(sample, suspects[0], number, reason))
            else:
                waiting += [[*pair, suspect] for suspect in suspects]
            if others and others != pair:
                waiting.insert(0, others)
        return rows

    def _let_go(self) -> None:
        """Give back all memory beside the model's."""
        from shadowkv_cli.bench.memory import release_memory

        self._session, self._key = None, ()
        release_memory()  # a session and its graphs know each other

    def _one_pass(
        self, sample: Sample, ids: list[int], specs: Sequence[MethodSpec], number: int
    ) -> list[Row]:
        """One prefill for all specs, and for each a second of its own where the sample has one."""
        (rows,) = self._side_by_side([Question(sample, specs, number)], [ids], specs)
        if sample.second is None or not self.scores:
            return rows
        pairs = zip(rows, specs, strict=True)
        return [self._second_call(sample, sample.second, row, spec) for row, spec in pairs]

    def _second_call(self, sample: Sample, second: SecondCall, row: Row, spec: MethodSpec) -> Row:
        """Ask behind a cell's own first answer, and score that; the audit stays the first's."""
        ids = self.encoder.ids(second.text(row["prediction"]))
        dense = isinstance(spec, SparseSpec) and spec.is_dense(len(ids))
        batch = [FULL if dense else spec]
        session = self._session_for(batch, -(-len(ids) // SECOND_STEP) * SECOND_STEP)
        session.choose_backend()
        started = time.perf_counter()
        first = session.prefill(ids, key=f"{sample.id} {spec.cell}").argmax(-1).expand(1)
        reused = session.reused_tokens
        (answer,) = session.generate(first, [second.max_new_tokens], self.loaded.eos_ids)
        scored = self._scored(sample, answer)
        return (
            row
            | scored
            | {
                "reasoning": row["prediction"],
                "generated_tokens": row["generated_tokens"] + scored["generated_tokens"],
                "second_prompt_tokens": len(ids),
                "second_reused_tokens": reused,
                "second_dense_fallback": dense,
                "second_s": round(time.perf_counter() - started, 6),
            }
        )

    def _side_by_side(
        self,
        questions: Sequence[Question],
        encoded: Sequence[list[int]],
        specs: Sequence[MethodSpec],
    ) -> list[list[Row]]:
        """Prefill each once and decode all specs; those that are dense here share one row."""
        from shadowkv_cli.bench.memory import PeakMemory, allowed_bytes

        longest = max(map(len, encoded))
        active = [spec for spec in specs if not spec.is_dense(longest)]
        batch = active if len(active) == len(specs) else [FULL, *active]
        room = max(longest, *(q.sample.context_length for q in questions))
        session = self._session_for(batch, room, len(questions))
        session.choose_backend()
        peak = PeakMemory(self.loaded.device)
        peak.restart()
        first, prefill_s, reused = [], [], []
        for index, (question, ids) in enumerate(zip(questions, encoded, strict=True)):
            started = time.perf_counter()
            logits = session.prefill(ids, index=index, key=question.sample.id)
            first += [int(logits.argmax(-1))] * len(batch)  # waits for the device
            prefill_s.append(time.perf_counter() - started)
            reused.append(session.reused_tokens)
        bucket = session.batch.bucket  # before rows that have ended are left out
        started, prefill_bytes = time.perf_counter(), peak.read()
        limits = [q.sample.max_new_tokens for q in questions for _ in batch]
        answers = session.generate(self._tokens(first), limits, self.loaded.eos_ids)
        decode_s = time.perf_counter() - started
        self.backends_used[session.backend] = session.attention_tflops
        assert all(answer[0] == token for answer, token in zip(answers, first, strict=True))
        measured: Row = {
            "row_bucket": bucket,
            "samples_together": len(questions),
            "attention_backend": session.backend,
            "decode_s": round(decode_s, 6),
            "decode_steps": max(map(len, answers)) - 1,
            "peak_memory_bytes": peak.read() or None,
        }
        if self.loaded.device.type == "cuda":
            allowed = allowed_bytes(self.loaded, longest, session.held_bytes)
            measured |= {
                "prefill_peak_bytes": prefill_bytes,
                "prefill_allowed_bytes": allowed.total,
            }
        found = []
        for index, (question, ids) in enumerate(zip(questions, encoded, strict=True)):
            rows = []
            for spec in specs:
                dense = spec.is_dense(len(ids))
                place = index * len(batch) + batch.index(FULL if dense else spec)
                audit = session.audit(place, len(answers[place]) - 1)
                own = {
                    "prompt_tokens": len(ids),
                    "reused_tokens": reused[index],
                    "hit_rate": audit.pop("hit_rate"),
                    "audit": audit,
                    "prefill_s": round(prefill_s[index], 6),
                }
                row = self._row(question.sample, spec, question.first_pass, len(ids))
                rows.append(row | self._scored(question.sample, answers[place]) | measured | own)
            found.append(rows)
        return found

    def _tokens(self, ids: list[int]) -> Tensor:
        import torch

        return torch.tensor(ids, device=self.loaded.device)

    def _row(self, sample: Sample, spec: MethodSpec, number: int, prompt_tokens: int) -> Row:
        """What is known of a cell on a sample before it is decoded."""
        sparse = isinstance(spec, SparseSpec)
        kept = spec.keeps(prompt_tokens) if isinstance(spec, SparseSpec) else None
        held = spec.cache_bytes(self.loaded.shape, prompt_tokens, sample.max_new_tokens)
        depths = sample.depths or []
        return {
            "id": sample.id,
            "task": sample.task,
            "context_length": sample.context_length,
            "method": spec.name,
            "cell": spec.cell,
            "settings": spec.settings(),
            "sparse_budget_tokens": kept.selected_tokens if kept else None,
            "outlier_tokens": kept.outlier_tokens if kept else None,
            "pass": number,
            "metric": sample.metric,
            "num_references": len(sample.references),
            "dense_fallback": sparse and spec.is_dense(prompt_tokens),
            "gpu_bytes": held.device,
            "host_bytes": held.host,
            "depth": depths[0] if len(depths) == 1 else None,
            "groups": sample.groups,
            "gold_documents": sample.gold_documents,
            "num_documents": sample.num_documents,
            "tokenizer_mismatch": self.tokenizer_mismatch,
            "error": None,
        }

    def _scored(self, sample: Sample, answer: list[int]) -> Row:
        """Text and score of an answer's tokens; neither, where they mean nothing."""
        ended = answer[-1] in self.loaded.eos_ids
        counted = {"generated_tokens": len(answer), "finish": "eos" if ended else "length"}
        if not self.scores:
            return {"prediction": None, "score": None} | counted
        text = self.encoder.decode(answer[:-1] if ended else answer)
        for stop in sample.stop or []:
            text = until(text, stop)
        return {"prediction": text, "score": score(text, sample)} | counted

    def _failed_row(self, sample: Sample, spec: MethodSpec, number: int, reason: str) -> Row:
        nothing = ("prediction", "score", "generated_tokens", "finish", "audit", "hit_rate")
        row = self._row(sample, spec, number, sample.prompt_tokens)
        return row | dict.fromkeys(nothing) | {"error": reason}
