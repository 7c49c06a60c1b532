"""Auth: keys, levels, peers and Host headers."""

import hashlib
from typing import Any

import pytest

from core.errors import Forbidden, Unauthorized
from core.settings import keys
from handlers import auth
from handlers.http import Request
from tests.fakes import fake_service

KEYED = {"api_keys": keys("use, other"), "admin_api_keys": keys("boss")}


def request_with(
    key: str | None = None,
    *,
    client: str | None = "127.0.0.1",
    host: str = "localhost:8000",
    direct: bool = False,
    **headers: str,
) -> Request:
    sent_headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        sent_headers["authorization"] = f"Bearer {key}"
    return Request("POST", "/x", "id", {"host": host, **sent_headers}, client=client, direct=direct)


def verdict(request: Request, access: auth.Access, **settings: Any) -> str:
    try:
        auth.authorize(fake_service(**settings).service, request, access)
    except Unauthorized:
        return "401"
    except Forbidden as error:
        return f"403 {error.code}" if error.code != "forbidden" else "403"
    return "ok"


@pytest.mark.parametrize(
    "headers",
    [
        {"x_api_key": "use"},
        {"authorization": "bearer use"},
        {"x_api_key": "use", "authorization": "AWS4-HMAC-SHA256 Credential=..."},
        {"x_api_key": "use", "authorization": "Bearer sdk-placeholder"},
    ],
)
def test_a_key_may_come_in_either_header(headers: dict[str, str]) -> None:
    """A client uses x-api-key if its authorization header holds an IAM signature or is set by an SDK."""
    assert verdict(request_with(**headers), "user", **KEYED) == "ok"


@pytest.mark.parametrize("header", ["Basic dXNl", "use", "Bearer", "Bearer  ", ""])
def test_only_a_bearer_token_is_a_key(header: str) -> None:
    """Other schemes and empty tokens are refused."""
    assert verdict(request_with(authorization=header), "user", **KEYED) == "401"


def test_a_hashed_key_works_like_a_plain_one() -> None:
    """The settings may hold SHA-256 digests instead of keys."""
    digest = hashlib.sha256(b"use").hexdigest()

    assert verdict(request_with("use"), "user", api_keys=keys(f"sha256:{digest}")) == "ok"
    assert verdict(request_with(digest), "user", api_keys=keys(f"sha256:{digest}")) == "401"


def test_open_routes_need_no_key() -> None:
    """/health answers without a key. `level` is "stranger" without a valid key."""
    service = fake_service(**KEYED).service

    assert verdict(request_with(), "open", **KEYED) == "ok"
    assert [auth.level(service, request_with(key)) for key in (None, "wrong", "use", "boss")] == [
        "stranger",
        "stranger",
        "user",
        "admin",
    ]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", "ok"),
        ("localhost:8000", "ok"),
        ("LOCALHOST.", "ok"),
        ("api.localhost:8000", "ok"),
        ("127.0.0.1:8000", "ok"),
        ("[::1]:8000", "ok"),
        ("192.168.1.7", "ok"),
        ("evil.example", "403 unknown_host"),
        ("localhost.evil.example", "403 unknown_host"),
        ("127.0.0.1.evil.example", "403 unknown_host"),
        ("", "403 unknown_host"),
        ("my-box:8000", "403 unknown_host"),
    ],
)
def test_without_keys_an_unknown_host_is_refused(host: str, expected: str) -> None:
    """A page on another site cannot reach the server through a hostname that it controls (DNS rebinding)."""
    assert expected == verdict(request_with(host=host), "user")


def test_allowed_hosts_or_keys_permit_other_host_names() -> None:
    """ALLOWED_HOSTS lists them and * allows any. With API keys set, the host is not checked."""
    assert verdict(request_with(host="my-box:8000"), "user", allowed_hosts=("My-Box",)) == "ok"
    assert verdict(request_with(host="my-box:8000"), "user", allowed_hosts=("*",)) == "ok"
    assert verdict(request_with("use", host="my-box"), "user", api_keys=keys("use")) == "ok"


def test_tenants_are_keys() -> None:
    """Two keys never share a prefix cache, the same key always does. The tenant's name does not contain the key."""
    service = fake_service(**KEYED).service
    names = [auth.tenant(service, request_with(key)) for key in ("use", "other", "boss", None)]

    assert len(set(names)) == 4
    assert names[0] == auth.tenant(service, request_with(x_api_key="use"))
    assert "use" not in names


def test_tenants_behind_iam_are_identities() -> None:
    """IAM identities never share a prefix cache, with or without a key. Direct invokes are a tenant of their own."""
    service = fake_service(iam_auth=True, **KEYED).service
    ann, bob = (Request("POST", "/x", "id", principal=f"arn:aws:iam::1:user/{name}") for name in ("ann", "bob"))
    names = [auth.tenant(service, request) for request in (ann, bob, request_with(direct=True))]

    assert names == ["arn:aws:iam::1:user/ann", "arn:aws:iam::1:user/bob", "direct"]
