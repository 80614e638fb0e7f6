"""The proof: what it accepts, what it refuses, and that it does not trust the planner."""

import random
import re

import numpy as np
import pytest
from support.shipping import elected_plans, ship
from support.topology import random_topology

from kvpack.blocks import NO_BLOCK
from kvpack.errors import BlockListError, CoverageError, VerificationError
from kvpack.fragments import Fragments
from kvpack.layout import CacheLayout, CacheTensor, ContextShard, Shard, declare
from kvpack.plan import compile_plan
from kvpack.verification import Party, Proof, Request, verify, verify_fragments


def pool(array: np.ndarray, group: int = 0, layer: int = 0) -> tuple[CacheTensor, ...]:
    dims = "block kv token head dim"
    heads = Shard(0, 2, 2)
    return declare(array, dims, layers=layer, names=("k", "v"), heads=heads, group=group)


def noise(seed: int) -> np.ndarray:
    """Six blocks of four tokens and two heads of eight bytes."""
    shape = (6, 2, 4, 2, 8)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def parties() -> tuple[Party, Party, list[np.ndarray]]:
    held = [noise(0), noise(1)]
    source, destination = (
        Party(CacheLayout(pool(array)), ids)
        for array, ids in zip(held, ([3, 1], [0, 5]), strict=True)
    )
    return source, destination, held


def moved(source: Party, destination: Party, request: Request) -> Fragments:
    plan = compile_plan(source.layout, destination.layout)
    return plan.fragments(source.blocks, destination.blocks, request.first, request.last)


def test_a_proof_counts_bytes_fragments_and_pairs() -> None:
    source, destination, _ = parties()
    proof = verify({"p": source}, {"d": destination}, Request(0, 8))
    assert proof == Proof(nbytes=8 * 2 * 16, fragments=2, pairs=1)
    clipped = verify({"p": source}, {"d": destination}, Request(1, 7))
    assert clipped.nbytes == 6 * 2 * 16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s, d, n: (s[:-1], d[:-1], n[:-1]),
            "receiver: wanted byte at {last:#x} would not be",
        ),
        (
            lambda s, d, n: (np.append(s, s[0]), np.append(d, d[0]), np.append(n, n[0])),
            "receiver: byte at {first:#x} would be written twice",
        ),
        (lambda s, d, n: (s, d + 384, n), "would be written, though it is outside the request"),
        (lambda s, d, n: (s, d, n + 8), "would be written, though it is outside the request"),
        (
            lambda s, d, n: (s[::-1], d, n),
            "byte at {first:#x} would get another layer's, head's or",
        ),
        (lambda s, d, n: (s + 8, d, n), "would get another layer's, head's or position's byte"),
        (lambda s, d, n: (s + 1, d, n), "would get another layer's, head's or position's byte"),
        (lambda s, d, n: (s, d + 1, n), "outside the request"),
        (lambda s, d, n: (s * 0, d, n), "would get another layer's, head's or position's byte"),
    ],
)
def test_wrong_fragments_are_refused_by_what_is_wrong(change: object, said: str) -> None:
    source, destination, _ = parties()
    request = Request(0, 8)
    found = moved(source, destination, request)
    wrong = Fragments(*change(*found))  # type: ignore[operator]
    said = said.format(first=found.destination[0], last=found.destination[-1])
    assert verify_fragments({"p": source}, destination, request, [("p", found)]) == 256
    with pytest.raises(VerificationError, match=re.escape(said)):
        verify_fragments({"p": source}, destination, request, [("p", wrong)], "receiver")


def test_keys_for_values_are_refused() -> None:
    source, destination, _ = parties()
    request = Request(0, 8)
    found = moved(source, destination, request)
    half = Fragments(
        np.concatenate([found.source + 64, found.source]),
        np.concatenate([found.destination, found.destination + 64]),
        np.concatenate([found.nbytes // 2] * 2),
    )
    with pytest.raises(VerificationError, match="another layer's"):
        verify_fragments({"p": source}, destination, request, [("p", half)])


def test_no_fragments_write_nothing_of_what_is_wanted() -> None:
    source, destination, _ = parties()
    with pytest.raises(VerificationError, match="would not be written"):
        verify_fragments({"p": source}, destination, Request(0, 8), [])


def test_stretches_that_hold_nothing_are_not_wanted() -> None:
    source, destination, _ = parties()
    destination = Party(destination.layout, [NO_BLOCK, 5])
    assert verify({"p": source}, {"d": destination}, Request(0, 8)).nbytes == 4 * 32


def test_a_request_that_cannot_be_planned_is_refused_as_elsewhere() -> None:
    source, destination, _ = parties()
    with pytest.raises(BlockListError, match="too short"):
        verify({"p": source}, {"d": destination}, Request(0, 9))
    with pytest.raises(CoverageError, match="at least one sender"):
        verify({}, {"d": destination}, Request(0, 8))


def test_a_context_rank_without_a_position_of_the_range_needs_no_blocks() -> None:
    arrays = [noise(i) for i in range(3)]
    sources = {
        f"p{c}": Party(CacheLayout(pool(arrays[c]), ContextShard(c, 2, 4)), ids)
        for c, ids in enumerate(([2], []))
    }
    destination = Party(CacheLayout(pool(arrays[2])), [4])
    assert verify(sources, {"d": destination}, Request(0, 4)).pairs == 1


def test_layer_groups_that_share_one_pool_land_in_their_own_blocks() -> None:
    held, wanted = noise(0), noise(1)
    # Both layers live in the same memory; the groups' block lists keep them apart.
    source, destination = (
        CacheLayout([*pool(array, 0, layer=0), *pool(array, 1, layer=1)])
        for array in (held, wanted)
    )
    expected = wanted.copy()
    expected[[0, 5, 2, 1]] = held[[3, 1, 4, 0]]
    ours, theirs = Party(source, [[3, 1], [4, 0]]), Party(destination, [[0, 5], [2, 1]])
    found = compile_plan(source, destination).fragments(ours.blocks, theirs.blocks, 0, 8)
    flat = [array.reshape(-1).view(np.uint8) for array in (held, wanted)]
    for a, b, n in zip(*found, strict=True):
        start, stop = int(b) - wanted.ctypes.data, int(a) - held.ctypes.data
        flat[1][start : start + n] = flat[0][stop : stop + n]
    assert (wanted == expected).all()
    assert verify({"p": ours}, {"d": theirs}, Request(0, 8)).nbytes == 8 * 2 * 32


def test_parts_of_a_request_make_the_whole() -> None:
    for seed in range(300, 360):
        case = random_topology(seed)
        rng = random.Random(seed)
        cut = rng.randint(case.first, case.last)
        for rank in case.sources:
            rank.fill(case.model)
        for rank in case.destinations:
            wanted = rank.expected(case.model)
            for source, plan in elected_plans(case, rank, str(seed), bool(seed % 2)):
                for first, last in ((cut, case.last), (case.first, cut)):
                    if first < last:
                        ship(plan, source, rank, first, last, 1 << 20)
            for got, want in zip(rank.buffers, wanted, strict=True):
                np.testing.assert_array_equal(got, want, err_msg=f"seed {seed}, cut at {cut}")
