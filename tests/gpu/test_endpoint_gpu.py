"""Endpoints on a GPU: two processes on one device, NIXL over cuda_ipc, bytes compared there."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np
import pytest
import torch
from support.gpu_caches import PAIRS, TIMEOUT_S, make_cache, prefill

from kvpack import CacheLayout, Endpoint, Options, Staging

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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


def take(pipe: Connection, process: BaseProcess) -> object:
    """What the other process says next; fails at once if it has died."""
    for _ in range(int(TIMEOUT_S * 10)):
        if pipe.poll(0.1):
            return pipe.recv()
        assert process.is_alive(), f"the prefill process ended with {process.exitcode}"
    raise AssertionError("the prefill process said nothing in time")


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
        address = take(mine, process)
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
            outcome, nbytes, gather_ms = take(mine, process)
            assert outcome == "done"
            assert nbytes == result.record.nbytes
            assert gather_ms > 0
            assert result.record.scatter_device_ms > 0
            process.join(TIMEOUT_S)
            assert process.exitcode == 0
    finally:
        if process.is_alive():
            os.kill(process.pid, 9)
