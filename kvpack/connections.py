"""Connecting: what an endpoint tells of itself, and what it checks of a peer."""

from __future__ import annotations

import secrets

from kvpack.errors import EndpointError, IncompatibleLayoutsError, StagingError
from kvpack.layout import CacheLayout
from kvpack.links import Link
from kvpack.options import TransportKind
from kvpack.plan import check_layouts
from kvpack.progress import Progress
from kvpack.protocol import (
    TOKEN_BYTES,
    Peer,
    PeerMetadata,
    StagingGeometry,
    decode_metadata,
    encode_metadata,
)
from kvpack.rendezvous import Listener
from kvpack.staging import Staging
from kvpack.transport import Window


class Identity:
    """Who an endpoint is: its name, this incarnation of it, and the token that peers must show.

    Parameters
    ----------
    name : str
        The endpoint's name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.incarnation = secrets.randbits(64)
        self.token = secrets.token_bytes(TOKEN_BYTES)

    @property
    def key(self) -> str:
        """Name and incarnation: the name of the transport's agent."""
        return peer_key(self.name, self.incarnation)


def peer_key(name: str, incarnation: int) -> str:
    """Key of an endpoint in one incarnation."""
    return f"{name}@{incarnation:016x}"


class Connections:
    """Adds and removes peers; every method is the turning thread's.

    Parameters
    ----------
    identity : Identity
        Of this endpoint.
    layout : CacheLayout
        Of this endpoint.
    staging : Staging
        Of this endpoint.
    transport : {"nixl", "loopback"}
        Which transport it uses.
    progress : Progress
        Where peers are added.
    """

    def __init__(
        self,
        identity: Identity,
        layout: CacheLayout,
        staging: Staging,
        transport: TransportKind,
        progress: Progress,
    ) -> None:
        self._identity = identity
        self._layout = layout
        self._staging = staging
        self._transport: TransportKind = transport
        self._progress = progress
        self._listener: Listener | None = None

    def metadata(self) -> bytes:
        """What a peer needs to connect."""
        staging = self._staging
        kind, _, index = staging.device.partition(":")
        return encode_metadata(
            PeerMetadata(
                name=self._identity.name,
                incarnation=self._identity.incarnation,
                token=self._identity.token,
                transport=self._transport,
                transport_metadata=self._progress.transport.metadata,
                layout=self._layout.encode(),
                staging=StagingGeometry(
                    address=staging.address,
                    slot_bytes=staging.slot_bytes,
                    send_slots=staging.send_slots,
                    receive_slots=staging.receive_slots,
                    device_kind="cuda" if kind == "cuda" else "cpu",
                    device_index=int(index or 0),
                ),
            )
        )

    def listen(self, host: str, port: int) -> str:
        """Let peers come to an address, and give it."""
        if self._listener is not None:
            raise EndpointError(
                f"endpoint {self._identity.name!r} listens on {self._listener.address} already"
            )
        self._listener = Listener(host, port, self._welcome)
        self._progress.pollers.append(self._listener.poll)
        return self._listener.address

    def close(self) -> None:
        """Stop listening."""
        if self._listener is not None:
            self._progress.pollers.remove(self._listener.poll)
            self._listener.close()

    def connect(self, encoded: bytes) -> str:
        """Check a peer's metadata, add the peer, and give its name."""
        metadata = decode_metadata(encoded)
        key = peer_key(metadata.name, metadata.incarnation)
        if key in self._progress.links:
            return metadata.name
        layout = self._check(metadata)
        former = self._progress.find(metadata.name)
        if former is not None:
            self._progress.remove_link(
                former.key, f"{metadata.name!r} restarted and connected anew", exited=False
            )
        staging = metadata.staging
        window = Window(
            staging.receive_address,
            staging.slot_bytes,
            staging.receive_slots,
            staging.device_kind,
            staging.device_index,
        )
        self._progress.transport.add_peer(key, metadata.transport_metadata, window)
        self._progress.add_link(
            Link(key, metadata, layout, self._layout, self._progress.copier.table),
            Peer(
                key=key,
                name=metadata.name,
                my_token=self._identity.token,
                its_token=metadata.token,
                slot_bytes=staging.slot_bytes,
                send_slots=staging.send_slots,
                receive_slots=staging.receive_slots,
            ),
        )
        return metadata.name

    def _welcome(self, encoded: bytes) -> bytes:
        """Answer a peer that came to the listener."""
        self.connect(encoded)
        return self.metadata()

    def _check(self, metadata: PeerMetadata) -> CacheLayout:
        """Refuse a peer that this endpoint could not work with; give its layout."""
        name = self._identity.name
        if metadata.name == name:
            raise EndpointError(f"endpoint {name!r} cannot be its own peer; rename one of the two")
        if metadata.transport != self._transport:
            raise EndpointError(
                f"peer {metadata.name!r} uses transport {metadata.transport!r}, endpoint {name!r} "
                f"{self._transport!r}; open both with the same"
            )
        layout = CacheLayout.decode(metadata.layout)
        try:
            check_layouts(self._layout, layout)
        except IncompatibleLayoutsError as error:
            raise IncompatibleLayoutsError(
                f"endpoints {name!r} and {metadata.name!r}: {error}"
            ) from None
        others = {link.name for link in self._progress.links.values()} | {metadata.name}
        slots = min(self._staging.send_slots, self._staging.receive_slots)
        if len(others) > slots:
            raise StagingError(
                f"endpoint {name!r} has {slots} slots in its smaller pool, fewer than its "
                f"{len(others)} peers; each needs one, so open at least "
                f"{2 * len(others) * self._staging.slot_bytes} bytes of staging"
            )
        return layout
