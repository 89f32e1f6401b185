#!/usr/bin/env bash
# From nothing to two trained models side by side: Amos and AdamW, with a table and a plot.
#
#   launch/quickstart.sh [--here] [arguments of launch/pretrain.py: --steps, --out, --size, --data, --seed ...]
#
# Without --here it makes .venv beside the sources; with it, it uses the active Python and adds only what is missing.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
say() { printf '==> %s\n' "$*"; }
fail() { printf 'quickstart: %s\n' "$*" >&2; exit 1; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

here=0 arguments=()
for argument in "$@"; do
    if [ "$argument" = --here ]; then here=1; else arguments+=("$argument"); fi
done

# 1. A Python
python=
if [ $here = 1 ]; then
    for candidate in python python3; do recent $candidate && python=$candidate && break; done
    [ "$python" ] || fail "the active Python is older than 3.10, or there is none. Activate another, or leave --here out."
else
    venv=$root/.venv
    if ! recent "$venv/bin/python"; then
        for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
            recent $candidate && python=$candidate && break
        done
        [ "$python" ] || fail "no Python 3.10 or later on PATH. Install one (Debian, Ubuntu: apt-get install python3-venv)."
        say "making $venv with $($python --version)"
        "$python" -m venv --clear "$venv" ||
            fail "Python could not make an environment. Install its venv module (Debian, Ubuntu: apt-get install python3-venv)."
    fi
    python=$venv/bin/python
fi
python=$("$python" -c 'import sys; print(sys.executable)')
export PATH="$(dirname "$python"):$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1

# 2. Dependencies: in our own environment the pinned versions, in an active one whatever is there
missing=$("$python" - "$root/launch/requirements.txt" $here <<'END'
import sys
from importlib.metadata import PackageNotFoundError, version

for line in open(sys.argv[1]):
    requirement = line.partition("#")[0].strip()
    if requirement:
        name, _, pin = requirement.partition("==")
        try:
            kept = sys.argv[2] == "1" or version(name).partition("+")[0] == pin
            version(name)
        except PackageNotFoundError:
            kept = False
        if not kept:
            print(requirement)
END
)
if [ "$missing" ]; then
    say "installing" $missing
    "$python" -m pip install -qq $missing || fail "pip could not install the dependencies; its message is above."
fi

# 3. The extension, again only when its sources or torch have changed; CUDA kernels only if there are GPUs
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || export AMOS_CUDA=${AMOS_CUDA:-0}
stamp=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/amos_dist.sources
sources=$(cd "$root" && "$python" - <<'END'
import hashlib
import os
from pathlib import Path

import torch

total = hashlib.sha256(f"{torch.__version__} {os.environ.get('AMOS_CUDA')}".encode())
files = [path for folder in ("csrc", "amos_dist") for path in Path(folder).rglob("*")]
for path in sorted([*files, Path("setup.py"), Path("pyproject.toml")]):
    if path.suffix in {".py", ".toml", ".cpp", ".h", ".inl", ".cu", ".cuh"}:
        total.update(path.as_posix().encode() + b"\0" + path.read_bytes())
print(total.hexdigest())
END
)
installed=$(cd / && "$python" -c 'import importlib.util as u; print(bool(u.find_spec("amos_dist")))')
if [ "$installed" = True ] && [ ! -f "$stamp" ]; then
    say "using the amos_dist that is installed"
elif [ "$installed" = False ] || [ "$(cat "$stamp")" != "$sources" ]; then
    command -v "${CXX:-c++}" >/dev/null ||
        fail "no C++ compiler: ${CXX:-c++} is not on PATH. Install one (Debian, Ubuntu: apt-get install g++) or set CXX."
    say "building the extension"
    "$python" -m pip install -qq --no-build-isolation --no-deps --force-reinstall "$root" ||
        fail "the extension did not build; the compiler's message is above."
    echo "$sources" >"$stamp"
fi

# 4. Training: on all GPUs (a power of two, so that they share the batch evenly), else two ranks on the CPU
read -r cores port < <("$python" - <<'END'
import os
import socket

with socket.socket() as probe:
    probe.bind(("", 0))
    print(os.cpu_count(), probe.getsockname()[1])
END
)
ranks=2
if [ "$gpus" -gt 0 ]; then
    ranks=1
    while [ $((ranks * 2)) -le "$gpus" ] && [ $ranks -lt 16 ]; do ranks=$((ranks * 2)); done
else
    export DS_ACCELERATOR=cpu
    threads=$((cores / ranks))
    [ $threads -le 8 ] || threads=8
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
fi
say "training on $ranks ranks ($([ "$gpus" -gt 0 ] && echo GPU || echo CPU))"
exec deepspeed --quiet --num_gpus $ranks --master_port "$port" \
    "$root/launch/pretrain.py" --compare AdamW --out "$root/out/quickstart" ${arguments[@]+"${arguments[@]}"}
