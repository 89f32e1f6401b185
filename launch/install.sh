#!/usr/bin/env bash
# Installs what is missing, and the extension, and prints the Python to use on its last line.
#
#   launch/install.sh [--here] [requirements file ...]        (launch/requirements.txt always)
#
# Without --here it makes .venv beside the sources; with it, it uses the active Python and adds only what is missing.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
say() { printf '==> %s\n' "$*" >&2; }
fail() { printf 'install: %s\n' "$*" >&2; exit 1; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

here=0
if [ "${1:-}" = --here ]; then
    here=1
    shift
fi
requirements=("$root/launch/requirements.txt" "$@")

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
        "$python" -m venv --clear "$venv" >&2 ||
            fail "Python could not make an environment. Install its venv module (Debian, Ubuntu: apt-get install python3-venv)."
    fi
    python=$venv/bin/python
fi
python=$("$python" -c 'import sys; print(sys.executable)')
export PATH="$(dirname "$python"):$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1

# 2. Dependencies: in our own environment the pinned versions, in an active one whatever is there
missing=$("$python" - $here "${requirements[@]}" <<'END'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

here, *files = sys.argv[1:]
for line in "\n".join(Path(file).read_text() for file in files).splitlines():
    requirement = line.partition("#")[0].strip()
    if requirement:
        name, _, pin = requirement.partition("==")
        try:
            kept = version(name).partition("+")[0] == pin or here == "1"
        except PackageNotFoundError:
            kept = False
        if not kept:
            print(requirement)
END
)
if [ "$missing" ]; then
    say "installing" $missing
    "$python" -m pip install -qq $missing >&2 || fail "pip could not install the dependencies; its message is above."
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
    rm -f "$root"/dist/amos_dist-*.whl
    ("$python" -m pip wheel -qq --no-build-isolation --no-deps --wheel-dir "$root/dist" "$root" &&
        "$python" -m pip install -qq --no-deps --force-reinstall "$root"/dist/amos_dist-*.whl) >&2 ||
        fail "the extension did not build; the compiler's message is above."
    echo "$sources" >"$stamp"
fi
echo "$python"
