"""A gate that keeps second threads and forked children out."""

from __future__ import annotations

import os
import threading

from kvpack.errors import ClosedError, TransportError


class Gate:
    """Lets one thread at a time through, in the process that made it, until it is shut."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._pid = os.getpid()
        self._shut = False
        self._lock = threading.Lock()

    @property
    def is_shut(self) -> bool:
        """Whether the owner was closed."""
        return self._shut

    def shut(self) -> None:
        """Let nobody through any more."""
        self._shut = True

    def check_process(self) -> None:
        """Refuse a forked child.

        Raises
        ------
        ClosedError
            This is not the process that made the gate.
        """
        if os.getpid() != self._pid:
            raise ClosedError(
                f"{self._owner} belongs to process {self._pid} and cannot be used in "
                f"its forked child {os.getpid()}; open another one there, or start with spawn"
            )

    def __enter__(self) -> None:
        self.check_process()
        if not self._lock.acquire(blocking=False):
            raise TransportError(
                f"two threads are inside {self._owner} at once; one thread at a time may drive it"
            )
        if self._shut:
            self._lock.release()
            raise ClosedError(f"{self._owner} is closed")

    def __exit__(self, *_: object) -> None:
        self._lock.release()
