"""What every transport does however its bytes travel: checks, peers, writes, metadata."""

from __future__ import annotations

import time
import zlib
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from kvpack.errors import PeerLostError, TransportError
from kvpack.transport.base import Region, Window, Write
from kvpack.transport.gate import Gate

_BACKOFF_S = 100e-6


@dataclass
class Peer:
    """What a transport keeps of a peer; `ticket` is the implementation's own."""

    name: str
    window: Window
    ticket: Any = None
    in_flight: int = 0


class SlotTransport(ABC):
    """The part of a `Transport` that does not depend on how bytes travel.

    Checks arguments, keeps peers and writes, and sees to it that a peer is let go only when its
    last write has ended. An implementation moves the bytes.
    """

    kind: str
    """Name of the way of transport, in metadata and messages."""

    def __init__(self, name: str, region: Region, send: Window) -> None:
        if not name:
            raise TransportError("a transport needs a name that no other one has")
        inside = region.address <= send.address and (
            send.address + send.nbytes <= region.address + region.nbytes
        )
        same_memory = (send.device, send.device_index) == (region.device, region.device_index)
        if not inside or not same_memory:
            raise TransportError(f"the send window {send} does not lie within {region}")
        self._name = name
        self._region = region
        self._send = send
        self._gate = Gate(f"transport {name!r}")
        self._peers: dict[str, Peer] = {}
        self._leaving: dict[str, Peer] = {}
        self._in_flight: dict[Write, Peer] = {}
        self._dropped_notifications = 0
        self._unfinished = 0

    @property
    def name(self) -> str:
        """See `Transport.name`."""
        return self._name

    @property
    def metadata(self) -> bytes:
        """See `Transport.metadata`."""
        with self._gate:
            return encode_metadata(self.kind, self._name, self._payload())

    @property
    def dropped_notifications(self) -> int:
        """See `Transport.dropped_notifications`."""
        return self._dropped_notifications

    def add_peer(self, peer: str, blob: bytes, window: Window) -> None:
        """See `Transport.add_peer`."""
        with self._gate:
            if peer == self._name:
                raise TransportError(f"transport {peer!r} cannot be its own peer")
            if peer in self._peers:
                raise TransportError(f"peer {peer!r} is known already; remove it first")
            if peer in self._leaving:
                raise TransportError(
                    f"peer {peer!r} was removed, but {self._leaving[peer].in_flight} writes to it "
                    "have not ended; poll them to their end before adding it again"
                )
            if window.slot_bytes != self._send.slot_bytes:
                raise TransportError(
                    f"peer {peer!r} has slots of {window.slot_bytes} bytes and this side of "
                    f"{self._send.slot_bytes}; give both the same slot size"
                )
            entry = Peer(peer, window)
            self._load(entry, decode_metadata(self.kind, peer, blob))
            self._peers[peer] = entry

    def remove_peer(self, peer: str) -> None:
        """See `Transport.remove_peer`."""
        with self._gate:
            entry = self._peers.pop(peer, None)
            if entry is None:
                return
            if entry.in_flight:
                self._leaving[peer] = entry
            else:
                self._unload(entry)

    def write(
        self, peer: str, local_slot: int, remote_slot: int, slots: int, notification: bytes
    ) -> Write:
        """See `Transport.write`."""
        with self._gate:
            entry = self._known(peer)
            self._send.check_run(local_slot, slots, f"{self._name!r}'s send window")
            entry.window.check_run(remote_slot, slots, f"peer {peer!r}'s window")
            write = Write(peer, local_slot, remote_slot, slots)
            self._post(entry, write, notification)
            self._in_flight[write] = entry
            entry.in_flight += 1
            return write

    def poll(self, write: Write) -> bool:
        """See `Transport.poll`."""
        with self._gate:
            return self._advance(write)

    def notify(self, peer: str, message: bytes) -> None:
        """See `Transport.notify`."""
        with self._gate:
            self._notify(self._known(peer), message)

    def notifications(self) -> list[tuple[str, bytes]]:
        """See `Transport.notifications`."""
        with self._gate:
            return self._take_notifications()

    def close(self, timeout_s: float = 5.0) -> int:
        """See `Transport.close`."""
        self._gate.check_process()
        if self._gate.is_shut:
            return self._unfinished
        with self._gate:
            deadline = time.monotonic() + timeout_s
            while self._in_flight:
                for write in tuple(self._in_flight):
                    with suppress(TransportError):
                        self._advance(write)
                if not self._in_flight or time.monotonic() >= deadline:
                    break
                time.sleep(_BACKOFF_S)
            self._unfinished = len(self._in_flight)
            self._gate.shut()
            self._close(self._unfinished)
            self._peers.clear()
            return self._unfinished

    def _known(self, peer: str) -> Peer:
        entry = self._peers.get(peer)
        if entry is None:
            raise TransportError(
                f"peer {peer!r} is not known to transport {self._name!r}; add it first "
                "(a restarted peer has another name)"
            )
        return entry

    def _advance(self, write: Write) -> bool:
        if write.error is not None:
            raise write.error
        if write.done:
            return True
        try:
            write.done = self._test(write)
        except TransportError as error:
            write.error = error
            raise
        finally:
            if write.done or write.error is not None:
                self._retire(write)
        return write.done

    def _retire(self, write: Write) -> None:
        entry = self._in_flight.pop(write)
        entry.in_flight -= 1
        if entry.in_flight == 0 and self._leaving.get(entry.name) is entry:
            del self._leaving[entry.name]
            self._unload(entry)

    @abstractmethod
    def _payload(self) -> bytes:
        """Give what the peers' `_load` needs."""

    @abstractmethod
    def _load(self, peer: Peer, payload: bytes) -> None:
        """Make a peer's window writable; leave nothing behind when raising TransportError."""

    @abstractmethod
    def _unload(self, peer: Peer) -> None:
        """Let go of a peer that has no write in flight; never raises."""

    @abstractmethod
    def _post(self, peer: Peer, write: Write, notification: bytes) -> None:
        """Post a write whose slots were checked; raise only if nothing was posted."""

    @abstractmethod
    def _test(self, write: Write) -> bool:
        """Drive a write that has not ended; raise TransportError only when it has."""

    @abstractmethod
    def _notify(self, peer: Peer, message: bytes) -> None: ...

    @abstractmethod
    def _take_notifications(self) -> list[tuple[str, bytes]]: ...

    @abstractmethod
    def _close(self, unfinished: int) -> None:
        """Release everything, except what unfinished writes may still touch."""


