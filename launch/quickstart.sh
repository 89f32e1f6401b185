#!/usr/bin/env bash
# From nothing to two trained models side by side: Amos and AdamW, with a table and a plot.
#
#   launch/quickstart.sh [--here] [arguments of launch/pretrain.py: --steps, --engine, --out, --size, --data, --seed ...]
#
# It installs what is missing first: see launch/install.sh, which --here is for.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
here=() arguments=()
for argument in "$@"; do
    if [ "$argument" = --here ]; then here=(--here); else arguments+=("$argument"); fi
done
python=$("$root/launch/install.sh" ${here[@]+"${here[@]}"} | tail -n 1)
export PATH="$(dirname "$python"):$PATH"

# On all GPUs (a power of two, so that they share the batch evenly), else two ranks on the CPU
read -r gpus cores port < <("$python" - <<'END'
import os
import socket

import torch

with socket.socket() as probe:
    probe.bind(("", 0))
    print(torch.cuda.device_count(), os.cpu_count(), probe.getsockname()[1])
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
echo "==> training on $ranks ranks ($([ "$gpus" -gt 0 ] && echo GPU || echo CPU))"
exec deepspeed --quiet --num_gpus $ranks --master_port "$port" \
    "$root/launch/pretrain.py" --compare AdamW --out "$root/out/quickstart" ${arguments[@]+"${arguments[@]}"}
