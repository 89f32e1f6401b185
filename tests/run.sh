#!/usr/bin/env bash
# Installs what the tests need and runs every test that this machine can run.
#
#   tests/run.sh [--here] [arguments of pytest]
#
# Without --here it makes .venv beside the sources (the quickstart's); with it, it uses the active Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

here=()
if [ "${1:-}" = --here ]; then
    here=(--here)
    shift
fi
INSTALL_ONLY=1 REQUIREMENTS="launch/requirements.txt tests/requirements.txt" ./launch/quickstart.sh ${here[@]+"${here[@]}"}
[ ${#here[@]} = 0 ] && export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
mypy
clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*

# The installed package is under test, not the sources beside it: pytest is started without the checkout on its path.
python -m pytest "$@"
