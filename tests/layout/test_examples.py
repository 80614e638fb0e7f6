"""The examples in the docstrings of layouts and plans run as they stand."""

import doctest
import importlib

import pytest

MODULES = (
    "dims",
    "layout",
    "overlap",
    "blocks",
    "columns",
    "lanes",
    "wire",
    "plan",
    "election",
    "verification",
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    module = importlib.import_module(f"kvpack.{name}")
    assert doctest.testmod(module).failed == 0


def test_the_layout_module_has_examples() -> None:
    assert doctest.testmod(importlib.import_module("kvpack.layout")).attempted > 5
