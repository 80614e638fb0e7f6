"""What the demo's parent and its workers tell each other over their pipes."""

from __future__ import annotations

from dataclasses import dataclass

from kvpack.demo.digests import ShardDigests
from kvpack.profiling.records import TransferRecord

__all__ = [
    "Connect",
    "Connected",
    "Decoded",
    "Failed",
    "Listening",
    "Prefilled",
    "Received",
    "Reference",
    "Sent",
    "Ship",
    "Stop",
    "WarmUp",
    "Warmed",
]


@dataclass(frozen=True)
class Connect:
    """Parent to prefill worker: connect to these decode workers, each a ``host:port``."""

    addresses: tuple[str, ...]


@dataclass(frozen=True)
class WarmUp:
    """Parent to every worker, once all are connected: compile and connect ahead of the request."""


@dataclass(frozen=True)
class Ship:
    """Parent to every worker: send, or receive, the request."""


@dataclass(frozen=True)
class Stop:
    """Parent to every worker: close the endpoint and exit."""


@dataclass(frozen=True)
class Prefilled:
    """Prefill worker to parent: the cache is in its pools."""

    device: str
    digests: ShardDigests


@dataclass(frozen=True)
class Listening:
    """Decode worker to parent: the pools are poisoned, and prefill workers may connect here."""

    address: str


@dataclass(frozen=True)
class Connected:
    """Prefill worker to parent: every decode worker is connected."""


@dataclass(frozen=True)
class Warmed:
    """Worker to parent: ready to ship."""


@dataclass(frozen=True)
class Sent:
    """Prefill worker to parent: every decode worker has what it asked for."""

    record: TransferRecord


@dataclass(frozen=True)
class Received:
    """Decode worker to parent: the request arrived, was damaged if so asked, and looks like this.

    Parameters
    ----------
    record : TransferRecord
        Of the transfer.
    digests : ShardDigests
        Read from the pools in sequence order.
    untouched : bool
        Whether every byte outside the request still was poison when it had arrived.
    """

    record: TransferRecord
    digests: ShardDigests
    untouched: bool


@dataclass(frozen=True)
class Reference:
    """First prefill worker to parent: the tokens of the undisturbed run."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Decoded:
    """First decode worker to parent: the tokens decoded from the received cache."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Failed:
    """Worker to parent: it stopped, and this is the traceback."""

    traceback: str
