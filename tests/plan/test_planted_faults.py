"""Negative controls: each planted fault is caught by the proof and by the bytes, both."""

import dataclasses
import random
from collections.abc import Callable

import numpy as np
import pytest
from support.models import Kind, Model
from support.shipping import elected_plans, ship
from support.topology import Rank, Topology, make_rank

from kvpack.blocks import block_table
from kvpack.columns import Row
from kvpack.errors import VerificationError
from kvpack.fragments import Fragments
from kvpack.kernels import expand
from kvpack.layout import CacheLayout, Shard
from kvpack.plan import TransferPlan, compile_plan
from kvpack.verification import Request, verify_fragments

FIRST, LAST = 5, 41
Tables = dict[str, np.ndarray]


def topology(sources: int = 2) -> Topology:
    """Two layers of four heads, sharded or replicated over source ranks, to one rank of all."""
    rng = random.Random(7)
    kind = Kind((0, 1), ("k", "v"), 4, 8, 2)
    model = Model.of([kind], 48)

    def rank(name: str, heads: Shard, dims: str, tokens: int) -> Rank:
        return make_rank(
            rng, model, name, layers=(0, 1), heads=[heads], first=FIRST, last=LAST, dims=dims,
            block_tokens={kind: tokens},
        )  # fmt: skip

    ours = "kv block head token dim"
    shards = [Shard.balanced(4, sources, i) for i in range(sources)]
    prefill = [rank(f"p{i}", shard, ours, 16) for i, shard in enumerate(shards)]
    decode = [rank("d", Shard(0, 4, 4), "block kv token head dim", 8)]
    for each in prefill:
        each.fill(model)
    return Topology(model, prefill, decode, FIRST, LAST)


def fragments_of(
    plan: TransferPlan, source: Rank, to: Rank, first: int, last: int, tables: Tables
) -> Fragments:
    """What the tables move, by the kernels' ``expand``."""
    held = block_table(source.layout, source.blocks, source.first, source.last, "source")
    wanted = block_table(to.layout, to.blocks, to.first, to.last, "destination")
    wire = plan.wire(first, last)
    read = np.asarray(
        expand(tables["source"], wire.spans("source", 0, wire.total_bytes, held.offsets), held.ids)
    )
    written = np.asarray(
        expand(
            tables["destination"],
            wire.spans("destination", 0, wire.total_bytes, wanted.offsets),
            wanted.ids,
        )
    )
    return Fragments(read[:, 0], written[:, 0], written[:, 1])


@dataclasses.dataclass
class Outcome:
    """Whether the bytes were right, and what the proof said."""

    bytes_equal: bool
    complaint: str | None


def move(
    case: Topology,
    shipments: list[tuple[Rank, TransferPlan]],
    first: int = FIRST,
    plant: Callable[[TransferPlan, Tables], None] | None = None,
) -> Outcome:
    """Move everything by the twins, and prove the same fragments."""
    to = case.destinations[0]
    wanted = to.expected(case.model)
    parts = []
    for source, plan in shipments:
        tables = {side: plan.table(side).copy() for side in ("source", "destination")}
        if plant is not None:
            plant(plan, tables)
        ship(plan, source, to, first, LAST, 1 << 20, tables)
        parts.append((source.name, fragments_of(plan, source, to, first, LAST, tables)))
    equal = all(np.array_equal(a, b) for a, b in zip(to.buffers, wanted, strict=True))
    parties = {rank.name: rank.party(FIRST, LAST) for rank in case.sources}
    try:
        verify_fragments(parties, to.party(FIRST, LAST), Request(FIRST, LAST), parts)
    except VerificationError as error:
        return Outcome(equal, str(error))
    return Outcome(equal, None)


def shipments_of(case: Topology) -> list[tuple[Rank, TransferPlan]]:
    return list(elected_plans(case, case.destinations[0], "request", False))


def test_without_a_fault_nothing_is_caught() -> None:
    case = topology()
    assert move(case, shipments_of(case)) == Outcome(True, None)


def shift_a_head(plan: TransferPlan, tables: Tables) -> None:
    head_stride = plan.destination.tensors[0].head_stride
    tables["destination"][:, Row.BASE] += head_stride


