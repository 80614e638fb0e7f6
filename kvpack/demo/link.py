"""One worker's way into kvpack: declare its pools, connect, send or receive one request."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch

from kvpack import CacheLayout, Endpoint, Shard, Staging, declare
from kvpack.demo.paging import PagedCache
from kvpack.profiling.records import TransferRecord

__all__ = ["Link"]

_REQUEST_ID = "demo"


class Link:
    """An endpoint over one rank's paged cache.

    Parameters
    ----------
    name : str
        The endpoint's name.
    cache : PagedCache
        Its pools.
    heads : Shard
        The heads they hold.
    staging_bytes : int
        Staging memory to take.
    timeout_s : float
        Deadline of each wait.
    """

    def __init__(
        self, name: str, cache: PagedCache, heads: Shard, staging_bytes: int, timeout_s: float
    ) -> None:
        tensors = [
            tensor
            for pool in cache.pools
            for tensor in declare(
                pool.tensor,
                cache.dims,
                layers=pool.layers,
                names=pool.names,
                heads=heads,
                block_tokens=cache.block_tokens,
            )
        ]
        self._device = cache.pools[0].tensor.device
        self._timeout_s = timeout_s
        self._staging = Staging(self._device, staging_bytes)
        self._endpoint = Endpoint(name, CacheLayout(tensors), staging=self._staging)

    def __enter__(self) -> Link:
        self._endpoint.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._endpoint.__exit__(kind, error, traceback)
        self._staging.close()

    def listen(self) -> str:
        """Accept peers on a free port of the loopback; return ``host:port``."""
        return self._endpoint.listen("127.0.0.1", 0)

    def connect(self, addresses: Sequence[str]) -> None:
        """Connect to endpoints that listen, each a ``host:port``."""
        for address in addresses:
            self._endpoint.connect(address)

    def warmup(self, peers: Sequence[str]) -> None:
        """Compile and connect what shipping will need, so that no phase pays for it."""
        self._endpoint.warmup(peers)

    def send(self, blocks: npt.NDArray[np.int32], tokens: int, aux: bytes) -> TransferRecord:
        """Send the request's cache to whichever connected peers ask, and wait for them all."""
        handle = self._endpoint.send(
            _REQUEST_ID,
            blocks,
            0,
            tokens,
            ready=self._pools_ready(),
            timeout_s=self._timeout_s,
            aux=aux,
        )
        return handle.result(self._timeout_s).record

    def receive(
        self,
        blocks: npt.NDArray[np.int32],
        tokens: int,
        senders: Sequence[str],
        receivers: Sequence[str],
    ) -> tuple[TransferRecord, bytes]:
        """Receive the request's cache and wait for it; return what rode along too."""
        handle = self._endpoint.receive(
            _REQUEST_ID,
            blocks,
            0,
            tokens,
            from_=senders,
            receivers=receivers,
            ready=self._pools_ready(),
            timeout_s=self._timeout_s,
        )
        result = handle.result(self._timeout_s)
        return result.record, result.aux[senders[0]]

    def _pools_ready(self) -> torch.cuda.Event | None:
        """Record an event after what this process wrote to its pools; on the CPU there is none."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event
