"""How an explanation is printed: the two sides, a table of who sends what to whom, and words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from kvpack.explanation import Explanation, Traffic
from kvpack.options import Options
from kvpack.topology import Deployment

__all__ = ["print_explanation"]

_MIB = 1 << 20
_SIZES = 3
"""Sizes of fragments that a row names."""
_WORDED = 3
"""Kinds of pair whose plans are put into words."""


def print_explanation(explanation: Explanation, console: Console, *, every_pair: bool) -> None:
    """Print an explanation.

    Parameters
    ----------
    explanation : Explanation
        What to print.
    console : Console
        Where.
    every_pair : bool
        A row for each pair of ranks; otherwise pairs of equal traffic share one.
    """
    topology = explanation.topology
    request = explanation.one_request()
    console.print(
        f"{topology.shape.name}, {topology.dtype}: positions {topology.first:,} to "
        f"{topology.tokens:,} of one request, {sum(s.traffic.nbytes for s in request):,} bytes",
        soft_wrap=True,
    )
    for side in (topology.prefill, topology.decode):
        console.print(f"  {side.name}: {_side(side)}", soft_wrap=True)
    console.print(_every_pair(explanation) if every_pair else _routes(explanation))
    for text in _words(explanation):
        console.print(text, soft_wrap=True)


def _side(side: Deployment) -> str:
    parallelism = side.parallelism
    words = [f"{parallelism}, {parallelism.num_ranks} rank{'s' * (parallelism.num_ranks > 1)}"]
    if parallelism.num_groups > 1:
        words.append(
            f"{parallelism.num_groups} data parallel groups of {parallelism.ranks_per_request}"
        )
    words += [f"layout {side.layout.name}", f"blocks of {side.block_tokens} tokens"]
    return ", ".join(words)


def _table(*first: str) -> Table:
    table = Table(
        caption="a pair each; merged: descriptors left once neighbours in memory are joined, in "
        "blocks scattered at random and in adjacent ones"
    )
    for name in (*first, "fragments", "of bytes", "MiB", "merged", "adjacent"):
        table.add_column(name, justify="right")
    return table


def _cells(traffic: Traffic) -> list[str]:
    sizes = [f"{size:,}" for size, _ in traffic.sizes]
    if len(sizes) > 1:
        sizes = [f"{size:,} ({count:,})" for size, count in traffic.sizes[:_SIZES]]
    if len(traffic.sizes) > _SIZES:
        sizes.append(f"and {len(traffic.sizes) - _SIZES} more")
    return [
        f"{traffic.fragments:,}",
        "\n".join(sizes),
        f"{traffic.nbytes / _MIB:,.1f}",
        f"{traffic.descriptors:,}",
        f"{traffic.contiguous_descriptors:,}",
    ]


def _routes(explanation: Explanation) -> Table:
    topology = explanation.topology
    table = _table(f"from {topology.prefill.name}", f"to {topology.decode.name}", "pairs")
    for route in explanation.routes:
        possible = len(route.sources) * len(route.destinations)
        table.add_row(
            _intervals(route.sources),
            _intervals(route.destinations),
            f"{route.pairs:,}" if route.pairs == possible else f"{route.pairs:,} of {possible:,}",
            *_cells(route.example.traffic),
        )
    return table


def _every_pair(explanation: Explanation) -> Table:
    topology = explanation.topology
    table = _table("from", "to")
    for sender in explanation.senders:
        table.add_row(
            topology.prefill.rank_name(sender.source),
            topology.decode.rank_name(sender.destination),
            *_cells(sender.traffic),
        )
    return table


def _words(explanation: Explanation) -> list[str]:
    """What an unpacked transfer would cost, and what kvpack does instead."""
    topology = explanation.topology
    request = explanation.one_request()
    if not request:
        return ["Nothing moves: the two sides have no layer, head or position in common."]
    chunk_bytes = Options().chunk_bytes
    descriptors = sum(s.traffic.descriptors for s in request)
    writes = sum(
        -(-s.plan.wire(topology.first, topology.tokens).total_bytes // chunk_bytes) for s in request
    )
    texts = [
        f"Unpacked and merged, one request is {descriptors:,} descriptors in blocks scattered at "
        f"random (seed {topology.seed}), "
        f"{sum(s.traffic.contiguous_descriptors for s in request):,} in adjacent ones.",
        f"kvpack gathers it into staging memory, one launch a chunk, posts {writes:,} "
        f"write{'s' * (writes > 1)} of at most {chunk_bytes // _MIB} MiB, and scatters each.",
    ]
    if explanation.elected:
        texts.append(
            "Several senders hold the same bytes; one is elected for each request, so that with "
            "another request id others send."
        )
    if topology.prefill.parallelism.num_groups * topology.decode.parallelism.num_groups > 1:
        texts.append(
            "One request is in one data parallel group of each side; the rows of other groups are "
            "alternatives."
        )
    kinds = {route.example.traffic: route.example for route in reversed(explanation.routes)}
    texts += [
        f"{topology.prefill.rank_name(sender.source)} to "
        f"{topology.decode.rank_name(sender.destination)}: "
        f"{sender.plan.explain(topology.first, topology.tokens)}"
        for sender in list(reversed(kinds.values()))[:_WORDED]
    ]
    if len(kinds) > _WORDED:
        texts.append(f"Pairs of {len(kinds) - _WORDED} other kinds are planned likewise.")
    return texts


def _intervals(numbers: Sequence[int]) -> str:
    """Write ascending numbers as ``0-3, 7``."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
