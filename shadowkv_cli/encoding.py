"""A tokenizer shared by two threads: one answers a sample, one encodes the next."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from shadowkv_cli.tasks.tokenization import encode_prompt


class PromptEncoder:
    """Encodes prompts, ahead of time where that was asked for, and decodes answers.

    At 131,072 tokens that takes some 0.4 s, which a GPU would wait for.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._lock = threading.Lock()  # a tokenizer cannot be set up while it is used
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._ahead: dict[str, Future[list[int]]] = {}

    def begin(self, text: str) -> None:
        """Encode a prompt in the other thread; `ids` waits for it."""
        if text not in self._ahead:
            self._ahead[text] = self._thread.submit(self._encode, text)

    def ids(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        ahead = self._ahead.pop(text, None)
        return self._encode(text) if ahead is None else ahead.result()

    def _encode(self, text: str) -> list[int]:
        with self._lock:
            return encode_prompt(self.tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        with self._lock:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
