"""The wire order: chunks cover it, spans repeat it, and no chunk cuts through a token."""

import random
from itertools import pairwise

import numpy as np
import pytest
from support.shipping import chunks_of, elected_plans
from support.topology import random_topology

from kvpack.blocks import block_table
from kvpack.columns import Row, Span
from kvpack.errors import StagingError
from kvpack.kernels import expand
from kvpack.layout import CacheLayout, Memory, Shard, declare
from kvpack.plan import TransferPlan, compile_plan
from kvpack.wire import WIRE_ALIGNMENT, chunk_origin

SIDES = ("source", "destination")


def pools(
    source_tokens: int, destination_tokens: int, heads: int = 3, dim: int = 5
) -> TransferPlan:
    """Two layers of K and V in bytes, token-major here and head-major there."""

    def layout(address: int, dims: str, *shape: int) -> CacheLayout:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
        memory = Memory(address, shape, tuple(strides), "uint8")
        return CacheLayout(
            declare(memory, dims, layers=range(2), names=("k", "v"), heads=Shard(0, heads, heads))
        )

    return compile_plan(
        layout(1 << 20, "layer kv block token head dim", 2, 2, 64, source_tokens, heads, dim),
        layout(1 << 28, "layer kv block head token dim", 2, 2, 64, heads, destination_tokens, dim),
    )


def spans_by_side(plan: TransferPlan, first: int, last: int, chunk: tuple[int, int]) -> list:
    wire = plan.wire(first, last)
    return [wire.spans(side, *chunk, (0,) * 4) for side in SIDES]  # type: ignore[arg-type]


def test_chunks_cover_the_wire_once_in_order_and_fit() -> None:
    rng = random.Random(1)
    for seed in range(60):
        case = random_topology(seed)
        for destination in case.destinations:
            for _, plan in elected_plans(case, destination, str(seed), bool(seed % 2)):
                wire = plan.wire(case.first, case.last)
                least = wire.piece_bytes
                for limit in (least, rng.randint(least, 4 * least), wire.total_bytes + 16):
                    chunks = chunks_of(plan.wire(case.first, case.last), limit)
                    edges = [start for start, _ in chunks] + [stop for _, stop in chunks[-1:]]
                    assert edges[:1] in ([], [0])
                    assert edges[-1:] in ([], [wire.total_bytes])
                    assert all(a < b for a, b in pairwise(edges))
                    assert all(b - chunk_origin(a) <= limit for a, b in chunks)
                    assert all(map(wire.is_boundary, edges))


def test_one_chunk_takes_everything_that_fits() -> None:
    wire = pools(16, 16).wire(0, 100)
    assert wire.cut(0, wire.total_bytes) == wire.total_bytes
    assert wire.cut(0, 1 << 40) == wire.total_bytes
    assert wire.cut(0, wire.total_bytes - 1) < wire.total_bytes


def test_a_chunk_ends_with_a_unit_where_one_fits() -> None:
    plan = pools(16, 32)
    wire = plan.wire(5, 100)
    token_bytes = plan.classes[0].token_bytes
    # The first unit is clipped to 11 positions, the following have 16.
    assert wire.cut(0, 13 * token_bytes) == 11 * token_bytes
    assert wire.cut(0, 28 * token_bytes) == 27 * token_bytes
    assert wire.cut(0, 26 * token_bytes) == 11 * token_bytes


def test_a_chunk_ends_within_a_unit_where_none_fits() -> None:
    plan = pools(16, 32)
    wire = plan.wire(5, 100)
    token_bytes = plan.classes[0].token_bytes
    assert wire.cut(0, 4 * token_bytes + 3) == 4 * token_bytes
    assert wire.cut(11 * token_bytes, 8 * token_bytes) % token_bytes == 0
    assert wire.is_boundary(4 * token_bytes)
    assert not wire.is_boundary(4 * token_bytes + 3)


