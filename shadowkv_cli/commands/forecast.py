"""What a build of data would write, as a table or as JSON."""

from __future__ import annotations

from typing import Any

from shadowkv_cli.console import format_bytes, format_duration, print_json, print_table


def show_forecast(entries: list[dict[str, Any]], num_workers: int, json: bool) -> None:
    """Print what each piece would add; `entries` as a build's `forecast` gives them."""
    names = ("existing", "prompts", "tokens", "bytes", "seconds")
    total = {name: sum(entry[name] for entry in entries) for name in names}
    if json:
        print_json({"dry_run": True, "pieces": entries, "num_workers": num_workers, **total})
        return
    rows = [
        [
            str(e["task"]),
            str(e["context_length"] or ""),
            str(e["existing"]),
            str(e["prompts"]),
            f"{e['tokens']:,}",
            format_bytes(e["bytes"]),
            format_duration(e["seconds"]),
        ]
        for e in [*entries, {"task": "all", "context_length": 0, **total}]
    ]
    columns = ["task", "length", "there", "to write", "tokens", "size", "time"]
    title = f"Would be written, with {num_workers} process{'es' if num_workers > 1 else ''}"
    print_table(title, columns, rows)
