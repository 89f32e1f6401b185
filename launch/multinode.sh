#!/usr/bin/env bash
# Pretrains on the hosts of a hostfile, with DeepSpeed's launcher. Three lines to change:
hostfile=${HOSTFILE:-hostfile}  # a copy of launch/hostfile.example
interface=${INTERFACE:-eth0}    # the network between the hosts, as `ip -brief address` calls it
job=(--deepspeed_config launch/bf16_zero2.json --size small --save-every 100 --out out/pretrain)
#
#   launch/multinode.sh [--dry-run] [more arguments of launch/pretrain.py: --restart ...]
#
# It needs ssh without a password from here to every host, and this folder at the same path there. Hosts are started with
# pdsh where it is installed, otherwise (or with LAUNCHER=ssh) each by an ssh of its own. --dry-run prints what would run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/nodes.sh"

deepspeed=("$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --master_addr "$address" --master_port "$port")
job=(launch/pretrain.py "${job[@]}")
launcher=${LAUNCHER:-$(command -v pdsh >/dev/null && echo pdsh || echo ssh)}

if [ "$launcher" = pdsh ]; then
    run env PDSH_SSH_ARGS_APPEND="$ssh_options" DS_ENV_FILE="$DS_ENV_FILE" \
        "${deepspeed[@]}" --launcher pdsh --force_multi "${job[@]}"  # also where one host is left, which may not be this one
    exit
fi

# -tt: what runs there ends with this script.
variables=("PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}")
for name in "${handed[@]}"; do variables+=("$name=${!name}"); done
running=()
for number in "${!hosts[@]}"; do
    command=$(printf '%q ' cd "$root")"&& "$(printf '%q ' env "${variables[@]}" "${deepspeed[@]}" --no_ssh --node_rank "$number" "${job[@]}")
    if [ "$dry" ]; then
        run ssh -tt $ssh_options "${hosts[$number]}" "$command"
    else
        ssh -tt $ssh_options "${hosts[$number]}" "$command" </dev/null 2>&1 | sed "s/\r*$//; s/^/${hosts[$number]}: /" &
        running+=($!)
    fi
done
status=0
for process in ${running[@]+"${running[@]}"}; do wait "$process" || status=$?; done
exit $status
