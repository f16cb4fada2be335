"""One model, one store, many rows: prefill prompts once, then decode all rows as one batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from shadowkv_cli.config import MethodSpec, ShadowKVSpec
from shadowkv_cli.errors import ShadowKVError
from shadowkv_cli.methods import (
    Group,
    Prompt,
    PromptStore,
    RotaryTables,
    Row,
    as_index,
    build_groups,
)
from shadowkv_cli.model import exact_attention
from shadowkv_cli.model.forward import last_logits
from shadowkv_cli.model.loading import LoadedModel
from shadowkv_cli.model.patches import attached
from shadowkv_cli.model.rotary import compute_table, rotary_module

ROW_BUCKET = 8
Phase = Literal["prefill", "append", "decode"]


class MethodFailure(ShadowKVError):
    """Something failed in the rows of some methods; one of the `suspects` did it."""

    def __init__(self, suspects: Sequence[MethodSpec], reason: str) -> None:
        super().__init__(reason)
        self.suspects = list(dict.fromkeys(suspects))


@contextmanager
def _blaming(suspects: Sequence[MethodSpec]) -> Iterator[None]:
    """Turn what fails in the work of some methods into their `MethodFailure`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise MethodFailure(suspects, reason) from error


def _specs_of(group: Group, rows: Iterable[int]) -> list[MethodSpec]:
    return [group.rows[row].spec for row in rows]


def row_bucket(rows: int) -> int:
    """Rows that a batch is padded to: 8, 16, 24, …"""
    return math.ceil(rows / ROW_BUCKET) * ROW_BUCKET


