"""Admin key: what a local server without ADMIN_API_KEYS makes for itself and keeps in MODELS_DIR.

An address proves nothing: a proxy on this machine, and a page in its user's browser, call from loopback. Whoever can
read this user's files, or the server's first lines, may load and reload.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

NAME = ".admin-key"

_KEY = re.compile(r"[A-Za-z0-9_-]{32,100}")


def admin_key(folder: Path) -> tuple[str, Path | None]:
    """The kept key, or a new one, and the file that holds it: None if `folder` takes no file, then the key ends with
    the process."""
    file = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # another server on this folder may be faster: then its key is this one's, too
            kept = _read(file)
            if kept is not None:
                return kept, file
            key = secrets.token_urlsafe(32)
            if _write(file, key):
                return key, file
    except OSError:
        pass
    return secrets.token_urlsafe(32), None


def _read(file: Path) -> str | None:
    """The key, if the file is ours, readable by nobody else and holds one. Removes a file that is not."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:  # a link, or not readable by us
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
    """Put the key there at once and whole, for this user only. False if a file is there already."""
    temporary = file.with_name(f"{NAME}.{secrets.token_hex(8)}")
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
