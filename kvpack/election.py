"""Election: which sender sends what, where several hold a copy, and whether anything is missing.

The receiver elects over all the senders that it names, never pair by pair. Heads are cut where any
sender's interval begins or ends; of the senders that hold such a piece one is chosen by a hash of
request and receiver, so that copies share the work and every retry of the hash agrees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from kvpack.errors import CoverageError, IncompatibleLayoutsError
from kvpack.lanes import residues
from kvpack.layout import CacheLayout, CacheTensor, ContextShard, Shard
from kvpack.plan import Selection, Slice

Candidates = tuple[str, ...]
Holding = tuple[int, str, int, int]
"""(layer, name, first head, last head)"""


@dataclass
class Election:
    """What a receiver can elect among the senders it names. Made once for each set of senders.

    Parameters
    ----------
    sources : mapping of str to CacheLayout
        Every sender of the request, by name.
    destination : CacheLayout
        Of the receiver.

    Raises
    ------
    CoverageError
        If no sender has a wanted layer, head or position; an optional cache tensor that no sender
        has is not wanted.
    IncompatibleLayoutsError
        If the senders deal out positions in ways that cannot be combined.
    """

    sources: Mapping[str, CacheLayout]
    destination: CacheLayout
    _contested: dict[Candidates, list[Holding]] = field(init=False, default_factory=dict)
    _memo: dict[tuple[str, tuple[int, ...]], Selection | None] = field(
        init=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if not self.sources:
            raise CoverageError("a request needs at least one sender; from_ is empty")
        wanted = self._wanted()
        state = [tensor for tensor in wanted if tensor.state]
        dealt_out = [tensor for tensor in wanted if not tensor.state]
        self._contest(state, sorted(self.sources))
        for names in self._by_context({t.block_tokens for t in dealt_out}):
            self._contest(dealt_out, names)

    def _wanted(self) -> list[CacheTensor]:
        """The receiver's tensors, less the optional ones that no sender has."""
        held = {(t.layer, t.name) for source in self.sources.values() for t in source.tensors}
        return [t for t in self.destination.tensors if not t.optional or (t.layer, t.name) in held]

    def _contest(self, wanted: Sequence[CacheTensor], names: Sequence[str]) -> None:
        """Take note of who can send which heads of some tensors, among some senders."""
        heads = {
            name: {(t.layer, t.name): t.heads for t in self.sources[name].tensors} for name in names
        }
        for tensor in wanted:
            for start, stop, candidates in _cut(tensor, heads):
                holding = (tensor.layer, tensor.name, start, stop)
                self._contested.setdefault(candidates, []).append(holding)

    def elect(self, salt: str) -> dict[str, Selection | None]:
        """Choose one sender for every piece.

        Parameters
        ----------
        salt : str
            Request and receiver; equal salts elect alike.

        Returns
        -------
        dict of str to (tuple of Slice or None)
            Per sender what it is to send: None for everything in common with the receiver, ``()``
            for nothing.
        """
        won: dict[str, list[int]] = {name: [] for name in self.sources}
        for number, candidates in enumerate(self._contested):
            won[_pick(candidates, salt)].append(number)
        return {name: self._selection(name, tuple(sets)) for name, sets in won.items()}

    def _selection(self, name: str, won: tuple[int, ...]) -> Selection | None:
        """What a sender sends that was picked from these sets of candidates, by number."""
        if (name, won) not in self._memo:
            possible = tuple(n for n, sets in enumerate(self._contested) if name in sets)
            holdings = list(self._contested.values())
            held = [holding for number in won for holding in holdings[number]]
            self._memo[name, won] = None if won and won == possible else _slices(held)
        return self._memo[name, won]

    def _by_context(self, block_tokens: set[int]) -> Iterator[list[str]]:
        """Names of the senders of each context rank whose positions the receiver wants.

        ``block_tokens`` are the sizes of its blocks.
        """
        contexts = {layout.context for layout in self.sources.values()}
        ways = {(c.ranks, c.interleave if c.ranks > 1 else 1) for c in contexts}
        if len(ways) > 1:
            raise IncompatibleLayoutsError(
                f"senders deal out positions over {sorted(ways)} (ranks, interleave); all senders "
                "of one request must share one context parallelism"
            )
        (ranks, _), context = ways.pop(), next(iter(contexts))
        for rank in range(ranks):
            shard = ContextShard(rank, ranks, context.interleave)
            if not any(residues(shard, t, self.destination.context, t) for t in block_tokens):
                continue
            names = [n for n in sorted(self.sources) if self.sources[n].context.rank == rank]
            if not names:
                raise CoverageError(
                    f"no sender has the positions of context rank {rank} of {ranks}; name the "
                    f"sender that holds them in from_ (named: {', '.join(sorted(self.sources))})"
                )
            yield names


def _cut(
    wanted: CacheTensor, heads: Mapping[str, Mapping[tuple[int, str], Shard]]
) -> Iterator[tuple[int, int, Candidates]]:
    """Pieces of a wanted tensor's heads, with the senders that hold each.

    ``heads`` has, for each sender, the heads that it holds of a (layer, name).
    """
    key = (wanted.layer, wanted.name)
    held = {name: mine[key] for name, mine in heads.items() if key in mine}
    if not held:
        raise CoverageError(
            f"{wanted.title} is wanted, but none of {', '.join(heads)} has it; name the sender "
            "that holds this layer in from_"
        )
    cuts = {wanted.heads.start, wanted.heads.stop}
    cuts |= {c for h in held.values() for c in (h.start, h.stop)}
    inside = [c for c in sorted(cuts) if wanted.heads.start <= c <= wanted.heads.stop]
    for start, stop in pairwise(inside):
        having = tuple(n for n, h in held.items() if h.start <= start and stop <= h.stop)
        if not having:
            raise CoverageError(
                f"heads [{start}, {stop}) of {wanted.title} are wanted, but none of "
                f"{', '.join(heads)} holds them; name the sender that does in from_"
            )
        yield start, stop, having


def _pick(candidates: Candidates, salt: str) -> str:
    if len(candidates) == 1:
        return candidates[0]
    digest = hashlib.blake2b(repr((salt, candidates)).encode(), digest_size=8).digest()
    return candidates[int.from_bytes(digest, "little") % len(candidates)]


def _slices(held: list[Holding]) -> Selection:
    """Few slices for many holdings: neighbouring heads joined, then neighbouring layers."""
    heads: list[Holding] = []
    for layer, name, start, stop in sorted(held, key=lambda h: (h[1], h[0], h[2])):
        if heads and heads[-1][:2] == (layer, name) and heads[-1][3] == start:
            heads[-1] = (layer, name, heads[-1][2], stop)
        else:
            heads.append((layer, name, start, stop))
    out: list[Slice] = []
    for layer, name, start, stop in sorted(heads, key=lambda h: (h[1], h[2], h[3], h[0])):
        last = out[-1] if out else None
        if last is not None and last == (name, last.first_layer, layer, start, stop):
            out[-1] = last._replace(last_layer=layer + 1)
        else:
            out.append(Slice(name, layer, layer + 1, start, stop))
    return tuple(out)
