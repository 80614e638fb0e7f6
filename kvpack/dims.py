"""Dims strings: one line that says which axis of a tensor means what, as einops would write it.

``"kv block token head dim"`` names the axes of a tensor from the outermost to the innermost.
Parentheses say that one axis of the tensor holds several, the last of them fastest:
``"(block token) head dim"`` is a token pool, ``"block head token (kv dim)"`` keeps K and V side by
side in a token's row. An axis of size one that means nothing is written ``1``.

The names ``block``, ``token``, ``slot``, ``layer``, ``kv`` and ``head`` are kvpack's. A tensor has
blocks of tokens, or slots: one for the state of each request (``"slot head dim state"``). Every
other name is an inner axis, in the order in which its elements are counted (``dim``, ``bytes``, or
``hi`` and ``lo`` of a vectorised head). Two sides may cut their inner axes differently as long as
the product agrees.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvpack.errors import LayoutError

ADDRESSING_AXES = ("block", "token", "slot", "layer", "kv", "head")

_ITEM = re.compile(r"\(([^()]*)\)|([^\s()]+)")
_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


@dataclass(frozen=True)
class Axis:
    """A logical axis: how many elements it has and how far apart they lie.

    Attributes
    ----------
    count : int
        Number of elements, at least 1.
    stride : int
        Distance between two neighbours, in the unit that the reader of the dims string was given.
    """

    count: int
    stride: int


def parse_dims(dims: str) -> tuple[tuple[str, ...], ...]:
    """Split a dims string into the logical axes of each tensor axis, outermost first.

    Parameters
    ----------
    dims : str
        For example ``"(block token) head dim"``.

    Returns
    -------
    tuple of tuple of str
        One tuple per tensor axis; ``()`` stands for an axis written ``1``.

    Raises
    ------
    LayoutError
        If the string is empty, parentheses do not match, a name is malformed or stands twice.
    """
    leftover = _ITEM.sub("", dims).strip()
    if leftover or not dims.strip():
        raise LayoutError(
            f"dims string {dims!r} is malformed near {leftover!r}; write axis names separated by "
            "spaces, with one level of parentheses, as in '(block token) head dim'"
        )
    axes = tuple(
        tuple(name for name in (m[1] if m[1] is not None else m[2]).split() if name != "1")
        for m in _ITEM.finditer(dims)
    )
    names = [name for axis in axes for name in axis]
    for name in names:
        if not _NAME.match(name):
            raise LayoutError(
                f"axis name {name!r} in dims string {dims!r} is malformed; use lower-case letters, "
                "digits and underscores"
            )
        if names.count(name) > 1:
            raise LayoutError(f"axis {name!r} stands more than once in dims string {dims!r}")
    return axes


def logical_axes(
    dims: str, shape: Sequence[int], strides: Sequence[int], sizes: Mapping[str, int]
) -> dict[str, Axis]:
    """Give every logical axis of a dims string its count and stride.

    Parameters
    ----------
    dims : str
        The dims string.
    shape, strides : sequence of int
        Of the tensor, outermost axis first, one entry per tensor axis. The strides' unit is kept.
    sizes : mapping of str to int
        Sizes that are known beforehand (``kv``, ``layer``, ``head``, ``token``). They are checked,
        and they let a group of axes in parentheses leave one size open.

    Returns
    -------
    dict of str to Axis
        In the order of the dims string.

    Raises
    ------
    LayoutError
        If the number of axes or a size does not agree with the tensor.
    """
    axes = parse_dims(dims)
    if len(axes) != len(shape):
        raise LayoutError(
            f"dims string {dims!r} names {len(axes)} axes, but the tensor has {len(shape)} "
            f"(shape {tuple(shape)})"
        )
    found: dict[str, Axis] = {}
    for position, (names, length, stride) in enumerate(zip(axes, shape, strides, strict=True)):
        counts = _split(dims, position, names, length, sizes)
        inner = stride
        for name, count in reversed(list(zip(names, counts, strict=True))):
            found[name] = Axis(count, inner)
            inner *= count
    return {name: found[name] for names in axes for name in names}


def _split(
    dims: str, position: int, names: tuple[str, ...], length: int, sizes: Mapping[str, int]
) -> list[int]:
    """Sizes of the logical axes that share one tensor axis of the given length."""
    if not names:
        if length != 1:
            raise LayoutError(f"axis {position} of {dims!r} is written 1 but has size {length}")
        return []
    unknown = [name for name in names if name not in sizes]
    known = 1
    for name in names:
        known *= sizes.get(name, 1)
    if len(unknown) > 1:
        raise LayoutError(
            f"the sizes of {' and '.join(unknown)} in axis {position} of {dims!r} cannot both be "
            "worked out; declare all but one of them (block_tokens=..., heads=...)"
        )
    if known < 1 or length % known or (not unknown and length != known):
        declared = ", ".join(f"{n}={sizes[n]}" for n in names if n in sizes)
        raise LayoutError(
            f"axis {position} of {dims!r} has size {length}, which does not agree with the "
            f"declared {declared}"
        )
    return [sizes.get(name, length // known) for name in names]
