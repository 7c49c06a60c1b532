"""Our signer equals botocore's, header by header."""

import calendar
import datetime
import hashlib
from unittest import mock
from urllib.parse import quote, urlencode

import pytest
from botocore import auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotocoreCredentials
from hypothesis import given
from hypothesis import strategies as st

from adapters.aws.sigv4 import EMPTY_SHA256, Credentials, quote_key, sign

NOW = datetime.datetime(2026, 11, 22, 1, 2, 3)
KEY = "AKIDEXAMPLE"
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


def botocore_headers(method, url, headers, body, service, token=None, unsigned=False):
    request = AWSRequest(method=method, url=url, headers=dict(headers), data=body)
    request.context["payload_signing_enabled"] = not unsigned
    signer = auth.S3SigV4Auth if service == "s3" else auth.SigV4Auth
    with mock.patch.object(auth, "get_current_datetime", return_value=NOW):
        signer(BotocoreCredentials(KEY, SECRET, token), service, "eu-central-1").add_auth(request)
    return {name.lower(): value for name, value in request.headers.items()}


def our_headers(method, url, headers, body, service, token=None, payload_hash=None):
    if payload_hash is None:
        payload_hash = hashlib.sha256(body or b"").hexdigest()
    now = calendar.timegm(NOW.timetuple())
    credentials = Credentials(KEY, SECRET, token)
    return sign(method, url, headers, payload_hash, credentials, "eu-central-1", service, now)


def same(ours, theirs):
    ours = {name: value for name, value in ours.items() if name != "host"}
    assert theirs == ours


ODD_KEYS = [
    "models/org/repo/abc/model.gguf",
    "a b/c d.gguf",
    "größe/模型-ü.gguf",
    "plus+plus/equals=.gguf",
    "double//slash//.gguf",
    "tilde~/dot./../x/./y",
    "percent%20/%2F.gguf",
    "star*(paren)'quote\"!$&,;:@.gguf",
    "",
    "ends/with/",
]


@pytest.mark.parametrize("key", ODD_KEYS)
@pytest.mark.parametrize("token", [None, "FwoGZXIvYXdzE+/=="])
def test_s3_keys_are_signed_as_by_botocore(key, token):
    """This holds with and without a session token."""
    url = f"https://bucket.s3.eu-central-1.amazonaws.com/{quote_key(key)}"
    headers = {"Range": "bytes=0-99", "If-Match": '"etag"'}

    same(our_headers("GET", url, headers, None, "s3", token), botocore_headers("GET", url, headers, None, "s3", token))


@pytest.mark.parametrize("path", ["", "/", "/a b", "/a%20b", "/a/../b//c/", "/ü/./~x/..", "/..", "/a/.", "/+%2B"])
def test_paths_of_other_services_are_normalised(path):
    """Services other than S3 also encode them twice."""
    url = f"https://secretsmanager.eu-central-1.amazonaws.com{path}"

    same(
        our_headers("POST", url, {}, b"{}", "secretsmanager"),
        botocore_headers("POST", url, {}, b"{}", "secretsmanager"),
    )


@pytest.mark.parametrize(
    "query",
    ["a=b", "b=2&a=1", "a=2&a=1", "uploads", "uploads=", "prefix=a%2Fb%20c&list-type=2", "A=1&a=1", "x=%7E&x-amz=~"],
)
@pytest.mark.parametrize("service", ["s3", "execute-api"])
def test_query_strings_are_sorted(query, service):
    """They are sorted by encoded name and value, in S3 and elsewhere."""
    url = f"https://example.amazonaws.com/x?{query}"

    same(our_headers("GET", url, {}, None, service), botocore_headers("GET", url, {}, None, service))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9000/bucket/key",
        "http://minio:80/bucket/key",
        "https://minio:443/bucket/key",
        "https://minio:80/bucket/key",
        "http://[::1]:9000/bucket/key",
        "https://UPPER.example.com/Key",
    ],
)
def test_the_signed_host_has_no_default_port(url):
    """Other ports are part of it."""
    same(our_headers("GET", url, {}, None, "s3"), botocore_headers("GET", url, {}, None, "s3"))


def test_header_values_are_trimmed():
    """Headers that proxies change are not signed."""
    url = "https://secretsmanager.eu-central-1.amazonaws.com/"
    headers = {
        "X-Amz-Target": "secretsmanager.GetSecretValue",
        "Content-Type": "application/x-amz-json-1.1",
        "X-Spaces": "  a   b  ",
        "User-Agent": "me",
        "Transfer-Encoding": "identity",
        "X-Amzn-Trace-Id": "Root=1",
    }
    ours = our_headers("POST", url, headers, b"{}", "secretsmanager", "token")

    same(ours, botocore_headers("POST", url, headers, b"{}", "secretsmanager", "token"))
    assert "user-agent" not in ours["authorization"]


def test_an_s3_body_may_be_unsigned():
    """UNSIGNED-PAYLOAD replaces its hash."""
    url = "https://bucket.s3.amazonaws.com/key"
    headers = {"Content-MD5": "hBotaJrYa9FiFQ0mphc5fA=="}  # botocore signs the body unless a checksum goes with it
    ours = our_headers("PUT", url, headers, None, "s3", payload_hash="UNSIGNED-PAYLOAD")

    same(ours, botocore_headers("PUT", url, headers, b"body", "s3", unsigned=True))


def test_a_retry_replaces_the_signature():
    """Signing signed headers again gives the same result."""
    url = "https://bucket.s3.amazonaws.com/key"
    once = our_headers("GET", url, {"Range": "bytes=0-1"}, None, "s3", "token")

    assert once == our_headers("GET", url, once, None, "s3", "token")


@given(key=st.text(st.characters(exclude_categories=["Cs"]), max_size=40), name=st.text("aZ0-_.~ +/=&ü%", max_size=9))
def test_random_keys_and_queries_are_signed_as_by_botocore(key, name):
    """Keys and query values are arbitrary text."""
    query = urlencode({"prefix": name, "a": key}, safe="~", quote_via=quote)
    url = f"https://b.s3.eu-central-1.amazonaws.com/x/{quote_key(key)}?{query}"

    same(our_headers("GET", url, {}, None, "s3"), botocore_headers("GET", url, {}, None, "s3"))


def test_the_repr_of_credentials_hides_secrets():
    """It may end up in a log, so it has the access key ID only."""
    shown = repr(Credentials(KEY, SECRET, "the-token"))

    assert KEY in shown
    assert SECRET not in shown
    assert "the-token" not in shown


def test_the_hash_of_an_empty_body_is_botocores():
    """EMPTY_SHA256 is for requests without a body."""
    assert auth.EMPTY_SHA256_HASH == EMPTY_SHA256
