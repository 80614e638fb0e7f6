"""Election: every copy shares the work, nothing travels twice, and what is missing is named."""

import random
import re
from collections import Counter

import numpy as np
import pytest

from kvpack.election import Election
from kvpack.errors import CoverageError, IncompatibleLayoutsError
from kvpack.layout import CacheLayout, ContextShard, Memory, Shard, declare
from kvpack.plan import Slice, compile_plan
from kvpack.verification import Party, Request, verify

REQUESTS = [f"request-{i}" for i in range(2000)]


def rank(
    heads: Shard,
    layers: range = range(2),
    *,
    names: tuple[str, ...] = ("k", "v"),
    context: ContextShard | None = None,
    at: int = 1,
) -> CacheLayout:
    """Layers of blocks of 4 tokens and heads of 16 bytes, heads outside tokens."""
    sizes = (len(layers), len(names), 8, heads.count, 4, 8)
    strides = [int(np.prod(sizes[i + 1 :])) for i in range(len(sizes))]
    return CacheLayout(
        declare(
            Memory(at << 24, sizes, tuple(strides), "uint16"),
            "layer kv block head token dim",
            layers=layers,
            names=names,
            heads=heads,
        ),
        context or ContextShard(),
    )


def tensor_parallel(heads: int, ranks: int) -> dict[str, CacheLayout]:
    return {f"p{i}": rank(Shard.balanced(heads, ranks, i), at=1 + i) for i in range(ranks)}


def senders(election: Election, salt: str) -> set[str]:
    return {name for name, selection in election.elect(salt).items() if selection != ()}


def test_senders_that_hold_nothing_twice_send_all_they_have_in_common() -> None:
    election = Election(tensor_parallel(8, 4), rank(Shard(4, 4, 8), at=9))
    assert election.elect("any") == {"p0": (), "p1": (), "p2": None, "p3": None}


@pytest.mark.parametrize("copies", [2, 3, 4, 8])
def test_copies_share_the_requests_evenly(copies: int) -> None:
    election = Election(tensor_parallel(1, copies), rank(Shard(0, 1, 1), at=20))
    chosen = Counter(name for salt in REQUESTS for name in senders(election, salt))
    assert sum(chosen.values()) == len(REQUESTS)
    share = len(REQUESTS) / copies
    assert all(abs(chosen[f"p{i}"] - share) < 0.2 * share for i in range(copies)), chosen


def test_heads_on_several_ranks_each_travel_once() -> None:
    election = Election(tensor_parallel(4, 8), rank(Shard(0, 4, 4), at=20))
    for salt in REQUESTS[:100]:
        chosen = senders(election, salt)
        assert [len(chosen & {f"p{2 * h}", f"p{2 * h + 1}"}) for h in range(4)] == [1] * 4


def test_two_pairs_of_copies_choose_independently() -> None:
    election = Election(tensor_parallel(2, 4), rank(Shard(0, 2, 2), at=20))
    pairs = Counter(tuple(sorted(senders(election, salt))) for salt in REQUESTS)
    assert set(pairs) == {("p0", "p2"), ("p0", "p3"), ("p1", "p2"), ("p1", "p3")}
    assert all(abs(n - 500) < 125 for n in pairs.values()), pairs


def test_equal_salts_elect_alike_whatever_the_order_of_senders() -> None:
    sources = tensor_parallel(1, 4)
    backwards = dict(reversed(sources.items()))
    wanted = rank(Shard(0, 1, 1), at=20)
    for salt in REQUESTS[:50]:
        assert Election(sources, wanted).elect(salt) == Election(backwards, wanted).elect(salt)


def test_every_layout_of_a_receiver_is_served_under_any_uneven_overlap() -> None:
    rng = random.Random(3)
    for case in range(150):
        total = rng.randint(1, 9)
        sources = {}
        covered: set[int] = set()
        while covered != set(range(total)):
            start = rng.randrange(total)
            count = rng.randint(1, total - start)
            covered |= set(range(start, start + count))
            number = len(sources)
            sources[f"p{number}"] = rank(Shard(start, count, total), at=1 + number)
        start = rng.randrange(total)
        wanted = rank(Shard(start, rng.randint(1, total - start), total), at=200)
        blocks = rng.sample(range(8), 3)
        proof = verify(
            {name: Party(layout, blocks) for name, layout in sources.items()},
            {"d": Party(wanted, blocks[::-1])},
            Request(1, 11, f"request-{case}", stream_layers=case % 2 == 1),
        )
        assert proof.nbytes == 10 * wanted.token_bytes


@pytest.mark.parametrize(("prefill", "decode"), [(3, 4), (4, 3), (2, 5), (7, 1), (1, 7), (5, 8)])
def test_ranks_that_do_not_divide_each_other_are_served(prefill: int, decode: int) -> None:
    sources = tensor_parallel(8, prefill)
    wanted = {f"d{i}": rank(Shard.balanced(8, decode, i), at=50 + i) for i in range(decode)}
    proof = verify(
        {name: Party(layout, [3, 1]) for name, layout in sources.items()},
        {name: Party(layout, [0, 7]) for name, layout in wanted.items()},
        Request(0, 8),
    )
    assert proof.nbytes == 8 * 2 * 2 * 8 * 16


