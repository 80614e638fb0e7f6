"""Explanations count what plans move: published numbers, and what ``verify`` proves."""

from __future__ import annotations

import doctest
import random
from typing import Any

import pytest

import kvpack.explanation
from kvpack import NO_BLOCK, Party, Request, verify
from kvpack.declaration import read_topology
from kvpack.explanation import Explanation, Traffic, explain_topology
from kvpack.topology import Deployment, Topology


def explained(shape: str | list[dict[str, Any]], **table: Any) -> Explanation:
    return explain_topology(read_topology({"shape": shape, **table}))


def test_examples_run() -> None:
    assert doctest.testmod(kvpack.explanation).failed == 0


def test_qwen3_235b_from_tp4_to_attention_dp16_is_48128_fragments_of_4_kib_a_pair() -> None:
    found = explained(
        "qwen3-235b", dtype="fp8", block=32,
        prefill={"tp": 4}, decode={"tp": 16, "attention_dp": True},
    )  # fmt: skip
    assert len(found.senders) == 64
    for sender in found.senders:
        assert sender.traffic.sizes == ((4096, 48_128),)
    (route,) = found.routes
    assert (route.sources, route.destinations, route.pairs) == ((0, 1, 2, 3), tuple(range(16)), 64)
    assert sum(s.traffic.nbytes for s in found.one_request()) == 788_529_152
    assert not found.elected


def test_deepseek_r1_in_a_block_major_pool_is_256_fragments() -> None:
    found = explained(
        "deepseek-r1", dtype="fp8",
        prefill={"tp": 4, "attention_dp": True, "layout": "trtllm"},
        decode={"tp": 8, "attention_dp": True, "layout": "trtllm"},
    )  # fmt: skip
    assert len(found.senders) == 32
    for sender in found.senders:
        assert sender.traffic == Traffic(((1_124_352, 256),), 256, 1)
        assert sender.traffic.nbytes == 287_834_112


def test_streaming_layers_takes_a_block_major_pool_apart() -> None:
    side = {"layout": "trtllm"}
    found = explained("deepseek-r1", dtype="fp8", stream_layers=True, prefill=side, decode=side)
    assert found.senders[0].traffic.sizes == ((32 * 576, 61 * 256),)


@pytest.mark.parametrize(
    ("shape", "prefill", "decode", "sizes"),
    [
        # bf16, 8,192 tokens, TP4 to TP4 or TP8.
        ("llama-3.1-8b", "vllm", 4, (16 << 10, 16_384)),
        ("llama-3.1-8b", "vllm", 8, (8 << 10, 16_384)),
        ("llama-3.1-8b", "sglang", 4, (512, 524_288)),
        ("llama-3.1-8b", "sglang", 8, (256, 524_288)),
        ("llama-3.3-70b", "vllm", 4, (16 << 10, 40_960)),
        ("qwen3-32b", "vllm", 8, (8 << 10, 32_768)),
        ("qwen3-235b", "vllm", 4, (8 << 10, 48_128)),
        ("minimax-m2", "vllm", 4, (16 << 10, 31_744)),
    ],
)
def test_fragments_of_engines_are_as_published(
    shape: str, prefill: str, decode: int, sizes: tuple[int, int]
) -> None:
    found = explained(
        shape, prefill={"tp": 4, "layout": prefill}, decode={"tp": decode, "layout": prefill}
    )
    assert {sender.traffic.sizes for sender in found.senders} == {(sizes,)}


def test_latent_rows_and_opaque_rows_of_64_token_blocks_are_as_published() -> None:
    sides = {"prefill": {"tp": 4}, "decode": {"tp": 4}, "block": 64}
    latent = explained("deepseek-r1", **sides)
    assert {s.traffic.sizes for s in latent.senders} == {((72 << 10, 7_808),)}
    assert latent.elected
    opaque = explained("deepseek-v3.2", **sides)
    for sender in opaque.senders:
        assert set(sender.traffic.sizes) == {(41_984, 7_808), (8_448, 7_808)}


@pytest.mark.parametrize("tokens", [8192, 1001, 100])
def test_windows_send_the_positions_that_they_keep(tokens: int) -> None:
    found = explained("gpt-oss-120b", tokens=tokens, prefill={"tp": 4}, decode={"tp": 4})
    assert sum(s.traffic.nbytes for s in found.senders) == found.topology.request_bytes
    for sender in found.senders:
        assert sender.plan.nbytes(0, tokens) == sender.traffic.nbytes


def test_hybrid_models_send_one_state_a_layer_beside_their_attention() -> None:
    found = explained("qwen3-next", prefill={"tp": 2}, decode={"tp": 2})
    assert [sender.traffic.nbytes * 2 for sender in found.senders] == [
        found.topology.request_bytes
    ] * 2
    state_bytes, states = 16 * 128 * 128 * 4, 36
    assert dict(found.senders[0].traffic.sizes)[state_bytes] == states
    assert found.topology.request_bytes - 2 * states * state_bytes == (
        12 * 2 * 2 * 256 * 2 * 8192 + 36 * (16 + 16 + 32) * 128 * 3 * 2
    )