def test_staging_of_less_than_a_token_is_refused_with_the_bytes_it_needs() -> None:
    plan = pools(16, 16, heads=8, dim=64)
    wire = plan.wire(0, 100)
    token_bytes = plan.classes[0].token_bytes
    said = f"one token of a lane has {token_bytes} bytes, but a chunk of {token_bytes - 1} bytes"
    with pytest.raises(StagingError, match=f"{said} .* at least {token_bytes + 16} bytes a pool"):
        wire.cut(0, token_bytes - 1)
    assert wire.piece_bytes == token_bytes + 16


def test_cutting_never_stands_still() -> None:
    for seed in range(40):
        case = random_topology(seed)
        for _, plan in elected_plans(case, case.destinations[0], "request", False):
            wire = plan.wire(case.first, case.last)
            for limit in range(1, wire.piece_bytes + 2):
                start = 0
                try:
                    while start < wire.total_bytes:
                        stop = wire.cut(start, limit)
                        assert stop > start, (seed, start, limit)
                        start = stop
                except StagingError:
                    assert limit < wire.piece_bytes


def test_nothing_in_common_is_an_empty_wire() -> None:
    plan = pools(16, 16)
    empty = compile_plan(plan.source, plan.destination, selection=())
    wire = empty.wire(0, 64)
    assert (wire.total_bytes, wire.payload_bytes, wire.fragments, wire.piece_bytes) == (0, 0, 0, 0)
    assert wire.cut(0, 1 << 16) == 0
    assert wire.is_boundary(0)
    assert wire.spans("source", 0, 0, (0,)).shape == (0, len(Span))


def test_lane_classes_begin_aligned() -> None:
    several = 0
    for seed in range(60):
        case = random_topology(seed)
        for _, plan in elected_plans(case, case.destinations[0], "request", False):
            wire = plan.wire(case.first, case.last)
            spans = wire.spans("source", 0, wire.total_bytes, (0,) * 4)
            for lane_class in plan.classes:
                lane = spans[:, Span.ROW] // 2 - lane_class.first_lane
                offsets = spans[(lane >= 0) & (lane < lane_class.lanes), Span.OFFSET]
                assert not len(offsets) or offsets.min() % WIRE_ALIGNMENT == 0
            several += len(plan.classes) > 1
    assert several > 20


def test_a_chunk_may_begin_in_the_gap_before_an_aligned_class() -> None:
    # A latent of 2 bytes a position ends at byte 6, one of 5 bytes begins at byte 16.
    def layout(address: int) -> CacheLayout:
        latents = [
            declare(
                Memory(address << n, (8, 4, n), (4 * n, n, 1), "uint8"),
                "block token dim",
                layers=0,
                names=name,
            )
            for name, n in (("a", 5), ("b", 2))
        ]
        return CacheLayout([tensor for some in latents for tensor in some])

    wire = compile_plan(layout(1 << 20), layout(1 << 24)).wire(0, 3)
    assert wire.total_bytes == 16 + 15
    for limit in range(1, 40):
        start = 0
        while start < wire.total_bytes:
            try:
                stop = wire.cut(start, limit)
            except StagingError:
                assert limit < wire.piece_bytes
                break
            assert stop > start, (start, limit)
            start = stop


def test_spans_of_both_sides_are_the_same_staging_bytes() -> None:
    for seed in range(100, 160):
        case = random_topology(seed)
        rng = random.Random(seed)
        for _, plan in elected_plans(case, case.destinations[0], "request", bool(seed % 2)):
            least = plan.wire(case.first, case.last).piece_bytes
            limit = rng.randint(least, 10 * least)
            for chunk in chunks_of(plan.wire(case.first, case.last), limit):
                ours, theirs = spans_by_side(plan, case.first, case.last, chunk)
                same = [c for c in Span if c not in (Span.BLOCKS, Span.WIDTH)]
                assert (ours[:, same] == theirs[:, same]).all()


