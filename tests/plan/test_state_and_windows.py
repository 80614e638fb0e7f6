"""One slot a request, windows and optional tensors: which lists are taken, and what then moves."""

import re

import numpy as np
import pytest

from kvpack.blocks import NO_BLOCK, block_table, kernel_blocks
from kvpack.columns import Span
from kvpack.election import Election
from kvpack.errors import BlockListError, CoverageError, LayoutError, VerificationError
from kvpack.fragments import Fragments
from kvpack.layout import CacheLayout, CacheTensor, ContextShard, Shard, declare
from kvpack.plan import compile_plan
from kvpack.verification import Party, Request, verify, verify_fragments

FIRST, LAST, WINDOW = 3, 45, 10
FOUR = Shard(0, 4, 4)


_memory: list[np.ndarray] = []


def zeros(shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    """Memory that stays, so that no two tensors get the same."""
    _memory.append(np.zeros(shape, dtype))
    return _memory[-1]


def attention(layer: int = 0, group: int = 0, **more: object) -> tuple[CacheTensor, ...]:
    """Eight-token blocks, two heads."""
    pool = zeros((2, 12, 8, 2, 4))
    return declare(
        pool, "kv block token head dim", layers=layer, names=("k", "v"), heads=Shard(0, 2, 2),
        group=group, **more,
    )  # fmt: skip


def state(group: int = 1, heads: Shard = FOUR, layer: int = 1) -> tuple[CacheTensor, ...]:
    pool = zeros((6, heads.count, 3, 5))
    return declare(pool, "slot head dim state", layers=layer, names="ssm", heads=heads, group=group)


def hybrid() -> CacheLayout:
    """A window in group 0, state in group 1."""
    return CacheLayout([*attention(window=WINDOW), *state()])


SHORT, FULL = [4, 5], [0, 1, 2, 3, 4, 5]  # positions [35, 45) touch blocks 4 and 5
HOLES = [NO_BLOCK, NO_BLOCK, 2, NO_BLOCK, 4, 5]


@pytest.mark.parametrize("held", [SHORT, [3, 4, 5], FULL, HOLES])
@pytest.mark.parametrize("wanted", [SHORT, [3, 4, 5], FULL, HOLES, [4, 4, 4, 5, 4, 5]])
def test_a_windows_list_may_hold_what_is_left_of_it(held: list[int], wanted: list[int]) -> None:
    source, destination = hybrid(), hybrid()
    plan = compile_plan(source, destination)
    found = plan.fragments([held, [2]], [wanted, [3]], FIRST, LAST)
    least = plan.fragments([SHORT, [2]], [SHORT, [3]], FIRST, LAST)
    assert all((a == b).all() for a, b in zip(found, least, strict=True))
    assert int(found.nbytes.sum()) == WINDOW * 2 * 8 + 4 * 15
    proof = verify(
        {"p": Party(source, [held, [2]])},
        {"d": Party(destination, [wanted, [3]])},
        Request(FIRST, LAST),
    )
    assert proof.nbytes == WINDOW * 2 * 8 + 4 * 15


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        (
            [[5], [3]],
            "block list of layer group 0 is too short: positions [3, 45) touch 6 blocks of 8 "
            "tokens (numbers [0, 6) of the sequence), 2 of them inside its window of 10, got 1",
        ),
        ([[0, 0, *FULL], [3]], "layer group 0 is too long: positions [3, 45) touch 6 blocks"),
        (
            [SHORT, []],
            "block list of layer group 1 is too short: it is the slot of one state, that after 45 "
            "positions, got 0 ids",
        ),
        ([SHORT, [3, 4]], "block list of layer group 1 is too long: it is the slot of one state"),
        ([SHORT, [6]], "block id 6 in layer group 1 is outside the cache's 6 blocks"),
        ([[4, 4], [3]], "block id 4 stands twice in the destination list of layer group 0"),
    ],
)
def test_lists_that_do_not_fit_a_window_or_a_state_are_refused(blocks: list, said: str) -> None:
    with pytest.raises(BlockListError, match=re.escape(said)):
        block_table(hybrid(), blocks, FIRST, LAST, "destination")


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        (
            [[5], [2]],
            "whose layer group 0 keeps a window of 10 positions, has no block for [35, 40",
        ),
        ([[4, NO_BLOCK], [2]], "has no block for [40, 45); send before the engine gives them up"),
        ([SHORT, []], "the send of positions [3, 45) names no slot"),
        ([SHORT, [NO_BLOCK]], "the send of positions [3, 45) names no slot"),
    ],
)
def test_what_a_source_lacks_is_refused_when_it_is_asked_for(blocks: list, said: str) -> None:
    source = hybrid()
    block_table(source, blocks, FIRST, LAST, "source")  # for whom it is not needed
    with pytest.raises(BlockListError, match=re.escape(said)):
        compile_plan(source, hybrid()).fragments(blocks, [SHORT, [3]], FIRST, LAST)


