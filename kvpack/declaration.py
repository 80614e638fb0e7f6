"""Declarations of topologies: TOML files and option strings, read strictly.

A file names the model, the request and the two sides. Everything but ``shape`` has a default::

    shape = "qwen3-235b"        # a name of kvpack.shapes.MODELS, or [[shape]] tables as below
    dtype = "fp8"               # fp8, bf16, fp16 or fp32
    tokens = 8192               # length of the prompt
    first = 0                   # positions below it are on the decode side already
    stream_layers = false       # true: each layer leaves when it is computed
    block = 32                  # tokens of a block on both sides, unless a side has its own

    [prefill]
    tp = 4                      # also pp, cp, dp, dcp, attention_dp, interleave, numbering,
    pp = 2                      # and an uneven pipeline split:
    layers = [50, 44]
    layout = "hnd"              # a name of kvpack.shapes.ENGINE_LAYOUTS, or a dims string

    [decode]
    tp = 16
    attention_dp = true
    layout = "block kv head token dim"
    latent_layout = "block token dim"   # dims string of rows without heads

A model of one's own is a table for each kind of cache tensor::

    [[shape]]
    names = ["k", "v"]
    layers = 24                 # or a list of layer ids
    heads = 8                   # left out: rows that no rank divides, as MLA's
    dim = 128                   # elements of a row; or bytes = 656 for opaque rows
    window = 1024               # left out: all tokens are kept
    only = "decode"             # left out: both sides have it

    [[shape]]
    names = ["ssm"]
    layers = [1, 3, 5]
    heads = 32
    bytes = 65536
    state = true                # one row a request, not one a token
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from kvpack.errors import OptionsError
from kvpack.parallel import Parallelism
from kvpack.shapes import ENGINE_LAYOUTS, MODELS, EngineLayout, ModelShape, TensorKind
from kvpack.topology import Deployment, Topology

__all__ = ["load_topology", "read_parallelism", "read_topology"]

_DEFAULT_BLOCK_TOKENS = 16
_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class _Kind(msgspec.Struct):
    names: tuple[str, ...]
    layers: int | tuple[int, ...]
    heads: int | None = None
    dim: int | None = None
    bytes: int | None = None
    window: int | None = None
    state: bool = False
    only: Literal["prefill", "decode"] | None = None


class _Side(msgspec.Struct):
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int | None = None
    dcp: int = 1
    attention_dp: bool = False
    layers: tuple[int, ...] = ()
    interleave: int | None = None
    numbering: str = "trtllm"
    layout: str = "hnd"
    latent_layout: str | None = None
    block: int | None = None


class _File(msgspec.Struct):
    shape: str | tuple[dict[str, Any], ...]
    dtype: str = "bf16"
    first: int = 0
    tokens: int = 8192
    stream_layers: bool = False
    seed: int = 0
    block: int | None = None
    prefill: dict[str, Any] = {}
    decode: dict[str, Any] = {}


_PARALLELISM = tuple(field.name for field in dataclasses.fields(Parallelism))


def load_topology(path: Path) -> Topology:
    """Read a topology from a TOML file.

    Parameters
    ----------
    path : Path
        The file; the module says what it holds.

    Raises
    ------
    OptionsError
        Naming the file, the key and what is allowed.
    """
    try:
        table = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise OptionsError(f"cannot read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise OptionsError(f"{path} is not TOML: {error}") from None
    try:
        return read_topology(table)
    except OptionsError as error:
        raise OptionsError(f"{path}: {error}") from None


def read_topology(table: Mapping[str, Any], *, strict: bool = True) -> Topology:
    """Read a topology from what a TOML file holds.

    Parameters
    ----------
    table : mapping
        As the module says.
    strict : bool
        False also takes numbers and booleans that are written as strings.

    Raises
    ------
    OptionsError
        Naming the key, its value and what is allowed.
    """
    file = _convert(table, _File, "the declaration", strict)
    return Topology(
        shape=_shape(file.shape, strict),
        prefill=_deployment("prefill", file, file.prefill, strict),
        decode=_deployment("decode", file, file.decode, strict),
        dtype=file.dtype,
        first=file.first,
        tokens=file.tokens,
        stream_layers=file.stream_layers,
        seed=file.seed,
    )


def read_parallelism(text: str) -> dict[str, Any]:
    """Split ``"tp=16,pp=2,layers=30+31,attention_dp"`` into keys and values, still as strings.

    Raises
    ------
    OptionsError
        If a part is malformed, or names what is no part of a parallelism.
    """
    table: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if key not in _PARALLELISM or bool(value) != bool(equals):
            raise OptionsError(
                f"{part.strip()!r} in parallelism {text!r} is not one of "
                f"{', '.join(_PARALLELISM)} with a value; write it as tp=4,pp=2,layers=30+31 or "
                "tp=16,attention_dp"
            )
        if key in table:
            raise OptionsError(f"{key} stands twice in parallelism {text!r}")
        table[key] = value.split("+") if key == "layers" else value or "true"
    return table


def _convert(table: Mapping[str, Any], kind: type[_Struct], where: str, strict: bool) -> _Struct:
    """Check keys and types of a table, naming what is allowed."""
    allowed = [field.name for field in msgspec.structs.fields(kind)]
    for key in table:
        if key not in allowed:
            raise OptionsError(f"unknown key {key!r} in {where}; there are {', '.join(allowed)}")
    try:
        return msgspec.convert(dict(table), kind, strict=strict)
    except msgspec.ValidationError as error:
        raise OptionsError(f"{where}: {error}") from None


def _shape(shape: str | tuple[dict[str, Any], ...], strict: bool) -> ModelShape:
    if isinstance(shape, str):
        if shape not in MODELS:
            raise OptionsError(
                f"shape={shape!r} is not one of {', '.join(MODELS)}; declare others as [[shape]] "
                "tables in a file"
            )
        return MODELS[shape]
    if not shape:
        raise OptionsError("[[shape]] declares nothing; give a table for each kind of cache tensor")
    kinds = tuple(_kind(_convert(kind, _Kind, "[[shape]]", strict)) for kind in shape)
    if all(kind.only for kind in kinds):
        raise OptionsError("[[shape]] has nothing on both sides; leave out only in one of them")
    return ModelShape("declared", kinds)


def _kind(kind: _Kind) -> TensorKind:
    layers = tuple(range(kind.layers)) if isinstance(kind.layers, int) else kind.layers
    if not kind.names or not layers or min(layers) < 0 or sorted(set(layers)) != list(layers):
        raise OptionsError(
            f"[[shape]] names={list(kind.names)} layers={kind.layers}: give at least one name, and "
            "a number of layers or ascending layer ids"
        )
    row = kind.dim if kind.bytes is None else kind.bytes
    if row is None or (kind.dim is not None and kind.bytes is not None):
        raise OptionsError(
            f"[[shape]] names={list(kind.names)} needs either dim (elements of a row) or bytes (of "
            "an opaque row)"
        )
    for what, value in (("heads", kind.heads), ("dim or bytes", row), ("window", kind.window)):
        if value is not None and value < 1:
            raise OptionsError(f"[[shape]] {what}={value} must be at least 1")
    if kind.state and kind.window is not None:
        raise OptionsError(
            f"[[shape]] names={list(kind.names)} has one state a request; leave out "
            f"window={kind.window}"
        )
    return TensorKind(
        names=kind.names,
        layers=layers,
        heads=kind.heads,
        row_elements=row,
        dtype_bytes=None if kind.bytes is None else 1,
        window=kind.window,
        state=kind.state,
        only=kind.only,
    )


def _deployment(name: str, file: _File, table: Mapping[str, Any], strict: bool) -> Deployment:
    side = _convert(table, _Side, f"[{name}]", strict)
    try:
        parallelism = Parallelism(**{key: getattr(side, key) for key in _PARALLELISM})
    except OptionsError as error:
        raise OptionsError(f"[{name}]: {error}") from None
    layout = _layout(name, side)
    block_tokens = next(
        (tokens for tokens in (side.block, file.block, layout.block_tokens) if tokens is not None),
        _DEFAULT_BLOCK_TOKENS,
    )
    return Deployment(name, parallelism, layout, block_tokens)


def _layout(name: str, side: _Side) -> EngineLayout:
    named = ENGINE_LAYOUTS.get(side.layout)
    if named is None and " " not in side.layout:
        raise OptionsError(
            f"{name} layout {side.layout!r} is not one of {', '.join(ENGINE_LAYOUTS)}, nor a dims "
            "string such as 'block kv head token dim'"
        )
    if named is not None and side.latent_layout is None:
        return named
    latent = side.latent_layout or ENGINE_LAYOUTS["hnd"].latent_dims
    if named is not None:
        return EngineLayout(named.name, named.dims, latent, named.block_tokens)
    return EngineLayout(side.layout, side.layout, latent)
