"""NIXL between processes, and what it does when one of them stops or dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvpack.errors import PeerLostError
from kvpack.rendezvous import exchange
from kvpack.transport import NixlTransport, Region, Window, Write

PEER = Path(__file__).with_name("nixl_peer.py")
SLOT_BYTES = 65536
SLOTS = 512


class Link:
    """This process's transport, and the processes that it is connected to."""

    def __init__(self, name: str) -> None:
        self.memory = np.zeros(2 * SLOT_BYTES * SLOTS, dtype=np.uint8)
        address = self.memory.ctypes.data
        self.window = Window(address + SLOT_BYTES * SLOTS, SLOT_BYTES, SLOTS)
        self.transport = NixlTransport(
            name,
            Region(address, self.memory.nbytes),
            Window(address, SLOT_BYTES, SLOTS),
        )
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.arrived: list[tuple[str, bytes]] = []

    @property
    def sent(self) -> np.ndarray:
        return self.memory[: SLOT_BYTES * SLOTS]

    @property
    def returned(self) -> np.ndarray:
        return self.memory[SLOT_BYTES * SLOTS :]

    def start(self, *peers: str) -> None:
        """Start processes; a restarted endpoint has another incarnation in its name."""
        for peer in peers:
            self.processes[peer] = subprocess.Popen(
                [sys.executable, str(PEER), peer, str(SLOT_BYTES), str(SLOTS), "cpu"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )

    def connect(self, peer: str) -> None:
        stdout = self.processes[peer].stdout
        assert stdout is not None
        hello = msgspec.msgpack.encode((self.transport.name, self.transport.metadata, self.window))
        answer = exchange(stdout.readline().strip(), hello, timeout_s=20)
        name, blob, window = msgspec.msgpack.decode(answer, type=tuple[str, bytes, Window])
        assert name == peer
        self.transport.add_peer(name, blob, window)

    def stop(self, peer: str) -> None:
        os.kill(self.processes[peer].pid, signal.SIGSTOP)

    def kill(self, peer: str) -> None:
        self.processes[peer].kill()
        self.processes[peer].wait(10)

    def ask(self, peer: str, message: bytes) -> bytes:
        self.transport.notify(peer, message)
        (answer,) = self.take(1)
        assert answer[0] == peer
        return answer[1]

    def take(self, count: int, timeout_s: float = 20.0) -> list[tuple[str, bytes]]:
        arrived: list[tuple[str, bytes]] = []
        deadline = time.monotonic() + timeout_s
        while len(arrived) < count:
            assert time.monotonic() < deadline, f"{len(arrived)} of {count} messages came"
            arrived += self.transport.notifications()
        return arrived

    def finish(self, *writes: Write, also: Link | None = None) -> None:
        """Poll writes to their end, while another transport of this process makes progress."""
        deadline = time.monotonic() + 20.0
        for write in writes:
            while not self.transport.poll(write):
                assert time.monotonic() < deadline, f"{write} did not end"
                if also is not None:
                    also.arrived += also.transport.notifications()

    def end(self) -> None:
        for peer in self.processes:
            self.kill(peer)


@pytest.fixture(params=["default", "tcp"])
def link(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    if request.param == "tcp":
        monkeypatch.setenv("UCX_TLS", "tcp,self")
        monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    link = Link("parent@1")
    yield link
    link.end()
    link.transport.close(timeout_s=1.0)


def test_writes_and_messages_cross_both_ways(link: Link) -> None:
    link.start("decode@1")
    link.connect("decode@1")
    rng = np.random.default_rng(1)
    link.sent[:] = rng.integers(0, 256, link.sent.size, dtype=np.uint8)
    runs = [(int(first), int(rng.integers(1, 17))) for first in range(0, SLOTS, 16)]
    writes = [
        link.transport.write("decode@1", first, first, n, b"crc %d %d" % (first, n))
        for first, n in runs
    ]
    link.finish(*writes)
    answers = sorted(link.take(len(runs)))
    expected = sorted(
        (
            "decode@1",
            b"crc %d %d %d"
            % (first, n, zlib.crc32(link.sent[first * SLOT_BYTES : (first + n) * SLOT_BYTES].data)),
        )
        for first, n in runs
    )
    assert answers == expected
    assert link.ask("decode@1", b"return 0 8") == b"returned 0 8"
    first, n = 0, runs[0][1]
    np.testing.assert_array_equal(
        link.returned[: n * SLOT_BYTES], link.sent[first : n * SLOT_BYTES]
    )


def is_lost(peer: str, act: Callable[[], object]) -> bool:
    try:
        act()
    except PeerLostError as error:
        return f"'{peer}'" in str(error)
    return False


def test_a_killed_peer_is_lost_in_bounded_time_and_no_other_is(link: Link) -> None:
    link.start("decode@1", "decode@2")
    link.connect("decode@1")
    other = Link("other@1")
    link.transport.add_peer("other@1", other.transport.metadata, other.window)
    link.finish(link.transport.write("decode@1", 0, 0, 1, b""))
    link.finish(link.transport.write("other@1", 0, 0, 1, b""), also=other)
    writes = [link.transport.write("decode@1", 0, 0, SLOTS, b"") for _ in range(4)]
    to_other = link.transport.write("other@1", 0, 0, SLOTS, b"whole")
    link.kill("decode@1")
    started = time.monotonic()
    # By shared memory the first four may be done already; then it is the next that tells.
    for write in writes:
        is_lost("decode@1", lambda write=write: link.finish(write))  # type: ignore[misc]
    while not is_lost("decode@1", lambda: link.transport.write("decode@1", 0, 0, 1, b"")):
        assert time.monotonic() - started < 5
    assert time.monotonic() - started < 5
    assert is_lost("decode@1", lambda: link.transport.notify("decode@1", b"crc 0 1"))
    link.finish(to_other, also=other)
    other.arrived += other.take(1 - len(other.arrived))
    assert other.arrived == [(link.transport.name, b"whole")]
    assert other.transport.close() == 0
    link.transport.remove_peer("decode@1")
    link.connect("decode@2")
    link.sent[:SLOT_BYTES] = 77
    link.finish(link.transport.write("decode@2", 0, 3, 1, b""))
    crc = zlib.crc32(link.sent[:SLOT_BYTES].data)
    assert link.ask("decode@2", b"crc 3 1") == b"crc 3 1 %d" % crc


@pytest.mark.parametrize("link", ["tcp"], indirect=True)
def test_writes_in_flight_to_a_killed_peer_fail(link: Link) -> None:
    link.start("decode@1")
    link.connect("decode@1")
    link.finish(link.transport.write("decode@1", 0, 0, 1, b""))
    link.stop("decode@1")
    writes = [link.transport.write("decode@1", 0, 0, SLOTS, b"") for _ in range(4)]
    link.kill("decode@1")
    started = time.monotonic()
    for write in writes:
        with pytest.raises(PeerLostError, match="decode@1"):
            link.finish(write)
    assert time.monotonic() - started < 5
    assert link.transport.close(timeout_s=1.0) == 0


@pytest.mark.parametrize("link", ["tcp"], indirect=True)
def test_closing_waits_for_a_stopped_peer_no_longer_than_told(link: Link) -> None:
    link.start("decode@1")
    link.connect("decode@1")
    link.finish(link.transport.write("decode@1", 0, 0, 1, b""))
    link.stop("decode@1")
    write = link.transport.write("decode@1", 0, 0, SLOTS, b"")
    link.transport.remove_peer("decode@1")
    started = time.monotonic()
    assert link.transport.close(timeout_s=0.5) == 1
    assert time.monotonic() - started < 3
    assert not write.done
    assert link.transport.close() == 1


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("NIXL", "UCX"))}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


