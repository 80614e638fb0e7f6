"""Moves what a topology's receivers elect, chunk by chunk through poisoned staging memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from support.topology import GUARD_BYTES, Rank, Topology

from kvpack.blocks import BlockTable, check_held
from kvpack.columns import Span
from kvpack.election import Election
from kvpack.kernels import LaneTable, gather, scatter
from kvpack.layout import CacheLayout, CacheTensor
from kvpack.plan import TransferPlan, compile_plan
from kvpack.wire import Wire, chunk_origin


def elected_plans(
    topology: Topology, destination: Rank, salt: str, stream_layers: bool
) -> Iterator[tuple[Rank, TransferPlan]]:
    """The plan of every source that a receiver elects."""
    chosen = Election(topology.layouts, destination.layout).elect(salt)
    for rank in topology.sources:
        if chosen[rank.name] != ():
            yield (
                rank,
                compile_plan(
                    rank.layout,
                    destination.layout,
                    selection=chosen[rank.name],
                    stream_layers=stream_layers,
                ),
            )


def chunks_of(wire: Wire, chunk_bytes: int) -> list[tuple[int, int]]:
    """Wire ranges of the chunks that a sender would cut."""
    out, start = [], 0
    while start < wire.total_bytes:
        stop = wire.cut(start, chunk_bytes)
        out.append((start, stop))
        start = stop
    return out


@dataclass(frozen=True)
class Copies:
    """Which kernels move the bytes, and where staging lies: NumPy twins on the CPU, or others."""

    backend: str | None = None
    device: str = "cpu"

    def room(self, nbytes: int) -> np.ndarray:
        """Poisoned bytes on the device."""
        if self.device == "cpu":
            return np.full(nbytes, 0xA5, np.uint8)
        import torch

        return torch.full((nbytes,), 0xA5, dtype=torch.uint8, device=self.device)

    @contextlib.contextmanager
    def placed(self, sources: Sequence[Rank], destination: Rank) -> Iterator[None]:
        """Keep the ranks' bytes on the device meanwhile, with their declarations following."""
        if self.device == "cpu":
            yield
            return
        import torch

        ranks = [*sources, destination]
        layouts = [rank.layout for rank in ranks]
        arenas = []
        for rank in ranks:
            # Addresses keep their place within 256 bytes, and with it their alignment.
            starts = [buffer.ctypes.data for buffer in rank.buffers]
            room = sum(len(buffer) + 512 for buffer in rank.buffers) + 256
            host = np.zeros(room, np.uint8)
            arena = torch.zeros(room, dtype=torch.uint8, device=self.device)
            end, places = arena.data_ptr(), []
            for start, buffer in zip(starts, rank.buffers, strict=True):
                places.append(end + (start - end) % 256)
                end = places[-1] + len(buffer)
            for place, buffer in zip(places, rank.buffers, strict=True):
                at = place - arena.data_ptr()
                host[at : at + len(buffer)] = buffer
            arena.copy_(torch.from_numpy(host))
            arenas.append((arena, places))
            rank.layout = CacheLayout(
                [_moved(t, rank.buffers, places, self.device) for t in rank.layout.tensors],
                rank.layout.context,
            )
        try:
            yield
        finally:
            for rank, layout, (arena, places) in zip(ranks, layouts, arenas, strict=True):
                rank.layout = layout
                host = arena.cpu().numpy()
                for place, buffer in zip(places, rank.buffers, strict=True):
                    at = place - arena.data_ptr()
                    buffer[:] = host[at : at + len(buffer)]

    def table(self, rows: np.ndarray) -> LaneTable:
        """A lane table where the kernels run."""
        return LaneTable(rows, None if self.device == "cpu" else self.device)


def _moved(
    tensor: CacheTensor, buffers: Sequence[np.ndarray], places: Sequence[int], device: str
) -> CacheTensor:
    """A declaration whose buffer was copied elsewhere."""
    for buffer, place in zip(buffers, places, strict=True):
        offset = tensor.address - buffer.ctypes.data
        if 0 <= offset < len(buffer):
            return msgspec.structs.replace(tensor, address=place + offset, device=device)
    raise AssertionError(f"{tensor.title} lies in no buffer")


TWINS = Copies()


def ship(
    plan: TransferPlan,
    source: Rank,
    destination: Rank,
    first: int,
    last: int,
    chunk_bytes: int,
    tables: dict[str, np.ndarray] | None = None,
    *,
    held: BlockTable | None = None,
    copies: Copies = TWINS,
) -> int:
    """Move a plan's bytes chunk by chunk through poisoned staging.

    Returns the payload bytes moved. ``tables`` replaces the plan's, for planted faults; ``held``
    is what one of several sends named, unless the source's whole lists are meant.
    """
    ours_at = copies.table((tables or {}).get("source", plan.table("source")))
    theirs_at = copies.table((tables or {}).get("destination", plan.table("destination")))
    held = source.table() if held is None else held
    wanted = destination.table()
    wire = plan.wire(first, last, destination.last)
    check_held(source.layout, held, wire.source_live, last, destination.last)
    moved = 0
    for start, stop in chunks_of(wire, chunk_bytes):
        nbytes = stop - chunk_origin(start)
        room = copies.room(GUARD_BYTES + 256 + chunk_bytes + GUARD_BYTES)
        lead = -(room.ctypes.data if copies.device == "cpu" else room.data_ptr()) % 256
        staging = room[lead : lead + nbytes]
        ours = wire.spans("source", start, stop, held.offsets)
        theirs = wire.spans("destination", start, stop, wanted.offsets)
        gather(ours_at, ours, held.ids, staging, backend=copies.backend)
        assert (room[lead + nbytes :] == 0xA5).all(), "gather wrote behind its chunk"
        assert (room[: lead + start - chunk_origin(start)] == 0xA5).all(), "gather wrote before it"
        scatter(theirs_at, theirs, wanted.ids, staging, backend=copies.backend)
        payload = [int((s[:, Span.LANES] * s[:, Span.UNITS] * s[:, Span.UNIT_BYTES]).sum())
                   for s in (ours, theirs)]  # fmt: skip
        assert payload[0] == payload[1]
        moved += payload[0]
    return moved
