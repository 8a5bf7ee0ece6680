#!/bin/sh
# Prints a Python that runs, for a name such as python3.12 or a path; prints nothing and fails where there is none.
#   requirements/find_python.sh python3.12
# That a name is on PATH is not enough: pyenv puts a shim there for every version that it has installed, and the shim
# fails while the version is not chosen. In that case pyenv's newest interpreter of the series is taken.
name="${1:?usage: find_python.sh NAME}"
if "$name" -c '' >/dev/null 2>&1; then
  command -v "$name"
  exit
fi
series="${name#python}"
for python in $(printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}/versions/$series".*/bin/python | sort -rV); do
  if "$python" -c '' >/dev/null 2>&1; then
    echo "$python"
    exit
  fi
done
exit 1
