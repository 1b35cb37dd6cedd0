#!/bin/sh
# Build the virtual environments of the peers, outside the repository: make_venvs.sh FOLDER [PYTHON]
set -eu
here=$(CDPATH= cd "$(dirname "$0")" && pwd)
[ $# -ge 1 ] || { echo "usage: $0 FOLDER [PYTHON]" >&2; exit 2; }
mkdir -p "$1"
folder=$(CDPATH= cd "$1" && pwd)
case "$folder/" in "$here"/*) echo "choose a folder outside the repository, not $folder" >&2; exit 2 ;; esac
for peer in fastapi litserve ray; do
    "${2:-python3}" -m venv "$folder/$peer"
    "$folder/$peer/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements-$peer.txt"
done
echo "python -m benchmarks peers --venvs $folder"
