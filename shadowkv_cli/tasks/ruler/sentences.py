"""Sentence splitting: nltk's punkt where its data lies on this machine, else rules."""

from __future__ import annotations

import re

RULES = "rules 1"
PUNKT = "nltk punkt"

_END = re.compile(r"[.!?][\"')\]\u2019\u201d]*(?= [\"'(\[\u2018\u201c]?[A-Z0-9])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|Inc|Ltd|Co|Corp|No|Fig|al|cf|Gen|Col|Sgt|Rev)"
    r"|\b(?:e\.g|i\.e|a\.m|p\.m|U\.S|U\.K)|(?:^|[\s(])[A-Z])\.$"
)


def available_splitter() -> str:
    """`nltk punkt` where nltk and its punkt data are installed, else the rules' name."""
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab")
    except (ImportError, LookupError):
        return RULES
    return PUNKT


def split_sentences(text: str, splitter: str) -> list[str]:
    """Split text with single spaces; the sentences joined by spaces are the text again."""
    if splitter == PUNKT:
        from nltk.tokenize import sent_tokenize

        return list(sent_tokenize(text))
    sentences = []
    start = 0
    for match in _END.finditer(text):
        if match[0] == "." and _ABBREVIATION.search(text[max(0, match.end() - 8) : match.end()]):
            continue
        sentences.append(text[start : match.end()])
        start = match.end() + 1
    if start < len(text):
        sentences.append(text[start:])
    return sentences