def swap_the_layers(plan: TransferPlan, tables: Tables) -> None:
    bases = tables["source"][:, Row.BASE].reshape(2, -1)
    tables["source"][:, Row.BASE] = bases[::-1].reshape(-1)


def halve_the_strides(plan: TransferPlan, tables: Tables) -> None:
    for column in (Row.STRIDE0, Row.STRIDE1, Row.STRIDE2):
        tables["source"][:, column] //= 2


def forget_the_token_stride(plan: TransferPlan, tables: Tables) -> None:
    tables["source"][:, Row.TOKEN_STRIDE] = 0


def start_a_token_late(plan: TransferPlan, tables: Tables) -> None:
    tables["source"][:, Row.BASE] += tables["source"][:, Row.TOKEN_STRIDE]


@pytest.mark.parametrize(
    ("plant", "complaint"),
    [
        (shift_a_head, "outside the request"),
        (swap_the_layers, "another layer's, head's or position's"),
        (halve_the_strides, "another layer's, head's or position's"),
        (forget_the_token_stride, "another layer's, head's or position's"),
        (start_a_token_late, "another layer's, head's or position's"),
    ],
)
def test_a_fault_in_a_lane_table_is_caught(
    plant: Callable[[TransferPlan, Tables], None], complaint: str
) -> None:
    case = topology()
    outcome = move(case, shipments_of(case), plant=plant)
    assert not outcome.bytes_equal
    assert outcome.complaint is not None
    assert complaint in outcome.complaint


def test_a_first_unit_that_is_not_clipped_is_caught() -> None:
    case = topology()
    outcome = move(case, shipments_of(case), first=0)
    assert not outcome.bytes_equal
    assert outcome.complaint is not None
    assert "outside the request" in outcome.complaint


def test_a_replica_that_is_elected_twice_is_caught() -> None:
    case = topology(sources=8)
    # The second copy of head 0 is made to differ, so that bytes tell which copy was written last.
    for view in case.sources[1].views.values():
        view[...] ^= 1
    honest = [compile_plan(case.sources[i].layout, case.destinations[0].layout) for i in range(8)]
    once = [(case.sources[i], honest[i]) for i in (0, 2, 4, 6)]
    assert move(case, once) == Outcome(True, None)
    case = dataclasses.replace(case, destinations=topology(sources=8).destinations)
    honest = [compile_plan(case.sources[i].layout, case.destinations[0].layout) for i in range(8)]
    twice = [(case.sources[i], honest[i]) for i in (0, 1, 2, 4, 6)]
    outcome = move(case, twice)
    assert not outcome.bytes_equal
    assert outcome.complaint is not None
    assert "written twice" in outcome.complaint


def test_a_layer_left_out_is_caught() -> None:
    case = topology()
    to = case.destinations[0]
    fewer = [
        (
            source,
            compile_plan(
                CacheLayout([t for t in source.layout.tensors if t.layer == 0]), to.layout
            ),
        )
        for source in case.sources
    ]
    outcome = move(case, fewer)
    assert not outcome.bytes_equal
    assert outcome.complaint is not None
    assert "would not be written" in outcome.complaint


def test_swapped_blocks_are_caught() -> None:
    case = topology()
    shipments = shipments_of(case)
    to = case.destinations[0]
    kept = [ids.copy() for ids in to.blocks]
    wanted = to.expected(case.model)
    to.blocks[0][[1, 2]] = to.blocks[0][[2, 1]]
    parts = []
    for source, plan in shipments:
        tables = {side: plan.table(side) for side in ("source", "destination")}
        ship(plan, source, to, FIRST, LAST, 1 << 20)
        parts.append((source.name, fragments_of(plan, source, to, FIRST, LAST, tables)))
    assert not all(np.array_equal(a, b) for a, b in zip(to.buffers, wanted, strict=True))
    to.blocks[0][:] = kept[0]
    with pytest.raises(VerificationError, match="another layer's, head's or position's"):
        verify_fragments(
            {rank.name: rank.party(FIRST, LAST) for rank in case.sources},
            to.party(FIRST, LAST),
            Request(FIRST, LAST),
            parts,
        )
