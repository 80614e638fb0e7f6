"""Options: every bound is named, and the environment says the same as the fields."""

from __future__ import annotations

import re
from dataclasses import fields

import numpy as np
import pytest

from kvpack.errors import OptionsError
from kvpack.options import Options


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("staging_bytes", 0, "staging_bytes=0 must be a whole number of at least 512"),
        ("staging_bytes", None, "staging_bytes=None must be a whole number of at least 512"),
        ("chunk_bytes", 1.5, "chunk_bytes=1.5 must be a whole number of at least 256"),
        ("chunk_bytes", True, "chunk_bytes=True must be a whole number of at least 256"),
        ("max_ctas", 0, "max_ctas=0 must be a whole number of at least 1"),
        ("timeout_s", 0, "timeout_s=0 must be a positive and finite number"),
        ("timeout_s", float("nan"), "timeout_s=nan must be a positive and finite number"),
        ("connect_timeout_s", "5", "connect_timeout_s='5' must be a positive and finite number"),
        ("idle_poll_s", float("inf"), "idle_poll_s=inf must be a positive and finite number"),
        ("busy_poll_s", -1e-6, "busy_poll_s=-1e-06 must be a number of at least 0"),
        ("busy_poll_s", None, "busy_poll_s=None must be a number of at least 0"),
        ("backend", "cuda", "backend='cuda' is not one of"),
        ("transport", "tcp", "transport='tcp' is not one of"),
        ("driver", "nobody", "driver='nobody' is not one of"),
    ],
)
def test_a_value_outside_its_bounds_is_refused_by_name(field: str, value, message: str) -> None:
    with pytest.raises(OptionsError, match=re.escape(message)):
        Options(**{field: value})


def test_whole_numbers_of_numpy_are_welcome() -> None:
    assert Options(staging_bytes=np.int64(1 << 20), max_ctas=np.int32(8)).max_ctas == 8


def test_the_environment_sets_fields_and_leaves_the_rest() -> None:
    found = Options.from_environment(
        {
            "KVPACK_CHUNK_BYTES": "1048576",
            "KVPACK_TIMEOUT_S": "2.5",
            "KVPACK_MAX_CTAS": "none",
            "KVPACK_TRANSPORT": "loopback",
            "PATH": "/bin",
        }
    )
    assert found == Options(chunk_bytes=1 << 20, timeout_s=2.5, transport="loopback")


@pytest.mark.parametrize(
    ("name", "text"),
    [("CHUNK_BYTES", "64MiB"), ("TIMEOUT_S", "soon"), ("STAGING_BYTES", "none")],
)
def test_what_cannot_be_read_names_the_variable(name: str, text: str) -> None:
    with pytest.raises(OptionsError, match=f"KVPACK_{name}='{text}' cannot be read as"):
        Options.from_environment({f"KVPACK_{name}": text})


def test_there_are_at_most_twenty_options() -> None:
    assert len(fields(Options)) <= 20
