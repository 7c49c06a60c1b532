#!/bin/sh
# slim_install.sh SITE_PACKAGES: remove what is not needed at run time. Dockerfile.lambda calls it.
# llama-cpp-python's wheel contains each library six times. Keep one copy under the name that the other libraries load
# (libggml.so.0) and a link under the name that Python loads (libllama.so). Put the CPU variants and the OpenMP runtime,
# which Amazon's base image lacks, into the same folder: the run path ($ORIGIN) and core/engine/native.py search it.
set -eu
cd "$1"

libs=llama_cpp/lib
if ls bin/libggml-cpu*.so >/dev/null 2>&1; then # GGML_BACKEND_DL puts the CPU variants there
  mv bin/libggml-*.so "$libs/"
fi
# lib64: what CMake installs into on Amazon Linux.
rm -rf bin lib lib64 include "$libs"/libmtmd*
for real in "$libs"/*.so.*.*.*; do
  [ -e "$real" ] || continue
  short=${real%.*.*} # libggml.so.0
  mv "$real" "$short"
  ln -sf "${short##*/}" "${short%.*}"
done
ls "$libs"/libggml-cpu*.so* >/dev/null # fails if no CPU backend is left
cp "$(g++ -print-file-name=libgomp.so.1)" "$libs/"

find . -type d \( -name tests -o -name test \) -prune -exec rm -rf {} +
python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash .
chmod -R a+rX .