class Session:
    """Rows of methods on prompts, with room for prompts of a length and answers of a length.

    Rows are ordered prompt by prompt: row p * len(specs) + s is method s on prompt p.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        specs: Sequence[MethodSpec],
        *,
        prompt_tokens: int,
        new_tokens: int,
        num_prompts: int = 1,
        backend: str = "auto",
        merge_cells: bool = True,
    ) -> None:
        self.loaded = loaded
        self.specs = list(specs)
        self.num_prompts = num_prompts
        self.new_tokens = new_tokens
        # The first answer token comes from the prefill, so it is appended with the second.
        self.store = PromptStore(
            loaded.shape,
            specs,
            num_prompts=num_prompts,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            dtype=loaded.dtype,
            device=loaded.device,
        )
        rows = [Row(spec, p) for p in range(num_prompts) for spec in specs]
        self.groups = build_groups(rows, self.store, new_tokens, merge_cells=merge_cells)
        self._holders: dict[int, tuple[Group, int]] = {}
        self._decode_all(self.groups)
        self.lengths = torch.zeros(num_prompts, dtype=torch.long, device=loaded.device)
        self.backend_asked, self.backend = backend, ""
        self.context_tokens = 0  # of the longest row, the token that is being run included
        self.phase: Phase = "decode"
        self.longest = 0  # prompt, in tokens
        self.used = 0  # places behind the prompts, of the row that has most
        self._prompt: Prompt | None = None  # the one that is being prefilled
        self._tables: dict[tuple[float, ...], int] = {}

    def focus(self, spec: MethodSpec) -> None:
        """Decode one cell alone from now on, unpadded; needs a session that merges no cells."""
        group = next(group for _, group in self.groups if group.rows[0].spec == spec)
        assert len(group.rows) == self.num_prompts, "the cells of this session are merged"
        self._decode_all([(list(range(self.num_prompts)), group)], padded=False)
        self.reset()

    def _decode_all(self, parts: Sequence[tuple[list[int], Group]], *, padded: bool = True) -> None:
        """Decode these groups after every `reset`, each with the rows of the session it holds."""
        self._all_parts, self._padded = list(parts), padded
        self._decode(self._all_parts)

    def _decode(self, parts: Sequence[tuple[list[int], Group]], *, in_order: bool = True) -> None:
        """Decode these groups from now on; the batch is their rows in order, or group by group."""
        self._parts = list(parts)
        prompts: dict[int, int] = {}
        for rows, group in parts:
            for index, row in enumerate(rows):
                self._holders[row] = (group, index)
                prompts[row] = group.rows[index].prompt_index
        self.batch = sorted(prompts) if in_order else list(prompts)
        place = {row: i for i, row in enumerate(self.batch)}
        device = self.loaded.device
        self.decoding = [([place[row] for row in rows], group) for rows, group in parts]
        self._row_places = [as_index(places, device) for places, _ in self.decoding]
        self.num_rows = len(self.batch)
        self.bucket = row_bucket(self.num_rows) if self._padded else self.num_rows
        self.row_prompt = torch.tensor([prompts[row] for row in self.batch], device=device)

    def _leave_out(self, open_rows: set[int]) -> None:
        """Go on without groups whose rows have all ended, and with half of those half ended."""
        parts: list[tuple[list[int], Group]] = []
        for rows, group in self._parts:
            still = [index for index, row in enumerate(rows) if row in open_rows]
            if len(still) > len(rows) // 2:
                parts.append((rows, group))
            elif still:
                parts.append(([rows[index] for index in still], group.subset(still)))
        if parts != self._parts:
            self._decode(parts, in_order=False)

    def set_prompt(self, prompt: Prompt) -> None:
        """Take note of a prompt's length, give it a rotary table, and let the methods get ready."""
        self.lengths[prompt.index] = prompt.tokens
        self.longest = max(self.longest, prompt.tokens) if self.num_prompts > 1 else prompt.tokens
        self.used = 0
        self._decode(self._all_parts)
        self._ensure_table(prompt)
        for _, group in self.groups:
            group.begin(prompt)

    def _ensure_table(self, prompt: Prompt) -> None:
        """Compute the prompt's table, or find the one that has the same frequencies."""
        total = self.store.prompt_tokens + self.new_tokens
        loaded = self.loaded
        cos, sin = compute_table(
            rotary_module(loaded.model), prompt.tokens, total, loaded.dtype, loaded.device
        )
        probe = tuple(torch.cat((cos[min(1, total - 1)], cos[-1], sin[-1])).tolist())
        tables = self.store.tables
        if tables is None or self.num_prompts == 1:
            index = torch.zeros(self.num_prompts, dtype=torch.int32, device=loaded.device)
            tables = RotaryTables(cos[None], sin[None], index, loaded.interleaved)
            self._tables = {probe: 0}
        elif probe not in self._tables:
            self._tables[probe] = tables.cos.shape[0]
            tables.cos = torch.cat((tables.cos, cos[None]))
            tables.sin = torch.cat((tables.sin, sin[None]))
        tables.index[prompt.index] = self._tables[probe]
        self.store.tables = tables

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [rows, tokens, D'] for the model, from the fixed tables."""
        tables = self.store.tables
        assert tables is not None
        if self.phase == "prefill":
            assert self._prompt is not None
            table = tables.index[self._prompt.index].long().expand(position_ids.shape[0])
        else:
            table = torch.zeros(position_ids.shape[0], dtype=torch.long, device=tables.cos.device)
            table[: self.num_rows] = tables.index[self.row_prompt].long()
        return tables.cos[table[:, None], position_ids], tables.sin[table[:, None], position_ids]

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Serve one layer: the whole prompt while prefilling, else new tokens of every row."""
        if self.phase != "prefill":
            return self._append_layer(layer, q, k, v, scale)
        assert self._prompt is not None
        out = exact_attention.attend(self.backend, q, k, v, scale)
        with _blaming([s for s in self.specs if isinstance(s, ShadowKVSpec)] or self.specs):
            self.store.add_layer(layer, self._prompt, k[0], v[0])
        for _, group in self.groups:
            with _blaming(_specs_of(group, range(len(group.rows)))):
                group.prefill_layer(layer, self._prompt, q[0], k[0], v[0])
        return out

    def _append_layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = torch.zeros_like(q)
        for index, (_, group) in zip(self._row_places, self.decoding, strict=True):
            with _blaming(_specs_of(group, range(len(group.rows)))):
                group.append(layer, k[index], v[index])
                out[index] = group.attend(layer, q[index], scale)
        return out

    def _forward(
        self, phase: Phase, ids: Tensor, positions: Tensor, before: int, keep: int = 1
    ) -> Tensor:
        """Logits of the last `keep` tokens of each row, float32 [rows, keep, V]."""
        self.phase, self.context_tokens = phase, before + ids.shape[1]
        return last_logits(self.loaded.model, self, ids, positions, before, keep)

    def choose_backend(self) -> None:
        """Find the exact attention of the prefill; the first time on a GPU takes a trial."""
        shape = self.loaded.shape
        heads = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
        self.backend = exact_attention.choose(
            self.backend_asked,
            self.loaded.device,
            self.loaded.dtype,
            heads,
            self.store.prompt_tokens,
        )

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], *, index: int = 0, key: str = "") -> Tensor:
        """Run a prompt once and let every method take it in; logits [V] of its last token."""
        self.choose_backend()
        prompt = Prompt(index, len(ids), key)
        self.set_prompt(prompt)
        self._prompt = prompt
        try:
            tokens = torch.tensor(list(ids), device=self.loaded.device)[None]
            positions = torch.arange(len(ids), device=self.loaded.device)[None]
            return self._forward("prefill", tokens, positions, 0)[0, 0]
        finally:
            self._prompt = None

    def decode_step(self, tokens: Tensor) -> Tensor:
        """Feed each row its last token: int64 [R] to logits [R, V]."""
        return self._run_rows("decode", tokens[:, None], None)

    def append(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Feed each row the tokens of a further turn, which see the prompt as its method has it.

        Args:
            tokens: int64 [R, T]; row r has counts[r] of them, then anything.
            counts: int32 [R], at least 1.

        Returns:
            Logits [R, V] of each row's last token.
        """
        return self._run_rows("append", tokens, counts)

    @torch.inference_mode()
    def _run_rows(self, phase: Phase, tokens: Tensor, counts: Tensor | None) -> Tensor:
        width, rows = tokens.shape[1], self.num_rows
        generated = torch.zeros(rows, dtype=torch.long, device=tokens.device)
        for index, (_, group) in zip(self._row_places, self.decoding, strict=True):
            generated[index] = group.generated.long()
            group.step(None if counts is None else counts[index])
        ids = torch.zeros(self.bucket, width, dtype=torch.long, device=tokens.device)
        ids[:rows] = tokens
        positions = torch.zeros_like(ids)
        ahead = torch.arange(width, device=tokens.device)
        if counts is not None:
            ahead = ahead.minimum(counts.long()[:, None] - 1)
        positions[:rows] = (self.lengths[self.row_prompt] + generated)[:, None] + ahead
        logits = self._forward(phase, ids, positions, self.longest + self.used, width)[:rows]
        self.used += width
        last = logits[:, 0] if counts is None else logits[range(rows), counts.long() - 1]
        finite = torch.isfinite(last).all(-1).tolist()
        for places, group in self.decoding:
            broken = [i for i, place in enumerate(places) if not finite[place]]
            if broken:
                raise MethodFailure(_specs_of(group, broken), "the logits are not finite")
        return last

    def reset(self) -> None:
        """Back to the end of the prefill."""
        self.used = 0
        self._decode(self._all_parts)
        for _, group in self.groups:
            group.reset()

    def generate(
        self, first: Tensor, max_new_tokens: Sequence[int], eos_ids: frozenset[int]
    ) -> list[list[int]]:
        """Decode greedily until every row has ended.

        On a CPU, rows that have ended are left out of the batch as it goes on (its products are
        then rounded differently, by float32's precision); on a GPU the batch keeps its shape.

        Args:
            first: int64 [R], the first answer token of each row, from the prefill.
            max_new_tokens: per row, at most the session's `new_tokens`.
            eos_ids: any of these ends an answer.

        Returns:
            The tokens of each row's answer, the one that ended it included.
        """
        answers: list[list[int]] = [[] for _ in range(self.num_rows)]
        open_rows = set(range(self.num_rows))
        tokens = first.tolist()
        shrinks = self.loaded.device.type == "cpu"
        with self.attached():
            while True:
                last = dict(zip(self.batch, tokens, strict=True))
                for row in open_rows & last.keys():
                    answers[row].append(last[row])
                    if last[row] in eos_ids or len(answers[row]) >= max_new_tokens[row]:
                        open_rows.discard(row)
                if not open_rows:
                    return answers
                if shrinks:
                    self._leave_out(open_rows)
                batch = [last[row] for row in self.batch]
                step = self.decode_step(torch.tensor(batch, device=first.device))
                tokens = step.argmax(-1).tolist()

    def attached(self) -> AbstractContextManager[None]:
        """Serve the model's attention for a while; every forward does so by itself, at a cost."""
        return attached(self.loaded.model, self)

    def audit(self, row: int, generated_tokens: int) -> dict[str, Any]:
        """The budget audit of a row, see `Group.audit`."""
        group, index = self._holders[row]
        return group.audit(index, generated_tokens)
