"""Run the examples and the documentation's commands against the real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx2 as httpx
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.http_server import QuietHandler, http_server

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/quickstart.md", "docs/extract.md")
BLOCK = re.compile(r"^```(sh|python|json)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "email": {"type": "string"}},
    "required": ["name", "email"],
    "additionalProperties": False,
}
AWS = {
    "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "secret/key",
    "AWS_SESSION_TOKEN": "token==",
}


def run(*command: str, **environ: str) -> str:
    """Run a program, which must succeed, and return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")} | environ
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


def commands(language: str, pattern: str) -> list[Any]:
    """Return the pages' blocks in `language` that match `pattern`, each with the block after it."""
    parameters = []
    for page in PAGES:
        blocks = BLOCK.findall((ROOT / page).read_text())
        for index, (block_language, block) in enumerate(blocks):
            if block_language == language and re.search(pattern, block):
                following = blocks[index + 1] if index + 1 < len(blocks) else ("", "")
                parameters.append(pytest.param(block, following, id=f"{page}:{index}"))
    return parameters


def test_the_pages_have_commands() -> None:
    """Otherwise the tests below would have no parameters."""
    assert len(commands("sh", "^curl ")) >= 3
    assert len(commands("python", "OpenAI")) >= 1


@pytest.mark.parametrize(("block", "following"), commands("sh", "^curl "))
def test_curl_commands_of_the_documentation_work(server: str, block: str, following: tuple[str, str]) -> None:
    """No answer is an error, and extractions return the data that the page shows."""
    answer = json.loads(run("bash", "-euc", block.replace(ADDRESS, server)))

    assert "error" not in answer
    if answer["object"] == "extraction":
        language, text = following
        assert language == "json"
        shown = json.loads(text)
        assert answer["data"] == shown.get("data", shown)
        assert answer["valid"]


@pytest.mark.parametrize(("block", "following"), commands("python", "OpenAI"))
def test_python_blocks_of_the_documentation_work(server: str, block: str, following: tuple[str, str]) -> None:
    """The program prints the model's answer."""
    assert run(sys.executable, "-c", block.replace(ADDRESS, server)).strip()


def shape(value: Any) -> Any:
    """Return the keys of a JSON value, without those that differ from start to start."""
    if isinstance(value, dict):
        return {key: None if key == "phases" else shape(inner) for key, inner in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value else None


def without_paths(answer: Any) -> Any:
    """Remove the paths from GET /models, which only administrators see. The tests are administrators."""
    for paths, key in ((answer["active"], "path"), (answer["active"]["config"], "model_path")):
        del paths[key]
    for key in ("reference", "path"):
        del answer["boot_info"][key]
    return answer


@pytest.mark.parametrize("route", ["GET /health", "GET /models", "GET /v1/models", "POST /v1/chat/completions"])
def test_answers_in_the_documentation_have_the_right_fields(server: str, route: str) -> None:
    """The example answers of docs/api.md have exactly the fields that the server sends."""
    section = (ROOT / "docs/api.md").read_text().partition(f"\n## {route}\n")[2].partition("\n## ")[0]
    documented = next(json.loads(block) for language, block in BLOCK.findall(section) if language == "json")
    method, path = route.split()
    body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 2} if method == "POST" else None

    answer = httpx.request(method, server + path, json=body, timeout=200).json()

    assert shape(documented) == shape(without_paths(answer) if path == "/models" else answer)


def test_chat_example(server: str) -> None:
    """examples/chat.py prints an answer."""
    assert run(sys.executable, "examples/chat.py", "Name three rivers.", OPENAI_BASE_URL=f"{server}/v1").strip()


def test_stream_example(server: str) -> None:
    """examples/stream.py prints an answer and then the number of its tokens."""
    output = run(sys.executable, "examples/stream.py", "Name three rivers.", OPENAI_BASE_URL=f"{server}/v1")

    text, tokens = re.fullmatch(r"(.+)\n\[(\d+) tokens\]\n", output, re.DOTALL).groups()  # type: ignore[union-attr]
    assert text.strip()
    assert 1 <= int(tokens) <= 64


def test_extract_folder_example(server: str, tmp_path: Path) -> None:
    """examples/extract_folder.py prints a line for each file. A failure does not stop the others."""
    (tmp_path / "a.txt").write_text("Please call Maria Lopez at 555-0134 or write to maria@example.com.")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").write_text("Write to John Miller, john@example.com.")

    output = run(sys.executable, "examples/extract_folder.py", str(tmp_path), json.dumps(SCHEMA), SLM_URL=server)

    lines = [json.loads(line) for line in output.splitlines()]
    assert [line["file"] for line in lines] == ["a.txt", "b.txt", "c.txt"]
    assert lines[0]["valid"]
    assert set(lines[0]["data"]) == {"name", "email"}
    assert "'text' must be" in lines[1]["error"]
    assert lines[2]["valid"]


def test_curl_example(server: str) -> None:
    """examples/curl.sh loads the model, streams a chat and extracts."""
    output = run("sh", "examples/curl.sh", SLM_URL=server)

    assert '"status":"ready"' in output
    assert "data: [DONE]" in output
    assert '"object":"extraction"' in output


class FunctionUrl(QuietHandler):
    """A proxy that acts as a function URL with AuthType AWS_IAM: it answers 403 unless the signature is right."""

    server_url: ClassVar[str]
    statuses: ClassVar[list[int]]

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["content-length"])))

    def _answer(self, body: bytes) -> None:
        status, content = 403, b'{"Message": "Forbidden"}'
        if self._is_signed(body):
            path = self.path.partition(".on.aws")[2]
            headers = {"content-type": self.headers["content-type"]} if body else {}
            answer = httpx.request(self.command, self.server_url + path, content=body, headers=headers, timeout=200)
            status, content = answer.status_code, answer.content
        self.statuses.append(status)
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _is_signed(self, body: bytes) -> bool:
        """Whether botocore computes the same signature for this request."""
        sent = self.headers["authorization"]
        names = sent.partition("SignedHeaders=")[2].partition(",")[0].split(";")
        headers = {name: self.headers[name] for name in names}
        request = AWSRequest(method=self.command, url=self.path, data=body, headers=headers)
        request.context["timestamp"] = self.headers["x-amz-date"]
        signer = SigV4Auth(Credentials(*AWS.values()), "lambda", "eu-central-1")
        text = signer.string_to_sign(request, signer.canonical_request(request))
        return sent.endswith(f"Signature={signer.signature(text, request)}")


@pytest.fixture
def function_url(server: str) -> Iterator[str]:
    """Yield the address of a proxy that acts as a function URL in front of the server."""
    FunctionUrl.server_url, FunctionUrl.statuses = server, []
    with http_server(FunctionUrl) as port:
        yield f"http://127.0.0.1:{port}"


def test_iam_client_example(function_url: str) -> None:
    """examples/iam_client.py signs its requests to a function URL and prints an answer."""
    url = "http://abc.lambda-url.eu-central-1.on.aws/v1"

    output = run(sys.executable, "-m", "examples.iam_client", url, **AWS, HTTP_PROXY=function_url)

    assert output.strip()
    assert FunctionUrl.statuses == [200, 200]
