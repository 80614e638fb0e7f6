"""kvpack packs scattered KV cache blocks on the GPU and moves them between workers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpack.blocks import (
        NO_BLOCK as NO_BLOCK,
    )
    from kvpack.endpoint import (
        Capacity as Capacity,
    )
    from kvpack.endpoint import (
        Endpoint as Endpoint,
    )
    from kvpack.errors import (
        BlockListError as BlockListError,
    )
    from kvpack.errors import (
        ClosedError as ClosedError,
    )
    from kvpack.errors import (
        CoverageError as CoverageError,
    )
    from kvpack.errors import (
        EndpointError as EndpointError,
    )
    from kvpack.errors import (
        IncompatibleLayoutsError as IncompatibleLayoutsError,
    )
    from kvpack.errors import (
        KvpackError as KvpackError,
    )
    from kvpack.errors import (
        LayoutError as LayoutError,
    )
    from kvpack.errors import (
        OptionsError as OptionsError,
    )
    from kvpack.errors import (
        PeerLostError as PeerLostError,
    )
    from kvpack.errors import (
        ProtocolError as ProtocolError,
    )
    from kvpack.errors import (
        ProtocolVersionError as ProtocolVersionError,
    )
    from kvpack.errors import (
        StagingError as StagingError,
    )
    from kvpack.errors import (
        TransferCancelledError as TransferCancelledError,
    )
    from kvpack.errors import (
        TransferError as TransferError,
    )
    from kvpack.errors import (
        TransferFailedError as TransferFailedError,
    )
    from kvpack.errors import (
        TransferTimeoutError as TransferTimeoutError,
    )
    from kvpack.errors import (
        TransportError as TransportError,
    )
    from kvpack.errors import (
        UnknownPeerError as UnknownPeerError,
    )
    from kvpack.errors import (
        VerificationError as VerificationError,
    )
    from kvpack.handles import (
        ReceiveHandle as ReceiveHandle,
    )
    from kvpack.handles import (
        ReceiveResult as ReceiveResult,
    )
    from kvpack.handles import (
        SendHandle as SendHandle,
    )
    from kvpack.handles import (
        SendResult as SendResult,
    )
    from kvpack.layout import (
        CacheLayout as CacheLayout,
    )
    from kvpack.layout import (
        CacheTensor as CacheTensor,
    )
    from kvpack.layout import (
        ContextShard as ContextShard,
    )
    from kvpack.layout import (
        Memory as Memory,
    )
    from kvpack.layout import (
        Shard as Shard,
    )
    from kvpack.layout import (
        declare as declare,
    )
    from kvpack.options import (
        Options as Options,
    )
    from kvpack.plan import (
        Fragments as Fragments,
    )
    from kvpack.plan import (
        Slice as Slice,
    )
    from kvpack.plan import (
        TransferPlan as TransferPlan,
    )
    from kvpack.plan import (
        compile_plan as compile_plan,
    )
    from kvpack.staging import (
        Staging as Staging,
    )
    from kvpack.verify import (
        Party as Party,
    )
    from kvpack.verify import (
        Proof as Proof,
    )
    from kvpack.verify import (
        Request as Request,
    )
    from kvpack.verify import (
        verify as verify,
    )

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
