"""All decisions of `handlers.auth` in one table, by server settings, credential, place and route."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from core.errors import ApiError
from core.service import Service
from core.settings import keys
from handlers import auth
from handlers.health import get_health
from handlers.http import Request
from tests.fakes import ScriptedEngine, fake_service

# Columns: `open` is GET /health, `wait` is GET /health?wait (which loads the model), `user` covers the routes that use
# the model, `admin` covers /load and /reload. "*" is any place.
#
# Places: here   a loopback peer without a proxy's header; no web page, or one of this server
#         away   another peer, an unknown peer, or a proxy's header; no web page
#         page   a page of another site, from anywhere
#         listed a page of an origin in CORS_ORIGINS, from anywhere
TABLE = """
server        credential    place   open  wait  user  admin

no keys       any key       here    ok    ok    ok    403
no keys       any key       away    ok    ok    ok    403
no keys       any key       page    ok    403   ok    403
no keys       any key       listed  ok    ok    ok    403
no keys       signed        *       ok    ok    ok    403
no keys       direct        *       ok    ok    ok    403

LOCAL_ADMIN   any key       here    ok    ok    ok    ok
LOCAL_ADMIN   any key       away    ok    ok    ok    403
LOCAL_ADMIN   any key       page    ok    403   ok    403
LOCAL_ADMIN   any key       listed  ok    ok    ok    403
LOCAL_ADMIN   signed        here    ok    ok    ok    ok
LOCAL_ADMIN   signed        away    ok    ok    ok    403
LOCAL_ADMIN   signed        page    ok    ok    ok    403
LOCAL_ADMIN   signed        listed  ok    ok    ok    403
LOCAL_ADMIN   direct        *       ok    ok    ok    403

user keys     none          *       ok    401   401   403
user keys     wrong         *       ok    401   401   403
user keys     user          *       ok    ok    ok    403
user keys     admin         *       ok    401   401   403
user keys     signed        *       ok    401   401   403
user keys     signed+user   *       ok    ok    ok    403
user keys     signed+admin  *       ok    401   401   403
user keys     direct        *       ok    ok    ok    403

admin keys    no admin key  here    ok    ok    ok    401
admin keys    no admin key  away    ok    ok    ok    401
admin keys    no admin key  page    ok    403   ok    401
admin keys    no admin key  listed  ok    ok    ok    401
admin keys    admin         *       ok    ok    ok    ok
admin keys    signed        *       ok    ok    ok    401
admin keys    signed+user   *       ok    ok    ok    401
admin keys    signed+admin  *       ok    ok    ok    ok
admin keys    direct        *       ok    ok    ok    403

both          none          *       ok    401   401   401
both          wrong         *       ok    401   401   401
both          user          *       ok    ok    ok    403
both          admin         *       ok    ok    ok    ok
both          signed        *       ok    401   401   401
both          signed+user   *       ok    ok    ok    403
both          signed+admin  *       ok    ok    ok    ok
both          direct        *       ok    ok    ok    403

IAM           any key       *       ok    401   403   403
IAM           signed        *       ok    ok    ok    403
IAM           signed+user   *       ok    ok    ok    403
IAM           signed+admin  *       ok    ok    ok    403
IAM           direct        *       ok    ok    ok    403

IAM+admin     any key       *       ok    401   403   403
IAM+admin     signed        *       ok    ok    ok    401
IAM+admin     signed+user   *       ok    ok    ok    401
IAM+admin     signed+admin  *       ok    ok    ok    ok
IAM+admin     direct        *       ok    ok    ok    403

IAM+both      any key       *       ok    401   403   403
IAM+both      signed        *       ok    401   401   401
IAM+both      signed+user   *       ok    ok    ok    403
IAM+both      signed+admin  *       ok    ok    ok    ok
IAM+both      direct        *       ok    ok    ok    403

