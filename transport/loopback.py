"""Loopback: transports of one process that write each other's windows with plain copies."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

from kvpack.errors import TransportError
from kvpack.transport.base import Region, Window, Write
from kvpack.transport.slots import Peer, SlotTransport, lost

_open_lock = threading.Lock()
_open: weakref.WeakValueDictionary[str, LoopbackTransport] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class _Pending:
    target: LoopbackTransport
    window: Window
    notification: bytes


class LoopbackTransport(SlotTransport):
    """A `Transport` to others of its kind in this process, on CPU and CUDA memory.

    As over a network, a write moves nothing when it is posted: its bytes move while its writer
    polls, and its notification leaves once they are there.

    Parameters
    ----------
    name : str
        Unique among the open loopback transports of the process.
    region : Region
        Memory that peers may write.
    send : Window
        Slots within the region that `write` reads.

    Raises
    ------
    TransportError
        The name is taken, or the window lies outside the region.
    """

    kind = "loopback"

    def __init__(self, name: str, region: Region, send: Window) -> None:
        super().__init__(name, region, send)
        self._inbox: deque[tuple[str, bytes]] = deque()
        # Held while a peer copies into this region, so that closing waits for the copy's end.
        self._memory = threading.Lock()
        self._is_open = True
        self._stream: Any = None
        with _open_lock:
            if name in _open:
                raise TransportError(
                    f"a loopback transport named {name!r} is open in this process; close it, "
                    "or take another name"
                )
            _open[name] = self

    def _payload(self) -> bytes:
        return b""

    def _load(self, peer: Peer, payload: bytes) -> None:
        with _open_lock:
            target = _open.get(peer.name)
        if target is None:
            raise TransportError(
                f"no loopback transport named {peer.name!r} is open in this process; "
                "between processes use the NIXL transport"
            )
        region, window = target._region, peer.window
        inside = region.address <= window.address and (
            window.address + window.nbytes <= region.address + region.nbytes
        )
        if not inside or window.device != region.device:
            raise TransportError(f"peer {peer.name!r} registered {region}, not {window}")
        peer.ticket = target

    def _unload(self, peer: Peer) -> None:
        peer.ticket = None

    def _post(self, peer: Peer, write: Write, notification: bytes) -> None:
        target: LoopbackTransport = peer.ticket
        if not target._is_open:
            raise lost(peer.name, "writing to", "it is closed")
        write.ticket = _Pending(target, peer.window, notification)

    def _test(self, write: Write) -> bool:
        pending: _Pending = write.ticket
        target = pending.target
        with target._memory:
            if not target._is_open:
                raise lost(write.peer, "writing to", "it was closed")
            self._copy(write, pending.window)
        if pending.notification:
            target._inbox.append((self._name, pending.notification))
        write.ticket = None
        return True

    def _copy(self, write: Write, window: Window) -> None:
        source = self._send.slot_address(write.local_slot)
        destination = window.slot_address(write.remote_slot)
        nbytes = write.slots * window.slot_bytes
        if self._send.device == window.device == "cpu":
            ctypes.memmove(destination, source, nbytes)
            return
        import torch  # only CUDA memory needs it

        if self._stream is None:
            cuda: Any = torch.cuda  # its Stream is untyped
            window_on_gpu = self._send if self._send.device == "cuda" else window
            self._stream = cuda.Stream(device=window_on_gpu.device_index)
        with torch.cuda.stream(self._stream):
            _tensor(destination, nbytes, window).copy_(
                _tensor(source, nbytes, self._send), non_blocking=True
            )
        # Waited for here, under the target's lock, so that the target cannot close and free its
        # memory under a running copy.
        self._stream.synchronize()

    def _notify(self, peer: Peer, message: bytes) -> None:
        target: LoopbackTransport = peer.ticket
        if not target._is_open:
            raise lost(peer.name, "notifying", "it is closed")
        target._inbox.append((self._name, message))

    def _take_notifications(self) -> list[tuple[str, bytes]]:
        return [self._inbox.popleft() for _ in range(len(self._inbox))]

    def _close(self, unfinished: int) -> None:
        with _open_lock:
            _open.pop(self._name, None)
        with self._memory:
            self._is_open = False


def _tensor(address: int, nbytes: int, window: Window) -> Any:
    """View raw memory of a window's device as a uint8 tensor."""
    import torch

    if window.device == "cpu":
        return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)

    class _Memory:
        __cuda_array_interface__ = {  # noqa: RUF012 - read once, by torch, of this one object
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }

    return torch.as_tensor(_Memory(), device=f"cuda:{window.device_index}")