def test_a_plan_says_what_of_a_window_and_a_state_moves() -> None:
    said = compile_plan(hybrid(), hybrid()).explain(0, LAST)
    assert "units of 8 positions, the last 10 of a request, each 1 fragment(s)" in said
    assert "ssm of layers 1, heads 0-3: one slot a request, 1 fragment(s) of 60 bytes" in said


def test_the_last_part_alone_carries_window_and_state() -> None:
    plan = compile_plan(hybrid(), hybrid())
    assert plan.wire(FIRST, 30, LAST).total_bytes == 0
    assert plan.wire(30, 40, LAST).payload_bytes == 5 * 2 * 8
    assert plan.wire(40, LAST, LAST).payload_bytes == 5 * 2 * 8 + 60


@pytest.mark.parametrize("ranks", [2, 3])
def test_state_is_not_dealt_out_with_the_positions(ranks: int) -> None:
    sources = {}
    for rank in range(ranks):
        layout = CacheLayout([*attention(), *state()], ContextShard(rank, ranks, 4))
        held = layout.context.tokens_before(LAST)
        sources[f"p{rank}"] = Party(layout, [np.arange(-(-held // 8)), [rank]])
    destination = CacheLayout([*attention(), *state()])
    elected = set()
    for number in range(40):
        request = Request(0, LAST, str(number))
        proof = verify(sources, {"d": Party(destination, [FULL, [1]])}, request)
        assert proof.nbytes == LAST * 16 + 60
        chosen = Election({n: p.layout for n, p in sources.items()}, destination).elect(str(number))
        elected |= {n for n, part in chosen.items() if part is None or any(
            s.name == "ssm" for s in part)}  # fmt: skip
    assert elected == set(sources)


def test_heads_of_a_state_are_found_among_all_senders() -> None:
    sources = {
        f"p{rank}": Party(CacheLayout([*state(0, Shard(rank, 1, 4))]), [[rank]])
        for rank in range(4)
    }
    wanted = {
        f"d{rank}": Party(CacheLayout([*state(0, Shard.balanced(4, 3, rank))]), [[5]])
        for rank in range(3)
    }
    assert verify(sources, wanted, Request(0, LAST)).nbytes == 60
    del sources["p2"]
    with pytest.raises(CoverageError, match=r"heads \[2, 3\) of cache tensor 'ssm' of layer 1"):
        verify(sources, wanted, Request(0, LAST))


@pytest.mark.parametrize("fault", ["a position early", "another slot", "no state"])
def test_faults_of_windows_and_states_are_caught(fault: str) -> None:
    source, destination = hybrid(), hybrid()
    ours, theirs = Party(source, [FULL, [2]]), Party(destination, [FULL, [3]])
    plan = compile_plan(source, destination)
    honest = plan.fragments(ours.blocks, theirs.blocks, FIRST, LAST)
    request = Request(FIRST, LAST)
    assert verify_fragments({"p": ours}, theirs, request, [("p", honest)]) == WINDOW * 16 + 60
    if fault == "a position early":
        tables = (
            block_table(source, ours.blocks, FIRST, LAST, "source"),
            block_table(destination, theirs.blocks, FIRST, LAST, "destination"),
        )
        wrong = plan.fragments_between(*tables, FIRST, LAST - 1)
        said = "would not be written"
    elif fault == "another slot":
        wrong = plan.fragments([FULL, [4]], theirs.blocks, FIRST, LAST)
        said = "another layer's, head's or position's byte"
    else:
        keep = honest.nbytes != honest.nbytes[-1]
        wrong = Fragments(*(column[keep] for column in honest))
        said = "would not be written"
    with pytest.raises(VerificationError, match=said):
        verify_fragments({"p": ours}, theirs, request, [("p", wrong)])


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            lambda: declare(zeros((2, 3, 4)), "slot block dim", layers=0, names="s"),
            "has a slot axis, so one state a request: it can have neither block nor token axis",
        ),
        (
            lambda: declare(zeros((2, 4)), "slot dim", layers=0, names="s", window=4),
            "has a slot axis, so one state a request",
        ),
        (lambda: attention(window=0), "a window of 0 positions keeps nothing"),
        (
            lambda: (*attention(), *state(0)),
            "layer group 0 holds cache tensor 'ssm' of layer 1, which has a slot a request, and",
        ),
        (
            lambda: (*attention(0, window=4), *attention(1)),
            "cache tensors of layer group 0 have windows of 4, None positions",
        ),
    ],
)
def test_declarations_that_contradict_themselves_are_refused(tensors, said: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(said)):
        CacheLayout(tensors())


def test_an_encoded_layout_keeps_windows_states_and_options() -> None:
    layout = CacheLayout([*attention(window=WINDOW, optional=True), *state()])
    assert CacheLayout.decode(layout.encode()) == layout
    assert [(g.window, g.state) for g in layout.groups] == [(WINDOW, False), (1, True)]


def test_optional_tensors_that_some_sender_has_are_wanted_whole() -> None:
    one = CacheLayout([*attention(0), *attention(7)])
    other = CacheLayout([*attention(0)], ContextShard(1, 2, 4))
    first = CacheLayout(one.tensors, ContextShard(0, 2, 4))
    wanted = CacheLayout([*attention(0), *attention(7, optional=True)])
    assert Election({"p": other, "q": CacheLayout(other.tensors, first.context)}, wanted).elect("r")
    with pytest.raises(CoverageError, match="'k' of layer 7 is wanted, but none of q has it"):
        Election({"p": first, "q": other}, wanted)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_kernel_blocks_are_those_that_the_positions_touch(factor: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        first = int(rng.integers(0, 60))
        last = first + int(rng.integers(1, 60))
        tokens = 4 * factor
        managed = rng.permutation(40)[: -(-last // tokens) - first // tokens]
        managed[rng.random(len(managed)) < 0.2] = NO_BLOCK
        got = kernel_blocks(managed, factor, 4, first, last)
        want = []
        for block in range(first // 4, -(-last // 4)):
            held = managed[block // factor - first // tokens]
            want.append(NO_BLOCK if held == NO_BLOCK else held * factor + block % factor)
        assert got.tolist() == want
    with pytest.raises(BlockListError, match=r"\[0, 40\) touch 3 blocks of 4 x 4 tokens, got a li"):
        kernel_blocks([1, 2], 4, 4, 0, 40)


def test_layers_that_leave_one_by_one_are_adjacent_on_the_wire() -> None:
    def layout() -> CacheLayout:
        latents = [
            *declare(zeros((9, 8, 5)), "block token dim", layers=0, names="kv"),
            *declare(zeros((9, 8, 5)), "block token dim", layers=1, names="kv"),
        ]
        return CacheLayout([*latents, *attention(0), *attention(1)])

    def layers(stream: bool) -> list[int]:
        plan = compile_plan(layout(), layout(), stream_layers=stream)
        spans = plan.wire(0, 64).spans("source", 0, plan.wire(0, 64).total_bytes, (0,))
        return [
            layer
            for row, lanes in spans[:, [Span.ROW, Span.LANES]]
            for lane in plan.lanes[row // 2 : row // 2 + lanes]
            for layer in lane.layers
        ]

    assert layers(True) == sorted(layers(True))
    assert set(layers(True)) == {0, 1}
    assert layers(False) != sorted(layers(False))
