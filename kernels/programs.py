# ruff: noqa: N803 - compile-time values are UPPER, as everywhere in Triton
# What a kernel computes with has no static types.
# mypy: ignore-errors
"""The Triton kernels: block ids to addresses in registers, and the copy fused with it.

A kernel has one argument, the upload of its launch (`kvpack.kernels.launch`): a header, the first
tile of each span, the spans, the block ids. Everything that differs from request to request is in
there, so a kernel compiles once for each of its compile-time values and never for a request.

A tile is ``BLOCK`` words of one lane. On the staging side it is contiguous; on the cache side it
crosses runs, items and blocks as it pleases. An **item** is a unit in the full form and a token
in the clipped form: the two forms then differ in nothing but the step from one item to the next.
Where a tile begins is worked out in 64 bits and once, where its words lie in 32 bits a word.
"""

import triton
import triton.language as tl

from kvpack.columns import Row, Span
from kvpack.kernels.table import DEVICE_COLUMNS, DIVISORS, HEADER_WORDS

_BASE = tl.constexpr(int(Row.BASE))
_BLOCK_STRIDE = tl.constexpr(int(Row.BLOCK_STRIDE))
_BLOCK_TOKENS = tl.constexpr(int(Row.BLOCK_TOKENS))
_TOKEN_STRIDE = tl.constexpr(int(Row.TOKEN_STRIDE))
_PHASE = tl.constexpr(int(Row.PHASE))
_STEP = tl.constexpr(int(Row.STEP))
_STRIDE0 = tl.constexpr(int(Row.STRIDE0))
_COUNT1 = tl.constexpr(int(Row.COUNT1))
_STRIDE1 = tl.constexpr(int(Row.STRIDE1))
_COUNT2 = tl.constexpr(int(Row.COUNT2))
_STRIDE2 = tl.constexpr(int(Row.STRIDE2))
_COUNT0 = tl.constexpr(int(Row.COUNT0))
_RUN_BYTES = tl.constexpr(int(Row.RUN_BYTES))
_ROW_COLUMNS = tl.constexpr(DEVICE_COLUMNS)


def _reciprocal_column(divisor: str) -> tl.constexpr:
    return tl.constexpr(len(Row) + 2 * DIVISORS.index(divisor))


_BY_RUN_BYTES = _reciprocal_column("RUN_BYTES")
_BY_RUNS = _reciprocal_column("RUNS")
_BY_COUNT2 = _reciprocal_column("COUNT2")
_BY_COUNT1 = _reciprocal_column("COUNT1")
_BY_BLOCK_TOKENS = _reciprocal_column("BLOCK_TOKENS")

# In an upload ROW and OFFSET are addresses: of the first lane's row on the device, and of its first
# byte in staging memory. For expand a span is one lane, OFFSET the address of its first output row,
# LANE_PITCH the value of the third output column.
_ROW = tl.constexpr(int(Span.ROW))
_UNIT = tl.constexpr(int(Span.UNIT))
_UNITS = tl.constexpr(int(Span.UNITS))
_TOKEN = tl.constexpr(int(Span.TOKEN))
_BLOCKS = tl.constexpr(int(Span.BLOCKS))
_OFFSET = tl.constexpr(int(Span.OFFSET))
_LANE_PITCH = tl.constexpr(int(Span.LANE_PITCH))
_UNIT_BYTES = tl.constexpr(int(Span.UNIT_BYTES))
_WIDTH = tl.constexpr(int(Span.WIDTH))
_FORM = tl.constexpr(int(Span.FORM))
_SPAN_COLUMNS = tl.constexpr(len(Span))
_HEADER_WORDS = tl.constexpr(HEADER_WORDS)

# Spans that a program compares with its tile at once.
_SPAN_GROUP = tl.constexpr(32)


@triton.jit
def _divide_long(n, reciprocal):
    """``n // divisor`` for a scalar int64, not negative."""
    multiplier = tl.load(reciprocal).to(tl.uint64, bitcast=True)
    shift = tl.load(reciprocal + 1).to(tl.uint64)
    return (tl.umulhi((n << 1).to(tl.uint64), multiplier) >> shift).to(tl.int64)


@triton.jit
def _divide(n, reciprocal):
    """``n // divisor`` for int32, not negative."""
    multiplier = tl.load(reciprocal).to(tl.uint64, bitcast=True)
    rounded = (multiplier + 0xFFFFFFFF >> 32).to(tl.uint32).to(tl.uint64)
    shift = (tl.load(reciprocal + 1) + 31).to(tl.uint64)
    return (n.to(tl.uint32).to(tl.uint64) * rounded >> shift).to(tl.int32)


@triton.jit
def _find_span(upload, tile, num_spans):
    """Index of the span that a tile belongs to: the last one that does not begin after it."""
    begun = 0
    for group in range(0, num_spans, _SPAN_GROUP):
        spans = group + tl.arange(0, _SPAN_GROUP)
        in_table = spans < num_spans
        first_tiles = tl.load(upload + _HEADER_WORDS + spans, mask=in_table, other=0)
        begun += tl.sum((in_table & (first_tiles <= tile)).to(tl.int32))
    return begun - 1


