"""Chat wrappers: what stands around a task's text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shadowkv_cli.errors import UsageError, unknown_name
from shadowkv_cli.tasks.package_data import read_yaml
from shadowkv_cli.tasks.tokenization import special_prefix

AUTO = "auto"
BASE = "base"
_PLACEHOLDER = "RULER-TASK-TEXT"
_FIXED_DATE = "26 Jul 2024"
"""Llama 3.1 and later print a date: fixed, so that the same seed gives the same prompts any day."""


@dataclass(frozen=True)
class Wrapper:
    """A chat template as two strings.

    Attributes:
        requested: the name that was asked for.
        resolved: what it came to: a name, `chat_template` or `base`.
        bos: stands once, at the very start.
        before: between `bos` and the task's text.
        after: behind the task's text, up to the answer prefix.
    """

    requested: str
    resolved: str
    bos: str
    before: str
    after: str

    def wrap(self, text: str, *, first: bool = True) -> str:
        """One turn around `text`; only the first of a prompt gets `bos`."""
        return f"{self.bos if first else ''}{self.before}{text}{self.after}"

    def offset(self, *, first: bool = True) -> int:
        """Characters in front of the text."""
        return len(self.before) + (len(self.bos) if first else 0)

    def to_manifest(self) -> dict[str, str]:
        return {
            "requested": self.requested,
            "resolved": self.resolved,
            "before": self.bos + self.before,
            "after": self.after,
        }


def check_template_name(name: str) -> None:
    """Raise UsageError for a name that `--template` does not know."""
    known = [AUTO, *read_yaml("chat_templates.yaml")]
    if name not in known:
        raise unknown_name("template", name, known)


def resolve_wrapper(name: str, tokenizer: Any) -> Wrapper:
    """Find the wrapper of a name; `auto` is the tokenizer's own template, or none.

    Raises UsageError for an unknown name and for a chat template that cannot be used.
    """
    check_template_name(name)
    if name == AUTO and getattr(tokenizer, "chat_template", None):
        return _own_template(tokenizer)
    resolved = BASE if name == AUTO else name
    return Wrapper(name, resolved, **read_yaml("chat_templates.yaml")[resolved])


def _own_template(tokenizer: Any) -> Wrapper:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _PLACEHOLDER}],
            tokenize=False,
            add_generation_prompt=True,
            date_string=_FIXED_DATE,
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"The tokenizer's chat template failed ({reason}): name one with --template."
        ) from error
    if text.count(_PLACEHOLDER) != 1:
        raise UsageError(
            "The tokenizer's chat template does not show the user's text exactly once: name one "
            "with --template."
        )
    before, after = text.split(_PLACEHOLDER)
    ids = special_prefix(tokenizer)
    starts = [tokenizer.bos_token or "", tokenizer.decode(list(ids)) if ids else ""]
    bos = max((s for s in starts if s and before.startswith(s)), key=len, default="")
    return Wrapper(AUTO, "chat_template", bos, before.removeprefix(bos), after)
