"""Staging memory: one registered region on one device, cut into send slots and receive leases.

Which slots are free is the protocol's business (`kvpack.protocol.pool`); this module only owns
the bytes. On CUDA they come from the driver's `cuMemAlloc` and never from torch's caching
allocator: memory of `expandable_segments` cannot be mapped by a peer process, and a 256 MiB
write to it took 693 ms in place of 0.24 ms without any error.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import weakref
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from kvpack.errors import ClosedError, StagingError

if TYPE_CHECKING:
    import torch

    SlotView = npt.NDArray[np.uint8] | torch.Tensor

Pool = Literal["send", "receive"]

DEFAULT_SLOT_BYTES = 64 * 1024
SLOT_ALIGNMENT_BYTES = 256
"""Every slot starts at a multiple of this, so that kernels may use their widest accesses."""


@dataclass(frozen=True)
class SlotWindow:
    """One pool's adjacent slots in the staging memory.

    Parameters
    ----------
    address : int
        Device or host address of slot 0.
    slot_bytes : int
        Bytes of one slot.
    num_slots : int
        Number of slots, at least 1.
    """

    address: int
    slot_bytes: int
    num_slots: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole window."""
        return self.slot_bytes * self.num_slots

    def slot_address(self, slot: int) -> int:
        """Address of the first byte of `slot`."""
        return self.address + slot * self.slot_bytes


