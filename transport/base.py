"""The interface of a transport: windows of slots, one write over adjacent slots, notifications."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from kvpack.errors import TransportError

Device = Literal["cpu", "cuda"]

_INT64_MAX = 2**63 - 1


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
