"""Check that every shared library in the image loads. Runs inside the image and prints one JSON line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOTS = (Path("/opt/python"), Path("/opt/embedded"), Path("/var/task"), Path("/app"))


def main() -> int:
    libraries = sorted(
        path for root in ROOTS for path in root.rglob("*.so*") if path.is_file() and not path.is_symlink()
    )
    missing = {}
    newest = (0, 0)
    for path in libraries:
        listing = subprocess.run(["ldd", path], capture_output=True, text=True, check=False)
        if unresolved := re.findall(r"^\s*(\S+) => not found", listing.stdout, re.MULTILINE):
            missing[str(path)] = unresolved
        versions = re.findall(rb"GLIBC_(\d+)\.(\d+)", path.read_bytes())
        newest = max([newest, *((int(major), int(minor)) for major, minor in versions)])
    report = {
        "libraries": len(libraries),
        "bytes": sum(path.stat().st_size for path in libraries),
        "missing": missing,
        "newest_glibc_required": ".".join(map(str, newest)),
        "glibc": os.confstr("CS_GNU_LIBC_VERSION"),
        "cpu_variants": [path.name for path in libraries if path.name.startswith("libggml-cpu")],
        "python": sys.version.split()[0],
    }
    print(json.dumps(report))
    return 1 if missing or not libraries else 0


if __name__ == "__main__":
    sys.exit(main())
