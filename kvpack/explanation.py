"""Explanations: who sends what to whom for one request of a topology, before anything runs.

Every pair of a prefill and a decode data parallel group is worked out as the decode ranks would do
it: each elects over all ranks of the prefill group, compiles a plan for each, and the plans'
fragments are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kvpack.blocks import block_table
from kvpack.election import Election
from kvpack.layout import CacheLayout
from kvpack.parallel import Rank
from kvpack.plan import Selection, TransferPlan, compile_plan
from kvpack.topology import Deployment, Topology

__all__ = ["Explanation", "Route", "Sender", "Traffic", "explain_topology"]

_FEW_ROUTES = 4
"""More sets of senders than these are shown as one route."""


@dataclass(frozen=True)
class Traffic:
    """What one sender has for one receiver.

    Attributes
    ----------
    sizes : tuple of (int, int)
        Bytes of a fragment and how many fragments have so many, the commonest first. A fragment is
        contiguous on both sides: one descriptor of an unpacked transfer.
    descriptors : int
        Descriptors left once neighbours in memory are merged, with random block lists.
    contiguous_descriptors : int
        The same where both sides have the request in adjacent blocks.
    """

    sizes: tuple[tuple[int, int], ...]
    descriptors: int
    contiguous_descriptors: int

    @property
    def fragments(self) -> int:
        """Number of fragments."""
        return sum(count for _, count in self.sizes)

    @property
    def fragment_bytes(self) -> int:
        """Bytes of the commonest fragment."""
        return self.sizes[0][0]

    @property
    def nbytes(self) -> int:
        """Bytes of all fragments."""
        return sum(size * count for size, count in self.sizes)


@dataclass(frozen=True)
class Sender:
    """One sender's part of one receiver's request.

    Attributes
    ----------
    source, destination : Rank
        Who sends, and who receives.
    traffic : Traffic
        What.
    plan : TransferPlan
        How.
    """

    source: Rank
    destination: Rank
    traffic: Traffic
    plan: TransferPlan


@dataclass(frozen=True)
class Route:
    """Pairs of ranks with equal traffic.

    Attributes
    ----------
    sources, destinations : tuple of int
        Numbers of the ranks.
    pairs : int
        How many of them are paired: all with all, or fewer.
    example : Sender
        The first pair.
    """

    sources: tuple[int, ...]
    destinations: tuple[int, ...]
    pairs: int
    example: Sender


@dataclass(frozen=True)
class Explanation:
    """What one request of a topology takes.

    Attributes
    ----------
    topology : Topology
        What was asked.
    senders : tuple of Sender
        Every pair of ranks that exchanges anything, by destination. A request has one prefill and
        one decode data parallel group; those of all other groups are alternatives.
    elected : bool
        Whether several ranks of a prefill group hold the same bytes, so that the request id decided
        who sends them.
    """

    topology: Topology
    senders: tuple[Sender, ...]
    elected: bool

    def one_request(self) -> tuple[Sender, ...]:
        """Return the pairs of one request: from the first prefill to the first decode group."""
        return tuple(s for s in self.senders if s.source.group == s.destination.group == 0)

    @cached_property
    def routes(self) -> tuple[Route, ...]:
        """All pairs, those of equal traffic together, the heaviest first."""
        alike: dict[Traffic, list[Sender]] = {}
        for sender in self.senders:
            alike.setdefault(sender.traffic, []).append(sender)
        routes = [route for senders in alike.values() for route in _routes(senders)]
        return tuple(sorted(routes, key=lambda r: -r.example.traffic.nbytes))

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as JSON's own types."""
        topology = self.topology
        return {
            "shape": topology.shape.name,
            "dtype": topology.dtype,
            "first": topology.first,
            "tokens": topology.tokens,
            "stream_layers": topology.stream_layers,
            "request_bytes": topology.request_bytes,
            **{
                side.name: {
                    "ranks": side.parallelism.num_ranks,
                    "data_parallel_groups": side.parallelism.num_groups,
                    "layout": side.layout.name,
                    "block_tokens": side.block_tokens,
                }
                for side in (topology.prefill, topology.decode)
            },
            "senders": [
                {
                    "source": topology.prefill.rank_name(sender.source),
                    "destination": topology.decode.rank_name(sender.destination),
                    "fragments": sender.traffic.fragments,
                    "fragment_bytes": sender.traffic.fragment_bytes,
                    "fragment_sizes": {str(n): count for n, count in sender.traffic.sizes},
                    "bytes": sender.traffic.nbytes,
                    "descriptors": sender.traffic.descriptors,
                    "contiguous_descriptors": sender.traffic.contiguous_descriptors,
                }
                for sender in self.senders
            ],
        }


