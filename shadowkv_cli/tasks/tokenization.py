"""Tokenizers: loading, a hash of what they do, and prompts with BOS exactly once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from shadowkv_cli.catalogue.places import tokenizer_folder
from shadowkv_cli.catalogue.shapes import shape_named
from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.tasks.hub import hub_access

DEMO = "demo"
_PROBES = (
    "The special magic number for inquisitive-harbour mentioned in the text is 4072913.",
    " 1. alpha 2. beta\n\n\tindented;  two spaces, e\u0301\u00e9 \u4e2d\u6587 \U0001f600 "
    "4ec3f970-956d-40e4-aaa2-6216fada98f5",
    "VAR XKQZJ = VAR PLMOT \nUnbelievably, antidisestablishmentarianism isn't 1,234.5%.",
)


_SPECIAL_CHARACTERS = 64
"""No special token is spelled longer."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
) -> Any:
    """Load a tokenizer by hub name, from a folder, or that of a model that needs no hub.

    Raises ShadowKVError with the way out when it is gated, missing or not reachable, UsageError for
    a shape, which has none.
    """
    from transformers import AutoTokenizer

    if shape_named(name) is not None:
        raise UsageError(
            f"{name} has random weights and no tokenizer of its own: name that of a model; the "
            "shape then reads the data with it."
        )
    ours = tokenizer_folder(name, offline=offline)
    path = name if ours is None else str(ours)
    if ours is None and name.startswith(("/", "./", "../", "~")):
        path = str(Path(name).expanduser())
        if not Path(path).is_dir():
            raise UsageError(f"No tokenizer folder {name}.")
    local = Path(path).is_dir()
    with hub_access(offline or local) as reachable:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                path,
                revision=revision if ours is None else None,
                trust_remote_code=trust_remote_code,
                local_files_only=not reachable,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise _load_error(name, offline, reachable or local, error) from error
    _silence_length_warning(tokenizer)
    return tokenizer


def _load_error(name: str, offline: bool, reachable: bool, error: Exception) -> ShadowKVError:
    text = " ".join(str(error).split())
    lowered = text.lower()
    if "trust_remote_code" in lowered:
        return UsageError(
            f"The tokenizer {name} runs its own code: allow it with --trust-remote-code."
        )
    if offline:
        return ShadowKVError(
            f"The tokenizer {name} is not on this machine: leave out --offline or give its folder."
        )
    if not reachable:
        return ShadowKVError(
            f"The hub cannot be reached for the tokenizer {name}, and it is not on this machine: "
            "check the network, give a local folder, or use `demo` or `smollm2`, which need no hub."
        )
    if "gated" in lowered or "401" in lowered or "403" in lowered:
        return ShadowKVError(
            f"No access to {name}: accept its licence on its hub page and log in with "
            "`hf auth login`, or give a local folder."
        )
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return ShadowKVError(
            f"The folder {name} holds no tokenizer: copy the model's tokenizer.json and "
            "tokenizer_config.json into it."
        )
    return ShadowKVError(f"Cannot load the tokenizer {name}: {text[:200]}")


def _silence_length_warning(tokenizer: Any) -> None:
    """Long prompts are the point here: transformers would warn once per process about them."""
    if hasattr(tokenizer, "deprecation_warnings"):
        key = "sequence-length-is-longer-than-the-specified-maximum"
        tokenizer.deprecation_warnings[key] = True
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of the vocabulary and of how it encodes a few texts; independent of library versions."""
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "added_in_front": list(special_prefix(tokenizer)),
        "encodings": [_plain_ids(tokenizer, text) for text in _PROBES],
    }
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Encode a finished prompt, with the special tokens that the tokenizer puts in front.

    They are added unless the text already spells one of them first, so that BOS stands exactly
    once whether or not a chat template writes it. What a tokenizer puts behind (EOS) is left out.
    """
    ids = _plain_ids(tokenizer, text)
    prefix = special_prefix(tokenizer)
    return ids if ids and ids[0] in prefix else [*prefix, *ids]


def special_prefix(tokenizer: Any) -> tuple[int, ...]:
    """Ids that the tokenizer puts in front of a text by itself, such as BOS."""
    return _special_prefix(_Identity(tokenizer))


def tokens_in_front(tokenizer: Any, text: str) -> int:
    """How many special tokens `encode_prompt` puts in front of a text."""
    first = _plain_ids(tokenizer, text[:_SPECIAL_CHARACTERS])[:1]
    prefix = special_prefix(tokenizer)
    return 0 if first and first[0] in prefix else len(prefix)


def count_plain(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text by itself, without special tokens."""
    return [len(ids) for ids in _plain_batch(tokenizer, texts)]


class UnitCounter:
    """Token counts of short texts (words, lines, documents), each counted once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}

    def counts(self, texts: Iterable[str]) -> list[int]:
        texts = list(texts)
        known = self._known
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            known.update(zip(new, count_plain(self._tokenizer, new), strict=True))
        return [known[text] for text in texts]

    def total(self, texts: Iterable[str]) -> int:
        return sum(self.counts(texts))


class _Identity:
    """Makes an object a cache key by identity, and keeps it alive so that the id stays its own."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value


@lru_cache(maxsize=8)
def _special_prefix(key: _Identity) -> tuple[int, ...]:
    plain = _plain_ids(key.value, "x")
    full = list(key.value("x", add_special_tokens=True)["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start])
    return ()


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return _plain_batch(tokenizer, [text])[0]


def _plain_batch(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text without special tokens."""
    if not texts:
        return []
    if getattr(tokenizer, "is_fast", False):
        # The same ids as a call, without offsets and masks: three times as fast on long prompts.
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]
