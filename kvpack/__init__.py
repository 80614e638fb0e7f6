"""kvpack packs scattered KV cache blocks on the GPU and moves them between workers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpack.blocks import NO_BLOCK
    from kvpack.endpoint import Capacity, Endpoint
    from kvpack.errors import (
        BlockListError,
        ClosedError,
        CoverageError,
        EndpointError,
        IncompatibleLayoutsError,
        KvpackError,
        LayoutError,
        OptionsError,
        PeerLostError,
        ProtocolError,
        ProtocolVersionError,
        StagingError,
        TransferCancelledError,
        TransferError,
        TransferFailedError,
        TransferTimeoutError,
        TransportError,
        UnknownPeerError,
        VerificationError,
    )
    from kvpack.handles import ReceiveHandle, ReceiveResult, SendHandle, SendResult
    from kvpack.layout import CacheLayout, CacheTensor, ContextShard, Memory, Shard, declare
    from kvpack.options import Options
    from kvpack.plan import Fragments, Slice, TransferPlan, compile_plan
    from kvpack.staging import Staging
    from kvpack.verify import Party, Proof, Request, verify

__version__ = "0.1.0"

_ROOMS = {
    "kvpack.blocks": ("NO_BLOCK",),
    "kvpack.endpoint": ("Capacity", "Endpoint"),
    "kvpack.errors": (
        "BlockListError",
        "ClosedError",
        "CoverageError",
        "EndpointError",
        "IncompatibleLayoutsError",
        "KvpackError",
        "LayoutError",
        "OptionsError",
        "PeerLostError",
        "ProtocolError",
        "ProtocolVersionError",
        "StagingError",
        "TransferCancelledError",
        "TransferError",
        "TransferFailedError",
        "TransferTimeoutError",
        "TransportError",
        "UnknownPeerError",
        "VerificationError",
    ),
    "kvpack.handles": ("ReceiveHandle", "ReceiveResult", "SendHandle", "SendResult"),
    "kvpack.layout": (
        "CacheLayout",
        "CacheTensor",
        "ContextShard",
        "Memory",
        "Shard",
        "declare",
    ),
    "kvpack.options": ("Options",),
    "kvpack.plan": ("Fragments", "Slice", "TransferPlan", "compile_plan"),
    "kvpack.staging": ("Staging",),
    "kvpack.verify": ("Party", "Proof", "Request", "verify"),
}

_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    room = _HOME.get(name)
    if room is None:
        raise AttributeError(f"module 'kvpack' has no attribute {name!r}")
    value = getattr(importlib.import_module(room), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
