"""The Triton kernels compiled for Hopper, which needs no GPU: access width, registers, spills."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvpack.kernels.launch import interpreted
from kvpack.kernels.specializations import Specialization, specializations

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(interpreted(), reason="an interpreted kernel is not compiled")

VECTOR_LOAD = re.compile(r"\bld\.global\S*\.v(?:2\.b64|4\.b32)\b")
VECTOR_STORE = re.compile(r"\bst\.global\S*\.v(?:2\.b64|4\.b32)\b")
SHARED = re.compile(r"\b(?:ld|st)\.shared|\bbar\.sync")
MULTIPROCESSOR_REGISTERS = 1 << 16
NAMES = [
    "kvpack_gather_any_1024",
    "kvpack_gather_any_4096",
    "kvpack_gather_16_1024",
    "kvpack_gather_16_4096",
    "kvpack_scatter_any_1024",
    "kvpack_scatter_any_4096",
    "kvpack_scatter_16_1024",
    "kvpack_scatter_16_4096",
    "kvpack_expand_2_1024",
    "kvpack_expand_3_1024",
]


@dataclass(frozen=True)
class Compiled:
    name: str
    ptx: str
    registers: int
    threads: int
    stack_bytes: int


def cuobjdump() -> Path:
    from triton.backends import nvidia

    return Path(nvidia.__file__ or nvidia.__path__[0]).parent / "bin" / "cuobjdump"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Every specialisation, compiled for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kvpack.kernels import programs

    scratch = tmp_path_factory.mktemp("cubins")

    def compile_one(specialization: Specialization) -> Compiled:
        constants = specialization.constants
        source = ASTSource(
            getattr(programs, specialization.kernel),
            {"upload": "*i64", **dict.fromkeys(constants, "constexpr")},
            constants,
            {(0,): [["tt.divisibility", 16]]},
        )
        kernel = triton.compile(
            source,
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": specialization.num_warps},
        )
        cubin = scratch / f"{kernel.metadata.name}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [cuobjdump(), "-res-usage", cubin],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
        registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
        return Compiled(
            kernel.metadata.name, kernel.asm["ptx"], registers, 32 * specialization.num_warps, stack
        )

    kernels = [compile_one(specialization) for specialization in specializations()]
    return {kernel.name: kernel for kernel in kernels}


def test_the_specialisations_are_these_and_no_more(compiled):
    assert sorted(compiled) == sorted(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if "expand" not in name])
def test_16_byte_words_are_loaded_and_stored_whole(compiled, name):
    # Eight words a thread, within a run and across runs.
    assert len(VECTOR_LOAD.findall(compiled[name].ptx)) == 16
    assert len(VECTOR_STORE.findall(compiled[name].ptx)) == 16


@pytest.mark.parametrize("name", [name for name in NAMES if "_16_" in name])
def test_the_16_byte_class_stores_nothing_narrower(compiled, name):
    stores = re.findall(r"\bst\.global\S*", compiled[name].ptx)
    assert len(stores) == 16
    assert all(VECTOR_STORE.match(store) for store in stores)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_spills_and_nothing_passes_through_shared_memory(compiled, name):
    assert compiled[name].stack_bytes == 0
    assert not SHARED.search(compiled[name].ptx)
    programs = 1 if "_4096" in name else 3
    used = programs * compiled[name].threads * compiled[name].registers
    assert used <= MULTIPROCESSOR_REGISTERS, f"{programs} programs do not fit a multiprocessor"


def test_the_narrow_words_are_in_the_general_class(compiled):
    ptx = compiled["kvpack_gather_any_1024"].ptx
    for bits in (8, 16, 32, 64):
        assert len(re.findall(rf"\bst\.global\.b{bits}\b", ptx)) == 16
