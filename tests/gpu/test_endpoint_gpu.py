"""Endpoints on a GPU: two processes on one device, NIXL over cuda_ipc, bytes compared there."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection

import numpy as np
import pytest

from kvpack import CacheLayout, Endpoint, Options, Shard, Staging, declare

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TIMEOUT_S = 120.0
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


def in_sequence(
    layout: CacheLayout, pools: list[torch.Tensor], blocks: np.ndarray, tokens: int
) -> torch.Tensor:
    """The request's elements, (cache tensor, token, head * dim), read through torch's own views."""
    rows = []
    for tensor in layout.tensors:
        pool = next(
            p
            for p in pools
            if p.data_ptr() <= tensor.address < p.data_ptr() + p.numel() * p.element_size()
        )
        (inner, inner_stride), *_ = tensor.inner
        view = torch.as_strided(
            pool,
            (tensor.num_blocks, tensor.block_tokens, tensor.heads.count, inner),
            tuple(
                s // 2
                for s in (
                    tensor.block_stride,
                    tensor.token_stride,
                    tensor.head_stride,
                    inner_stride,
                )
            ),
            (tensor.address - pool.data_ptr()) // 2 + pool.storage_offset(),
        )
        index = torch.as_tensor(blocks.astype(np.int64), device="cuda")
        rows.append(view[index].flatten(0, 1)[:tokens].flatten(1))
    return torch.stack(rows)


def _restore(
    layout: CacheLayout, pool: torch.Tensor, before: torch.Tensor, blocks: np.ndarray, tokens: int
) -> None:
    """Copy the request's own elements back from ``before``."""
    size = pool.element_size()
    local = torch.arange(tokens, device="cuda")
    ids = torch.as_tensor(blocks.astype(np.int64), device="cuda")
    for tensor in layout.tensors:
        start = tensor.address - pool.data_ptr()
        if not 0 <= start < pool.numel() * size:
            continue
        (inner, inner_stride), *_ = tensor.inner
        at = (
            start
            + ids[local // tensor.block_tokens] * tensor.block_stride
            + local % tensor.block_tokens * tensor.token_stride
        )[:, None, None]
        heads = torch.arange(tensor.heads.count, device="cuda") * tensor.head_stride
        columns = torch.arange(inner, device="cuda") * inner_stride
        index = ((at + heads[:, None] + columns) // size).flatten()
        pool.view(-1)[index] = before.view(-1)[index]


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


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_on_one_gpu_ship_every_byte(name: str) -> None:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=prefill, args=(name, theirs), daemon=True)
    process.start()
    try:
        layout, pools, count = make_cache(name, 1, seed=3)
        poison = [pool.clone() for pool in pools]
        tokens = PAIRS[name][3]
        need = -(-tokens // layout.groups[0].block_tokens)
        assert mine.poll(TIMEOUT_S)
        address = mine.recv()
        options = Options(chunk_bytes=8 << 20, max_ctas=64)
        with (
            Staging("cuda", 64 << 20) as staging,
            Endpoint("d", layout, staging=staging, options=options) as endpoint,
        ):
            endpoint.connect(address)
            for i in range(3):
                blocks = np.random.default_rng(10 + i).permutation(count)[:need]
                for pool, before in zip(pools, poison, strict=True):
                    pool.copy_(before)
                torch.cuda.synchronize()
                result = endpoint.receive(f"r{i}", blocks, 0, tokens, from_=["p"]).result(TIMEOUT_S)
                assert result.aux == {"p": b"first"}
                source_layout, source_pools, source_count = make_cache(name, 0, seed=1)
                source_need = -(-tokens // source_layout.groups[0].block_tokens)
                source_blocks = np.random.default_rng(2).permutation(source_count)[:source_need]
                wanted = in_sequence(source_layout, source_pools, source_blocks, tokens)
                assert torch.equal(in_sequence(layout, pools, blocks, tokens), wanted)
                # A second look from the other side: put the poison back where the request was,
                # and nothing may be left that differs from before.
                for pool, before in zip(pools, poison, strict=True):
                    _restore(layout, pool, before, blocks, tokens)
                    assert torch.equal(pool, before)
            assert endpoint.capacity().receive.free == endpoint.capacity().receive.capacity
            mine.send("stop")
            assert mine.poll(TIMEOUT_S)
            outcome, nbytes, gather_ms = mine.recv()
            assert outcome == "done"
            assert nbytes == result.record.nbytes
            assert gather_ms > 0
            assert result.record.scatter_device_ms > 0
            process.join(TIMEOUT_S)
            assert process.exitcode == 0
    finally:
        if process.is_alive():
            os.kill(process.pid, 9)
