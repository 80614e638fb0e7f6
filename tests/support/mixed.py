"""A hybrid model's cache: full attention, a window, Mamba2 state and indexer keys."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from kvpack import NO_BLOCK, CacheLayout, Shard, declare

WINDOW = 128
FULL, SLIDING, STATE, INDEX = range(4)
HEADS = Shard(0, 4, 4)


@dataclass(eq=False)
class HybridCache:
    """Layer 0 attends to everything and has an index, layer 1 to a window, layer 2 is Mamba2.

    Attributes
    ----------
    arrays : dict of str to ndarray
        ``full`` and ``sliding``: (kv, block, token, head, dim); ``index``: (block, token, bytes);
        ``ssm``: (slot, head, dim, state); ``conv``: (slot, bytes), three sections.
    """

    arrays: dict[str, np.ndarray]
    layout: CacheLayout
    tokens: tuple[int, int, int]

    @staticmethod
    def of(seed: int, tokens: tuple[int, int, int], *, window: int | None = WINDOW) -> HybridCache:
        """Noise everywhere; ``tokens`` are the block sizes of full, sliding and index."""
        noise = np.random.default_rng(seed)

        def array(*shape: int) -> np.ndarray:
            return noise.integers(0, 256, shape, dtype=np.uint8)

        blocks = [640 // size for size in tokens]
        arrays = {
            "full": array(2, blocks[0], tokens[0], 4, 32),
            "sliding": array(2, blocks[1], tokens[1], 4, 16),
            "index": array(blocks[2], tokens[2], 132),
            "ssm": array(5, 4, 8, 16),
            "conv": array(5, 96 + 24 + 24),
        }
        dims = "kv block token head dim"
        conv = arrays["conv"]
        tensors = [
            *declare(arrays["full"], dims, layers=0, names=("k", "v"), heads=HEADS, group=FULL),
            *declare(
                arrays["sliding"], dims, layers=1, names=("k", "v"), heads=HEADS, group=SLIDING,
                window=window,
            ),
            *declare(
                arrays["ssm"], "slot head dim state", layers=2, names="ssm", heads=HEADS,
                group=STATE,
            ),
            *declare(
                conv[:, :96], "slot (head dim)", layers=2, names="conv.x", heads=HEADS, group=STATE
            ),
            *declare(conv[:, 96:120], "slot dim", layers=2, names="conv.B", group=STATE),
            *declare(conv[:, 120:], "slot dim", layers=2, names="conv.C", group=STATE),
            *declare(
                arrays["index"], "block token bytes", layers=0, names="index_k", group=INDEX
            ),
        ]  # fmt: skip
        return HybridCache(arrays, CacheLayout(tensors), tokens)

    def blocks(self, seed: int, last: int) -> list[np.ndarray]:
        """Shuffled lists for positions ``[0, last)``; of the window only what it needs."""
        rng = random.Random(seed)
        full, sliding, index = (
            np.array(rng.sample(range(640 // size), -(-last // size)), np.int32)
            for size in self.tokens
        )
        start = max(0, last - WINDOW) // self.tokens[1]
        return [full, sliding[start:], np.array([rng.randrange(5)], np.int32), index]

    def read(self, lists: list[np.ndarray], first: int, last: int) -> dict[str, np.ndarray]:
        """The request's bytes in sequence order, by the lists that ``blocks`` gave."""
        full, sliding, slot, index = lists
        begin = max(0, last - WINDOW) // self.tokens[1] * self.tokens[1]

        def positions(array: np.ndarray, ids: np.ndarray, start: int, since: int) -> np.ndarray:
            chosen = array[..., ids, :, :, :] if array.ndim == 5 else array[ids]
            axis = array.ndim - 4 if array.ndim == 5 else 0
            shape = (*chosen.shape[:axis], -1, *chosen.shape[axis + 2 :])
            rows = chosen.reshape(shape)
            return rows[(slice(None),) * axis + (slice(since - start, last - start),)]

        return {
            "full": positions(self.arrays["full"], full, 0, first),
            "sliding": positions(self.arrays["sliding"], sliding, begin, max(first, last - WINDOW)),
            "index": positions(self.arrays["index"], index, 0, first),
            "ssm": self.arrays["ssm"][slot[0]],
            "conv": self.arrays["conv"][slot[0]],
        }


def padded(lists: list[np.ndarray], blocks: int) -> list[np.ndarray]:
    """The window's list as long as that of a full group, with `NO_BLOCK` in front."""
    out = list(lists)
    holes = np.full(blocks - len(out[SLIDING]), NO_BLOCK, np.int32)
    out[SLIDING] = np.concatenate([holes, out[SLIDING]])
    return out
