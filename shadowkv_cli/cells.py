"""Cells from the text of options: `NAME:key=value`, general settings, grids and single axes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_type_hints

from shadowkv_cli.config import SPECS, MethodSpec, SparseBudget, spec_fields
from shadowkv_cli.errors import UsageError, unknown_name


def _convert(spec: type[MethodSpec], field: str, text: str) -> Any:
    """Turn a setting's text into its type. Raises UsageError naming method, field and value."""
    hint = get_type_hints(spec)[field]
    or_auto = int in get_args(hint)
    try:
        if hint is SparseBudget:
            return SparseBudget.parse(text)
        if hint in (int, float):
            return hint(text)
        if or_auto:
            return text if text == "auto" else int(text)
    except UsageError:
        raise
    except ValueError:
        kind = "a number" if hint is float else "a whole number"
        kind += " or auto" if or_auto else ""
        raise UsageError(f"{field} of {spec.name} must be {kind}, not '{text}'.") from None
    if text not in get_args(hint):
        names = " or ".join(get_args(hint))
        raise UsageError(f"{field} of {spec.name} must be {names}, not '{text}'.")
    return text


Asked = list[tuple[str, dict[str, str]]]


def _split_methods(values: Iterable[str]) -> Asked:
    """Read `full,shadowkv:rank=64,chunk_size=4` (or repeats) as names with their own settings.

    Raises UsageError for an unknown method or setting, and for what is given twice.
    """
    methods: Asked = []
    for part in (p.strip() for value in values for p in value.split(",")):
        if not part:
            continue
        name, colon, first = part.partition(":")
        if "=" in name:
            if not methods:
                raise UsageError(f"'{part}' names no method: write NAME:key=value.")
            name, assignment = methods[-1][0], part
        else:
            if name not in SPECS:
                raise unknown_name("method", name, SPECS)
            methods.append((name, {}))
            assignment = first
            if not colon:
                continue
        key, equals, text = assignment.partition("=")
        key, own, fields = key.strip().replace("-", "_"), methods[-1][1], spec_fields(SPECS[name])
        if not equals:
            raise UsageError(f"'{assignment}' in '{part}' is no setting: write key=value.")
        if key not in fields:
            raise unknown_name("setting", key, fields, f"of method '{name}'")
        if key in own:
            raise UsageError(f"{name}: {key} is given twice, as {own[key]} and {text.strip()}.")
        own[key] = text.strip()
    for i, method in enumerate(methods):
        if method in methods[:i]:
            raise UsageError(f"The method '{method[0]}' was given twice with the same settings.")
    return methods


def _apply(asked: Asked, given: Mapping[str, str]) -> list[MethodSpec]:
    """Make the specs; `given` sets every method that has the field, its own settings excepted."""
    specs: list[MethodSpec] = []
    for name, own in asked:
        spec = SPECS[name]
        settings = {k: v for k, v in given.items() if k in spec_fields(spec)} | own
        specs.append(spec(**{k: _convert(spec, k, v) for k, v in settings.items()}))
    for key in given:
        having = [own for name, own in asked if key in spec_fields(SPECS[name])]
        option = "--" + key.replace("_", "-")
        if not having:
            names = ", ".join(dict.fromkeys(name for name, _ in asked))
            raise UsageError(f"{option} has no effect: none of the methods {names} has it.")
        if all(key in own for own in having):
            raise UsageError(
                f"{option} has no effect: every method that has it sets its own {key}; "
                "leave one of the two out."
            )
    return specs


def build_specs(methods: Iterable[str], overrides: Mapping[str, str | None]) -> list[MethodSpec]:
    """Make the specs of the methods asked for.

    Args:
        methods: `NAME` or `NAME:key=value,…`, as commas or repeats.
        overrides: text of each general option (`rank`, `chunk_size`, …); None where not given. It
            sets every method that has such a field, a method's own settings excepted.

    Raises:
        UsageError: unknown method or field, a bad value, an option that no method has, or the same
            cell twice.
    """
    specs = _apply(_split_methods(methods), {k: v for k, v in overrides.items() if v is not None})
    for a, b in itertools.combinations(specs, 2):
        if a == b:
            raise UsageError(f"The method '{a.cell}' was given twice with the same settings.")
    return specs


def grid(methods: Iterable[str], axes: Mapping[str, list[str]]) -> list[MethodSpec]:
    """Make every cell of a sweep: each combination of the axes' values, applied to each method.

    A method that has none of the axes appears once; methods that have an axis appear once per
    value of it. Raises UsageError as `build_specs` does, for every impossible cell.
    """
    asked, names = _split_methods(methods), list(axes)
    cells: dict[MethodSpec, None] = {}
    for values in itertools.product(*axes.values()):
        for spec in _apply(asked, dict(zip(names, values, strict=True))):
            cells.setdefault(spec)
    return list(cells)


def one_at_a_time(methods: Iterable[str], axes: Mapping[str, list[str]]) -> list[MethodSpec]:
    """Make a star of cells: the first value of every axis, and each further value by itself.

    Raises UsageError as `build_specs` does, for every impossible cell.
    """
    asked = _split_methods(methods)
    base = {name: values[0] for name, values in axes.items()}
    cells = dict.fromkeys(_apply(asked, base))
    for name, values in axes.items():
        for value in values[1:]:
            cells |= dict.fromkeys(_apply(asked, base | {name: value}))
    return list(cells)
