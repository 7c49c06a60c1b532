"""Files and functions that docs/ names exist, and the map of the layout names every folder."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
MAP = ROOT / "docs" / "architecture.md"

# `core/host.py`, `core/host.py:Host` or `core/host.py:Host.lease`.
REFERENCE = re.compile(r"`((?:core|handlers|adapters|infra|tests)/[\w./-]*\.py)(?::([A-Za-z_][\w.]*))?`")


def references(page: Path) -> list[tuple[str, str | None]]:
    """Return each reference on a page once, as (file, name in it or None)."""
    return sorted(
        {(match[1], match[2]) for match in REFERENCE.finditer(page.read_text())},
        key=lambda pair: (pair[0], pair[1] or ""),
    )


REFERENCES = [(page.name, file, name) for page in PAGES for file, name in references(page)]


@functools.cache
def names(path: Path) -> frozenset[str]:
    """Return what a file defines, as "function", "Class" and "Class.method"."""
    return frozenset(_defined(ast.parse(path.read_text()), ""))


def _defined(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name
        elif isinstance(child, ast.ClassDef):
            yield prefix + child.name
            yield from _defined(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from _defined(child, prefix)


@pytest.mark.parametrize(
    ("page", "file", "name"), REFERENCES, ids=[f"{page}-{file}:{name or ''}" for page, file, name in REFERENCES]
)
def test_files_and_functions_on_a_page_exist(page: str, file: str, name: str | None) -> None:
    """A rename in the source must change the page, too."""
    assert (ROOT / file).is_file(), f"docs/{page} names {file}, which does not exist"
    assert name is None or name in names(ROOT / file), f"docs/{page} names {name}, which {file} does not define"


def test_the_trace_has_twelve_steps() -> None:
    """The steps of the trace are numbered, and each names a function."""
    trace = MAP.read_text().split("## Trace of a streamed chat")[1].split("\n## ")[0]
    steps = re.findall(r"^(\d+)\. (.*)$", trace, re.MULTILINE)

    assert [int(number) for number, _ in steps] == list(range(1, 13))
    assert [number for number, text in steps if not any(name for _, name in REFERENCE.findall(text))] == []


def layout(page: str) -> list[str]:
    """Return the paths in the map, a code block in which each line is a name indented below its folder."""
    block = page.split("## Layers and the import rule")[1].split("```")[1]
    paths: list[str] = []
    folders: list[str] = []
    for line in block.strip("\n").splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        paths.append("".join(folders))
    return paths


def test_paths_in_the_map_exist() -> None:
    """The map has folders and modules."""
    paths = layout(MAP.read_text())

    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_map_names_every_folder_of_the_service() -> None:
    """A new package needs a line in the map."""
    folders = {
        path.parent.relative_to(ROOT).as_posix() + "/"
        for package in ("core", "handlers", "adapters")
        for path in (ROOT / package).rglob("*.py")
    }

    assert folders - set(layout(MAP.read_text())) == set()


def test_names_finds_functions_classes_and_methods(tmp_path: Path) -> None:
    """Inner functions are not listed."""
    file = tmp_path / "module.py"
    file.write_text("def outer():\n    def inner(): ...\n\n\nclass Kind:\n    async def method(self): ...\n")

    assert names(file) == {"outer", "Kind", "Kind.method"}