DIRECT_ADMIN  none          *       ok    401   401   403
DIRECT_ADMIN  wrong         *       ok    401   401   403
DIRECT_ADMIN  user          *       ok    ok    ok    403
DIRECT_ADMIN  admin         *       ok    401   401   403
DIRECT_ADMIN  signed        *       ok    401   401   403
DIRECT_ADMIN  signed+user   *       ok    ok    ok    403
DIRECT_ADMIN  signed+admin  *       ok    401   401   403
DIRECT_ADMIN  direct        *       ok    ok    ok    ok
"""

LISTED, HOST = "https://app.example", "localhost:8000"
USER, ADMIN = {"api_keys": keys("use")}, {"admin_api_keys": keys("boss")}

# LOCAL_ADMIN is on wherever keys or IAM must keep it from having an effect.
SERVERS: dict[str, dict[str, Any]] = {
    "no keys": {"local_admin": False},
    "LOCAL_ADMIN": {"local_admin": True},
    "user keys": {"local_admin": True, **USER},
    "admin keys": {"local_admin": True, **ADMIN},
    "both": {"local_admin": True, **USER, **ADMIN},
    "IAM": {"local_admin": True, "iam_auth": True},
    "IAM+admin": {"local_admin": True, "iam_auth": True, **ADMIN},
    "IAM+both": {"local_admin": True, "iam_auth": True, **USER, **ADMIN},
    "DIRECT_ADMIN": {"direct_admin": True, **USER},
}
CREDENTIALS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "none": (None, {}),
    "wrong": ("guess", {}),
    "user": ("use", {}),
    "admin": ("boss", {}),
    "signed": (None, {"principal": "arn:aws:iam::1:user/ann"}),
    "signed+user": ("use", {"principal": "arn:aws:iam::1:user/ann"}),
    "signed+admin": ("boss", {"principal": "arn:aws:iam::1:user/ann"}),
    "direct": (None, {"direct": True}),
}
ALIASES = {
    "any key": {"none", "wrong", "user", "admin"},
    "no admin key": {"none", "wrong", "user"},
    "signed": {"signed"},
}
KEYLESS_SIGNED = {"signed", "signed+user", "signed+admin"}  # without configured keys, a key changes nothing
PEERS = ("127.0.0.1", "::1", "192.168.1.7", "::ffff:10.0.0.1", "not an address", None)
PROXIES: tuple[dict[str, str], ...] = (
    {},
    {"x-forwarded-for": "10.0.0.1"},
    {"x-forwarded-host": "a.example"},
    {"x-forwarded-proto": "https"},
    {"x-forwarded-anything": ""},
    {"forwarded": "for=10.0.0.1"},
    {"via": "1.1 proxy"},
    {"x-real-ip": "127.0.0.1"},
    {"cf-connecting-ip": "10.0.0.1"},
    {"true-client-ip": "10.0.0.1"},
    {"HTTP/1.0": ""},
)
NO_PAGE: tuple[dict[str, str], ...] = (
    {},
    {"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"},
    {"sec-fetch-site": "none"},
)
PAGES: tuple[dict[str, str], ...] = (
    {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
    {"origin": "https://evil.example"},
    {"origin": "http://localhost:3000", "sec-fetch-site": "same-site"},
    {"origin": f"http://{HOST}.evil.example"},
    {"origin": f"file://{HOST}"},
    {"origin": "null"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-origin, cross-site"},
)
LISTED_PAGES: tuple[dict[str, str], ...] = ({"origin": LISTED, "sec-fetch-site": "cross-site"}, {"origin": LISTED})


@dataclass(frozen=True)
class Row:
    server: str
    credential: str
    place: str
    verdicts: tuple[str, ...]  # open, wait, user, admin

    def matches(self, credential: str, place: str) -> bool:
        named = ALIASES.get(self.credential, {self.credential})
        if self.credential == "signed" and self.server in ("no keys", "LOCAL_ADMIN"):
            named = KEYLESS_SIGNED
        return credential in named and self.place in ("*", place)


ROWS = [
    Row(line[:14].strip(), line[14:28].strip(), *line[28:].split(maxsplit=1)[:1], tuple(line[28:].split()[1:]))
    for line in TABLE.strip().splitlines()[1:]
    if line
]


def situations() -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Yield each situation: the place, the request's peer and protocol, its headers."""
    for peer, proxy, page in itertools.product(PEERS, PROXIES, (*NO_PAGE, *PAGES, *LISTED_PAGES)):
        if page in LISTED_PAGES:
            place = "listed"
        elif page in PAGES:
            place = "page"
        else:
            place = "here" if peer in ("127.0.0.1", "::1") and not proxy else "away"
        headers = {name: value for name, value in proxy.items() if name != "HTTP/1.0"} | page
        yield place, {"client": peer, "http_version": "1.0" if "HTTP/1.0" in proxy else "1.1"}, headers


async def verdict(service: Service, column: str, fields: dict[str, Any], headers: dict[str, str]) -> str:
    try:
        if column == "wait":
            request = Request("GET", "/health", "id", headers, query={"wait": "0"}, **fields)
            auth.authorize(service, request, "open")
            await get_health(service, request)
        else:
            auth.authorize(service, Request("POST", "/x", "id", headers, **fields), column)  # type: ignore[arg-type]
    except ApiError as error:
        return str(error.status)
    return "ok"


@pytest.mark.parametrize("server", SERVERS)
def test_verdicts(server: str) -> None:
    """Each combination of credential, peer, proxy header, page and route matches one row and gets its verdict."""
    service = fake_service(ScriptedEngine(), cors_origins=(LISTED,), **SERVERS[server]).service
    rows = [row for row in ROWS if row.server == server]
    uses: Counter[Row] = Counter()

    async def check() -> None:
        for (name, (key, extra)), (place, fields, headers) in itertools.product(CREDENTIALS.items(), situations()):
            (row,) = (row for row in rows if row.matches(name, place))
            sent_headers = {"host": HOST, **headers, **({"authorization": f"Bearer {key}"} if key else {})}
            columns = ("open", "wait", "user", "admin")
            verdicts = tuple([await verdict(service, column, {**fields, **extra}, sent_headers) for column in columns])
            assert verdicts == row.verdicts, f"{row}: {name}, {fields}, {headers}"
            uses[row] += len(columns)

    asyncio.run(check())

    assert set(uses) == set(rows), "some rows match no situation"
    assert uses.total() >= 1000
