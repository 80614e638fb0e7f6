"""One rank's cache on a GPU, and the process that prefills: what the GPU suite's endpoints need."""

from __future__ import annotations

from multiprocessing.connection import Connection

import numpy as np
import torch

from kvpack import CacheLayout, Endpoint, Shard, Staging, declare

TIMEOUT_S = 60.0
HEADS, DIM = 4, 128

# (source dims, block tokens), (destination dims, block tokens), layers, tokens
PAIRS = {
    "nhd_to_hnd": (("kv block token head dim", 16), ("block kv head token dim", 64), 8, 4000),
    "hnd_to_nhd": (("block layer kv head token dim", 32), ("kv block token head dim", 48), 8, 4001),
    "token_pool": (("(block token) head dim", 1), ("block head token dim", 64), 4, 1000),
    "latent": (("block layer token dim", 32), ("layer block token dim", 64), 61, 4096),
    "latent_same": (("block layer token dim", 32), ("block layer token dim", 32), 61, 4096),
}


def make_cache(name: str, side: int, seed: int) -> tuple[CacheLayout, list[torch.Tensor], int]:
    """Random pools of one side, seeded, and their layout; the block's tokens last."""
    (dims, tokens), layers, count = PAIRS[name][side], PAIRS[name][2], PAIRS[name][3]
    headed = "head" in dims
    names = ("k", "v") if headed else ("kv",)
    blocks = -(-count // tokens) + 7
    sizes = {
        "block": blocks,
        "token": tokens,
        "head": HEADS,
        "dim": DIM if headed else 576,
        "kv": 2,
        "layer": layers,
    }
    generator = torch.Generator("cuda").manual_seed(seed)
    tensors, pools = [], []
    for some_layers in [range(layers)] if "layer" in dims else [(i,) for i in range(layers)]:
        for some_names in [names] if "kv" in dims.split() else [(n,) for n in names]:
            if "(block token)" in dims:
                shape = [blocks * tokens, HEADS, DIM]
            else:
                shape = [sizes[axis] for axis in dims.split()]
            pool = torch.randint(
                -(1 << 15), 1 << 15, shape, dtype=torch.int16, device="cuda", generator=generator
            )
            pools.append(pool)
            tensors += declare(
                pool,
                dims,
                layers=tuple(some_layers),
                names=some_names,
                heads=Shard(0, HEADS, HEADS) if headed else None,
                block_tokens=tokens,
            )
    return CacheLayout(tensors), pools, blocks


def prefill(name: str, pipe: Connection) -> None:
    """The sending process: its cache is filled from a seed that the other side knows."""
    layout, pools, count = make_cache(name, 0, seed=1)
    tokens = PAIRS[name][3]
    blocks = np.random.default_rng(2).permutation(count)
    need = -(-tokens // layout.groups[0].block_tokens)
    event = torch.cuda.Event()
    event.record()
    with Staging("cuda", 64 << 20) as staging, Endpoint("p", layout, staging=staging) as endpoint:
        pipe.send(endpoint.listen())
        for i in range(3):
            handle = endpoint.send(f"r{i}", blocks[:need], 0, tokens, ready=event, aux=b"first")
            handle.result(TIMEOUT_S)
        record = handle.record
        pipe.send((record.outcome, record.nbytes, record.gather_device_ms))
        pipe.recv()
    del pools
