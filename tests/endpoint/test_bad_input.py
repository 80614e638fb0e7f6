"""Bad input gets its own error before anything is sent, and harms nobody else's transfer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.caches import PATIENCE_S, Cache, Flag, Group, is_idle, ship_once, until

from kvpack import (
    NO_BLOCK,
    BlockListError,
    CacheLayout,
    ClosedError,
    CoverageError,
    Endpoint,
    EndpointError,
    IncompatibleLayoutsError,
    KvpackError,
    LayoutError,
    Memory,
    Options,
    ProtocolError,
    ProtocolVersionError,
    Shard,
    Staging,
    StagingError,
    TransferFailedError,
    TransportError,
    UnknownPeerError,
    declare,
)

ELSEWHERE = Path(__file__).parent


@pytest.fixture
def ends(loopback_group: Group):
    """A connected pair that another request goes on between, checked afterwards."""
    here, there = Cache.of().fill(1), Cache.of()
    prefill, decode = loopback_group.pair(here, there)
    flag = Flag()
    sent = prefill.send("bystander", [60, 61], 0, 8, ready=flag)
    received = decode.receive("bystander", [60, 61], 0, 8, from_=["prefill"])
    yield prefill, decode
    flag.fired = True
    received.result(PATIENCE_S)
    sent.result(PATIENCE_S)
    assert (there.read([60, 61], 0, 8) == here.read([60, 61], 0, 8)).all()
    ship_once(prefill, decode, here, there)
    until(lambda: is_idle(prefill) and is_idle(decode))
    assert not prefill.capacity().drops
    assert not decode.capacity().drops


BAD_BLOCKS = [
    ([1, 64], 0, 8, "block id 64 in layer group 0 is outside the cache's 64 blocks"),
    ([-2, 1], 0, 8, "block id -2 in layer group 0 is outside the cache's 64 blocks"),
    ([2**40, 1], 0, 8, "block id 1099511627776 in layer group 0 is outside"),
    ([1], 0, 8, r"too short: positions \[0, 8\) touch 2 blocks of 4 tokens .*, got 1"),
    ([1, 2, 3], 0, 8, r"too long: positions \[0, 8\) touch 2 blocks of 4 tokens .*, got 3"),
    ([1, 2], 0, 9, "too short"),
    ([], 0, 8, "too short"),
    ([1], 3, 3, r"positions \[3, 3\) are empty or negative"),
    ([1], 5, 3, r"positions \[5, 3\) are empty"),
    ([1], -1, 3, r"positions \[-1, 3\) are empty or negative"),
    ([1.5, 2.5], 0, 8, "list of integers"),
    ([[1, 2], [3, 4]], 0, 8, "2 block lists for a cache layout of 1 layer groups"),
]


@pytest.mark.parametrize(("blocks", "first", "last", "words"), BAD_BLOCKS)
@pytest.mark.parametrize("side", ["send", "receive"])
def test_a_wrong_block_list_is_refused(
    ends, side: str, blocks: list, first: int, last: int, words: str
) -> None:
    prefill, decode = ends
    calls = {
        "send": lambda: prefill.send("r", blocks, first, last),
        "receive": lambda: decode.receive("r", blocks, first, last, from_=["prefill"]),
    }
    with pytest.raises(BlockListError, match=words):
        calls[side]()


def test_destination_blocks_that_collide_are_refused_and_source_blocks_may_repeat(ends) -> None:
    prefill, decode = ends
    with pytest.raises(BlockListError, match=r"block id 5 stands twice in the destination list"):
        decode.receive("r", [5, 5], 0, 8, from_=["prefill"])
    sent = prefill.send("r", [5, 5], 0, 8)
    decode.receive("r", [5, 6], 0, 8, from_=["prefill"]).result(PATIENCE_S)
    sent.result(PATIENCE_S)


def test_a_hole_at_the_source_is_refused(ends) -> None:
    prefill, _ = ends
    with pytest.raises(BlockListError, match=r"NO_BLOCK.*the source has no bytes there"):
        prefill.send("r", [3, NO_BLOCK], 0, 8)


def test_unknown_peers_are_named_with_those_that_are_known(ends) -> None:
    prefill, decode = ends
    for call in (
        lambda: prefill.send("r", [1], 0, 4, to=["decode", "nobody"]),
        lambda: prefill.receive("r", [1], 0, 4, from_=["nobody"]),
        lambda: prefill.disconnect("nobody"),
        lambda: prefill.warmup(["nobody"]),
    ):
        with pytest.raises(
            UnknownPeerError, match=r"not connected to 'nobody' \(connected: decode\); connect"
        ):
            call()
    with pytest.raises(UnknownPeerError):
        decode.receive("r", [1], 0, 4, from_=["decode"])


def test_a_name_in_place_of_a_list_of_names_is_refused(ends) -> None:
    prefill, decode = ends
    with pytest.raises(EndpointError, match=r"to='decode' is one name; pass a list of them"):
        prefill.send("r", [1], 0, 4, to="decode")
    with pytest.raises(EndpointError, match=r"from_='prefill' is one name"):
        decode.receive("r", [1], 0, 4, from_="prefill")
    with pytest.raises(EndpointError, match=r"receivers='decode' is one name"):
        decode.receive("r", [1], 0, 4, from_=["prefill"], receivers="decode")
    with pytest.raises(EndpointError, match=r"peers='decode' is one name"):
        prefill.warmup("decode")


def test_nobody_named_and_aux_too_long_are_refused(ends) -> None:
    prefill, decode = ends
    with pytest.raises(BlockListError, match=r"`to` names nobody"):
        prefill.send("r", [1], 0, 4, to=[])
    with pytest.raises(CoverageError):
        decode.receive("r", [1], 0, 4, from_=[])
    with pytest.raises(ProtocolError, match=r"aux takes 65537 bytes, 65536 are allowed"):
        prefill.send("r", [1], 0, 4, aux=bytes(65537))
    for request in ("", "x" * 257):
        with pytest.raises(EndpointError, match=r"request_id .* it needs 1 to 256"):
            prefill.send(request, [1], 0, 4)
        with pytest.raises(EndpointError, match=r"request_id .* it needs 1 to 256"):
            decode.receive(request, [1], 0, 4, from_=["prefill"])
    for timeout_s in (0, -1, float("inf"), float("nan")):
        with pytest.raises(EndpointError, match=r"seconds, positive and finite"):
            prefill.send("r", [1], 0, 4, timeout_s=timeout_s)
        with pytest.raises(EndpointError, match=r"seconds, positive and finite"):
            decode.receive("r", [1], 0, 4, from_=["prefill"], timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"request_id": 7}, r"request_id=7 must be a string"),
        ({"request_id": "\ud800"}, r"a character that UTF-8 cannot carry"),
        ({"timeout_s": "3"}, r"timeout_s='3' must be a number of seconds"),
        ({"timeout_s": True}, r"timeout_s=True must be a number of seconds"),
        ({"ready": True}, r"ready=True has no query\(\)"),
        ({"first": 0.0}, r"first=0.0 must be a whole number"),
        ({"last": "4"}, r"last='4' must be a whole number"),
    ],
)
def test_arguments_of_another_kind_are_refused(ends, arguments, message) -> None:
    prefill, decode = ends
    given = {"request_id": "r", "blocks": [1], "first": 0, "last": 4, **arguments}
    with pytest.raises((EndpointError, BlockListError), match=message):
        prefill.send(**given)
    with pytest.raises((EndpointError, BlockListError), match=message):
        decode.receive(**given, from_=["prefill"])


@pytest.mark.parametrize("aux", ["hello", None, 7])
def test_an_aux_that_is_not_bytes_is_refused(ends, aux) -> None:
    with pytest.raises(EndpointError, match=r"aux is .* not bytes; encode it first"):
        ends[0].send("r", [1], 0, 4, aux=aux)


def test_numbers_of_numpy_and_names_from_a_generator_are_welcome(ends) -> None:
    prefill, decode = ends
    aux = bytearray(b"first")
    sent = prefill.send("r", [1], np.int64(0), np.uint8(4), to=(n for n in ["decode"]), aux=aux)
    aux[:] = b"later"
    received = decode.receive(
        "r", [2], np.int32(0), np.int64(4), from_=("prefill",), timeout_s=np.float32(20)
    )
    assert received.result(20).aux == {"prefill": b"first"}
    assert sent.result(20).record.outcome == "done"


def test_a_range_that_overlaps_one_in_flight_is_refused(ends) -> None:
    prefill, decode = ends
    kept = prefill.send("r", [1, 2], 0, 8, final=False)
    for first, last, blocks in ((0, 8, [1, 2]), (7, 9, [2, 3]), (3, 4, [1])):
        with pytest.raises(BlockListError, match=r"overlap the send of \[0, 8\) in flight"):
            prefill.send("r", blocks, first, last)
    asked = decode.receive("r", [1, 2, 3], 0, 12, from_=["prefill"])
    with pytest.raises(EndpointError, match=r"a receive of that id is in flight"):
        decode.receive("r", [7], 0, 4, from_=["prefill"])
    rest = prefill.send("r", [4], 8, 12)
    for handle in (asked, kept, rest):
        handle.result(PATIENCE_S)


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ({"dim": 8}, {"dim": 16}, "'k'.*8.*16|'k'.*16.*8"),
        ({"dtype": "int16"}, {"dtype": "float16"}, "'k'.*int16.*float16|'k'.*float16.*int16"),
        ({"heads": Shard(0, 2, 2)}, {"heads": Shard(0, 2, 4)}, "'k'"),
    ],
)
@pytest.mark.parametrize("way", ["metadata", "rendezvous"])
def test_layouts_that_disagree_are_refused_on_both_sides_with_the_tensor_named(
    group: Group, ours: dict, theirs: dict, words: str, way: str
) -> None:
    here, there = Cache.of(**ours), Cache.of(**theirs)
    one, other = group.open("one", here.layout), group.open("other", there.layout)
    if way == "metadata":
        pairs = [(one, other.metadata()), (other, one.metadata())]
    else:
        pairs = [(one, other.listen()), (other, one.listen())]
    for endpoint, peer in pairs:
        with pytest.raises(IncompatibleLayoutsError, match=f"(?s)one.*other|other.*one.*{words}"):
            endpoint.connect(peer)
    assert one.capacity().peers == other.capacity().peers == ()


def test_a_peer_that_disagrees_does_not_disturb_the_others(group: Group) -> None:
    here, there, odd = Cache.of().fill(1), Cache.of(), Cache.of(dim=16)
    prefill, decode = group.pair(here, there)
    third = group.open("third", odd.layout)
    with pytest.raises(IncompatibleLayoutsError):
        prefill.connect(third.metadata())
    ship_once(prefill, decode, here, there)


def test_wanted_heads_layers_and_positions_that_no_sender_has_are_named(
    loopback_group: Group,
) -> None:
    half, whole = Cache.of(heads=Shard(0, 2, 4)).fill(1), Cache.of(heads=Shard(0, 4, 4))
    deep = Cache.of(heads=Shard(0, 4, 4), layers=3)
    prefill = loopback_group.open("prefill", half.layout)
    decode = loopback_group.open("decode", whole.layout)
    deeper = loopback_group.open("deeper", deep.layout)
    loopback_group.meet(prefill, decode, deeper)
    with pytest.raises(CoverageError, match=r"(?s)head.*2.*4"):
        decode.receive("r", [1], 0, 4, from_=["prefill"])
    with pytest.raises(CoverageError, match=r"(?s)layer.*2"):
        deeper.receive("r", [1], 0, 4, from_=["decode"])
    assert is_idle(decode)
    assert is_idle(deeper)


@pytest.mark.parametrize("is_sent_first", [True, False])
def test_a_range_that_no_send_covers_fails_at_once_and_names_both(
    group: Group, is_sent_first: bool
) -> None:
    here, there = Cache.of().fill(1), Cache.of()
    prefill, decode = group.pair(here, there, timeout_s=60.0)
    flag = Flag()
    if is_sent_first:
        sent = prefill.send("r", [1, 2], 0, 8, ready=flag)
    received = decode.receive("r", [1, 2, 3], 0, 12, from_=["prefill"])
    started = time.monotonic()
    if not is_sent_first:
        sent = prefill.send("r", [1, 2], 0, 8, ready=flag)
    with pytest.raises(
        TransferFailedError,
        match=r"request 'r' failed: prefill: positions \[0, 12\) were asked for, but \[0, 8\)",
    ):
        received.result(PATIENCE_S)
    assert time.monotonic() - started < 2
    assert sent.wait(PATIENCE_S)
    assert there.is_poison()
    ship_once(prefill, decode, here, there)


def test_another_protocol_version_is_refused_and_both_are_named(loopback_group: Group) -> None:
    here, there = Cache.of(), Cache.of()
    one = loopback_group.open("one", here.layout)
    other = loopback_group.open("other", there.layout)
    metadata = bytearray(one.metadata())
    version = int.from_bytes(metadata[4:8], "little")
    metadata[4:8] = (version + 1).to_bytes(4, "little")
    with pytest.raises(
        ProtocolVersionError, match=f"version {version + 1}, this endpoint {version}; install"
    ):
        other.connect(bytes(metadata))


def test_garbage_is_no_metadata_wherever_it_is_damaged(group: Group) -> None:
    here, there = Cache.of().fill(1), Cache.of()
    prefill, decode = (group.open(n, c.layout) for n, c in (("prefill", here), ("decode", there)))
    good = prefill.metadata()
    noise = np.random.default_rng(0)
    for garbage in (b"", b"x", b"kvpk", noise.bytes(200), good[:-1], good[: len(good) // 2]):
        with pytest.raises(ProtocolError, match=r"not the metadata of a kvpack endpoint"):
            decode.connect(garbage)
    damaged = [bytearray(good) for _ in range(200)]
    for one in damaged:
        one[int(noise.integers(8, len(one)))] ^= 1 << int(noise.integers(8))
    for one in damaged:
        try:
            name = decode.connect(bytes(one))
        except KvpackError:
            continue
        decode.disconnect(name)  # a flipped bit in the token or an address cannot be told
    group.meet(prefill, decode)
    ship_once(prefill, decode, here, there)


def test_text_that_is_no_address_and_an_address_where_nobody_is(loopback_group: Group) -> None:
    here = Cache.of()
    one = loopback_group.open("one", here.layout, connect_timeout_s=0.3)
    with pytest.raises(TransportError, match=r"not 'host:port'"):
        one.connect("prefill")
    with pytest.raises(TransportError, match=r"nobody listens at 127.0.0.1:9"):
        one.connect("127.0.0.1:9")
    with pytest.raises(TransportError, match=r"not a loopback address"):
        one.listen("0.0.0.0")
    one.listen()
    with pytest.raises(EndpointError, match=r"listens on 127.0.0.1:[0-9]+ already"):
        one.listen()


def test_an_endpoint_is_no_peer_of_itself_nor_of_its_name(loopback_group: Group) -> None:
    here, there = Cache.of(), Cache.of()
    one, twin = (loopback_group.open("one", c.layout) for c in (here, there))
    for metadata in (one.metadata(), twin.metadata()):
        with pytest.raises(EndpointError, match=r"'one' cannot be its own peer; rename"):
            one.connect(metadata)


@pytest.mark.parametrize("name", ["", "x" * 257])
def test_a_name_that_no_message_can_carry_is_refused(name: str) -> None:
    cache = Cache.of()
    with pytest.raises(EndpointError, match=r"257 characters|has 0 characters; it needs 1 to 256"):
        Endpoint(name, cache.layout, options=Options(transport="loopback"))


def test_transports_that_differ_are_refused() -> None:
    here, there = Cache.of(), Cache.of()
    loopback, nixl = Group("loopback"), Group("nixl")
    try:
        one, other = loopback.open("one", here.layout), nixl.open("other", there.layout)
        with pytest.raises(
            EndpointError, match=r"'other' uses transport 'nixl', endpoint 'one' 'loopback'"
        ):
            one.connect(other.metadata())
    finally:
        loopback.close()
        nixl.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_cuda_cache_on_a_machine_without_cuda_is_refused() -> None:
    memory = Memory(1 << 32, (2, 16, 4, 2, 8), (2048, 64, 16, 8, 1), "int16", device="cuda:0")
    layout = CacheLayout(
        declare(memory, "kv block token head dim", layers=0, names=("k", "v"), heads=Shard(0, 2, 2))
    )
    with pytest.raises(LayoutError, match=r"declared on cuda:0, but torch .* no CUDA device"):
        Endpoint("e", layout, options=Options(transport="loopback"))


def test_staging_smaller_than_one_slot_a_peer_is_refused(group: Group) -> None:
    caches = [Cache.of().fill(i) for i in range(4)]
    few = group.open("few", caches[0].layout, staging_bytes=4 << 12)
    others = [group.open(f"o{i}", c.layout) for i, c in enumerate(caches[1:])]
    for other in others[:2]:
        group.meet(few, other)
    with pytest.raises(
        StagingError, match=r"2 slots in its smaller pool, fewer than its 3 peers.*at least 24576"
    ):
        few.connect(others[2].metadata())
    ship_once(others[0], few, caches[1], caches[0])
    few.disconnect("o0")
    group.meet(few, others[2])
    ship_once(others[2], few, caches[3], caches[0])


def test_a_token_larger_than_a_pool_is_refused_before_anything_is_sent(
    loopback_group: Group,
) -> None:
    here, there = Cache.of(dim=1024), Cache.of(dim=1024)
    prefill = loopback_group.open("p", here.layout)
    decode = loopback_group.open("d", there.layout, staging_bytes=4 << 8, slot_bytes=256)
    other = loopback_group.open("q", here.layout, staging_bytes=4 << 8, slot_bytes=256)
    with pytest.raises(TransportError, match=r"same slot size"):
        decode.connect(prefill.metadata())
    loopback_group.meet(other, decode)
    with pytest.raises(StagingError, match=r"takes .* bytes of staging.*open the endpoints with"):
        decode.receive("r", [1], 0, 4, from_=["q"])
    assert is_idle(decode)


def test_staging_serves_one_endpoint_at_a_time() -> None:
    here, there = Cache.of(), Cache.of()
    options = Options(transport="loopback")
    with Staging("cpu", 1 << 20) as staging:
        with (
            Endpoint("one", here.layout, staging=staging, options=options),
            pytest.raises(StagingError, match=r"another endpoint"),
        ):
            Endpoint("other", there.layout, staging=staging, options=options)
        with Endpoint("other", there.layout, staging=staging, options=options):
            pass


def test_nothing_works_after_close(loopback_group: Group) -> None:
    here, there = Cache.of(), Cache.of()
    prefill, decode = loopback_group.pair(here, there)
    waiting = decode.receive("r", [1], 0, 4, from_=["prefill"])
    decode.close()
    decode.close()
    assert waiting.done()
    waiting.cancel()
    metadata = prefill.metadata()
    for call in (
        lambda: decode.send("r", [1], 0, 4),
        lambda: decode.receive("r", [1], 0, 4, from_=["prefill"]),
        lambda: decode.connect(metadata),
        decode.listen,
        decode.metadata,
        decode.capacity,
        decode.warmup,
        decode.progress,
        lambda: decode.disconnect("prefill"),
    ):
        with pytest.raises(ClosedError, match=r"endpoint 'decode' is closed"):
            call()


def test_progress_belongs_to_the_thread_where_there_is_one(ends) -> None:
    prefill, _ = ends
    with pytest.raises(EndpointError, match=r"driven by its own thread; open it with"):
        prefill.progress()


FORKED = """
import os, random, sys
from support.caches import Cache, Group, ship_once
from kvpack import ClosedError