@triton.jit
def _item_step(row, span):
    """Tokens from one item to the next."""
    step = tl.load(row + _STEP)
    return tl.where(tl.load(span + _FORM) != 0, 1, step)


@triton.jit
def _first_token(row, span):
    units = tl.load(span + _UNIT) * tl.load(row + _STEP)
    return tl.load(row + _PHASE) + units + tl.load(span + _TOKEN)


@triton.jit
def _level_offset(row, run):
    """Byte offset of a run of an item, from the item's first byte; ``run`` int32."""
    q = _divide(run, row + _BY_COUNT2)
    i2 = run - q * tl.load(row + _COUNT2).to(tl.int32)
    i0 = _divide(q, row + _BY_COUNT1)
    i1 = q - i0 * tl.load(row + _COUNT1).to(tl.int32)
    offset = i0.to(tl.int64) * tl.load(row + _STRIDE0)
    offset += i1.to(tl.int64) * tl.load(row + _STRIDE1)
    return offset + i2.to(tl.int64) * tl.load(row + _STRIDE2)


@triton.jit
def _block_offset(row, block, token):
    offset = block.to(tl.int64) * tl.load(row + _BLOCK_STRIDE)
    return offset + token.to(tl.int64) * tl.load(row + _TOKEN_STRIDE)


@triton.jit
def _locate(row, span, ids, first_run):
    """Where run ``first_run`` of a lane is.

    Returns the run within its item, the token within its block (both int32), the item step
    (int32), and the pointer to its block's id.
    """
    item = _divide_long(first_run, row + _BY_RUNS)
    runs = tl.load(row + _COUNT0) * tl.load(row + _COUNT1) * tl.load(row + _COUNT2)
    run = (first_run - item * runs).to(tl.int32)
    step = _item_step(row, span)
    token = _first_token(row, span) + item * step
    entry = _divide_long(token, row + _BY_BLOCK_TOKENS)
    token_in_block = (token - entry * tl.load(row + _BLOCK_TOKENS)).to(tl.int32)
    return run, token_in_block, step.to(tl.int32), ids + (entry + tl.load(span + _BLOCKS))


@triton.jit
def _run_address(row, ids, run, token):
    """Address of run ``run`` of an item, and whether a block holds it; all scalars."""
    block = tl.load(ids)
    address = tl.load(row + _BASE) + _block_offset(row, block, token) + _level_offset(row, run)
    return address, block >= 0


@triton.jit
def _run_addresses(row, ids, run, token, step, wanted):
    """Addresses of runs counted from the first run of an item, and whether a block holds them.

    ``run`` int32 [n] from that item's first run on, ``token`` the item's token in the block whose
    id is ``ids[0]``, ``wanted`` [n].
    """
    item = _divide(run, row + _BY_RUNS)
    runs = tl.load(row + _COUNT0) * tl.load(row + _COUNT1) * tl.load(row + _COUNT2)
    run -= item * runs.to(tl.int32)
    token += item * step
    entry = _divide(token, row + _BY_BLOCK_TOKENS)
    token -= entry * tl.load(row + _BLOCK_TOKENS).to(tl.int32)
    block = tl.load(ids + entry, mask=wanted, other=-1)
    address = _block_offset(row, block, token) + _level_offset(row, run)
    return tl.load(row + _BASE) + address, block >= 0


@triton.jit
def _words(address, WIDTH: tl.constexpr):
    """Pointers to words of WIDTH bytes at ``address`` [n, 1]; 16 bytes are 8 and 8, [n, 2].

    Arithmetic on values from memory has lost their divisibility, without which no access is wider
    than an element; `tl.multiple_of` gives it back.
    """
    if WIDTH == 16:
        words = tl.multiple_of(address.to(tl.pointer_type(tl.int64)), [16, 16])
        words += tl.arange(0, 2)[None, :]
    elif WIDTH == 8:
        words = address.to(tl.pointer_type(tl.int64))
    elif WIDTH == 4:
        words = address.to(tl.pointer_type(tl.int32))
    elif WIDTH == 2:
        words = address.to(tl.pointer_type(tl.int16))
    else:
        words = address.to(tl.pointer_type(tl.int8))
    return words


@triton.jit
def _move(cache, staged, mask, SCATTER: tl.constexpr, WIDTH: tl.constexpr):
    cache = _words(cache, WIDTH)
    staged = _words(staged, WIDTH)
    if SCATTER:
        tl.store(cache, tl.load(staged, mask=mask), mask=mask)
    else:
        tl.store(staged, tl.load(cache, mask=mask), mask=mask)


