"""Endpoints over either transport, closed when their test ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.caches import Group


@pytest.fixture(params=["loopback", "nixl"])
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    """No endpoints yet, of each transport in turn."""
    group = Group(request.param)
    yield group
    group.close()


@pytest.fixture
def loopback_group() -> Iterator[Group]:
    """No endpoints yet, where the transport does not matter."""
    group = Group("loopback")
    yield group
    group.close()
