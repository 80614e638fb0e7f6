"""What callers pass, checked at the door: plain values come out, or an error that says why."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

from kvpack.errors import BlockListError, EndpointError
from kvpack.protocol.messages import MAX_NAME_CHARS

_SHOWN_CHARS = 32


def name(argument: str, value: Any) -> str:
    """A name or request id of 1 to 256 characters that UTF-8 can carry.

    Raises
    ------
    EndpointError
        Naming the argument, the value and the bound.
    """
    if not isinstance(value, str):
        raise EndpointError(f"{argument}={_short(value)} must be a string")
    if not 1 <= len(value) <= MAX_NAME_CHARS:
        raise EndpointError(
            f"{argument} {_short(value)} has {len(value)} characters; it needs 1 to "
            f"{MAX_NAME_CHARS}"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise EndpointError(
            f"{argument} {_short(value)} holds a character that UTF-8 cannot carry"
        ) from None
    return str(value)


def names(argument: str, values: Any) -> tuple[str, ...]:
    """Several names; a single string is refused, for it is a sequence of one-letter names too.

    Raises
    ------
    EndpointError
        Naming the argument and the value.
    """
    if isinstance(values, str):
        raise EndpointError(f"{argument}={values!r} is one name; pass a list of them")
    if not isinstance(values, Iterable):
        raise EndpointError(f"{argument}={_short(values)} must be a list of names")
    return tuple(name(argument, value) for value in values)


def position(argument: str, value: Any) -> int:
    """A position: any whole number, NumPy's too.

    Raises
    ------
    BlockListError
        Naming the argument and the value.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise BlockListError(f"{argument}={_short(value)} must be a whole number") from None


def seconds(argument: str, value: Any) -> float:
    """A positive and finite time.

    Raises
    ------
    EndpointError
        Naming the argument and the value.
    """
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise EndpointError(
            f"{argument}={_short(value)} must be a number of seconds, positive and finite"
        )
    return number


def payload(argument: str, value: Any) -> bytes:
    """Bytes of the caller's, copied, so that later changes of theirs change nothing.

    Raises
    ------
    EndpointError
        Naming the argument and what was passed.
    """
    try:
        return bytes(memoryview(value))
    except TypeError:
        raise EndpointError(
            f"{argument} is {_short(value)}, not bytes; encode it first (str.encode, msgspec)"
        ) from None


def event(argument: str, value: Any) -> Any:
    """None, or what can be asked whether it has happened.

    Raises
    ------
    EndpointError
        Naming the argument and the value.
    """
    if value is not None and not callable(getattr(value, "query", None)):
        raise EndpointError(
            f"{argument}={_short(value)} has no query(); pass a torch.cuda.Event, or None"
        )
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS + 2 else f"{text[:_SHOWN_CHARS]}...{text[-1]}"
