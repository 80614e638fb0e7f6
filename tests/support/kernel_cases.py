"""Random lane tables, spans and memory for the kernels, and where every byte of them belongs.

Made from the kernels' input format alone, not by the planner, so that forms no layout of today
needs are covered too. The oracle walks the addressing formula of `kvpack.columns` byte by byte.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpack.columns import Row, Span

LEVELS = ((Row.COUNT0, Row.STRIDE0), (Row.COUNT1, Row.STRIDE1), (Row.COUNT2, Row.STRIDE2))
ALIGNMENT = 256


@dataclass(frozen=True)
class Sizes:
    """Upper bounds of a random case."""

    lanes: int = 4
    blocks: int = 6
    run_words: int = 24
    classes: int = 3
    word_bytes: tuple[int, ...] = (1, 2, 4, 8, 16)


@dataclass
class Case:
    """A launch over pools of memory that have no addresses yet.

    ``rows`` has offsets into the pool ``pool_of_row`` in its BASE column.
    """

    rows: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, len(Row)), np.int64))
    pool_of_row: list[int] = field(default_factory=list)
    pool_bytes: list[int] = field(default_factory=list)
    spans: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, len(Span)), np.int64))
    blocks: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    staging_bytes: int = 0

    def table(self, addresses: list[int]) -> npt.NDArray[np.int64]:
        """Lane table over pools at these addresses."""
        table = self.rows.copy()
        table[:, Row.BASE] += np.array(addresses, np.int64)[self.pool_of_row]
        return table

    def places(self) -> list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Pool, offsets in it and offsets in staging of the bytes of each lane of each span."""
        out = []
        for span in self.spans.tolist():
            for lane in range(span[Span.LANES]):
                r = self.rows[span[Span.ROW] + 2 * lane].tolist()
                e = np.arange(span[Span.UNITS] * span[Span.UNIT_BYTES])
                unit, w = np.divmod(e, span[Span.UNIT_BYTES])
                t = r[Row.PHASE] + (span[Span.UNIT] + unit) * r[Row.STEP] + span[Span.TOKEN]
                block = self.blocks[t // r[Row.BLOCK_TOKENS] + span[Span.BLOCKS]].astype(np.int64)
                q, o = np.divmod(w, r[Row.RUN_BYTES])
                q, i2 = np.divmod(q, r[Row.COUNT2])
                q, i1 = np.divmod(q, r[Row.COUNT1])
                token, i0 = np.divmod(q, r[Row.COUNT0])
                cache = r[Row.BASE] + block * r[Row.BLOCK_STRIDE] + o
                cache += (t % r[Row.BLOCK_TOKENS] + token) * r[Row.TOKEN_STRIDE]
                cache += i0 * r[Row.STRIDE0] + i1 * r[Row.STRIDE1] + i2 * r[Row.STRIDE2]
                staged = span[Span.OFFSET] + lane * span[Span.LANE_PITCH] + e
                held = block >= 0
                pool = self.pool_of_row[span[Span.ROW] + 2 * lane]
                out.append((pool, cache[held], staged[held]))
        return out

    def runs(self) -> list[tuple[int, int, int]]:
        """Pool, offset and bytes of each run in wire order, each (-1, 0, 0) without a block."""
        pieces = []
        for span in self.spans.tolist():
            for lane in range(span[Span.LANES]):
                r = self.rows[span[Span.ROW] + 2 * lane].tolist()
                pool = self.pool_of_row[span[Span.ROW] + 2 * lane]
                piece = []
                for e in range(0, span[Span.UNITS] * span[Span.UNIT_BYTES], r[Row.RUN_BYTES]):
                    unit, w = divmod(e, span[Span.UNIT_BYTES])
                    t = r[Row.PHASE] + (span[Span.UNIT] + unit) * r[Row.STEP] + span[Span.TOKEN]
                    block = int(self.blocks[t // r[Row.BLOCK_TOKENS] + span[Span.BLOCKS]])
                    q = w // r[Row.RUN_BYTES]
                    q, i2 = divmod(q, r[Row.COUNT2])
                    q, i1 = divmod(q, r[Row.COUNT1])
                    token, i0 = divmod(q, r[Row.COUNT0])
                    at = r[Row.BASE] + block * r[Row.BLOCK_STRIDE]
                    at += (t % r[Row.BLOCK_TOKENS] + token) * r[Row.TOKEN_STRIDE]
                    at += i0 * r[Row.STRIDE0] + i1 * r[Row.STRIDE1] + i2 * r[Row.STRIDE2]
                    piece.append((pool, at, r[Row.RUN_BYTES]) if block >= 0 else (-1, 0, 0))
                pieces.append((span[Span.OFFSET] + lane * span[Span.LANE_PITCH], piece))
        pieces.sort(key=lambda p: p[0])
        return [run for _, piece in pieces for run in piece]


def random_case(seed: int, sizes: Sizes = Sizes(), *, holes: bool = False) -> Case:
    """Make a case of one or more lane classes; with `holes` some blocks hold nothing."""
    rng = random.Random(seed)
    case = Case()
    for _ in range(rng.randint(1, sizes.classes)):
        _add_class(case, rng, sizes, holes)
    # Whatever lies behind the chunk must stay as it is.
    case.staging_bytes += rng.choice((0, 1, 300))
    return case


def large_case(seed: int, token_bytes: int, tokens: int, block_tokens: int, lanes: int = 1) -> Case:
    """Make a case of whole blocks of one run each, as the latent of MLA is."""
    rng = random.Random(seed)
    case = Case()
    units = tokens // block_tokens
    axes = _Axes(block_tokens, (), token_bytes, token_bytes, "blocks first", padding=0)
    _add_lanes(case, rng, axes, block_tokens, 0, block_tokens, lanes, units + 2, False)
    _add_spans(case, rng, 0, lanes, block_tokens, token_bytes, 0, tokens, 0, 16)
    ids = rng.sample(range(units + 2), units + 1)
    case.blocks = np.array(ids, np.int32)
    return case


def many_spans_case(seed: int, classes: int) -> Case:
    """Make a case of many small lane classes."""
    rng = random.Random(seed)
    case = Case()
    for _ in range(classes):
        _add_class(case, rng, Sizes(lanes=2, blocks=2, run_words=4), holes=False)
    return case


def far_case() -> Case:
    """Make a case, for `expand` alone, of strides, ids and tokens that need 64 bits."""
    case = Case(pool_of_row=[0, 0], pool_bytes=[0], staging_bytes=1 << 40)
    unit = 3 << 32
    columns = {
        Row.BLOCK_STRIDE: 5 << 28,
        Row.BLOCK_TOKENS: 48,
        Row.TOKEN_STRIDE: 1 << 24,
        Row.PHASE: 16,
        Row.STEP: 48,
        Row.COUNT0: 2,
        Row.STRIDE0: -(3 << 33),
        Row.COUNT1: 1,
        Row.COUNT2: 16,
        Row.STRIDE2: 1 << 24,
        Row.RUN_BYTES: 24,
        Row.TOKEN_BYTES: 48,
    }
    case.rows = np.zeros((2, len(Row)), np.int64)
    for column, value in columns.items():
        case.rows[:, column] = value
    case.rows[1, Row.COUNT2] = 1
    ids = np.random.default_rng(0).integers(0, 1 << 31, 40, np.int32)
    case.blocks = ids
    full = [0, 1, unit, 39, 0, 16, -unit, (1 << 33) + 8, 0, 16 * 48, 8, 0]
    clipped = [1, 1, unit + 39, 1, 3, 11, -unit, (1 << 33) + 8 + 39 * 16 * 48, 0, 11 * 48, 8, 1]
    case.spans = np.array([clipped, full], np.int64)
    return case


@dataclass(frozen=True)
class _Axes:
    """One lane's token: levels around a run, and how tokens and blocks lie in memory."""

    block_tokens: int
    levels: tuple[int, ...]
    run_bytes: int
    word_bytes: int
    order: str
    padding: int

    @property
    def token_bytes(self) -> int:
        return prod(self.levels) * self.run_bytes


def _add_class(case: Case, rng: random.Random, sizes: Sizes, holes: bool) -> None:
    word = rng.choice(sizes.word_bytes)
    unit_tokens = rng.choice((1, 1, 2, 3, 4, 5, 8, 16))
    units_a_block = rng.choice((1, 1, 2, 3))
    block_tokens = unit_tokens * units_a_block
    if rng.random() < 0.6:
        # Units follow each other, perhaps with a stride as context parallelism has.
        step = unit_tokens * rng.choice((1, 1, 1, 2, 3))
        phase = unit_tokens * rng.randint(0, 3)
    else:
        # Units lie at one place of every block, or of every second.
        step = block_tokens * rng.choice((1, 2))
        phase = rng.randint(0, block_tokens - unit_tokens)
    axes = _Axes(
        block_tokens,
        tuple(rng.randint(1, 4) for _ in range(rng.randint(0, 2))),
        word * rng.randint(1, sizes.run_words),
        word,
        rng.choice(("blocks first", "lanes first", "tokens last")),
        rng.choice((0, 0, 1, 3)) * word,
    )
    lanes = rng.randint(1, sizes.lanes)
    first_unit = rng.randint(0, 3)
    first = first_unit * unit_tokens + rng.choice((0, rng.randint(0, unit_tokens - 1)))
    tokens = rng.choice((1, rng.randint(1, max(1, sizes.blocks * block_tokens - unit_tokens))))
    # In local tokens: what the class touches, hence which ids it needs.
    last_unit = (first + tokens - 1) // unit_tokens
    while (phase + last_unit * step) // block_tokens >= 4 * sizes.blocks:
        tokens = max(1, tokens // 2)
        last_unit = (first + tokens - 1) // unit_tokens
        if tokens == 1:
            break
    entry0 = (phase + first // unit_tokens * step) // block_tokens
    entries = (phase + last_unit * step) // block_tokens - entry0 + 1
    num_blocks = entries + rng.randint(0, 3)
    first_row = len(case.rows)
    _add_lanes(case, rng, axes, unit_tokens, phase, step, lanes, num_blocks, True)
    ids = rng.sample(range(num_blocks), entries)
    if holes:
        ids = [-1 if rng.random() < 0.3 else i for i in ids]
    offset = len(case.blocks) - entry0
    case.blocks = np.concatenate([case.blocks, np.array(ids, np.int32)])
    align = rng.choice((16, word))
    _add_spans(
        case, rng, first_row, lanes, unit_tokens, axes.token_bytes, first, tokens, offset, align
    )


def _add_lanes(
    case: Case,
    rng: random.Random,
    axes: _Axes,
    unit_tokens: int,
    phase: int,
    step: int,
    lanes: int,
    num_blocks: int,
    odd: bool,
) -> None:
    """Lay the lanes of a class out in new pools and add their rows."""
    names = {"block": num_blocks, "lane": lanes, "token": axes.block_tokens}
    names |= {f"level{i}": count for i, count in enumerate(axes.levels)}
    inner = [f"level{i}" for i in range(len(axes.levels))]
    if axes.order == "tokens last":
        order = ["lane", "block", *inner, "token"]
    elif axes.order == "lanes first":
        order = ["lane", "block", "token", *rng.sample(inner, len(inner))]
    else:
        order = ["block", "lane", *rng.sample(["token", *inner], 1 + len(inner))]
    own_pools = order[0] == "lane" and rng.random() < 0.5
    strides, size = {}, axes.run_bytes
    for name in reversed(order):
        if name in ("block", "lane"):
            size += axes.padding
        strides[name] = size
        size *= 1 if own_pools and name == "lane" else names[name]
    flipped = rng.choice(inner) if odd and inner and rng.random() < 0.3 else None
    start = rng.choice((0, 1, 5)) * axes.word_bytes if odd else 0
    for lane in range(lanes):
        if own_pools or lane == 0:
            case.pool_bytes.append(start + size + rng.choice((0, 7)))
        base = start + (0 if own_pools else lane * strides["lane"])
        levels = [(count, strides[n]) for n, count in zip(inner, axes.levels, strict=True)]
        if flipped is not None:
            at = inner.index(flipped)
            count, stride = levels[at]
            base += (count - 1) * stride
            levels[at] = (count, -stride)
        shared = {
            Row.BASE: base,
            Row.BLOCK_STRIDE: strides["block"],
            Row.BLOCK_TOKENS: axes.block_tokens,
            Row.TOKEN_STRIDE: strides["token"],
            Row.PHASE: phase,
            Row.STEP: step,
            Row.TOKEN_BYTES: axes.token_bytes,
        }
        token_level = (unit_tokens, strides["token"])
        if not levels and strides["token"] == axes.run_bytes:
            full = _levels([], axes.run_bytes * unit_tokens)
        else:
            # Any order will do as long as every lane and both sides have the same.
            full = _levels([*levels, token_level], axes.run_bytes)
        rows = np.zeros((2, len(Row)), np.int64)
        for row, form in zip(rows, (full, _levels(levels, axes.run_bytes)), strict=True):
            for column, value in (shared | form).items():
                row[column] = value
        case.rows = np.concatenate([case.rows, rows])
        case.pool_of_row += [len(case.pool_bytes) - 1] * 2


def _levels(levels: list[tuple[int, int]], run_bytes: int) -> dict[Row, int]:
    """Columns of up to three levels, the innermost last."""
    padded = [(1, 0)] * (3 - len(levels)) + levels
    columns = {Row.RUN_BYTES: run_bytes}
    for (count, stride), (count_column, stride_column) in zip(padded, LEVELS, strict=True):
        columns |= {count_column: count, stride_column: stride if count > 1 else 0}
    return columns


def _add_spans(
    case: Case,
    rng: random.Random,
    first_row: int,
    lanes: int,
    unit_tokens: int,
    token_bytes: int,
    first: int,
    tokens: int,
    block_offset: int,
    align: int,
) -> None:
    """Cut ``tokens`` tokens of all lanes, from ``first`` on, into clipped, full, clipped spans."""
    start = -(-case.staging_bytes // align) * align
    pitch = tokens * token_bytes
    cuts, token = [], first
    while token < first + tokens:
        unit, inside = divmod(token, unit_tokens)
        whole = (first + tokens) // unit_tokens - unit
        if inside or not whole:
            units, count = 1, min(unit_tokens - inside, first + tokens - token)
        else:
            units, count = whole, unit_tokens
        cuts.append((unit, units, inside, count, token - first))
        token += units * count
    spans = []
    for unit, units, inside, count, before in cuts:
        full = count == unit_tokens
        rows = case.rows[first_row + (0 if full else 1) : first_row + 2 * lanes : 2]
        span = {
            Span.ROW: first_row + (0 if full else 1),
            Span.LANES: lanes,
            Span.UNIT: unit,
            Span.UNITS: units,
            Span.TOKEN: inside,
            Span.TOKENS: count,
            Span.BLOCKS: block_offset,
            Span.OFFSET: start + before * token_bytes,
            Span.LANE_PITCH: pitch if lanes > 1 else 0,
            Span.UNIT_BYTES: count * token_bytes,
            Span.FORM: 0 if full else 1,
        }
        columns = [Row.BASE, Row.BLOCK_STRIDE, Row.TOKEN_STRIDE, Row.RUN_BYTES]
        columns += [stride for _, stride in LEVELS]
        addresses = np.abs(rows[:, columns]).reshape(-1).tolist()
        staged = (span[Span.OFFSET], span[Span.LANE_PITCH], span[Span.UNIT_BYTES])
        span[Span.WIDTH] = gcd(16, *addresses, *staged)
        spans.append([span[column] for column in Span])
    case.spans = np.concatenate([case.spans, np.array(spans, np.int64).reshape(-1, len(Span))])
    case.staging_bytes = start + lanes * pitch


class HostMemory:
    """Aligned host memory, filled with noise, for the pools or the staging of a case."""

    def __init__(self, nbytes: int, rng: np.random.Generator) -> None:
        raw = rng.integers(0, 256, nbytes + ALIGNMENT, np.uint8)
        skip = -raw.ctypes.data % ALIGNMENT
        self.array = raw[skip : skip + nbytes]

    @property
    def address(self) -> int:
        return int(self.array.ctypes.data)


Copy = Callable[..., None]


def check_gather(case: Case, seed: int, gather: Copy, device: str = "cpu", **options: Any) -> None:
    """Run `gather` on noise and compare all of staging with the oracle's."""
    pools, staging, place = _memory(case, seed)
    expected = staging.array.copy()
    for pool, cache, staged in case.places():
        expected[staged] = pools[pool].array[cache]
    kept = [pool.array.copy() for pool in pools]
    placed = place(device)
    gather(case.table(placed.addresses), case.spans, case.blocks, placed.staging, **options)
    np.testing.assert_array_equal(placed.read_staging(), expected)
    for pool, before in zip(placed.read_pools(), kept, strict=True):
        np.testing.assert_array_equal(pool, before)


def check_scatter(
    case: Case, seed: int, scatter: Copy, device: str = "cpu", **options: Any
) -> None:
    """Run `scatter` on noise and compare every pool with the oracle's."""
    pools, staging, place = _memory(case, seed)
    expected = [pool.array.copy() for pool in pools]
    for pool, cache, staged in case.places():
        expected[pool][cache] = staging.array[staged]
    kept = staging.array.copy()
    placed = place(device)
    scatter(case.table(placed.addresses), case.spans, case.blocks, placed.staging, **options)
    for got, wanted in zip(placed.read_pools(), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(placed.read_staging(), kept)


def check_expand(case: Case, expand: Callable[..., Any], **options: Any) -> None:
    """Compare `expand`'s rows with the oracle's, over pools far apart beyond 2**40."""
    addresses = [(1 << 40) + (i << 36) for i in range(len(case.pool_bytes))]
    got = np.asarray(expand(case.table(addresses), case.spans, case.blocks, **options))
    wanted = [(addresses[p] + at if p >= 0 else 0, n) for p, at, n in case.runs()]
    np.testing.assert_array_equal(got, np.array(wanted, np.int64).reshape(-1, 2))


@dataclass
class _Placed:
    addresses: list[int]
    staging: Any
    read_staging: Callable[[], npt.NDArray[np.uint8]]
    read_pools: Callable[[], list[npt.NDArray[np.uint8]]]


def _memory(case: Case, seed: int) -> tuple[list[HostMemory], HostMemory, Callable[[str], _Placed]]:
    rng = np.random.default_rng(seed)
    pools = [HostMemory(nbytes, rng) for nbytes in case.pool_bytes]
    staging = HostMemory(case.staging_bytes, rng)

    def place(device: str) -> _Placed:
        if device == "cpu":
            return _Placed(
                [pool.address for pool in pools],
                staging.array,
                lambda: staging.array,
                lambda: [pool.array for pool in pools],
            )
        import torch

        on_gpu = [torch.from_numpy(pool.array).to(device) for pool in pools]
        staged = torch.from_numpy(staging.array).to(device)
        return _Placed(
            [tensor.data_ptr() for tensor in on_gpu],
            staged,
            lambda: staged.cpu().numpy(),
            lambda: [tensor.cpu().numpy() for tensor in on_gpu],
        )

    return pools, staging, place
