"""The import rule, read from the source: core <- handlers <- adapters <- entry points, and one way inside adapters."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("core", "handlers", "adapters", "infra")
FILES = [path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))]

# What core's engine, templates and request types are built on. No web framework, no AWS.
CORE_LIBRARIES = {"msgspec", "jinja2", "llguidance", "jsonschema_rs", "numpy"}
HANDLER_LIBRARIES = {"msgspec"}

# The folders and modules of adapters that each of them may import, besides itself. A new one needs a line here.
ADAPTERS = {
    "logs": set[str](),
    "transfer": set[str](),
    "aws": {"transfer"},
    "s3": {"aws", "transfer"},
    "huggingface": {"transfer"},
    "wiring": {"aws", "s3", "huggingface"},
    "serving": {"wiring"},
    "local": {"logs", "wiring", "serving"},
    "aws_lambda": {"logs", "aws", "wiring", "serving"},
    "bulk": {"logs", "wiring"},
}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    return named(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(path): path for path in FILES}


def within(package: str) -> list[Path]:
    return [path for path in FILES if named(path).startswith(package + "/")]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(nodes: Iterator[ast.AST], path: Path) -> set[str]:
    """The names of the modules, and of what is imported from them, in the import statements among `nodes`."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(str(node.module))
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def modules(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    return imports(ast.walk(tree(path)), path)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: not the bodies of functions, not `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from at_import(child)


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in modules(path)}


def foreign(path: Path) -> set[str]:
    return tops(path) - set(sys.stdlib_module_names) - set(OURS)


def part_of_adapters(module: str) -> str:
    """The folder or module of adapters that `module` belongs to, e.g. "s3" for adapters.s3.mirror.lock."""
    return module.split(".")[1]


@pytest.mark.parametrize("path", within("core"), ids=named)
def test_core_imports_itself_and_its_engines_libraries(path: Path) -> None:
    """core imports no web framework, no AWS SDK, no handler and no adapter; only its engine imports llama_cpp."""
    allowed = CORE_LIBRARIES | ({"llama_cpp"} if named(path).startswith("core/engine/") else set())

    assert set() == foreign(path) - allowed
    assert set() == tops(path) & {"handlers", "adapters", "infra"}


@pytest.mark.parametrize("path", within("handlers"), ids=named)
def test_handlers_import_core_only(path: Path) -> None:
    """Handlers are plain functions over core: no framework, no llama.cpp, no adapter."""
    assert set() == foreign(path) - HANDLER_LIBRARIES
    assert set() == tops(path) & {"adapters", "infra"}


@pytest.mark.parametrize("path", within("adapters"), ids=named)
def test_adapters_import_public_names_only(path: Path) -> None:
    """An adapter imports no name that starts with an underscore, no llama_cpp and nothing of infra."""
    ours = {name for name in modules(path) if name.partition(".")[0] in OURS}

    assert set() == {
        name for name in ours if any(part.startswith("_") and part != "__init__" for part in name.split("."))
    }
    assert set() == tops(path) & {"llama_cpp", "infra"}


@pytest.mark.parametrize("path", within("adapters"), ids=named)
def test_inside_adapters_the_arrows_go_one_way(path: Path) -> None:
    """aws, transfer <- s3, huggingface <- wiring <- serving <- the entry points local, aws_lambda and bulk."""
    module = module_of(path)
    if module == "adapters":
        return
    part = part_of_adapters(module)
    others = {part_of_adapters(name) for name in modules(path) if name.startswith("adapters.")} - {part}

    assert set() == others - ADAPTERS[part]


def test_the_arrows_inside_adapters_form_no_circle() -> None:
    """The table above is itself free of circles."""
    assert circles(ADAPTERS) == []


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_module_imports_an_entry_point(path: Path) -> None:
    """What an entry point shares with others is in a module of its own; only tests import `__main__`."""
    assert set() == {name for name in modules(path) if "__main__" in name.split(".")}


@pytest.mark.parametrize("path", within("core") + within("handlers") + within("adapters"), ids=named)
def test_only_the_mirror_imports_boto3(path: Path) -> None:
    """boto3 takes a second to import: a cold start reads S3 and secrets without it."""
    if not named(path).startswith("adapters/s3/mirror/"):
        assert "boto3" not in tops(path)


def test_modules_import_each_other_in_no_circle() -> None:
    """A module of core, handlers or adapters can be imported first, whichever it is."""
    graph = {
        module: {name for name in imports(at_import(tree(path)), path) if name in MODULES and name != module}
        for module, path in MODULES.items()
        if not module.startswith("infra")
    }

    assert circles(graph) == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The first circle below each node of `graph`, as the names along it."""
    finished: set[str] = set()
    all_circles: list[list[str]] = []

    def visit(name: str, above: list[str]) -> None:
        if name in above:
            all_circles.append([*above[above.index(name) :], name])
        elif name not in finished:
            for other in sorted(graph.get(name, ())):
                visit(other, [*above, name])
            finished.add(name)

    for name in sorted(graph):
        visit(name, [])
    return all_circles


def test_a_circle_is_seen() -> None:
    """The search above reports a circle, also one that begins below other modules."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]


def test_nothing_is_imported_from_tests() -> None:
    """Fakes stay in tests."""
    assert [named(path) for path in FILES if "tests" in tops(path)] == []
