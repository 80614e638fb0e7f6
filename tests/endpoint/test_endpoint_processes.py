"""Endpoints in processes of their own: random requests, killed peers, nothing lost over time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import pytest
from support.caches import Cache, Group, is_idle, until
from support.endpoint_worker import Worker

from kvpack import TransferFailedError, TransferTimeoutError

BIG = {"num_blocks": 4096, "block_tokens": 16, "layers": 2, "dim": 64}
BIG_TOKENS = 60_000


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """Starts workers, which end with the test."""
    workers: list[Worker] = []

    def start(*arguments: object, **options: object) -> Worker:
        workers.append(Worker(*arguments, **options))  # type: ignore[arg-type]
        return workers[-1]

    yield start
    for worker in workers:
        worker.stop()


@pytest.fixture
def nixl_group() -> Iterator[Group]:
    """No endpoints yet, over NIXL."""
    group = Group("nixl")
    yield group
    group.close()


def test_many_requests_of_random_sizes_all_arrive_and_nothing_is_left(
    start: Callable[..., Worker], record_property: Callable[[str, object], None]
) -> None:
    """A thousand requests, several at once, through a staging smaller than the larger ones."""
    shape = {"layers": 4, "dim": 16, "num_blocks": 1024}
    options = {"staging_bytes": 1 << 20, "slot_bytes": 4096, "timeout_s": 60.0}
    prefill = start("prefill", {**shape, "block_tokens": 8}, 3, **options)
    decode = start("decode", {**shape, "block_tokens": 6}, None, **options)
    address = prefill.call("listen")
    assert decode.call("connect", address) == "prefill"
    prefill.tell("exchange_many", "send", "decode", 1000, 7, 600)
    decode.tell("exchange_many", "receive", "prefill", 1000, 7, 600)
    (sent, *_), (received, *_) = answers = [w.answer(150) for w in (prefill, decode)]
    assert sent == received
    assert len(set(sent)) == 1000
    for worker, (_, resident) in zip((prefill, decode), answers, strict=True):
        record_property(f"{worker.name}_resident_mib", [round(b / 2**20, 1) for b in resident])
        # Over the second half: what is remembered of ended requests is small.
        assert max(resident[5:]) - resident[4] < 6 << 20, resident
        assert worker.call("is_idle")
        assert worker.call("live_handles") == 0


@pytest.mark.parametrize("killed", ["sender", "receiver"])
def test_a_killed_peer_fails_its_own_transfers_and_may_come_back(
    start: Callable[..., Worker], nixl_group: Group, killed: str
) -> None:
    mine = Cache.of(**BIG)
    other = Cache.of(num_blocks=64, block_tokens=16, layers=2, dim=64).fill(5)
    # A receiver finds out by itself; a sender that waits for a last word has its deadline.
    timeout_s = 60.0 if killed == "sender" else 5.0
    survivor = nixl_group.open("survivor", mine.layout, staging_bytes=1 << 18, timeout_s=timeout_s)
    bystander = nixl_group.open("bystander", other.layout, staging_bytes=1 << 18)
    nixl_group.meet(survivor, bystander)
    address = survivor.listen()
    victim = start("victim", BIG, 4, staging_bytes=1 << 18)
    assert victim.call("connect", address) == "survivor"
    blocks = list(range(BIG_TOKENS // 16))
    if killed == "sender":
        victim.call("send", "big", blocks, 0, BIG_TOKENS)
        handle = survivor.receive("big", blocks, 0, BIG_TOKENS, from_=["victim"])
        until(lambda: not mine.is_poison())
    else:
        victim.call("receive", "big", blocks, 0, BIG_TOKENS, from_=["survivor"])
        handle = survivor.send("big", blocks, 0, BIG_TOKENS, to=["victim"])
        until(lambda: survivor.capacity().send.owned > 0)
    assert not handle.done()
    victim.kill()

    held = list(range(4000, 4016))
    sent = bystander.send("small", list(range(16)), 0, 256)
    survivor.receive("small", held, 0, 256, from_=["bystander"]).result(30)
    sent.result(30)
    assert mine.digest(held, 0, 256) == other.digest(list(range(16)), 0, 256)

    with pytest.raises((TransferFailedError, TransferTimeoutError), match=r"'big'.*victim"):
        handle.result(30)
    assert handle.wait_blocks_released(30)
    assert handle.record.reason
    survivor.disconnect("victim", exited=True)
    until(lambda: is_idle(survivor))
    assert survivor.capacity().peers == ("bystander",)

    again = start("victim", BIG, 6, staging_bytes=1 << 18)
    again.call("connect", address)
    again.call("send", "big", blocks[:50], 0, 800)
    survivor.receive("big", blocks[:50], 0, 800, from_=["victim"]).result(30)
    assert again.call("result", "big") == ("done", "")
    assert mine.digest(blocks[:50], 0, 800) == again.call("digest", blocks[:50], 0, 800)


def test_a_peer_that_restarts_without_a_word_replaces_its_former_self(
    start: Callable[..., Worker], nixl_group: Group
) -> None:
    mine = Cache.of()
    decode = nixl_group.open("decode", mine.layout)
    address = decode.listen()
    first = start("prefill", {}, 4)
    first.call("connect", address)
    waiting = decode.receive("r", [1], 0, 4, from_=["prefill"])
    first.kill()
    second = start("prefill", {}, 5)
    second.call("connect", address)
    # Its loss may be found out before its successor comes.
    words = r"'prefill' restarted and connected anew|prefill.*its process has ended"
    with pytest.raises(TransferFailedError, match=words):
        waiting.result(30)
    assert decode.capacity().peers == ("prefill",)
    second.call("send", "r", [7], 0, 4)
    decode.receive("r", [1], 0, 4, from_=["prefill"]).result(30)
    assert mine.digest([1], 0, 4) == second.call("digest", [7], 0, 4)


def test_an_endpoint_whose_peer_is_gone_closes_within_its_bounds(
    start: Callable[..., Worker], nixl_group: Group
) -> None:
    mine = Cache.of(**BIG)
    survivor = nixl_group.open(
        "survivor", mine.layout, staging_bytes=1 << 18, connect_timeout_s=1.5
    )
    victim = start("victim", BIG, 4, staging_bytes=1 << 18)
    address = survivor.listen()
    victim.call("connect", address)
    blocks = list(range(BIG_TOKENS // 16))
    victim.call("send", "big", blocks, 0, BIG_TOKENS)
    handle = survivor.receive("big", blocks, 0, BIG_TOKENS, from_=["victim"])
    until(lambda: not mine.is_poison())
    victim.kill()
    started = time.monotonic()
    survivor.close()
    assert time.monotonic() - started < 4 * 1.5
    assert handle.done()


@pytest.mark.parametrize("seed", range(2))
def test_several_processes_serve_one_in_both_directions(
    start: Callable[..., Worker], nixl_group: Group, seed: int
) -> None:
    rng = random.Random(seed)
    mine = Cache.of(num_blocks=512, block_tokens=rng.choice((3, 4, 16))).fill(1)
    hub = nixl_group.open("hub", mine.layout, staging_bytes=1 << 16)
    address = hub.listen()
    workers = [start(f"worker{i}", {"block_tokens": 5}, i) for i in range(2)]
    for worker in workers:
        worker.call("connect", address)
    free = list(range(512))
    rng.shuffle(free)
    checks = []
    for number in range(6):
        for worker in workers:
            tokens = rng.randint(1, 60)
            here = [free.pop() for _ in range(-(-tokens // mine.block_tokens))]
            there = rng.sample(range(32), -(-tokens // 5))
            request = f"{worker.name}.{number}"
            worker.call("send", request, there, 0, tokens)
            checks.append((worker, request, here, there, tokens))
    handles = [
        hub.receive(request, here, 0, tokens, from_=[worker.name])
        for worker, request, here, _, tokens in checks
    ]
    back = [
        (worker, f"back.{worker.name}", rng.sample(range(32, 64), 4), [free.pop()])
        for worker in workers
    ]
    for worker, request, there, here in back:
        tokens = min(mine.block_tokens, 16)
        worker.call("receive", request, there[: -(-tokens // 5)], 0, tokens, from_=["hub"])
        handles.append(hub.send(request, here, 0, tokens, to=[worker.name]))
    for handle in handles:
        handle.result(30)
    for worker, request, here, there, tokens in checks:
        assert worker.call("result", request) == ("done", "")
        assert mine.digest(here, 0, tokens) == worker.call("digest", there, 0, tokens)
    for worker, request, there, here in back:
        tokens = min(mine.block_tokens, 16)
        assert worker.call("result", request) == ("done", "")
        there = there[: -(-tokens // 5)]
        assert mine.digest(here, 0, tokens) == worker.call("digest", there, 0, tokens)
    until(lambda: is_idle(hub))
