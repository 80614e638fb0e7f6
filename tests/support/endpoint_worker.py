"""Endpoints in processes of their own, told what to do over a pipe, and ended by their pid."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import traceback
from collections import deque
from multiprocessing.connection import Connection
from typing import Any

import psutil
from support.caches import PATIENCE_S, Cache, Group, is_idle, until

from kvpack.handles import ReceiveHandle, SendHandle, TransferHandle

IDLE_TIMEOUT_S = 120.0
WINDOW = 8


class Worker:
    """A process with one cache and one endpoint over NIXL.

    Parameters
    ----------
    name : str
        The endpoint's.
    shape : dict
        Of its `Cache`.
    seed : int or None
        What the cache is filled with; poison if None.
    environment : dict
        Set before anything is imported.
    staging_bytes, slot_bytes, options
        Of its endpoint.
    """

    def __init__(
        self,
        name: str,
        shape: dict[str, Any] | None = None,
        seed: int | None = None,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        before = {key: os.environ.get(key) for key in environment or {}}
        os.environ.update(environment or {})  # a spawned process has it from its first import on
        try:
            self.process = spawn.Process(
                target=_serve, args=(theirs, name, shape or {}, seed, options), daemon=True
            )
            self.process.start()
        finally:
            for key, value in before.items():
                os.environ.pop(key)
                if value is not None:
                    os.environ[key] = value
        theirs.close()
        self.name = name

    def tell(self, method: str, *arguments: Any, **named: Any) -> None:
        """Start a call of one of `_Served`'s methods."""
        self._pipe.send((method, arguments, named))

    def answer(self, timeout_s: float = PATIENCE_S) -> Any:
        """What the call that was started first came to."""
        assert self._pipe.poll(timeout_s), f"worker {self.name!r} did not answer in {timeout_s} s"
        is_well, value = self._pipe.recv()
        assert is_well, value
        return value

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call one of `_Served`'s methods."""
        self.tell(method, *arguments, **named)
        return self.answer()

    def kill(self) -> None:
        """End the process as a crash does."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(PATIENCE_S)

    def stop(self) -> None:
        """End the process; well, if it can."""
        if self.process.is_alive():
            self._pipe.send(("stop", (), {}))
            self.process.join(PATIENCE_S)
        if self.process.is_alive():
            self.kill()
        self._pipe.close()


class _Served:
    def __init__(
        self, name: str, shape: dict[str, Any], seed: int | None, options: dict[str, Any]
    ) -> None:
        self.cache = Cache.of(**shape)
        if seed is not None:
            self.cache.fill(seed)
        self.group = Group("nixl")
        self.endpoint = self.group.open(name, self.cache.layout, **options)
        self.handles: dict[str, SendHandle | ReceiveHandle] = {}

    def listen(self) -> str:
        return self.endpoint.listen()

    def connect(self, address: str) -> str:
        return self.endpoint.connect(address)

    def send(self, request: str, *arguments: Any, **named: Any) -> None:
        self.handles[request] = self.endpoint.send(request, *arguments, **named)

    def receive(self, request: str, *arguments: Any, **named: Any) -> None:
        self.handles[request] = self.endpoint.receive(request, *arguments, **named)

    def result(self, request: str) -> tuple[str, str]:
        record = self.handles[request]
        record.wait(PATIENCE_S)
        return record.record.outcome, record.record.reason

    def digest(self, blocks: list[int], first: int, last: int) -> str:
        return self.cache.digest(blocks, first, last)

    def is_idle(self) -> bool:
        until(lambda: is_idle(self.endpoint))
        return True

    def exchange_many(
        self, side: str, peer: str, count: int, seed: int, max_tokens: int
    ) -> tuple[list[str], list[int]]:
        """Send or receive requests of random sizes, some at a time.

        Returns a digest a request, and resident bytes as they were after each tenth of them.
        """
        sizes = random.Random(seed)
        rng = random.Random(f"{seed} {side}")
        free = set(range(self.cache.pools[0].shape[1]))
        open_: deque[tuple[TransferHandle[Any], list[int], int]] = deque()
        digests: list[str] = []
        resident: list[int] = []

        def finish() -> None:
            handle, blocks, tokens = open_.popleft()
            handle.result(PATIENCE_S)
            digests.append(self.cache.digest(blocks, 0, tokens))
            free.update(blocks)

        for number in range(count):
            tokens = sizes.randint(1, max_tokens)
            blocks = rng.sample(sorted(free), -(-tokens // self.cache.block_tokens))
            free -= set(blocks)
            if side == "send":
                sent = self.endpoint.send(f"many{number}", blocks, 0, tokens, to=[peer])
                open_.append((sent, blocks, tokens))
            else:
                self.cache.erase(blocks, 0, tokens)
                got = self.endpoint.receive(f"many{number}", blocks, 0, tokens, from_=[peer])
                open_.append((got, blocks, tokens))
            if len(open_) == WINDOW:
                finish()
            if (number + 1) % (count // 10) == 0:
                resident.append(psutil.Process().memory_info().rss)
        while open_:
            finish()
        return digests, resident

    def live_handles(self) -> int:
        """Handles that something still holds."""
        self.handles.clear()
        gc.collect()
        return sum(isinstance(thing, TransferHandle) for thing in gc.get_objects())


def _serve(
    pipe: Connection, name: str, shape: dict[str, Any], seed: int | None, options: dict[str, Any]
) -> None:
    served = _Served(name, shape, seed, options)
    while pipe.poll(IDLE_TIMEOUT_S):
        method, arguments, named = pipe.recv()
        if method == "stop":
            break
        try:
            pipe.send((True, getattr(served, method)(*arguments, **named)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    served.group.close()