def test_a_draft_on_one_side_alone_is_left_out() -> None:
    draft = {"names": ["k", "v"], "layers": [2], "heads": 2, "dim": 64, "only": "decode"}
    both = {"names": ["k", "v"], "layers": 2, "heads": 2, "dim": 64}
    sides = {"prefill": {"pp": 2}, "decode": {"pp": 2}}
    with_draft, without = explained([both, draft], **sides), explained([both], **sides)
    assert [s.traffic for s in with_draft.senders] == [s.traffic for s in without.senders]
    topology = with_draft.topology
    last = topology.cache_layout(topology.decode, topology.decode.parallelism.rank(1))
    assert {tensor.layer: tensor.optional for tensor in last.tensors} == {1: False, 2: True}


def test_a_cached_prefix_is_not_sent() -> None:
    sides = {"prefill": {"tp": 2}, "decode": {"tp": 2}, "tokens": 1000}
    whole, rest = explained("qwen3-32b", **sides), explained("qwen3-32b", **sides, first=900)
    assert whole.senders[0].traffic.nbytes == 10 * rest.senders[0].traffic.nbytes


def test_adjacent_blocks_merge_and_scattered_ones_do_not() -> None:
    sides = {"prefill": {"layout": "nhd"}, "decode": {"layout": "nhd"}}
    (sender,) = explained("llama-3.1-8b", **sides).senders
    assert sender.traffic.contiguous_descriptors == 64
    assert sender.traffic.descriptors > 30_000


def test_the_seed_decides_the_block_lists() -> None:
    def blocks(seed: int) -> list[list[int]]:
        topology = read_topology({"shape": "gpt-oss-120b", "seed": seed})
        (rank,) = topology.decode.parallelism.ranks
        layout = topology.cache_layout(topology.decode, rank)
        lists = topology.block_lists(topology.decode, rank, layout, scattered=True)
        return [list(map(int, group)) for group in lists]

    assert blocks(0) == blocks(0) != blocks(1)
    full, window = blocks(0)
    assert len(set(full)) == 512
    assert [block == NO_BLOCK for block in window] == [True] * 504 + [False] * 8


def test_more_ranks_than_heads_send_each_head_once_to_a_receiver() -> None:
    found = explained("qwen3-235b", prefill={"tp": 16}, decode={"tp": 2})
    for destination in (0, 1):
        parts = [s for s in found.senders if s.destination.number == destination]
        assert sum(s.traffic.nbytes for s in parts) * 2 == found.topology.request_bytes
    assert found.elected


def random_table(rng: random.Random) -> dict[str, Any]:
    def side() -> dict[str, Any]:
        tp, pp = rng.choice([1, 2, 3, 4, 6]), rng.choice([1, 2, 3])
        side = {
            "tp": tp,
            "pp": pp,
            "cp": rng.choice([1, 1, 2, 3]),
            "attention_dp": rng.random() < 0.3,
            "layout": rng.choice(["nhd", "hnd", "vllm", "sglang", "trtllm"]),
            "numbering": rng.choice(["trtllm", "vllm", "sglang"]),
            "block": rng.choice([1, 3, 4, 8, 12]),
        }
        if pp > 1 and rng.random() < 0.5:
            side["layers"] = [4 - pp + 1, *[1] * (pp - 1)]
        return side

    shape: list[dict[str, Any]] = [
        {"names": ["k", "v"], "layers": 4, "heads": rng.choice([1, 2, 4]), "dim": 4}
    ]
    if rng.random() < 0.4:
        shape = [{"names": ["kv"], "layers": 4, "dim": 9}]
        if rng.random() < 0.5:
            shape.append({"names": ["index_k"], "layers": 4, "bytes": 12})
    elif rng.random() < 0.5:
        shape = [{**shape[0], "layers": [0, 2], "window": rng.randint(1, 80)}]
        shape.append({**shape[0], "layers": [1, 3]})
        if rng.random() < 0.5:
            del shape[1]["window"]
    if rng.random() < 0.3:
        shape.append({"names": ["ssm"], "layers": 4, "heads": 3, "bytes": 24, "state": True})
    if rng.random() < 0.3:
        draft = {"names": ["k", "v"], "layers": [4], "heads": 2, "dim": 4}
        shape.append({**draft, "only": rng.choice(["prefill", "decode"])})
    tokens = rng.randint(2, 70)
    return {
        "shape": shape,
        "prefill": side(),
        "decode": side(),
        "tokens": tokens,
        "first": rng.choice([0, rng.randrange(tokens)]),
        "stream_layers": rng.random() < 0.5,
        "seed": rng.randrange(9),
    }


def parties(topology: Topology, side: Deployment) -> dict[str, Party]:
    """Return the ranks of a side's first data parallel group with their block lists."""
    found = {}
    for rank in side.parallelism.group(0):
        layout = topology.cache_layout(side, rank)
        blocks = topology.block_lists(side, rank, layout, scattered=True)
        found[side.rank_name(rank)] = Party(layout, blocks)
    return found


@pytest.mark.parametrize("seed", range(120))
def test_what_is_explained_is_what_is_proved(seed: int) -> None:
    topology = read_topology(random_table(random.Random(seed)))
    request = explain_topology(topology).one_request()
    proof = verify(
        parties(topology, topology.prefill),
        parties(topology, topology.decode),
        Request(topology.first, topology.tokens, topology.request_id, topology.stream_layers),
    )
    assert sum(s.traffic.nbytes for s in request) == proof.nbytes
    assert sum(s.traffic.fragments for s in request) == proof.fragments
    assert len(request) == proof.pairs
