"""Rendezvous: two endpoints exchange their metadata over ZMQ, on this host's loopback."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Callable

import msgspec
import zmq

from kvpack import errors
from kvpack.errors import KvpackError, TransportError
from kvpack.transport.gate import Gate

MAX_METADATA_BYTES = 16 * 2**20
"""Largest metadata that is sent or taken."""

_FRAMING_BYTES = 256
_EXCHANGES_PER_POLL = 16

_logger = logging.getLogger(__name__)


class _Hello(msgspec.Struct, tag="kvpack-hello", array_like=True, frozen=True):
    metadata: bytes


class _Welcome(msgspec.Struct, tag="kvpack-welcome", array_like=True, frozen=True):
    metadata: bytes


class _Refused(msgspec.Struct, tag="kvpack-refused", array_like=True, frozen=True):
    error: str
    text: str


_hello_decoder = msgspec.msgpack.Decoder(_Hello)
_answer_decoder: msgspec.msgpack.Decoder[_Welcome | _Refused] = msgspec.msgpack.Decoder(
    _Welcome | _Refused
)

_ERRORS: dict[str, type[KvpackError]] = {
    name: found
    for name, found in vars(errors).items()
    if isinstance(found, type) and issubclass(found, KvpackError)
}


class Listener:
    """Waits for endpoints that call `exchange`, and answers them when it is polled.

    It has no thread: whoever made it polls it, from one thread at a time.

    Parameters
    ----------
    host : str
        A loopback address, or ``"localhost"``.
    port : int
        0 takes a free port; `address` tells which.
    handle : callable
        Given a connecting endpoint's metadata, returns this one's. A `KvpackError` that it raises
        refuses the connection, and is raised by the other side's `exchange` as the same class. An
        endpoint whose `exchange` timed out may come again with the same metadata.

    Raises
    ------
    TransportError
        The host is not a loopback address, or the port cannot be bound.
    """

    def __init__(self, host: str, port: int, handle: Callable[[bytes], bytes]) -> None:
        host = _loopback(host)
        self._handle = handle
        self._dropped = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = _open(self._context, zmq.ROUTER)
        try:
            if not 0 <= port <= 65535:
                raise TransportError(f"port {port} is outside 0 to 65535")
            self._socket.bind(_url(host, port or "*"))
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise TransportError(
                f"cannot listen on {_join(host, port)}: {error}; take another port, or port 0 for "
                "a free one"
            ) from error
        except TransportError:
            self._context.destroy(linger=0)
            raise
        bound = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._address = _join(host, int(bound.rpartition(":")[2]))
        self._gate = Gate(f"the listener on {self._address}")

    @property
    def address(self) -> str:
        """``"host:port"``, as `exchange` takes it."""
        return self._address

    @property
    def dropped(self) -> int:
        """How many messages were dropped because they were not an endpoint's."""
        return self._dropped

    def poll(self) -> int:
        """Answer those who have come, without waiting; what they sent never raises.

        Returns
        -------
        int
            How many were answered, refused ones included.

        Raises
        ------
        ClosedError
            The listener is closed, or belongs to the parent of a forked process.
        """
        answered = 0
        with self._gate:
            for _ in range(_EXCHANGES_PER_POLL):
                try:
                    sender, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
                except zmq.ZMQError:
                    break
                try:
                    (frame,) = frames
                    hello = _hello_decoder.decode(frame)
                except (ValueError, msgspec.DecodeError, RecursionError):
                    self._dropped += 1
                    continue
                answer = msgspec.msgpack.encode(self._answer(hello.metadata))
                try:
                    self._socket.send_multipart([sender, answer], zmq.NOBLOCK)
                except zmq.ZMQError:
                    _logger.debug("an endpoint left %s before its answer", self._address)
                answered += 1
        return answered

    def close(self) -> None:
        """Stop listening; a second call does nothing."""
        self._gate.check_process()
        if not self._gate.is_shut:
            with self._gate:
                self._gate.shut()
                self._context.destroy(linger=0)

    def _answer(self, metadata: bytes) -> _Welcome | _Refused:
        try:
            answer = self._handle(metadata)
            _check_size(answer)
        except KvpackError as error:
            return _Refused(type(error).__name__, str(error))
        except Exception as error:
            _logger.exception("answering an endpoint that came to %s failed", self._address)
            return _Refused("TransportError", f"the endpoint at {self._address} failed: {error!r}")
        return _Welcome(answer)


def exchange(address: str, metadata: bytes, timeout_s: float = 10.0) -> bytes:
    """Send metadata to a `Listener`, and return the listener's.

    Whoever listens may come later than this call, as long as it comes before the timeout.

    Parameters
    ----------
    address : str
        ``"host:port"`` (IPv6: ``"[::1]:port"``) on this host's loopback.
    metadata : bytes
        What the listener's `handle` is given; at most `MAX_METADATA_BYTES`.
    timeout_s : float
        How long to wait at most.

    Raises
    ------
    TransportError
        The address is not one of loopback, nobody listened or answered in time, or the metadata is
        too large.
    KvpackError
        The listener refused; the class is the one that its `handle` raised.
    """
    host, port = _split(address)
    _check_size(metadata)
    deadline = time.monotonic() + timeout_s
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        socket = _open(context, zmq.DEALER)
        # The socket turns writable only when somebody has accepted: what tells "nobody listens"
        # from "nobody answers".
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.connect(_url(host, port))
        if not _wait(socket, zmq.POLLOUT, deadline):
            raise TransportError(
                f"nobody listens at {address} after {timeout_s:g} s; start the endpoint there "
                "and let it listen, or mend the address"
            )
        socket.send(msgspec.msgpack.encode(_Hello(metadata)))
        if not _wait(socket, zmq.POLLIN, deadline):
            raise TransportError(
                f"whoever listens at {address} did not answer within {timeout_s:g} s; check that "
                "it is a kvpack endpoint, and that something drives its progress"
            )
        try:
            answer = _answer_decoder.decode(socket.recv())
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise TransportError(
                f"whoever listens at {address} is no kvpack endpoint of this version: {error}"
            ) from error
    finally:
        context.destroy(linger=0)
    if isinstance(answer, _Refused):
        raise _ERRORS.get(answer.error, TransportError)(answer.text)
    return answer.metadata


def _open(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_METADATA_BYTES + _FRAMING_BYTES)
    return socket


def _wait(socket: zmq.Socket[bytes], events: int, deadline: float) -> bool:
    remaining_ms = max(0, int((deadline - time.monotonic()) * 1e3))
    return bool(socket.poll(remaining_ms, events))


def _check_size(metadata: bytes) -> None:
    if len(metadata) > MAX_METADATA_BYTES:
        raise TransportError(
            f"metadata of {len(metadata)} bytes is over the bound of {MAX_METADATA_BYTES}; "
            "declare fewer cache tensors, or carry the metadata over a channel of your own"
        )


def _split(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) <= 65535:
        raise TransportError(f"address {address!r} is not 'host:port' with a port of 1 to 65535")
    return _loopback(host.removeprefix("[").removesuffix("]")), int(port)


def _loopback(host: str) -> str:
    """Return the loopback address that a host names, and refuse any other."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise TransportError(
            f"host {host!r} is not a loopback address, and kvpack's rendezvous neither encrypts "
            "nor authenticates yet; use 127.0.0.1, or carry Endpoint.metadata() to the other host "
            "over a channel of your own and pass it to Endpoint.connect()"
        )
    return host


def _url(host: str, port: int | str) -> str:
    return f"tcp://{_join(host, port)}"


def _join(host: str, port: int | str) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
