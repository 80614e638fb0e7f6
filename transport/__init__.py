"""Transports: NIXL, and an in-process loopback behind the same interface."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kvpack.transport.base import Region, Transport, Window, Write
from kvpack.transport.loopback import LoopbackTransport

if TYPE_CHECKING:
    from kvpack.transport.nixl_ucx import NixlTransport

__all__ = ["LoopbackTransport", "NixlTransport", "Region", "Transport", "Window", "Write"]


def __getattr__(name: str) -> object:
    if name == "NixlTransport":
        return importlib.import_module("kvpack.transport.nixl_ucx").NixlTransport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
