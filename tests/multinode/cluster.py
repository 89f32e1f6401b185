"""Several hosts on this machine: network, process and mount namespaces, each with a name, an address and an sshd.

Nothing is left behind, whatever happens: all namespaces live as long as their first process, and that ends with the
pipe to this one. Links and bridges are in them too, so that clusters beside each other cannot meet.

    with Cluster(hosts=2) as cluster:
        cluster.run(0, "ssh", "node1", "hostname")
        cluster.cut(1)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WIRE = Path(__file__).with_name("wire.py")
TOOLS = ("ip", "tc", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

# The first process of a namespace. It says who it is, as seen from here, before it sees only itself.
NODE = """
set -e
read -r pid rest </proc/self/stat
mount -t proc proc /proc
if [ "$1" != switch ]; then
    hostname "$1"
    mount -t tmpfs tmpfs /run && mkdir /run/sshd
    mount -t tmpfs tmpfs /dev/shm
    mount --bind "$2/hosts" /etc/hosts
    mount --bind "$2/ssh_config" /etc/ssh/ssh_config
    ip link set lo up
    sshd=$(command -v sshd)
    "$sshd" -D -e -f "$2/sshd_config" 2>"$2/$1.sshd.log" </dev/null &
fi
echo "$pid"
while read -r line; do :; done
"""
SSH = """
Host *
    User root
    IdentityFile {folder}/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""
