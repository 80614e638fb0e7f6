"""Shards: which heads and which positions one rank of many holds."""

from __future__ import annotations

import msgspec

from kvpack.errors import LayoutError


class Shard(msgspec.Struct, frozen=True, array_like=True):
    """Which heads of a cache tensor a rank holds, and how many ranks hold the same ones.

    Attributes
    ----------
    start, count, total : int
        The rank holds the heads ``[start, start + count)`` of ``total``.
    replica, replicas : int
        This rank is number ``replica`` of ``replicas`` ranks with the same heads.
    """

    start: int = 0
    count: int = 1
    total: int = 1
    replica: int = 0
    replicas: int = 1

    def __post_init__(self) -> None:
        if self.start < 0 or self.count < 1 or self.start + self.count > self.total:
            raise LayoutError(
                f"shard of heads [{self.start}, {self.start + self.count}) does not lie within "
                f"the {self.total} heads of the model"
            )
        if not 0 <= self.replica < self.replicas:
            raise LayoutError(
                f"replica {self.replica} is outside the {self.replicas} replicas of the shard"
            )

    @property
    def stop(self) -> int:
        """One past the last head held."""
        return self.start + self.count

    @staticmethod
    def balanced(total: int, ranks: int, rank: int) -> Shard:
        """Shard ``total`` heads over ``ranks`` ranks as evenly as possible.

        With more ranks than heads, neighbouring ranks hold the same head and are its replicas.
        Where the ranks do not divide the heads, intervals differ by at most one head.

        Raises
        ------
        LayoutError
            If ``rank`` is not in ``[0, ranks)`` or there are no heads.
        """
        if not 0 <= rank < ranks or total < 1:
            raise LayoutError(f"rank {rank} of {ranks} cannot hold a share of {total} heads")
        if ranks <= total:
            start, stop = rank * total // ranks, (rank + 1) * total // ranks
            return Shard(start, stop - start, total)
        head = rank * total // ranks
        first = -(-head * ranks // total)
        last = -(-(head + 1) * ranks // total)
        return Shard(head, 1, total, rank - first, last - first)


class ContextShard(msgspec.Struct, frozen=True, array_like=True):
    """Which positions a rank holds under context parallelism.

    Positions are dealt out in runs of ``interleave``: position ``p`` belongs to rank
    ``p // interleave % ranks``.
    """

    rank: int = 0
    ranks: int = 1
    interleave: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.ranks and self.interleave >= 1):
            raise LayoutError(
                f"context shard rank {self.rank} of {self.ranks} with interleave "
                f"{self.interleave} is not valid"
            )

    def tokens_before(self, position: int) -> int:
        """How many positions below ``position`` this rank holds."""
        periods, rest = divmod(position, self.interleave * self.ranks)
        mine = min(max(rest - self.rank * self.interleave, 0), self.interleave)
        return periods * self.interleave + mine

    def position_of(self, token: int) -> int:
        """The position that is number ``token`` of those this rank holds."""
        periods, rest = divmod(token, self.interleave)
        return (periods * self.ranks + self.rank) * self.interleave + rest

    def holds(self, position: int) -> bool:
        """Whether this rank holds a position."""
        return position // self.interleave % self.ranks == self.rank


WHOLE_CONTEXT = ContextShard()
"""Every position."""
