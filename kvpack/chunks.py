"""Chunks under way: gathers, writes and scatters, started when asked for, polled to their end."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvpack.copies import Copier, Copy
from kvpack.errors import PeerLostError, TransportError
from kvpack.links import PartWire
from kvpack.profiling.phases import Phase
from kvpack.protocol import (
    Action,
    IncomingChunk,
    OutgoingChunk,
    Receiver,
    Sender,
    Write,
    encode,
)
from kvpack.protocol.messages import Data
from kvpack.timeline import Timeline
from kvpack.transfers import Transfers, credit_key, grant_key
from kvpack.transport import Transport, Write as PostedWrite
from kvpack.wire import chunk_origin

_logger = logging.getLogger(__name__)


class Chunks:
    """Copies and writes in flight. Every method is the turning thread's.

    Parameters
    ----------
    transport : Transport
        Posts writes.
    copier : Copier
        Runs copies.
    sender, receiver : Sender, Receiver
        Told of every end.
    transfers : Transfers
        Block lists and timelines.
    slot_bytes : int
        Bytes of a staging slot.
    tell : callable
        Calls a state machine's method under the lock, queues the actions it returns, and returns
        them.
    name_of, lose : callable
        A peer's name; and what to do when its connection broke.
    """

    def __init__(
        self,
        transport: Transport,
        copier: Copier,
        sender: Sender,
        receiver: Receiver,
        transfers: Transfers,
        *,
        slot_bytes: int,
        tell: Callable[[Callable[[], list[Action]]], list[Action]],
        name_of: Callable[[str], str],
        lose: Callable[[str, str], None],
    ) -> None:
        self._transport = transport
        self._copier = copier
        self._sender = sender
        self._receiver = receiver
        self._transfers = transfers
        self._slot_bytes = slot_bytes
        self._tell = tell
        self._name_of = name_of
        self._lose = lose
        # Kept from gather to the write's end: a send may end before this side sees its last write
        # end, for its receivers may have said so already.
        self._timelines: dict[int, Timeline] = {}
        self._gathers: list[tuple[OutgoingChunk, Copy]] = []
        self._writes: list[tuple[OutgoingChunk, PostedWrite]] = []
        self._scatters: list[tuple[IncomingChunk, Copy]] = []

    @property
    def is_busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self._gathers or self._writes or self._scatters)

    def gather(self, chunk: OutgoingChunk) -> None:
        """Start to pack a chunk."""
        sent = self._transfers.sent(chunk.send_id)
        timeline, part = sent.timeline, _part(chunk)
        self._timelines[chunk.chunk_id] = timeline
        timeline.end(Phase.QUEUE)
        timeline.end(Phase.CREDIT, credit_key(chunk.peer))
        name, nbytes = self._name_of(chunk.peer), chunk.wire_last - chunk.wire_first
        try:
            with timeline.within(Phase.PREPARE, name, chunk.number, nbytes):
                spans = part.spans(chunk.wire_first, chunk.wire_last, sent.blocks.offsets)
            with timeline.within(self._launch(Phase.GATHER), name, chunk.number, nbytes):
                copy = self._copier.gather(
                    part.table, spans, sent.blocks.ids, chunk.run.slot, chunk.run.slots
                )
        except Exception as error:  # whatever it is, only this transfer may fail of it
            self._gather_failed(chunk, error)
            return
        timeline.begin(Phase.GATHER, chunk.chunk_id, name, chunk.number, nbytes)
        if chunk.wire_last < part.total_bytes:
            timeline.begin(Phase.CREDIT, credit_key(chunk.peer), name)
        timeline.chunk_begins(nbytes, _fragments(chunk, part), name)
        self._gathers.append((chunk, copy))

    def write(self, chunk: OutgoingChunk, message: Data) -> None:
        """Post a gathered chunk's write."""
        timeline = self._timelines[chunk.chunk_id]
        name, nbytes = self._name_of(chunk.peer), chunk.wire_last - chunk.wire_first
        slots = -(-(chunk.wire_last - chunk_origin(chunk.wire_first)) // self._slot_bytes)
        try:
            with timeline.within(Phase.POST, name, chunk.number, nbytes):
                write = self._transport.write(
                    chunk.peer, chunk.run.slot, chunk.lease.slot, slots, encode(message)
                )
        except TransportError as error:
            self._write_failed(chunk, error)
            return
        timeline.begin(Phase.WIRE, chunk.chunk_id, name, chunk.number, nbytes)
        self._writes.append((chunk, write))

    def scatter(self, chunk: IncomingChunk) -> None:
        """Start to unpack a landed chunk."""
        received = self._transfers.received(chunk.receive_id)
        timeline, part = received.timeline, _part(chunk)
        timeline.end(Phase.WIRE, grant_key(chunk.peer, chunk.number))
        name, nbytes = self._name_of(chunk.peer), chunk.wire_last - chunk.wire_first
        try:
            with timeline.within(Phase.PREPARE, name, chunk.number, nbytes):
                spans = part.spans(chunk.wire_first, chunk.wire_last, received.blocks.offsets)
            with timeline.within(self._launch(Phase.SCATTER), name, chunk.number, nbytes):
                copy = self._copier.scatter(
                    part.table, spans, received.blocks.ids, chunk.run.slot, chunk.run.slots
                )
        except Exception as error:  # whatever it is, only this transfer may fail of it
            self._scatter_failed(chunk, error)
            return
        timeline.begin(Phase.SCATTER, chunk.chunk_id, name, chunk.number, nbytes)
        timeline.chunk_begins(nbytes, _fragments(chunk, part), name)
        self._scatters.append((chunk, copy))

    def poll(self) -> bool:
        """Take note of what is over; tells whether anything was."""
        before = len(self._gathers) + len(self._writes) + len(self._scatters)
        self._gathers = [entry for entry in self._gathers if not self._is_gathered(*entry)]
        self._writes = [entry for entry in self._writes if not self._is_written(*entry)]
        self._scatters = [entry for entry in self._scatters if not self._is_scattered(*entry)]
        return len(self._gathers) + len(self._writes) + len(self._scatters) < before

    def _is_gathered(self, chunk: OutgoingChunk, copy: Copy) -> bool:
        try:
            if not copy.is_over():
                return False
        except Exception as error:  # what a device reports has no class of its own
            self._gather_failed(chunk, error)
            return True
        self._close(self._timelines[chunk.chunk_id], Phase.GATHER, chunk, copy)
        asked = self._tell(lambda: self._sender.gathered(chunk.chunk_id))
        if not any(isinstance(action, Write) and action.chunk is chunk for action in asked):
            del self._timelines[chunk.chunk_id]  # its session is over: it will not be written
        return True

    def _is_written(self, chunk: OutgoingChunk, write: PostedWrite) -> bool:
        try:
            if not self._transport.poll(write):
                return False
        except TransportError as error:
            self._write_failed(chunk, error)
            return True
        timeline = self._timelines.pop(chunk.chunk_id)
        timeline.end(Phase.WIRE, chunk.chunk_id)
        timeline.chunk_ends()
        self._tell(lambda: self._sender.written(chunk.chunk_id))
        return True

    def _is_scattered(self, chunk: IncomingChunk, copy: Copy) -> bool:
        try:
            if not copy.is_over():
                return False
        except Exception as error:  # what a device reports has no class of its own
            self._scatter_failed(chunk, error)
            return True
        timeline = self._transfers.received(chunk.receive_id).timeline
        self._close(timeline, Phase.SCATTER, chunk, copy)
        timeline.chunk_ends()
        self._tell(lambda: self._receiver.scattered(chunk.chunk_id))
        return True

    def _launch(self, copy: Phase) -> Phase:
        """What the call that starts a copy counts as: host work on a GPU, else the copy itself."""
        return Phase.PREPARE if self._copier.is_asynchronous else copy

    def _close(
        self, timeline: Timeline, phase: Phase, chunk: OutgoingChunk | IncomingChunk, copy: Copy
    ) -> None:
        timeline.end(phase, chunk.chunk_id)
        if copy.device_ms is not None:
            timeline.builder.add_device_ms(phase, copy.device_ms)
        self._copier.retire(copy)

    def _gather_failed(self, chunk: OutgoingChunk, error: Exception) -> None:
        _logger.error("request %r: gather failed: %r", chunk.request_id, error)
        del self._timelines[chunk.chunk_id]
        self._tell(lambda: self._sender.chunk_failed(chunk.chunk_id, f"gather failed: {error}"))

    def _write_failed(self, chunk: OutgoingChunk, error: TransportError) -> None:
        del self._timelines[chunk.chunk_id]
        self._tell(lambda: self._sender.chunk_failed(chunk.chunk_id, str(error)))
        if isinstance(error, PeerLostError):
            self._lose(chunk.peer, str(error))

    def _scatter_failed(self, chunk: IncomingChunk, error: Exception) -> None:
        _logger.error("request %r: scatter failed: %r", chunk.request_id, error)
        self._tell(lambda: self._receiver.scatter_failed(chunk.chunk_id, str(error)))


def _part(chunk: OutgoingChunk | IncomingChunk) -> PartWire:
    part = chunk.wire
    assert isinstance(part, PartWire)
    return part


def _fragments(chunk: OutgoingChunk | IncomingChunk, part: PartWire) -> int:
    """Fragments of the whole part, counted once, with its first chunk."""
    return part.wire.fragments if chunk.wire_first == 0 else 0
