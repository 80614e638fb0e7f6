"""Proof that a transfer writes every wanted byte once, with the right bytes, and nothing else.

The proof does not trust the planner: it walks the declarations themselves, one head and position
at a time, and compares with the fragments that the plans of all senders give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt

from kvpack.blocks import Blocks, BlockTable, Role, block_table
from kvpack.election import Election
from kvpack.errors import VerificationError
from kvpack.fragments import Fragments
from kvpack.layout import CacheLayout, CacheTensor
from kvpack.plan import compile_plan

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Party:
    """One rank of a request: its cache layout and its block lists.

    Attributes
    ----------
    layout : CacheLayout
        What the rank holds.
    blocks : array_like of int, or one per layer group
        As ``send`` and ``receive`` take them.
    """

    layout: CacheLayout
    blocks: Blocks


@dataclass(frozen=True)
class Request:
    """What is asked for: positions ``[first, last)`` under a request id, layer by layer or not."""

    first: int
    last: int
    request_id: str = "request"
    stream_layers: bool = False


@dataclass(frozen=True)
class Proof:
    """What was proved.

    Attributes
    ----------
    nbytes : int
        Bytes written over all destinations, each exactly once.
    fragments : int
        Contiguous pieces they came in.
    pairs : int
        Pairs of sender and receiver that exchange anything.
    """

    nbytes: int
    fragments: int
    pairs: int


def verify(
    sources: Mapping[str, Party], destinations: Mapping[str, Party], request: Request
) -> Proof:
    """Prove that a request's plans write each destination byte exactly once and nothing else.

    Parameters
    ----------
    sources, destinations : mapping of str to Party
        Every rank that takes part, by name.
    request : Request
        Positions and request id; the id decides between copies.

    Returns
    -------
    Proof

    Raises
    ------
    VerificationError
        Naming the destination and the first byte that is wrong.
    CoverageError, IncompatibleLayoutsError, BlockListError
        If the request cannot be planned at all.
    """
    layouts = {name: party.layout for name, party in sources.items()}
    held = {n: _table(p, request, "source") for n, p in sources.items()}
    nbytes = fragments = pairs = 0
    for name, party in destinations.items():
        wanted = _table(party, request, "destination")
        chosen = Election(layouts, party.layout).elect(f"{request.request_id}/{name}")
        parts: list[tuple[str, Fragments]] = []
        for source, selection in chosen.items():
            if selection == ():
                continue
            plan = compile_plan(
                layouts[source],
                party.layout,
                selection=selection,
                stream_layers=request.stream_layers,
            )
            found = plan.fragments_between(held[source], wanted, request.first, request.last)
            if len(found.nbytes):
                parts.append((source, found))
        nbytes += verify_fragments(sources, party, request, parts, name)
        fragments += sum(len(found.nbytes) for _, found in parts)
        pairs += len(parts)
    return Proof(nbytes, fragments, pairs)


def verify_fragments(
    sources: Mapping[str, Party],
    destination: Party,
    request: Request,
    parts: list[tuple[str, Fragments]],
    name: str = "destination",
) -> int:
    """Prove given fragments against the declarations; ``verify`` does so with those of the plans.

    Parameters
    ----------
    sources : mapping of str to Party
        Senders by name.
    destination : Party
        One receiver.
    request : Request
        Positions.
    parts : list of (str, Fragments)
        What each sender writes.
    name : str
        What messages call the receiver.

    Returns
    -------
    int
        Bytes written.

    Raises
    ------
    VerificationError
        As ``verify``.
    """
    layouts = [destination.layout, *(sources[source].layout for source, _ in parts)]
    lengths = [int(n) for _, found in parts for n in np.unique(found.nbytes)]
    atom = gcd(*lengths, *(_row_bytes(t) for layout in layouts for t in layout.tensors))
    keys = sorted({(t.layer, t.name) for layout in layouts for t in layout.tensors})
    numbers = {key: number for number, key in enumerate(keys)}
    held_somewhere = {
        (t.layer, t.name) for source in sources.values() for t in source.layout.tensors
    }
    wanted = [
        t
        for t in destination.layout.tensors
        if not t.optional or (t.layer, t.name) in held_somewhere
    ]
    address, identity = _atoms(destination, wanted, request, "destination", atom, numbers)
    order = np.argsort(address, kind="stable")
    address, identity = address[order], identity[order]
    written, origin = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for source, found in parts:
        written.append(_spread(found.destination, found.nbytes, atom))
        party = sources[source]
        known, what = _atoms(party, party.layout.tensors, request, "source", atom, numbers)
        order = np.argsort(known, kind="stable")
        known, what = known[order], what[order]
        read = _spread(found.source, found.nbytes, atom)
        at = np.minimum(np.searchsorted(known, read), len(known) - 1)
        origin.append(np.where(known[at] == read, what[at], -1))
    to, came = np.concatenate(written), np.concatenate(origin)
    order = np.argsort(to, kind="stable")
    to, came = to[order], came[order]
    twice = np.flatnonzero(to[1:] == to[:-1])
    if len(twice):
        raise VerificationError(f"{name}: byte at {to[twice[0]]:#x} would be written twice")
    extra = to[~np.isin(to, address, assume_unique=True)]
    if len(extra):
        raise VerificationError(
            f"{name}: byte at {extra[0]:#x} would be written, though it is outside the request"
        )
    missing = address[~np.isin(address, to, assume_unique=True)]
    if len(missing):
        raise VerificationError(f"{name}: wanted byte at {missing[0]:#x} would not be written")
    wrong = np.flatnonzero(identity != came)
    if len(wrong):
        raise VerificationError(
            f"{name}: byte at {address[wrong[0]]:#x} would get another layer's, head's or "
            "position's byte"
        )
    return len(to) * atom


def _table(party: Party, request: Request, role: Role) -> BlockTable:
    return block_table(party.layout, party.blocks, request.first, request.last, role)


def _inner(tensor: CacheTensor) -> tuple[Int64s, int]:
    """Offsets of the contiguous rows of one token and head in logical order, and a row's bytes."""
    row = tensor.item_bytes
    axes = list(tensor.inner)
    while axes and (axes[-1][0] == 1 or axes[-1][1] == row):
        row *= axes.pop()[0]
    offsets = np.zeros(1, np.int64)
    for count, stride in axes:
        offsets = (offsets[:, None] + np.arange(count, dtype=np.int64) * stride).reshape(-1)
    return offsets, row