@triton.jit
def _copy_tile(
    row, span, ids, lane, tile, SCATTER: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Copy words ``[tile * BLOCK, ...)`` of one lane of a span."""
    start = tile.to(tl.int64) * (BLOCK * WIDTH)
    lane_bytes = tl.load(span + _UNITS) * tl.load(span + _UNIT_BYTES)
    nbytes = tl.minimum(lane_bytes - start, BLOCK * WIDTH).to(tl.int32)
    run_bytes = tl.load(row + _RUN_BYTES).to(tl.int32)
    first_run = _divide_long(start, row + _BY_RUN_BYTES)
    into_run = (start - first_run * run_bytes).to(tl.int32)
    run, token, step, ids = _locate(row, span, ids, first_run)

    offsets = tl.arange(0, BLOCK)[:, None] * WIDTH
    wanted = offsets < nbytes
    staged = tl.load(span + _OFFSET) + lane.to(tl.int64) * tl.load(span + _LANE_PITCH) + start
    staged = staged + offsets
    if into_run + nbytes <= run_bytes:
        address, held = _run_address(row, ids, run, token)
        _move(address + into_run + offsets, staged, wanted & held, SCATTER, WIDTH)
    else:
        within = into_run + offsets
        crossed = _divide(within, row + _BY_RUN_BYTES)
        starts, holding = _run_addresses(row, ids, run + crossed, token, step, wanted)
        _move(starts + (within - crossed * run_bytes), staged, wanted & holding, SCATTER, WIDTH)


def _copy_name(specialization) -> str:
    values = specialization.constants
    return (
        f"kvpack_{'scatter' if values['SCATTER'] else 'gather'}"
        f"_{'16' if values['ONLY_16'] else 'any'}_{values['BLOCK']}"
    )


@triton.jit(repr=_copy_name)
def copy(upload, SCATTER: tl.constexpr, ONLY_16: tl.constexpr, BLOCK: tl.constexpr):
    """Copy every tile of a launch; a grid smaller than the number of tiles is persistent."""
    num_spans = tl.load(upload).to(tl.int32)
    num_tiles = tl.load(upload + 1).to(tl.int32)
    spans = upload + _HEADER_WORDS + num_spans
    ids = (spans + num_spans * _SPAN_COLUMNS).to(tl.pointer_type(tl.int32), bitcast=True)
    for launch_tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        index = _find_span(upload, launch_tile, num_spans)
        span = spans + index * _SPAN_COLUMNS
        width = tl.load(span + _WIDTH)
        lane_bytes = tl.load(span + _UNITS) * tl.load(span + _UNIT_BYTES)
        tile = launch_tile - tl.load(upload + _HEADER_WORDS + index).to(tl.int32)
        tiles = tl.cdiv(lane_bytes, width * BLOCK).to(tl.int32)
        lane = tile // tiles
        tile -= lane * tiles
        row = tl.load(span + _ROW).to(tl.pointer_type(tl.int64)) + lane * (2 * _ROW_COLUMNS)
        if ONLY_16 or width == 16:
            _copy_tile(row, span, ids, lane, tile, SCATTER, 16, BLOCK)
        elif width == 8:
            _copy_tile(row, span, ids, lane, tile, SCATTER, 8, BLOCK)
        elif width == 4:
            _copy_tile(row, span, ids, lane, tile, SCATTER, 4, BLOCK)
        elif width == 2:
            _copy_tile(row, span, ids, lane, tile, SCATTER, 2, BLOCK)
        else:
            _copy_tile(row, span, ids, lane, tile, SCATTER, 1, BLOCK)


def _expand_name(specialization) -> str:
    values = specialization.constants
    return f"kvpack_expand_{values['COLUMNS']}_{values['BLOCK']}"


@triton.jit(repr=_expand_name)
def expand(upload, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Write address and bytes of every run of a launch, tile of BLOCK runs after tile."""
    num_spans = tl.load(upload).to(tl.int32)
    num_tiles = tl.load(upload + 1).to(tl.int32)
    spans = upload + _HEADER_WORDS + num_spans
    ids = (spans + num_spans * _SPAN_COLUMNS).to(tl.pointer_type(tl.int32), bitcast=True)
    # A launch without tiles, as a warm-up is, must read no span: there is none.
    for launch_tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        index = _find_span(upload, launch_tile, num_spans)
        span = spans + index * _SPAN_COLUMNS
        row = tl.load(span + _ROW).to(tl.pointer_type(tl.int64))
        run_bytes = tl.load(row + _RUN_BYTES)

        first_run = (launch_tile - tl.load(upload + _HEADER_WORDS + index)) * BLOCK
        lane_bytes = tl.load(span + _UNITS) * tl.load(span + _UNIT_BYTES)
        num_runs = _divide_long(lane_bytes, row + _BY_RUN_BYTES) - first_run
        run, token, step, own_ids = _locate(row, span, ids, first_run)
        runs = tl.arange(0, BLOCK)
        wanted = runs < num_runs
        address, held = _run_addresses(row, own_ids, run + runs, token, step, wanted)

        out = tl.load(span + _OFFSET).to(tl.pointer_type(tl.int64)) + (first_run + runs) * COLUMNS
        tl.store(out, tl.where(held, address, 0), mask=wanted)
        tl.store(out + 1, tl.where(held, run_bytes, 0), mask=wanted)
        if COLUMNS == 3:
            tl.store(out + 2, tl.load(span + _LANE_PITCH), mask=wanted)
