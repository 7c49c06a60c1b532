"""The import rule: core <- handlers <- adapters <- entry points, with one direction inside adapters."""

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

# The libraries of core's engine, templates and request types: no web framework and no AWS SDK.
CORE_LIBRARIES = {"msgspec", "jinja2", "llguidance", "jsonschema_rs", "numpy"}
HANDLER_LIBRARIES = {"msgspec"}

# What each folder or module of adapters may import from adapters, besides itself. A new one needs a line here.
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


def path_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    return path_name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(path): path for path in FILES}


def within(package: str) -> list[Path]:
    return [path for path in FILES if path_name(path).startswith(package + "/")]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(nodes: Iterator[ast.AST], path: Path) -> set[str]:
    """Return the names of imported modules, and of the names imported from them, in `nodes`."""
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
    """Return every module that a file imports, at its top or inside a function."""
    return imports(ast.walk(tree(path)), path)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run on import, without bodies of functions and `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from at_import(child)


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in modules(path)}


def third_party(path: Path) -> set[str]:
    return tops(path) - set(sys.stdlib_module_names) - set(OURS)


def part_of_adapters(module: str) -> str:
    """Return the folder or module of adapters that holds `module`, e.g. "s3" for adapters.s3.mirror.lock."""
    return module.split(".")[1]


@pytest.mark.parametrize("path", within("core"), ids=path_name)
def test_core_imports_only_its_own_libraries(path: Path) -> None:
    """They include no web framework and no AWS SDK. Only the engine imports llama_cpp."""
    allowed = CORE_LIBRARIES | ({"llama_cpp"} if path_name(path).startswith("core/engine/") else set())

    assert set() == third_party(path) - allowed
    assert set() == tops(path) & {"handlers", "adapters", "infra"}


@pytest.mark.parametrize("path", within("handlers"), ids=path_name)
def test_handlers_import_core_only(path: Path) -> None:
    """They import no framework, no llama_cpp and no adapter."""
    assert set() == third_party(path) - HANDLER_LIBRARIES
    assert set() == tops(path) & {"adapters", "infra"}


@pytest.mark.parametrize("path", within("adapters"), ids=path_name)
def test_adapters_import_public_names_only(path: Path) -> None:
    """Adapters import no private names, no llama_cpp and nothing from infra."""
    ours = {name for name in modules(path) if name.partition(".")[0] in OURS}

    assert set() == {
        name for name in ours if any(part.startswith("_") and part != "__init__" for part in name.split("."))
    }
    assert set() == tops(path) & {"llama_cpp", "infra"}


@pytest.mark.parametrize("path", within("adapters"), ids=path_name)
def test_adapters_import_in_one_direction(path: Path) -> None:
    """aws, transfer <- s3, huggingface <- wiring <- serving <- the entry points local, aws_lambda and bulk."""
    module = module_of(path)
    if module == "adapters":
        return
    part = part_of_adapters(module)
    others = {part_of_adapters(name) for name in modules(path) if name.startswith("adapters.")} - {part}

    assert set() == others - ADAPTERS[part]


def test_the_table_of_adapters_has_no_circle() -> None:
    """Each import in ADAPTERS points to a lower layer."""
    assert circles(ADAPTERS) == []


@pytest.mark.parametrize("path", FILES, ids=path_name)
def test_no_module_imports_an_entry_point(path: Path) -> None:
    """Shared code is in modules of its own; only tests import `__main__`."""
    assert set() == {name for name in modules(path) if "__main__" in name.split(".")}


@pytest.mark.parametrize("path", within("core") + within("handlers") + within("adapters"), ids=path_name)
def test_only_the_mirror_imports_boto3(path: Path) -> None:
    """boto3 takes a second to import, so a cold start reads S3 and secrets without it."""
    if not path_name(path).startswith("adapters/s3/mirror/"):
        assert "boto3" not in tops(path)


def test_imports_have_no_circle() -> None:
    """Any module of core, handlers or adapters can be imported first."""
    graph = {
        module: {name for name in imports(at_import(tree(path)), path) if name in MODULES and name != module}
        for module, path in MODULES.items()
        if not module.startswith("infra")
    }

    assert circles(graph) == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the first circle below each node of `graph` as a list of names."""
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


def test_circles_are_found() -> None:
    """This includes circles that begin below other modules."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]


def test_nothing_is_imported_from_tests() -> None:
    """Production code uses no fakes."""
    assert [path_name(path) for path in FILES if "tests" in tops(path)] == []
