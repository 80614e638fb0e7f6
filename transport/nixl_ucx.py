"""NIXL over UCX: strided lists prepared once a peer, one descriptor a write, polled to its end.

What NIXL 1.5 does and this module answers, each seen in a run:

* Its progress thread spins, a whole core for each agent, and on GPUs has crashed for want of a CUDA
  context (NIXL #2102). So there is none: whoever drives the transport polls. A target that does not
  poll stalls those who connect to it.
* `make_prepped_xfer` merges adjacent slots into one descriptor, `initialize_xfer` never does.
* The notification of a write that is not done when it was posted leaves only when the writer
  polls after the write's completion.
* Releasing a handle, or removing the remote agent, does not stop a write, and after a removal NIXL
  answers NOT_FOUND to every question about it. So handles are released, and agents removed, only
  when their writes have ended.
* A peer that is removed and added again while both live costs each side a socket or two, which UCX
  frees when the agent is closed.
* A notification whose sender's name is not UTF-8 makes `get_new_notifs` raise.
* Importing it logs to stdout and turns `logging.raiseExceptions` off.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np

from kvpack.errors import TransportError
from kvpack.transport.base import Region, Window, Write
from kvpack.transport.slots import Peer, SlotTransport, lost

_MEMORY = {"cpu": "DRAM", "cuda": "VRAM"}

_DISCONNECTED = ("nixlRemoteDisconnectError", "nixlCancelledError")

_MENDS = {
    "nixlBackendError": "see UCX's message on stderr, and check UCX_TLS and UCX_NET_DEVICES",
    "nixlInvalidParamError": "NIXL refused an argument; its message is on stderr",
    "nixlMismatchError": "both sides need the same version of NIXL, and unchanged metadata",
    "nixlNotFoundError": "the memory or the peer is not registered with NIXL",
    "nixlNotAllowedError": "another agent of this name is known; give every endpoint its own name",
    "nixlNotSupportedError": "UCX cannot do this for this kind of memory",
}

_unfinished_agents: list[tuple[Any, ...]] = []
"""Agents closed with writes in flight: destroying them would free what UCX still reads."""


@functools.cache
def _import_nixl() -> ModuleType:
    """Import NIXL with its log at WARNING on stderr, whatever it does to Python's logging.

    Raises
    ------
    TransportError
        NIXL is not installed or does not load.
    """
    is_level_chosen = "NIXL_LOG_LEVEL" in os.environ
    # Read by NIXL's C++ side too, whenever its library is loaded.
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    logger = logging.getLogger("nixl")
    raise_exceptions = logging.raiseExceptions
    # While it is imported, its logger writes to stdout already, and nobody can have mended that.
    logger.addFilter(_nothing)
    try:
        nixl = importlib.import_module("nixl._api")
    except (ImportError, OSError) as error:
        raise TransportError(
            f"NIXL cannot be imported ({error}); install it with `pip install nixl`, or "
            "`pip install nixl-cu12` or `nixl-cu13` for the CUDA version of your torch"
        ) from error
    finally:
        logger.removeFilter(_nothing)
        logging.raiseExceptions = raise_exceptions
    if not is_level_chosen:
        logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
    return nixl


class NixlTransport(SlotTransport):
    """A `Transport` between processes and hosts: NIXL with its UCX backend, on CPU or CUDA memory.

    On CUDA, make it after the device's context exists, and drive it from threads in which that
    device is current.

    Parameters
    ----------
    name : str
        Name of the NIXL agent. Peers tell two incarnations of an endpoint apart by it alone.
    region : Region
        Memory to register, so that peers may write it. It must stay allocated until `close`
        returned 0.
    send : Window
        Slots within the region that `write` reads.

    Raises
    ------
    TransportError
        NIXL is missing, UCX does not start, or the memory cannot be registered.
    """

    kind = "nixl-ucx"

    def __init__(self, name: str, region: Region, send: Window) -> None:
        super().__init__(name, region, send)
        nixl = _import_nixl()
        try:
            config = nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            self._agent: Any = nixl.nixl_agent(name, config)
            if "UCX" not in self._agent.backends:
                raise TransportError(
                    "this NIXL has no UCX plugin, only "
                    f"{', '.join(self._agent.get_plugin_list())}; unset NIXL_PLUGIN_DIR or "
                    "reinstall nixl"
                )
            memory = _MEMORY[region.device]
            self._registration: Any = self._agent.register_memory(
                [(region.address, region.nbytes, region.device_index, "")], memory
            )
            self._local_list: Any = self._agent.prep_xfer_dlist("", _strided(send), memory)
        except TransportError:
            raise
        except Exception as error:
            raise _translated(error, f"opening transport {name!r} on {region}") from error
        # Every write takes two slices of this, so that none builds an index array.
        self._indices = np.arange(send.num_slots, dtype=np.int32)

    def _payload(self) -> bytes:
        try:
            return bytes(self._agent.get_agent_metadata())
        except Exception as error:
            raise _translated(error, f"describing transport {self._name!r}") from error

    def _load(self, peer: Peer, payload: bytes) -> None:
        try:
            found = self._agent.add_remote_agent(payload)
        except Exception as error:
            raise _translated(error, "adding", peer.name) from error
        loaded = found if isinstance(found, bytes) else str(found).encode()
        if loaded != peer.name.encode():
            other = loaded.decode(errors="replace")
            if other not in self._peers and other not in self._leaving:
                self._agent.remove_remote_agent(found)
            raise TransportError(
                f"the metadata given for peer {peer.name!r} is NIXL's of agent {loaded!r}; "
                "pass the peer's metadata unchanged"
            )
        try:
            peer.ticket = self._agent.prep_xfer_dlist(
                peer.name, _strided(peer.window), _MEMORY[peer.window.device]
            )
        except Exception as error:
            self._agent.remove_remote_agent(peer.name)
            raise _translated(error, f"preparing {peer.window} of", peer.name) from error
        if peer.window.num_slots > len(self._indices):
            self._indices = np.arange(peer.window.num_slots, dtype=np.int32)

    def _unload(self, peer: Peer) -> None:
        peer.ticket.release()
        peer.ticket = None
        self._agent.remove_remote_agent(peer.name)

    def _post(self, peer: Peer, write: Write, notification: bytes) -> None:
        local, remote = write.local_slot, write.remote_slot
        handle = None
        try:
            handle = self._agent.make_prepped_xfer(
                "WRITE",
                self._local_list,
                self._indices[local : local + write.slots],
                peer.ticket,
                self._indices[remote : remote + write.slots],
                notification,
            )
            _check_state(self._agent.transfer(handle))
        except Exception as error:
            if handle is not None:
                handle.release()
            raise _translated(error, "writing to", peer.name) from error
        write.ticket = handle

    def _test(self, write: Write) -> bool:
        try:
            if _check_state(self._agent.check_xfer_state(write.ticket)) == "PROC":
                return False
        except Exception as error:
            write.ticket.release()
            write.ticket = None
            raise _translated(error, "writing to", write.peer) from error
        write.ticket.release()
        write.ticket = None
        return True

    def _notify(self, peer: Peer, message: bytes) -> None:
        try:
            self._agent.send_notif(peer.name, message)
        except Exception as error:
            raise _translated(error, "notifying", peer.name) from error

    def _take_notifications(self) -> list[tuple[str, bytes]]:
        try:
            arrived = self._agent.get_new_notifs()
        except UnicodeDecodeError:
            # The batch is gone; a sender without a readable name is no peer of kvpack.
            self._dropped_notifications += 1
            return []
        except Exception as error:
            raise _translated(error, f"taking notifications of transport {self._name!r}") from error
        return [(sender, message) for sender, batch in arrived.items() for message in batch]

    def _close(self, unfinished: int) -> None:
        if unfinished:
            _unfinished_agents.append((self._agent, self._local_list, self._in_flight, self._peers))
            return
        for peer in self._peers.values():
            self._unload(peer)
        self._local_list.release()
        self._agent.deregister_memory(self._registration)
        # Handles refer to the agent too; it closes its connections when nothing does any more.
        del self._local_list, self._registration, self._agent


def _strided(window: Window) -> Any:
    """Describe all slots of a window in one row: address, bytes, device, stride, count."""
    return np.array(
        [
            [
                window.address,
                window.slot_bytes,
                window.device_index,
                window.slot_bytes,
                window.num_slots,
            ]
        ],
        dtype=np.int64,
    )


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _check_state(state: str) -> str:
    if state == "ERR":
        raise RuntimeError("NIXL reports an error without saying which")
    return state


def _translated(error: Exception, doing: str, peer: str | None = None) -> TransportError:
    """Turn one of NIXL's unrelated exceptions into one of ours."""
    kind = type(error).__name__
    reason = f"{kind}: {error}" if str(error) else kind
    if peer is not None and kind in _DISCONNECTED:
        return lost(peer, doing, reason)
    what = doing if peer is None else f"{doing} peer {peer!r}"
    mend = _MENDS.get(kind, "NIXL's message on stderr may say more")
    return TransportError(f"{what} failed: {reason}; {mend}")
