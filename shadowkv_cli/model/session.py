"""One model, one store, many rows: prefill prompts once, then decode all rows as one batch."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from shadowkv_cli.config import MethodSpec
from shadowkv_cli.console import notice
from shadowkv_cli.methods import (
    Group,
    Prompt,
    PromptStore,
    RotaryTables,
    Row,
    build_groups,
)
from shadowkv_cli.methods.drift import Drift, DriftingRows
from shadowkv_cli.model import exact_attention
from shadowkv_cli.model.batch import Batch, Parts
from shadowkv_cli.model.compression import Compression
from shadowkv_cli.model.failures import MethodFailure, blaming, specs_of
from shadowkv_cli.model.forward import last_logits
from shadowkv_cli.model.last_layer import attend_last
from shadowkv_cli.model.loading import LoadedModel
from shadowkv_cli.model.micro_batches import MicroBatches
from shadowkv_cli.model.patches import attached
from shadowkv_cli.model.residents import Frequencies, Prefix, Residents
from shadowkv_cli.model.rotary import compute_table, rotary_module
from shadowkv_cli.model.step_graph import StepGraph, Stepped

Phase = Literal["prefill", "append", "decode"]


def _allocated_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    gc.collect()  # so that nothing of an earlier session goes meanwhile
    return torch.cuda.memory_allocated(device)


def _finite_rows(logits: Tensor) -> Tensor:
    """Whether all logits [R, V] of a row are finite: bool [R], by the extremes, without a copy."""
    return torch.isfinite(logits.amax(-1)) & torch.isfinite(logits.amin(-1))


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
        captures: bool = True,
        reuse_prefix: bool = False,
    ) -> None:
        """Make room.

        Args:
            loaded: the model.
            specs: the methods.
            prompt_tokens, new_tokens: the longest prompt and answer.
            num_prompts: P.
            backend: exact attention of the prefill.
            merge_cells: cells of one layout work as one group.
            captures: on a GPU, a step whose rows allow it is one CUDA graph.
            reuse_prefix: a prompt takes over the keys and values of the beginning that it shares
                with one in the store, if there are exact ones: see `reused_tokens`.
        """
        self.loaded, self.fused = loaded, loaded.fused
        before = _allocated_bytes(loaded.device)
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
        self.compress(beside=True)
        self._captures = captures
        self._graphs: dict[Batch, StepGraph | None] = {}  # None: this batch can't be captured
        self.micro_batches: MicroBatches | None = None
        self.drift: Drift | None = None
        # Graphs are captured for few sizes of a batch; a CPU has none, and would work for nothing.
        self._decode_all(self.groups, padded=loaded.device.type != "cpu")
        self.lengths = torch.zeros(num_prompts, dtype=torch.long, device=loaded.device)
        self.held_bytes = _allocated_bytes(loaded.device) - before
        """On a GPU: what the store and the groups take beside the model."""
        self.backend_asked, self.backend = backend, ""
        self.attention_tflops: float | None = None  # of the backend in its trial
        self.context_tokens = 0  # of the longest row, the token that is being run included
        self.phase: Phase = "decode"
        self.longest = 0  # prompt, in tokens
        self.used = 0  # places behind the prompts, of the row that has most
        self._prompt: Prompt | None = None  # the one that is being prefilled
        self._prefix: Prefix | None = None  # what it takes over
        # A method that reads queries wants those of all tokens.
        reads_queries = any(group.needs_queries for _, group in self.groups)
        can_reuse = reuse_prefix and bool(self.store.keys) and not reads_queries
        self._residents = Residents() if can_reuse else None
        self.reused_tokens = 0
        """Tokens of the last prompt whose keys and values were taken over."""
        self._tables: dict[Frequencies, int] = {}
        self._table = 0

    def compress(self, *, beside: bool) -> None:
        """Let methods take in a layer beside the model, on a GPU, or between its layers."""
        self._compression = Compression(self.store, self.groups, self.specs, beside=beside)

    def focus(
        self,
        spec: MethodSpec,
        lanes: int = 1,
        captures: bool | None = None,
        micro_batches: int = 1,
    ) -> None:
        """Decode one cell alone from now on, unpadded; needs a session that merges no cells.

        Its prompts come before.

        Args:
            spec: the cell.
            lanes: parts of a micro-batch whose fetches overlap; 1 where nothing is fetched.
            captures: on a GPU, a step is one CUDA graph; None: as this session was made.
            micro_batches: at most so many parts of its rows go through the layers one behind the
                other, each fetching while another multiplies.
        """
        group = next(group for _, group in self.groups if group.rows[0].spec == spec)
        assert len(group.rows) == self.num_prompts, "the cells of this session are merged"
        self._captures = self._captures if captures is None else captures
        # A graph's memory goes with it, unless lanes keep something that lies there.
        self._graphs.clear()
        self.drift = group.drift = None
        group.split_lanes(1)
        self.micro_batches, own = None, [group]
        if micro_batches > 1 and len(group.rows) > 1:
            own = group.micro_batches(micro_batches)
            self.micro_batches = MicroBatches(self.loaded.device, len(own))
        parts: list[tuple[list[int], Group]] = []
        for part in own:
            part.split_lanes(lanes)
            if self.micro_batches is not None and self.loaded.device.type == "cuda":
                part.turn = self.micro_batches.turn
            first = sum(len(rows) for rows, _ in parts)
            parts.append((list(range(first, first + len(part.rows))), part))
        self._decode_all(parts, padded=False)
        self.reset()

    def steer(self, drift: Drift) -> None:
        """Let queries that drift select for the rows of the batch, until the next `focus`."""
        self.drift = drift
        for places, group in self.batch.decoding:
            group.drift = DriftingRows(drift, slice(places[0], places[-1] + 1))

    def _decode_all(self, parts: Parts, *, padded: bool) -> None:
        """Decode these groups after every `reset`, each with the rows of the session it holds."""
        self._whole = Batch(parts, self.loaded.device, padded=padded)
        self._holders = self._find_holders(self._whole)
        self.batch = self._whole

    @staticmethod
    def _find_holders(batch: Batch) -> dict[int, tuple[Group, int]]:
        """Group and place there of each row of the session."""
        return {
            row: (group, index) for rows, group in batch.parts for index, row in enumerate(rows)
        }

    def _leave_out(self, ended: set[int]) -> None:
        """Go on without rows that have ended, where that saves work."""
        self.batch = self.batch.without(ended)
        self._holders |= self._find_holders(self.batch)

    def set_prompt(self, prompt: Prompt) -> Frequencies:
        """Take note of a prompt's length, give it a rotary table, and let the methods get ready.

        Returns numbers of the table that no other table has.
        """
        self.lengths[prompt.index] = prompt.tokens
        self.longest = max(self.longest, prompt.tokens) if self.num_prompts > 1 else prompt.tokens
        self.used = 0
        self.batch = self._whole
        frequencies = self._ensure_table(prompt)
        self.store.packer.forget()  # what a prefill that failed has left
        for _, group in self.groups:
            group.begin(prompt)
        return frequencies

    def _ensure_table(self, prompt: Prompt) -> Frequencies:
        """Compute the prompt's table, or find the one that has the same frequencies."""
        total = self.store.prompt_tokens + self.new_tokens
        loaded = self.loaded
        cos, sin = compute_table(
            rotary_module(loaded.model), prompt.tokens, total, loaded.dtype, loaded.device
        )
        probe = tuple(torch.cat((cos[min(1, total - 1)], cos[-1], sin[-1])).tolist())
        tables = self.store.tables
        if tables is None:
            index = torch.zeros(self.num_prompts, dtype=torch.int32, device=loaded.device)
            tables = RotaryTables(cos[None], sin[None], index, loaded.interleaved)
            self._tables = {probe: 0}
        elif self.num_prompts == 1:
            tables.cos.copy_(cos[None])
            tables.sin.copy_(sin[None])
        elif probe not in self._tables:
            place = self._free_table(tables, prompt.index)
            if place < tables.cos.shape[0]:
                self._tables = {p: at for p, at in self._tables.items() if at != place}
                tables.cos[place], tables.sin[place] = cos, sin
            else:
                tables.cos = torch.cat((tables.cos, cos[None]))
                tables.sin = torch.cat((tables.sin, sin[None]))
                self._graphs.clear()
            self._tables[probe] = place
        self._table = 0 if self.num_prompts == 1 else self._tables[probe]
        tables.index[prompt.index] = self._table
        self.store.tables = tables
        return probe

    def _free_table(self, tables: RotaryTables, prompt_index: int) -> int:
        """Where a prompt's table may go: behind all, or in place of one that no other prompt has.

        A prompt of an earlier batch may have left one behind: there are never more than prompts.
        """
        count = tables.cos.shape[0]
        if count < self.num_prompts:
            return count
        others = tables.index.tolist()
        del others[prompt_index]
        return min(set(range(count)) - set(others))

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [rows, tokens, D'] for the model, from the fixed tables."""
        tables = self.store.tables
        assert tables is not None
        if self.phase == "prefill":  # of the prompt's last tokens: views
            assert self._prompt is not None
            end, own = self._prompt.tokens, slice(self._table, self._table + 1)
            here = slice(end - position_ids.shape[1], end)
            return tables.cos[own, here], tables.sin[own, here]
        table = torch.zeros(position_ids.shape[0], dtype=torch.long, device=tables.cos.device)
        table[: len(self.batch)] = tables.index[self.batch.prompts].long()
        return tables.cos[table[:, None], position_ids], tables.sin[table[:, None], position_ids]

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Serve one layer: the whole prompt while prefilling, else new tokens of every row."""
        if self.phase != "prefill":
            return self._append_layer(layer, q, k, v, scale)
        assert self._prompt is not None
        if self._prefix is not None:
            k, v = self._behind(self._prefix, layer, k, v)
        ready = self._compression.mark()
        if layer + 1 == self.loaded.shape.num_layers:
            out = attend_last(q, k, v, scale)
        else:
            out = self._attend_exactly(q, k, v, scale)
        self._compression.take_in(layer, self._prompt, q[0], k[0], v[0], ready)
        return out

    def _behind(self, prefix: Prefix, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, Hk, S, D] of a whole prompt, whose last ones are k and v.

        Copies, made on the model's stream before the methods are told that the layer is there: so
        they may write the prompt where the prefix comes from. What they wrote there in the prefill
        before has been waited for at its end, and answers are written behind their prompts.
        """
        self._compression.end_layer()  # so that those of two layers are never held
        here = (slice(prefix.index, prefix.index + 1), slice(None), slice(prefix.tokens))
        keys, values = self.store.keys[layer][here], self.store.values[layer][here]
        return torch.cat((keys, k), 2), torch.cat((values, v), 2)

    @property
    def is_decoding(self) -> bool:
        return self.phase != "prefill"

    @property
    def wants_last_token(self) -> bool:
        """Whether nobody looks at what the model says of other tokens than the last."""
        return self.phase == "prefill"

    def end_layer(self) -> None:
        """Let go of the keys and values of a layer that the methods have taken in."""
        if self.phase == "prefill":
            self._compression.end_layer()

    def _attend_exactly(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attend to the whole prompt; a package that fails here after all is replaced."""
        try:
            return exact_attention.attend(self.backend, q, k, v, scale)
        except Exception as error:
            if not exact_attention.give_up(self.backend, error):
                raise
        self.choose_backend()
        return exact_attention.attend(self.backend, q, k, v, scale)

    def _append_layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        decoding = self.batch.decoding
        in_order = isinstance(self.batch.index[0], slice)
        group: Group | None = None
        if self.micro_batches is not None and self.micro_batches.current is not None:
            _, group = decoding[self.micro_batches.current]
        elif in_order and len(decoding) == 1 and len(self.batch) == self.batch.bucket:
            _, group = decoding[0]
        if group is not None:
            with blaming(specs_of(group, range(len(group.rows)))):
                group.append(layer, k, v)
                return group.attend(layer, q, scale)
        out = torch.zeros_like(q)
        for index, (_, group) in zip(self.batch.index, decoding, strict=True):
            with blaming(specs_of(group, range(len(group.rows)))):
                group.append(layer, k[index], v[index])
                out[index] = group.attend(layer, q[index], scale)
        return out

    def _forward(
        self, phase: Phase, ids: Tensor, positions: Tensor, before: int, keep: int = 1
    ) -> Tensor:
        """Logits of the last `keep` tokens of each row, float32 [rows, keep, V]."""
        self.phase, self.context_tokens = phase, before + ids.shape[1]
        if self.micro_batches is not None:
            rows = [index for index in self.batch.index if isinstance(index, slice)]
            assert len(rows) == len(self.batch.index), "rows of a micro-batch are neighbours"
            self.micro_batches.rows = rows if self.is_decoding else ()
        return last_logits(self.loaded.model, self, ids, positions, before, keep)

    def choose_backend(self) -> None:
        """Find the exact attention of the prefill; the first time on a GPU takes a trial."""
        shape = self.loaded.shape
        heads = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
        choice = exact_attention.choose(
            self.backend_asked,
            self.loaded.device,
            self.loaded.dtype,
            heads,
            self.store.prompt_tokens,
        )
        self.backend, self.attention_tflops = choice.backend, choice.tflops

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], *, index: int = 0, key: str = "") -> Tensor:
        """Run a prompt once and let every method take it in; logits [V] of its last token."""
        self.choose_backend()
        prompt = Prompt(index, len(ids), key)
        frequencies = self.set_prompt(prompt)
        tokens, residents = torch.tensor(list(ids)), self._residents
        prefix = None
        if residents is not None:
            prefix = residents.longest_prefix(tokens, frequencies)
            residents.forget(index)  # until it is whole
        reused = prefix.tokens if prefix is not None else 0
        self._prompt, self._prefix, self.reused_tokens = prompt, prefix, reused
        try:
            rest = tokens[reused:].to(self.loaded.device)[None]
            positions = torch.arange(reused, len(ids), device=self.loaded.device)[None]
            logits = self._forward("prefill", rest, positions, reused)[0, 0]
        finally:
            self._compression.finish()
            self._prompt = self._prefix = None
        self._compression.check()
        if residents is not None:
            residents.note(index, tokens, frequencies)
        return logits

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
    def next_tokens(self, tokens: Tensor) -> Stepped:
        """Feed each row its last token, int64 [R], and take the likeliest next one.

        On a GPU as one CUDA graph, if all rows allow it; then nothing waits for the device, and the
        next call overwrites what this one returned. Whether logits are finite is for the caller to
        look at: see `check_finite`.
        """
        graph = self._find_graph()
        self._make_room(1, None)
        if graph is None:
            return self._greedy(tokens)
        return graph.replay(tokens)

    @property
    def is_captured(self) -> bool:
        """Whether the batch is decoded by replaying a CUDA graph."""
        return self._graphs.get(self.batch) is not None

    def _greedy(self, tokens: Tensor) -> Stepped:
        logits = self._logits("decode", tokens[:, None], None)
        return Stepped(logits.argmax(-1), _finite_rows(logits), logits)

    def _find_graph(self) -> StepGraph | None:
        """The graph of the batch as it is; captured before the first token of an answer."""
        if not self._captures or not self.batch.is_capturable:
            return None
        if self.batch not in self._graphs and self.used == 0:
            self._graphs[self.batch] = self._capture()
        return self._graphs.get(self.batch)

    def _capture(self) -> StepGraph | None:
        """None, after saying so, for a model that waits for the device in its forward."""

        def step(tokens: Tensor) -> Stepped:
            self._make_room(1, None)
            return self._greedy(tokens)

        # The window of a model that has one is checked for the whole answer at once.
        longest, self.longest = self.longest, self.store.prompt_tokens + self.new_tokens - 1
        try:
            with self.attached():
                return StepGraph(
                    step,
                    len(self.batch),
                    self.loaded.device,
                    forget=self._forget,
                )
        except torch.AcceleratorError as error:
            reason = " ".join(str(error).split())
            notice(f"{self.loaded.name} can't be decoded as one CUDA graph ({reason}).")
            return None
        finally:
            self.longest = longest
            self._forget()

    def _make_room(self, width: int, counts: Tensor | None) -> None:
        """Count the tokens of a step on the host."""
        for index, (_, group) in zip(self.batch.index, self.batch.decoding, strict=True):
            group.make_room(width if counts is None else int(counts[index].max()))
        self.used += width

    @torch.inference_mode()
    def _run_rows(self, phase: Phase, tokens: Tensor, counts: Tensor | None) -> Tensor:
        self._make_room(tokens.shape[1], counts)
        last = self._logits(phase, tokens, counts)
        self.check_finite(_finite_rows(last))
        return last

    def check_finite(self, finite: Tensor) -> None:
        """Raise MethodFailure where the logits of a row, bool [R], are not finite."""
        flags = finite.tolist()
        for places, group in self.batch.decoding:
            broken = [i for i, place in enumerate(places) if not flags[place]]
            if broken:
                raise MethodFailure(specs_of(group, broken), "the logits are not finite")

    def _logits(self, phase: Phase, tokens: Tensor, counts: Tensor | None) -> Tensor:
        """Logits [R, V] of each row's last token; room for the tokens is made."""
        batch, width = self.batch, tokens.shape[1]
        rows = len(batch)
        generated = torch.zeros(rows, dtype=torch.long, device=tokens.device)
        for index, (_, group) in zip(batch.index, batch.decoding, strict=True):
            generated[index] = group.generated.long()
            group.advance(None if counts is None else counts[index])
        ids = torch.zeros(batch.bucket, width, dtype=torch.long, device=tokens.device)
        ids[:rows] = tokens
        positions = torch.zeros_like(ids)
        ahead = torch.arange(width, device=tokens.device)
        if counts is not None:
            ahead = ahead.minimum(counts.long()[:, None] - 1)
        positions[:rows] = (self.lengths[batch.prompts] + generated)[:, None] + ahead
        before = self.longest + self.used - width
        try:
            logits = self._forward(phase, ids, positions, before, width)[:rows]
        finally:  # A capture cannot end while a group's streams have not joined.
            for _, group in batch.decoding:
                group.finish()
        return logits[:, 0] if counts is None else logits[range(rows), counts.long() - 1]

    def reset(self) -> None:
        """Back to the end of the prefill."""
        self.batch = self._whole
        self._forget()

    def _forget(self) -> None:
        """Forget what was decoded, and go on with the same rows."""
        self.used = 0
        # Micro-batches count for themselves what they select and fetch.
        for group in dict.fromkeys(g for _, g in (*self.groups, *self._whole.parts)):
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
        answers: list[list[int]] = [[] for _ in range(len(self.batch))]
        ended: set[int] = set()
        tokens = first.tolist()
        shrinks = self.loaded.device.type == "cpu"
        with self.attached():
            while True:
                last = dict(zip(self.batch.rows, tokens, strict=True))
                for row in last.keys() - ended:
                    answers[row].append(last[row])
                    if last[row] in eos_ids or len(answers[row]) >= max_new_tokens[row]:
                        ended.add(row)
                if len(ended) == len(answers):
                    return answers
                if shrinks:
                    self._leave_out(ended)
                batch = torch.tensor([last[row] for row in self.batch.rows], device=first.device)
                stepped = self.next_tokens(batch)
                self.check_finite(stepped.finite)
                tokens = stepped.tokens.tolist()

    def attached(self) -> AbstractContextManager[None]:
        """Serve the model's attention for a while; every forward does so by itself, at a cost."""
        return attached(self.loaded.model, self)

    def hit_rate(self, first_step: int, last_step: int) -> float | None:
        """Share of the chunks that steps select which were at hand, see `Group.hit_rate`."""
        counts = [g.chunk_counts(first_step, last_step) for _, g in self.batch.parts]
        selected, fetched = (sum(own) for own in zip(*counts, strict=True))
        return 1 - fetched / selected if selected else None

    def audit(self, row: int, generated_tokens: int) -> dict[str, Any]:
        """The budget audit of a row, see `Group.audit`."""
        group, index = self._holders[row]
        return group.audit(index, generated_tokens)
