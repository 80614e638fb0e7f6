"""Both state machines of one endpoint behind one door: decode, check the token, route, tick."""

from __future__ import annotations

from collections.abc import Mapping

from kvpack.errors import ProtocolError
from kvpack.protocol.actions import Action
from kvpack.protocol.messages import Cancel, Done, Grant, Request, decode
from kvpack.protocol.peers import Drop, Peer, Peers
from kvpack.protocol.receiver import Receiver
from kvpack.protocol.sender import Sender


class Exchange:
    """One endpoint's half of the protocol with all of its peers.

    The engine's calls and the chunks' completions go to `sender` and `receiver` directly; what
    peers and the clock bring comes through here.

    Parameters
    ----------
    peers : Peers
        The same object that both machines were given.
    sender : Sender
        Serves what is published here.
    receiver : Receiver
        Asks for what is wanted here.
    """

    def __init__(self, peers: Peers, sender: Sender, receiver: Receiver) -> None:
        self.sender = sender
        self.receiver = receiver
        self._peers = peers

    @property
    def drops(self) -> Mapping[Drop, int]:
        """How much of what arrived was dropped, by cause."""
        return self._peers.drops

    @property
    def next_deadline(self) -> float:
        """When `tick` next has something to do, or earlier; infinite if never."""
        return min(self.sender.next_deadline, self.receiver.next_deadline)

    def connect(self, peer: Peer) -> list[Action]:
        """Begin to talk to a peer.

        Raises
        ------
        EndpointError
            If it is connected already.
        """
        self._peers.add(peer)
        return self.receiver.peer_connected(peer.key)

    def disconnect(self, peer: str, reason: str) -> list[Action]:
        """Cease to talk to a peer, lost or dismissed: its transfers fail and no others."""
        self._peers.remove(peer)
        return self.sender.peer_lost(peer, reason) + self.receiver.peer_lost(peer, reason)

    def exited(self, peer: str) -> list[Action]:
        """Disconnect a peer whose process is known to have exited: its leases return."""
        self._peers.remove(peer)
        return self.sender.peer_exited(peer) + self.receiver.peer_exited(peer)

    def deliver(self, peer: str, payload: bytes, now: float) -> list[Action]:
        """Take a notification of a peer's; whatever it holds, this does not raise."""
        try:
            message = decode(payload)
        except ProtocolError:
            self._peers.drop(Drop.MALFORMED)
            return []
        if not self._peers.admit(peer, message):
            return []
        if isinstance(message, Request | Grant | Done | Cancel):
            return self.sender.on_message(peer, message, now)
        return self.receiver.on_message(peer, message, now)

    def tick(self, now: float) -> list[Action]:
        """Let time pass."""
        return self.sender.tick(now) + self.receiver.tick(now)

    def close(self) -> list[Action]:
        """End everything; chunks under way must still be reported."""
        return self.sender.close() + self.receiver.close()

    def check_integrity(self) -> None:
        """Raise AssertionError if a slot of either pool has no owner or two."""
        self.sender.check_integrity()
        self.receiver.check_integrity()