OPEN = """
import numpy as np
from kvpack.transport import NixlTransport, Region, Window
memory = np.zeros(8192, dtype=np.uint8)
address = memory.ctypes.data
transport = NixlTransport("quiet@1", Region(address, 8192), Window(address, 4096, 2))
"""


def test_nixl_writes_nothing_to_stdout_and_leaves_loggings_errors_on() -> None:
    ended = run(
        OPEN
        + """
import logging
assert logging.raiseExceptions
logging.getLogger("nixl.api").info("too quiet to hear")
logging.getLogger("nixl.api").warning("loud enough")
assert transport.close() == 0
"""
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    assert "loud enough" in ended.stderr
    assert "too quiet" not in ended.stderr


def test_a_chosen_log_level_is_kept_but_goes_to_stderr() -> None:
    ended = run(OPEN + "transport.close()", NIXL_LOG_LEVEL="INFO")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    assert "Initialized NIXL agent: quiet@1" in ended.stderr


def test_a_missing_nixl_tells_what_to_install() -> None:
    ended = run("import sys; sys.modules['nixl'] = None\n" + OPEN)
    assert "kvpack.errors.TransportError" in ended.stderr
    assert "pip install nixl" in ended.stderr


def test_importing_the_transports_imports_neither_nixl_nor_torch() -> None:
    ended = run(
        "import sys, kvpack.transport, kvpack.rendezvous\n"
        "assert not {'nixl', 'torch'} & set(sys.modules), 'imported'"
    )
    assert ended.returncode == 0, ended.stderr


def test_a_process_ends_at_once_with_its_transport_open() -> None:
    ended = run(OPEN)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_cuda_memory_that_is_not_there_is_refused() -> None:
    ended = run(
        "from kvpack.transport import NixlTransport, Region, Window\n"
        "NixlTransport('gpu@1', Region(2**40, 8192, 'cuda'), Window(2**40, 4096, 2, 'cuda'))",
        CUDA_VISIBLE_DEVICES="",
    )
    assert ended.returncode == 1
    assert "kvpack.errors.TransportError: opening transport 'gpu@1'" in ended.stderr


def test_a_name_that_is_not_utf8_is_dropped_and_counted() -> None:
    import nixl._api as nixl

    memory = np.zeros(8192, dtype=np.uint8)
    window = Window(memory.ctypes.data, 4096, 2)
    region = Region(window.address, window.nbytes)
    with_bad_name = nixl.nixl_agent(
        b"\xff@1", nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
    )
    transport = NixlTransport("robust@1", region, window)
    with_bad_name.add_remote_agent(
        msgspec.msgpack.decode(transport.metadata, type=tuple[str, str, int, bytes])[3]
    )
    with_bad_name.send_notif("robust@1", b"hello")
    deadline = time.monotonic() + 10
    while transport.dropped_notifications == 0:
        assert time.monotonic() < deadline
        assert transport.notifications() == []
        with_bad_name.get_new_notifs()
    assert transport.close() == 0


def test_one_write_is_one_descriptor() -> None:
    """The list that `NixlTransport` prepares is merged by NIXL, which its speed rests on."""
    import nixl._api as nixl

    agent = nixl.nixl_agent(
        "merge@1",
        nixl.nixl_agent_config(enable_prog_thread=False, capture_telemetry=True, backends=["UCX"]),
    )
    memory = np.zeros(64 * 4096, dtype=np.uint8)
    address = memory.ctypes.data
    agent.register_memory([(address, memory.nbytes, 0, "")], "DRAM")
    rows = np.array([[address, 4096, 0, 4096, 64]], dtype=np.int64)
    local = agent.prep_xfer_dlist("", rows, "DRAM")
    remote = agent.prep_xfer_dlist("merge@1", rows, "DRAM")
    indices = np.arange(64, dtype=np.int32)
    handle = agent.make_prepped_xfer("WRITE", local, indices[:32], remote, indices[32:])
    while agent.transfer(handle) == "PROC":
        pass
    assert agent.get_xfer_telemetry(handle).descCount == 1
