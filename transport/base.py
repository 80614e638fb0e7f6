"""What every transport does: windows of slots, one write over adjacent slots, notifications."""

from __future__ import annotations

import os
import threading
import time
import zlib
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec

from kvpack.errors import ClosedError, PeerLostError, TransportError

Device = Literal["cpu", "cuda"]

_INT64_MAX = 2**63 - 1
_BACKOFF_S = 100e-6


@dataclass(frozen=True)
class Region:
    """Contiguous memory that a transport registers, once.

    Attributes
    ----------
    address : int
        First byte, as an address of this process.
    nbytes : int
        Length in bytes.
    device : {"cpu", "cuda"}
        Kind of memory.
    device_index : int
        Index of the CUDA device as its own process counts them; 0 for ``"cpu"``.
    """

    address: int
    nbytes: int
    device: Device = "cpu"
    device_index: int = 0

    def __post_init__(self) -> None:
        _check_memory(self.address, self.nbytes, self.device, self.device_index)


@dataclass(frozen=True)
class Window:
    """Adjacent slots of equal size: my send pool, or a peer's receive pool.

    Attributes
    ----------
    address : int
        First byte of slot 0, as an address of the process that owns the slots.
    slot_bytes : int
        Bytes a slot; both ends of a write must agree on it.
    num_slots : int
        Number of slots.
    device : {"cpu", "cuda"}
        Kind of memory.
    device_index : int
        Index of the CUDA device as its own process counts them; 0 for ``"cpu"``.
    """

    address: int
    slot_bytes: int
    num_slots: int
    device: Device = "cpu"
    device_index: int = 0

    def __post_init__(self) -> None:
        if self.slot_bytes < 1 or self.num_slots < 1:
            raise TransportError(
                f"a window of {self.num_slots} slots of {self.slot_bytes} bytes holds nothing; "
                "give it at least one slot of one byte"
            )
        _check_memory(self.address, self.nbytes, self.device, self.device_index)

    @property
    def nbytes(self) -> int:
        """Length of the window in bytes."""
        return self.slot_bytes * self.num_slots

    def slot_address(self, slot: int) -> int:
        """Address of the first byte of a slot."""
        return self.address + slot * self.slot_bytes

    def check_run(self, slot: int, slots: int, where: str) -> None:
        """Refuse a run of slots that is empty or leaves the window.

        Parameters
        ----------
        slot, slots : int
            First slot of the run, and how many slots it has.
        where : str
            What the window is, for the message.

        Raises
        ------
        TransportError
            The run does not lie within the window.
        """
        if slots < 1 or slot < 0 or slot + slots > self.num_slots:
            raise TransportError(
                f"a run of {slots} slots from slot {slot} on does not lie within the "
                f"{self.num_slots} slots of {where}; write 1 to {self.num_slots} slots, "
                f"the last of them at most slot {self.num_slots - 1}"
            )


@dataclass(eq=False)
class Write:
    """One posted write, to be given to `Transport.poll` until that is True or raises.

    Attributes
    ----------
    peer : str
        Name of the peer that is written to.
    local_slot, remote_slot, slots : int
        First slot here, first slot there, and how many slots are written.
    done : bool
        True once the bytes are at the peer and the notification is on its way.
    error : TransportError or None
        Why the write failed, if it did.
    """

    peer: str
    local_slot: int
    remote_slot: int
    slots: int
    done: bool = False
    error: TransportError | None = None
    ticket: Any = field(default=None, repr=False)


