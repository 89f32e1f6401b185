"""A wire that takes its time: `wire.py NEAR FAR SECONDS` makes two TAP devices and hands frames over, so much later."""

import collections
import contextlib
import fcntl
import os
import select
import struct
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
FRAME = 1 << 16


def tap(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return device


def main() -> None:
    near, far, seconds = tap(sys.argv[1]), tap(sys.argv[2]), float(sys.argv[3])
    print("ready", flush=True)
    across = {near: far, far: near}
    held: collections.deque[tuple[float, int, bytes]] = collections.deque()  # (when due, where to, frame)
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        for device in select.select([near, far], [], [], wait)[0]:
            held.append((time.monotonic() + seconds, across[device], os.read(device, FRAME)))
        while held and held[0][0] <= time.monotonic():
            _, to, frame = held.popleft()
            with contextlib.suppress(OSError):  # not up yet, or full: lost, as on any wire
                os.write(to, frame)


main()
