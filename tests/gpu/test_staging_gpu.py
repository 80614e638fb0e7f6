"""Staging memory on a GPU: from the driver, visible to torch, given back at close."""

from __future__ import annotations

import gc

import pytest

from kvpack.errors import ClosedError, StagingError
from kvpack.staging import Staging

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SLOT = 64 * 1024


def test_torch_sees_the_driver_s_memory():
    with Staging("cuda", 64 * SLOT) as staging:
        assert staging.device == f"cuda:{torch.cuda.current_device()}"
        assert staging.address % 256 == 0
        assert staging.tensor.data_ptr() == staging.address
        view = staging.slot_view("receive", 3, 2)
        assert view.data_ptr() == staging.receive_window.slot_address(3)
        staging.tensor.zero_()
        view.fill_(0x5A)
        host = staging.tensor.cpu()
        start = (32 + 3) * SLOT
        assert (host[start : start + 2 * SLOT] == 0x5A).all()
        assert int(host.sum(dtype=torch.int64)) == 2 * SLOT * 0x5A


def test_memory_is_not_torch_s_and_goes_back_at_close():
    torch.cuda.init()
    nbytes = 256 << 20
    reserved = torch.cuda.memory_reserved()
    free = torch.cuda.mem_get_info()[0]
    staging = Staging("cuda", nbytes)
    assert torch.cuda.memory_reserved() == reserved
    assert free - torch.cuda.mem_get_info()[0] >= nbytes
    staging.close()
    assert abs(torch.cuda.mem_get_info()[0] - free) < 16 << 20
    with pytest.raises(ClosedError):
        staging.slot_view("send", 0, 1)


def test_a_forgotten_staging_gives_its_memory_back():
    torch.cuda.init()
    free = torch.cuda.mem_get_info()[0]
    staging = Staging("cuda", 256 << 20)
    view = staging.tensor[:4]
    del staging
    gc.collect()
    assert free - torch.cuda.mem_get_info()[0] >= 256 << 20, "a tensor still sees the memory"
    del view
    gc.collect()
    assert abs(torch.cuda.mem_get_info()[0] - free) < 16 << 20


def test_memory_stays_while_an_endpoint_uses_it():
    staging = Staging("cuda", 16 * SLOT)
    staging.acquire()
    staging.close()
    staging.slot_view("send", 0, 1).fill_(1)
    torch.cuda.synchronize()
    staging.release()
    with pytest.raises(ClosedError):
        staging.slot_view("send", 0, 1)


def test_more_than_the_device_has_is_refused_with_what_is_free():
    with pytest.raises(StagingError, match="are free"):
        Staging("cuda", 1 << 50)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(StagingError, match="CUDA devices"):
        Staging(f"cuda:{torch.cuda.device_count()}", 1 << 20)


def test_allocation_leaves_the_current_context_alone():
    before = torch.ones(4, device="cuda")
    with Staging("cuda", 16 * SLOT):
        assert (before + 1).sum().item() == 8
    assert (before + 1).sum().item() == 8
