"""The service over real sockets: refusals, keys, CORS, streams, disconnects and logs."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest

from core.errors import ModelUnavailable
from core.settings import keys
from handlers import routes, sse
from handlers.http import Request, Response
from tests.fakes import FakeService, ScriptedEngine, fake_service
from tests.serving import serving

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def open_server() -> Iterator[tuple[FakeService, str]]:
    """Serve without keys and with a small limit of bodies."""
    fake = fake_service(max_body_bytes=2048)
    with serving(fake.service) as address:
        yield fake, address


@pytest.fixture(scope="module")
def keyed_server() -> Iterator[str]:
    with serving(fake_service(api_keys=keys("use"), admin_api_keys=keys("boss")).service) as address:
        yield address


def refused(answer: httpx.Response) -> tuple[int, str | None]:
    """Check the error envelope and return status and code."""
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith((".", "…"))
    return answer.status_code, error["code"]


def status_code_and_param(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    """Return status, code and the wrong parameter. A 400 without one has the beginning of its message."""
    status, code = refused(answer)
    error = answer.json()["error"]
    beginning = " ".join(error["message"].split()[:4]) if status == 400 else None
    return status, code, error["param"] or beginning


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "expected"),
    [
        ("GET", "/", {}, b"", (404, "not_found", None)),
        ("GET", "/v2/models", {}, b"", (404, "not_found", None)),
        ("GET", "/v1/models/", {}, b"", None),
        ("GET", "/%0Ahealth", {}, b"", (404, "not_found", None)),
        ("GET", "/v1/models/nope", {}, b"", (404, "model_not_found", "model")),
        ("GET", "/v1/models/../../etc/passwd", {}, b"", (404, "model_not_found", "model")),
        ("GET", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", {}, b"", (404, "model_not_found", "model")),
        ("DELETE", "/health", {}, b"", (405, "method_not_allowed", None)),
        ("GET", "/v1/chat/completions", {}, b"", (405, "method_not_allowed", None)),
        ("HEAD", "/reload", {}, b"", "405 without a body"),
        ("PROPFIND", "/health", {}, b"", (405, "method_not_allowed", None)),
        ("GET", "/health?wait=soon", {}, b"", (400, None, "wait")),
        ("GET", "/health?wait=-1", {}, b"", (400, None, "wait")),
        ("GET", "/health?wait=nan", {}, b"", (400, None, "wait")),
        ("GET", "/health", {"host": "evil.example"}, b"", (403, "unknown_host", None)),
        ("POST", "/reload", {}, b"{}", (415, "unsupported_media_type", None)),
        ("POST", "/reload", {"content-type": "text/plain"}, b"{}", (415, "unsupported_media_type", None)),
        (
            "POST",
            "/reload",
            {"content-type": "application/x-www-form-urlencoded"},
            b"a=b",
            (415, "unsupported_media_type", None),
        ),
        ("POST", "/reload", JSON, b"{", (400, None, "The body is not")),
        ("POST", "/reload", JSON, b"[1]", (400, None, "The body must be")),
        ("POST", "/reload", JSON, b'{"model_path": 5}', (400, None, "model_path")),
        ("POST", "/reload", JSON, b'{"model_path": ""}', (400, None, "model_path")),
        ("POST", "/reload", JSON, b'{"modelpath": "a.gguf"}', (400, None, "modelpath")),
        ("POST", "/reload", JSON, b'{"n_ctx": 5}', (400, None, "n_ctx")),
        ("POST", "/reload", JSON, b'{"n_ctx": "4096"}', (400, None, "n_ctx")),
        ("POST", "/reload", JSON, b'{"model_path": "../../etc/passwd"}', (400, None, "model_path")),
        ("POST", "/reload", JSON, b'{"model_path": "absent.gguf"}', (404, "model_not_found", "model_path")),
        ("POST", "/load", JSON, b"", (400, None, "The body is empty;")),
        ("POST", "/load", JSON, b"{}", (400, None, "repo_id")),
        ("POST", "/load", JSON, b'{"repo_id": "org/repo"}', (400, None, "filename")),
        ("POST", "/load", JSON, b'{"repo_id": "org", "filename": "a.gguf"}', (400, None, "repo_id")),
        ("POST", "/load", JSON, b'{"repo_id": "../x", "filename": "a.gguf"}', (400, None, "repo_id")),
        ("POST", "/load", JSON, b'{"repo_id": "org/repo", "filename": "../a.gguf"}', (400, None, "filename")),
        (
            "POST",
            "/load",
            JSON,
            b'{"repo_id": "org/repo", "filename": "a.gguf", "sha256": "abc"}',
            (400, None, "sha256"),
        ),
        (
            "POST",
            "/load",
            JSON,
            b'{"repo_id": "org/repo", "filename": "a.gguf", "sha256": "' + b"z" * 64 + b'"}',
            (400, None, "sha256"),
        ),
        (
            "POST",
            "/load",
            JSON,
            b'{"repo_id": "org/repo", "filename": "a.gguf", "branch": "main"}',
            (400, None, "branch"),
        ),
        (
            "POST",
            "/load",
            JSON,
            b'{"repo_id": "org/repo", "filename": "a.gguf", "reference": "hf://a/b/c.gguf"}',
            (400, None, "reference"),
        ),
        ("POST", "/load", JSON, b'{"reference": "a.gguf"}', (400, None, "reference")),
        ("POST", "/load", JSON, b'{"reference": "ftp://a/b"}', (400, None, "reference")),
        ("POST", "/load", JSON, b" " * 3000, (413, "request_too_large", None)),
    ],
)
def test_every_mistake_of_a_client_is_a_named_4xx(
    open_server: tuple[FakeService, str], method: str, path: str, headers: dict[str, str], body: bytes, expected: object
) -> None:
    """Every mistake has its own status and code, OpenAI's envelope and a request id."""
    fake, address = open_server
    # http.client sends the path unchanged; httpx would resolve the dots.
    answer = raw(address, method, path, headers, body)

    assert answer.headers["x-request-id"].startswith("req_")
    if expected is None:
        assert answer.status_code == 200
    elif expected == "405 without a body":
        assert (answer.status_code, answer.content) == (405, b"")
    else:
        assert expected == status_code_and_param(answer)
    assert (fake.host.leases, fake.host.swaps) == (0, [])


