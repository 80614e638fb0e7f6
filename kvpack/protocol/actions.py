"""What the state machines ask their endpoint to do, and what they ask of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from kvpack.protocol.messages import Data, Message, Outcome, Request
from kvpack.protocol.pool import SlotRun
from kvpack.wire import WIRE_ALIGNMENT as WIRE_ALIGNMENT


class Wire(Protocol):
    """The wire order of one part between two endpoints: how long it is, and where it may be cut."""

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole part; 0 if nothing of it travels."""

    @property
    def piece_bytes(self) -> int:
        """Staging bytes that hold at least one piece, wherever a chunk starts."""

    def cut(self, start: int, max_bytes: int) -> int:
        """Return the end of the largest chunk from `start` that fits in `max_bytes` of staging.

        A chunk [start, end) takes ``end - start // 16 * 16`` bytes.

        Raises
        ------
        StagingError
            If not even the smallest piece fits.
        """


WireOf: TypeAlias = Callable[[str, Request, int, int], Wire]
"""(peer, request, first, last) -> Wire of that part; a KvpackError is why the session ends."""

CheckPart: TypeAlias = Callable[[Wire], None]
"""Raises a KvpackError if the blocks of a send lack what a part of it needs."""


def check_nothing(wire: Wire) -> None:
    """For sends whose blocks hold every position of their range."""


@dataclass(frozen=True, slots=True)
class OutgoingChunk:
    """Wire bytes of one part on their way from blocks through local send slots to a peer's lease.

    Attributes
    ----------
    chunk_id : int
        Unique in this endpoint's sender.
    send_id : int
        The send whose blocks it is gathered from.
    peer, request_id, attempt
        The session.
    number : int
        The grant's number, and with it the chunk's in its session.
    first, last : int
        The part's positions.
    wire : Wire
        The part's wire order.
    wire_first, wire_last : int
        The chunk's bytes of it.
    run : SlotRun
        Local send slots; the chunk starts `wire_first % 16` bytes into them.
    lease : SlotRun
        The peer's receive slots; the chunk starts at the same offset there.
    """

    chunk_id: int
    send_id: int
    peer: str
    request_id: str
    attempt: int
    number: int
    first: int
    last: int
    wire: Wire
    wire_first: int
    wire_last: int
    run: SlotRun
    lease: SlotRun

    def landing(self) -> dict[str, int]:
        """Return what DATA says of it: grant number, lease, part and wire bytes."""
        return {
            "number": self.number,
            "slot": self.lease.slot,
            "generation": self.lease.generation,
            "first": self.first,
            "last": self.last,
            "wire_first": self.wire_first,
            "wire_last": self.wire_last,
        }


@dataclass(frozen=True, slots=True)
class IncomingChunk:
    """Wire bytes of one part that have landed in a lease.

    Attributes
    ----------
    chunk_id : int
        Unique in this endpoint's receiver.
    receive_id : int
        The receive whose blocks it is scattered to.
    peer, request_id, attempt
        The session.
    number : int
        The grant's number, and with it the chunk's in its session.
    first, last : int
        The part's positions.
    wire : Wire
        The part's wire order.
    wire_first, wire_last : int
        The chunk's bytes of it.
    run : SlotRun
        The lease; the chunk starts `wire_first % 16` bytes into it.
    checksum : int or None
        What the sender computed.
    """

    chunk_id: int
    receive_id: int
    peer: str
    request_id: str
    attempt: int
    number: int
    first: int
    last: int
    wire: Wire
    wire_first: int
    wire_last: int
    run: SlotRun
    checksum: int | None


@dataclass(frozen=True, slots=True)
class Post:
    """Send a message to a peer as a notification of its own."""

    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class Gather:
    """Gather a chunk into its local slots; then call `Sender.gathered` or `Sender.chunk_failed`."""

    chunk: OutgoingChunk


@dataclass(frozen=True, slots=True)
class Write:
    """Write a chunk's local slots to its lease, the message riding on the write.

    Call `Sender.written` when the write is known to be over, or `Sender.chunk_failed` when it is
    over with an error; never before, whatever becomes of the session: the slots stay taken.
    """

    chunk: OutgoingChunk
    message: Data


@dataclass(frozen=True, slots=True)
class Scatter:
    """Scatter a landed chunk; then call `Receiver.scattered` or `Receiver.scatter_failed`."""

    chunk: IncomingChunk


@dataclass(frozen=True, slots=True)
class SourceReleased:
    """Nothing will be gathered from this send's blocks any more."""

    send_id: int


@dataclass(frozen=True, slots=True)
class DestinationReleased:
    """Nothing will be scattered to this receive's blocks any more."""

    receive_id: int


@dataclass(frozen=True, slots=True)
class SendEnded:
    """A send has ended, once and for all.

    Attributes
    ----------
    send_id : int
        Which.
    outcome : Outcome
        Done only if every receiver said DONE.
    reason : str
        Names the peer and what happened; empty when done.
    """

    send_id: int
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class ReceiveEnded:
    """A receive has ended, once and for all.

    Attributes
    ----------
    receive_id : int
        Which.
    outcome : Outcome
        Done only if every wanted byte has been scattered.
    reason : str
        Names the peer and what happened; empty when done.
    aux : mapping of str to tuple of bytes
        When done, by peer: what each of its sends carried, in order of their positions.
    """

    receive_id: int
    outcome: Outcome
    reason: str
    aux: Mapping[str, tuple[bytes, ...]]


Action: TypeAlias = (
    Post
    | Gather
    | Write
    | Scatter
    | SourceReleased
    | DestinationReleased
    | SendEnded
    | ReceiveEnded
)
