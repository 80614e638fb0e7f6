"""The protocol is pure: no torch, no transport, no clock."""

from __future__ import annotations

import subprocess
import sys

FOREIGN = ("torch", "triton", "zmq", "nixl", "nvtx", "time", "asyncio", "socket", "threading")

PROGRAM = """
import sys
before = set(sys.modules)
import kvpack.protocol, kvpack.protocol.simulation
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new & set(sys.argv[1:])))
"""


def test_the_protocol_imports_nothing_with_effects() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *FOREIGN],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == ""