def raw(address: str, method: str, path: str, headers: dict[str, str], body: bytes) -> httpx.Response:
    import http.client

    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    try:
        connection.request(method, path, body=body or None, headers=headers)
        answer = connection.getresponse()
        return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())
    finally:
        connection.close()


def test_405_and_options_list_the_methods(open_server: tuple[FakeService, str]) -> None:
    """They are in the Allow header."""
    _, address = open_server

    assert httpx.post(f"{address}/health").headers["allow"] == "GET, HEAD, OPTIONS"
    options = httpx.options(f"{address}/load")
    assert (options.status_code, options.headers["allow"]) == (204, "POST, OPTIONS")
    assert httpx.options(f"{address}/nope").status_code == 404


def test_head_is_get_without_the_body(open_server: tuple[FakeService, str]) -> None:
    """Status and content-length are the same."""
    _, address = open_server
    head, get = httpx.head(f"{address}/v1/models"), httpx.get(f"{address}/v1/models")

    assert (200, b"", get.headers["content-length"]) == (head.status_code, head.content, head.headers["content-length"])


@pytest.mark.parametrize(
    ("path", "key", "expected"),
    [
        ("/v1/models", None, (401, "invalid_api_key")),
        ("/v1/models", "wrong", (401, "invalid_api_key")),
        ("/v1/models", "use", None),
        ("/v1/models", "boss", None),
        ("/health?wait=1", None, (401, "invalid_api_key")),
        ("/health", None, None),
    ],
)
def test_user_routes_need_a_key(
    keyed_server: str, path: str, key: str | None, expected: tuple[int, str] | None
) -> None:
    """Without a valid key the answer is a 401 with the scheme."""
    answer = httpx.get(keyed_server + path, headers={"authorization": f"Bearer {key}"} if key else {})

    if expected is None:
        assert answer.status_code == 200
    else:
        assert (expected, "Bearer") == (refused(answer), answer.headers["www-authenticate"])


@pytest.mark.parametrize("path", ["/load", "/reload"])
def test_admin_routes_need_an_admin_key(keyed_server: str, path: str) -> None:
    """No key is a 401 and a user's key is a 403, before the body is read."""
    statuses = {None: 401, "wrong": 401, "use": 403}

    for key, expected in statuses.items():
        headers = {"x-api-key": key} if key else {}
        assert httpx.post(keyed_server + path, content=b"not json", headers=headers).status_code == expected
    assert (
        refused(httpx.post(keyed_server + path, content=b"not json", headers={**JSON, "x-api-key": "boss"}))[0] == 400
    )


