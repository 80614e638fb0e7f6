"""What strangers and misbehaving peers send harms nobody else, and never stops an endpoint."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import pytest
from support.caches import PATIENCE_S, Cache, Group, is_idle, ship_once, until

from kvpack import BlockListError, Endpoint, EndpointError, TransferFailedError
from kvpack.protocol import (
    TOKEN_BYTES,
    LaneSelection,
    Outcome,
    PeerMetadata,
    Request,
    StagingGeometry,
    decode,
    decode_metadata,
    encode,
    encode_metadata,
)
from kvpack.protocol.messages import Cancel, Data, Done, Drained, Fail, Grant, Message, Want
from kvpack.transport import LoopbackTransport, Region, Window

SLOT_BYTES, SLOTS = 4096, 16


class Mallory:
    """A peer that speaks the wire's language and keeps none of its rules."""

    def __init__(self, victim: Endpoint, cache: Cache) -> None:
        self.memory = np.zeros(2 * SLOTS * SLOT_BYTES, np.uint8)
        address = int(self.memory.ctypes.data)
        region = Region(address, self.memory.nbytes)
        self.transport = LoopbackTransport(
            "mallory@0000000000000001", region, Window(address, SLOT_BYTES, SLOTS)
        )
        self.cache = cache
        self.token = bytes(TOKEN_BYTES)
        theirs = decode_metadata(victim.metadata())
        self.key = f"{theirs.name}@{theirs.incarnation:016x}"
        self.their_token = theirs.token
        staging = theirs.staging
        self.window = Window(staging.receive_address, staging.slot_bytes, staging.receive_slots)
        self.transport.add_peer(self.key, theirs.transport_metadata, self.window)

    def metadata(self) -> bytes:
        """What makes an endpoint its peer."""
        return encode_metadata(
            PeerMetadata(
                name="mallory",
                incarnation=1,
                token=self.token,
                transport="loopback",
                transport_metadata=self.transport.metadata,
                layout=self.cache.layout.encode(),
                staging=StagingGeometry(
                    address=int(self.memory.ctypes.data),
                    slot_bytes=SLOT_BYTES,
                    send_slots=SLOTS,
                    receive_slots=SLOTS,
                    device_kind="cpu",
                    device_index=0,
                ),
            )
        )

    def say(self, kind: type[Message], attempt: int = 1, request: str = "r", **fields) -> None:
        """Notify the victim of a message with its token."""
        message = kind(token=self.their_token, request_id=request, attempt=attempt, seq=1, **fields)
        self.transport.notify(self.key, encode(message))

    def heard(self) -> list[Message]:
        """Messages that came from the victim."""
        return [decode(payload) for _, payload in self.transport.notifications()]


@pytest.fixture
def scene(
    loopback_group: Group, caplog: pytest.LogCaptureFixture
) -> Iterator[tuple[Endpoint, Endpoint, Mallory]]:
    """A pair, and a peer of neither yet; afterwards the pair works and no turn has failed."""
    here, there, odd = Cache.of().fill(1), Cache.of(), Cache.of()
    prefill, decode_end = loopback_group.pair(here, there)
    mallory = Mallory(prefill, odd)
    yield prefill, decode_end, mallory
    ship_once(prefill, decode_end, here, there)
    until(lambda: not prefill.capacity().receive.owned and not prefill.capacity().send.owned)
    mallory.transport.close()
    assert "a turn of endpoint" not in caplog.text


def flush(prefill: Endpoint, before: int, count: int) -> None:
    """Wait until so much was dropped or taken."""
    until(lambda: sum(prefill.capacity().drops.values()) >= before + count)


def test_a_strangers_messages_are_kept_within_bounds_and_do_nothing(scene) -> None:
    prefill, _, mallory = scene
    rng = random.Random(0)
    for _ in range(600):
        mallory.transport.notify(mallory.key, rng.randbytes(rng.randint(0, 300)))
    mallory.say(Done)
    assert is_idle(prefill)


def test_bytes_that_are_no_message_and_wrong_tokens_are_counted(scene) -> None:
    prefill, _, mallory = scene
    prefill.connect(mallory.metadata())
    rng = random.Random(1)
    for _ in range(300):
        mallory.transport.notify(mallory.key, rng.randbytes(rng.randint(1, 300)))
    mallory.their_token = rng.randbytes(TOKEN_BYTES)
    for _ in range(10):
        mallory.say(Done)
    flush(prefill, 0, 310)
    assert prefill.capacity().drops == {"malformed": 300, "wrong_token": 10}


