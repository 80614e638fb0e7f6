"""The transfers of an endpoint that are under way: their handles, block lists, phases and ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvpack.blocks import BlockTable
from kvpack.copies import Ready
from kvpack.errors import (
    TransferCancelledError,
    TransferError,
    TransferFailedError,
    TransferTimeoutError,
)
from kvpack.handles import ReceiveHandle, ReceiveResult, SendHandle, SendResult
from kvpack.profiling.phases import Phase
from kvpack.profiling.records import Outcome as RecordOutcome
from kvpack.protocol import Message, Outcome, ReceiveEnded, SendEnded
from kvpack.protocol.messages import Grant, Want
from kvpack.timeline import Timeline

_ENDS: dict[Outcome, tuple[RecordOutcome, type[TransferError]]] = {
    Outcome.DONE: ("done", TransferError),
    Outcome.FAILED: ("failed", TransferFailedError),
    Outcome.CANCELLED: ("cancelled", TransferCancelledError),
    Outcome.TIMED_OUT: ("timed_out", TransferTimeoutError),
}


@dataclass(eq=False, slots=True)
class Outgoing:
    """A send: under way, or ended with its blocks still in use."""

    handle: SendHandle
    blocks: BlockTable
    ready: Ready | None
    timeline: Timeline
    is_ready: bool = False


@dataclass(eq=False, slots=True)
class Incoming:
    """A receive: under way, or ended with its blocks still in use; ``peers`` are senders' keys."""

    handle: ReceiveHandle
    blocks: BlockTable
    ready: Ready | None
    timeline: Timeline
    peers: tuple[str, ...]
    is_ready: bool = False


@dataclass(eq=False)
class Transfers:
    """Sends and receives by their ids in the protocol.

    Attributes
    ----------
    outgoing, incoming : dict
        Under way.
    """

    outgoing: dict[int, Outgoing] = field(default_factory=dict)
    incoming: dict[int, Incoming] = field(default_factory=dict)
    _held_sends: dict[int, Outgoing] = field(default_factory=dict)
    _held_receives: dict[int, Incoming] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether any transfer is under way."""
        return bool(self.outgoing or self.incoming)

    def sent(self, send_id: int) -> Outgoing:
        """A send whose blocks are in use, ended or not."""
        return self.outgoing.get(send_id) or self._held_sends[send_id]

    def received(self, receive_id: int) -> Incoming:
        """A receive whose blocks are in use, ended or not."""
        return self.incoming.get(receive_id) or self._held_receives[receive_id]

    def release_source(self, send_id: int) -> None:
        """Nothing is gathered from a send's blocks any more."""
        sent = self.outgoing.get(send_id) or self._held_sends.pop(send_id)
        sent.handle.release()

    def release_destination(self, receive_id: int) -> None:
        """Nothing is scattered to a receive's blocks any more."""
        received = self.incoming.get(receive_id) or self._held_receives.pop(receive_id)
        received.handle.release()

    def mark_post(self, peer: str, message: Message, name_of: Callable[[str], str]) -> None:
        """Begin and end the phases that a message marks: asking, being granted, the wire."""
        if isinstance(message, Want):
            for sent in list(self.outgoing.values()):
                first, last = sent.blocks.first, sent.blocks.last
                is_its_part = first <= message.first and message.last <= last
                if sent.handle.request_id == message.request_id and is_its_part:
                    sent.timeline.end(Phase.QUEUE)
                    sent.timeline.end(Phase.COMPLETE)
                    sent.timeline.begin(Phase.CREDIT, credit_key(peer), name_of(peer))
        elif isinstance(message, Grant):
            for received in list(self.incoming.values()):
                if received.handle.request_id == message.request_id:
                    key = grant_key(peer, message.number)
                    received.timeline.end(Phase.QUEUE)
                    received.timeline.end(Phase.COMPLETE)
                    received.timeline.begin(Phase.WIRE, key, name_of(peer), message.number)

    def end_send(self, ended: SendEnded) -> None:
        """Finish a send's handle."""
        sent = self.outgoing.pop(ended.send_id)
        if not sent.handle.blocks_released:
            self._held_sends[ended.send_id] = sent
        outcome, error = _ENDS[ended.outcome]
        record = sent.timeline.finish(outcome, ended.reason)
        if ended.outcome is Outcome.DONE:
            sent.handle.finish(record, SendResult(record))
        else:
            words = _words("send", sent.handle.request_id, ended)
            sent.handle.finish(record, error=error(words))

    def end_receive(self, ended: ReceiveEnded, name_of: Callable[[str], str]) -> None:
        """Finish a receive's handle."""
        received = self.incoming.pop(ended.receive_id)
        if not received.handle.blocks_released:
            self._held_receives[ended.receive_id] = received
        outcome, error = _ENDS[ended.outcome]
        record = received.timeline.finish(outcome, ended.reason)
        if ended.outcome is Outcome.DONE:
            aux = {name_of(peer): b"".join(parts) for peer, parts in ended.aux.items()}
            received.handle.finish(record, ReceiveResult(record, aux))
        else:
            words = _words("receive", received.handle.request_id, ended)
            received.handle.finish(record, error=error(words))


def credit_key(peer: str) -> int:
    """Tells a peer's credit phases apart from another's."""
    return hash(peer)


def grant_key(peer: str, number: int) -> int:
    """Tells the wire phase of one grant apart from another's."""
    return hash((peer, number))


def _words(side: str, request_id: str, ended: SendEnded | ReceiveEnded) -> str:
    return f"{side} of request {request_id!r} {ended.outcome.value}: {ended.reason}"
