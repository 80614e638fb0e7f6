"""The wire protocol, pure: messages, slot pools, and the sender and receiver state machines."""

from kvpack.protocol.actions import (
    WIRE_ALIGNMENT,
    Action,
    CheckPart,
    DestinationReleased,
    Gather,
    IncomingChunk,
    OutgoingChunk,
    Post,
    ReceiveEnded,
    Scatter,
    SendEnded,
    SourceReleased,
    Wire,
    WireOf,
    Write,
)
from kvpack.protocol.exchange import Exchange
from kvpack.protocol.inbox import SourceSpec
from kvpack.protocol.messages import (
    MAX_AUX_BYTES,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    TOKEN_BYTES,
    LaneSelection,
    Message,
    Outcome,
    Request,
    decode,
    encode,
)
from kvpack.protocol.metadata import (
    PeerMetadata,
    StagingGeometry,
    decode_metadata,
    encode_metadata,
)
from kvpack.protocol.peers import Drop, Peer, Peers
from kvpack.protocol.pool import PoolCounts, SlotPool, SlotRun
from kvpack.protocol.receiver import Receiver
from kvpack.protocol.sender import Sender

__all__ = [
    "MAX_AUX_BYTES",
    "MAX_MESSAGE_BYTES",
    "PROTOCOL_VERSION",
    "TOKEN_BYTES",
    "WIRE_ALIGNMENT",
    "Action",
    "CheckPart",
    "DestinationReleased",
    "Drop",
    "Exchange",
    "Gather",
    "IncomingChunk",
    "LaneSelection",
    "Message",
    "Outcome",
    "OutgoingChunk",
    "Peer",
    "PeerMetadata",
    "Peers",
    "PoolCounts",
    "Post",
    "ReceiveEnded",
    "Receiver",
    "Request",
    "Scatter",
    "SendEnded",
    "Sender",
    "SlotPool",
    "SlotRun",
    "SourceReleased",
    "SourceSpec",
    "StagingGeometry",
    "Wire",
    "WireOf",
    "Write",
    "decode",
    "decode_metadata",
    "encode",
    "encode_metadata",
]
