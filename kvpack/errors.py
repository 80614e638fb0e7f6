"""The errors kvpack raises: one hierarchy, each naming the value, the bound and the mend."""

from __future__ import annotations


class KvpackError(Exception):
    """Base of every error that kvpack raises on purpose."""


class LayoutError(KvpackError, ValueError):
    """A cache layout or cache tensor is declared in a way that cannot be addressed."""


class IncompatibleLayoutsError(KvpackError):
    """Two cache layouts declare the same cache tensor and disagree on it."""


class BlockListError(KvpackError, ValueError):
    """A request's block list or position range does not fit its cache layout."""


class CoverageError(KvpackError):
    """Wanted layers, heads or positions that no sender has."""


class VerificationError(KvpackError):
    """A plan would write a byte twice, not at all, from the wrong place, or where none belongs."""


class StagingError(KvpackError):
    """Staging memory is too small, misplaced or exhausted."""


class OptionsError(KvpackError, ValueError):
    """An option is outside its bounds."""


class ProtocolError(KvpackError):
    """A peer's bytes are not a kvpack message or metadata of this protocol."""


class ProtocolVersionError(ProtocolError):
    """The peer speaks another version of the protocol."""


class TransportError(KvpackError):
    """The transport could not register, connect, write or notify."""


class PeerLostError(TransportError):
    """The connection to a peer broke; its own transfers fail and no others."""


class EndpointError(KvpackError):
    """An endpoint was asked for something it cannot do now."""


class UnknownPeerError(EndpointError):
    """A peer is named that this endpoint is not connected to."""


class ClosedError(EndpointError):
    """The endpoint was closed, or belongs to the parent of a forked process."""


class TransferError(KvpackError):
    """Base of the ways in which a transfer ends without success."""


class TransferFailedError(TransferError):
    """The transfer failed; the message names request, peer and reason."""


class TransferCancelledError(TransferError):
    """The transfer was cancelled from this side or the other."""


class TransferTimeoutError(TransferError, TimeoutError):
    """The transfer's deadline passed."""