def _row_bytes(tensor: CacheTensor) -> int:
    return _inner(tensor)[1]


def _atoms(
    party: Party,
    tensors: Sequence[CacheTensor],
    request: Request,
    role: Role,
    atom: int,
    numbers: Mapping[tuple[int, str], int],
) -> tuple[Int64s, Int64s]:
    """Address and logical identity of every atom of the request that a party holds of tensors.

    ``numbers`` numbers each (layer, name) alike on both sides.
    """
    table = _table(party, request, role)
    first, last, shard = request.first, request.last, party.layout.context
    addresses, identities = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for tensor in tensors:
        if tensor.state:
            position = local = np.array([last - 1], np.int64)
        else:
            begin = first if tensor.window is None else max(first, last - tensor.window)
            position = np.arange(begin, last, dtype=np.int64)
            position = position[position // shard.interleave % shard.ranks == shard.rank]
            period = shard.interleave * shard.ranks
            local = position // period * shard.interleave + position % shard.interleave
        start, ids = table.of_group(tensor.group)
        listed = local // tensor.block_tokens >= start
        position, local = position[listed], local[listed]
        block = ids[local // tensor.block_tokens - start]
        there = block >= 0
        offsets, row = _inner(tensor)
        inner = (offsets[:, None] + np.arange(0, row, atom)).reshape(-1)
        token = (
            tensor.address
            + block.astype(np.int64) * tensor.block_stride
            + local % tensor.block_tokens * tensor.token_stride
        )[there]
        head = np.arange(tensor.heads.count) * tensor.head_stride
        address = token[:, None, None] + head[:, None] + inner
        addresses.append(address.reshape(-1))
        number = numbers[tensor.layer, tensor.name]
        identity = (
            (number * (last - first) + (position[there] - first)[:, None, None])
            * tensor.heads.total
            + (tensor.heads.start + np.arange(tensor.heads.count))[:, None]
        ) * len(inner) + np.arange(len(inner))
        identities.append(identity.reshape(-1))
    return np.concatenate(addresses), np.concatenate(identities)


def _spread(start: Int64s, nbytes: Int64s, atom: int) -> Int64s:
    """Addresses of all atoms of runs."""
    counts = nbytes // atom
    first = np.repeat(start, counts)
    within = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
    return first + within * atom
