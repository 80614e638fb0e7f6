"""Handles of transfers: what ``send`` and ``receive`` return at once, and what comes of it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from kvpack.errors import ClosedError, EndpointError, TransferError
from kvpack.profiling.records import TransferRecord

_logger = logging.getLogger(__name__)

_POLL_S = 50e-6

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class SendResult:
    """A send whose receivers all have everything.

    Attributes
    ----------
    record : TransferRecord
        Bytes, phases and times.
    """

    record: TransferRecord


@dataclass(frozen=True)
class ReceiveResult:
    """A receive whose blocks are complete.

    Attributes
    ----------
    record : TransferRecord
        Bytes, phases and times.
    aux : mapping of str to bytes
        By sender's name, the auxiliary payload of its sends, joined in the order of positions.
    """

    record: TransferRecord
    aux: Mapping[str, bytes]


class Driving(Protocol):
    """Who brings a transfer to its end; what waiting for it depends on."""

    @property
    def has_thread(self) -> bool:
        """Whether a thread of its own does."""

    @property
    def is_turning_here(self) -> bool:
        """Whether the calling thread is doing so now."""

    def turn(self) -> bool:
        """Do some of it; tells whether there was anything to do."""


class TransferHandle(Generic[ResultT]):
    """A transfer under way. It ends once: done, failed, cancelled or timed out.

    Handles are made by ``Endpoint.send`` and ``Endpoint.receive`` and may be used from any thread.

    Attributes
    ----------
    request_id : str
        The request's id.
    """

    def __init__(self, request_id: str, cancel: Callable[[], None], driver: Driving) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._driver = driver
        self._pid = os.getpid()
        self._condition = threading.Condition()
        self._record: TransferRecord | None = None
        self._result: ResultT | None = None
        self._error: TransferError | None = None
        self._released = False
        self._callbacks: list[Callable[[TransferHandle[ResultT]], object]] = []

    def __repr__(self) -> str:
        state = self._record.outcome if self._record is not None else "under way"
        return f"{type(self).__name__}({self.request_id!r}, {state})"

    def done(self) -> bool:
        """Whether the transfer has ended, well or not."""
        return self._record is not None

    @property
    def blocks_released(self) -> bool:
        """Whether kvpack will not touch the engine's blocks any more.

        A send's blocks are free once they are gathered, before the transfer is done; those of a
        failed receive only when no scatter to them is running.
        """
        return self._released

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end.

        Parameters
        ----------
        timeout_s : float, optional
            Seconds to wait at most; the transfer's own deadline bounds it in any case.

        Returns
        -------
        bool
            Whether the transfer has ended.

        Raises
        ------
        EndpointError
            If it is called in a callback, which must not wait, before the end.
        """
        return self._wait_for(self.done, timeout_s)

    def wait_blocks_released(self, timeout_s: float | None = None) -> bool:
        """Wait until ``blocks_released``; returns whether it is so."""
        return self._wait_for(lambda: self._released, timeout_s)

    def result(self, timeout_s: float | None = None) -> ResultT:
        """Wait for the end and return what came of it.

        Raises
        ------
        TransferFailedError, TransferCancelledError, TransferTimeoutError
            How it ended otherwise; the message names request, peer and reason.
        TimeoutError
            If it has not ended within ``timeout_s``; it goes on.
        EndpointError
            As ``wait``.
        """
        if not self.wait(timeout_s):
            raise TimeoutError(
                f"request {self.request_id!r} has not ended within {timeout_s} s; it goes on "
                "until its own deadline unless it is cancelled"
            )
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Ask for the end. The handle ends cancelled, unless it ends otherwise first.

        Raises
        ------
        ClosedError
            In a forked child, where nothing drives the transfer.
        """
        self._check_process()
        self._cancel()

    def add_done_callback(self, callback: Callable[[TransferHandle[ResultT]], object]) -> None:
        """Call ``callback(handle)`` at the end, or at once if it has come.

        It runs on the thread that drives the endpoint and must not block; what it raises is
        logged.
        """
        with self._condition:
            if self._record is None:
                self._callbacks.append(callback)
                return
        self._call(callback)

    @property
    def record(self) -> TransferRecord:
        """Phases, bytes and outcome.

        Raises
        ------
        TransferError
            If the transfer has not ended yet.
        """
        if self._record is None:
            raise TransferError(f"request {self.request_id!r} is under way; its record comes last")
        return self._record

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ClosedError(
                f"request {self.request_id!r} belongs to process {self._pid}: its forked child "
                f"{os.getpid()} can neither wait for it nor cancel it"
            )

    def _wait_for(self, reached: Callable[[], bool], timeout_s: float | None) -> bool:
        if reached():
            return True
        self._check_process()
        if self._driver.is_turning_here:
            raise EndpointError(
                f"request {self.request_id!r} cannot be waited for in a callback, which runs on "
                "the thread that is to bring it to its end; add a callback to it instead"
            )
        if self._driver.has_thread:
            with self._condition:
                return self._condition.wait_for(reached, timeout_s)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not reached():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            if not self._driver.turn():
                time.sleep(_POLL_S)
        return True

    def release(self) -> None:
        """Tell that the blocks are free; the endpoint's to call."""
        with self._condition:
            self._released = True
            self._condition.notify_all()

    def finish(
        self,
        record: TransferRecord,
        result: ResultT | None = None,
        error: TransferError | None = None,
    ) -> None:
        """End the handle, once; the endpoint's to call."""
        with self._condition:
            assert self._record is None, f"request {self.request_id!r} ended twice"
            self._record, self._result, self._error = record, result, error
            callbacks, self._callbacks = self._callbacks, []
            self._condition.notify_all()
        for callback in callbacks:
            self._call(callback)

    def _call(self, callback: Callable[[TransferHandle[ResultT]], object]) -> None:
        try:
            callback(self)
        except BaseException:  # SystemExit too: it must not end the thread that drives everybody
            _logger.exception("a callback of request %r failed", self.request_id)


class SendHandle(TransferHandle[SendResult]):
    """Handle of a send."""


class ReceiveHandle(TransferHandle[ReceiveResult]):
    """Handle of a receive."""
