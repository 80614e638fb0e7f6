"""Digests of cache rows in sequence order: what proves that bytes landed where they belong.

Equal tokens prove little: keys are cached after rotation and attention does not see the order of
its cache, so two swapped blocks decode alike. Rows are therefore compared byte for byte, by a
digest of every layer, tensor, head and position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvpack.demo.paging import NAMES

__all__ = ["Mismatch", "ShardDigests", "compare", "digest_rows"]

_DIGEST_BYTES = 8


@dataclass(frozen=True)
class ShardDigests:
    """Digests of the rows that one rank holds of a request.

    Parameters
    ----------
    first_head : int
        Global index of the first head.
    values : numpy.ndarray
        uint64, shaped (layer, tensor, head, position), the tensors in the order of `NAMES`.
    """

    first_head: int
    values: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Mismatch:
    """How much differs, and where it begins.

    Parameters
    ----------
    rows, total_rows : int
        Rows that differ, out of how many.
    layer, name, head, position
        The first one that differs; `head` counts over all ranks.
    """

    rows: int
    total_rows: int
    layer: int
    name: str
    head: int
    position: int

    def __str__(self) -> str:
        return (
            f"{self.rows} of {self.total_rows} rows differ, the first in layer {self.layer}, "
            f"tensor {self.name}, head {self.head}, position {self.position}"
        )


def digest_rows(rows: torch.Tensor) -> npt.NDArray[np.uint64]:
    """Digest each row of a (token, head, dim) tensor.

    Parameters
    ----------
    rows : torch.Tensor
        On any device, of any dtype.

    Returns
    -------
    numpy.ndarray
        uint64, shaped (head, token): BLAKE2b of each row's bytes.
    """
    tokens, heads, dim = rows.shape
    row_bytes = dim * rows.element_size()
    data = rows.transpose(0, 1).contiguous().cpu().view(torch.uint8).numpy().tobytes()
    digests = b"".join(
        hashlib.blake2b(data[start : start + row_bytes], digest_size=_DIGEST_BYTES).digest()
        for start in range(0, len(data), row_bytes)
    )
    return np.frombuffer(digests, dtype=np.uint64).reshape(heads, tokens)


def compare(sent: Sequence[ShardDigests], received: Sequence[ShardDigests]) -> Mismatch | None:
    """Compare what all senders sent with what all receivers got, head by head.

    Parameters
    ----------
    sent, received : sequence of ShardDigests
        The shards of each side; together they hold every head.

    Returns
    -------
    Mismatch or None
        None where every row is equal.

    Raises
    ------
    ValueError
        If a side's shards do not tile the heads, or the sides differ in shape.
    """
    expected, actual = _join(sent), _join(received)
    if expected.shape != actual.shape:
        raise ValueError(f"shapes differ: sent {expected.shape}, received {actual.shape}")
    differing = np.argwhere(expected != actual)
    if not len(differing):
        return None
    layer, tensor, head, position = (int(index) for index in differing[0])
    return Mismatch(len(differing), expected.size, layer, NAMES[tensor], head, position)


def _join(shards: Sequence[ShardDigests]) -> npt.NDArray[np.uint64]:
    ordered = sorted(shards, key=lambda shard: shard.first_head)
    head = 0
    for shard in ordered:
        if shard.first_head != head:
            raise ValueError(f"a shard begins at head {shard.first_head} instead of {head}")
        head += shard.values.shape[2]
    return np.concatenate([shard.values for shard in ordered], axis=2)
