# What multinode.sh and mpirun.sh share; sourced by them. They set hostfile, interface and job.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
port=${MASTER_PORT:-29500}
python=$root/.venv/bin/python
[ -x "$python" ] || python=$(command -v python3)
python=${PYTHON:-$python}
ssh_options="-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"

fail() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

dry=
if [ "${1:-}" = --dry-run ]; then
    dry=1
    shift
fi
job+=(--hostfile "$hostfile" "$@")
cd "$root"

# hosts: their names, in order. A line that is none is an error.
[ -r "$hostfile" ] || fail "$hostfile: no such hostfile. Copy launch/hostfile.example there and write your hosts into it."
hosts=() number=0
while IFS= read -r line || [ "$line" ]; do
    number=$((number + 1))
    line=${line%%#*}
    [[ $line =~ ^[[:space:]]*$ ]] && continue
    [[ $line =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] ||
        fail "$hostfile, line $number: '$line' is no host. Write a name and its number of ranks: node1 slots=8"
    host=${BASH_REMATCH[1]}
    for other in ${hosts[@]+"${hosts[@]}"}; do
        [ "$other" != "$host" ] || fail "$hostfile, line $number: $host is there twice. Write each host once, with all its slots."
    done
    hosts+=("$host")
done <"$hostfile"
[ ${#hosts[@]} -gt 0 ] || fail "$hostfile: names no host. Write a name and its number of ranks on a line: node1 slots=8"

# probe HOST: its address in the network between the hosts; else why it cannot take part
probe() {
    local said status=0
    said=$(ssh -n $ssh_options "$1" "
        [ -e '$root/launch/pretrain.py' ] || { echo 'has no $root/launch/pretrain.py. Copy this folder to the same place there'; exit 9; }
        [ -x '$python' ] || { echo 'has no $python. Run launch/install.sh there'; exit 9; }
        address=\$(PATH=\$PATH:/usr/sbin:/sbin; ip -4 -o address show dev '$interface' 2>/dev/null | sed 's/.* inet \([0-9.]*\).*/\1/;q')
        [ \"\$address\" ] || { echo \"has no network interface $interface with an address, only\" \$(ls /sys/class/net)'. Change the second line of the script'; exit 9; }
        echo \"\$address\"" 2>&1) || status=$?
    case $status in
        0) echo "$said" ;;
        9) echo "$1 $said."; return 1 ;;
        *) echo "$1 does not answer over ssh ($(tail -n 1 <<<"$said" | tr -d '\r')). Try: ssh $1 true"; return 1 ;;
    esac
}

# address: of the first host, where ranks meet. All hosts are asked at once, and each that cannot take part is named.
address="ADDRESS_OF_${hosts[0]}"
if [ ! "$dry" ]; then
    answers=$(mktemp -d)
    trap 'rm -rf "$answers"' EXIT
    for host in "${hosts[@]}"; do probe "$host" >"$answers/$host" || touch "$answers/failed" & done
    wait
    if [ -e "$answers/failed" ]; then
        for host in "${hosts[@]}"; do grep -qE '^[0-9.]+$' "$answers/$host" || sed "s/^/$(basename "$0"): /" "$answers/$host" >&2; done
        exit 1
    fi
    address=$(cat "$answers/${hosts[0]}")
    rm -rf "$answers"
    trap - EXIT
fi

# What ranks need in their environment, beside what DeepSpeed hands on (NCCL_*, PYTHON*): it reads this file.
export NCCL_SOCKET_IFNAME=$interface GLOO_SOCKET_IFNAME=$interface
export DS_ENV_FILE=$root/out/nodes.env
handed=(GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME)
for name in OMP_NUM_THREADS DS_ACCELERATOR; do [ ! "${!name:-}" ] || handed+=("$name"); done
mkdir -p "$root/out"
for name in "${handed[@]}"; do echo "$name=${!name}"; done >"$DS_ENV_FILE"

# run COMMAND...: does it, or prints it
run() {
    if [ "$dry" ]; then
        printf '%q ' "$@"
        echo
    else
        exec "$@"
    fi
}
