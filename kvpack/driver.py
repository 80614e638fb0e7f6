"""Who makes an endpoint's turns: a thread of its own, or whoever calls ``Endpoint.progress``."""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar

from kvpack.errors import EndpointError
from kvpack.options import Options
from kvpack.progress import Progress

_logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_BACKOFF = 1.25
"""How much longer each look without news lets the next one wait: about 5 ms to the longest."""


class Driver:
    """Makes turns until it is stopped.

    Parameters
    ----------
    name : str
        Of the endpoint.
    progress : Progress
        What is driven.
    options : Options
        Who drives, and how long it may sleep.
    """

    def __init__(self, name: str, progress: Progress, options: Options) -> None:
        self._name = name
        self._progress = progress
        self._options = options
        self._turning = threading.Lock()
        self._turner: int | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if options.driver == "thread":
            self._thread = threading.Thread(target=self._run, name=f"kvpack {name}", daemon=True)
            self._thread.start()
            _with_thread.add(self)

    @property
    def has_thread(self) -> bool:
        """Whether turns are made by a thread of the endpoint's own."""
        return self._thread is not None

    @property
    def is_turning_here(self) -> bool:
        """Whether the calling thread is inside a turn, as callbacks are."""
        return self._turner == threading.get_ident()

    def turn(self) -> bool:
        """Make one turn, unless somebody is making one."""
        if not self._turning.acquire(blocking=False):
            return False
        self._turner = threading.get_ident()
        try:
            return self._progress.turn()
        finally:
            self._turner = None
            self._turning.release()

    def try_turn(self) -> bool:
        """Make one turn; what goes wrong in it is logged."""
        try:
            return self.turn()
        except Exception:
            # One turn's failure must not end everybody's transfers; their deadlines stand.
            _logger.exception("a turn of endpoint %r failed", self._name)
            return False

    def run(self, function: Callable[[], _T]) -> _T:
        """Run a function on the turning thread, and return or raise what it does.

        Raises
        ------
        EndpointError
            If the turning thread does not come to it in time.
        """
        if self.is_turning_here:
            return function()
        future = self._progress.call(function)
        deadline = time.monotonic() + self._options.connect_timeout_s
        while self._thread is None and not future.done() and time.monotonic() < deadline:
            if not self.turn():
                time.sleep(self._options.busy_poll_s)
        try:
            result: _T = future.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeoutError:
            if future.done():
                raise
            future.cancel()  # a call that was reported as failed must not be made later
            raise EndpointError(
                f"endpoint {self._name!r} did not come to a call within "
                f"{self._options.connect_timeout_s} s; whoever drives it is stuck"
            ) from None
        return result

    def stop(self) -> None:
        """End the thread, if there is one; from then on only ``turn`` makes turns.

        Raises
        ------
        EndpointError
            If a turn does not end in time, as when a callback waits for something.
        """
        if self._thread is None or not self._thread.is_alive():
            return  # ended before, or in a forked child, which has its parent's locks too
        self._stopped.set()
        self._progress.wake.set()
        self._thread.join(self._options.connect_timeout_s)
        if self._thread.is_alive():
            raise EndpointError(
                f"endpoint {self._name!r} cannot be taken apart: a turn of its thread has not "
                f"ended within {self._options.connect_timeout_s} s; a callback of a transfer must "
                "not block"
            )

    def _run(self) -> None:
        progress, options = self._progress, self._options
        progress.copier.enter_thread()
        pause = options.busy_poll_s
        while not self._stopped.is_set():
            if self.try_turn():
                pause = options.busy_poll_s
            elif progress.is_busy:
                time.sleep(options.busy_poll_s)
            else:
                is_open = progress.transfers.is_open
                longest = options.waiting_poll_s if is_open else options.idle_poll_s
                pause = min(max(_BACKOFF * pause, options.busy_poll_s), longest)
                if progress.wake.wait(pause):
                    pause = options.busy_poll_s
            progress.wake.clear()


_with_thread: weakref.WeakSet[Driver] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """End the threads of endpoints that nobody closed.

    The interpreter would end them wherever they are, and inside NIXL that aborts the process.
    """
    for driver in list(_with_thread):
        with contextlib.suppress(EndpointError):  # one that blocks must not keep the others
            driver.stop()