class Transport(Protocol):
    """Moves bytes from one's own send window to the windows of peers, and short messages.

    A transport is made with its name, its region and its send window, and is bound to the process
    that made it. It may be handed from thread to thread, but two threads must never be inside it at
    once, and whoever drives it must keep calling `poll` or `notifications`: nothing of its own
    makes progress in between, incoming writes and connections included.
    """

    @property
    def name(self) -> str:
        """Name under which peers add this transport: endpoint, ``"@"``, incarnation."""

    @property
    def metadata(self) -> bytes:
        """What a peer needs for `add_peer`; opaque."""

    @property
    def dropped_notifications(self) -> int:
        """How many times arrived notifications could not be read and were dropped."""

    def add_peer(self, peer: str, blob: bytes, window: Window) -> None:
        """Make a peer known, so that its window can be written.

        Parameters
        ----------
        peer : str
            The peer's `name`.
        blob : bytes
            The peer's `metadata`.
        window : Window
            The peer's slots, within the region that it registered.

        Raises
        ------
        TransportError
            The blob is damaged, is another peer's or another transport's; the window is not within
            the peer's registered memory or has other slots than this side; the peer is known
            already, or is this transport itself. Nothing of the peer is kept.
        """

    def remove_peer(self, peer: str) -> None:
        """Forget a peer: from now on nothing is written to it or sent to it.

        Writes in flight go on, since no transport can call them back: they are still to be polled,
        and what is kept for them is released when the last has ended. Removal does not stop the
        peer from writing into this side. Unknown peers are ignored.
        """

    def write(
        self, peer: str, local_slot: int, remote_slot: int, slots: int, notification: bytes
    ) -> Write:
        """Post one write of adjacent slots; never waits for it.

        Parameters
        ----------
        peer : str
            A peer that was added.
        local_slot, remote_slot : int
            First slot in this transport's send window, and in the peer's window.
        slots : int
            How many slots, at least 1. The local ones must not change until the write has ended.
        notification : bytes
            Delivered to the peer after the bytes are visible there; empty for none.

        Raises
        ------
        TransportError
            The peer is unknown or the slots are out of range; nothing was posted.
        PeerLostError
            The connection to the peer is broken; nothing was posted.
        """

    def poll(self, write: Write) -> bool:
        """Drive a write, and tell whether it is done.

        The notification leaves at the latest during the poll that returns True; a writer that does
        not poll may never notify.

        Raises
        ------
        PeerLostError, TransportError
            The write failed; every later poll of it raises the same.
        """

    def notify(self, peer: str, message: bytes) -> None:
        """Send a message to a peer; it may overtake writes and other messages.

        Raises
        ------
        PeerLostError, TransportError
            The connection to the peer is broken, or the peer is unknown.
        """

    def notifications(self) -> list[tuple[str, bytes]]:
        """Take the messages that arrived: pairs of sender's name and bytes.

        The name is what the sender claims and proves nothing; peers never added here appear too.
        Drives progress. What a peer sent never raises.
        """

    def close(self, timeout_s: float = 5.0) -> int:
        """End the transport, after waiting for its writes in flight; a second call does nothing.

        A message sent to a peer that had not finished connecting is lost.

        Parameters
        ----------
        timeout_s : float
            How long to wait at most.

        Returns
        -------
        int
            Writes that had not ended. Unless 0, the region stays registered and its memory has to
            stay allocated until the process ends.
        """


@dataclass
class Peer:
    """What a transport keeps of a peer; `ticket` is the implementation's own."""

    name: str
    window: Window
    ticket: Any = None
    in_flight: int = 0


class Gate:
    """Lets one thread at a time through, in the process that made it, until it is shut."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._pid = os.getpid()
        self._shut = False
        self._lock = threading.Lock()

    @property
    def is_shut(self) -> bool:
        """Whether the owner was closed."""
        return self._shut

    def shut(self) -> None:
        """Let nobody through any more."""
        self._shut = True

    def check_process(self) -> None:
        """Refuse a forked child.

        Raises
        ------
        ClosedError
            This is not the process that made the gate.
        """
        if os.getpid() != self._pid:
            raise ClosedError(
                f"{self._owner} belongs to process {self._pid} and cannot be used in "
                f"its forked child {os.getpid()}; open another one there, or start with spawn"
            )

    def __enter__(self) -> None:
        self.check_process()
        if not self._lock.acquire(blocking=False):
            raise TransportError(
                f"two threads are inside {self._owner} at once; one thread at a time may drive it"
            )
        if self._shut:
            self._lock.release()
            raise ClosedError(f"{self._owner} is closed")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


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


def _check_memory(address: int, nbytes: int, device: str, device_index: int) -> None:
    if address < 1 or nbytes < 1 or address + nbytes > _INT64_MAX:
        raise TransportError(
            f"{nbytes} bytes at address {address} are no memory: both must be positive and end "
            f"below {_INT64_MAX}"
        )
    if device not in ("cpu", "cuda"):
        raise TransportError(f"device {device!r} is neither 'cpu' nor 'cuda'")
    if device_index < 0 or (device == "cpu" and device_index != 0):
        raise TransportError(
            f"device index {device_index} of {device!r}: must be 0 for 'cpu' and not negative"
        )
