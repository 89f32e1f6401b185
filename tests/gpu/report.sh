#!/usr/bin/env bash
# One call on a machine with a GPU: builds amos_dist (or installs a wheel), checks it, times it, writes a report.
#
#   tests/gpu/report.sh [--wheel FILE | --skip-build] [--report docs/gpu.md] [arguments of report.py: see --help]
#
# Needs Python (or what PYTHON names) with torch and pytest, and nvcc and a C++ compiler unless there is a wheel; no
# network. Ends with 1 if something failed; the report says what. `--device cpu`: the checks that need no GPU.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}

wheel="" build=yes arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheel) wheel=$(realpath "$2"); shift ;;
        --skip-build) build=no ;;
        --report | --json) arguments+=("$1" "$(realpath -m "$2")"); shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

# Python looks into the folder that it is started in first: with a wheel, that must not be the sources.
site=$root
if [ -n "$wheel" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-deps --no-index --target "$site" "$wheel"
elif [ $build = yes ]; then
    arch=$("$python" -c 'import torch; print(*torch.cuda.get_device_capability(), sep="") if torch.cuda.is_available() else None')
    if [ -n "$arch" ]; then
        export AMOS_CUDA=1 AMOS_ARCHS=${AMOS_ARCHS:-$arch}
    fi
    log=$(mktemp)
    echo "building${arch:+ for sm_$arch} ..." >&2
    if ! (cd "$root" && "$python" setup.py build_ext --inplace) >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        echo "FAILED: the extension could not be built: see above, all of it is in $log" >&2
        exit 1
    fi
fi
cd "$site"
PYTHONPATH="$site:$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -m tests.gpu.report --root "$root" ${arguments[@]+"${arguments[@]}"}
