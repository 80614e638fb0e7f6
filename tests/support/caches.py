"""Paged caches for endpoint tests, read back in sequence order, and endpoints over them."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvpack import CacheLayout, Endpoint, Options, Shard, Staging, declare

POISON = 0x5A
PATIENCE_S = 30.0
_POLL_S = 1e-3
TWO_HEADS = Shard(0, 2, 2)


@dataclass(eq=False)
class Cache:
    """One rank's pools, ``kv block token head dim`` int16 for each layer, full of poison."""

    pools: list[np.ndarray]
    layout: CacheLayout
    block_tokens: int

    @staticmethod
    def of(
        *,
        layers: int = 2,
        num_blocks: int = 64,
        block_tokens: int = 4,
        heads: Shard = TWO_HEADS,
        dim: int = 8,
        dtype: str = "int16",
    ) -> Cache:
        shape = (2, num_blocks, block_tokens, heads.count, dim)
        pools = [np.zeros(shape, dtype) for _ in range(layers)]
        for pool in pools:
            pool.view(np.uint8)[:] = POISON
        tensors = [
            tensor
            for layer, pool in enumerate(pools)
            for tensor in declare(
                pool, "kv block token head dim", layers=layer, names=("k", "v"), heads=heads
            )
        ]
        return Cache(pools, CacheLayout(tensors), block_tokens)

    def fill(self, seed: int) -> Cache:
        """Write noise everywhere."""
        noise = np.random.default_rng(seed)
        for pool in self.pools:
            pool.view(np.uint8)[:] = noise.integers(0, 256, pool.view(np.uint8).shape, np.uint8)
        return self

    def blocks(self, rng: random.Random, first: int, last: int) -> list[int]:
        """A random block list for positions ``[first, last)``."""
        count = -(-last // self.block_tokens) - first // self.block_tokens
        return rng.sample(range(self.pools[0].shape[1]), count)

    def read(self, blocks: Sequence[int], first: int, last: int) -> np.ndarray:
        """Copy of shape (layer, kv, token, head, dim), in sequence order."""
        start = first // self.block_tokens * self.block_tokens
        chosen = np.stack([pool[:, list(blocks)] for pool in self.pools])
        flat = chosen.reshape(*chosen.shape[:2], -1, *chosen.shape[4:])
        return flat[:, :, first - start : last - start].copy()

    def digest(self, blocks: Sequence[int], first: int, last: int) -> str:
        """Digest of those bytes."""
        return hashlib.blake2b(self.read(blocks, first, last).tobytes()).hexdigest()

    def erase(self, blocks: Sequence[int], first: int, last: int) -> None:
        """Poison positions ``[first, last)`` again."""
        start = first // self.block_tokens * self.block_tokens
        for position in range(first, last):
            block, token = divmod(position - start, self.block_tokens)
            for pool in self.pools:
                pool[:, blocks[block], token].view(np.uint8)[:] = POISON

    def is_poison(self) -> bool:
        """Whether nothing was ever written here."""
        return all(bool((pool.view(np.uint8) == POISON).all()) for pool in self.pools)


class Flag:
    """A ready event for tests: fires when told to, or fails."""

    def __init__(self) -> None:
        self.fired = False
        self.error: Exception | None = None
        self.queries = 0

    def query(self) -> bool:
        self.queries += 1
        if self.error is not None:
            raise self.error
        return self.fired


class Group:
    """Endpoints of one test and one transport, closed with it."""

    def __init__(self, transport: str) -> None:
        self.transport = transport
        self.endpoints: list[Endpoint] = []
        self.stagings: list[Staging] = []

    def open(
        self,
        name: str,
        layout: CacheLayout,
        *,
        staging_bytes: int = 1 << 20,
        slot_bytes: int = 4096,
        **options: object,
    ) -> Endpoint:
        """Open an endpoint on staging memory of its own."""
        chosen: dict[str, object] = {"transport": self.transport, "timeout_s": 20.0, **options}
        staging = Staging("cpu", staging_bytes, slot_bytes=slot_bytes)
        self.stagings.append(staging)
        endpoint = Endpoint(name, layout, staging=staging, options=Options(**chosen))  # type: ignore[arg-type]
        self.endpoints.append(endpoint)
        return endpoint

    def pair(self, here: Cache, there: Cache, **options: object) -> tuple[Endpoint, Endpoint]:
        """A connected ``prefill`` and ``decode``."""
        prefill = self.open("prefill", here.layout, **options)
        decode = self.open("decode", there.layout, **options)
        self.meet(prefill, decode)
        return prefill, decode

    @staticmethod
    def meet(*endpoints: Endpoint) -> None:
        """Connect each with each."""
        hello = {endpoint.name: endpoint.metadata() for endpoint in endpoints}
        for one in endpoints:
            for name, metadata in hello.items():
                if name != one.name:
                    assert one.connect(metadata) == name

    def close(self) -> None:
        """Close them, and let go of them."""
        for endpoint in self.endpoints:
            endpoint.close()
        for staging in self.stagings:
            staging.close()
        self.endpoints.clear()
        self.stagings.clear()


def until(reached: Callable[[], bool], *driven: Endpoint, timeout_s: float = PATIENCE_S) -> None:
    """Look again and again until something holds; drive endpoints that have no thread."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not reached():
        assert time.monotonic() < deadline, f"not reached within {timeout_s} s"
        for endpoint in driven:
            endpoint.progress()
        if not driven:
            pause.wait(_POLL_S)


def is_idle(endpoint: Endpoint) -> bool:
    """Whether nothing is under way and every slot is free."""
    found = endpoint.capacity()
    pools_free = all(pool.free == pool.capacity for pool in (found.send, found.receive))
    return pools_free and not found.sends and not found.receives


def ship_once(
    prefill: Endpoint,
    decode: Endpoint,
    here: Cache,
    there: Cache,
    *,
    request: str = "afterwards",
    tokens: int = 21,
    seed: int = 0,
) -> None:
    """A transfer that must succeed, compared byte for byte."""
    rng = random.Random(seed)
    ours, theirs = here.blocks(rng, 0, tokens), there.blocks(rng, 0, tokens)
    sent = prefill.send(request, ours, 0, tokens, to=[decode.name])
    received = decode.receive(request, theirs, 0, tokens, from_=[prefill.name])
    received.result(PATIENCE_S)
    sent.result(PATIENCE_S)
    assert (there.read(theirs, 0, tokens) == here.read(ours, 0, tokens)).all()
