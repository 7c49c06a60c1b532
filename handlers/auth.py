"""Auth: who is asking, and may they. Knows keys, peers and Host headers; no route and no body.

Three levels: a *stranger* may see that the service is up, a *user* may use the model, an *admin* may change it.
Keys are compared as digests in constant time and never logged.
"""

from __future__ import annotations

import ipaddress
from hashlib import sha256
from hmac import compare_digest
from typing import Literal

from core.errors import Forbidden, Unauthorized
from core.service import Service
from core.settings import Settings
from handlers.message import Request

Access = Literal["open", "user", "admin"]
Level = Literal["stranger", "user", "admin"]

_FORWARDED = ("x-forwarded-for", "forwarded", "x-real-ip")


def authorize(service: Service, request: Request, access: Access) -> None:
    """Let the request pass or raise Unauthorized (no or wrong key) or Forbidden (not with this key, not from here)."""
    settings = service.settings
    digest = _known_digest(settings, request)
    if digest is None and not request.trusted and not settings.api_keys and not settings.iam_auth:
        _check_host(settings, request)
    if access == "open":
        return
    granted = level(service, request)
    if access == "user" and granted == "stranger":
        raise Unauthorized(_key_problem(request))
    if access == "admin" and granted != "admin":
        if settings.admin_api_keys:
            if digest is None:
                raise Unauthorized(_key_problem(request))
            raise Forbidden(f"{request.path} needs an admin key (ADMIN_API_KEYS); the key given is for use only.")
        if settings.iam_auth or settings.api_keys:
            raise Forbidden(f"{request.path} is closed: set ADMIN_API_KEYS on the server and send one of them.")
        raise Forbidden(
            f"{request.path} without keys is for this machine only: call it from loopback, or set ADMIN_API_KEYS."
        )


def level(service: Service, request: Request) -> Level:
    """What the request may do. Without API_KEYS everyone is a user; without any key a loopback peer is an admin."""
    settings = service.settings
    digest = _known_digest(settings, request)
    if request.trusted or (digest is not None and digest in settings.admin_api_keys):
        return "admin"
    keyless = not settings.api_keys and not settings.admin_api_keys and not settings.iam_auth
    if keyless and _from_loopback(request):
        return "admin"
    return "stranger" if settings.api_keys and digest is None else "user"


def tenant(service: Service, request: Request) -> str:
    """Whose prefix cache this request may share: the digest of its key; "" for everyone without one."""
    if request.trusted:
        return "trusted"
    return _known_digest(service.settings, request) or ""


def _keys_given(request: Request) -> list[str]:
    """`x-api-key` and a Bearer token; an IAM signature lies in `authorization` too and is none of ours."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = [request.headers.get("x-api-key", ""), token.strip() if scheme.lower() == "bearer" else ""]
    return [key for key in given if key]


def _known_digest(settings: Settings, request: Request) -> str | None:
    """The digest of a given key if it is one of ours. Every key is compared, whatever matched before."""
    found = None
    for key in _keys_given(request):
        digest = sha256(key.encode()).hexdigest()
        for known in settings.api_keys | settings.admin_api_keys:
            if compare_digest(digest, known):
                found = found or digest
    return found


def _key_problem(request: Request) -> str:
    if not _keys_given(request):
        return "No API key given: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
    return "The API key given is not known here."


def _check_host(settings: Settings, request: Request) -> None:
    """Without keys a page on another site could reach us under a name of its own that resolves to this machine (DNS
    rebinding); its name stands in Host. An IP address cannot be rebound, and every browser sends Host."""
    host = request.headers.get("host")
    if host is None or _host_known(settings, host):
        return
    raise Forbidden(
        f"The Host {host[:80]!r} is not known here: use localhost or an IP address, add the name to ALLOWED_HOSTS, "
        "or set API_KEYS.",
        code="unknown_host",
    )


def _host_known(settings: Settings, host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    name = name.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    if "*" in settings.allowed_hosts or name in {allowed.lower() for allowed in settings.allowed_hosts}:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _from_loopback(request: Request) -> bool:
    """A proxy on this machine makes the whole world look like loopback; it says so in a header."""
    if request.client is None or any(name in request.headers for name in _FORWARDED):
        return False
    try:
        return ipaddress.ip_address(request.client).is_loopback
    except ValueError:
        return False
