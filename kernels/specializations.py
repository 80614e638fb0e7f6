"""Every kernel that is ever compiled: how copies are tiled, and their compile-time values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

from kvpack.errors import OptionsError
from kvpack.kernels.table import MAX_TILE_BYTES


@dataclass(frozen=True)
class Tiling:
    """How a copy is cut: words of a tile, warps of a program.

    A word is as wide as the span's access, so a tile of 16-byte words has ``16 * block_words``
    bytes, and each thread has ``block_words / (32 * num_warps)`` loads in flight.
    """

    block_words: int
    num_warps: int

    def __post_init__(self) -> None:
        if self.block_words * 16 > MAX_TILE_BYTES:
            raise OptionsError(
                f"a tile of {self.block_words} words exceeds {MAX_TILE_BYTES} bytes at the widest "
                f"access; use {MAX_TILE_BYTES // 16} words or fewer"
            )


FREE_TILING = Tiling(block_words=1024, num_warps=4)
"""Without a cap: small programs, many on a multiprocessor."""

CAPPED_TILING = Tiling(block_words=4096, num_warps=16)
"""Under ``max_ctas``: what few programs may be resident carry as much each as they can."""

EXPAND_RUNS = 1024
_EXPAND_WARPS = 4


@dataclass(frozen=True)
class Specialization:
    """Compile-time values of one compiled kernel; :func:`specializations` lists all there are."""

    kernel: str
    constants: dict[str, int]
    num_warps: int

    @cached_property
    def launch_arguments(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**self.constants, "num_warps": self.num_warps}


@cache
def copy_specialization(scatter: bool, only_16: bool, capped: bool) -> Specialization:
    """Specialisation that a copy runs.

    Parameters
    ----------
    scatter : bool
        Staging to cache; otherwise cache to staging.
    only_16 : bool
        Every span is copied in 16-byte words; otherwise a span's width is looked up.
    capped : bool
        Under ``max_ctas``.
    """
    tiling = CAPPED_TILING if capped else FREE_TILING
    constants = {"SCATTER": scatter, "ONLY_16": only_16, "BLOCK": tiling.block_words}
    return Specialization("copy", constants, tiling.num_warps)


def expand_specialization(columns: int) -> Specialization:
    """Specialisation that expands into rows of 2 or 3 columns."""
    return Specialization("expand", {"COLUMNS": columns, "BLOCK": EXPAND_RUNS}, _EXPAND_WARPS)


def specializations() -> tuple[Specialization, ...]:
    """List every kernel that is ever compiled, whatever the requests."""
    both = (False, True)
    copies = [copy_specialization(s, w, c) for s in both for w in both for c in both]
    return (*copies, expand_specialization(2), expand_specialization(3))
