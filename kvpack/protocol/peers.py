"""The peers that an endpoint talks to: tokens, sequence numbers, and what was dropped of theirs."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hmac import compare_digest

from kvpack.errors import EndpointError, UnknownPeerError
from kvpack.protocol.messages import Message


class Drop(str, enum.Enum):
    """Why something that arrived had no effect."""

    MALFORMED = "malformed"
    UNKNOWN_PEER = "unknown_peer"
    WRONG_TOKEN = "wrong_token"
    UNKNOWN_REQUEST = "unknown_request"
    DUPLICATE = "duplicate"
    STALE_ATTEMPT = "stale_attempt"
    WRONG_LEASE = "wrong_lease"
    WRONG_RANGE = "wrong_range"
    TOO_MANY = "too_many"


@dataclass(frozen=True, slots=True)
class Peer:
    """One connected endpoint, in one incarnation.

    Attributes
    ----------
    key : str
        Unique to the incarnation (name@incarnation): a restarted endpoint is another peer.
    name : str
        The endpoint's name, as `to`, `receivers` and reasons use it.
    my_token, its_token : bytes
        What messages from it and messages to it carry.
    slot_bytes, send_slots, receive_slots : int
        Its staging.
    """

    key: str
    name: str
    my_token: bytes
    its_token: bytes
    slot_bytes: int
    send_slots: int
    receive_slots: int

    @property
    def max_chunk_bytes(self) -> int:
        """Staging bytes of the largest chunk it cuts, unless one piece is larger."""
        return largest_chunk_slots(self.send_slots) * self.slot_bytes


def largest_chunk_slots(send_slots: int) -> int:
    """Half of the send slots, so that one chunk is gathered while another is on the wire."""
    return max(1, send_slots // 2)


class Peers:
    """The peers of one endpoint, shared by its sender and its receiver."""

    def __init__(self) -> None:
        self._peers: dict[str, Peer] = {}
        self._seq: Counter[str] = Counter()
        self._drops: Counter[Drop] = Counter()

    @property
    def drops(self) -> Mapping[Drop, int]:
        """How much has been dropped so far, by cause."""
        return dict(self._drops)

    def add(self, peer: Peer) -> None:
        """Begin to talk to a peer.

        Raises
        ------
        EndpointError
            If it is connected already.
        """
        if peer.key in self._peers:
            raise EndpointError(f"peer {peer.key!r} is connected already; disconnect it first")
        self._peers[peer.key] = peer

    def remove(self, key: str) -> None:
        """Cease to talk to a peer; later messages of its are dropped."""
        self._peers.pop(key, None)
        self._seq.pop(key, None)

    def get(self, key: str) -> Peer:
        """Return a connected peer.

        Raises
        ------
        UnknownPeerError
            If it is not connected.
        """
        try:
            return self._peers[key]
        except KeyError:
            known = ", ".join(sorted(self._peers)) or "none"
            raise UnknownPeerError(
                f"peer {key!r} is not connected (connected: {known}); connect it first"
            ) from None

    def __contains__(self, key: str) -> bool:
        return key in self._peers

    def admit(self, key: str, message: Message) -> bool:
        """Tell whether a message is from a peer and carries the token given to it; count if not."""
        peer = self._peers.get(key)
        if peer is None:
            self.drop(Drop.UNKNOWN_PEER)
        elif not compare_digest(peer.my_token, message.token):
            self.drop(Drop.WRONG_TOKEN)
        else:
            return True
        return False

    def next_seq(self, key: str) -> int:
        """Number the next message to a peer."""
        self._seq[key] += 1
        return self._seq[key]

    def drop(self, cause: Drop) -> None:
        """Count something that had no effect."""
        self._drops[cause] += 1
