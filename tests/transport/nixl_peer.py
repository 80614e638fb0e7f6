"""Process at the other end of the NIXL tests: answers checksums of what was written to it.

Usage: nixl_peer.py NAME SLOT_BYTES SLOTS DEVICE. Prints the address of its rendezvous, and ends
when its parent does, when its stdin closes, or after a minute.

Messages it knows: ``crc SLOT SLOTS`` is answered by ``crc SLOT SLOTS VALUE``; ``return SLOT SLOTS``
is answered by writing those slots to the same slots of the asker, with ``returned SLOT SLOTS``.
"""

from __future__ import annotations

import os
import select
import sys
import time
import zlib

import msgspec
import torch

from kvpack.rendezvous import Listener
from kvpack.transport import NixlTransport, Region, Window
from kvpack.transport.base import Device


def main() -> None:
    name, slot_bytes, slots = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    device: Device = "cuda" if sys.argv[4] == "cuda" else "cpu"
    # One pool, received into and sent from: what came is returned from where it lies.
    memory = torch.zeros(slot_bytes * slots, dtype=torch.uint8, device=device)
    window = Window(memory.data_ptr(), slot_bytes, slots, device)
    region = Region(window.address, window.nbytes, device)
    transport = NixlTransport(name, region, window)

    def meet(hello: bytes) -> bytes:
        peer, blob, theirs = msgspec.msgpack.decode(hello, type=tuple[str, bytes, Window])
        transport.add_peer(peer, blob, theirs)
        return msgspec.msgpack.encode((name, transport.metadata, window))

    listener = Listener("127.0.0.1", 0, meet)
    print(listener.address, flush=True)
    writes = []
    deadline, parent = time.monotonic() + 60, os.getppid()
    while time.monotonic() < deadline and os.getppid() == parent:
        listener.poll()
        for sender, message in transport.notifications():
            word, slot, count = message.split()
            first, n = int(slot), int(count)
            if word == b"crc":
                run = memory[first * slot_bytes : (first + n) * slot_bytes]
                value = zlib.crc32(run.cpu().numpy().data)
                transport.notify(sender, message + b" %d" % value)
            elif word == b"return":
                writes.append(
                    transport.write(sender, first, first, n, b"returned %d %d" % (first, n))
                )
        writes = [write for write in writes if not transport.poll(write)]
        if select.select([sys.stdin], [], [], 0)[0]:
            break
    listener.close()
    sys.exit(transport.close(timeout_s=5.0))


if __name__ == "__main__":
    main()
