#!/bin/sh
# environment.sh DIRECTORY MARKER PYTHON...: makes DIRECTORY a virtual environment in which an installation may begin, with
# the file MARKER in it. One that works stays; otherwise the first PYTHON that is new enough and has venv makes it.
directory=$1 marker=$2 why=
shift 2
fits='import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

if [ -e "$marker" ]; then
  why="an earlier installation did not end"
elif "$directory/bin/python" -c "" >/dev/null 2>&1; then
  if ! "$directory/bin/python" -c "$fits" 2>/dev/null; then
    echo "$directory has $("$directory/bin/python" --version), expected 3.11, 3.12 or 3.13: remove it (make clean), and repeat the command" >&2
    exit 1
  fi
  "$directory/bin/python" -m pip --version >/dev/null 2>&1 || "$directory/bin/python" -m ensurepip >/dev/null || exit 1
  touch "$marker"
  exit 0
elif [ -e "$directory/bin" ]; then
  why="its Python is gone"
fi
# Only an environment that is here may be emptied: not what a link leads to, and no other files.
if [ -L "$directory" ]; then
  echo "$directory is a link to an environment that does not work: remove the link (rm $directory), and repeat the command" >&2
  exit 1
elif [ -e "$directory" ] && [ ! -e "$directory/pyvenv.cfg" ] && [ -n "$(ls -A "$directory")" ]; then
  echo "$directory is no virtual environment (it has no pyvenv.cfg): move it away, and repeat the command" >&2
  exit 1
fi
[ -z "$why" ] || echo "$directory: $why; making it anew"
for python; do
  if "$python" -c "$fits" >/dev/null 2>&1; then
    "$python" -m venv --clear "$directory" && touch "$marker" && exit 0
    exit 1
  fi
done
echo "no Python 3.11, 3.12 or 3.13 with venv (looked for $*): on Debian or Ubuntu 'apt install python3-venv', elsewhere 'uv python install 3.11'; or name one: make PYTHON=/path/to/python3.12 demo" >&2
exit 1
