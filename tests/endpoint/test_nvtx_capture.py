"""A transfer between two processes, as a profiler that watches both sees it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.endpoint_worker import Worker

from kvpack.profiling import ranges

SHAPE = {"num_blocks": 256}
BLOCKS = list(range(250))
TOKENS = 1000


def payload(event: dict[str, Any]) -> tuple[str, str, int, int]:
    record = np.frombuffer(bytes.fromhex(event["payload"]), dtype=ranges.PAYLOAD_DTYPE)[0]
    request, peer, chunk, nbytes = record.item()
    return request.decode(), peer.decode(), chunk, nbytes


@pytest.fixture(scope="module")
def captured(nvtx_recorder: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """Events of the sending and of the receiving process, each by itself."""
    folder: Path = tmp_path_factory.mktemp("capture")
    files = {name: folder / name for name in ("prefill", "decode")}
    workers = {
        name: Worker(
            name,
            SHAPE,
            7,
            nvtx_recorder.environment(file),
            staging_bytes=1 << 15,
            slot_bytes=4096,
        )
        for name, file in files.items()
    }
    prefill, decode = workers["prefill"], workers["decode"]
    try:
        decode.call("connect", prefill.call("listen"))
        prefill.call("send", "watched", BLOCKS, 0, TOKENS)
        decode.call("receive", "watched", BLOCKS, 0, TOKENS, from_=["prefill"])
        assert decode.call("result", "watched") == ("done", "")
        assert prefill.call("result", "watched") == ("done", "")
        # What is refused or fails leaves nothing open either.
        for wrong in ([4096], [1, 2, 3]):
            prefill.tell("send", "refused", wrong, 0, 4)
            with pytest.raises(AssertionError, match="BlockListError"):
                prefill.answer()
        decode.call("receive", "late", BLOCKS, 0, TOKENS, from_=["prefill"], timeout_s=0.2)
        assert decode.call("result", "late")[0] == "timed_out"
        digests = [worker.call("digest", BLOCKS, 0, TOKENS) for worker in workers.values()]
        assert digests[0] == digests[1]
    finally:
        for worker in workers.values():
            worker.stop()
    return {name: nvtx_recorder.events(file) for name, file in files.items()}


def opened(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] in ("push", "start")]


def test_each_phase_shows_on_the_side_that_it_belongs_to(captured: dict[str, list]) -> None:
    seen = {side: {event["name"] for event in opened(events)} for side, events in captured.items()}
    assert seen["prefill"] == {"queue", "credit", "prepare", "gather", "post", "wire", "complete"}
    assert seen["decode"] == {"queue", "prepare", "wire", "scatter", "complete"}


def test_every_range_that_was_opened_was_closed(captured: dict[str, list]) -> None:
    for events in captured.values():
        count = Counter(event["event"] for event in events)
        assert count["push"] == count["pop"] > 0
        assert count["start"] == count["end"] > 0
        started = [event["id"] for event in events if event["event"] == "start"]
        ended = [event["id"] for event in events if event["event"] == "end"]
        assert sorted(started) == sorted(ended)


def test_payloads_name_request_peer_chunk_and_bytes(captured: dict[str, list]) -> None:
    total = TOKENS * 2 * 2 * 2 * 8 * 2
    for side, phase, peer in (("prefill", "wire", "decode"), ("decode", "scatter", "prefill")):
        found = [payload(e) for e in opened(captured[side]) if e["name"] == phase]
        assert {(request, name) for request, name, _, _ in found} == {("watched", peer)}
    writes = [payload(e) for e in opened(captured["prefill"]) if e["name"] == "wire"]
    assert sum(nbytes for *_, nbytes in writes) == total
    assert sorted(chunk for _, _, chunk, _ in writes) == list(range(1, len(writes) + 1))
    assert len(writes) > 1


def test_without_a_tool_nothing_is_open_and_a_transfer_goes_through() -> None:
    workers = [Worker(name, SHAPE, seed) for name, seed in (("prefill", 1), ("decode", None))]
    prefill, decode = workers
    try:
        decode.call("connect", prefill.call("listen"))
        prefill.call("send", "unwatched", BLOCKS, 0, TOKENS)
        decode.call("receive", "unwatched", BLOCKS, 0, TOKENS, from_=["prefill"])
        assert decode.call("result", "unwatched") == ("done", "")
    finally:
        for worker in workers:
            worker.stop()
