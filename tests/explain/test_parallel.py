"""Ranks hold what their engines give them, by number, and together they hold everything once."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest

import kvpack.parallel
from kvpack.errors import OptionsError
from kvpack.layout import ContextShard
from kvpack.parallel import NUMBERINGS, Parallelism


def places(side: Parallelism) -> list[tuple[int, int, int, int]]:
    return [(rank.group, rank.pp, rank.tp, rank.context) for rank in side.ranks]


def test_examples_run() -> None:
    assert doctest.testmod(kvpack.parallel).failed == 0


def test_tensorrt_llm_counts_context_ranks_fastest() -> None:
    side = Parallelism(tp=3, pp=2, cp=2, numbering="trtllm")
    for rank in side.ranks:
        assert rank.number == (rank.pp * 3 + rank.tp) * 2 + rank.context


def test_vllm_counts_as_an_array_of_dp_pp_pcp_and_tp() -> None:
    side = Parallelism(tp=3, pp=2, cp=2, dp=2, numbering="vllm")
    numbers = np.arange(24).reshape(2, 2, 2, 3)
    for rank in side.ranks:
        assert numbers[rank.group, rank.pp, rank.context, rank.tp] == rank.number


def test_vllm_decode_context_ranks_are_neighbours_within_tp() -> None:
    side = Parallelism(tp=8, cp=2, dcp=4, numbering="vllm")
    for rank in side.ranks:
        pcp, tp = divmod(rank.number, 8)
        assert rank.context == pcp * 4 + tp % 4
        # Two KV heads on eight ranks: each has four copies, which share the positions.
        assert rank.heads(2).start == tp * 2 // 8
        assert rank.positions(16) == ContextShard(rank.context, 8, 1)


def test_sglang_divides_tp_into_data_then_context_then_tensor_parallel_ranks() -> None:
    # --tp-size 16 --dp-size 4 --attn-cp-size 2 --pp-size 2: attention TP is 2.
    side = Parallelism(tp=8, dp=4, cp=2, pp=2, attention_dp=True, numbering="sglang")
    for rank in side.ranks:
        pp, tp = divmod(rank.number, 16)
        assert rank.pp == pp
        assert rank.tp == tp % 2
        assert rank.context == tp // 2 % 2
        assert rank.group == tp // 4


def test_attention_data_parallelism_gives_each_rank_every_head() -> None:
    side = Parallelism(tp=16, attention_dp=True)
    assert (side.num_ranks, side.num_groups, side.ranks_per_request) == (16, 16, 1)
    for rank in side.ranks:
        assert rank.group == rank.number
        assert (rank.heads(4).start, rank.heads(4).count) == (0, 4)


def test_data_parallel_groups_without_attention_dp_are_apart() -> None:
    side = Parallelism(tp=4, dp=2, pp=2)
    assert (side.num_ranks, side.num_groups, side.ranks_per_request) == (16, 2, 8)
    assert [rank.number for rank in side.group(1)] == list(range(8, 16))


@pytest.mark.parametrize(
    ("numbering", "split_61", "split_62"),
    [
        ("trtllm", [16, 15, 15, 15], [16, 16, 15, 15]),
        ("vllm", [15, 15, 16, 15], [15, 16, 16, 15]),
        ("sglang", [15, 15, 15, 16], [15, 15, 16, 16]),
    ],
)
def test_spare_layers_go_where_the_engine_puts_them(
    numbering: str, split_61: list[int], split_62: list[int]
) -> None:
    side = Parallelism(pp=4, numbering=numbering)
    assert [len(stage) for stage in side.stage_layers(61)] == split_61
    assert [len(stage) for stage in side.stage_layers(62)] == split_62


def test_vllm_spares_its_last_stage_as_long_as_it_can() -> None:
    side = Parallelism(pp=4, numbering="vllm")
    assert [len(stage) for stage in side.stage_layers(63)] == [16, 16, 16, 15]
    assert [len(s) for s in Parallelism(pp=2, numbering="vllm").stage_layers(61)] == [31, 30]


def test_an_uneven_split_is_taken_as_given() -> None:
    side = Parallelism(tp=2, pp=3, layers=(20, 30, 11))
    assert side.rank(2).layers(61) == range(20, 50)
    assert side.rank(5).layers(61) == range(50, 61)


def test_context_parallelism_deals_tokens_or_blocks_or_what_is_said() -> None:
    def interleave(**given: object) -> int:
        return Parallelism(cp=2, **given).rank(1).positions(32).interleave  # type: ignore[arg-type]

    assert interleave(numbering="trtllm") == 32
    assert interleave(numbering="vllm") == 1
    assert interleave(numbering="vllm", interleave=8) == 8
    assert Parallelism(interleave=8).rank(0).positions(32) == ContextShard()


@pytest.mark.parametrize("numbering", NUMBERINGS)
@pytest.mark.parametrize("total", [1, 2, 4, 8])
def test_the_ranks_of_a_group_hold_every_head_layer_and_position(
    numbering: str, total: int
) -> None:
    sizes = itertools.product([1, 2, 3, 6], [1, 2, 3], [1, 2], [1, 2], [1, 2], [False, True])
    for tp, pp, cp, dp, dcp, attention_dp in sizes:
        if tp % (dcp * (dp if attention_dp else 1)):
            continue
        side = Parallelism(tp, pp, cp, dp, dcp, attention_dp, numbering=numbering)
        assert [rank.number for rank in side.ranks] == list(range(side.num_ranks))
        for number in range(side.num_groups):
            held = {
                (head, layer, rank.context)
                for rank in side.group(number)
                for head in range(rank.heads(total).start, rank.heads(total).stop)
                for layer in rank.layers(7)
            }
            assert len(side.group(number)) == side.ranks_per_request
            assert len(held) == total * 7 * cp * dcp


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 0}, "tp=0 must be at least 1"),
        ({"dp": 0}, "dp=0 must be at least 1"),
        ({"interleave": -1}, "interleave=-1 must be at least 1"),
        ({"numbering": "mpi"}, "numbering='mpi' is not one of trtllm, vllm, sglang"),
        ({"tp": 4, "dcp": 3}, "tp=4 ranks cannot be shared by 1 attention data parallel groups"),
        ({"tp": 4, "dp": 3, "attention_dp": True}, "by 3 attention data parallel groups"),
        ({"pp": 2, "layers": (3,)}, "layers=3 must name a positive number for each of the 2"),
        ({"pp": 2, "layers": (3, 0)}, "layers=3\\+0 must name a positive number"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        Parallelism(**sizes)  # type: ignore[arg-type]


def test_layers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OptionsError, match="pp=4 stages cannot share 3 layers; lower pp"):
        Parallelism(pp=4).stage_layers(3)
    with pytest.raises(OptionsError, match=r"layers=2\+2 adds up to 4, but the model caches 5"):
        Parallelism(pp=2, layers=(2, 2)).stage_layers(5)
    with pytest.raises(OptionsError, match="rank 4 is outside the side's 4 ranks"):
        Parallelism(tp=4).rank(4)


def test_a_parallelism_is_written_by_what_differs_from_one_rank() -> None:
    assert str(Parallelism()) == "tp=1"
    side = Parallelism(tp=16, pp=2, dp=4, layers=(50, 44), attention_dp=True, numbering="vllm")
    assert str(side) == "tp=16,pp=2,dp=4,attention_dp,layers=50+44,numbering=vllm"