class _Metadata(msgspec.Struct, array_like=True, frozen=True):
    kind: str
    name: str
    checksum: int
    payload: bytes


_decoder = msgspec.msgpack.Decoder(_Metadata)


def encode_metadata(kind: str, name: str, payload: bytes) -> bytes:
    """Wrap a transport's payload so that a peer can tell whose it is and that it is whole."""
    return msgspec.msgpack.encode(_Metadata(kind, name, zlib.crc32(payload), payload))


def decode_metadata(kind: str, name: str, blob: bytes) -> bytes:
    """Unwrap a payload that must be of one kind and one name.

    The checksum is there because UCX trusts the addresses it is given: a damaged one costs a
    connection attempt to wherever it happens to point.

    Raises
    ------
    TransportError
        The blob is damaged, or of another kind or name.
    """
    try:
        found = _decoder.decode(blob)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TransportError(
            f"the metadata given for peer {name!r} ({len(blob)} bytes) is not a transport's: "
            f"{error}; pass the peer's metadata unchanged"
        ) from error
    if found.checksum != zlib.crc32(found.payload):
        raise TransportError(
            f"the metadata given for peer {name!r} is damaged (checksum {found.checksum:#x}, "
            f"found {zlib.crc32(found.payload):#x}); pass the peer's metadata unchanged"
        )
    if found.kind != kind:
        raise TransportError(
            f"peer {name!r} uses transport {found.kind!r} and this side {kind!r}; "
            "open both endpoints with the same transport"
        )
    if found.name != name:
        raise TransportError(
            f"the metadata given for peer {name!r} is that of {found.name!r}; "
            "a restarted peer has new metadata and a new name"
        )
    return found.payload


def lost(peer: str, doing: str, reason: str) -> PeerLostError:
    """Describe a broken connection."""
    return PeerLostError(
        f"{doing} peer {peer!r} failed: {reason}; its process has ended or cannot be reached. "
        "Remove the peer, and connect again when it is back"
    )
