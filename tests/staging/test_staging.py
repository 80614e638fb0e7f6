"""Staging memory on the CPU: geometry, views, errors and lifetime."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest

from kvpack.errors import ClosedError, StagingError
from kvpack.staging import Staging

SLOT = 4096


def test_pools_share_one_region_and_do_not_overlap():
    with Staging("cpu", 10 * SLOT, slot_bytes=SLOT, send_fraction=0.3) as staging:
        send, receive = staging.send_window, staging.receive_window
        assert (staging.send_slots, staging.receive_slots) == (3, 7)
        assert send.address == staging.address
        assert receive.address == send.address + send.nbytes
        assert receive.address + receive.nbytes == staging.address + staging.nbytes
        assert receive.slot_address(2) == receive.address + 2 * SLOT


def test_memory_starts_on_a_page_and_is_rounded_down_to_slots():
    with Staging("cpu", 5 * SLOT + 17, slot_bytes=SLOT) as staging:
        assert staging.address % mmap.PAGESIZE == 0
        assert staging.nbytes == 5 * SLOT == staging.array.nbytes


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_each_pool_gets_a_slot_at_least(fraction):
    with Staging("cpu", 3 * SLOT, slot_bytes=SLOT, send_fraction=fraction) as staging:
        assert min(staging.send_slots, staging.receive_slots) >= 1
        assert staging.send_slots + staging.receive_slots == 3


def test_views_are_the_memory_itself():
    with Staging("cpu", 8 * SLOT, slot_bytes=SLOT) as staging:
        generator = np.random.default_rng(3)
        staging.array[:] = generator.integers(0, 256, staging.nbytes, dtype=np.uint8)
        before = staging.array.copy()
        view = staging.slot_view("receive", 1, 2)
        assert view.ctypes.data == staging.receive_window.slot_address(1)
        assert view.shape == (2 * SLOT,)
        view[:] = 0xA5
        start = 5 * SLOT
        assert (staging.array[start : start + 2 * SLOT] == 0xA5).all()
        outside = np.ones(staging.nbytes, dtype=bool)
        outside[start : start + 2 * SLOT] = False
        assert (staging.array[outside] == before[outside]).all()


def test_the_tensor_is_the_same_memory():
    torch = pytest.importorskip("torch")
    with Staging(torch.device("cpu"), 4 * SLOT, slot_bytes=SLOT) as staging:
        assert staging.tensor.dtype == torch.uint8
        assert staging.tensor.data_ptr() == staging.address
        staging.array[7] = 42
        assert staging.tensor[7].item() == 42


@pytest.mark.parametrize(("slot", "slots"), [(-1, 1), (0, 0), (0, 5), (4, 1), (3, 2)])
def test_slots_outside_the_pool_are_refused(slot, slots):
    with (
        Staging("cpu", 8 * SLOT, slot_bytes=SLOT) as staging,
        pytest.raises(StagingError, match="send pool's 4 slots"),
    ):
        staging.slot_view("send", slot, slots)


@pytest.mark.parametrize("nbytes", [-1, 0, 1, SLOT, 2 * SLOT - 1])
def test_less_than_a_slot_a_pool_is_refused_with_the_bound(nbytes):
    with pytest.raises(StagingError, match=f"{nbytes} bytes.* at least {2 * SLOT} bytes"):
        Staging("cpu", nbytes, slot_bytes=SLOT)


@pytest.mark.parametrize("slot_bytes", [0, -256, 100, 257])
def test_slots_that_break_alignment_are_refused(slot_bytes):
    with pytest.raises(StagingError, match=f"slot_bytes={slot_bytes}"):
        Staging("cpu", 1 << 20, slot_bytes=slot_bytes)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_a_pool_without_a_share_is_refused(fraction):
    with pytest.raises(StagingError, match="send_fraction"):
        Staging("cpu", 1 << 20, send_fraction=fraction)


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:x", "cpu:1", ""])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(StagingError, match="device"):
        Staging(device, 1 << 20)


def test_more_than_the_machine_has_is_refused_with_what_it_has():
    with pytest.raises(StagingError, match="bytes are available"):
        Staging("cpu", 1 << 60)


def test_cuda_on_a_machine_without_it_is_refused():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(StagingError, match="device='cpu'"):
        Staging("cuda:0", 1 << 20)


def test_after_close_nothing_is_handed_out():
    staging = Staging("cpu", 4 * SLOT, slot_bytes=SLOT)
    staging.slot_view("send", 0, 1)
    staging.close()
    staging.close()
    for use in (
        lambda: staging.array,
        lambda: staging.tensor,
        lambda: staging.slot_view("send", 0, 1),
        staging.acquire,
    ):
        with pytest.raises(ClosedError, match="closed"):
            use()


def test_close_waits_for_the_user_of_whom_there_is_one_at_a_time():
    staging = Staging("cpu", 4 * SLOT, slot_bytes=SLOT)
    staging.acquire()
    with pytest.raises(StagingError, match="in use by another endpoint"):
        staging.acquire()
    staging.close()
    staging.slot_view("receive", 0, 1)[:] = 9
    staging.release()
    with pytest.raises(ClosedError):
        staging.slot_view("receive", 0, 1)


def test_release_without_acquire_is_refused():
    with Staging("cpu", 4 * SLOT, slot_bytes=SLOT) as staging:
        with pytest.raises(StagingError, match="more often"):
            staging.release()
        staging.acquire()
        staging.release()
        with pytest.raises(StagingError, match="more often"):
            staging.release()


def test_memory_in_doubt_outlives_every_reference():
    kept = Staging("cpu", 4 * SLOT, slot_bytes=SLOT)
    kept.acquire()
    kept.close()
    alive = weakref.ref(kept)
    forgotten = weakref.ref(Staging("cpu", 4 * SLOT, slot_bytes=SLOT))
    del kept
    gc.collect()
    assert forgotten() is None
    staging = alive()
    assert staging is not None
    staging.release()


def test_close_gives_the_pages_back():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE

    nbytes = 64 << 20
    before = resident()
    staging = Staging("cpu", nbytes)
    assert resident() < before + nbytes // 2, "memory must be taken when touched, not before"
    staging.array[:] = 1
    assert resident() > before + nbytes // 2
    staging.close()
    assert resident() < before + nbytes // 2


def test_host_staging_needs_no_torch():
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from kvpack.staging import Staging\n"
        "with Staging('cpu', 1 << 20) as staging:\n"
        "    staging.slot_view('send', 0, 1)[:] = 1\n"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=60, cwd=os.path.dirname(__file__)
    )
