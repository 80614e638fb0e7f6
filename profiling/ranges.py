"""NVTX ranges of the domain "kvpack": one name, category and colour a phase.

Without a tool attached when the process starts, every function here is a branch and returns.

Phases that lie within one turn of the progress thread nest, and use `phase` or `push` and `pop`
(per thread, last pushed is popped first). Phases that span turns (`credit`, `wire`, a device's
`gather` and `scatter`) use `start` and `end`, which may overlap and end on any thread.
"""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import Any

import numpy as np
import nvtx

from kvpack.profiling.phases import Phase

DOMAIN = "kvpack"

PAYLOAD_DTYPE = np.dtype(
    [("request", "S48"), ("peer", "S48"), ("chunk", np.int64), ("bytes", np.int64)]
)
"""Binary payload of a range; names are UTF-8, cut to 48 bytes, and chunk is -1 where none is."""

COLORS: dict[Phase, int] = {
    Phase.QUEUE: 0xFF9E9E9E,
    Phase.CREDIT: 0xFFFFC107,
    Phase.PREPARE: 0xFF8D6E63,
    Phase.GATHER: 0xFF1E88E5,
    Phase.POST: 0xFF8E24AA,
    Phase.WIRE: 0xFFE53935,
    Phase.SCATTER: 0xFF43A047,
    Phase.COMPLETE: 0xFF00ACC1,
}
"""ARGB colour of each phase: waiting in greys and amber, copies in blue and green, wire in red."""


class _Attributes(threading.local):
    """One thread's prebuilt event attributes of each phase, and the payloads they point to.

    A tool reads the payload during the call, so one buffer a phase and thread serves every range:
    setting a new one on each call would cost 7 us.
    """

    def __init__(self, domain: Any) -> None:
        self.payloads = tuple(np.zeros((), dtype=PAYLOAD_DTYPE) for _ in Phase)
        self.events = tuple(
            domain.get_event_attributes(phase.label, COLORS[phase], phase.label, payload)
            for phase, payload in zip(Phase, self.payloads, strict=True)
        )


class _Tool:
    """The attached tool's side of the domain."""

    def __init__(self, domain: Any) -> None:
        self.domain = domain
        self._attributes = _Attributes(domain)

    def attributes(self, phase: Phase, request: str, peer: str, chunk: int, nbytes: int) -> Any:
        attributes = self._attributes
        attributes.payloads[phase][()] = (request.encode(), peer.encode(), chunk, nbytes)
        return attributes.events[phase]


def _attach() -> _Tool | None:
    if not nvtx.enabled():
        return None
    domain = nvtx.get_domain(DOMAIN)
    # Without a tool nvtx gives a dummy domain, which has no handle.
    return _Tool(domain) if hasattr(domain, "handle") else None


_tool = _attach()


def enabled() -> bool:
    """Whether a tool was attached when this module was imported."""
    return _tool is not None


def push(phase: Phase, request: str = "", peer: str = "", chunk: int = -1, nbytes: int = 0) -> None:
    """Open a nested range on this thread.

    Parameters
    ----------
    phase : Phase
        Names, categorises and colours the range.
    request, peer : str
        The request's id and the peer's name, in the payload.
    chunk : int
        Index of the chunk, -1 where the range is of the whole request.
    nbytes : int
        Bytes that the range is about.
    """
    if _tool is not None:
        _tool.domain.push_range(_tool.attributes(phase, request, peer, chunk, nbytes))


def pop() -> None:
    """Close the range that this thread pushed last."""
    if _tool is not None:
        _tool.domain.pop_range()


def start(phase: Phase, request: str = "", peer: str = "", chunk: int = -1, nbytes: int = 0) -> int:
    """Open a range that may overlap others and that any thread may end.

    Parameters are those of `push`.

    Returns
    -------
    int
        What `end` needs; 0 without a tool.
    """
    if _tool is None:
        return 0
    return int(_tool.domain.start_range(_tool.attributes(phase, request, peer, chunk, nbytes)))


def end(range_id: int) -> None:
    """Close the range that `start` opened."""
    if _tool is not None:
        _tool.domain.end_range(range_id)


class _Popped:
    """Context that pops what was pushed before it was entered; stateless, so one serves all."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pop()


_NOTHING = contextlib.nullcontext()
_POPPED = _Popped()


def phase(
    phase: Phase, request: str = "", peer: str = "", chunk: int = -1, nbytes: int = 0
) -> contextlib.AbstractContextManager[None]:
    """Open a nested range now and close it where the `with` block ends.

    Parameters are those of `push`. The range opens with the call, not with the block, so the
    result must be entered at once.
    """
    if _tool is None:
        return _NOTHING
    push(phase, request, peer, chunk, nbytes)
    return _POPPED
