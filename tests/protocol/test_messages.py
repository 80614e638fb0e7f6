"""Messages and metadata survive the wire, and nothing else gets through."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from kvpack.errors import ProtocolError, ProtocolVersionError
from kvpack.protocol import (
    PROTOCOL_VERSION,
    LaneSelection,
    Message,
    Outcome,
    PeerMetadata,
    Request,
    StagingGeometry,
    decode,
    decode_metadata,
    encode,
    encode_metadata,
)
from kvpack.protocol.messages import Cancel, Data, Done, Drained, Fail, Grant, Want

COMMON: dict[str, Any] = {"token": b"t" * 16, "request_id": "req", "attempt": 3, "seq": 7}
ENDING: dict[str, Any] = {"outcome": Outcome.FAILED, "reason": "e1: it broke"}

MESSAGES: list[Message] = [
    Request(
        **COMMON,
        first=5,
        last=9,
        selection=(LaneSelection("k", 0, 4, 2, 2), LaneSelection("v", 0, 4, 2, 2)),
        stream_layers=True,
        receivers=("d0", "d1"),
        timeout_s=2.5,
    ),
    Request(
        **COMMON,
        first=0,
        last=1,
        selection=None,
        stream_layers=False,
        receivers=("d0",),
        timeout_s=0.0,
    ),
    Want(**COMMON, first=5, last=7, aux=b"\x00\xff"),
    Grant(**COMMON, number=1, first=5, last=7, slot=0, slots=3, generation=12),
    Data(
        **COMMON,
        number=1,
        slot=0,
        generation=12,
        first=5,
        last=7,
        wire_first=0,
        wire_last=640,
        checksum=2**63 - 1,
    ),
    Done(**COMMON),
    Fail(**COMMON, **ENDING),
    Cancel(**COMMON, **ENDING, grants=4),
    Drained(**COMMON, **ENDING, grants=4),
]

METADATA = PeerMetadata(
    name="prefill0",
    incarnation=2**64 - 1,
    token=b"t" * 16,
    transport="nixl",
    transport_metadata=b"blob",
    layout=b"layout",
    staging=StagingGeometry(
        address=2**63 + 65536,
        slot_bytes=65536,
        send_slots=4,
        receive_slots=8,
        device_kind="cuda",
        device_index=1,
    ),
    capabilities=("checksum",),
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_survives_the_wire(message: Message) -> None:
    assert decode(encode(message)) == message


def _changed(message: Message, **fields: object) -> bytes:
    """Encode a message with fields that its class would refuse."""
    names = type(message).__struct_fields__
    values = [fields.get(name, getattr(message, name)) for name in names]
    return msgspec.msgpack.encode([type(message).__struct_config__.tag, *values])


@pytest.mark.parametrize(
    ("index", "fields"),
    [
        (0, {"token": b"short"}),
        (0, {"request_id": ""}),
        (0, {"request_id": "x" * 257}),
        (0, {"attempt": 0}),
        (0, {"attempt": 2**63}),
        (0, {"seq": -1}),
        (0, {"first": 9}),
        (0, {"first": -1}),
        (0, {"receivers": []}),
        (0, {"receivers": ["x"] * 4097}),
        (0, {"timeout_s": -1.0}),
        (0, {"timeout_s": float("nan")}),
        (0, {"timeout_s": float("inf")}),
        (0, {"selection": [["k", 0, 4, 2]]}),
        (0, {"stream_layers": 1}),
        (2, {"aux": b"x" * 65537}),
        (3, {"number": 0}),
        (3, {"slots": 0}),
        (3, {"slot": 2**63}),
        (3, {"last": 5}),
        (4, {"wire_last": 0}),
        (4, {"checksum": -1}),
        (6, {"outcome": "done"}),
        (6, {"outcome": "fine"}),
        (7, {"reason": "x" * 2049}),
        (7, {"grants": -1}),
    ],
)
def test_a_field_out_of_bounds_is_refused(index: int, fields: dict[str, object]) -> None:
    assert decode(_changed(MESSAGES[index])) == MESSAGES[index]
    with pytest.raises(ProtocolError):
        decode(_changed(MESSAGES[index], **fields))


def test_an_unknown_field_or_kind_is_refused() -> None:
    values = msgspec.msgpack.decode(encode(MESSAGES[5]))
    wrong: object
    for wrong in ([*values, 1], ["HELLO", *values[1:]], values[:-1], [], {}, 3, None):
        with pytest.raises(ProtocolError):
            decode(msgspec.msgpack.encode(wrong))


def test_a_message_over_the_size_limit_is_refused_on_both_sides() -> None:
    rows = tuple(LaneSelection("n" * 250, 0, 1, 0, 1) for _ in range(5000))
    request = msgspec.structs.replace(MESSAGES[0], selection=rows)
    with pytest.raises(ProtocolError, match="ask for fewer lanes"):
        encode(request)
    with pytest.raises(ProtocolError, match="1048576"):
        decode(msgspec.msgpack.encode(request))


def _mutated(rng: random.Random, payload: bytes) -> bytes:
    data = bytearray(payload)
    for _ in range(rng.randint(1, 4)):
        where = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[where:where] = rng.randbytes(rng.randint(1, 4))
            case 1:
                del data[where : where + rng.randint(1, 8)]
            case 2:
                data[where : where + 1] = bytes([rng.randrange(256)])
            case _:
                data = data[:where] + bytearray(rng.randbytes(rng.randint(0, 32)))
    return bytes(data)


def _refused(decoder: Callable[[bytes], object], payload: bytes) -> bool:
    try:
        decoder(payload)
    except ProtocolError:
        return True
    return False


def test_mutated_bytes_raise_nothing_but_protocol_errors() -> None:
    rng = random.Random(0)
    payloads = [encode(message) for message in MESSAGES]
    mutated = [_mutated(rng, rng.choice(payloads)) for _ in range(20_000)]
    noise = [rng.randbytes(rng.randint(0, 80)) for _ in range(10_000)]
    assert all(_refused(decode, payload) for payload in noise)
    # Some mutations hit a reason or a token and stay valid; most must not.
    assert 15_000 < sum(_refused(decode, payload) for payload in mutated) < 20_000


def test_mutated_metadata_raises_nothing_but_protocol_errors() -> None:
    rng = random.Random(0)
    payload = encode_metadata(METADATA)
    refused = sum(_refused(decode_metadata, _mutated(rng, payload)) for _ in range(10_000))
    assert 7_000 < refused < 10_000


def test_metadata_survives_the_wire() -> None:
    decoded = decode_metadata(encode_metadata(METADATA))
    assert decoded == METADATA
    assert decoded.staging.receive_address == 2**63 + 65536 + 4 * 65536


def test_another_protocol_version_is_refused_naming_both() -> None:
    payload = bytearray(encode_metadata(METADATA))
    payload[4:8] = (PROTOCOL_VERSION + 41).to_bytes(4, "little")
    with pytest.raises(ProtocolVersionError, match=f"version 42, this endpoint {PROTOCOL_VERSION}"):
        decode_metadata(bytes(payload))


@pytest.mark.parametrize("garbage", [b"", b"kvpk", b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04\x95" * 99])
def test_garbage_is_no_metadata(garbage: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"Endpoint.metadata\(\)") as caught:
        decode_metadata(garbage)
    assert not isinstance(caught.value, ProtocolVersionError)
