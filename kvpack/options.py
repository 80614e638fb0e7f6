"""Options of an endpoint: one dataclass, from which environment and command line derive."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Literal, get_args

from kvpack.errors import OptionsError

Backend = Literal["triton", "numpy"]
TransportKind = Literal["nixl", "loopback"]
Driver = Literal["thread", "caller"]


@dataclass(frozen=True)
class Options:
    """How an endpoint works. Every field has an environment variable ``KVPACK_<FIELD>``.

    Attributes
    ----------
    staging_bytes : int
        Staging memory that an endpoint takes which is not given any.
    chunk_bytes : int
        Largest chunk, that is the largest lease granted and the largest single write. More than a
        pool holds is the same as half of the pool.
    timeout_s : float
        Deadline in seconds of transfers that name none.
    connect_timeout_s : float
        How long connecting and closing may take.
    max_ctas : int or None
        Thread blocks that gather and scatter may occupy at most; None lets them fill the device.
    backend : {"triton", "numpy"} or None
        What copies; None is Triton on CUDA and NumPy on the CPU.
    transport : {"nixl", "loopback"}
        ``"loopback"`` reaches endpoints of the same process only.
    driver : {"thread", "caller"}
        Who drives transfers: a thread of the endpoint's, or calls of ``Endpoint.progress``.
    busy_poll_s, waiting_poll_s, idle_poll_s : float
        How long the thread sleeps at most between two looks: with copies or writes under way, with
        transfers open that wait for a peer, and with none.

    Raises
    ------
    OptionsError
        Naming the field, its value and its bounds.
    """

    staging_bytes: int = 512 << 20
    chunk_bytes: int = 64 << 20
    timeout_s: float = 60.0
    connect_timeout_s: float = 10.0
    max_ctas: int | None = None
    backend: Backend | None = None
    transport: TransportKind = "nixl"
    driver: Driver = "thread"
    busy_poll_s: float = 20e-6
    waiting_poll_s: float = 1e-3
    idle_poll_s: float = 20e-3

    def __post_init__(self) -> None:
        for name, least in (("staging_bytes", 512), ("chunk_bytes", 256), ("max_ctas", 1)):
            value = getattr(self, name)
            if name == "max_ctas" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise OptionsError(f"{name}={value!r} must be a whole number of at least {least}")
        for name in ("timeout_s", "connect_timeout_s", "waiting_poll_s", "idle_poll_s"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 < float(value) < math.inf:
                raise OptionsError(f"{name}={value!r} must be a positive and finite number")
        if not isinstance(self.busy_poll_s, Real) or not 0 <= self.busy_poll_s < math.inf:
            raise OptionsError(f"busy_poll_s={self.busy_poll_s!r} must be a number of at least 0")
        for name, allowed in (
            ("backend", (None, *get_args(Backend))),
            ("transport", get_args(TransportKind)),
            ("driver", get_args(Driver)),
        ):
            if getattr(self, name) not in allowed:
                raise OptionsError(f"{name}={getattr(self, name)!r} is not one of {allowed}")

    @staticmethod
    def from_environment(environment: Mapping[str, str] | None = None) -> Options:
        """Read ``KVPACK_CHUNK_BYTES`` and its like; what is not set keeps its default.

        Parameters
        ----------
        environment : mapping of str to str, optional
            ``os.environ`` unless given.

        Raises
        ------
        OptionsError
            If a value cannot be read or is outside its bounds.
        """
        environment = os.environ if environment is None else environment
        found: dict[str, object] = {}
        for option in fields(Options):
            text = environment.get(f"KVPACK_{option.name.upper()}")
            if text is None:
                continue
            try:
                found[option.name] = _read(str(option.type), text)
            except ValueError as error:
                raise OptionsError(
                    f"environment variable KVPACK_{option.name.upper()}={text!r} cannot be read as "
                    f"{option.type}; mend it or unset it"
                ) from error
        return Options(**found)  # type: ignore[arg-type]


def _read(kind: str, text: str) -> object:
    if text == "none" and "None" in kind:
        return None
    if kind.startswith("int"):
        return int(text)
    return float(text) if kind == "float" else text
