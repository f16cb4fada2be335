"""The names of our folders are also names of packages: nothing in them may be importable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS_WITH_PAGES = ("docs", "kernels", "datasets", "results", "shadowkv_cli")
PAGES = [*ROOT.glob("*.md"), *(p for f in FOLDERS_WITH_PAGES for p in (ROOT / f).rglob("*.md"))]
FORBIDDEN_MODULES = {"datasets.py", "kernels.py", "types.py", "logging.py"}


@pytest.mark.parametrize("folder", ["kernels", "datasets", "results"])
def test_folder_holds_no_python(folder: str) -> None:
    found = [str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")]
    assert not found, f"{folder}/ would hide the package of that name: {found}"


def test_tests_are_no_package() -> None:
    found = [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("__init__.py")]
    assert not found


def test_no_conftest_puts_the_root_on_the_path() -> None:
    assert not (ROOT / "conftest.py").exists()


def test_no_module_hides_one_of_the_standard_library() -> None:
    modules = (ROOT / "shadowkv_cli").rglob("*.py")
    found = [str(path.relative_to(ROOT)) for path in modules if path.name in FORBIDDEN_MODULES]
    assert not found


def test_every_package_is_installed() -> None:
    import tomllib

    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = set(config["tool"]["setuptools"]["packages"])
    files = (ROOT / "shadowkv_cli").rglob("__init__.py")
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in files}
    assert declared == there, "pyproject.toml lists the packages by hand"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = page.parent / place if place else page
        assert linked.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, target
