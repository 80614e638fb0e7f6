"""Paged pools of one rank: filled with poison, written and read through block lists.

This is the demo's own account of what a dims string means, written without kvpack's layouts and
plans on purpose: it is what their work is compared with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["NAMES", "PagedCache", "Pool", "shuffled_blocks"]

NAMES = ("k", "v")


@dataclass(frozen=True)
class Pool:
    """One allocation of a paged cache, as its engine would have made it.

    Parameters
    ----------
    tensor : torch.Tensor
        The allocation, one axis for each of the dims string.
    layers : range
        Global ids of the layers it holds, in the order of its layer axis if it has one.
    names : tuple of str
        ``("k", "v")``, or the one of them it holds.
    """

    tensor: torch.Tensor
    layers: range
    names: tuple[str, ...]


class PagedCache:
    """K and V of every layer in blocks, for the heads of one rank.

    Parameters
    ----------
    dims : str
        Axes of a pool out of ``layer``, ``kv``, ``block``, ``token``, ``head`` and ``dim``,
        outermost first; those in parentheses are merged. Without ``kv``, K and V are pools of
        their own; without ``layer``, so is each layer.
    layers, num_blocks, block_tokens, heads, head_dim : int
        Sizes of the axes.
    dtype : torch.dtype
        Of the elements.
    device : torch.device
        Where the pools are.
    poison : int
        Byte that fills the pools.

    Raises
    ------
    ValueError
        If `dims` lacks an axis.
    """

    def __init__(
        self,
        dims: str,
        *,
        layers: int,
        num_blocks: int,
        block_tokens: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        poison: int,
    ) -> None:
        self.dims = dims
        self.num_layers = layers
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.poison = poison
        merged = [
            (group or name).split() for group, name in re.findall(r"\(([^()]*)\)|([^\s()]+)", dims)
        ]
        axes = [axis for group in merged for axis in group]
        if not {"block", "token", "head", "dim"} <= set(axes) <= {
            "layer", "kv", "block", "token", "head", "dim"
        }:  # fmt: skip
            raise ValueError(f"dims {dims!r} must name block, token, head, dim, maybe kv and layer")
        layer_sets = (
            [range(layers)] if "layer" in axes else [range(i, i + 1) for i in range(layers)]
        )
        name_sets = [NAMES] if "kv" in axes else [(name,) for name in NAMES]
        pools = []
        self._views: dict[tuple[int, str], torch.Tensor] = {}
        for held_layers in layer_sets:
            for names in name_sets:
                sizes = {
                    "layer": len(held_layers),
                    "kv": len(names),
                    "block": num_blocks,
                    "token": block_tokens,
                    "head": heads,
                    "dim": head_dim,
                }
                nbytes = int(np.prod(list(sizes.values()))) * dtype.itemsize
                memory = torch.full((nbytes,), poison, dtype=torch.uint8, device=device).view(dtype)
                shape = [int(np.prod([sizes[axis] for axis in group])) for group in merged]
                pools.append(Pool(memory.view(shape), held_layers, names))
                self._views.update(_views(memory, axes, sizes, held_layers, names))
        self.pools = tuple(pools)

    def view(self, layer: int, name: str) -> torch.Tensor:
        """K or V of one layer in place, indexed by block, token, head and dim."""
        return self._views[layer, name]

    def write(
        self, layer: int, name: str, rows: torch.Tensor, blocks: npt.NDArray[np.int32]
    ) -> None:
        """Write a sequence's rows, shaped (token, head, dim), to the positions of a block list."""
        self.view(layer, name)[self._slots(blocks, rows.shape[0])] = rows

    def read(
        self, layer: int, name: str, blocks: npt.NDArray[np.int32], tokens: int
    ) -> torch.Tensor:
        """Read the first `tokens` positions of a block list as a new (token, head, dim) tensor."""
        return self.view(layer, name)[self._slots(blocks, tokens)].contiguous()

    def untouched(self, blocks: npt.NDArray[np.int32], tokens: int) -> bool:
        """Tell whether all that is not one of the first `tokens` positions still is poison.

        The other blocks count, and so does the rest of the block list's last block.
        """
        outside = torch.ones(self.num_blocks, self.block_tokens, dtype=torch.bool)
        outside[self._slots(blocks, tokens, device="cpu")] = False
        if not outside.any():
            return True
        outside = outside.to(self.pools[0].tensor.device)
        return all(
            bool((view[outside].contiguous().view(torch.uint8) == self.poison).all())
            for view in self._views.values()
        )

    def swap_blocks(self, first: int, second: int, names: tuple[str, ...] = NAMES) -> None:
        """Exchange what two blocks hold under `names`, in every layer."""
        for (_, name), view in self._views.items():
            if name in names:
                view[[first, second]] = view[[second, first]]

    def overwrite_block(self, block: int) -> None:
        """Set every byte of one block to zero, in every layer, as if it had never arrived."""
        for view in self._views.values():
            view[block] = 0

    def _slots(
        self, blocks: npt.NDArray[np.int32], tokens: int, device: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and token inside it of the first `tokens` positions."""
        if tokens > len(blocks) * self.block_tokens:
            raise ValueError(
                f"{tokens} tokens do not fit the {len(blocks)} blocks of {self.block_tokens}"
            )
        where = device if device is not None else self.pools[0].tensor.device
        positions = np.arange(tokens)
        block = torch.from_numpy(blocks[positions // self.block_tokens].astype(np.int64))
        token = torch.from_numpy(positions % self.block_tokens)
        return block.to(where), token.to(where)


def _views(
    memory: torch.Tensor,
    axes: list[str],
    sizes: Mapping[str, int],
    layers: range,
    names: tuple[str, ...],
) -> dict[tuple[int, str], torch.Tensor]:
    """Views of one pool's memory by layer and name, each (block, token, head, dim)."""
    logical = memory.view([sizes[axis] for axis in axes])
    order = [axis for axis in ("layer", "kv", "block", "token", "head", "dim") if axis in axes]
    logical = logical.permute([axes.index(axis) for axis in order])
    for place, axis in enumerate(("layer", "kv")):
        if axis not in axes:
            logical = logical.unsqueeze(place)
    return {
        (layer, name): logical[i, j]
        for i, layer in enumerate(layers)
        for j, name in enumerate(names)
    }


def shuffled_blocks(num_blocks: int, count: int, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """Pick `count` of `num_blocks` block ids in random order: a cache that has been in use.

    Raises
    ------
    ValueError
        If there are not so many blocks.
    """
    if count > num_blocks:
        raise ValueError(f"{count} blocks wanted of a pool of {num_blocks}")
    return rng.permutation(num_blocks)[:count].astype(np.int32)
