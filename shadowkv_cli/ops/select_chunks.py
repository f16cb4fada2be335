"""Which chunks a decoded token attends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowkv_cli.config import packed_width
from shadowkv_cli.ops import compiled
from shadowkv_cli.ops.await_rows import SELECT_PARTS
from shadowkv_cli.ops.fp8 import dequantise
from shadowkv_cli.ops.library import check, define
from shadowkv_cli.ops.packed import unpack


def landmark_scores(
    query: Tensor,
    landmarks: Tensor,
    landmark_scales: Tensor | None,
    prompt_index: Tensor,
    scale: float,
) -> Tensor:
    """Logits of every chunk per query head, float32 [R, Hk, G, C]: logsumexp of its landmarks'.

    Arguments as of `select_chunks`. In fp8 the products are float32's.
    """
    rows, q_heads, dim = query.shape
    prompts, heads, chunks = landmarks.shape[:3]
    if landmarks.dtype == torch.uint8:
        landmarks = unpack(landmarks)
    grouped = query.reshape(rows, heads, q_heads // heads, dim)
    if landmark_scales is not None:
        grouped = grouped.float()
    scales = [None] * prompts if landmark_scales is None else landmark_scales.unbind(0)
    parts = list(zip(landmarks, scales, strict=True))
    if prompts == 1:
        return _scores_on(*parts[0], grouped, scale)
    row_prompts = prompt_index.tolist()
    if row_prompts == sorted(row_prompts) and _are_even(row_prompts, prompts):
        by_prompt = grouped.unflatten(0, (prompts, -1))
        return _scores_on(landmarks, landmark_scales, by_prompt, scale).flatten(0, 1)
    scores = query.new_empty(rows, heads, q_heads // heads, chunks, dtype=torch.float32)
    for prompt, part in enumerate(parts):
        of_prompt = (prompt_index == prompt).nonzero()[:, 0]
        scores[of_prompt] = _scores_on(*part, grouped[of_prompt], scale)
    return scores


def _are_even(row_prompts: list[int], prompts: int) -> bool:
    """Whether every prompt has as many rows."""
    return len({row_prompts.count(prompt) for prompt in range(prompts)}) == 1


def _scores_on(landmarks: Tensor, scales: Tensor | None, grouped: Tensor, scale: float) -> Tensor:
    """The same of the rows of one prompt: grouped [R, Hk, G, D] on landmarks [Hk, C, L, D].

    Or of several prompts with R rows each, in a first dimension of both.
    """
    folded = grouped.transpose(-4, -3).flatten(-3, -2)  # [Hk, R*G, D]
    own = landmarks if scales is None else dequantise(landmarks, scales)
    logits = torch.matmul(folded, own.flatten(-3, -2).mT).float().mul_(scale)  # [Hk, R*G, C*L]
    if landmarks.shape[-2] > 1:
        logits = logits.unflatten(-1, landmarks.shape[-3:-1]).logsumexp(-1)
    return logits.unflatten(-2, (grouped.shape[-4], grouped.shape[-2])).transpose(-4, -3)


def top_chunks(scores: Tensor, budget_chunks: Tensor, max_chunks: int) -> Tensor:
    """The ids of each row's best chunks, int32 [R, Hk, N], ascending, then -1.

    Args:
        scores: [R, Hk, C]; minus infinity where a chunk must not be chosen.
        budget_chunks: int32 [R], chunks wanted per row.
        max_chunks: N, the most that any row wants.
    """
    chunks = scores.shape[-1]
    count = min(max_chunks, chunks)
    # One more than are wanted, to see whether it has the score of the last.
    best, ids = scores.topk(min(count + 1, chunks), dim=-1)
    wanted = budget_chunks.clamp(max=count)[:, None, None]
    ends = torch.cat((wanted - 1, wanted), -1).clamp_(0, best.shape[-1] - 1).long()
    last, after = best.gather(2, ends.expand(-1, best.shape[1], -1)).split(1, -1)
    best, ids = best[..., :count], ids[..., :count]
    # On a GPU looking whether there are ties would wait for it.
    if scores.is_cuda or bool((after == last).any()):
        ids, best = _lower_of_ties(scores, last, wanted, count)
    rank = torch.arange(count, device=best.device)
    unwanted = (rank >= wanted) | torch.isneginf(best)
    ids = ids.masked_fill(unwanted, chunks).sort(-1).values
    ids = ids.masked_fill_(ids == chunks, -1).to(torch.int32)
    return F.pad(ids, (0, max_chunks - ids.shape[-1]), value=-1)


def _lower_of_ties(
    scores: Tensor, last: Tensor, wanted: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The ids of the best `count` and their scores, ties at the cut going to the lower id."""
    above, ties = scores > last, scores == last
    room = wanted - above.sum(-1, keepdim=True)
    chosen = above | (ties & (ties.cumsum(-1) <= room))
    ranked = torch.where(chosen, scores, float("-inf"))
    best, ids = ranked.topk(count, dim=-1)
    return ids, best