def test_a_chunked_body_is_limited(open_server: tuple[FakeService, str]) -> None:
    """It has no content-length. The 413 reaches a client that is still sending."""
    _, address = open_server

    def endless() -> Iterator[bytes]:
        for _ in range(6):
            yield b" " * 1000

    assert refused(httpx.post(f"{address}/load", content=endless(), headers=JSON)) == (413, "request_too_large")


def test_expect_100_continue_gets_the_refusal(open_server: tuple[FakeService, str]) -> None:
    """With a content-length over the limit, the answer is a 413 instead of 100 Continue."""
    place = urlsplit(open_server[1])
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        head = "POST /load HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999\r\nexpect: 100-continue\r\n"
        connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode())

        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_valid_request_id_is_echoed(open_server: tuple[FakeService, str]) -> None:
    """Ids that could break a header or a log line are replaced."""
    _, address = open_server
    ids = {sent: httpx.get(f"{address}/health", headers={"x-request-id": sent.encode()}).headers["x-request-id"]
           for sent in ("a-1_B.c", "x" * 128, "x" * 129, "a b", "é", "")}  # fmt: skip

    assert [sent for sent, returned in ids.items() if sent == returned] == ["a-1_B.c", "x" * 128]
    assert all(returned.startswith("req_") for sent, returned in ids.items() if sent != returned)


def test_cors_is_off_unless_set(open_server: tuple[FakeService, str]) -> None:
    """Without CORS_ORIGINS no CORS header is sent."""
    _, address = open_server
    answer = httpx.get(f"{address}/health", headers={"origin": "https://app.example"})

    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_cors_allows_the_configured_origins() -> None:
    """A preflight gets methods and headers. Errors have the header, too, so that a page can read them."""
    requested = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, x-stainless-lang",
    }
    with serving(fake_service(cors_origins=("https://app.example",), api_keys=keys("use")).service) as address:
        chat = f"{address}/v1/chat/completions"
        preflight = httpx.options(chat, headers={"origin": "https://app.example", **requested})
        stranger = httpx.options(chat, headers={"origin": "https://evil.example", **requested})
        refusal = httpx.get(f"{address}/v1/models", headers={"origin": "https://app.example"})

    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert preflight.headers["access-control-allow-headers"] == "authorization, x-stainless-lang"
    assert preflight.headers["access-control-allow-methods"] == "POST, OPTIONS"
    assert "access-control-allow-origin" not in stranger.headers
    assert (refusal.status_code, refusal.headers["access-control-allow-origin"]) == (401, "https://app.example")


class Probe:
    """Replacements of real handlers that count running work and cancellations."""

    def __init__(self) -> None:
        self.engine = ScriptedEngine(endless=True, delay=0.005)
        self.cancelled = 0

    async def stream(self, service: object, request: Request) -> Response:
        from core.engine.interface import GenerationRequest

        generation = self.engine.generate(GenerationRequest(prompt=(1,)))

        async def produce(send: sse.Send) -> None:
            try:
                async for delta in generation:
                    send({"text": delta.text})
            finally:
                generation.cancel()

        return await sse.stream(produce)

    async def slow(self, service: object, request: Request) -> Response:
        self.engine.running += 1
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.engine.running -= 1
        return Response(200)

    async def broken(self, service: object, request: Request) -> Response:
        raise RuntimeError("the database password is hunter2")

    async def unavailable(self, service: object, request: Request) -> Response:
        raise ModelUnavailable("The model is loading.", retry_after=7)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Probe, str]]:
    probe = Probe()
    handlers = {"get_health": probe.slow, "get_v1_models": probe.stream, "get_models": probe.broken}
    handlers["get_v1_model"] = probe.unavailable
    resolve = routes.Route.resolve
    monkeypatch.setattr(
        routes.Route, "resolve", lambda route: handlers.get(route.handler.partition(":")[2]) or resolve(route)
    )
    with serving(fake_service().service) as address:
        yield probe, address


def hang_up(address: str, path: str, *, after: int) -> None:
    """Send a request, read `after` bytes of the answer and close the connection."""
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        body = b""
        while len(body) < after:
            body += connection.recv(4096)


def until(true: object, seconds: float = 10) -> bool:
    assert callable(true)
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(true())


