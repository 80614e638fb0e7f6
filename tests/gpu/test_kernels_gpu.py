"""The Triton kernels on a GPU, against the same oracle as everywhere.

``-k memcheck`` selects a small subset for compute-sanitizer, whose every launch is slow.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.kernel_cases import (
    Sizes,
    check_expand,
    check_gather,
    check_scatter,
    far_case,
    large_case,
    many_spans_case,
    random_case,
)

from kvpack.errors import OptionsError, StagingError
from kvpack.kernels import LaneTable, expand, gather, scatter, warmup
from kvpack.kernels.specializations import specializations

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module", autouse=True)
def _warm():
    warmup("cuda")


def on_gpu(copy):
    """Return `copy` with its table on the GPU, finished when it returns."""

    def run(table, spans, blocks, staging, **options):
        copy(LaneTable(table, "cuda"), spans, blocks, staging, **options)
        torch.cuda.synchronize()

    return run


def expand_on_gpu(table, spans, blocks, **options):
    return expand(LaneTable(table, "cuda"), spans, blocks, **options).cpu()


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_random_tables_copy_every_byte_and_no_other(first):
    for seed in range(first, first + 50):
        case = random_case(seed)
        cap = {"max_ctas": 3} if seed % 3 == 0 else {}
        check_gather(case, seed, on_gpu(gather), "cuda", **cap)
        check_scatter(case, seed, on_gpu(scatter), "cuda", **cap)
        check_expand(case, expand_on_gpu)


@pytest.mark.parametrize("word_bytes", [1, 2, 4, 8, 16])
def test_memcheck_every_width(word_bytes):
    sizes = Sizes(lanes=2, blocks=8, run_words=40, classes=2, word_bytes=(word_bytes,))
    for seed in range(4):
        case = random_case(seed, sizes, holes=seed == 3)
        cap = {"max_ctas": 2} if seed == 2 else {}
        check_gather(case, seed, on_gpu(gather), "cuda", **cap)
        check_scatter(case, seed, on_gpu(scatter), "cuda", **cap)


def test_memcheck_runs_longer_than_a_tile():
    case = large_case(seed=1, token_bytes=1152, tokens=32 * 9, block_tokens=32, lanes=2)
    for cap in ({}, {"max_ctas": 3}):
        check_gather(case, 1, on_gpu(gather), "cuda", **cap)
        check_scatter(case, 1, on_gpu(scatter), "cuda", **cap)
    check_expand(case, expand_on_gpu)


def test_blocks_that_hold_nothing_are_skipped():
    for seed in range(60):
        case = random_case(seed, holes=True)
        check_gather(case, seed, on_gpu(gather), "cuda")
        check_scatter(case, seed, on_gpu(scatter), "cuda")
        check_expand(case, expand_on_gpu)


def test_many_blocks_of_a_latent():
    case = large_case(seed=3, token_bytes=1152, tokens=32 * 200, block_tokens=32, lanes=7)
    for cap in ({}, {"max_ctas": 128}):
        check_gather(case, 3, on_gpu(gather), "cuda", **cap)
        check_scatter(case, 3, on_gpu(scatter), "cuda", **cap)


def test_more_spans_than_a_program_compares_at_once():
    case = many_spans_case(seed=4, classes=100)
    check_gather(case, 4, on_gpu(gather), "cuda")
    check_scatter(case, 4, on_gpu(scatter), "cuda", max_ctas=5)
    check_expand(case, expand_on_gpu)


def test_addresses_beyond_32_bits_expand():
    check_expand(far_case(), expand_on_gpu)


@pytest.mark.parametrize("max_ctas", [None, 64])
def test_a_lane_of_more_than_4_gib(max_ctas):
    token_bytes, block_tokens, num_blocks = 1024, 64, 70_000
    case = large_case(5, token_bytes, block_tokens * num_blocks, block_tokens)
    assert case.staging_bytes > 1 << 32
    pool = torch.randint(0, 1 << 62, (case.pool_bytes[0] // 8,), device="cuda")
    blocks = pool.view(-1, token_bytes * block_tokens // 8)
    ids = torch.from_numpy(case.blocks.astype(np.int64))[:num_blocks].cuda()
    table = LaneTable(case.table([pool.data_ptr()]), "cuda")
    staging = torch.empty(case.staging_bytes, dtype=torch.uint8, device="cuda")
    gather(table, case.spans, case.blocks, staging, max_ctas=max_ctas)
    assert torch.equal(staging.view(torch.int64), blocks[ids].view(-1))
    kept = torch.ones(len(blocks), dtype=torch.bool, device="cuda")
    kept[ids] = False
    expected = blocks[kept].clone()
    pool_sum = blocks[ids].sum()
    blocks[ids] = 0
    scatter(table, case.spans, case.blocks, staging, max_ctas=max_ctas)
    assert torch.equal(staging.view(torch.int64), blocks[ids].view(-1))
    assert torch.equal(blocks[kept], expected)
    assert torch.equal(blocks[ids].sum(), pool_sum)


def test_a_busy_stream_gets_its_own_upload():
    """Many launches wait on one stream; none may see another's spans or ids."""
    case = large_case(seed=6, token_bytes=1024, tokens=16 * 40, block_tokens=16)
    block_bytes = 16 * 1024
    num_blocks = case.pool_bytes[0] // block_bytes
    pool = torch.randint(0, 256, (num_blocks, block_bytes), dtype=torch.uint8, device="cuda")
    table = LaneTable(case.table([pool.data_ptr()]), "cuda")
    stream = torch.cuda.Stream()
    order = np.random.default_rng(6)
    lists = [order.permutation(case.blocks[:40]).astype(np.int32) for _ in range(50)]
    stagings = torch.zeros((50, case.staging_bytes), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
    busy = torch.cuda.Event()
    busy.record(stream)
    for ids, staging in zip(lists, stagings, strict=True):
        given = ids.copy()
        gather(table, case.spans, given, staging, stream=stream)
        given[:] = -1
    assert not busy.query(), "the launches were to wait behind a busy stream"
    stream.synchronize()
    for ids, staging in zip(lists, stagings, strict=True):
        wanted = pool[torch.from_numpy(ids.astype(np.int64)).cuda()].view(-1)
        assert torch.equal(staging, wanted)


def test_requests_compile_nothing_after_the_warm_up():
    import triton

    compiled = []
    hook = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = lambda **event: compiled.append(event["repr"]) and False
    try:
        for seed in range(500):
            case = random_case(seed, Sizes(classes=2))
            cap = {"max_ctas": 1 + seed % 7} if seed % 2 else {}
            check_gather(case, seed, on_gpu(gather), "cuda", **cap)
            check_scatter(case, seed, on_gpu(scatter), "cuda", **cap)
    finally:
        triton.knobs.runtime.jit_cache_hook = hook
    assert compiled == []
    assert len(specializations()) == 10


def test_the_steady_state_neither_allocates_nor_waits():
    case = large_case(seed=7, token_bytes=1024, tokens=16 * 40, block_tokens=16)
    pool = torch.empty(case.pool_bytes[0], dtype=torch.uint8, device="cuda")
    staging = torch.empty(case.staging_bytes, dtype=torch.uint8, device="cuda")
    table = LaneTable(case.table([pool.data_ptr()]), "cuda")
    stream = torch.cuda.Stream()
    gather(table, case.spans, case.blocks, staging, stream=stream)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            gather(table, case.spans, case.blocks, staging, stream=stream)
            scatter(table, case.spans, case.blocks, staging, stream=stream)
            while not stream.query():
                pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_memory_in_two_places_is_refused():
    case = large_case(seed=8, token_bytes=64, tokens=64, block_tokens=8)
    rows = case.table([1 << 40])
    staging = torch.empty(case.staging_bytes, dtype=torch.uint8, device="cuda")
    with pytest.raises(StagingError, match="but the lane table"):
        gather(LaneTable(rows), case.spans, case.blocks, staging)
    with pytest.raises(StagingError, match="but the lane table"):
        gather(LaneTable(rows, "cuda"), case.spans, case.blocks, staging.cpu())
    with pytest.raises(OptionsError, match="'numpy' cannot reach"):
        gather(LaneTable(rows, "cuda"), case.spans, case.blocks, staging, backend="numpy")