SSHD = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
MaxStartups 100
"""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    lacking = [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]
    if lacking:
        return f"{', '.join(lacking)} not found (Debian, Ubuntu: apt-get install iproute2 openssh-server)"
    try:
        with Cluster(hosts=1) as cluster:
            cluster.run(0, "ssh", "node0", "true", limit=60)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"namespaces cannot be made here ({error})"
    return ""


@dataclass
class Host:
    """name, address: as the others know it. first: its first process."""

    name: str
    address: str
    first: int


class Cluster:
    """A context with `hosts` hosts: node0, node1, …, 10.77.0.1, …, which share the files of this machine.

    Attributes:
        hosts: one Host for each.
    """

    def __init__(self, hosts: int = 2) -> None:
        self._count = hosts
        self.hosts: list[Host] = []

    def __enter__(self) -> Cluster:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="amos_cluster.")))
            self._write(folder)
            self._wires: list[subprocess.Popen[bytes]] = []
            self._switch = stack.enter_context(_namespaces("switch", folder))
            self._set("link", "add", "middle", "mtu", "9000", "type", "bridge", "stp_state", "0", "forward_delay", "0")
            self._set("link", "set", "middle", "up")
            for number in range(self._count):
                name, address = f"node{number}", _address(number)
                host = Host(name, address, stack.enter_context(_namespaces(name, folder)))
                self.hosts.append(host)
                ends = (f"h{number}", "mtu", "9000", "type", "veth"), ("eth0", "mtu", "9000", "netns", str(host.first))
                self._set("link", "add", *ends[0], "peer", "name", *ends[1])
                self._set("link", "set", f"h{number}", "master", "middle", "up")
                self.run(number, "ip", "address", "add", f"{address}/24", "dev", "eth0")
                self.run(number, "ip", "link", "set", "eth0", "up")
            stack.callback(self.delay, 0.0)
            for number in range(self._count):
                self._await_sshd(number, number)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.hosts.clear()

    def _write(self, folder: Path) -> None:
        """The files that all hosts see: names, keys, settings of ssh."""
        hosts = [f"{_address(number)} node{number}" for number in range(self._count)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        (folder / "ssh_config").write_text(SSH.format(folder=folder))
        (folder / "sshd_config").write_text(SSHD.format(folder=folder))
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    def _await_sshd(self, number: int, origin: int, limit: float = 60.0) -> None:
        """Waits until a host's answers the host `origin`."""
        end = time.monotonic() + limit
        while self.run(origin, "ssh", "-o", "BatchMode=yes", f"node{number}", "true", check=False).returncode:
            if time.monotonic() > end:
                raise RuntimeError(f"the sshd of node{number} does not answer node{origin}")
            time.sleep(0.1)

    def command(self, number: int, *words: str | int | Path) -> list[str]:
        """What runs `words` on a host, in the folder of this process."""
        enter = ["nsenter", f"--target={self.hosts[number].first}", "--net", "--uts", "--mount", "--pid", "--"]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(Path.cwd()), *map(str, words)]

    def run(
        self, number: int, *words: str | int | Path, limit: float = 240, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on a host until its end: output and errors come as `stdout`.

        Args:
            limit: seconds. check: a failure is an error. environment: more of it.

        Raises:
            RuntimeError: it failed, or took longer; says its output.
        """
        with self.started(number, *words, **environment) as process:
            try:
                output, _ = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
                raise RuntimeError(f"{words} has not ended after {limit} s:\n{output[-4000:]}") from None
        if check and process.returncode:
            raise RuntimeError(f"{words} ended with {process.returncode}:\n{output[-4000:]}")
        return subprocess.CompletedProcess(list(map(str, words)), process.returncode, output, "")

    @contextlib.contextmanager
    def started(self, number: int, *words: str | int | Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """A command on a host while the context lasts; its output and errors are in `stdout`."""
        process = subprocess.Popen(
            self.command(number, *words),
            env={**os.environ, "PATH": PATH, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def cut(self, number: int) -> None:
        """From now on nothing that this host sends arrives, nor anything sent to it; nobody is told."""
        self._set("link", "set", f"h{number}", "nomaster")

    def heal(self, number: int) -> None:
        """The link is whole again, and all hosts know it: for seconds they remember who did not answer."""
        self._plug_in(number)
        for other in range(len(self.hosts)):
            self._await_sshd(number, other)

    def _plug_in(self, number: int) -> None:
        self._set("link", "set", f"h{number}", "master", "middle")

    def delay(self, seconds: float) -> None:
        """What a host sends reaches another one so much later; 0: at once again.

        By the kernel's netem, or, where it was built without, by a process for each host that holds frames back.
        """
        for wire in self._wires:
            wire.kill()
            wire.wait()
        self._wires.clear()
        for number in range(len(self.hosts)):
            port = f"h{number}"
            self._tc("qdisc", "del", "dev", port, "root")
            if seconds and self._tc("qdisc", "add", "dev", port, "root", "netem", "delay", f"{seconds * 1e3}ms"):
                self._by_hand(port, seconds / 2)  # a frame passes two of them
            elif not seconds:
                self._plug_in(number)

    def _by_hand(self, port: str, seconds: float) -> None:
        near, far = f"{port}near", f"{port}far"
        for end in (near, far):
            self._set("link", "delete", end, check=False)
        words = [*self._enter(), sys.executable, str(WIRE), near, far, str(seconds)]
        wire = subprocess.Popen(words, stdout=subprocess.PIPE)
        self._wires.append(wire)
        assert wire.stdout is not None
        if wire.stdout.readline() != b"ready\n":
            raise RuntimeError("frames cannot be held back here: no /dev/net/tun")
        # port - own bridge - near = process = far - the common bridge
        self._set("link", "delete", f"{port}br", check=False)
        self._set("link", "add", f"{port}br", "type", "bridge", "stp_state", "0", "forward_delay", "0")
        for name, bridge in ((near, f"{port}br"), (far, "middle"), (port, f"{port}br")):
            self._set("link", "set", name, "mtu", "9000", "master", bridge, "up")
        self._set("link", "set", f"{port}br", "mtu", "9000", "up")

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self._switch}", "--net", "--"]

    def _set(self, *words: str, check: bool = True) -> None:
        done = subprocess.run([*self._enter(), "ip", *words], env={**os.environ, "PATH": PATH}, capture_output=True)
        if check and done.returncode:
            raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.decode().strip()}")

    def _tc(self, *words: str) -> int:
        command = [*self._enter(), "tc", *words]
        return subprocess.run(command, env={**os.environ, "PATH": PATH}, capture_output=True).returncode


def _address(number: int) -> str:
    return f"10.77.0.{number + 1}"


@contextlib.contextmanager
def _namespaces(name: str, folder: Path) -> Iterator[int]:
    """The first process of new namespaces, by the number that it has here. They end with the context, or with us."""
    options = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
    process = subprocess.Popen(
        ["unshare", *options, "bash", "-c", NODE, "node", name, str(folder)],
        env={**os.environ, "PATH": PATH},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    try:
        said = process.stdout.readline()
        if not said.strip():
            raise RuntimeError(process.stderr.read().decode().strip() or f"unshare ended with {process.wait()}")
        yield int(said)
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stderr.close()
