"""Parallelism: which heads, layers and positions each rank of one side holds.

A side is described by sizes alone (tensor, pipeline, context and data parallel); what a rank holds
follows from its place on each axis. Engines agree on the axes and differ in three habits, which are
data here (``NUMBERINGS``): the order in which ranks are numbered, the pipeline stages that take the
layers left over by an uneven division, and the runs in which context parallelism deals out
positions.

======  ==========================================================================================
trtllm  ``Mapping`` of TensorRT-LLM: rank = (pp * TP + tp) * CP + cp, attention data parallelism
        inside TP; the first stages take a spare layer each (``pp_layers``, as
        ``torch.tensor_split``); Helix deals out whole blocks.
vllm    ``initialize_model_parallel`` of vLLM: ranks as an array (DP, PP, PCP, TP), last axis
        fastest; decode context parallelism reuses the innermost TP ranks, and a rank's place in
        context is ``pcp * DCP + dcp``. Stages take spare layers from the last but one backwards
        (``get_pp_indices``); ``cp_kv_cache_interleave_size`` is one token.
sglang  Scheduler of SGLang: rank = pp * TP + tp, and inside TP attention is data, then context,
        then tensor parallel (``compute_dp_attention_world_info``; its ``--tp-size`` counts the
        context ranks too). The last stages take a spare layer each (``get_pp_indices``).
======  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate, product
from typing import Literal

from kvpack.errors import OptionsError
from kvpack.layout import ContextShard, Shard

__all__ = ["NUMBERINGS", "Numbering", "Parallelism", "Rank"]

Axis = Literal["dp", "pp", "attention_dp", "cp", "tp", "dcp"]


@dataclass(frozen=True)
class Numbering:
    """The habits of an engine that parallel sizes do not tell.

    Attributes
    ----------
    axes : tuple of str
        Axes by which ranks are numbered, the fastest last.
    spare_stage, spare_step : int
        Where layers are left over, the stage that takes the first of them (negative: from the
        last), and the step to the stage that takes the next.
    interleave : {"token", "block"}
        What context parallelism deals out at a time.
    """

    axes: tuple[Axis, ...]
    spare_stage: int
    spare_step: int
    interleave: Literal["token", "block"]


NUMBERINGS: Mapping[str, Numbering] = {
    "trtllm": Numbering(("dp", "pp", "attention_dp", "tp", "dcp", "cp"), 0, 1, "block"),
    "vllm": Numbering(("dp", "attention_dp", "pp", "cp", "tp", "dcp"), -2, -1, "token"),
    "sglang": Numbering(("dp", "pp", "attention_dp", "cp", "tp", "dcp"), -1, -1, "token"),
}


@dataclass(frozen=True)
class Parallelism:
    """How the ranks of one side share a model and its requests.

    Parameters
    ----------
    tp : int
        Tensor parallel ranks; they share the KV heads.
    pp : int
        Pipeline parallel ranks; they share the layers.
    cp : int
        Context parallel ranks; they share the positions.
    dp : int or None
        Data parallel groups, each with requests of its own. Without `attention_dp` every group has
        `tp` ranks; with it, the groups share them. None is 1, and with `attention_dp` `tp`.
    dcp : int
        Of the `tp` ranks, so many neighbours share positions instead of heads (vLLM's decode
        context parallelism).
    attention_dp : bool
        Attention is data parallel over the `tp` ranks: a rank holds more heads, but only of its
        group's requests.
    layers : tuple of int
        Layers of each pipeline stage; balanced unless given.
    interleave : int or None
        Consecutive positions dealt to a context rank at a time; None is the numbering's habit.
    numbering : str
        A name in `NUMBERINGS`.

    Raises
    ------
    OptionsError
        If a size is below 1 or sizes do not divide each other, naming them.

    Examples
    --------
    >>> side = Parallelism(tp=4, pp=2, numbering="vllm")
    >>> rank = side.rank(6)
    >>> rank.pp, rank.tp, rank.layers(61), rank.heads(8).start
    (1, 2, range(31, 61), 4)
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int | None = None
    dcp: int = 1
    attention_dp: bool = False
    layers: tuple[int, ...] = ()
    interleave: int | None = None
    numbering: str = "trtllm"

    def __post_init__(self) -> None:
        for axis in ("tp", "pp", "cp", "dcp", "dp", "interleave"):
            size = getattr(self, axis)
            if size is not None and size < 1:
                raise OptionsError(f"{axis}={size} must be at least 1")
        if self.numbering not in NUMBERINGS:
            raise OptionsError(
                f"numbering={self.numbering!r} is not one of {', '.join(NUMBERINGS)}"
            )
        inside = self._attention_groups * self.dcp
        if self.tp % inside:
            raise OptionsError(
                f"tp={self.tp} ranks cannot be shared by {self._attention_groups} attention data "
                f"parallel groups with dcp={self.dcp}; their product {inside} must divide tp"
            )
        if self.layers and (len(self.layers) != self.pp or min(self.layers) < 1):
            raise OptionsError(
                f"layers={'+'.join(map(str, self.layers))} must name a positive number for each of "
                f"the {self.pp} pipeline stages"
            )

    def __str__(self) -> str:
        """Write what differs from a single rank: ``tp=16,layers=50+44,attention_dp``."""
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is True:
                words.append(field.name)
            elif value != field.default:
                text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
                words.append(f"{field.name}={text}")
        return ",".join(words) or "tp=1"

    @property
    def _attention_groups(self) -> int:
        """Data parallel groups that share the tensor parallel ranks."""
        return (self.dp or self.tp) if self.attention_dp else 1

    @property
    def attention_tp(self) -> int:
        """Ranks among which the heads of one request are shared."""
        return self.tp // (self._attention_groups * self.dcp)

    @property
    def num_groups(self) -> int:
        """Groups of ranks that hold requests of their own."""
        return self._sizes["dp"] * self._sizes["attention_dp"]

    @property
    def ranks_per_request(self) -> int:
        """Ranks that hold a part of one request's cache."""
        return self.attention_tp * self.dcp * self.pp * self.cp

    @property
    def num_ranks(self) -> int:
        """Ranks of this side."""
        return self.num_groups * self.ranks_per_request

    @property
    def _sizes(self) -> dict[Axis, int]:
        return {
            "dp": 1 if self.attention_dp else self.dp or 1,
            "pp": self.pp,
            "attention_dp": self._attention_groups,
            "cp": self.cp,
            "tp": self.attention_tp,
            "dcp": self.dcp,
        }

    @cached_property
    def ranks(self) -> tuple[Rank, ...]:
        """All ranks, in the order of their numbers."""
        sizes, axes = self._sizes, NUMBERINGS[self.numbering].axes
        places = product(*(range(sizes[axis]) for axis in axes))
        return tuple(
            _rank(self, number, dict(zip(axes, place, strict=True)))
            for number, place in enumerate(places)
        )

    def rank(self, number: int) -> Rank:
        """One rank by its number.

        Raises
        ------
        OptionsError
            If there is none of that number.
        """
        if not 0 <= number < self.num_ranks:
            raise OptionsError(f"rank {number} is outside the side's {self.num_ranks} ranks")
        return self.ranks[number]

    def group(self, number: int) -> tuple[Rank, ...]:
        """The ranks that hold the requests of one data parallel group, by their numbers."""
        return tuple(rank for rank in self.ranks if rank.group == number)

    def stage_layers(self, num_layers: int) -> tuple[range, ...]:
        """Share out `num_layers` layers: the layer ids of each pipeline stage.

        Raises
        ------
        OptionsError
            If there are fewer layers than stages, or the split given does not add up to them.
        """
        if num_layers < self.pp:
            raise OptionsError(f"pp={self.pp} stages cannot share {num_layers} layers; lower pp")
        counts = list(self.layers) or self._balanced(num_layers)
        if sum(counts) != num_layers:
            raise OptionsError(
                f"layers={'+'.join(map(str, counts))} adds up to {sum(counts)}, but the model "
                f"caches {num_layers} layers"
            )
        ends = list(accumulate(counts))
        return tuple(range(end - count, end) for end, count in zip(ends, counts, strict=True))

    def _balanced(self, num_layers: int) -> list[int]:
        each, spare = divmod(num_layers, self.pp)
        habit = NUMBERINGS[self.numbering]
        takers = {(habit.spare_stage + i * habit.spare_step) % self.pp for i in range(spare)}
        return [each + (stage in takers) for stage in range(self.pp)]