def test_requests_for_what_is_not_there_fail_for_their_sender_alone(scene) -> None:
    prefill, _, mallory = scene
    prefill.connect(mallory.metadata())
    big = 2**62
    selections = [
        (LaneSelection("k", 0, 1, 5, 3),),
        (LaneSelection("k", 7, 9, 0, 2),),
        (LaneSelection("k", 1, 0, 0, 2),),
        (LaneSelection("nothing", 0, 2, 0, 2),),
        (LaneSelection("k", 0, big, 0, big),),
        (LaneSelection("k", 0, 2, 0, 0),),
        (LaneSelection("k", 0, 2, 0, 2),) * 50,
        (),
        None,
    ]
    sent = prefill.send("r", [1, 2], 0, 8, final=False, timeout_s=3.0)
    for attempt, selection in enumerate(selections, start=1):
        mallory.say(
            Request,
            attempt,
            first=0,
            last=8 if attempt % 2 else big,
            selection=selection,
            stream_layers=bool(attempt % 2),
            receivers=("mallory",),
            timeout_s=2.0,
        )
    sent.wait(PATIENCE_S)
    until(lambda: not prefill.capacity().sends)


def test_random_messages_of_a_peer_never_stop_an_endpoint(scene) -> None:
    prefill, _, mallory = scene
    prefill.connect(mallory.metadata())
    rng = random.Random(2)

    def number() -> int:
        return rng.choice((0, 1, 2, 3, 8, 16, 17, 4096, 2**31, 2**63 - 1))

    def span(first: str, last: str) -> dict[str, int]:
        start = rng.choice((0, 0, 1, 4, 16, 2**40))
        return {first: start, last: start + rng.choice((1, 4, 8, 512, 2**40))}

    def ending() -> dict[str, object]:
        return {"outcome": rng.choice(list(Outcome)[1:]), "reason": "r" * rng.randint(0, 2048)}

    handles = []
    for round_ in range(12):
        request = f"r{round_ % 3}"
        with contextlib.suppress(EndpointError):  # a former one is in flight still
            handles.append(prefill.receive(request, [1, 2], 0, 8, from_=["mallory"], timeout_s=1.0))
        with contextlib.suppress(BlockListError):
            handles.append(prefill.send(request, [1, 2], 0, 8, timeout_s=1.0))
        granted = {m.number: m for m in mallory.heard() if isinstance(m, Grant)}
        for _ in range(150):
            attempt = rng.choice((round_ + 1, rng.randint(1, 20)))
            kind = rng.choice((Request, Want, Grant, Data, Done, Fail, Cancel, Drained))
            fields: dict[str, object]
            if kind is Request:
                fields = {
                    **span("first", "last"),
                    "selection": rng.choice((None, (), (LaneSelection("v", 0, 2, 0, 1),))),
                    "stream_layers": rng.random() < 0.5,
                    "receivers": ("mallory",),
                    "timeout_s": rng.choice((0.0, 0.5)),
                }
            elif kind is Want:
                fields = {**span("first", "last"), "aux": rng.randbytes(rng.randint(0, 50))}
            elif kind is Grant:
                fields = {
                    **span("first", "last"),
                    "number": max(1, number()),
                    "slot": number(),
                    "slots": max(1, number()),
                    "generation": number(),
                }
            elif kind is Data:
                grant = rng.choice([*granted.values(), None])
                fields = {
                    **span("first", "last"),
                    **span("wire_first", "wire_last"),
                    "number": grant.number if grant else max(1, number()),
                    "slot": grant.slot if grant else number(),
                    "generation": grant.generation if grant else number(),
                }
                if grant:
                    fields |= {"first": grant.first, "last": grant.last}
            elif kind is Done:
                fields = {}
            elif kind is Fail:
                fields = ending()
            else:
                fields = {**ending(), "grants": number()}
            mallory.say(kind, attempt, request, **fields)
            granted |= {m.number: m for m in mallory.heard() if isinstance(m, Grant)}
    for handle in handles:
        assert handle.wait(PATIENCE_S)
    prefill.disconnect("mallory", exited=True)
    until(lambda: is_idle(prefill))


def test_a_chunk_cut_where_none_may_end_fails_that_receive(scene) -> None:
    prefill, _, mallory = scene
    prefill.connect(mallory.metadata())
    received = prefill.receive("r", [1, 2], 0, 8, from_=["mallory"])
    mallory.say(Want, first=0, last=8, aux=b"")
    grants: list[Grant] = []
    until(lambda: bool(grants.extend(m for m in mallory.heard() if isinstance(m, Grant)) or grants))
    grant = grants[0]
    mallory.say(
        Data,
        number=grant.number,
        slot=grant.slot,
        generation=grant.generation,
        first=0,
        last=8,
        wire_first=0,
        wire_last=13,
    )
    with pytest.raises(TransferFailedError, match=r"cut a chunk at wire byte 13, inside a token"):
        received.result(PATIENCE_S)
    prefill.disconnect("mallory", exited=True)
