#!/bin/sh
# environment.sh DIRECTORY MARKER PYTHON...: makes DIRECTORY a virtual environment in which an installation may begin, with
# the file MARKER in it. One that works stays; otherwise the first PYTHON that is new enough and has venv makes it.
directory=$1 marker=$2
shift 2
fits='import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

if [ -e "$marker" ]; then
  echo "$directory: an earlier installation did not end; making it anew"
elif "$directory/bin/python" -c "" >/dev/null 2>&1; then
  if ! "$directory/bin/python" -c "$fits" 2>/dev/null; then
    echo "$directory has $("$directory/bin/python" --version), expected 3.11, 3.12 or 3.13: remove it (make clean), and repeat the command" >&2
    exit 1
  fi
  "$directory/bin/python" -m pip --version >/dev/null 2>&1 || "$directory/bin/python" -m ensurepip >/dev/null || exit 1
  touch "$marker"
  exit 0
elif [ -e "$directory/bin" ]; then
  echo "$directory: its Python is gone; making it anew"
fi
for python; do
  if "$python" -c "$fits" >/dev/null 2>&1; then
    "$python" -m venv --clear "$directory" && touch "$marker" && exit 0
    exit 1
  fi
done
echo "no Python 3.11, 3.12 or 3.13 with venv (looked for $*): on Debian or Ubuntu 'apt install python3-venv', elsewhere 'uv python install 3.11'; or name one: make PYTHON=/path/to/python3.12 demo" >&2
exit 1
