"""Links to peers: what a peer declared of itself, and the plans compiled against it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvpack.blocks import BlockTable, check_held
from kvpack.errors import ProtocolError
from kvpack.kernels.table import LaneTable
from kvpack.lanes import Side
from kvpack.layout import CacheLayout
from kvpack.plan import Selection, Slice, TransferPlan, compile_plan
from kvpack.protocol import CheckPart, LaneSelection, PeerMetadata, Request, Wire as ProtocolWire
from kvpack.wire import Wire

MAX_PLANS = 64
"""Plans kept for each peer and direction; elections of other shapes push the oldest out."""


@dataclass(frozen=True, eq=False)
class PartWire:
    """The wire order of one part of a request, as the protocol and a copy on this side need it.

    Attributes
    ----------
    wire : Wire
        Offsets and spans.
    table : LaneTable
        Of this side.
    side : {"source", "destination"}
        Which side this is.
    """

    wire: Wire
    table: LaneTable
    side: Side

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole part."""
        return self.wire.total_bytes

    @property
    def piece_bytes(self) -> int:
        """Staging bytes that hold at least one piece, wherever a chunk starts."""
        return min(self.wire.piece_bytes, self.wire.total_bytes)

    def cut(self, start: int, max_bytes: int) -> int:
        """End of the largest chunk from ``start`` that fits; see ``Wire.cut``."""
        return self.wire.cut(start, max_bytes)

    def spans(
        self, wire_first: int, wire_last: int, block_offsets: tuple[int, ...]
    ) -> npt.NDArray[np.int64]:
        """What to launch for a chunk on this side; see ``Wire.spans``.

        Raises
        ------
        ProtocolError
            If a chunk cannot begin or end there; the peer chose these offsets.
        """
        for offset in (wire_first, wire_last):
            if not self.wire.is_boundary(offset):
                raise ProtocolError(
                    f"the peer cut a chunk at wire byte {offset}, inside a token; both sides "
                    "need the same version of kvpack and the same layouts"
                )
        return self.wire.spans(self.side, wire_first, wire_last, block_offsets)


def blocks_hold(layout: CacheLayout, blocks: BlockTable) -> CheckPart:
    """The protocol's check of a send's parts: that its block lists hold what travels."""

    def check(part: ProtocolWire) -> None:
        assert isinstance(part, PartWire)
        check_held(layout, blocks, part.wire.source_live, part.wire.last, part.wire.end)

    return check


@dataclass(eq=False)
class Link:
    """A connected peer, in one incarnation.

    Attributes
    ----------
    key : str
        Name and incarnation.
    metadata : PeerMetadata
        What it said when it connected.
    layout : CacheLayout
        Its cache.
    mine : CacheLayout
        This endpoint's cache.
    bring : callable
        Brings a lane table to this endpoint's device.
    """

    key: str
    metadata: PeerMetadata
    layout: CacheLayout
    mine: CacheLayout
    bring: Callable[[npt.NDArray[np.int64]], LaneTable]
    _plans: OrderedDict[tuple[Side, Selection | None, bool], tuple[TransferPlan, LaneTable]] = (
        field(default_factory=OrderedDict)
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        """The peer's name."""
        return self.metadata.name

    def part(self, side: Side, request: Request, first: int, last: int) -> PartWire:
        """The wire order of positions ``[first, last)`` of a request.

        Parameters
        ----------
        side : {"source", "destination"}
            This endpoint's side of it.
        request : Request
            The receiver's message, with what it elected.
        first, last : int
            Positions.

        Raises
        ------
        CoverageError
            If the peer elected what the two layouts do not have in common.
        """
        selection = from_rows(request.selection)
        plan, table = self.plan(side, selection, request.stream_layers)
        return PartWire(plan.wire(first, last, request.last), table, side)

    def plan(
        self, side: Side, selection: Selection | None, stream_layers: bool
    ) -> tuple[TransferPlan, LaneTable]:
        """The plan with this peer, and this side's lane table on the device; compiled once."""
        key = (side, selection, stream_layers)
        with self._lock:  # callers of receive plan, and so does the turning thread
            found = self._plans.get(key)
            if found is None:
                layouts = (self.mine, self.layout) if side == "source" else (self.layout, self.mine)
                plan = compile_plan(*layouts, selection=selection, stream_layers=stream_layers)
                found = self._plans[key] = (plan, self.bring(plan.table(side)))
                if len(self._plans) > MAX_PLANS:
                    self._plans.popitem(last=False)
            else:
                self._plans.move_to_end(key)
        return found


def to_rows(selection: Selection | None) -> tuple[LaneSelection, ...] | None:
    """An elected selection as a message carries it."""
    if selection is None:
        return None
    return tuple(
        LaneSelection(s.name, s.first_layer, s.last_layer, s.first_head, s.last_head - s.first_head)
        for s in selection
    )


def from_rows(rows: tuple[LaneSelection, ...] | None) -> Selection | None:
    """The selection that a message carries."""
    if rows is None:
        return None
    return tuple(
        Slice(r.name, r.first_layer, r.last_layer, r.head_start, r.head_start + r.head_count)
        for r in rows
    )