def test_twenty_abandoned_streams_leave_nothing_running(probe: tuple[Probe, str]) -> None:
    """A disconnect closes the Response, which cancels the generation. The server still answers."""
    handlers, address = probe
    for _ in range(20):
        hang_up(address, "/v1/models", after=300)

    assert len(handlers.engine.requests) == 20
    assert until(lambda: handlers.engine.running == 0)
    with httpx.stream("GET", f"{address}/v1/models") as answer:
        assert next(answer.iter_lines()).startswith("data: ")


def test_a_disconnect_cancels_a_waiting_request(probe: tuple[Probe, str]) -> None:
    """The answer would not have been streamed."""
    handlers, address = probe
    for _ in range(3):
        hang_up(address, "/health", after=0)

    assert until(lambda: handlers.cancelled == 3)
    assert handlers.engine.running == 0


def test_an_unexpected_exception_is_logged_and_not_sent(
    probe: tuple[Probe, str], caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets a fixed message with the request id of the log lines."""
    _, address = probe
    answer = httpx.get(f"{address}/models", headers={"x-request-id": "find-me"})

    assert refused(answer) == (500, "internal_error")
    assert "hunter2" not in answer.text
    assert "find-me" in answer.text
    assert "hunter2" in caplog.text


def test_retry_after_is_a_header(probe: tuple[Probe, str]) -> None:
    """SDKs wait for that many seconds."""
    _, address = probe
    answer = httpx.get(f"{address}/v1/models/any")

    assert (refused(answer), answer.headers["retry-after"]) == ((503, "model_unavailable"), "7")


def test_a_stream_is_not_buffered_and_ends_with_done(open_server: tuple[FakeService, str]) -> None:
    """/load with `stream` sends each event at once. The download continues when the first has arrived."""
    fake, address = open_server
    first_arrived = threading.Event()
    waited: list[bool] = []

    def fetch(progress: object, cancelled: object) -> None:
        assert callable(progress)
        progress(10, 1000)
        waited.append(first_arrived.wait(10))
        progress(1000, 1000)

    fake.store.on_fetch = fetch
    body = {"repo_id": "org/repo", "filename": "a.gguf", "stream": True}
    try:
        with httpx.stream("POST", f"{address}/load", json=body, timeout=20) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
            incoming = (line for line in answer.iter_lines() if line)
            lines = [next(incoming)]
            first_arrived.set()
            lines += incoming
    finally:
        first_arrived.set()
        fake.store.on_fetch = None

    assert waited == [True]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert events[0] == {"status": "downloading", "done_bytes": 10, "total_bytes": 1000}
    assert (events[-1]["status"], lines[-1]) == ("downloaded", "data: [DONE]")


def test_the_access_log_has_one_line_per_request(caplog: pytest.LogCaptureFixture) -> None:
    """It has the method, the encoded path without its query, status and time. A path cannot forge a second line."""
    caplog.set_level("INFO", logger="slm.access")
    with serving(fake_service().service) as address:
        raw(address, "GET", "/nope%0AGET%20/fake?key=secret", {}, b"")

    # The server has stopped, so all of its lines are here. There may be lines of other tests' servers, too.
    lines = [record.fields for record in caplog.records if "nope" in record.getMessage()]  # type: ignore[attr-defined]
    assert [{name: value for name, value in fields.items() if name != "ms"} for fields in lines] == [
        {"method": "GET", "path": "/nope%0AGET%20/fake", "status": 404}
    ]
    assert "secret" not in caplog.text


def test_keys_are_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    """This holds for valid and wrong keys, in any header, in the query and in bad requests, at any level."""
    caplog.set_level("DEBUG")
    good, admin, wrong = "good-key-3141", "admin-key-2718", "wrong-key-1618"
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()
    with serving(fake_service(api_keys=keys(good), admin_api_keys=keys(admin)).service) as address:
        for key in (good, admin, wrong):
            for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}, {"authorization": key}):
                raw(address, "GET", "/v1/models", headers, b"")
                raw(address, "POST", "/v1/chat/completions", {**JSON, **headers}, body)
                raw(address, "POST", "/reload", {**JSON, **headers}, b"{")
                raw(address, "GET", f"/health?wait=x&key={key}", headers, b"")

    logged = caplog.text + "".join(str(vars(record)) for record in caplog.records)
    assert len([record for record in caplog.records if record.name == "slm.access"]) >= 36
    assert [key for key in (good, admin, wrong) if key in logged] == []