def test_spans_of_any_chunking_move_the_fragments() -> None:
    for seed in range(200, 235):
        case = random_topology(seed)
        rng = random.Random(seed)
        to = case.destinations[0]
        wanted = block_table(to.layout, to.blocks, to.first, to.last, "destination")
        for source, plan in elected_plans(case, to, str(seed), bool(seed % 2)):
            held = block_table(source.layout, source.blocks, source.first, source.last, "source")
            wire = plan.wire(case.first, case.last)
            limit = rng.randint(wire.piece_bytes, 10 * wire.piece_bytes)
            pieces = []
            for chunk in chunks_of(plan.wire(case.first, case.last), limit):
                read, written = (
                    np.asarray(
                        expand(plan.table(side), wire.spans(side, *chunk, lists.offsets), lists.ids)
                    )
                    for side, lists in (("source", held), ("destination", wanted))
                )
                assert len(read) == len(written)
                there = written[:, 1] > 0
                assert (read[there, 1] == written[there, 1]).all()
                pieces += [
                    (int(a) + i, int(b) + i)
                    for (a, n), (b, _) in zip(read[there], written[there], strict=True)
                    for i in range(int(n))
                ]
            found = plan.fragments_between(held, wanted, case.first, case.last)
            whole = {
                (int(a) + i, int(b) + i)
                for a, b, n in zip(*found, strict=True)
                for i in range(int(n))
            }
            assert len(pieces) == len(whole)
            assert set(pieces) == whole


def test_every_address_of_a_span_is_a_multiple_of_its_width() -> None:
    widths = set()
    for seed in range(80):
        case = random_topology(seed)
        to = case.destinations[0]
        wanted = block_table(to.layout, to.blocks, to.first, to.last, "destination")
        for _, plan in elected_plans(case, to, "request", False):
            wire = plan.wire(case.first, case.last)
            limit = max(wire.piece_bytes, wire.total_bytes // 5)
            for chunk in chunks_of(plan.wire(case.first, case.last), limit):
                for span in wire.spans("destination", *chunk, wanted.offsets):
                    width = int(span[Span.WIDTH])
                    widths.add(width)
                    alone = np.asarray(expand(plan.table("destination"), span[None], wanted.ids))
                    assert (alone % width == 0).all()
                    assert not (span[[Span.OFFSET, Span.LANE_PITCH, Span.UNIT_BYTES]] % width).any()
    assert widths == {1, 2, 4, 8, 16}


def test_fragments_are_counted_without_being_made() -> None:
    for seed in range(80):
        case = random_topology(seed)
        to = case.destinations[0]
        wanted = block_table(to.layout, to.blocks, to.first, to.last, "destination")
        if (wanted.ids < 0).any():
            continue
        for source, plan in elected_plans(case, to, "request", False):
            held = block_table(source.layout, source.blocks, source.first, source.last, "source")
            found = plan.fragments_between(held, wanted, case.first, case.last)
            assert plan.wire(case.first, case.last).fragments == len(found.nbytes)
            assert plan.nbytes(case.first, case.last) == int(found.nbytes.sum())


def test_the_span_table_does_not_grow_with_layers_or_tokens() -> None:
    plan = pools(16, 32, heads=4, dim=64)
    few = plan.wire(3, 40).spans("source", 0, plan.wire(3, 40).total_bytes, (0,))
    many = plan.wire(3, 900).spans("source", 0, plan.wire(3, 900).total_bytes, (0,))
    assert len(few) == len(many) == 3
    assert (many[:, Span.LANES] == len(plan.lanes)).all()


def test_a_lane_has_as_many_bytes_in_both_forms() -> None:
    counts = [Row.COUNT0, Row.COUNT1, Row.COUNT2, Row.RUN_BYTES]
    for seed in range(60):
        case = random_topology(seed)
        for _, plan in elected_plans(case, case.destinations[0], "request", False):
            for side in SIDES:
                table = plan.table(side)  # type: ignore[arg-type]
                units = [c.residue.unit_tokens for c in plan.classes for _ in range(c.lanes)]
                assert (
                    table[0::2, counts].prod(axis=1) == table[0::2, Row.TOKEN_BYTES] * units
                ).all()
                assert (table[1::2, counts].prod(axis=1) == table[1::2, Row.TOKEN_BYTES]).all()