group = Group(sys.argv[1])
here, there = Cache.of().fill(1), Cache.of()
prefill, decode = group.pair(here, there)
ship_once(prefill, decode, here, there, request="before")
open_ = decode.receive("open", [9], 0, 4, from_=["prefill"])
child = os.fork()
if not child:
    status = 1
    try:
        for call in (open_.wait, open_.result, open_.cancel, open_.wait_blocks_released):
            try:
                call()
            except ClosedError as error:
                assert "its forked child" in str(error)
            else:
                raise AssertionError("a forked child used its parent's handle")
        for call in (
            lambda: prefill.send("r", [1], 0, 4),
            lambda: decode.receive("r", [1], 0, 4, from_=["prefill"]),
            prefill.metadata, prefill.capacity, prefill.listen, prefill.warmup,
        ):
            try:
                call()
            except ClosedError as error:
                assert "belongs to process" in str(error) and "start with spawn" in str(error)
            else:
                raise AssertionError("a forked child used its parent's endpoint")
        group.close()
        own = Group("loopback")
        ship_once(*own.pair(here, there), here, there)
        own.close()
        status = 0
    finally:
        os._exit(status)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
open_.cancel()
ship_once(prefill, decode, here, there, request="after")
group.close()
"""


@pytest.mark.parametrize("transport", ["loopback", "nixl"])
def test_a_forked_child_is_told_and_the_parent_goes_on(transport: str) -> None:
    tests = str(ELSEWHERE.parent)
    result = subprocess.run(
        [sys.executable, "-c", FORKED, transport],
        cwd=ELSEWHERE,
        env={**os.environ, "PYTHONPATH": tests},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert result.returncode == 0, result.stderr[-3000:]
