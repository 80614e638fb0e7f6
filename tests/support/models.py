"""Random models: which cache tensors there are, and what one request's cache holds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

HEADED = (
    "kv block token head dim",
    "block kv token head dim",
    "block kv head token dim",
    "kv block head token dim",
    "block layer kv head token dim",
    "block layer kv token head dim",
    "layer kv block token head dim",
    "layer block kv head token dim",
    "block token layer kv head dim",
    "block token head dim",
    "block head token dim",
    "layer block head token dim",
    "(block token) head dim",
    "(block token) layer kv head dim",
    "layer kv (block token) head dim",
    "block head token (kv dim)",
    "block token head (kv dim)",
    "block head dim token",
    "block head hi token lo",
)
HEADLESS = (
    "block token dim",
    "layer block token dim",
    "block layer token dim",
    "block token layer dim",
    "(block token) dim",
    "block 1 token hi lo",
)
STATES_HEADED = (
    "slot head dim",
    "slot head hi lo",
    "slot dim head",
    "layer slot head dim",
    "slot layer head dim",
    "layer slot hi head lo",
    "slot (head dim)",
    "layer slot (head hi) lo",
)
STATES_HEADLESS = ("slot dim", "slot hi lo", "layer slot dim", "slot layer hi lo", "1 slot dim")
BLOCK_TOKENS = (1, 2, 3, 4, 8, 16, 32, 48)
DTYPES = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


@dataclass(frozen=True)
class Kind:
    """Cache tensors of one shape: their layers, names, heads (0: no head axis) and inner size.

    A ``window`` keeps the last positions, ``state`` is one slot a request, ``optional`` tensors may
    be on one side only, and kinds of one ``page`` may share a block's (or a slot's) bytes, one
    after another, as data and scales or the sections of a convolution's state do.
    """

    layers: tuple[int, ...]
    names: tuple[str, ...]
    heads: int
    dim: int
    item_bytes: int
    window: int | None = None
    state: bool = False
    optional: bool = False
    page: str = ""

    @property
    def keys(self) -> set[tuple[int, str]]:
        """(layer, name) of each of its tensors."""
        return {(layer, name) for layer in self.layers for name in self.names}


@dataclass(frozen=True)
class Model:
    """What one request's cache holds.

    ``values[layer, name]`` has the shape (tokens, heads, dim).
    """

    kinds: tuple[Kind, ...]
    tokens: int
    values: dict[tuple[int, str], np.ndarray]

    @staticmethod
    def of(kinds: Sequence[Kind], tokens: int, seed: int = 0) -> Model:
        """Fill the tensors of the given kinds with noise."""
        noise = np.random.default_rng(seed)
        values = {
            (layer, name): noise.integers(
                0, 1 << (8 * kind.item_bytes), (tokens, kind.heads or 1, kind.dim),
                dtype=DTYPES[kind.item_bytes],
            )
            for kind in kinds
            for layer in kind.layers
            for name in kind.names
        }  # fmt: skip
        return Model(tuple(kinds), tokens, values)

    @staticmethod
    def random(rng: random.Random) -> Model:
        """Layers of one to three sorts, and now and then something beside them."""
        count = rng.randint(1, 4)
        cuts = sorted(rng.choices(range(1, count + 1), k=rng.choice((0, 0, 1, 2))))
        parts = [range(*ends) for ends in zip([0, *cuts], [*cuts, count], strict=True)]
        tokens = rng.randint(1, 120)
        kinds = [
            kind for layers in parts if layers for kind in Model._sort(rng, tuple(layers), tokens)
        ]
        first = kinds[0].layers
        if rng.random() < 0.15:
            item, dim = rng.choice((1, 2)), rng.choice((4, 9, 132))
            kinds.append(Kind(first, ("index_k",), 0, dim, item))
        if rng.random() < 0.2:
            draft = replace(Model._attention(rng, first), names=("draft_k", "draft_v"))
            kinds.append(replace(draft, heads=draft.heads or 2, optional=True))
        return Model.of(kinds, tokens, rng.getrandbits(32))

    @staticmethod
    def _sort(rng: random.Random, layers: tuple[int, ...], tokens: int) -> list[Kind]:
        """The kinds of some layers: attention, a window of it, data with scales, or state."""
        draw = rng.random()
        if draw < 0.2:
            return Model._state(rng, layers)
        window = rng.choice((None, None, rng.randint(1, tokens + 3)))
        if draw < 0.35:
            page, item = f"page{layers[0]}", rng.choice((1, 2))
            data = Kind(layers, ("kv",), 0, rng.choice((8, 32)), item, window, page=page)
            return [data, replace(data, names=("kv_scale",), dim=rng.choice((1, 2)), item_bytes=4)]
        return [replace(Model._attention(rng, layers), window=window)]

    @staticmethod
    def _attention(rng: random.Random, layers: tuple[int, ...]) -> Kind:
        item = rng.choice((1, 2, 4, 8))
        if rng.random() < 0.2:
            return Kind(layers, ("kv",), 0, rng.choice((5, 8, 18, 36, 656)), item)
        heads = rng.choice((1, 2, 3, 4, 6, 8))
        return Kind(layers, ("k", "v"), heads, rng.choice((2, 3, 4, 6, 8, 16)), item)

    @staticmethod
    def _state(rng: random.Random, layers: tuple[int, ...]) -> list[Kind]:
        """SSM state by heads, and the convolution's in three sections, of 24 bytes for one."""
        heads, groups = rng.choice((1, 2, 4, 6)), rng.choice((1, 2))
        item, page = rng.choice((1, 2, 4)), f"conv{layers[0]}"
        ssm = Kind(layers, ("ssm",), heads, rng.choice((4, 8, 24)), rng.choice((2, 4)), 1, True)
        sections = [("conv.x", heads, 8), ("conv.B", groups, 24 // item), ("conv.C", 0, 24 // item)]
        return [ssm] + [
            Kind(layers, (name,), count, dim, item, 1, True, page=page)
            for name, count, dim in sections[: rng.choice((0, 1, 3))]
        ]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return 1 + max(layer for kind in self.kinds for layer in kind.layers)
