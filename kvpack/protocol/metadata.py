"""What an endpoint tells a peer about itself when they connect: one opaque bytes object."""

from __future__ import annotations

import struct
from typing import Annotated, Literal

import msgspec

from kvpack.errors import ProtocolError, ProtocolVersionError
from kvpack.protocol.messages import PROTOCOL_VERSION, Count, Name, Positive, Token

MAX_METADATA_BYTES = 64 << 20

_MAGIC = b"kvpk"
# The version stands outside the struct: another version's fields need not be understood.
_HEADER = struct.Struct("<4sI")


class StagingGeometry(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True
):
    """Where an endpoint's staging memory lies: its send slots, then its receive slots.

    Attributes
    ----------
    address : int
        Of the first send slot.
    slot_bytes, send_slots, receive_slots : int
        Size of a slot in bytes, and how many of each pool.
    device_kind : str
        "cpu" or "cuda".
    device_index : int
        0 for the CPU.
    """

    address: Annotated[int, msgspec.Meta(ge=0)]
    slot_bytes: Positive
    send_slots: Count
    receive_slots: Count
    device_kind: Literal["cpu", "cuda"]
    device_index: Count

    @property
    def receive_address(self) -> int:
        """Address of the first receive slot."""
        return self.address + self.send_slots * self.slot_bytes


class PeerMetadata(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True
):
    """All that a peer must know of an endpoint.

    Attributes
    ----------
    name : str
        The endpoint's name.
    incarnation : int
        64 bits; another one each time an endpoint of that name is opened.
    token : bytes
        16 bytes that every message to this endpoint must carry.
    transport : str
        Kind of transport.
    transport_metadata : bytes
        The transport's own.
    layout : bytes
        The encoded cache layout.
    staging : StagingGeometry
        Where leases lie.
    capabilities : tuple of str
        Optional abilities that this endpoint offers.
    """

    name: Name
    incarnation: Annotated[int, msgspec.Meta(ge=0)]
    token: Token
    transport: Name
    transport_metadata: bytes
    layout: bytes
    staging: StagingGeometry
    capabilities: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)] = ()

    def __post_init__(self) -> None:
        if not self.incarnation < 2**64:
            raise ValueError(f"incarnation {self.incarnation} does not fit 64 bits")


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(PeerMetadata)


def encode_metadata(metadata: PeerMetadata) -> bytes:
    """Encode an endpoint's metadata.

    Raises
    ------
    ProtocolError
        If it is longer than `MAX_METADATA_BYTES`.
    """
    payload = _HEADER.pack(_MAGIC, PROTOCOL_VERSION) + _encoder.encode(metadata)
    if len(payload) > MAX_METADATA_BYTES:
        raise ProtocolError(
            f"metadata of {metadata.name!r} takes {len(payload)} bytes; it may take "
            f"{MAX_METADATA_BYTES}: register fewer regions"
        )
    return payload


def decode_metadata(payload: bytes) -> PeerMetadata:
    """Decode a peer's metadata and check every bound of it.

    Raises
    ------
    ProtocolVersionError
        If the peer speaks another version of the protocol; the message names both.
    ProtocolError
        If the bytes are not a kvpack endpoint's metadata.
    """
    if not _HEADER.size < len(payload) <= MAX_METADATA_BYTES:
        raise ProtocolError(
            f"not the metadata of a kvpack endpoint: {len(payload)} bytes; "
            "pass what Endpoint.metadata() returned"
        )
    magic, version = _HEADER.unpack_from(payload)
    if magic != _MAGIC:
        raise ProtocolError(
            f"not the metadata of a kvpack endpoint: it starts with {magic!r}; "
            "pass what Endpoint.metadata() returned"
        )
    if version != PROTOCOL_VERSION:
        raise ProtocolVersionError(
            f"the peer speaks protocol version {version}, this endpoint {PROTOCOL_VERSION}; "
            "install the same kvpack on both sides"
        )
    try:
        return _decoder.decode(payload[_HEADER.size :])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not the metadata of a kvpack endpoint: {error}") from error
