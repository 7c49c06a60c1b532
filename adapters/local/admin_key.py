"""Generate the admin key of a local server without ADMIN_API_KEYS, and store it in MODELS_DIR.

A loopback address does not identify an administrator: a proxy on this machine and a web page in the user's browser also
connect from loopback. The key requires access to the user's files or to the server's output.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

NAME = ".admin-key"

_KEY = re.compile(r"[A-Za-z0-9_-]{32,100}")


def admin_key(folder: Path) -> tuple[str, Path | None]:
    """Return the stored key or a new one, and its file. The file is None if `folder` is not writable."""
    file = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # a second round reads the key of another server that wrote it first
            stored = _read(file)
            if stored is not None:
                return stored, file
            key = _new_key()
            if _write(file, key):
                return key, file
    except OSError:
        pass
    return _new_key(), None


def _read(file: Path) -> str | None:
    """Return the stored key. Remove a file that is not valid or that another user owns or can read."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:  # a symbolic link, or not readable
        file.unlink()
        return None
    with os.fdopen(descriptor, "rb") as opened:
        status = os.fstat(descriptor)
        private = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
        key = opened.read(200).decode("ascii", "replace").strip() if private else ""
    if _KEY.fullmatch(key):
        return key
    file.unlink()
    return None


def _write(file: Path, key: str) -> bool:
    """Create the file atomically, readable by this user only. Return False if it exists."""
    temporary = file.with_name(f"{NAME}.{os.urandom(8).hex()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as opened:
            opened.write(f"{key}\n")
        os.link(temporary, file)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def _new_key() -> str:
    import secrets  # 6 ms, which a start with a stored key need not pay

    return secrets.token_urlsafe(32)
