"""Check API keys, the peer and the Host header.

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
from handlers.http import Request

Access = Literal["open", "user", "metrics", "admin"]
Level = Literal["stranger", "user", "admin"]

_PROXIES = frozenset(("forwarded", "via", "x-real-ip", "cf-connecting-ip", "true-client-ip"))
_ADMIN_KEY = "an admin key: one of ADMIN_API_KEYS, or the one that the server printed when it started"


def authorize(service: Service, request: Request, access: Access) -> None:
    """Return if the request may pass. Raise Unauthorized without a valid key, Forbidden if another rule forbids it."""
    settings = service.settings
    digest = _valid_digest(settings, request)
    may_scrape = access == "metrics" and _matching(request, settings.metrics_keys) is not None
    if digest is None and not may_scrape and not request.direct and not settings.api_keys and not settings.iam_auth:
        _check_host(settings, request)
    if access == "open":
        return
    if _lacks_identity(settings, request):
        raise Forbidden(
            "IAM_AUTH=true, and this request carries no IAM identity: set the function URL's AuthType to AWS_IAM and "
            "sign the request, or set API_KEYS and IAM_AUTH=false.",
            code="no_iam_identity",
        )
    if may_scrape:
        return
    granted = level(service, request)
    if access == "user" and granted == "stranger":
        raise Unauthorized(_key_problem(request))
    if access == "admin" and granted != "admin":
        raise _not_an_admin(settings, request, digest)
    if access == "metrics" and granted != "admin":
        raise _may_not_scrape(settings, request, digest)


def level(service: Service, request: Request) -> Level:
    """Return what the request may do.

    Without API_KEYS every request has the level "user". "admin" needs an admin key, LOCAL_ADMIN or DIRECT_ADMIN.
    """
    settings = service.settings
    if _lacks_identity(settings, request):
        return "stranger"
    digest = _valid_digest(settings, request)
    if digest is not None and digest in settings.admin_api_keys:
        return "admin"
    if request.direct:
        return "admin" if settings.direct_admin else "user"
    if settings.local_admin and not _guarded(settings) and _is_local(request):
        return "admin"
    return "stranger" if settings.api_keys and digest is None else "user"


def tenant(service: Service, request: Request) -> str:
    """Return the tenant whose cached prefixes this request may reuse.

    It is the IAM identity's ARN or the digest of the key. Requests with neither share the tenant "".
    """
    if request.direct:
        return "direct"
    return request.principal or _valid_digest(service.settings, request) or ""


def check_site(service: Service, request: Request) -> None:
    """Raise Forbidden if a page of another site caused this request. Browsers load an `<img src>` without a preflight.

    A key or an IAM signature shows that the request is deliberate. Sites in CORS_ORIGINS may always call.
    """
    settings = service.settings
    deliberate = request.direct or request.principal is not None or _valid_digest(settings, request) is not None
    if not deliberate and cross_site(request) and request.headers.get("origin") not in settings.cors_origins:
        raise Forbidden(
            f"A page of another site may not call {request.path} with these parameters: send an API key, or add the "
            "page's origin to CORS_ORIGINS.",
            code="cross_site",
        )


def cross_site(request: Request) -> bool:
    """Return whether a browser's headers say that a page of another origin made this request."""
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return True
    origin = request.headers.get("origin")
    if origin is None:
        return False
    scheme, _, host = origin.lower().partition("://")
    return scheme not in ("http", "https") or host != request.headers.get("host", "").lower()


def _guarded(settings: Settings) -> bool:
    return bool(settings.api_keys or settings.admin_api_keys or settings.iam_auth)


def _lacks_identity(settings: Settings, request: Request) -> bool:
    """Return whether IAM_AUTH=true but the platform sent no identity, so that IAM does not guard this URL."""
    return settings.iam_auth and not request.direct and request.principal is None


def _not_an_admin(settings: Settings, request: Request, digest: str | None) -> Unauthorized | Forbidden:
    path = request.path
    if request.direct:
        return Forbidden(f"{path} by a direct invoke needs DIRECT_ADMIN=true on the function.")
    if settings.admin_api_keys:
        if digest is None:
            return Unauthorized(f"{_key_problem(request)} {path} needs {_ADMIN_KEY}.")
        return Forbidden(f"{path} needs {_ADMIN_KEY}; this key is not an admin key.")
    if settings.local_admin and not _guarded(settings):
        return Forbidden(
            f"{path} without keys is only allowed from this machine (LOCAL_ADMIN): call it from loopback, without a "
            "proxy and not from another site's page, or set ADMIN_API_KEYS."
        )
    return Forbidden(f"{path} needs an admin key: set ADMIN_API_KEYS on the server and send one of them.")


def _may_not_scrape(settings: Settings, request: Request, digest: str | None) -> Unauthorized | Forbidden:
    path = request.path
    if settings.metrics_keys and not request.direct:
        if digest is None:
            return Unauthorized(f"{_key_problem(request)} {path} needs one of METRICS_KEYS or ADMIN_API_KEYS.")
        return Forbidden(f"{path} needs one of METRICS_KEYS or ADMIN_API_KEYS; this key is neither.")
    error = _not_an_admin(settings, request, digest)
    return type(error)(f"{error.message} METRICS_KEYS sets keys that may read {path} and nothing else.")


def _request_keys(request: Request) -> list[str]:
    """Return the keys of `x-api-key` and of a Bearer token. `authorization` may hold an IAM signature instead."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    keys = [request.headers.get("x-api-key", ""), token.strip() if scheme.lower() == "bearer" else ""]
    return [key for key in keys if key]


def _valid_digest(settings: Settings, request: Request) -> str | None:
    """Return the digest of a key that may use the model, or None."""
    return _matching(request, settings.api_keys | settings.admin_api_keys)


def _matching(request: Request, digests: frozenset[str]) -> str | None:
    """Return the digest of the request's key if it is in `digests`. Compares all, also after a match: constant time."""
    matching = None
    for key in _request_keys(request):
        digest = sha256(key.encode()).hexdigest()
        for accepted in digests:
            if compare_digest(digest, accepted):
                matching = matching or digest
    return matching


def _key_problem(request: Request) -> str:
    if not _request_keys(request):
        return "No API key given: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
    return "The API key is not valid."


def _check_host(settings: Settings, request: Request) -> None:
    """Raise Forbidden if the Host header is a name that is not allowed.

    Without keys, another site's page could reach this server through a name of its own that resolves to this machine
    (DNS rebinding). Its Host is then that name. An IP address cannot be rebound, and every browser sends Host.
    """
    host = request.headers.get("host")
    if host is None or _is_host_allowed(settings, host):
        return
    raise Forbidden(
        f"The Host {host[:80]!r} is not allowed: use localhost or an IP address, add the name to ALLOWED_HOSTS, "
        "or set API_KEYS.",
        code="unknown_host",
    )


def _is_host_allowed(settings: Settings, host: str) -> bool:
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


def _is_local(request: Request) -> bool:
    """Return whether the request comes from this machine and neither from a proxy nor from another site's page.

    A local proxy and a browser also connect from a loopback address. Most proxies add a header or speak HTTP/1.0, and
    browsers send the page's origin.
    """
    if request.client is None or _is_proxied(request) or cross_site(request):
        return False
    try:
        return ipaddress.ip_address(request.client).is_loopback
    except ValueError:
        return False


def _is_proxied(request: Request) -> bool:
    named = any(name in _PROXIES or name.startswith("x-forwarded-") for name in request.headers)
    return named or request.http_version == "1.0"
