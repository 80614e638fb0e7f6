"""The exchange of metadata over real sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import msgspec
import pytest
import zmq

from kvpack.errors import ClosedError, IncompatibleLayoutsError, KvpackError, TransportError
from kvpack.rendezvous import MAX_METADATA_BYTES, Listener, exchange


@contextmanager
def listening(handle: Callable[[bytes], bytes], host: str = "127.0.0.1") -> Iterator[Listener]:
    listener = Listener(host, 0, handle)
    try:
        yield listener
    finally:
        listener.close()


def drive(listener: Listener, until: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < deadline, "nothing came"
        listener.poll()


def come(listener: Listener, metadata: bytes, timeout_s: float = 10.0) -> Future[bytes]:
    """Call `exchange` from another thread while this one drives the listener."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(exchange, listener.address, metadata, timeout_s)
        drive(listener, future.done, timeout_s + 10)
    return future


def send_raw(address: str, *frames: bytes) -> zmq.Context[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(f"tcp://{address}")
    dealer.send_multipart(frames)
    return context


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3"])
def test_both_sides_learn_the_others_metadata(host: str) -> None:
    met = []

    def meet(metadata: bytes) -> bytes:
        met.append(metadata)
        return b"decode's \0\xff"

    with listening(meet, host) as listener:
        assert come(listener, b"prefill's").result() == b"decode's \0\xff"
    assert met == [b"prefill's"]


def test_many_come_at_once_and_each_gets_its_own_answer() -> None:
    with listening(lambda metadata: metadata[::-1]) as listener, ThreadPoolExecutor(8) as pool:
        hellos = [f"endpoint {i}".encode() for i in range(40)]
        futures = [pool.submit(exchange, listener.address, hello) for hello in hellos]
        drive(listener, lambda: all(future.done() for future in futures))
        assert [future.result() for future in futures] == [hello[::-1] for hello in hellos]


def test_large_metadata_crosses() -> None:
    with listening(lambda metadata: metadata) as listener:
        metadata = bytes(MAX_METADATA_BYTES)
        assert come(listener, metadata).result() == metadata


def test_metadata_over_the_bound_is_refused_on_the_side_that_has_it() -> None:
    too_large = bytes(MAX_METADATA_BYTES + 1)
    with listening(lambda metadata: too_large) as listener:
        with pytest.raises(TransportError, match="over the bound"):
            exchange(listener.address, too_large)
        with pytest.raises(TransportError, match="over the bound"):
            come(listener, b"").result()


def test_a_refusal_is_raised_as_the_same_error() -> None:
    def refuse(metadata: bytes) -> bytes:
        raise IncompatibleLayoutsError("k of layer 3: head size 128 here, 64 there")

    with (
        listening(refuse) as listener,
        pytest.raises(IncompatibleLayoutsError, match="head size 128 here, 64 there"),
    ):
        come(listener, b"").result()


def test_an_unforeseen_error_of_the_handler_refuses_and_does_not_raise() -> None:
    with (
        listening(lambda metadata: metadata[7]) as listener,  # type: ignore[arg-type, return-value]
        pytest.raises(TransportError, match="IndexError"),
    ):
        come(listener, b"").result()


def test_garbage_is_dropped_and_counted_and_harms_nobody() -> None:
    with listening(lambda metadata: b"fine") as listener:
        messages: list[tuple[bytes, ...]] = [
            (b"",),
            (b"garbage",),
            (msgspec.msgpack.encode(["kvpack-welcome", b"metadata"]),),
            (msgspec.msgpack.encode(["kvpack-hello", "text"]),),
            (b"\x91" * 100_000,),
            (b"\x93\xackvpack-hello\xc4\x00" + b"\x91" * 100_000,),
            (b"two", b"frames"),
        ]
        contexts = [send_raw(listener.address, *frames) for frames in messages]
        drive(listener, lambda: listener.dropped == len(messages))
        host, port = listener.address.split(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
            contexts.append(send_raw(listener.address, bytes(MAX_METADATA_BYTES * 2)))
            assert come(listener, b"hello").result() == b"fine"
        for context in contexts:
            context.destroy(linger=0)


def test_nobody_listening_is_told_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(TransportError, match=f"nobody listens at 127.0.0.1:{port} after 0.3 s"):
        exchange(f"127.0.0.1:{port}", b"", timeout_s=0.3)
    assert time.monotonic() - started < 3


def test_a_listener_that_nobody_drives_is_told_apart() -> None:
    with (
        listening(lambda metadata: b"") as listener,
        pytest.raises(TransportError, match=r"did not answer within 0\.3 s"),
    ):
        exchange(listener.address, b"", timeout_s=0.3)


def test_a_server_of_something_else_is_told_in_time() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(TransportError, match=r"nobody listens|did not answer"),
    ):
        exchange(f"127.0.0.1:{server.getsockname()[1]}", b"", timeout_s=0.3)


def test_a_listener_of_another_protocol_is_told() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")

    def answer() -> None:
        sender, _ = router.recv_multipart()
        router.send_multipart([sender, b"\x93\xaekvpack-welcome\xc4\x00" + b"\x91" * 100_000])

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(TransportError, match="no kvpack endpoint"):
        exchange(f"127.0.0.1:{port}", b"")
    thread.join(10)
    context.destroy(linger=0)


def test_a_listener_may_come_after_who_connects_to_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(exchange, f"127.0.0.1:{port}", b"early")
        listener = Listener("127.0.0.1", port, lambda metadata: b"late")
        drive(listener, future.done)
        listener.close()
    assert future.result() == b"late"


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "example.com", "", "*"])
def test_only_the_loopback_is_listened_on_and_connected_to(host: str) -> None:
    with pytest.raises(TransportError, match="neither encrypts nor authenticates yet"):
        Listener(host, 0, lambda metadata: b"")
    with pytest.raises(TransportError, match="neither encrypts nor authenticates yet"):
        exchange(f"[{host}]:5000" if ":" in host else f"{host}:5000", b"")


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "[::1]:70000"])
def test_an_address_without_a_port_is_refused(address: str) -> None:
    with pytest.raises(TransportError, match="is not 'host:port'"):
        exchange(address, b"")


def test_a_port_in_use_is_told() -> None:
    with listening(lambda metadata: b"") as listener:
        port = int(listener.address.split(":")[1])
        with pytest.raises(TransportError, match=f"cannot listen on 127.0.0.1:{port}"):
            Listener("127.0.0.1", port, lambda metadata: b"")
    with pytest.raises(TransportError, match="port 65536"):
        Listener("127.0.0.1", 65536, lambda metadata: b"")


def test_a_closed_listener_frees_its_port_and_refuses_to_be_polled() -> None:
    listener = Listener("127.0.0.1", 0, lambda metadata: b"")
    listener.close()
    listener.close()
    with pytest.raises(ClosedError, match="is closed"):
        listener.poll()
    Listener("127.0.0.1", int(listener.address.split(":")[1]), lambda metadata: b"").close()


def test_polling_without_visitors_answers_nobody() -> None:
    with listening(lambda metadata: b"") as listener:
        assert listener.poll() == 0


def test_an_unknown_refusal_is_still_one_of_ours() -> None:
    class _PrivateError(KvpackError):
        pass

    def refuse(metadata: bytes) -> bytes:
        raise _PrivateError("private reason")

    with listening(refuse) as listener, pytest.raises(TransportError, match="private reason"):
        come(listener, b"").result()