class Staging:
    """One contiguous region of staging memory, allocated before any cache layout exists.

    The region is cut into two pools, because one pool for both directions deadlocks two endpoints
    that send to each other: slots ``[0, send_slots)`` hold what leaves, the rest is leased to
    peers that write into it. The memory is not cleared; host pages appear when first touched.

    Parameters
    ----------
    device : str or torch.device
        ``"cpu"``, ``"cuda"`` (torch's current device) or ``"cuda:<index>"``.
    nbytes : int
        Bytes to take, rounded down to whole slots.
    slot_bytes : int
        Bytes of one slot, a multiple of 256.
    send_fraction : float
        Share of the slots that the send pool gets, between 0 and 1 exclusive. Each pool gets at
        least one slot.

    Raises
    ------
    StagingError
        If a pool would be smaller than one slot, the device does not exist or is not supported,
        or its memory does not suffice.

    Examples
    --------
    >>> with Staging("cpu", 1 << 20) as staging:
    ...     staging.send_slots, staging.receive_slots
    (8, 8)
    """

    def __init__(
        self,
        device: str | torch.device,
        nbytes: int,
        *,
        slot_bytes: int = DEFAULT_SLOT_BYTES,
        send_fraction: float = 0.5,
    ) -> None:
        send_slots, receive_slots = _split(nbytes, slot_bytes, send_fraction)
        self.slot_bytes = slot_bytes
        self.nbytes = (send_slots + receive_slots) * slot_bytes
        self._memory = _allocate(device, self.nbytes)
        self.device = self._memory.device
        self.address = self._memory.address
        self.send_window = SlotWindow(self.address, slot_bytes, send_slots)
        self.receive_window = SlotWindow(
            self.send_window.slot_address(send_slots), slot_bytes, receive_slots
        )
        self._in_use = False
        self._closed = False
        self._freed = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "in use" if self._in_use else "idle"
        return (
            f"Staging({self.device!r}, {self.nbytes}, slot_bytes={self.slot_bytes}, "
            f"send_slots={self.send_slots}, receive_slots={self.receive_slots}, {state})"
        )

    @property
    def send_slots(self) -> int:
        """Slots of the send pool."""
        return self.send_window.num_slots

    @property
    def receive_slots(self) -> int:
        """Slots of the receive pool."""
        return self.receive_window.num_slots

    @property
    def closed(self) -> bool:
        """Whether `close` was called; the memory may still be held by an endpoint."""
        return self._closed

    @cached_property
    def tensor(self) -> torch.Tensor:
        """The whole region as a uint8 torch tensor, without a copy.

        It must not be used after the memory is freed.
        """
        self._check_memory()
        return self._memory.as_tensor()

    @cached_property
    def array(self) -> npt.NDArray[np.uint8]:
        """The whole region as a uint8 NumPy array, without a copy; host memory only.

        Raises
        ------
        StagingError
            If the memory is on a GPU.
        """
        self._check_memory()
        return self._memory.as_array()

    @cached_property
    def _whole(self) -> SlotView:
        return self.array if self.device == "cpu" else self.tensor

    def slot_view(self, pool: Pool, slot: int, slots: int) -> SlotView:
        """Return the uint8 bytes of `slots` adjacent slots of a pool.

        Parameters
        ----------
        pool : {"send", "receive"}
            The pool whose slots are counted.
        slot : int
            First slot, counted from the pool's first.
        slots : int
            Number of slots, at least 1.

        Returns
        -------
        numpy.ndarray or torch.Tensor
            A NumPy array on the CPU and a torch tensor on CUDA, 1-D of ``slots * slot_bytes``.
            It does not own the memory.

        Raises
        ------
        StagingError
            If the slots are not all inside the pool.
        ClosedError
            If the memory was freed.
        """
        window = self.send_window if pool == "send" else self.receive_window
        if slot < 0 or slots < 1 or slot + slots > window.num_slots:
            raise StagingError(
                f"slots [{slot}, {slot + slots}) are outside the {pool} pool's "
                f"{window.num_slots} slots"
            )
        start = window.address - self.address + slot * self.slot_bytes
        return self._whole[start : start + slots * self.slot_bytes]

    def acquire(self) -> None:
        """Keep the memory until a matching `release`, whatever happens to this object.

        An endpoint acquires its staging while the memory is registered. One that closes with a
        lease in doubt never releases, and the memory stays until the process ends.

        Raises
        ------
        ClosedError
            If the staging was closed.
        StagingError
            If it is in use: two endpoints would each hand out all of its slots.
        """
        with self._lock:
            if self._closed:
                raise ClosedError(
                    f"staging of {self.nbytes} bytes on {self.device} is closed; "
                    "open another Staging for a new endpoint"
                )
            if self._in_use:
                raise StagingError(
                    f"staging of {self.nbytes} bytes on {self.device} is in use by another "
                    "endpoint, which may be closed with peers that may still write to it; open "
                    "another Staging"
                )
            self._in_use = True
            _acquired.add(self)

    def release(self) -> None:
        """Undo `acquire`; frees the memory if the staging is closed.

        Raises
        ------
        StagingError
            If it was not acquired.
        """
        with self._lock:
            if not self._in_use:
                raise StagingError("staging is released more often than it was acquired")
            self._in_use = False
            _acquired.discard(self)
            if self._closed:
                self._free()

    def close(self) -> None:
        """Free the memory, now or, while an endpoint uses it, at that endpoint's release.

        Closing twice is harmless. Tensors and arrays of this staging must not be used afterwards.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if not self._in_use:
                self._free()

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _free(self) -> None:
        self._freed = True
        for view in ("tensor", "array", "_whole"):
            self.__dict__.pop(view, None)
        self._memory.free()

    def _check_memory(self) -> None:
        if self._freed:
            raise ClosedError(
                f"staging of {self.nbytes} bytes on {self.device} is closed and its memory freed"
            )


# Keeps acquired memory alive when its owner forgets it: a peer may still be writing there.
_acquired: set[Staging] = set()


def _split(nbytes: int, slot_bytes: int, send_fraction: float) -> tuple[int, int]:
    """Return the slots of the send and of the receive pool."""
    if slot_bytes < 1 or slot_bytes % SLOT_ALIGNMENT_BYTES:
        raise StagingError(
            f"slot_bytes={slot_bytes} is not a positive multiple of {SLOT_ALIGNMENT_BYTES}; "
            f"the default is {DEFAULT_SLOT_BYTES}"
        )
    if not 0.0 < send_fraction < 1.0:
        raise StagingError(
            f"send_fraction={send_fraction} is outside (0, 1): both pools need at least one slot"
        )
    slots = nbytes // slot_bytes
    if slots < 2:
        raise StagingError(
            f"staging of {nbytes} bytes is smaller than one slot of {slot_bytes} bytes for each of "
            f"its two pools; give it at least {2 * slot_bytes} bytes, or smaller slots"
        )
    send_slots = min(max(round(slots * send_fraction), 1), slots - 1)
    return send_slots, slots - send_slots


class _Memory(Protocol):
    """A contiguous region that somebody allocated; freed exactly once by its staging."""

    device: str
    address: int

    def as_array(self) -> npt.NDArray[np.uint8]: ...

    def as_tensor(self) -> torch.Tensor: ...

    def free(self) -> None: ...


def _allocate(device: str | torch.device, nbytes: int) -> _Memory:
    name = str(device)
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index.strip("0"):
        return _HostMemory(nbytes)
    if kind == "cuda" and (not index or index.isdecimal()):
        return _CudaMemory(int(index) if index else None, nbytes)
    raise StagingError(f"staging device {name!r} is none of 'cpu', 'cuda', 'cuda:<index>'")


class _HostMemory:
    """Page-aligned anonymous memory of this process."""

    device = "cpu"

    def __init__(self, nbytes: int) -> None:
        try:
            # Shared, not private: after a fork a write to a private page moves this process to a
            # copy of it, while a network card goes on with the page that it had registered.
            region = mmap.mmap(-1, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise StagingError(
                f"staging of {nbytes} bytes does not fit in host memory, of which "
                f"{_available_host_bytes()} bytes are available; ask for less"
            ) from error
        with contextlib.suppress(OSError):
            region.madvise(mmap.MADV_HUGEPAGE)
        self._bytes: npt.NDArray[np.uint8] | None = np.frombuffer(region, dtype=np.uint8)
        self.address = int(self._bytes.ctypes.data)

    def as_array(self) -> npt.NDArray[np.uint8]:
        assert self._bytes is not None
        return self._bytes

    def as_tensor(self) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.as_array())

    def free(self) -> None:
        # The pages go back with the last view, so that a view which outlives them cannot fault.
        self._bytes = None


def _available_host_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _CudaMemory:
    """Memory of one `cuMemAlloc` in the device's primary context, which torch uses too."""

    def __init__(self, index: int | None, nbytes: int) -> None:
        import torch

        name = "cuda" if index is None else f"cuda:{index}"
        if not torch.cuda.is_available():
            raise StagingError(
                f"staging on {name!r} needs a CUDA device and a CUDA build of torch, and torch "
                f"{torch.__version__} sees none; use device='cpu'"
            )
        if index is None:
            index = torch.cuda.current_device()
        if index >= torch.cuda.device_count():
            raise StagingError(
                f"staging device {name!r} is outside this machine's "
                f"{torch.cuda.device_count()} CUDA devices"
            )
        self.device = f"cuda:{index}"
        self._nbytes = nbytes
        context = _PrimaryContext(index)
        address = ctypes.c_uint64()
        free = ctypes.c_size_t()
        total = ctypes.c_size_t()
        try:
            with context as driver:
                status = driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(nbytes))
                driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
            if status == _CUDA_ERROR_OUT_OF_MEMORY:
                raise StagingError(
                    f"staging of {nbytes} bytes does not fit on {self.device}, of whose "
                    f"{total.value} bytes {free.value} are free; ask for less, or open the "
                    "staging before the engine takes its share"
                )
            _check(driver, status, "cuMemAlloc")
        except BaseException:
            context.release()
            raise
        self.address = address.value
        # Also frees a region that was forgotten instead of closed. Not at exit: the driver may be
        # gone by then, and takes the memory with it.
        self._finalizer = weakref.finalize(self, _free, context, self.address, os.getpid())
        self._finalizer.atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self._nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }

    def as_array(self) -> npt.NDArray[np.uint8]:
        raise StagingError(f"staging on {self.device} has no NumPy array; use its tensor")

    def as_tensor(self) -> torch.Tensor:
        import torch

        return torch.as_tensor(self, device=self.device)

    def free(self) -> None:
        self._finalizer()