@dataclass(frozen=True)
class Rank:
    """One rank of a side and what it holds.

    Attributes
    ----------
    parallelism : Parallelism
        Of its side.
    number : int
        As its engine numbers it.
    group : int
        The data parallel group whose requests it holds.
    pp, tp : int
        Its pipeline stage, and its place among the ranks that share the heads.
    context : int
        Its place among the ranks that share the positions.
    """

    parallelism: Parallelism
    number: int
    group: int
    pp: int
    tp: int
    context: int

    def heads(self, total: int) -> Shard:
        """Which of `total` KV heads it holds; neighbours are replicas where ranks outnumber heads.

        Raises
        ------
        LayoutError
            If `total` is below 1.
        """
        return Shard.balanced(total, self.parallelism.attention_tp, self.tp)

    def layers(self, num_layers: int) -> range:
        """Which of `num_layers` layers it holds, by global id."""
        return self.parallelism.stage_layers(num_layers)[self.pp]

    def positions(self, block_tokens: int) -> ContextShard:
        """Which positions it holds, where its blocks have `block_tokens` tokens."""
        side = self.parallelism
        habit = {"token": 1, "block": block_tokens}[NUMBERINGS[side.numbering].interleave]
        ranks = side.cp * side.dcp
        return ContextShard(self.context, ranks, (side.interleave or habit) if ranks > 1 else 1)


def _rank(side: Parallelism, number: int, place: Mapping[Axis, int]) -> Rank:
    groups = side.tp // (side.attention_tp * side.dcp)
    return Rank(
        parallelism=side,
        number=number,
        group=place["dp"] * groups + place["attention_dp"],
        pp=place["pp"],
        tp=place["tp"],
        context=place["cp"] * side.dcp + place["dcp"],
    )