def explain_topology(topology: Topology) -> Explanation:
    """Work out who sends what to whom.

    Parameters
    ----------
    topology : Topology
        The model, both sides and the request.

    Returns
    -------
    Explanation

    Raises
    ------
    CoverageError, IncompatibleLayoutsError, BlockListError
        If the decode side wants what the prefill side does not have, or cannot take it.
    LayoutError, OptionsError
        If a side cannot be declared.

    Examples
    --------
    >>> from kvpack.declaration import read_topology
    >>> qwen = read_topology({
    ...     "shape": "qwen3-235b", "dtype": "fp8", "block": 32,
    ...     "prefill": {"tp": 4}, "decode": {"tp": 16, "attention_dp": True}})
    >>> traffic = explain_topology(qwen).senders[0].traffic
    >>> traffic.fragments, traffic.fragment_bytes, traffic.nbytes
    (48128, 4096, 197132288)
    """
    sources = _Side(topology, topology.prefill)
    destinations = _Side(topology, topology.decode)
    counted: dict[tuple[int, int, Selection | None], tuple[Traffic, TransferPlan]] = {}
    senders: list[Sender] = []
    elected = False
    for wanting in topology.decode.parallelism.ranks:
        wanted = destinations.held[wanting.number]
        for group in range(topology.prefill.parallelism.num_groups):
            ranks = topology.prefill.parallelism.group(group)
            names = {topology.prefill.rank_name(rank): rank for rank in ranks}
            election = Election(
                {name: sources.held[rank.number].layout for name, rank in names.items()},
                wanted.layout,
            )
            salt = f"{topology.request_id}/{topology.decode.rank_name(wanting)}"
            for name, selection in election.elect(salt).items():
                having = sources.held[names[name].number]
                key = (id(having), id(wanted), selection)
                if key not in counted:
                    counted[key] = _count(topology, having, wanted, selection)
                traffic, plan = counted[key]
                elected = elected or _passed_over(having.layout, wanted.layout, selection)
                if traffic.sizes:
                    senders.append(Sender(names[name], wanting, traffic, plan))
    senders.sort(key=lambda s: (s.destination.number, s.source.number))
    return Explanation(topology, tuple(senders), elected)


@dataclass(frozen=True, eq=False)
class _Held:
    """A cache layout and the request's block lists in it, scattered and adjacent."""

    layout: CacheLayout
    scattered: Sequence[Any]
    adjacent: Sequence[Any]


class _Side:
    """What each rank of a side holds; ranks that hold the same share one object."""

    def __init__(self, topology: Topology, side: Deployment) -> None:
        alike: dict[tuple[int, int, int], _Held] = {}
        self.held: dict[int, _Held] = {}
        for rank in side.parallelism.ranks:
            place = (rank.pp, rank.tp, rank.context)
            if place not in alike:
                layout = topology.cache_layout(side, rank)
                alike[place] = _Held(
                    layout,
                    topology.block_lists(side, rank, layout, scattered=True),
                    topology.block_lists(side, rank, layout, scattered=False),
                )
            self.held[rank.number] = alike[place]


def _count(
    topology: Topology, having: _Held, wanted: _Held, selection: Selection | None
) -> tuple[Traffic, TransferPlan]:
    first, last = topology.first, topology.tokens
    plan = compile_plan(
        having.layout, wanted.layout, selection=selection, stream_layers=topology.stream_layers
    )
    sizes: Counter[int] = Counter()
    descriptors = []
    for held, taken in ((having.scattered, wanted.scattered), (having.adjacent, wanted.adjacent)):
        fragments = plan.fragments_between(
            block_table(having.layout, held, first, last, "source"),
            block_table(wanted.layout, taken, first, last, "destination"),
            first,
            last,
        )
        descriptors.append(len(fragments.merged().nbytes))
        lengths, counts = np.unique(fragments.nbytes, return_counts=True)
        sizes = Counter(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
    return Traffic(tuple(sizes.most_common()), *descriptors), plan


def _passed_over(
    source: CacheLayout, destination: CacheLayout, selection: Selection | None
) -> bool:
    """Whether a sender holds something in common with a receiver that another one sends."""
    if selection is None:
        return False
    return bool(selection) or bool(compile_plan(source, destination).lanes)


def _routes(senders: Sequence[Sender]) -> list[Route]:
    """Pairs of equal traffic by sets of senders with the same receivers, or all in one."""
    by_destination: dict[int, list[int]] = {}
    for sender in senders:
        by_destination.setdefault(sender.destination.number, []).append(sender.source.number)
    by_sources: dict[tuple[int, ...], list[int]] = {}
    for destination, sources in by_destination.items():
        by_sources.setdefault(tuple(sources), []).append(destination)
    if len(by_sources) > _FEW_ROUTES:
        return [
            Route(
                tuple(sorted({s.source.number for s in senders})),
                tuple(sorted(by_destination)),
                len(senders),
                senders[0],
            )
        ]
    pairs = {(s.source.number, s.destination.number): s for s in senders}
    return [
        Route(sources, tuple(wanting), len(sources) * len(wanting), pairs[sources[0], wanting[0]])
        for sources, wanting in by_sources.items()
    ]
