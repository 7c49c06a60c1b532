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


def asking(
    key: str | None = None,
    *,
    client: str | None = "127.0.0.1",
    host: str = "localhost:8000",
    direct: bool = False,
    **headers: str,
) -> Request:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        named["authorization"] = f"Bearer {key}"
    return Request("POST", "/x", "id", {"host": host, **named}, client=client, direct=direct)


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
    """x-api-key serves those whose authorization header is taken by IAM or filled by an SDK."""
    assert verdict(asking(**headers), "user", **KEYED) == "ok"


@pytest.mark.parametrize("header", ["Basic dXNl", "use", "Bearer", "Bearer  ", ""])
def test_what_is_no_bearer_token_is_no_key(header: str) -> None:
    """Other schemes do not pass."""
    assert verdict(asking(authorization=header), "user", **KEYED) == "401"


def test_a_hashed_key_works_like_a_plain_one() -> None:
    """The settings may hold sha256 digests only."""
    digest = hashlib.sha256(b"use").hexdigest()

    assert verdict(asking("use"), "user", api_keys=keys(f"sha256:{digest}")) == "ok"
    assert verdict(asking(digest), "user", api_keys=keys(f"sha256:{digest}")) == "401"


def test_open_routes_need_no_key() -> None:
    """/health answers strangers, and knows them as such."""
    service = fake_service(**KEYED).service

    assert verdict(asking(), "open", **KEYED) == "ok"
    assert [auth.level(service, asking(key)) for key in (None, "wrong", "use", "boss")] == [
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
    """A page on another site cannot reach the server under a name of its own (DNS rebinding)."""
    assert expected == verdict(asking(host=host), "user")


def test_allowed_hosts_and_keys_let_other_names_in() -> None:
    """ALLOWED_HOSTS names them, * means any; with a key nobody needs to."""
    assert verdict(asking(host="my-box:8000"), "user", allowed_hosts=("My-Box",)) == "ok"
    assert verdict(asking(host="my-box:8000"), "user", allowed_hosts=("*",)) == "ok"
    assert verdict(asking("use", host="my-box"), "user", api_keys=keys("use")) == "ok"


def test_tenants_are_keys() -> None:
    """Two keys never share a prefix cache, the same key always does; the tenant's name is not the key."""
    service = fake_service(**KEYED).service
    names = [auth.tenant(service, asking(key)) for key in ("use", "other", "boss", None)]

    assert len(set(names)) == 4
    assert names[0] == auth.tenant(service, asking(x_api_key="use"))
    assert "use" not in names


def test_tenants_behind_iam_are_identities() -> None:
    """Two callers of an IAM-guarded URL never share a prefix cache, with or without a key; nor do direct invokes."""
    service = fake_service(iam_auth=True, **KEYED).service
    ann, bob = (Request("POST", "/x", "id", principal=f"arn:aws:iam::1:user/{name}") for name in ("ann", "bob"))
    names = [auth.tenant(service, request) for request in (ann, bob, asking(direct=True))]

    assert names == ["arn:aws:iam::1:user/ann", "arn:aws:iam::1:user/bob", "direct"]
