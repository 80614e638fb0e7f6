"""The messages of the wire protocol: fields, bounds, encoding, and what each one means.

Messages are NIXL notifications: unordered, perhaps repeated, perhaps minutes late. Each is a
msgpack array of bounded fields. Each carries `token` (16 bytes that the recipient gave to this
peer; a message with another token is dropped), `request_id`, `attempt` and `seq` (counts what this
endpoint posted to this peer; for diagnosis only, since every message is safe to repeat).

A **session** is one (receiver, sender, request id, attempt). Attempts are numbered by the receiving
endpoint, over all of its requests, so that a later one always has the larger number; an attempt
that has ended is never taken up again. Every message travels one way, so that its type alone tells
whether the recipient's sender or its receiver is meant.

REQUEST, receiver to sender
    When: a receive is started. Effect: opens the session, which waits for sends of that request id
    until `timeout_s`. Again: dropped. Late: an attempt that has ended or was replaced stays shut.
WANT, sender to receiver
    When: a part of the request (its overlap with one send) can be gathered, or has no bytes.
    Effect: the part joins what may be granted, and `aux` is kept. Again, late: dropped.
GRANT, receiver to sender
    When: a part has more bytes than have landed and its open leases can hold. Effect: one chunk of
    that part may be written to the lease; grants are used in order of their `number`. Again:
    dropped. Late, when the session is over: never used, answered by DRAINED.
DATA, sender to receiver, riding on the write
    When: the write of a chunk has landed. Effect: checked against grant number, lease, generation,
    part and the bytes landed before, then scattered. Again, late: dropped, never scattered.
DONE, receiver to sender
    When: every wanted byte of every sender is scattered. Effect: the session ended done. Again,
    late: dropped.
FAIL, sender to receiver
    When: the session ended on the sender without DONE or CANCEL. Effect: the receive ends with that
    outcome and its CANCELs go out, to this sender too. Again, late: dropped.
CANCEL, receiver to sender
    When: the receive ended other than done, having issued `grants`. Effect: the session ends for
    good; DRAINED follows when no write of it is in flight. Again: DRAINED again. Early, before its
    REQUEST: the attempt is shut before it was opened.
DRAINED, sender to receiver
    When: after a CANCEL, or a GRANT for a session that is over, as soon as no write of the session
    is in flight. Effect: leases in doubt with numbers up to `grants` return to the pool. Again,
    late: nothing is left to return. Early, having overtaken FAIL: the receive ends as by FAIL.

Why no unused grant is left behind: a part is granted to only while it has more bytes to come than
its open leases can hold, a chunk lies within one lease, and grants are used in order. So there is
at least one byte for each. Why a grant names its part: WANTs overtake each other, and a chunk of a
part that the receiver does not know yet could not be placed.

Why DRAINED is proof although GRANTs may still be on their way: the sender's end of an attempt is
final, and `grants` repeats the number that CANCEL named. No write under a grant of that number or
a smaller one is in flight or will ever be posted.
"""

from __future__ import annotations

import enum
import math
from typing import Annotated, TypeAlias

import msgspec

from kvpack.errors import ProtocolError

PROTOCOL_VERSION = 1
"""Two endpoints talk only if both speak this version."""

MAX_MESSAGE_BYTES = 1 << 20
MAX_AUX_BYTES = 1 << 16
MAX_NAME_CHARS = 256
MAX_REASON_CHARS = 2048
MAX_SELECTION_ROWS = 16384
MAX_RECEIVERS = 4096
TOKEN_BYTES = 16

_LIMIT = 2**63 - 1

Count = Annotated[int, msgspec.Meta(ge=0, le=_LIMIT)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=_LIMIT)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
Reason = Annotated[str, msgspec.Meta(max_length=MAX_REASON_CHARS)]
Token = Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Outcome(str, enum.Enum):
    """How a transfer ended."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed out"


class LaneSelection(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The lanes of one tensor name that a receiver elected a sender for.

    Attributes
    ----------
    name : str
        The cache tensors' name.
    first_layer, last_layer : int
        Global layer ids, half open.
    head_start, head_count : int
        Global heads.
    """

    name: Name
    first_layer: Count
    last_layer: Count
    head_start: Count
    head_count: Count


class _Message(
    msgspec.Struct,
    frozen=True,
    array_like=True,
    forbid_unknown_fields=True,
    kw_only=True,
):
    token: Token
    request_id: Name
    attempt: Positive
    seq: Count


