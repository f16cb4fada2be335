"""Tables in Markdown, and the places of a document that they stand in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from shadowkv_cli.errors import UsageError
from shadowkv_cli.rowlog import write_atomic


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_section(document: Path, name: str, text: str) -> None:
    """Put a text between `<!-- name -->` and `<!-- /name -->`; what stood there goes.

    Raises UsageError where the document does not hold both lines once, in this order.
    """
    try:
        before = document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read {document}: {error}.") from None
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(before)) != 1 or before.count(begin) != 1:
        raise UsageError(f"{document} has no place for it: write '{begin.strip()}' and '{end}'.")
    write_atomic(document, pattern.sub(lambda _: f"{begin}{text}\n{end}", before))


def section(document: str, name: str) -> str:
    """What stands between the two lines, without the last line break; empty without them."""
    mark = re.escape(name)
    found = re.search(f"<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->", document, re.DOTALL)
    return found[1] if found else ""
