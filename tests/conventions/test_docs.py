"""The documentation agrees with the code: links, commands, names and the tables of docs/api.md."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import urllib.parse
from pathlib import Path

import pytest

from core.errors import ApiError
from core.extract import ExtractRequest
from core.load import LoadRequest
from core.reload import ReloadRequest
from core.wire.chat import ChatRequest
from core.wire.completions import CompletionRequest
from core.wire.fields import UnsupportedFields
from handlers.routes import ROUTES
from infra import fields_table
from infra.bench.__main__ import names as benchmarks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
API = (ROOT / "docs/api.md").read_text()

LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
# The changelog also names settings and files of earlier versions.
current_pages = pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT))
)


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def code(page: Path) -> str:
    """Return the code of a page: its fenced blocks and its code spans, one per line."""
    text = page.read_text()
    return "\n".join([block for _, block in FENCE.findall(text)] + CODE.findall(FENCE.sub("", text)))


def blocks(page: Path, language: str) -> list[str]:
    return [block for name, block in FENCE.findall(page.read_text()) if name == language]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub derives from a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(heading: str, columns: int) -> list[list[str]]:
    """Return the body of the first table with `columns` columns below a heading of docs/api.md."""
    section = API.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line[:1] == "|"]
    return [row for row in rows if len(row) == columns][2:]


@pages
def test_internal_links_resolve(page: Path) -> None:
    """Files that are linked exist, and anchors are headings in them."""
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = urllib.parse.unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading; there are {sorted(anchors(target))}"


@pages
def test_every_make_target_exists(page: Path) -> None:
    """Targets in `make TARGET` are in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text() if page.name == "CHANGELOG.md" else code(page)
    mentioned = set(re.findall(r"(?:^|`)make (?:[A-Z_]+=\S+ )*([a-z][a-z-]*)", text, re.MULTILINE))

    assert mentioned <= targets


@pages
def test_every_module_exists(page: Path) -> None:
    """Modules after `python -m` and the named benchmarks exist."""
    for module in re.findall(r"python[\d.]* -m ([a-z_][\w.]*)", code(page)):
        if module != "llama_cpp.server":  # needs packages that this project does not install
            assert importlib.util.find_spec(module.removesuffix(".__main__")) is not None, module
    for benchmark in re.findall(r"-m infra\.bench ([a-z_]+)", code(page)):
        assert benchmark in benchmarks()


@current_pages
def test_every_path_exists(page: Path) -> None:
    """Files in code spans are in the repository."""
    for span in CODE.findall(prose(page)):
        if match := re.fullmatch(r"((?:core|handlers|adapters|infra|tests|docs|examples)/[\w./-]*\w)(?::\S+)?", span):
            assert (ROOT / match[1]).exists(), span


@current_pages
def test_every_name_in_capitals_exists(page: Path) -> None:
    """Settings, build arguments and constants on a page are in the code, so a rename is noticed."""
    names = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", code(page)))
    names |= set(re.findall(r"\b([A-Z][A-Z0-9]+)=", code(page)))
    names = {name for name in names if not re.match(r"I?Q\d", name)}  # quantisations
    files = subprocess.run(
        ["git", "grep", "-hIE", "[A-Z]{2}", "--", "*", ":!*.md", ":!tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if files.returncode != 0:
        pytest.skip("not a git checkout")
    defined = set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", files.stdout)) | {"PIP_EXTRA_INDEX_URL"}

    assert names <= defined


@pages
def test_blocks_are_well_formed(page: Path) -> None:
    """Python, shell and JSON blocks pass a syntax check."""
    for block in blocks(page, "python"):
        ast.parse(block)
    for block in blocks(page, "json"):
        json.loads(block)
    for block in blocks(page, "sh"):
        subprocess.run(["bash", "-n"], input=re.sub(r"<[^<>\n]+>", "x", block), text=True, check=True)


def test_the_readme_is_one_page() -> None:
    """Details belong into docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_readme_links_to_every_page() -> None:
    """Otherwise a page is not read."""
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall(prose(ROOT / "README.md"))}

    assert set(PAGES) - {ROOT / "README.md"} <= linked


def test_the_table_of_errors_matches_the_classes() -> None:
    """docs/api.md has the status, type and code of every error class."""

    def classes(error: type[ApiError]) -> list[type[ApiError]]:
        return [error, *(inner for child in error.__subclasses__() for inner in classes(child))]

    rows = {tuple(cell.strip("`") for cell in row[:4]) for row in table("Errors", 5)}
    errors = {error for error in classes(ApiError) if error.__module__ == "core.errors"}

    assert rows == {(error.__name__, str(error.status), error.type, error.code or "null") for error in errors}


def test_the_table_of_routes_matches_the_code() -> None:
    """docs/api.md has every route with its access."""
    rows = re.findall(r"^\| \[`(\w+) ([^`]+)`\]\(\S+\) \| .+ \| (\w+) \|$", API, re.MULTILINE)
    routes = {(route.method, route.path, route.access) for route in ROUTES}

    whole_rest = {"/v1/models/{id}": "/v1/models/"}  # an id with slashes is the rest of the path
    documented = {(method, whole_rest.get(path, path), access) for method, path, access in rows}
    handlers = {(route.method, route.path): route.handler for route in ROUTES}
    aliases = {
        (method, path, access)
        for method, path, access in routes
        if handlers[method, path] == handlers.get((method, f"/v1{path}"))
    }
    assert documented | aliases == routes


def test_the_table_of_fields_is_generated() -> None:
    """It equals the output of `python -m infra.fields_table`, so that every field of a request is in it."""
    assert fields_table.page(API) == API
    assert set(ChatRequest.__struct_fields__) <= set(CODE.findall(fields_table.table()))


def test_the_fields_of_completions_are_listed() -> None:
    """The table of /v1/completions has the request's own fields."""
    named = [name for row in table("POST /v1/completions", 4) for name in CODE.findall(row[0])]
    own = set(CompletionRequest.__struct_fields__) - (set(UnsupportedFields.__struct_fields__) - {"best_of"})

    assert sorted(named) == sorted(own)


@pytest.mark.parametrize(("heading", "request_type"), [("POST /load", LoadRequest), ("POST /reload", ReloadRequest)])
def test_the_fields_of_load_and_reload_are_listed(heading: str, request_type: type) -> None:
    """Their tables have exactly the request's fields."""
    documented = [name for row in table(heading, 3) for name in CODE.findall(row[0])]

    assert sorted(documented) == sorted(request_type.__struct_fields__)


def test_the_fields_of_extract_are_listed() -> None:
    """The table of docs/extract.md has exactly the request's fields."""
    section = (ROOT / "docs/extract.md").read_text().partition("## Request")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)

    assert sorted(documented) == sorted(ExtractRequest.__struct_fields__)
