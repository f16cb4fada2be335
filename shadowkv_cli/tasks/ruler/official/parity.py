"""Where rows of the official fit cannot be RULER's own, byte for byte, and why."""

from __future__ import annotations

from collections.abc import Mapping

from shadowkv_cli.tasks.ruler.niah import singular
from shadowkv_cli.tasks.ruler.sentences import PUNKT
from shadowkv_cli.tasks.wrappers import Wrapper

SQUAD_SHA256 = "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8"
"""Of SQuAD's dev-v2.0.json."""
SYNTHETIC = "written by this program"


def differences(
    choice: Mapping[str, str],
    splitter: str | None,
    wrapper: Wrapper,
    *,
    shuffle_gold: bool = False,
) -> dict[str, str]:
    """What differs from RULER's sources, by what it touches; {} where nothing is known to.

    Args:
        choice: where `haystack`, `squad` and `hotpotqa` come from, as `sources.source_choice`.
        splitter: what splits essays into sentences.
    """
    found: dict[str, str] = {}
    essays = choice["haystack"]
    if essays == "synthetic":
        found["essays"] = f"{SYNTHETIC}, not Paul Graham's"
    elif essays == "hub":
        found["essays"] = "the hub's copy, not the PaulGrahamEssays.json that RULER downloads"
    elif splitter != PUNKT:
        found["essays"] = "sentences are split by rules, not by nltk's punkt"
    squad = choice["squad"]
    if squad == "synthetic":
        found["squad"] = f"{SYNTHETIC}, not SQuAD"
    elif squad == "hub":
        found["squad"] = "the hub's copy, not compared with dev-v2.0.json"
    elif squad != f"file {SQUAD_SHA256}":
        found["squad"] = "another file than SQuAD's dev-v2.0.json"
    if choice["hotpotqa"] == "synthetic":
        found["hotpotqa"] = f"{SYNTHETIC}, not HotpotQA"
    elif choice["hotpotqa"] == "hub":
        found["hotpotqa"] = "the hub's copy, whose questions may stand in another order"
    frame = wrapper.bos + wrapper.before + wrapper.after
    if singular(frame) != frame:
        found["template"] = "RULER rewrites 'are' to 'is' in this chat template; here it stays"
    if shuffle_gold:
        found["questions"] = "--shuffle-gold moves the documents with the answers"
    return found


def describe(found: Mapping[str, str]) -> str:
    """The same as one sentence, for a note; empty where nothing differs."""
    if not found:
        return ""
    parts = "; ".join(f"{what}: {why}" for what, why in found.items())
    return f"Rows that use these are not byte-equal to RULER's: {parts}."