class Request(_Message, frozen=True, tag="REQUEST"):
    """Receiver to sender: send me these positions when you have them.

    Attributes
    ----------
    first, last : int
        Positions asked for, half open.
    selection : tuple of LaneSelection or None
        The elected lanes; None is everything the plan has, empty is nothing: such a sender is only
        told that the request is done.
    stream_layers : bool
        The plan property of that name.
    receivers : tuple of str
        Names of all endpoints that receive this request.
    timeout_s : float
        How long the receiver will wait, from its posting.
    """

    first: Count
    last: Count
    selection: (
        Annotated[tuple[LaneSelection, ...], msgspec.Meta(max_length=MAX_SELECTION_ROWS)] | None
    )
    stream_layers: bool
    receivers: Annotated[tuple[Name, ...], msgspec.Meta(min_length=1, max_length=MAX_RECEIVERS)]
    timeout_s: Seconds

    def __post_init__(self) -> None:
        _check_range("positions", self.first, self.last)
        if not math.isfinite(self.timeout_s):
            raise ValueError(f"timeout_s {self.timeout_s} is not finite")


class Want(_Message, frozen=True, tag="WANT"):
    """Sender to receiver: this part of the request can be gathered.

    Attributes
    ----------
    first, last : int
        The part's positions, half open: the overlap of the request with one send.
    aux : bytes
        What that send carries beside its blocks.
    """

    first: Count
    last: Count
    aux: Annotated[bytes, msgspec.Meta(max_length=MAX_AUX_BYTES)]

    def __post_init__(self) -> None:
        _check_range("positions", self.first, self.last)


class Grant(_Message, frozen=True, tag="GRANT"):
    """Receiver to sender: write one chunk of a part here.

    Attributes
    ----------
    number : int
        1, 2, 3 ... within the session.
    first, last : int
        The part's positions.
    slot, slots : int
        The lease: so many adjacent receive slots from this one.
    generation : int
        The lease's; never repeats.
    """

    number: Positive
    first: Count
    last: Count
    slot: Count
    slots: Positive
    generation: Count

    def __post_init__(self) -> None:
        _check_range("positions", self.first, self.last)


class Data(_Message, frozen=True, tag="DATA"):
    """Sender to receiver, riding on the write: a chunk has landed.

    Attributes
    ----------
    number, slot, generation : int
        The grant it was written under, and that grant's lease.
    first, last : int
        The part's positions.
    wire_first, wire_last : int
        The chunk's bytes within the part's wire order, half open. They lie in the lease from byte
        `wire_first % 16` on.
    checksum : int or None
        Of the chunk's bytes in wire order, if the sender computes one.
    """

    number: Positive
    slot: Count
    generation: Count
    first: Count
    last: Count
    wire_first: Count
    wire_last: Count
    checksum: Count | None = None

    def __post_init__(self) -> None:
        _check_range("positions", self.first, self.last)
        _check_range("wire bytes", self.wire_first, self.wire_last)


class Done(_Message, frozen=True, tag="DONE"):
    """Receiver to sender: everything wanted has been scattered."""


class _Ending(_Message, frozen=True):
    outcome: Outcome
    reason: Reason

    def __post_init__(self) -> None:
        if self.outcome is Outcome.DONE:
            raise ValueError("an ending without success cannot have the outcome done")


class Fail(_Ending, frozen=True, tag="FAIL"):
    """Sender to receiver: the session ended here, and why.

    Attributes
    ----------
    outcome : Outcome
        Not done.
    reason : str
        For people.
    """


class Cancel(_Ending, frozen=True, tag="CANCEL"):
    """Receiver to sender: the receive ended without success; post nothing new.

    Attributes
    ----------
    outcome : Outcome
        Not done.
    reason : str
        For people.
    grants : int
        How many grants the session has issued.
    """

    grants: Count


class Drained(_Ending, frozen=True, tag="DRAINED"):
    """Sender to receiver: no write under these grants is in flight or will be posted.

    Attributes
    ----------
    outcome : Outcome
        How the session ended on the sender: not done.
    reason : str
        For people.
    grants : int
        The largest grant number that this holds for.
    """

    grants: Count


Message: TypeAlias = Request | Want | Grant | Data | Done | Fail | Cancel | Drained


def _check_range(what: str, first: int, last: int) -> None:
    if not first < last:
        raise ValueError(f"{what} [{first}, {last}) are empty")


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Encode a message.

    Raises
    ------
    ProtocolError
        If it is longer than `MAX_MESSAGE_BYTES`.
    """
    payload = _encoder.encode(message)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            f"{type(message).__name__} of request {message.request_id!r} takes {len(payload)} "
            f"bytes; a message may take {MAX_MESSAGE_BYTES}: ask for fewer lanes or ranks at once"
        )
    return payload


def decode(payload: bytes) -> Message:
    """Decode a message and check every bound of it.

    Raises
    ------
    ProtocolError
        If the bytes are not a message of this protocol version.
    """
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{len(payload)} bytes; a message may take {MAX_MESSAGE_BYTES}")
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not a kvpack message: {error}") from error
