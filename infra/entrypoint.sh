#!/bin/sh
# The container begins as root only to give the two folders an owner; the server runs as an ordinary user.
# A folder that the host's user made keeps its owner, and the server runs as that user, so that both can write to it.
# One that the container engine made on the first run belongs to root: it is given to user 1000.
set -eu

if [ "$(id -u)" = 0 ]; then
  mkdir -p "$MODELS_DIR" "$HF_HOME"
  for folder in "$MODELS_DIR" "$HF_HOME"; do
    [ "$(stat -c %u "$folder")" != 0 ] || chown 1000:1000 "$folder"
  done
  user=$(stat -c %u "$MODELS_DIR")
  group=$(stat -c %g "$MODELS_DIR")
  export HOME=/tmp
  exec setpriv --reuid "$user" --regid "$group" --clear-groups --no-new-privs -- "$@"
fi
exec "$@"
