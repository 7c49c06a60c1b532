"""The one import rule, read from the source: core <- handlers <- adapters <- entry points."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("core", "handlers", "adapters", "infra")
FILES = [path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))]

# What core's engine, templates and request types are built on. No web framework, no AWS.
CORE_LIBRARIES = {"msgspec", "jinja2", "llguidance", "jsonschema_rs", "numpy"}
HANDLER_LIBRARIES = {"msgspec"}


def modules(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in modules(path)}


def foreign(path: Path) -> set[str]:
    import sys

    return tops(path) - set(sys.stdlib_module_names) - set(OURS)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def within(package: str) -> list[Path]:
    return [path for path in FILES if named(path).startswith(package + "/")]


@pytest.mark.parametrize("path", within("core"), ids=named)
def test_core_imports_itself_and_its_engines_libraries(path: Path) -> None:
    """core knows no web framework, no AWS, no handler and no adapter; llama_cpp is the engine's alone."""
    allowed = CORE_LIBRARIES | ({"llama_cpp"} if named(path).startswith("core/engine/") else set())

    assert set() == foreign(path) - allowed
    assert set() == tops(path) & {"handlers", "adapters", "infra"}


@pytest.mark.parametrize("path", within("handlers"), ids=named)
def test_handlers_import_core_only(path: Path) -> None:
    """Handlers are plain functions over core: no framework, no llama.cpp, no adapter."""
    assert set() == foreign(path) - HANDLER_LIBRARIES
    assert set() == tops(path) & {"adapters", "infra"}


@pytest.mark.parametrize("path", within("adapters"), ids=named)
def test_adapters_leave_the_engine_and_their_siblings_internals_alone(path: Path) -> None:
    """An adapter uses core's and handlers' public names and a sibling's, never what starts with an underscore, and
    never llama_cpp."""
    ours = {name for name in modules(path) if name.partition(".")[0] in OURS}

    assert set() == {name for name in ours if any(part.startswith("_") for part in name.split("."))}
    assert "llama_cpp" not in tops(path)
    assert "infra" not in tops(path)


def test_nothing_is_imported_from_tests() -> None:
    """Fakes stay in tests."""
    assert [named(path) for path in FILES if "tests" in tops(path)] == []