def _reference(
    query: Tensor,
    landmarks: Tensor,
    landmark_scales: Tensor | None,
    prompt_index: Tensor,
    num_chunks: Tensor,
    excluded: Tensor,
    budget_chunks: Tensor,
    max_chunks: int,
    scale: float,
    done: Tensor | None,
    begun: int | None,
) -> Tensor:
    heads, chunks = landmarks.shape[1:3]
    op, q_heads = "select_chunks", query.shape[1]
    check(begun is None, op, "only the compiled kernel records an event of the CUDA runtime")
    check(q_heads % heads == 0, op, f"{q_heads} query heads do not share {heads} KV heads")
    check(excluded.shape[1:] == (heads, chunks), op, f"excluded must be [R, {heads}, {chunks}]")
    packed = landmarks.dtype == torch.uint8
    width = packed_width(query.shape[2]) if packed else query.shape[2]
    check(landmarks.shape[-1] == width, op, f"landmarks must be [P, Hk, C, L, {width}]")
    fits = not packed or query.dtype == torch.bfloat16
    check(fits, op, "query must be bfloat16 beside packed landmarks")
    if landmark_scales is not None:
        check(not packed, op, "landmark_scales belong to landmarks in fp8")
        expected = landmarks.shape[:-1]
        check(landmark_scales.shape == expected, op, f"landmark_scales must be {list(expected)}")
    scores = landmark_scores(query, landmarks, landmark_scales, prompt_index, scale)
    beyond = torch.arange(chunks, device=query.device) >= num_chunks[:, None]
    barred = (excluded | beyond[:, None])[:, :, None]
    # The logarithm of the softmax has its order and does not underflow into ties.
    best_of_group = torch.where(barred, float("-inf"), scores).log_softmax(-1).amax(2)
    # The softmax of a row whose every chunk is barred is not a number.
    best_of_group = torch.where(barred[:, :, 0], float("-inf"), best_of_group)
    if done is not None:
        check(done.shape == query.shape[:1], op, f"done must be [{query.shape[0]}]")
        done += SELECT_PARTS * heads
    return top_chunks(best_of_group, budget_chunks, max_chunks)


def _fake(
    query: Tensor,
    landmarks: Tensor,
    landmark_scales: Tensor | None,
    prompt_index: Tensor,
    num_chunks: Tensor,
    excluded: Tensor,
    budget_chunks: Tensor,
    max_chunks: int,
    scale: float,
    done: Tensor | None,
    begun: int | None,
) -> Tensor:
    shape = (query.shape[0], landmarks.shape[1], max_chunks)
    return query.new_empty(shape, dtype=torch.int32)


define(
    "select_chunks(Tensor query, Tensor landmarks, Tensor? landmark_scales, Tensor prompt_index, "
    "Tensor num_chunks, Tensor excluded, Tensor budget_chunks, int max_chunks, float scale, "
    "Tensor(a!)? done, int? begun) -> Tensor",
    _reference,
    _fake,
)


def select_chunks(
    query: Tensor,
    landmarks: Tensor,
    landmark_scales: Tensor | None,
    prompt_index: Tensor,
    num_chunks: Tensor,
    excluded: Tensor,
    budget_chunks: Tensor,
    max_chunks: int,
    scale: float,
    done: Tensor | None = None,
    begun: torch.cuda.Event | None = None,
) -> Tensor:
    """Select the chunks whose landmarks draw most attention (paper, Algorithm 2).

    Softmax over chunks per query head, maximum over the query heads of a KV head, then top k.

    Args:
        query: [R, Hq, D].
        landmarks: [P, Hk, C, L, D], whose L logits of a chunk are combined by logsumexp; packed,
            uint8 [P, Hk, C, L, W], beside a query in bfloat16 (`ops.packed`).
        landmark_scales: float32 [P, Hk, C, L] of landmarks in fp8; None: they are of query's dtype.
        prompt_index: int32 [R], the prompt of each row.
        num_chunks: int32 [R], chunks of a row's prompt that may be chosen: the first so many.
        excluded: bool [R, Hk, C], chunks that are attended anyway (outliers).
        budget_chunks: int32 [R], chunks wanted.
        max_chunks: N, the most that any row wants.
        scale: of the logits.
        done: int32 [R], to which SELECT_PARTS are added for each KV head of a row whose ids are
            written; see `await_rows`.
        begun: recorded when this runs, or later.

    Returns:
        int32 [R, Hk, N]: unique ids in ascending order, then -1 where fewer were wanted or exist.
    """
    arguments = (
        query,
        landmarks,
        landmark_scales,
        prompt_index,
        num_chunks,
        excluded,
        budget_chunks,
        max_chunks,
        scale,
        done,
    )
    if compiled.serves(query, query.shape[-1], group=query.shape[1] // landmarks.shape[1]):
        event = None if begun is None else begun.cuda_event
        return torch.ops.shadowkv.select_chunks(*arguments, event)
    ids = _reference(*arguments, None)
    if begun is not None:
        begun.record(torch.cuda.current_stream(query.device))
    return ids
