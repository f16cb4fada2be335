"""The ops of ShadowKV: schema, fake and torch reference; a compiled library may add CUDA.

Shapes: R rows (one method on one prompt each), P prompts, Hq query heads, Hk KV heads, G = Hq / Hk,
D head dimension, C chunks of c tokens, L landmarks per chunk, N selected chunks, S prompt tokens,
T tokens of a row.
"""

from shadowkv_cli.ops.append_tokens import append_tokens
from shadowkv_cli.ops.await_rows import await_rows
from shadowkv_cli.ops.build_landmarks import build_landmarks
from shadowkv_cli.ops.fetch_values import fetch_values
from shadowkv_cli.ops.full_attention import full_attention
from shadowkv_cli.ops.gated_silu import gated_silu
from shadowkv_cli.ops.rebuild_keys import rebuild_keys
from shadowkv_cli.ops.rms_norm import rms_norm
from shadowkv_cli.ops.rotate_heads import rotate_heads, rotate_heads_
from shadowkv_cli.ops.select_chunks import select_chunks
from shadowkv_cli.ops.sparse_attention import sparse_attention
from shadowkv_cli.ops.update_residency import update_residency

__all__ = [
    "append_tokens",
    "await_rows",
    "build_landmarks",
    "fetch_values",
    "full_attention",
    "gated_silu",
    "rebuild_keys",
    "rms_norm",
    "rotate_heads",
    "rotate_heads_",
    "select_chunks",
    "sparse_attention",
    "update_residency",
]
