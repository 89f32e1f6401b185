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

# Tests with several hosts need these; where they cannot be had, those tests are skipped and say so. Not on a machine that
# runs systemd: there openssh-server would open a door for good.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ ! -d /run/systemd/system ] &&
    ! (command -v ip && command -v sshd && command -v pdsh) >/dev/null; then
    (apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install iproute2 openssh-server pdsh) >/dev/null 2>&1 ||
        echo "openssh-server and pdsh could not be installed" >&2
fi

python=$(./launch/install.sh ${here[@]+"${here[@]}"} tests/requirements.txt docs/requirements.txt | tail -n 1)
export PATH="$(dirname "$python"):$PATH"
command -v g++ nvcc || true  # what the tests of the CUDA sources have to work with

ruff check .
ruff format --check .
mypy
clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*
typos

# DeepSpeed compiles its collectives for the CPU at their first use. Were that a test that kills ranks, a lock would be
# left, for which all others would wait for ever.
export TORCH_EXTENSIONS_DIR=$PWD/build/torch_extensions
rm -f "$TORCH_EXTENSIONS_DIR"/*/lock
DS_ACCELERATOR=cpu python -c 'from deepspeed.accelerator import get_accelerator as get
get().create_op_builder("ShareMemCommBuilder").load()' >/dev/null

# Two at a time, each file by one of them: many tests wait more than they work. Long ones first, so that nobody is left
# with one at the end.
export OMP_WAIT_POLICY=passive  # threads of one that turn in a loop take the time of the other's
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
    tests/multinode tests/distributed tests/integration tests/cuda_on_cpu tests/fuzz tests/unit "$@"
