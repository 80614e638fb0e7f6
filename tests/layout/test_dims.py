"""Dims strings: what they mean, and what each malformed one is told."""

import re

import pytest

from kvpack.dims import Axis, logical_axes, parse_dims
from kvpack.errors import LayoutError


@pytest.mark.parametrize(
    ("dims", "axes"),
    [
        ("block token dim", (("block",), ("token",), ("dim",))),
        ("(block token) head dim", (("block", "token"), ("head",), ("dim",))),
        ("block head token (kv dim)", (("block",), ("head",), ("token",), ("kv", "dim"))),
        ("block 1 token dim_2", (("block",), (), ("token",), ("dim_2",))),
        ("(1 block) (token)", (("block",), ("token",))),
        ("  block   token\tdim ", (("block",), ("token",), ("dim",))),
        ("(block token)(head dim)", (("block", "token"), ("head", "dim"))),
    ],
)
def test_dims_name_the_axes_from_the_outermost_on(
    dims: str, axes: tuple[tuple[str, ...], ...]
) -> None:
    assert parse_dims(dims) == axes


@pytest.mark.parametrize(
    ("dims", "said"),
    [
        ("", "dims string '' is malformed"),
        ("   ", "is malformed"),
        ("(block token head", "is malformed near '('"),
        ("block token) head", "is malformed near ')'"),
        ("((block token) head) dim", "write axis names separated by spaces, with one level of"),
        ("block Token dim", "axis name 'Token' in dims string 'block Token dim' is malformed"),
        ("block token-dim", "axis name 'token-dim'"),
        ("block 2 token", "axis name '2'"),
        ("block token _dim", "use lower-case letters, digits and underscores"),
        ("block token token", "axis 'token' stands more than once"),
        ("(block token) token dim", "axis 'token' stands more than once"),
    ],
)
def test_malformed_dims_are_told_where(dims: str, said: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(said)):
        parse_dims(dims)


def test_axes_that_share_a_tensor_axis_have_the_last_fastest() -> None:
    axes = logical_axes("(block token) (kv dim)", (96, 32), (32, 1), {"token": 16, "kv": 2})
    assert axes == {
        "block": Axis(6, 512),
        "token": Axis(16, 32),
        "kv": Axis(2, 16),
        "dim": Axis(16, 1),
    }
    assert list(axes) == ["block", "token", "kv", "dim"]


@pytest.mark.parametrize(
    ("dims", "shape", "sizes", "said"),
    [
        ("block token dim", (4, 5), {}, "names 3 axes, but the tensor has 2 (shape (4, 5))"),
        ("block 1 dim", (4, 2, 5), {}, "axis 1 of 'block 1 dim' is written 1 but has size 2"),
        (
            "(block token) dim",
            (96, 5),
            {},
            "the sizes of block and token in axis 0 of '(block token) dim' cannot both be worked "
            "out; declare all but one of them",
        ),
        (
            "(block token) dim",
            (90, 5),
            {"token": 16},
            "axis 0 of '(block token) dim' has size 90, which does not agree with the declared "
            "token=16",
        ),
        (
            "block head dim",
            (4, 3, 5),
            {"head": 2},
            "has size 3, which does not agree with the decl",
        ),
        ("block (head kv)", (4, 6), {"head": 2, "kv": 2}, "declared head=2, kv=2"),
        ("(block token) dim", (0, 5), {"token": 0}, "declared token=0"),
    ],
)
def test_dims_that_do_not_fit_the_tensor_are_told_why(
    dims: str, shape: tuple[int, ...], sizes: dict[str, int], said: str
) -> None:
    with pytest.raises(LayoutError, match=re.escape(said)):
        logical_axes(dims, shape, shape, sizes)
