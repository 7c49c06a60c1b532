#!/usr/bin/env bash
# infra/install.sh VENV [EXTRAS]: install the dependencies into VENV; `make` calls it.
# llama-cpp-python comes as source and is compiled unless pip has built it before: that step shows how far it is.
set -euo pipefail

python="$1/bin/python"
log="$1/llama-cpp-python.log"
extras="${2:+[$2]}"

if ! "$python" -c 'import importlib.metadata as m; m.version("llama-cpp-python")' 2>/dev/null; then
  if ! { command -v cc && command -v c++; } >/dev/null; then
    echo "llama-cpp-python is compiled from source, which needs a C and a C++ compiler:"
    echo "  Debian, Ubuntu: apt install build-essential"
    echo "  Fedora:         dnf install gcc-c++ make"
    echo "  macOS:          xcode-select --install"
    exit 1
  fi >&2
  requirement=$("$python" - <<'EOF'
import tomllib
dependencies = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]
print(next(one for one in dependencies if one.startswith("llama-cpp-python")))
EOF
  )
  echo "Building llama-cpp-python: about 10 minutes on 2 cores, once. Everything the build says goes to $log"
  if ! "$python" -m pip install --verbose "$requirement" 2>&1 | tee "$log" | awk -v terminal="$([ -t 1 ] && echo 1)" '
    match($0, /\[[0-9]+\/[0-9]+\]/) {
      split(substr($0, RSTART + 1, RLENGTH - 2), step, "/")
      if (terminal) { printf "\r  compiled %d of %d", step[1], step[2]; shown = 1 }
      else if (step[1] % 25 == 0) printf "  compiled %d of %d\n", step[1], step[2]
      fflush()
    }
    END { if (shown) print "" }'
  then
    echo "The build failed; the last lines of $log:" >&2
    tail -n 20 "$log" >&2
    exit 1
  fi
fi

"$python" -m pip install --editable ".$extras"
