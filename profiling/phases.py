"""The phases of a transfer, the same in NVTX ranges, records and tables."""

from __future__ import annotations

import enum


class Phase(enum.IntEnum):
    """What a transfer, or one of its chunks, is doing.

    The value indexes tuples that hold one item a phase, in the order of a transfer's life.
    """

    QUEUE = 0
    """From the caller's request to the first work on it."""
    CREDIT = 1
    """Waiting for the receiver's grant of leases."""
    PREPARE = 2
    """Host work up to the return of the kernel's launch."""
    GATHER = 3
    """Cache blocks to staging memory, on the device."""
    POST = 4
    """Handing the write to the transport."""
    WIRE = 5
    """From the post until the bytes have landed."""
    SCATTER = 6
    """Staging memory to cache blocks, on the device."""
    COMPLETE = 7
    """From the last byte in place to the caller's handle."""

    @property
    def label(self) -> str:
        """The phase's name in ranges, records and tables."""
        return self.name.lower()
