"""Transports on CUDA memory: skipped without a GPU."""

from __future__ import annotations

import subprocess
import sys
import time
import zlib
from pathlib import Path

import msgspec
import pytest
import torch

from kvpack.rendezvous import exchange
from kvpack.transport import LoopbackTransport, NixlTransport, Region, Window
from kvpack.transport.base import Device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SLOT_BYTES = 65536
SLOTS = 1024


def pool(device: Device) -> tuple[torch.Tensor, Region, Window]:
    memory = torch.randint(256, (SLOT_BYTES * SLOTS,), dtype=torch.uint8, device=device)
    region = Region(memory.data_ptr(), memory.numel(), device)
    return memory, region, Window(region.address, SLOT_BYTES, SLOTS, device)


@pytest.mark.parametrize(("here", "there"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_loopback_copies_between_kinds_of_memory(here: Device, there: Device) -> None:
    source, source_region, source_window = pool(here)
    target, target_region, target_window = pool(there)
    expected = target.clone()
    expected[SLOT_BYTES * 7 : SLOT_BYTES * 17] = source[SLOT_BYTES * 3 : SLOT_BYTES * 13]
    torch.cuda.synchronize()
    sender = LoopbackTransport(f"{here}@1", source_region, source_window)
    receiver = LoopbackTransport(f"{there}@2", target_region, target_window)
    sender.add_peer(receiver.name, receiver.metadata, target_window)
    write = sender.write(receiver.name, 3, 7, 10, b"landed")
    while not sender.poll(write):
        pass
    assert receiver.notifications() == [(sender.name, b"landed")]
    assert torch.equal(target, expected)
    assert sender.close() == receiver.close() == 0


@pytest.mark.parametrize(("here", "there"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_nixl_writes_between_processes_on_gpu_memory(here: Device, there: Device) -> None:
    memory, region, window = pool(here)
    torch.cuda.synchronize()
    transport = NixlTransport("parent@1", region, window)
    process = subprocess.Popen(
        [
            sys.executable,
            str(Path(__file__).with_name("nixl_peer.py")),
            "child@1",
            str(SLOT_BYTES),
            str(SLOTS),
            there,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        hello = msgspec.msgpack.encode((transport.name, transport.metadata, window))
        answer = exchange(process.stdout.readline().strip(), hello, timeout_s=60)
        name, blob, theirs = msgspec.msgpack.decode(answer, type=tuple[str, bytes, Window])
        transport.add_peer(name, blob, theirs)
        expected = zlib.crc32(memory.cpu().numpy().data)
        deadline = time.monotonic() + 60
        for _ in range(3):
            write = transport.write(name, 0, 0, SLOTS, b"crc 0 %d" % SLOTS)
            while not transport.poll(write):
                assert time.monotonic() < deadline
            arrived: list[tuple[str, bytes]] = []
            while not arrived:
                assert time.monotonic() < deadline
                arrived = transport.notifications()
            assert arrived == [(name, b"crc 0 %d %d" % (SLOTS, expected))]
    finally:
        process.kill()
        process.wait(10)
        transport.close(timeout_s=5.0)