def _free(context: _PrimaryContext, address: int, process: int) -> None:
    # A forked child has neither the context nor the memory.
    if os.getpid() != process:
        return
    with context as driver:
        driver.cuMemFree_v2(ctypes.c_uint64(address))
    context.release()


_CUDA_ERROR_OUT_OF_MEMORY = 2


class _PrimaryContext:
    """A device's primary context, retained; current inside a `with` block."""

    def __init__(self, index: int) -> None:
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise StagingError(
                f"staging on 'cuda:{index}' needs the NVIDIA driver's libcuda.so.1 ({error}); "
                "use device='cpu'"
            ) from error
        self._device = ctypes.c_int()
        self._handle = ctypes.c_void_p()
        driver = self._driver
        _check(driver, driver.cuInit(0), "cuInit")
        _check(driver, driver.cuDeviceGet(ctypes.byref(self._device), index), "cuDeviceGet")
        _check(
            driver,
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._handle), self._device),
            "cuDevicePrimaryCtxRetain",
        )

    def __enter__(self) -> ctypes.CDLL:
        _check(self._driver, self._driver.cuCtxPushCurrent_v2(self._handle), "cuCtxPushCurrent")
        return self._driver

    def __exit__(self, *exc: object) -> None:
        self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def release(self) -> None:
        self._driver.cuDevicePrimaryCtxRelease_v2(self._device)


def _check(driver: ctypes.CDLL, status: int, call: str) -> None:
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown error"
        raise StagingError(f"{call} failed with CUDA error {status}: {reason}")
