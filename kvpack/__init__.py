"""kvpack packs scattered KV cache blocks on the GPU and moves them between workers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpack.blocks import (
        NO_BLOCK as NO_BLOCK,
        kernel_blocks as kernel_blocks,
    )
    from kvpack.endpoint import (
        Capacity as Capacity,
        Endpoint as Endpoint,
    )
    from kvpack.errors import (
        BlockListError as BlockListError,
        ClosedError as ClosedError,
        CoverageError as CoverageError,
        EndpointError as EndpointError,
        IncompatibleLayoutsError as IncompatibleLayoutsError,
        KvpackError as KvpackError,
        LayoutError as LayoutError,
        OptionsError as OptionsError,
        PeerLostError as PeerLostError,
        ProtocolError as ProtocolError,
        ProtocolVersionError as ProtocolVersionError,
        StagingError as StagingError,
        TransferCancelledError as TransferCancelledError,
        TransferError as TransferError,
        TransferFailedError as TransferFailedError,
        TransferTimeoutError as TransferTimeoutError,
        TransportError as TransportError,
        UnknownPeerError as UnknownPeerError,
        VerificationError as VerificationError,
    )
    from kvpack.explanation import (
        Explanation as Explanation,
        explain_topology as explain_topology,
    )
    from kvpack.fragments import (
        Fragments as Fragments,
    )
    from kvpack.handles import (
        ReceiveHandle as ReceiveHandle,
        ReceiveResult as ReceiveResult,
        SendHandle as SendHandle,
        SendResult as SendResult,
    )
    from kvpack.layout import (
        CacheLayout as CacheLayout,
        CacheTensor as CacheTensor,
        ContextShard as ContextShard,
        Memory as Memory,
        Shard as Shard,
        declare as declare,
    )
    from kvpack.options import (
        Options as Options,
    )
    from kvpack.parallel import (
        Parallelism as Parallelism,
        Rank as Rank,
    )
    from kvpack.plan import (
        Slice as Slice,
        TransferPlan as TransferPlan,
        compile_plan as compile_plan,
    )
    from kvpack.staging import (
        Staging as Staging,
    )
    from kvpack.topology import (
        Deployment as Deployment,
        Topology as Topology,
    )
    from kvpack.verification import (
        Party as Party,
        Proof as Proof,
        Request as Request,
        verify as verify,
    )

__version__ = "0.1.0"

_ROOMS = {
    "kvpack.blocks": ("NO_BLOCK", "kernel_blocks"),
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
    "kvpack.explanation": ("Explanation", "explain_topology"),
    "kvpack.fragments": ("Fragments",),
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
    "kvpack.parallel": ("Parallelism", "Rank"),
    "kvpack.plan": ("Slice", "TransferPlan", "compile_plan"),
    "kvpack.staging": ("Staging",),
    "kvpack.topology": ("Deployment", "Topology"),
    "kvpack.verification": ("Party", "Proof", "Request", "verify"),
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
