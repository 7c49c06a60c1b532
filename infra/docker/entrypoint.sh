#!/bin/sh
# Run the server as an ordinary user. The container starts as root only to set the owner of the two folders.
# A folder that the host's user created keeps its owner, and the server runs as that user, so both can write to it.
# A folder that the container engine created belongs to root and is given to user 1000, unless it is read-only.
set -eu

if [ "$(id -u)" = 0 ]; then
  for folder in "$MODELS_DIR" "$HF_HOME"; do
    mkdir -p "$folder"
    [ "$(stat -c %u "$folder")" != 0 ] || chown 1000:1000 "$folder" 2>/dev/null || true
  done
  user=$(stat -c %u "$MODELS_DIR")
  group=$(stat -c %g "$MODELS_DIR")
  [ "$user" != 0 ] || { user=1000 group=1000; } # never as root
  export HOME=/tmp
  exec setpriv --reuid "$user" --regid "$group" --clear-groups --no-new-privs -- "$@"
fi
exec "$@"