def test_a_selection_names_few_slices() -> None:
    sources = {
        "left": rank(Shard(0, 3, 4), range(60), at=1),
        "right": rank(Shard(1, 3, 4), range(60), at=2),
    }
    wanted = rank(Shard(0, 4, 4), range(60), at=3)
    chosen = Election(sources, wanted).elect("request")
    winner = "left" if chosen["left"] is None else "right"
    other = "right" if winner == "left" else "left"
    assert chosen[winner] is None
    last = (3, 4) if winner == "left" else (0, 1)
    assert chosen[other] == (Slice("k", 0, 60, *last), Slice("v", 0, 60, *last))
    plan = compile_plan(sources[other], wanted, selection=chosen[other])
    assert plan.nbytes(0, 4) == 4 * 60 * 2 * 16


def test_pipeline_stages_send_their_own_layers() -> None:
    sources = {f"p{i}": rank(Shard(0, 2, 2), range(3 * i, 3 * i + 3), at=1 + i) for i in range(3)}
    chosen = Election(sources, rank(Shard(0, 2, 2), range(2, 6), at=20)).elect("request")
    assert chosen == {"p0": None, "p1": None, "p2": ()}


def test_context_ranks_all_send_their_positions() -> None:
    sources = {
        f"p{c}.{t}": rank(Shard(0, 1, 1), context=ContextShard(c, 2, 4), at=1 + 2 * c + t)
        for c in range(2)
        for t in range(2)
    }
    election = Election(sources, rank(Shard(0, 1, 1), at=20))
    for salt in REQUESTS[:50]:
        assert sorted(name[:2] for name in senders(election, salt)) == ["p0", "p1"]


def test_context_ranks_pair_with_the_same_ranks_alone() -> None:
    sources = {f"p{c}": rank(Shard(), context=ContextShard(c, 2, 4), at=1 + c) for c in range(2)}
    wanted = rank(Shard(), context=ContextShard(1, 2, 4), at=20)
    assert senders(Election(sources, wanted), "request") == {"p1"}
    assert senders(Election({"p1": sources["p1"]}, wanted), "request") == {"p1"}


@pytest.mark.parametrize(
    ("sources", "wanted", "said"),
    [
        ({}, rank(Shard()), "a request needs at least one sender; from_ is empty"),
        (
            {"p0": rank(Shard(), range(2)), "p1": rank(Shard(), range(2, 4), at=2)},
            rank(Shard(), range(6), at=3),
            "cache tensor 'k' of layer 4 is wanted, but none of p0, p1 has it; name the sender "
            "that holds this layer in from_",
        ),
        (
            {"p0": rank(Shard(), names=("k",))},
            rank(Shard(), at=3),
            "cache tensor 'v' of layer 0 is wanted, but none of p0 has it",
        ),
        (
            {"p0": rank(Shard(0, 2, 8)), "p2": rank(Shard(4, 2, 8), at=2)},
            rank(Shard(0, 8, 8), at=3),
            "heads [2, 4) of cache tensor 'k' of layer 0 are wanted, but none of p0, p2 holds "
            "them; name the sender that does in from_",
        ),
        (
            {"p0": rank(Shard(0, 2, 8))},
            rank(Shard(1, 3, 8), at=3),
            "heads [2, 4) of cache tensor 'k' of layer 0 are wanted, but none of p0 holds them",
        ),
        (
            {f"p{c}": rank(Shard(), context=ContextShard(c, 3, 4), at=1 + c) for c in (0, 2)},
            rank(Shard(), at=9),
            "no sender has the positions of context rank 1 of 3; name the sender that holds them "
            "in from_ (named: p0, p2)",
        ),
    ],
)
def test_what_no_sender_has_is_named(
    sources: dict[str, CacheLayout], wanted: CacheLayout, said: str
) -> None:
    with pytest.raises(CoverageError, match=re.escape(said)):
        Election(sources, wanted)


@pytest.mark.parametrize("other", [ContextShard(1, 4, 4), ContextShard(1, 2, 8)])
def test_senders_of_different_context_parallelism_are_refused(other: ContextShard) -> None:
    sources = {
        "p0": rank(Shard(), context=ContextShard(0, 2, 4)),
        "p1": rank(Shard(), context=other, at=2),
    }
    with pytest.raises(IncompatibleLayoutsError, match="must share one context parallelism"):
        Election(sources, rank(Shard(), at=3))


def test_one_context_rank_needs_no_common_interleave() -> None:
    sources = {
        f"p{i}": rank(Shard.balanced(2, 2, i), context=ContextShard(0, 1, 1 + i), at=1 + i)
        for i in range(2)
    }
    assert senders(Election(sources, rank(Shard(0, 2, 2), at=9)), "request") == {"p0", "p1"}
