"""The demo's worker processes: started, listened to, and ended, each within a deadline."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import TypeVar

from kvpack.demo.config import DemoConfig
from kvpack.demo.messages import Failed, Stop
from kvpack.demo.worker import WorkerArguments, run_worker
from kvpack.errors import KvpackError

__all__ = ["WorkerFailedError", "Workers"]

_STOP_TIMEOUT_S = 20.0

_Message = TypeVar("_Message")


class WorkerFailedError(KvpackError):
    """A worker process of the demo failed, died, or did not answer in time."""


class Workers:
    """One process for each rank of both sides, from entering the context to leaving it.

    Parameters
    ----------
    config : DemoConfig
        The run. Its `timeout_s` starts now.
    """

    def __init__(self, config: DemoConfig) -> None:
        self._deadline_s = time.monotonic() + config.timeout_s
        self._timeout_s = config.timeout_s
        context = multiprocessing.get_context("spawn")
        shards = [context.Pipe(duplex=False) for _ in config.decode.workers[1:]]
        self._controls: dict[str, Connection] = {}
        self._inboxes: dict[str, deque[object]] = {}
        self._processes: dict[str, multiprocessing.process.BaseProcess] = {}
        # Ends that belong to workers; ours must be closed, or a dead worker's peer never hears.
        self._lent: list[Connection] = [end for pipe in shards for end in pipe]
        for side in (config.prefill, config.decode):
            for rank, name in enumerate(side.workers):
                ours, theirs = context.Pipe()
                if side is config.prefill:
                    shard_ends: tuple[Connection, ...] = ()
                elif rank == 0:
                    shard_ends = tuple(reader for reader, _ in shards)
                else:
                    shard_ends = (shards[rank - 1][1],)
                self._controls[name] = ours
                self._inboxes[name] = deque()
                self._lent.append(theirs)
                self._processes[name] = context.Process(
                    target=run_worker,
                    args=(WorkerArguments(config, side, rank, theirs, shard_ends),),
                    name=name,
                    daemon=True,
                )

    def __enter__(self) -> Workers:
        try:
            for process in self._processes.values():
                process.start()
            for end in self._lent:
                end.close()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            try:
                self._stop()
            finally:
                self._end()
        else:
            self._end()

    def tell(self, name: str, message: object) -> None:
        """Send one worker a message.

        Raises
        ------
        WorkerFailedError
            If it is gone.
        """
        try:
            self._controls[name].send(message)
        except OSError:
            raise self._death(name) from None

    def tell_all(self, names: Iterable[str], message: object) -> None:
        """Send several workers one message."""
        for name in names:
            self.tell(name, message)

    def expect(self, kind: type[_Message], names: Iterable[str]) -> Mapping[str, _Message]:
        """Wait for the next message of each of some workers.

        Parameters
        ----------
        kind : type
            What each of them must say next.
        names : iterable of str
            The workers.

        Returns
        -------
        mapping of str to message
            In the order of `names`.

        Raises
        ------
        WorkerFailedError
            If any worker, of those or not, failed or died, or the run's time is over.
        """
        names = tuple(names)
        while missing := [name for name in names if not self._inboxes[name]]:
            remaining_s = self._deadline_s - time.monotonic()
            ready = wait(self._controls.values(), timeout=max(0.0, remaining_s))
            if not ready:
                raise WorkerFailedError(
                    f"{', '.join(missing)} did not say {kind.__name__} within the run's "
                    f"{self._timeout_s:.0f} s; raise the timeout or make the run smaller"
                )
            for name, control in self._controls.items():
                if control in ready:
                    self._inboxes[name].append(self._read(name))
        found: dict[str, _Message] = {}
        for name in names:
            message = self._inboxes[name].popleft()
            if not isinstance(message, kind):
                raise WorkerFailedError(f"{name} said {message!r} instead of {kind.__name__}")
            found[name] = message
        return found

    def _stop(self) -> None:
        """Let every worker close its endpoint and exit, and see that each did."""
        self.tell_all(self._processes, Stop())
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        for name, process in self._processes.items():
            process.join(max(0.0, deadline_s - time.monotonic()))
            if process.exitcode is None:
                raise WorkerFailedError(f"{name} did not stop within {_STOP_TIMEOUT_S:.0f} s")
            if process.exitcode != 0:
                self._read(name)
                raise self._death(name)

    def _read(self, name: str) -> object:
        try:
            message: object = self._controls[name].recv()
        except (EOFError, OSError):
            raise self._death(name) from None
        if isinstance(message, Failed):
            raise WorkerFailedError(f"{name} failed:\n{message.traceback.rstrip()}")
        return message

    def _death(self, name: str) -> WorkerFailedError:
        process = self._processes[name]
        process.join(1.0)
        return WorkerFailedError(f"{name} died with exit code {process.exitcode} and no message")

    def _end(self) -> None:
        """End whatever still runs, by its own process, and close our ends of the pipes."""
        started = [process for process in self._processes.values() if process.pid is not None]
        for end in (process.terminate for process in started if process.is_alive()):
            end()
        for process in started:
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join(2.0)
        for control in self._controls.values():
            control.close()
        for connection in self._lent:
            connection.close()
