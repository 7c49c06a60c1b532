#!/bin/sh
# slim_install.sh SITE_PACKAGES: leave what is needed to run. Called by the Dockerfiles while they build.
# Of llama-cpp-python's libraries (the wheel holds each six times) stays one copy, under the name the others ask for
# (libggml.so.0), with a link under the name Python asks for (libllama.so). The CPU variants and the OpenMP runtime, which
# Amazon's base image lacks, lie beside them, where their run path ($ORIGIN) and core/engine/native.py look.
set -eu
cd "$1"

libs=llama_cpp/lib
find bin -name 'libggml-*.so' -exec mv {} "$libs/" \; 2>/dev/null || true # there is none without GGML_BACKEND_DL
rm -rf bin lib include "$libs"/libmtmd*
for real in "$libs"/*.so.*.*.*; do
  [ -e "$real" ] || continue
  short=${real%.*.*} # libggml.so.0
  mv "$real" "$short"
  ln -sf "${short##*/}" "${short%.*}"
done
cp "$(g++ -print-file-name=libgomp.so.1)" "$libs/"

find . -type d \( -name tests -o -name test \) -prune -exec rm -rf {} +
python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash .
chmod -R a+rX .
